"""What a peer may make a node do for nothing.

Theory of operation. Some of what a peer may send costs it a few bytes and the node a hundred times the work: proposals
of protocols that nobody speaks, streams opened and taken back, frames of one byte. None of it is wrong, and honest
programs do all of it now and then, so it cannot be refused. It is paid for instead: each peer has one allowance, over
all its connections, in units of about a microsecond of CPU. What brings nothing is charged what it costs (more where
nobody honest does it often), time refills the allowance, and bulk and answers that the peer gets earn a little back. A
peer whose allowance is used up has its connections ended, and stays in debt for some seconds, so that connecting anew
gains it nothing.

What a service answers is not charged, however small: that is what the peer was let in for.

The figures come from `python -m tests.abuse.measure_cost_per_byte`.
"""

from __future__ import annotations

from typing import Final

from protocol.token_bucket import TokenBucket

BURST: Final = 1_000_000.0
"""Units that may be spent at once: about a second of CPU."""
RATE: Final = 100_000.0
"""Units that come back in a second: about a tenth of one processor."""
PENALTY: Final = 0.5
"""Of the burst, taken from whoever has used up all: the time until it may connect again."""

IDLE: Final = 500.0
"""A frame that moves nothing: a ping, an empty frame, one for a stream that never was. Nobody needs many."""
OPENED: Final = 500.0
"""A stream that was opened; given back when it is accepted."""
RESET: Final = 500.0
"""A stream that was taken back before it was accepted."""
RESET_USED: Final = 50.0
"""A stream that was reset after it was accepted: services and their clients do so."""
SURPLUS: Final = 1000.0
"""A stream beyond those that may be open at a time."""
UPDATE: Final = 90.0
"""A window update that nothing was sent for."""
FRAME: Final = 4.0
"""A data frame, however small."""
ANSWER: Final = 3.0
"""Earned: a data frame that the peer gets;"""
ANSWER_BYTE: Final = 2.0
"""for each byte of it, since one frame may answer many requests;"""
ANSWER_MOST: Final = 200.0
"""and no more than this, so that a download does not pay for an attack."""
MESSAGE: Final = 2.0
"""A Noise message."""
READING: Final = 5.0
"""A call that reads from the connection."""
FRAGMENT: Final = 25.0
"""One that brings a few bytes from the middle of a Noise message; what is there of the message is copied each time."""
BYTE: Final = 1 / 200
"""Earned: a byte of data."""
PROPOSAL: Final = 100.0
"""A proposal that is refused, or `ls`."""
FAILED: Final = 500.0
"""A stream that ends in a reset by this node, because of what the peer did with it."""
SERVICE: Final = 500.0
"""A stream of a service; given back when the service answers."""
UNAVAILABLE: Final = 100.0
"""A stream of a service that is not there."""
HANDLED: Final = 300.0
"""A stream that the node serves itself."""
PUSH: Final = 2000.0
"""A push of identify: it may have signatures to be verified, and everybody who watches is told."""
CONNECTION: Final = 3000.0
"""A connection that was accepted: signatures and key agreements."""


class Allowance:
    """One peer's.

    Attributes:
        exhausted: it was used up, and has not recovered since `recover` was last called.
    """

    __slots__ = ("__weakref__", "_bucket", "_spent", "exhausted")

    def __init__(self, now: float, *, burst: float = BURST, rate: float = RATE) -> None:
        self._bucket = TokenBucket(rate, burst, now)
        self._spent: dict[str, float] = {}
        self.exhausted = False

    def level(self, now: float) -> float:
        """What is left; negative for a debt."""
        return self._bucket.level(now)

    def spend(self, cost: float, what: str, now: float) -> None:
        """Charge for this, in words that complete "mostly by"."""
        bucket = self._bucket
        if bucket.level(now) >= bucket.burst:
            self._spent.clear()
        bucket.take(cost, now)
        self._spent[what] = self._spent.get(what, 0.0) + cost
        if not self.exhausted and bucket.level(now) < 0:
            self.exhausted = True
            bucket.take(bucket.burst * PENALTY, now)

    def earn(self, amount: float, now: float) -> None:
        """Give back so much."""
        self._bucket.take(-amount, now)

    def recover(self, now: float) -> bool:
        """Whether the peer may be served (again)."""
        if self.exhausted and self._bucket.level(now) >= 0:
            self.exhausted = False
            self._spent.clear()
        return not self.exhausted

    def is_full(self, now: float) -> bool:
        """Whether nothing of it is spent."""
        return self._bucket.level(now) >= self._bucket.burst

    @property
    def reason(self) -> str:
        """Why it is exhausted, in words."""
        most = sorted(self._spent, key=lambda what: -self._spent[what])[:2]
        return f"the peer makes this node work for nothing, mostly by {' and '.join(most)}"
