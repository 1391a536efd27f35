"""Routes that show messages: as they pass, and why they were sent.

GET /v1/tap?from=&to=&kind=&limit=&seconds=&rate=   NDJSON, one line per message; ends by itself
GET /v1/why/{id}                                    the chain of causes, from the message back to its origin
"""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncGenerator

import trio

from actors.api.node import Node
from actors.api.present import body_of, plain
from actors.api.routing import Answer, Call, Routes, data_response, lines_response
from actors.api.watchers import Tap
from actors.http import Work
from protocol.messages import Data, Envelope
from protocol.messages.system import EdgeFilter, JournalEntry, Ping, Pong, ReadJournal, ReadTree, Tapped, Tree
from supervisor.errors import RefusedError

LONGEST_TAP = 3600.0
"""Seconds that a tap may last."""

LONGEST_CHAIN = 64
"""Steps that `why` follows; real chains are shorter than ten."""

ROUTINE = frozenset({Ping.KIND, Pong.KIND, ReadTree.KIND, Tree.KIND})
"""Kinds that are hidden unless asked for: heartbeats, most of what an idle node says, and readings of the tree, which a
tap itself causes."""

routes = Routes()


@routes.on("GET", "/v1/tap", Work.WAITING)
async def tap(node: Node, call: Call) -> Answer:
    """Copies of the messages that match, as they pass."""
    match = EdgeFilter(call.optional_text("from"), call.optional_text("to"), call.optional_text("kind"))
    limit = call.whole("limit", 0, low=0, high=1_000_000)
    seconds = call.number("seconds", 10.0, low=0.1, high=LONGEST_TAP)
    rate = call.number("rate", 200.0, low=0.1, high=10_000)
    hidden = frozenset() if match.kind is not None or call.flag("all") else ROUTINE
    opened = await node.watchers.open_tap(match, seconds=seconds, rate=rate)
    return lines_response(
        _copies(node, opened, limit=limit, ends=trio.current_time() + seconds, rate=rate, hidden=hidden)
    )


async def _copies(
    node: Node, tap: Tap, *, limit: int, ends: float, rate: float, hidden: frozenset[str]
) -> AsyncGenerator[Data]:
    """The tap's lines. Each actor keeps the rate for itself; here it is kept for the sum of them."""
    sent = skipped = 0
    allowance, since = max(1.0, rate), trio.current_time()
    try:
        while not limit or sent < limit:
            copy: Tapped | None = None
            with trio.move_on_at(ends):
                copy = await tap.receive.receive()
            if copy is None:
                break
            skipped += copy.skipped + tap.lost
            tap.lost = 0
            envelope = Envelope.from_bytes(copy.envelope)
            if envelope.kind in hidden:
                continue
            now = trio.current_time()
            allowance, since = min(max(1.0, rate), allowance + (now - since) * rate), now
            if allowance < 1.0:
                skipped += 1
                continue
            allowance -= 1.0
            yield _line(node, copy, envelope, skipped)
            sent, skipped = sent + 1, 0
        if skipped:
            yield {"skipped": skipped}
    finally:
        node.watchers.close_tap(tap)


def _line(node: Node, copy: Tapped, envelope: Envelope, skipped: int) -> dict[str, Data]:
    return {
        "at": node.wall_time(copy.at),
        "id": envelope.id,
        "cause": envelope.cause,
        "reply_to": envelope.reply_to,
        "sender": envelope.sender,
        "target": envelope.target,
        "kind": envelope.kind,
        "deadline": envelope.deadline,
        "size": len(envelope.body),
        "cut": copy.cut,
        "body": None if copy.cut else body_of(envelope),
        "skipped": skipped,
    }


@routes.on("GET", "/v1/why/{id}")
async def why(node: Node, call: Call) -> Answer:
    """The chain of causes: the message, the one whose handling led to it, and so on to the origin."""
    wanted: str | None = call.text("id")
    names = [child.name for child in await node.tree()]
    chain: list[JournalEntry] = []
    forgotten: str | None = None
    while wanted is not None and len(chain) < LONGEST_CHAIN:
        entry = await _find(node, names, wanted)
        if entry is None:
            forgotten = wanted
            break
        chain.append(entry)
        # An answer has the request as its reason even where it names no cause.
        cause = entry.cause or entry.reply_to
        wanted = None if cause in {known.id for known in chain} else cause
    if not chain:
        raise RefusedError(
            "not-found",
            f"no actor remembers a message {wanted or forgotten!r}",
            "actors remember the last few thousand messages; `peerup tap --json` shows ids as they pass",
        )
    steps = [dataclasses.replace(entry, at=node.wall_time(entry.at)) for entry in chain]
    return data_response({"chain": plain(steps), "forgotten": forgotten})


async def _find(node: Node, names: list[str], ident: str) -> JournalEntry | None:
    # The id tells who sent it. If that actor was restarted since, a receiver may still remember.
    sender = ident.rsplit(":", 2)[0]
    first = [name for name in names if name == sender]
    for group in (first, [name for name in names if name != sender]):
        answers, _ = await node.ask_each(group, ReadJournal((ident,)))
        for answer in answers.values():
            for entry in answer.entries:
                if entry.id == ident:
                    return entry
    return None
