"""Token buckets: so many of something a second, with a bounded burst; alone, and for the scopes that a client is in.

A client counts as a peer, as an IP address, as a network and as a part of all. Each of these may have a bucket of
its own, and what is taken is taken from all of them, or not at all. Time is passed in: seconds of a clock that
never goes back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Hashable, Iterable
from typing import Final

from protocol.errors import InvalidValueError

SCOPES: Final = ("peer", "ip", "network", "total")
"""The kinds of scopes, from the narrowest to the widest."""

Key = tuple[str, Hashable]
"""One scope of a client: its kind, and which one of that kind."""


@dataclasses.dataclass(frozen=True, slots=True)
class Scoped:
    """So many for each peer, for each IP address, for each network, and in all.

    None says "unlimited", and there are no defaults: whoever wants no limit has to say so.
    """

    per_peer: int | None
    per_ip: int | None
    per_network: int | None
    total: int | None

    def __post_init__(self) -> None:
        """Refuse negative numbers."""
        if any(limit is not None and limit < 0 for limit in (self.per_peer, self.per_ip, self.per_network, self.total)):
            raise InvalidValueError("a limit is zero or more, or None for unlimited")

    def limit(self, scope: str) -> int | None:
        """The limit at one of `SCOPES`."""
        return {"peer": self.per_peer, "ip": self.per_ip, "network": self.per_network, "total": self.total}[scope]


UNLIMITED: Final = Scoped(None, None, None, None)
"""No limit at any scope."""


class TokenBucket:
    """One bucket. It begins full."""

    __slots__ = ("_level", "_since", "burst", "rate")

    def __init__(self, rate: float, burst: float, now: float) -> None:
        """A bucket that gains `rate` a second and holds `burst`."""
        self.rate = rate
        self.burst = burst
        self._level = burst
        self._since = now

    def level(self, now: float) -> float:
        """How much is in it."""
        return min(self.burst, self._level + self.rate * max(0.0, now - self._since))

    def take(self, amount: float, now: float) -> None:
        """Take what `level` said is there."""
        self._level = self.level(now) - amount
        self._since = max(now, self._since)

    def wait(self, amount: float, now: float) -> float:
        """Seconds until so much is in it (at most as much as it can hold)."""
        missing = min(amount, self.burst) - self.level(now)
        if amount > 0 and not (self.rate > 0 and self.burst > 0):
            return float("inf") if amount > self.level(now) else 0.0
        return max(0.0, missing / self.rate) if self.rate > 0 else 0.0


class ScopedBuckets:
    """A bucket for each scope that is limited and in use. A bucket is forgotten when it is full and nobody holds it."""

    __slots__ = ("_buckets", "_held", "_least_burst", "_limits", "_seconds", "_sweep_at")

    _SWEEP_AT = 256

    def __init__(self, limits: Scoped, *, per_seconds: float = 1.0, burst_seconds: float, least_burst: float) -> None:
        """Buckets that gain their limit each `per_seconds` and hold what comes in `burst_seconds`, or `least_burst`."""
        self._limits = limits
        self._seconds = (per_seconds, burst_seconds)
        self._least_burst = least_burst
        self._buckets: dict[Key, TokenBucket] = {}
        self._held: dict[Key, int] = {}
        self._sweep_at = self._SWEEP_AT

    def __len__(self) -> int:
        """How many buckets there are."""
        return len(self._buckets)

    def hold(self, keys: Collection[Key], now: float) -> tuple[TokenBucket, ...]:
        """Keep these scopes' buckets, which are returned, until they are released as often as they were held."""
        for key in keys:
            self._held[key] = self._held.get(key, 0) + 1
        return tuple(self._of(keys, now))

    def release(self, keys: Collection[Key], now: float) -> None:
        """Undo one `hold`. A bucket that is not full stays for a while, so that coming back does not fill it."""
        for key in keys:
            left = self._held[key] - 1
            if left:
                self._held[key] = left
            else:
                del self._held[key]
        self._sweep(now)

    def take(self, keys: Iterable[Key], amount: float, now: float) -> None:
        """Take from all of these scopes what is there."""
        for bucket in self._of(keys, now):
            bucket.take(amount, now)

    def exhausted(self, keys: Iterable[Key], now: float, shared: Collection[Key] = ()) -> Key | None:
        """The first of these scopes from which not even one can be taken; None if there is none.

        Of those that are `shared` the last quarter is kept for others.
        """
        for key in keys:
            bucket = self._bucket(key, now)
            if bucket is not None and bucket.level(now) < 1 + (bucket.burst // 4 if key in shared else 0):
                return key
        return None

    def _of(self, keys: Iterable[Key], now: float) -> list[TokenBucket]:
        return [bucket for key in keys if (bucket := self._bucket(key, now)) is not None]

    def _bucket(self, key: Key, now: float) -> TokenBucket | None:
        bucket = self._buckets.get(key)
        if bucket is not None:
            return bucket
        limit = self._limits.limit(key[0])
        if limit is None:
            return None
        if len(self._buckets) >= self._sweep_at:
            self._sweep(now)
        per_seconds, burst_seconds = self._seconds
        rate = limit / per_seconds
        # A limit of nothing is nothing, and no least burst makes something of it.
        bucket = TokenBucket(rate, max(rate * burst_seconds, self._least_burst) if limit else 0.0, now)
        self._buckets[key] = bucket
        return bucket

    def _sweep(self, now: float) -> None:
        if len(self._buckets) < self._sweep_at:
            return
        self._buckets = {
            key: bucket
            for key, bucket in self._buckets.items()
            if key in self._held or bucket.level(now) < bucket.burst
        }
        self._sweep_at = max(self._SWEEP_AT, 2 * len(self._buckets))
