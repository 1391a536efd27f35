"""One peer's share of the audit log: beyond a rate its lines are counted instead of written one by one.

Theory of operation. The log is bounded, so whoever makes many lines pushes out what others did. Each peer has a bucket
of lines. While there is something in it, an event is a line of its own. When it is empty, events that are alike (same
kind, service, outcome and so on) are added up, and each sum becomes one line at the end of a minute: how many, when the
first and the last were, and what they carried together. What was refused is never added up here: refusals are few, or
were counted by who refused (`actors.switchboard.decisions`).
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Mapping
from typing import Final

from protocol.token_bucket import TokenBucket

LINES: Final = 512.0
"""Lines of one peer that may come at once: an afternoon of a busy web service behind a tunnel;"""
LINES_PER_SECOND: Final = 0.5
"""and so many a second in the long run: 43,000 a day, some 12 MB, an eighth of what the log and its old files hold."""
SUM_SECONDS: Final = 60.0
"""How long events are added up."""
MAX_SUMS: Final = 32
"""Kinds of events of one peer that are told apart meanwhile; the rest is one more kind."""
MAX_PEERS: Final = 4096
"""Peers whose buckets are kept; who has been quiet for longest is forgotten."""

_ADDED: Final = ("sent", "received", "duration", "count")


@dataclasses.dataclass
class _Sum:
    event: str
    fields: dict[str, object]
    count: int
    first: float
    last: float
    totals: dict[str, float]


@dataclasses.dataclass
class _Peer:
    bucket: TokenBucket
    sums: dict[Hashable, _Sum] = dataclasses.field(default_factory=dict)
    since: float = 0.0  # when the oldest sum was begun


class AuditShares:
    """All peers' shares."""

    def __init__(self) -> None:
        self._peers: OrderedDict[str, _Peer] = OrderedDict()

    def take(self, peer: str, event: str, fields: Mapping[str, object], *, now: float, wall: float) -> bool:
        """Whether this event of a peer may be a line of its own; if not, it has been added to a sum."""
        known = self._peers.get(peer)
        if known is None:
            known = self._peers[peer] = _Peer(TokenBucket(LINES_PER_SECOND, LINES, now))
        self._peers.move_to_end(peer)
        if known.bucket.level(now) >= 1:
            known.bucket.take(1, now)
            return True
        if not known.sums:
            known.since = now
        alike = {key: value for key, value in fields.items() if key not in _ADDED}
        key: Hashable = (event, *sorted((name, str(value)) for name, value in alike.items()))
        if key not in known.sums and len(known.sums) >= MAX_SUMS:
            key, alike = event, {"peer": peer, "mixed": True}
        added = known.sums.get(key)
        if added is None:
            added = known.sums[key] = _Sum(event, alike, 0, wall, wall, {})
        count = fields.get("count", 1)
        added.count += count if isinstance(count, int) else 1
        added.last = wall
        for name in ("sent", "received", "duration"):
            value = fields.get(name)
            if isinstance(value, int | float):
                added.totals[name] = added.totals.get(name, 0) + value
        return False

    def due(self, now: float, *, everything: bool = False) -> Iterator[tuple[str, dict[str, object]]]:
        """The sums to be written now: an event each, and its fields."""
        for known in self._peers.values():
            if known.sums and (everything or now - known.since >= SUM_SECONDS):
                sums, known.sums = known.sums, {}
                for added in sums.values():
                    totals = {name: round(value, 3) for name, value in added.totals.items()}
                    seconds = round(added.last - added.first, 3)
                    yield added.event, {**added.fields, **totals, "count": added.count, "within": seconds}
        while len(self._peers) > MAX_PEERS:
            peer, oldest = next(iter(self._peers.items()))
            if oldest.sums:
                break
            del self._peers[peer]
