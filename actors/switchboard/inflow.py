"""How fast the bytes of one stream come in, and the window with which its sender keeps a short queue.

A peerup that sends keeps its own queue short (`actors.switchboard.batch`). Other implementations write as much as the
stream's window admits to one FIFO, in front of everything that they say on other streams. So while a connection
carries more than one stream, one that brings much is granted little more than what is under way without a queue.

Theory of operation. What came within `SAMPLE` seconds is one sample; the largest of the last `SAMPLES` is the rate,
because a stream that was granted too little, or a path that has lost a packet, brings less than the path takes. The
window is what the rate brings in twice the least round trip and `QUEUE` seconds: one half is under way, and where
others fill the queue of the path, or round trips vary, there is room for as much again. It is `LEAST` bytes or more.
"""

from __future__ import annotations

from collections import deque
from typing import Final

SAMPLE: Final = 0.1
"""Seconds of one sample, at least: several bursts."""

SAMPLES: Final = 100
"""Of which the largest counts: ten seconds or more, in which a sender that was held up goes on."""

QUEUE: Final = 0.025
"""Seconds of its bytes that may wait besides."""

LEAST: Final = 32 * 1024
"""Bytes of a window; less is not worth it, and would slow down a path whose round trips have become longer."""

FAST: Final = 12_500_000
"""Bytes a second of a connection from which a queue of some hundred kilobytes does not matter, and larger grants save
work."""

PAUSE: Final = 1.0
"""Seconds without a byte after which a sample begins anew."""


class Inflow:
    """What one stream brings, or all of a connection.

    Attributes:
        rate: bytes a second, the largest sample; 0 before there is one.
    """

    __slots__ = ("_came", "_last", "_samples", "_since", "rate")

    def __init__(self) -> None:
        self._samples: deque[float] = deque(maxlen=SAMPLES)
        self._since: float | None = None
        self._last = 0.0
        self._came = 0
        self.rate = 0.0

    def came(self, length: int, now: float) -> None:
        """So many bytes have come and gone on."""
        if self._since is None or now - self._last > PAUSE:
            self._since, self._came = now, 0  # these are not of the time after `now`
        else:
            self._came += length
            elapsed = now - self._since
            if elapsed >= SAMPLE:
                self._samples.append(self._came / elapsed)
                self.rate = max(self._samples)
                self._since, self._came = now, 0
        self._last = now

    def window(self, least_rtt: float) -> int | None:
        """Bytes to grant in all; None where there is no reason to grant less than what the sender uses up.

        `least_rtt`: seconds; 0 if it is not known.
        """
        if not least_rtt or not self.rate:
            return None
        return max(LEAST, round(self.rate * (2 * least_rtt + QUEUE)))
