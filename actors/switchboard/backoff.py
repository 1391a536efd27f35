"""Exponential back-off with jitter."""

from __future__ import annotations

import random

INITIAL = 0.5
"""Seconds before the second attempt: long enough for a peer's process to restart, short enough to go unnoticed."""
LIMIT = 60.0
"""The longest wait in seconds: a peer that comes home is reached again within a minute."""
FACTOR = 2.0
JITTER = 0.25
"""Each wait is spread by this share up and down, so that many nodes do not dial a returning peer together."""


class BackOff:
    """How long to wait before the next attempt; doubles with each failure until :meth:`reset`."""

    __slots__ = ("_failures", "_initial", "_limit", "_random")

    def __init__(self, randomness: random.Random, initial: float = INITIAL, limit: float = LIMIT) -> None:
        self._random = randomness
        self._initial = initial
        self._limit = limit
        self._failures = 0

    @property
    def failures(self) -> int:
        """Failures since the last success."""
        return self._failures

    def failed(self) -> float:
        """Note a failure; the seconds to wait now."""
        wait: float = self._limit
        if self._failures < 32:  # beyond, the power is over any limit and only grows
            wait = min(self._limit, self._initial * FACTOR**self._failures)
        self._failures += 1
        return wait * self._random.uniform(1 - JITTER, 1 + JITTER)

    def again(self) -> float:
        """The seconds to wait after a failure that does not count."""
        return self._initial * self._random.uniform(1 - JITTER, 1 + JITTER)

    def reset(self) -> None:
        """Note a success: the next failure waits the initial time again."""
        self._failures = 0
