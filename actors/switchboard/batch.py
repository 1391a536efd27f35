"""How much a link seals ahead of its wire: a few milliseconds' worth once the wire does not take everything at once.

Theory of operation. What is sealed has its place in the order of the wire, and nothing that comes later, be it a single
keystroke, can overtake it; the same holds for what the kernel has taken and not sent yet. On a slow path a batch that
is cheap to make (256 KiB) is a queue of a fifth of a second at 10 Mbit/s and of two seconds at 1 Mbit/s. So:

- A batch holds what the wire takes in `AHEAD` seconds, and the kernel is told to ask for more only when less than that
  is left unsent (`Wire.limit_unsent`, which is TCP_NOTSENT_LOWAT). It would still take more, up to a segment of 64 KiB,
  so it is also asked how much it holds (`Wire.unsent`). What it holds besides is under way on the network, as its
  congestion control will have it.
- The rate is measured between two moments at which the wire took less than it was offered: it was full at both, so what
  it took between them is what it has passed on. Moments between which the link had nothing to send are not compared.
- While a wire takes one batch after the other and is not full, each is twice as large as the one before. So a fast path
  (loopback: a gigabyte a second) has full batches at once. The first time that it is full this is over.
"""

from __future__ import annotations

from typing import Final

AHEAD: Final = 0.01
"""Seconds of sending that are sealed ahead, and as many that the kernel may hold unsent: enough for a process to be
woken in time."""

LEAST: Final = 4 * 1024
"""Bytes: three segments of TCP; with less the headers and the wake-ups would cost more than the time they save."""

START: Final = 16 * 1024
"""Bytes ahead before anything is known: what TCP itself sends at first."""

MOST: Final = 4 * 1024 * 1024
"""Bytes ahead on the fastest path: more than the kernel keeps."""

SAMPLE: Final = 0.05
"""Seconds over which a rate is measured, at least: several bursts of a path's acknowledgements."""

MUCH: Final = 512 * 1024
"""Bytes that say how fast a wire is in less time than that."""


class Ahead:
    """How far a link may seal ahead of its wire.

    Attributes:
        size: bytes of the next batch.
        base: bytes by the measured rate, which is what the wire may hold unsent.
    """

    __slots__ = ("_since", "_taken", "base", "size")

    def __init__(self, base: int = START) -> None:
        self.base = self.size = base
        self._since: float | None = None  # when the wire was last seen full, if the link has had something since
        self._taken = 0

    def taken(self, length: int) -> None:
        """The wire took so many bytes."""
        self._taken += length

    def refused(self, now: float) -> None:
        """The wire is full: it did not take all that it was offered."""
        if self._since is None:
            self._since, self._taken = now, 0
        else:
            elapsed = now - self._since
            if elapsed >= SAMPLE or (self._taken >= MUCH and elapsed > 0):
                self.base = min(max(round(self._taken / elapsed * AHEAD), LEAST), MOST)
                self._since, self._taken = now, 0
        self.size = self.base

    def nothing_left(self) -> None:
        """The wire took all that there was: what it takes from now on says how much there is, not how fast it is."""
        self._since = None

    def in_a_row(self) -> None:
        """The wire took several batches one after the other and is still not full."""
        self.size = min(self.size * 2, MOST)
