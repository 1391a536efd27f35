"""What one peer may make us keep: the bytes that it has sent and that nobody here has taken yet.

Theory of operation. A reader that does not read makes us keep up to one window of its stream; that is what windows are
for. But a peer may open a thousand streams on each of several connections to services that do not read, and windows
that were emptied quickly have grown, so together they could be gigabytes. So what is kept for one peer, over all of its
connections, has a limit of its own. Whoever has something to keep asks first, and resets the stream if it may not.

The kernel keeps bytes for a peer as well: what was written to a socket whose reader does not read, and what came to one
whose bytes the peer does not take. Sockets within this machine begin with small buffers, and get large ones, which save
time, when much goes through them; how many of one peer's have them is limited (`LARGE`).

A stream may always keep a little (`FLOOR`): when somebody's paused downloads have used up the budget, a terminal beside
them goes on, as its reader is never far behind.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Final

from protocol.peer_id import PeerId

LIMIT: Final = 96 * 1024 * 1024
"""Bytes that are kept for one peer: as much as windows can have grown by, and a hundred whole ones besides."""
LARGE: Final = 24
"""Large buffers, of one direction of one socket each, that are given to one peer: with their bookkeeping at most 96 MiB
of the kernel's memory."""
FLOOR: Final = 16 * 1024
"""Bytes that each stream may keep even then."""


class Budget:
    """The bytes kept for one peer.

    Attributes:
        limit, floor: bytes.
        kept: bytes, now.
    """

    __slots__ = ("__weakref__", "_large", "floor", "kept", "limit")

    def __init__(self, limit: int = LIMIT, floor: int = FLOOR) -> None:
        self.limit = limit
        self.floor = floor
        self.kept = 0
        self._large: dict[Callable[[], bool], None] = {}

    def enlarge(self, shrink: Callable[[], bool]) -> bool:
        """Whether one more buffer may be large. `shrink` makes it small again, if nothing is in it, and tells whether.

        It is asked for when somebody else wants a large one and there is none left.
        """
        if len(self._large) >= LARGE:
            for other in list(self._large):
                if other():
                    break
            else:
                return False
        self._large[shrink] = None
        return True

    def no_longer_large(self, shrink: Callable[[], bool]) -> None:
        """This buffer is small again, or gone. Twice is once."""
        self._large.pop(shrink, None)

    def take(self, length: int, of_stream: int) -> bool:
        """Whether a stream for which `of_stream` bytes are kept may keep `length` more; they are counted if so."""
        if self.kept + length > self.limit and of_stream + length > self.floor:
            return False
        self.kept += length
        return True

    def give_back(self, length: int) -> None:
        """So many bytes are kept no more."""
        self.kept -= length


class Budgets:
    """Of all peers; each lives as long as somebody uses it."""

    def __init__(self) -> None:
        self._of: weakref.WeakValueDictionary[PeerId, Budget] = weakref.WeakValueDictionary()

    def of(self, peer: PeerId) -> Budget:
        """The one of this peer."""
        budget = self._of.get(peer)
        if budget is None:
            budget = self._of[peer] = Budget()
        return budget
