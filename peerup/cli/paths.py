"""`peerup paths` and `peerup traceroute`: over which ways peers are connected, and how long they take."""

from __future__ import annotations

from typing import Any

import click

from peerup.cli.framework import EXIT_FAILURE, Session, command, examples
from peerup.cli.output import Column, note, short_id, size, table


def way_words(path: str, transport: str, relay: str | None, relay_name: str) -> str:
    """How a peer is connected in few words: `direct tcp`, `relayed tcp via vps`."""
    return f"{path} {transport}" if relay is None else f"{path} {transport} via {relay_name or short_id(relay)}"


@command(
    "paths",
    json_output=True,
    short_help="Show the live connections and their paths.",
    epilog=examples("peerup paths", "peerup paths home"),
)
@click.argument("peer", required=False)
def paths(session: Session, peer: str | None) -> None:
    """Show each live connection: to whom, over which path, and what passed.

    PATH: direct or relayed, the transport, the relay, and who connected: -> this node, <- the peer. One in parentheses
    is not used for new streams any more, because there is a better one. "in doubt": it gives no sign of life, and new
    streams look for another way until it does. RTT: the time to the peer and back, measured now. Nobody is dialled for
    this.
    """
    data = session.client.get("/v1/paths", **({} if peer is None else {"peer": peer}))
    columns = (
        Column("PEER"),
        Column("PATH", fold=True),
        Column("ADDRESS", fold=True),
        Column("RTT", right=True),
        Column("STREAMS", right=True),
        Column("SENT", right=True),
        Column("RECEIVED", right=True),
    )
    rows = [
        (
            path["name"] or short_id(path["peer_id"]),
            _way(path),
            path["remote_address"],
            "no answer" if path["rtt"] is None else f"{path['rtt'] * 1000:.1f}ms",
            path["streams"],
            size(path["sent"]),
            size(path["received"]),
        )
        for path in data
    ]
    whom = "any peer" if peer is None else peer

    def show() -> None:
        table(columns, rows, empty=f"not connected to {whom}")
        _explain(data)

    session.show(data, show)


def _explain(data: list[dict[str, Any]]) -> None:
    for path in data:
        name = path["name"] or short_id(path["peer_id"])
        if path["failure"]:
            note(f"{name} does not answer: {path['failure']}")
        if path["in_doubt"]:
            note(f"{name} gives no sign of life over {_way(path).removesuffix(' in doubt')}; new streams avoid it")
        if path["limit_seconds"] or path["limit_bytes"]:
            note(f"{name}: the relay grants this circuit {_limit(path)}")
        if path["no_direct"]:
            note(f"{name} is not reached directly: {path['no_direct']}")


def _way(path: dict[str, Any]) -> str:
    arrow = "<-" if path["direction"] == "inbound" else "->"
    words = f"{way_words(path['path'], path['transport'], path['relay'], path['relay_name'])} {arrow}"
    words = words if path["in_use"] else f"({words})"
    return f"{words} in doubt" if path["in_doubt"] else words


def _limit(path: dict[str, Any]) -> str:
    granted = [f"{path['limit_seconds']} s"] if path["limit_seconds"] else []
    granted += [f"{size(path['limit_bytes'])} each way"] if path["limit_bytes"] else []
    return " and ".join(granted)


@command(
    "traceroute",
    json_output=True,
    short_help="Show the hops to a peer, with times.",
    epilog=examples("peerup traceroute home"),
)
@click.argument("peer")
def traceroute(session: Session, peer: str) -> None:
    """Show the hops to a peer, this node, a relay if there is one, the peer, with the time to each and back.

    Connects first if need be. RTT: the time to this hop and back; that of the peer holds that of the relay before it.
    Exit status 1 if the peer did not answer.
    """
    from peerup.client import segment

    session.wait_message(f"tracing the way to {peer}...")
    data = session.client.get(f"/v1/peers/{segment(peer)}/traceroute")
    columns = (Column("HOP", right=True), Column("WHO"), Column("ADDRESS", fold=True), Column("RTT", right=True))
    rows = [
        (
            hop["hop"],
            "this node" if hop["role"] == "node" else f"{hop['role']} {hop['name'] or short_id(hop['peer_id'])}",
            hop["address"] or "-",
            "-" if hop["role"] == "node" else "no answer" if hop["rtt_ms"] is None else f"{hop['rtt_ms']:.2f}ms",
        )
        for hop in data["hops"]
    ]
    session.show(data, lambda: _show_hops(columns, rows, data))
    if data["hops"][-1]["rtt_ms"] is None:
        raise click.exceptions.Exit(EXIT_FAILURE)


def _show_hops(columns: tuple[Column, ...], rows: list[tuple[Any, ...]], data: dict[str, Any]) -> None:
    table(columns, rows, empty="")
    if data["connected_in_ms"] is not None:
        note(f"connected in {data['connected_in_ms']:.0f} ms")
    for hop in data["hops"]:
        if hop["failure"]:
            note(f"hop {hop['hop']}: {hop['failure']}")
