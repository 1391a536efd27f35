"""Who may begin a handshake now: the switchboard's defence before it knows who is calling.

Theory of operation. A caller goes through three states, and pays for each with what it costs::

    silent       accepted, and has sent nothing: a descriptor
    ready        its first bytes are there, and it waits for its turn: a descriptor
    handshaking  it has a place: memory, and the work of each step

A caller that sends nothing therefore never has a place. Silent and ready callers together are bounded; when there are
too many, silent ones go first, the one that came first of whoever has most.

Ready callers get their places in turn, by region, network and home (`actors.switchboard.crowd`), whoever has not had
a turn lately first. A place belongs to a caller as long as it makes progress: each completed step of the handshake
gives it new patience, and only the time in which it is the caller's turn counts. Patience is `PATIENCE` as long as few
wait, and less the more networks wait, so that all have had a turn within `TURN_FOR_ALL`; it is never less than
`LEAST_PATIENCE`, nor than what a caller's round trip time needs. Whoever is beyond it while others wait loses its place
to them. So the slow-loris pays with its own place.

Work is paid for in tokens; one is two milliseconds of processor time, what a handshake without TLS takes, and every
handshake costs at least one. Each network has tokens of its own, and all that are not known share some more: strangers
never use more than half a processor for long.
Authentication gives back what a handshake cost.

*Known* are networks from which a peer that the policy names has authenticated lately. They wait in a queue of their
own, which is served first, and there are waiting and handshaking places that only they get. Whatever strangers do, a
peer that comes from where it came before does not wait for them. What is said above holds among the known as well:
an attacker behind the same address competes with its neighbours only. A process that takes the place of one that has
crashed is told of the latest of them, so that nobody gains by a crash.

This module decides only; it owns no socket and no clock.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

from actors.switchboard.crowd import Crowd, Source, region_of
from protocol.token_bucket import TokenBucket

CONCURRENT = 64
"""Handshakes at once. One takes a millisecond of work and some round trips."""
CONCURRENT_PER_SOURCE = 32
QUEUED = 2048
"""Accepted sockets that wait: of known sources so many, and of all others so many. Each takes a descriptor."""
QUEUED_PER_SOURCE = 1024
KNOWN_SHARE = 4
"""Known sources have one place more for each four that there are, which only they get."""
RATE = 200.0
"""Tokens a second for each source: callers from one address cost two fifths of a processor at most."""
BURST = 1024.0
"""Tokens that a source may save up."""
STRANGERS_RATE = 250.0
"""Tokens a second for all callers together that are not known: half a processor."""
STRANGERS_SAVED = 4.0
"""Seconds' worth of these that may be saved up."""
TOKEN = 0.002
"""Seconds of processor time that a token pays for."""
PATIENCE = 1.0
"""Seconds between two steps of a handshake after which its place is for others that wait."""
LEAST_PATIENCE = 0.25
"""Seconds of patience however many wait; more than a round trip to most places on earth."""
TURN_FOR_ALL = 1.5
"""Seconds in which all networks that wait shall have had a place, if that is possible at all."""
SILENT = 6.0
"""Seconds in which a caller's first byte must come."""
RETRY = 0.05
"""Seconds between looks at handshakes that are beyond patience and keep their places."""
SOURCES = 4096
"""Token buckets that are kept, and known sources; the one used least recently is forgotten first."""
LATELY = 7 * 86400.0
"""Seconds for which a source is known after a peer has authenticated from there."""
HANDED_ON = 256
"""Known sources that a successor is told of, those of the latest authentications: at most some 12 KiB."""

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Limits:
    """The numbers above, adjustable for small machines and for tests."""

    concurrent: int = CONCURRENT
    concurrent_per_source: int = CONCURRENT_PER_SOURCE
    queued: int = QUEUED
    queued_per_source: int = QUEUED_PER_SOURCE
    rate: float = RATE
    burst: float = BURST
    strangers_rate: float = STRANGERS_RATE
    patience: float = PATIENCE
    silent: float = SILENT

    def within(self, descriptors: int) -> Limits:
        """These limits for a process that may have so many descriptors: waiting callers take a quarter at most."""
        queued = min(self.queued, max(1, descriptors // 8))
        return dataclasses.replace(self, queued=queued, queued_per_source=min(self.queued_per_source, queued))


@dataclasses.dataclass(eq=False)
class Place(Generic[T]):
    """One running handshake.

    Attributes:
        source: what it counts for.
        known: whether a peer has authenticated from there lately.
        least_patience: seconds of patience that the caller's round trip time needs.
        displace: called when it shall give up its place; False: it is not to blame.
    """

    source: Source
    caller: T
    since: float
    known: bool = False
    least_patience: float = 0.0
    displace: Callable[[], bool] | None = None
    spent: float = 0.0
    _used: float = 0.0
    _ours: bool = False

    def begin_work(self, now: float) -> None:
        """From now on it waits for us."""
        if not self._ours:
            self._used += max(0.0, now - self.since)
            self._ours = True

    def end_work(self, now: float) -> None:
        """From now on it is the caller's turn."""
        self._ours = False
        self.since = now

    def progress(self, now: float) -> None:
        """A step of the handshake is complete: the caller has new patience."""
        self._used = 0.0
        self.since = now

    def idle(self, now: float) -> float:
        """Seconds in which it was the caller's turn, since the last complete step."""
        return self._used + (0.0 if self._ours else max(0.0, now - self.since))

    @property
    def ours(self) -> bool:
        """Whether it waits for us."""
        return self._ours


class _Waiting(Generic[T]):
    """Silent and ready callers, of the known or of the others."""

    def __init__(self, limit: int, limit_per_source: int) -> None:
        self.silent: Crowd[T] = Crowd()
        self.ready: Crowd[T] = Crowd()
        self._limit = limit
        self._limit_per_source = limit_per_source

    def __len__(self) -> int:
        return len(self.silent) + len(self.ready)

    def make_room(self, source: Source) -> tuple[bool, T | None]:
        """Whether a caller of this source finds room, and who has to go for that."""
        if self.silent.count(source) + self.ready.count(source) >= self._limit_per_source:
            if self.silent.count(source):
                return True, self.silent.drop_oldest(source)
            gone = self.ready.drop_for(source, within_network=True)
            return gone is not None, gone
        if len(self) < self._limit:
            return True, None
        gone = self.silent.drop_oldest() if len(self.silent) else self.ready.drop_for(source)
        return gone is not None, gone


class Admission(Generic[T]):
    """The queues before the handshakes. All calls return at once. `T` is hashable."""

    def __init__(self, limits: Limits | None = None) -> None:
        self._limits = limits = limits or Limits()
        self._strangers: _Waiting[T] = _Waiting(limits.queued, limits.queued_per_source)
        self._friends: _Waiting[T] = _Waiting(limits.queued, limits.queued_per_source)
        self._silent_since: OrderedDict[T, tuple[Source, bool, float]] = OrderedDict()
        self._places: dict[Place[T], None] = {}
        self._running: dict[str, int] = {}  # by network
        self._in_region: dict[str, int] = {}  # places of strangers
        self._running_strangers = 0
        self._buckets: OrderedDict[str, TokenBucket] = OrderedDict()
        self._strangers_bucket: TokenBucket | None = None
        self._known: OrderedDict[str, float] = OrderedDict()

    @property
    def waiting(self) -> int:
        """Callers that have no place yet."""
        return len(self._strangers) + len(self._friends)

    @property
    def silent(self) -> int:
        """Callers among them that have sent nothing yet."""
        return len(self._silent_since)

    @property
    def running(self) -> int:
        """Handshakes that hold a place."""
        return len(self._places)

    # ---- who is known

    def remember(self, source: Source, now: float) -> bool:
        """A peer that the policy names has authenticated from there. Whether it was not known before."""
        key = _known_as(source)
        new = not self.is_known(source, now)
        self._known[key] = now
        self._known.move_to_end(key)
        if len(self._known) > SOURCES:
            self._known.popitem(last=False)
        return new

    def known_sources(self, now: float) -> dict[str, int]:
        """What a successor should know, at most `HANDED_ON`: sources, and at which second peers authenticated there."""
        latest = itertools.islice(reversed(self._known.items()), HANDED_ON)
        return {key: int(since) for key, since in reversed(list(latest)) if now - since < LATELY}

    def recall(self, known: Mapping[str, int], now: float) -> None:
        """Know what a predecessor has known, by the same clock."""
        for key, since in sorted(known.items(), key=lambda item: item[1])[-SOURCES:]:
            self._known[key] = min(float(since), now)

    def is_known(self, source: Source, now: float) -> bool:
        """Whether one has, lately."""
        return now - self._known.get(_known_as(source), float("-inf")) < LATELY

    # ---- waiting

    def greet(self, source: Source, caller: T, now: float) -> T | None:
        """A caller that has sent nothing yet. Who must go for lack of room: the caller itself, another, or nobody."""
        known = self.is_known(source, now)
        waiting = self._friends if known else self._strangers
        room, gone = waiting.make_room(source)
        if not room:
            return caller
        self._forget_silence(gone)
        waiting.silent.add(source, caller)
        self._silent_since[caller] = (source, known, now)
        return gone

    def speaks(self, caller: T) -> bool:
        """The first bytes of a silent caller are there, so it waits for its turn; False: it waits no more."""
        found = self._silent_since.pop(caller, None)
        if found is None:
            return False
        source, known, _ = found
        waiting = self._friends if known else self._strangers
        waiting.silent.remove(source, caller)
        waiting.ready.add(source, caller)
        return True

    def hung_up(self, caller: T) -> bool:
        """A silent caller is gone; False: it had been told to go before."""
        found = self._silent_since.pop(caller, None)
        if found is None:
            return False
        source, known, _ = found
        return (self._friends if known else self._strangers).silent.remove(source, caller)

    def silent_for_too_long(self, now: float) -> list[T]:
        """Take out the callers whose first byte has not come in time."""
        late: list[T] = []
        while self._silent_since:
            caller, (_, _, since) = next(iter(self._silent_since.items()))
            if now - since < self._limits.silent:
                break
            self.hung_up(caller)
            late.append(caller)
        return late

    def arrive(self, source: Source, caller: T, now: float = 0.0) -> T | None:
        """A caller whose first bytes are there. Who must go for lack of room: the caller itself, another, or nobody."""
        waiting = self._friends if self.is_known(source, now) else self._strangers
        room, gone = waiting.make_room(source)
        if not room:
            return caller
        self._forget_silence(gone)
        waiting.ready.add(source, caller)
        return gone

    def _forget_silence(self, gone: T | None) -> None:
        if gone is not None:
            self._silent_since.pop(gone, None)

    # ---- places

    def next(self, now: float) -> Place[T] | None:
        """The next caller that may begin its handshake now, or None."""

        def may(region: str, network: str) -> bool:
            if not network:
                return self._in_region.get(region, 0) < self._limit_per_region
            return self._has_place_for(network) and self._bucket(network, now).level(now) >= 1

        def may_known(_: str, network: str) -> bool:
            return not network or (self._has_place_for(network) and self._bucket(network, now).level(now) >= 1)

        known = True
        taken = self._friends.ready.next(may_known) if len(self._friends.ready) and not self._full else None
        if taken is None:
            known = False
            if not len(self._strangers.ready) or self._full_of_strangers or self._strangers_tokens(now).level(now) < 1:
                return None
            taken = self._strangers.ready.next(may)
            if taken is None:
                return None
        source, caller = taken
        place = Place(source, caller, now, known)
        self._places[place] = None
        self._running[source.network] = self._running.get(source.network, 0) + 1
        if not known:
            self._running_strangers += 1
            region = region_of(source)
            self._in_region[region] = self._in_region.get(region, 0) + 1
        self._charge(place, 1.0, now)
        return place

    def worked(self, place: Place[T], seconds: float, now: float) -> None:
        """A handshake has taken so many seconds of processor time in one more step."""
        before = max(0.0, place.spent - 1.0)  # the first token was taken in advance
        place_spent = place.spent + seconds / TOKEN
        self._charge(place, max(0.0, place_spent - 1.0) - before, now)
        place.spent = place_spent

    def leave(self, place: Place[T], *, authenticated: bool, now: float | None = None) -> None:
        """The handshake of this place is over. Harmless when it was displaced before."""
        if self._places.pop(place, 0) is not None:
            return
        if authenticated:
            self._charge(place, -max(1.0, place.spent), place.since if now is None else now)
        _count_down(self._running, place.source.network)
        if not place.known:
            self._running_strangers -= 1
            _count_down(self._in_region, region_of(place.source))

    def patience(self) -> float:
        """Seconds of patience, now."""
        waiting = max(1, self._strangers.ready.networks + self._friends.ready.networks)
        each = TURN_FOR_ALL * self._limits.concurrent / waiting
        return max(min(LEAST_PATIENCE, self._limits.patience), min(self._limits.patience, each))

    def displace(self, now: float) -> int:
        """Take the place of handshakes that make others wait for too long; how many."""
        wanted = len(self._strangers.ready) + len(self._friends.ready)
        if not wanted:
            return 0
        displaced = 0
        patience = self.patience()
        full, full_of_strangers = self._full, self._full_of_strangers  # until as many have gone as wait
        for place in sorted(self._places, key=lambda place: -place.idle(now)):
            if displaced >= wanted or place.idle(now) < patience:
                break
            if (
                place.ours
                or place.idle(now) < place.least_patience
                or not self._is_wanted(place, full=full, full_of_strangers=full_of_strangers)
            ):
                continue
            if place.displace is None or place.displace():
                self.leave(place, authenticated=False)
                displaced += 1
        return displaced

    def next_change(self, now: float) -> float | None:
        """Seconds until time alone can change what the other calls do; None if it cannot."""
        waits: list[float] = []
        if self._silent_since:
            _, _, since = next(iter(self._silent_since.values()))
            waits.append(max(0.0, self._limits.silent - (now - since)))
        if len(self._strangers.ready) or len(self._friends.ready):
            if self._places:
                waits.append(max(RETRY, self.patience() - max(place.idle(now) for place in self._places)))
            if not (self._full if len(self._friends.ready) else self._full_of_strangers):
                waits.append(self._next_token(now))
        return min(waits, default=None)

    def drain(self) -> list[T]:
        """Empty the queues; the callers that were in them."""
        callers: list[T] = []
        for waiting in (self._friends, self._strangers):
            for crowd in (waiting.silent, waiting.ready):
                callers += crowd
                crowd.clear()
        self._silent_since.clear()
        return callers

    # ---- what is left

    @property
    def _full(self) -> bool:
        reserved = max(1, self._limits.concurrent // KNOWN_SHARE)
        return len(self._places) >= self._limits.concurrent + reserved

    @property
    def _full_of_strangers(self) -> bool:
        return self._running_strangers >= self._limits.concurrent

    @property
    def _limit_per_region(self) -> int:
        return max(self._limits.concurrent_per_source, self._limits.concurrent // 2)

    def _has_place_for(self, network: str) -> bool:
        return self._running.get(network, 0) < self._limits.concurrent_per_source

    def _is_wanted(self, place: Place[T], *, full: bool, full_of_strangers: bool) -> bool:
        """Whether somebody waits who could have this place, and no other."""
        source, region = place.source, region_of(place.source)
        ready = self._friends.ready if place.known else self._strangers.ready
        if not self._has_place_for(source.network) and ready.count(source):
            return True
        if place.known:
            return full and bool(len(self._friends.ready))
        if full and len(self._friends.ready):
            return True
        if self._in_region.get(region, 0) >= self._limit_per_region and ready.has_region(region):
            return True
        return full_of_strangers and bool(len(ready))

    # ---- tokens

    def _bucket(self, network: str, now: float) -> TokenBucket:
        bucket = self._buckets.get(network)
        if bucket is None:
            bucket = self._buckets[network] = TokenBucket(self._limits.rate, self._limits.burst, now)
            if len(self._buckets) > SOURCES:
                self._buckets.popitem(last=False)
        else:
            self._buckets.move_to_end(network)
        return bucket

    def _strangers_tokens(self, now: float) -> TokenBucket:
        if self._strangers_bucket is None:
            rate = self._limits.strangers_rate
            self._strangers_bucket = TokenBucket(rate, rate * STRANGERS_SAVED, now)
        return self._strangers_bucket

    def _charge(self, place: Place[T], tokens: float, now: float) -> None:
        if tokens:
            self._bucket(place.source.network, now).take(tokens, now)
            if not place.known:
                self._strangers_tokens(now).take(tokens, now)

    def _next_token(self, now: float) -> float:
        """Seconds until another look at those who have places, and perhaps no tokens."""
        return max(RETRY, 1 / self._limits.rate, self._strangers_tokens(now).wait(1, now))


def _known_as(source: Source) -> str:
    """What is known of a source: an IPv4 address, or an IPv6 subnet."""
    return source.home or source.network


def _count_down(counts: dict[str, int], key: str) -> None:
    left = counts[key] - 1
    if left:
        counts[key] = left
    else:
        del counts[key]
