"""Peers that do not let this node in: not asked again for every client, and not written about each time.

Theory of operation. A peer that hangs up as soon as it knows who calls will do so the next time, too. A local client
that connects again and again, as many do, would have it dialled each time, with a handshake on both sides. So after the
second refusal in a row whoever wants a stream to the peer is refused at once, for a second at first and twice as long
after each further one. The first is not held against the peer, because one that is just being replaced looks the same.
What may change its mind ends the wait: any word of the peer's, its own coming, a new configuration or policy. Who has a
pace of its own, or is a person, dials all the same.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable
from typing import Final, Generic, TypeVar

from actors.switchboard.upgrade import not_authorised
from protocol.peer_id import PeerId

FIRST: Final = 1.0
"""Seconds during which nobody dials after the second refusal."""

LONGEST: Final = 30.0
"""The most: whoever has just been let in there waits no longer than that."""

REMEMBERED: Final = 1024
"""Peers that are remembered; one that is forgotten is dialled once more."""

LINE_INTERVAL: Final = 60.0
"""Seconds between lines of the log about the same thing."""

K = TypeVar("K")


@dataclasses.dataclass
class _Refused:
    times: int
    until: float


class Refusals:
    """Who refused us, and until when nobody need ask. `now` is the clock."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._refused: collections.OrderedDict[PeerId, _Refused] = collections.OrderedDict()

    def note(self, peer: PeerId) -> None:
        """The peer has hung up on us. To be called once for each dial."""
        now = self._now()
        known = self._refused.get(peer)
        times = 1 if known is None else known.times + 1
        wait = 0.0 if times < 2 else min(LONGEST, FIRST * 2.0 ** min(times - 2, 16))
        self._refused[peer] = _Refused(times, now + wait)
        self._refused.move_to_end(peer)
        if len(self._refused) > REMEMBERED:
            self._refused.popitem(last=False)

    def check(self, peer: PeerId) -> None:
        """Whether it is worth while to dial the peer for a stream.

        Raises:
            NotAuthorisedError: it is not: this is what the peer would say.
        """
        known = self._refused.get(peer)
        if known is not None and self._now() < known.until:
            raise not_authorised()

    def __contains__(self, peer: PeerId) -> bool:
        """Whether the peer refused us the last time."""
        return peer in self._refused

    def forget(self, peer: PeerId) -> None:
        """The peer has spoken to us."""
        self._refused.pop(peer, None)

    def clear(self) -> None:
        """Much may have changed."""
        self._refused.clear()


class Rare(Generic[K]):
    """Says which of many like events are worth a line: the first, and then one each `interval` seconds."""

    def __init__(self, now: Callable[[], float], interval: float = LINE_INTERVAL) -> None:
        self._now = now
        self._interval = interval
        self._last: collections.OrderedDict[K, tuple[float, int]] = collections.OrderedDict()

    def note(self, key: K) -> str | None:
        """An event: None if it is worth no line, else what belongs to the end of the line."""
        now = self._now()
        said, unsaid = self._last.get(key, (float("-inf"), 0))
        if now - said < self._interval:
            self._last[key] = (said, unsaid + 1)
            return None
        self._last[key] = (now, 0)
        self._last.move_to_end(key)
        if len(self._last) > REMEMBERED:
            self._last.popitem(last=False)
        return f" (and {unsaid} times more in {now - said:.0f} s)" if unsaid else ""

    def forget(self, key: K) -> None:
        """It is over: the next one is a first one."""
        self._last.pop(key, None)
