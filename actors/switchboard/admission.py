"""Who may begin a handshake now: the switchboard's defence before it knows who is calling.

Theory of operation. An accepted socket first stands in the queue of its source address (it costs a descriptor and
nothing else). A limited number of handshakes run at once, in all and for each source; free places go round
the sources in turn, so a source that sends a thousand callers delays itself and nobody else. Each source also
spends tokens: callers beyond its rate wait in its queue for the next token. Whoever finds the queue full is
turned away. A handshake that has made others wait for longer than `PATIENCE`, and in which it is the caller's turn, is
displaced: the slow-loris pays with its own place. Authentication returns the token: peers that we know are never
slowed down by the rate.

This module decides only; it owns no socket and no clock.
"""

from __future__ import annotations

import dataclasses
import ipaddress
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Generic, TypeVar

CONCURRENT = 64
"""Handshakes at once. One takes a millisecond of work and some round trips, so 64 are plenty for a home."""
CONCURRENT_PER_SOURCE = 32
QUEUED = 2048
"""Accepted sockets that wait for their handshake, all sources together. Each takes a descriptor and nothing else."""
QUEUED_PER_SOURCE = 1024
RATE = 200.0
"""Tokens a second for each source: unknown callers from one address can cost at most a fifth of one core."""
BURST = 1024.0
"""Tokens that a source may save up."""
PATIENCE = 1.0
"""Seconds that a handshake keeps its place while others of its source (or, when all are taken, any) wait."""
RETRY = 0.05
"""Seconds between looks at handshakes that are beyond patience and keep their places."""
SOURCES = 4096
"""Token buckets that are kept; the one used least recently is forgotten first."""

IPV6_PREFIX = 64
"""Bits of an IPv6 address that tell one source from another: within them every home has all addresses to itself."""

T = TypeVar("T")


def source_of(address: str) -> str:
    """The source that a caller from this IP address counts for: the address itself, of IPv6 its network."""
    if ":" not in address:
        return address
    bare, _, zone = address.partition("%")
    network = ipaddress.IPv6Network((bare, IPV6_PREFIX), strict=False)
    return f"{network}%{zone}" if zone else str(network)


@dataclasses.dataclass(frozen=True)
class Limits:
    """The numbers above, adjustable for small machines and for tests."""

    concurrent: int = CONCURRENT
    concurrent_per_source: int = CONCURRENT_PER_SOURCE
    queued: int = QUEUED
    queued_per_source: int = QUEUED_PER_SOURCE
    rate: float = RATE
    burst: float = BURST
    patience: float = PATIENCE

    def within(self, descriptors: int) -> Limits:
        """These limits for a process that may have so many descriptors: waiting callers take an eighth at most."""
        queued = min(self.queued, max(1, descriptors // 8))
        return dataclasses.replace(self, queued=queued, queued_per_source=min(self.queued_per_source, queued))


@dataclasses.dataclass(eq=False)
class Place(Generic[T]):
    """One running handshake. `displace` is called when it shall give up its place; False: it is not to blame."""

    source: str
    caller: T
    since: float
    displace: Callable[[], bool] | None = None


@dataclasses.dataclass
class _Bucket:
    tokens: float
    at: float


class Admission(Generic[T]):
    """The queue before the handshakes. All calls return at once."""

    def __init__(self, limits: Limits | None = None) -> None:
        self._limits = limits or Limits()
        self._queues: OrderedDict[str, deque[T]] = OrderedDict()  # in the order in which they get their turn
        self._queued = 0
        self._places: dict[Place[T], None] = {}  # oldest first
        self._running: dict[str, int] = {}
        self._buckets: OrderedDict[str, _Bucket] = OrderedDict()

    @property
    def waiting(self) -> int:
        """Callers in the queues."""
        return self._queued

    @property
    def running(self) -> int:
        """Handshakes that hold a place."""
        return len(self._places)

    def arrive(self, source: str, caller: T) -> bool:
        """Put a caller in its source's queue; False means that there is no room and it must go."""
        queue = self._queues.get(source)
        if self._queued >= self._limits.queued or (queue and len(queue) >= self._limits.queued_per_source):
            return False
        if queue is None:
            queue = self._queues[source] = deque()
        queue.append(caller)
        self._queued += 1
        return True

    def next(self, now: float) -> Place[T] | None:
        """The next caller that may begin its handshake now, or None."""
        if not self._queued or len(self._places) >= self._limits.concurrent:
            return None
        for source in list(self._queues):
            queue = self._queues[source]
            if self._running.get(source, 0) >= self._limits.concurrent_per_source or not self._spend(source, now):
                continue
            caller = queue.popleft()
            self._queued -= 1
            if queue:
                self._queues.move_to_end(source)
            else:
                del self._queues[source]
            place = Place(source, caller, now)
            self._places[place] = None
            self._running[source] = self._running.get(source, 0) + 1
            return place
        return None

    def leave(self, place: Place[T], *, authenticated: bool) -> None:
        """The handshake of this place is over. Harmless when it was displaced before."""
        if authenticated and (bucket := self._buckets.get(place.source)) is not None:
            bucket.tokens = min(self._limits.burst, bucket.tokens + 1)
        if self._places.pop(place, 0) is None:
            left = self._running[place.source] - 1
            if left:
                self._running[place.source] = left
            else:
                del self._running[place.source]

    def displace(self, now: float) -> int:
        """Take the place of handshakes that make others wait for too long; how many."""
        displaced = 0
        for place in list(self._places):
            if now - place.since < self._limits.patience or not self._queued:
                break
            full = len(self._places) >= self._limits.concurrent
            source_full = self._running[place.source] >= self._limits.concurrent_per_source
            wanted = full or (source_full and place.source in self._queues)
            if wanted and (place.displace is None or place.displace()):
                self.leave(place, authenticated=False)
                displaced += 1
        return displaced

    def next_change(self, now: float) -> float | None:
        """Seconds until time alone can change what :meth:`next` or :meth:`displace` does; None if it cannot."""
        if not self._queued:
            return None
        waits = [
            max(0.0, (1 - bucket.tokens) / self._limits.rate - (now - bucket.at))
            for source in self._queues
            if (bucket := self._buckets.get(source)) is not None and bucket.tokens < 1
        ]
        if self._places:
            oldest = next(iter(self._places))
            waits.append(max(RETRY, self._limits.patience - (now - oldest.since)))
        return min(waits, default=self._limits.patience)

    def drain(self) -> list[T]:
        """Empty the queues; the callers that were in them."""
        callers = [caller for queue in self._queues.values() for caller in queue]
        self._queues.clear()
        self._queued = 0
        return callers

    def _spend(self, source: str, now: float) -> bool:
        bucket = self._buckets.get(source)
        if bucket is None:
            bucket = self._buckets[source] = _Bucket(self._limits.burst, now)
            if len(self._buckets) > SOURCES:
                self._buckets.popitem(last=False)
        else:
            self._buckets.move_to_end(source)
            bucket.tokens = min(self._limits.burst, bucket.tokens + (now - bucket.at) * self._limits.rate)
            bucket.at = now
        if bucket.tokens < 1:
            return False
        bucket.tokens -= 1
        return True
