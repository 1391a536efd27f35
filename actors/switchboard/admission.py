"""Who may begin a handshake now: the switchboard's defence before it knows who is calling.

Theory of operation. An accepted socket first stands in the queue of its source (it costs a descriptor and nothing
else). A source is an IPv4 address, or what one customer of a provider has of IPv6; within that the homes in it take
turns. A limited number of handshakes run at once, in all and for each source; free places go round the sources in turn,
so a source that sends a thousand callers delays itself and nobody else. Each source also spends tokens: callers beyond
its rate wait in its queue for the next token. A handshake that has made others wait for longer than `PATIENCE`, and in
which it is the caller's turn, is displaced: the slow-loris pays with its own place. Authentication returns the token:
peers that we know are never slowed down by the rate.

When the queue is full somebody must go: whoever came last of the source that has most callers in it. So a few sources
that fill the queue keep out nobody but themselves.

This module decides only; it owns no socket and no clock.
"""

from __future__ import annotations

import dataclasses
import ipaddress
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from typing import Generic, NamedTuple, TypeVar

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

IPV6_PREFIX = 48
"""Bits of an IPv6 address that tell one source from another: a customer has up to 65,536 networks of its own."""
IPV6_HOME = 64
"""Bits that tell one home from another within a source: all addresses behind them are one network's."""

T = TypeVar("T")


class Source(NamedTuple):
    """What a caller counts for: `network` for all limits, and `home` takes turns with the others in it."""

    network: str
    home: str = ""


def source_of(address: str) -> Source:
    """The source that a caller from this IP address counts for: the address itself, of IPv6 its network and home."""
    if ":" not in address:
        return Source(address)
    bare, _, zone = address.partition("%")
    network, home = (
        f"{ipaddress.IPv6Network((bare, bits), strict=False)}{f'%{zone}' if zone else ''}"
        for bits in (IPV6_PREFIX, IPV6_HOME)
    )
    return Source(network, home)


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
    """One running handshake. `displace` is called when it shall give up its place; False: it is not to blame.

    `source` is the network that it counts for.
    """

    source: str
    caller: T
    since: float
    displace: Callable[[], bool] | None = None


@dataclasses.dataclass
class _Bucket:
    tokens: float
    at: float


class _Line(Generic[T]):
    """The callers of one source that wait. Its homes get their turns in order."""

    def __init__(self) -> None:
        self._homes: OrderedDict[str, deque[T]] = OrderedDict()
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[T]:
        for queue in self._homes.values():
            yield from queue

    def add(self, home: str, caller: T) -> None:
        """One more, behind the others of its home."""
        self._homes.setdefault(home, deque()).append(caller)
        self._length += 1

    def next(self) -> T:
        """Take out whose turn it is."""
        home, queue = next(iter(self._homes.items()))
        caller = queue.popleft()
        self._length -= 1
        if queue:
            self._homes.move_to_end(home)
        else:
            del self._homes[home]
        return caller

    def has_more(self, home: str) -> bool:
        """Whether another home has more callers than this one would have with one more."""
        return max(map(len, self._homes.values())) > len(self._homes.get(home, ())) + 1

    def drop(self) -> T:
        """Take out who came last of the home that has most."""
        most = max(reversed(self._homes), key=lambda home: len(self._homes[home]))
        queue = self._homes[most]
        caller = queue.pop()
        self._length -= 1
        if not queue:
            del self._homes[most]
        return caller


class Admission(Generic[T]):
    """The queue before the handshakes. All calls return at once."""

    def __init__(self, limits: Limits | None = None) -> None:
        self._limits = limits or Limits()
        self._queues: OrderedDict[str, _Line[T]] = OrderedDict()  # in the order in which they get their turn
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

    def arrive(self, source: Source, caller: T) -> T | None:
        """Put a caller in its source's queue. Who must go for lack of room: the caller itself, another, or nobody."""
        line = self._queues.get(source.network)
        present = 0 if line is None else len(line)
        gone: T | None = None
        if line is not None and present >= self._limits.queued_per_source:
            if not line.has_more(source.home):
                return caller
            gone = line.drop()
        elif self._queued >= self._limits.queued:
            longest = max(self._queues.values(), key=len)
            if len(longest) <= present + 1:
                return caller
            gone = longest.drop()
        if line is None:
            line = self._queues[source.network] = _Line()
        line.add(source.home, caller)
        self._queued += gone is None
        return gone

    def next(self, now: float) -> Place[T] | None:
        """The next caller that may begin its handshake now, or None."""
        if not self._queued or len(self._places) >= self._limits.concurrent:
            return None
        for source in list(self._queues):
            line = self._queues[source]
            if self._running.get(source, 0) >= self._limits.concurrent_per_source or not self._spend(source, now):
                continue
            caller = line.next()
            self._queued -= 1
            if line:
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
        callers = [caller for line in self._queues.values() for caller in line]
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
