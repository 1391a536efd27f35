"""What a relay keeps in mind: reservations, circuits, their limits and budgets. No clock, no sockets.

Theory of operation
-------------------

`RelayTable` decides each RESERVE and CONNECT by itself and remembers what it has granted. Everything that a peer can
ask for is counted for the peer, for its IP address, for its network and in all (`Scoped`), and each of these limits can
be "unlimited" only by being said so. Both ends of a circuit must be allowed by the access list, because either one
alone would let strangers reach a listed peer. The access list is a function; `PolicyIndex.decide_connection` is one.

Two clocks are passed in: `now` never goes back and rules everything inside; `now_wall` (seconds since the Unix epoch)
is for the access list and for the expiry that a client is told. A clock that is set changes no reservation.

- A reservation lives for `ttl` seconds, or until the peer's last connection ends, or until the access list refuses it.
  To renew it is to make it again; a renewal that is refused leaves the old one in force.
- A circuit counts from the moment it was asked for. Its time runs from `opened`. It does not end with the reservation.
- The owner calls `expire` at `next_deadline`, and closes what it returns.
"""

from __future__ import annotations

import dataclasses
import enum
import heapq
import ipaddress
import math
from collections.abc import Callable, Collection, Hashable, Iterator
from typing import Final, TypeAlias

from protocol.circuit.exchange import HANDSHAKE_TIMEOUT
from protocol.circuit.messages import Limit, Refusal, Status
from protocol.errors import InvalidValueError
from protocol.peer_id import PeerId
from protocol.policy import Decision
from protocol.shares import share
from protocol.token_bucket import Key, Scoped, ScopedBuckets, TokenBucket

Ip: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address

Acl: TypeAlias = Callable[[PeerId, float], Decision]
"""Says whether a peer may use this relay at a time in seconds since the Unix epoch."""

NetworkOf: TypeAlias = Callable[[Ip], Hashable | None]
"""The network that an address is counted in, such as its prefix or its autonomous system; None for none."""

GUEST_RULE: Final = "gating-off"
"""The rule by which the access list lets in peers that are not listed; the limits of guests apply to these."""


def guest_share(limit: int) -> int:
    """How much of a limit guests may use together: three quarters, so that no crowd of them keeps listed peers out."""
    return share(limit)


DRAINING: Final = "the relay is shutting down"
"""The reason of each refusal of a relay that is being stopped: clients of ours know from it that it is no failure."""

REQUEST_WINDOW: Final = 60.0
"""Requests are limited by so many in this many seconds; all of them may come at once."""

BURST_SECONDS: Final = 0.25
"""Bytes may come at once for so long at the limited rate: short, so that shares are even."""

LEAST_BURST: Final = 64 * 1024
"""Bytes that may always come at once: a whole message of the data plane, so that slow rates work at all."""

LEAST_CHUNK: Final = 4096
"""Who has to wait for bytes waits for so many, instead of waking up for each one."""

MIN_TTL: Final = 30
"""The shortest reservation that a relay should be set to, in seconds: clients that cannot make sense of its expiry,
because a clock is wrong, count on so much."""

MAX_TTL: Final = 7 * 86400
"""The longest reservation in seconds."""


class Direction(enum.IntEnum):
    """Which way the bytes of a circuit go."""

    TO_DESTINATION = 0
    TO_SOURCE = 1


@dataclasses.dataclass(frozen=True, slots=True)
class RelayLimits:
    """What a relay grants.

    Attributes:
        reservations: at a time. A peer has at most one, so `per_peer` is 0 or has no effect.
        circuits: at a time. A circuit counts for both of its ends.
        bytes_per_second: of all circuits of a scope, both directions together. A circuit counts for both of its ends.
        requests: RESERVE and CONNECT in `REQUEST_WINDOW` seconds, granted or not.
        ttl: how long a reservation lasts, in seconds.
        circuit: seconds, and bytes each way, of one circuit between listed peers.
        guest_circuit: the same where the access list let in at least one end only because it lets in everybody.
    """

    reservations: Scoped
    circuits: Scoped
    bytes_per_second: Scoped
    requests: Scoped
    ttl: int
    circuit: Limit
    guest_circuit: Limit

    def __post_init__(self) -> None:
        """Refuse a lifetime that no client could work with."""
        if not 1 <= self.ttl <= MAX_TTL:
            raise InvalidValueError(f"a reservation lasts 1 to {MAX_TTL} seconds, not {self.ttl}")


@dataclasses.dataclass(frozen=True, slots=True)
class HeldReservation:
    """A reservation in force.

    Attributes:
        peer: whose.
        expires: when it ends, on the clock that never goes back.
        expire_wall: what the peer is told: whole seconds since the Unix epoch.
        limit: what each circuit to this peer is granted; None without limit.
        renewed: whether it took the place of another one.
        keys: the scopes that it counts for.
    """

    peer: PeerId
    expires: float
    expire_wall: int
    limit: Limit | None
    renewed: bool
    keys: tuple[Key, ...]


class Circuit:
    """A circuit that is being opened or is open.

    Attributes:
        number: names it within one table.
        source, destination: its ends.
        limit: what it is granted; None without limit.
        keys: the scopes that it counts for.
        deadline: when it must have been opened or must end, on the clock that never goes back.
        is_open: whether both ends have agreed.
        forwarded: bytes by `Direction`.
        buckets: the budgets of bytes per second that it takes from.
    """

    __slots__ = ("buckets", "deadline", "destination", "forwarded", "is_open", "keys", "limit", "number", "source")

    def __init__(
        self,
        number: int,
        source: PeerId,
        destination: PeerId,
        *,
        limit: Limit | None,
        keys: tuple[Key, ...],
        now: float,
    ) -> None:
        self.number = number
        self.source = source
        self.destination = destination
        self.limit = limit
        self.keys = keys
        self.deadline = now + HANDSHAKE_TIMEOUT
        self.is_open = False
        self.forwarded = [0, 0]
        self.buckets: tuple[TokenBucket, ...] = ()

    def left(self, direction: Direction) -> float:
        """Bytes that it may still carry this way; infinity without limit."""
        if self.limit is None or not self.limit.data:
            return math.inf
        return self.limit.data - self.forwarded[direction]


@dataclasses.dataclass(frozen=True, slots=True)
class Allowance:
    """How many bytes may be forwarded now.

    Attributes:
        count: so many; they are taken from all budgets.
        wait: seconds until asking again makes sense; 0 if `count` is all that was wanted.
        over: the circuit's limit of bytes is reached: forward `count`, then reset both streams.
    """

    count: int
    wait: float
    over: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Ended:
    """What has come to its end: reservations that are gone, and circuits to reset, each with the reason.

    The circuits are closed in the table already.
    """

    reservations: tuple[tuple[HeldReservation, Refusal], ...] = ()
    circuits: tuple[tuple[Circuit, Refusal], ...] = ()


def network_prefix(address: Ip) -> Hashable:
    """The usual `NetworkOf`: the /24 of an IPv4 address, the /48 of an IPv6 address."""
    return _prefix(address, 24, 48)


def _prefix(address: Ip, bits4: int, bits6: int) -> tuple[int, int]:
    """An address's version and its leading bits, which name its network."""
    bits = bits4 if address.version == 4 else bits6
    return address.version, int(address) >> (address.max_prefixlen - bits)


class _Usage:
    """How many are in use at each scope."""

    __slots__ = ("_counts", "_noun")

    def __init__(self, noun: str) -> None:
        self._noun = noun
        self._counts: dict[Key, int] = {}

    def __len__(self) -> int:
        return len(self._counts)

    def add(self, keys: Collection[Key]) -> None:
        for key in keys:
            self._counts[key] = self._counts.get(key, 0) + 1

    def remove(self, keys: Collection[Key]) -> None:
        for key in keys:
            left = self._counts[key] - 1
            if left:
                self._counts[key] = left
            else:
                del self._counts[key]

    def refusal(
        self, keys: Collection[Key], limits: Scoped, status: Status, shared: Collection[Key] = ()
    ) -> Refusal | None:
        """Why one more cannot be had; None if it can. Of those that are `shared`, it is for a guest (`guest_share`)."""
        for key in keys:
            limit = limits.limit(key[0])
            if limit is not None and key in shared:
                limit = guest_share(limit)
            if limit is not None and self._counts.get(key, 0) >= limit:
                return _limit_refusal(status, self._noun, key[0], limit)
        return None


_IN_ALL: Final[tuple[Key, ...]] = (("total", None),)

_WIDTH: Final = {
    "peer": "for each peer",
    "ip": "for each IP address",
    "network": "for each network",
    "total": "in all",
}


def _limit_refusal(status: Status, noun: str, scope: str, limit: int) -> Refusal:
    reason = f"the relay's limit of {limit} {noun} {_WIDTH[scope]} is reached"
    kind = noun.partition(" ")[0]
    rule = f"{kind}-total" if scope == "total" else f"{kind}-per-{scope}"
    return Refusal(status, reason, rule)


class RelayTable:
    """A relay's reservations and circuits.

    Attributes:
        limits: what is granted; see `set_limits`.
        draining: whether nothing new is granted.
    """

    def __init__(self, limits: RelayLimits, acl: Acl, *, network_of: NetworkOf = network_prefix) -> None:
        self.limits = limits
        self.draining = False
        self._acl = acl
        self._network_of = network_of
        self._reservations: dict[PeerId, HeldReservation] = {}
        self._circuits: dict[int, Circuit] = {}
        self._last_number = 0
        self._reserved = _Usage("reservations")
        self._connected = _Usage("circuits")
        self._deadlines: list[tuple[float, int, PeerId | int]] = []
        self._pushed = 0
        self._gone: list[tuple[HeldReservation, Refusal]] = []
        self._cut: list[tuple[Circuit, Refusal]] = []
        self._make_buckets()

    @property
    def reservations(self) -> Collection[HeldReservation]:
        """Those in force, in no order that means anything."""
        return self._reservations.values()

    @property
    def circuits(self) -> Collection[Circuit]:
        """Those being opened or open."""
        return self._circuits.values()

    def reservation_of(self, peer: PeerId, now: float) -> HeldReservation | None:
        """The peer's reservation, if it has one that is in force."""
        held = self._reservations.get(peer)
        return held if held is not None and now < held.expires else None

    def reserve(self, peer: PeerId, address: Ip, now: float, now_wall: float) -> HeldReservation | Refusal:
        """Decide a RESERVE of a peer that is connected from this address."""
        keys = self._keys(peer, address)
        decision = self._acl(peer, now_wall)
        shared = _IN_ALL if decision.rule == GUEST_RULE else ()
        refusal = self._refuse_request(keys, Status.RESERVATION_REFUSED, now, shared)
        if refusal is not None:
            return refusal
        self._collect_due(now)
        if not decision.allowed:
            denied = Refusal(Status.PERMISSION_DENIED, "this relay does not serve you", decision.rule)
            held = self._drop_reservation(peer)
            if held is not None:
                self._gone.append((held, denied))
            return denied
        old = self._reservations.get(peer)
        if old is not None:
            self._reserved.remove(old.keys)
        refusal = self._reserved.refusal(keys, self.limits.reservations, Status.RESERVATION_REFUSED, shared)
        if refusal is not None:
            if old is not None:
                self._reserved.add(old.keys)
            return refusal
        limit = self._circuit_limit(decision)
        # Rounded down: what the peer is told never reaches beyond what is kept.
        made = HeldReservation(
            peer, now + self.limits.ttl, int(now_wall + self.limits.ttl), limit, old is not None, keys
        )
        self._reserved.add(keys)
        self._reservations[peer] = made
        self._push(made.expires, peer)
        return made

    def disconnected(self, peer: PeerId) -> HeldReservation | None:
        """The peer's last connection has ended, and so has its reservation, which is returned.

        Its circuits end with their streams, for which the owner calls `close`.
        """
        return self._drop_reservation(peer)

    def connect(
        self, source: PeerId, address: Ip, destination: PeerId, now: float, now_wall: float
    ) -> Circuit | Refusal:
        """Decide a CONNECT to `destination` of a peer that is connected from this address.

        A circuit that is returned counts until `close`; it must be `opened` within `HANDSHAKE_TIMEOUT` seconds.
        """
        own = self._keys(source, address)
        decision = self._acl(source, now_wall)
        guest = decision.rule == GUEST_RULE
        refusal = self._refuse_request(own, Status.RESOURCE_LIMIT_EXCEEDED, now, _IN_ALL if guest else ())
        if refusal is not None:
            return refusal
        if not decision.allowed:
            return Refusal(Status.PERMISSION_DENIED, "this relay does not serve you", decision.rule)
        other = self._acl(destination, now_wall)
        if not other.allowed:
            return Refusal(Status.PERMISSION_DENIED, "this relay does not serve that peer", other.rule)
        if source == destination:
            return Refusal(Status.CONNECTION_FAILED, "a circuit leads to another peer", "self")
        self._collect_due(now)
        held = self.reservation_of(destination, now)
        if held is None:
            return Refusal(Status.NO_RESERVATION, "that peer has no reservation here at present", "no-reservation")
        keys = tuple(dict.fromkeys((*own, *held.keys)))  # what both ends share counts once
        shared = {*_IN_ALL, *held.keys}.difference(own[:-1]) if guest else ()
        refusal = self._connected.refusal(keys, self.limits.circuits, Status.RESOURCE_LIMIT_EXCEEDED, shared)
        if refusal is not None:
            return refusal
        self._last_number += 1
        limit = self._circuit_limit(decision, other)
        circuit = Circuit(self._last_number, source, destination, limit=limit, keys=keys, now=now)
        self._circuits[circuit.number] = circuit
        self._connected.add(keys)
        circuit.buckets = self._bytes.hold(keys, now)
        self._push(circuit.deadline, circuit.number)
        return circuit

    def opened(self, circuit: Circuit, now: float) -> None:
        """Both ends have agreed: the circuit's time begins.

        Raises:
            InvalidValueError: it is closed, or open already.
        """
        if self._circuits.get(circuit.number) is not circuit or circuit.is_open:
            raise InvalidValueError(f"the circuit {circuit.number} is not being opened")
        circuit.is_open = True
        duration = circuit.limit.duration if circuit.limit is not None else 0
        circuit.deadline = now + duration if duration else math.inf
        self._push(circuit.deadline, circuit.number)

    def close(self, circuit: Circuit, now: float) -> None:
        """The circuit has ended, or was not opened. To close one again has no effect."""
        if self._circuits.pop(circuit.number, None) is not None:
            self._connected.remove(circuit.keys)
            self._bytes.release(circuit.keys, now)

    def allow(self, circuit: Circuit, direction: Direction, wanted: int, now: float) -> Allowance:
        """Take bytes of an open circuit from its budgets; what is allowed must then be forwarded.

        For even shares the owner asks for its circuits in turns and not for one as much as there is.

        Raises:
            InvalidValueError: the circuit is not open yet.
        """
        if not circuit.is_open:
            raise InvalidValueError(f"the circuit {circuit.number} is not open")
        if self._circuits.get(circuit.number) is not circuit:
            return Allowance(0, 0.0, over=True)  # closed here, which the owner is about to hear from `expire`
        left = circuit.left(direction)
        within = wanted if wanted <= left else int(left)
        count = within
        for bucket in circuit.buckets:
            count = min(count, int(bucket.level(now)))
        if 0 < count < within and count < LEAST_CHUNK:
            count = 0  # no crumbs
        wait = 0.0
        for bucket in circuit.buckets if wanted else ():
            bucket.take(count, now)
            if count < within:
                wait = max(wait, bucket.wait(min(LEAST_CHUNK, within - count), now))
        circuit.forwarded[direction] += count
        return Allowance(count, wait, over=count == within < wanted)

    def next_deadline(self) -> float | None:
        """When `expire` has something to do next, on the clock that never goes back; None for never."""
        if self._gone or self._cut:
            return -math.inf
        while self._deadlines and not self._is_current(self._deadlines[0]):
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else None

    def expire(self, now: float) -> Ended:
        """Everything whose time is over, and has not been told by an earlier call."""
        self._collect_due(now)
        ended = Ended(tuple(self._gone), tuple(self._cut))
        self._gone.clear()
        self._cut.clear()
        return ended

    def set_acl(self, acl: Acl, now: float, now_wall: float) -> Ended:
        """Put another access list in force at once: what it does not allow ends."""
        self._acl = acl
        return self.revalidate(now, now_wall)

    def revalidate(self, now: float, now_wall: float) -> Ended:
        """What the access list does not allow any more, because a peer's line there has expired."""
        gone: list[tuple[HeldReservation, Refusal]] = []
        cut: list[tuple[Circuit, Refusal]] = []
        for held in list(self._reservations.values()):
            decision = self._acl(held.peer, now_wall)
            if not decision.allowed:
                self._drop_reservation(held.peer)
                gone.append((held, Refusal(Status.PERMISSION_DENIED, "no longer served", decision.rule)))
        for circuit in list(self._circuits.values()):
            for end in (circuit.source, circuit.destination):
                decision = self._acl(end, now_wall)
                if not decision.allowed:
                    self.close(circuit, now)
                    cut.append((circuit, Refusal(Status.PERMISSION_DENIED, "no longer served", decision.rule)))
                    break
        return Ended(tuple(gone), tuple(cut))

    def set_limits(self, limits: RelayLimits, now: float) -> None:
        """Grant by other limits from now on. What was granted stays; rates apply to open circuits at once."""
        self.limits = limits
        self._make_buckets()
        for circuit in self._circuits.values():
            circuit.buckets = self._bytes.hold(circuit.keys, now)

    def drain(self) -> None:
        """Grant nothing new. Open circuits may go on."""
        self.draining = True

    def _make_buckets(self) -> None:
        self._bytes = ScopedBuckets(self.limits.bytes_per_second, burst_seconds=BURST_SECONDS, least_burst=LEAST_BURST)
        self._requests = ScopedBuckets(
            self.limits.requests, per_seconds=REQUEST_WINDOW, burst_seconds=REQUEST_WINDOW, least_burst=1
        )

    def _keys(self, peer: PeerId, address: Ip) -> tuple[Key, ...]:
        if address.version == 6 and address.ipv4_mapped is not None:
            address = address.ipv4_mapped
        # One household or one machine has a whole /64, so that is what counts as one address.
        keys: list[Key] = [("peer", peer), ("ip", _prefix(address, 32, 64))]
        network = self._network_of(address)
        if network is not None:
            keys.append(("network", network))
        return (*keys, *_IN_ALL)

    def _refuse_request(
        self, keys: tuple[Key, ...], status: Status, now: float, shared: Collection[Key]
    ) -> Refusal | None:
        empty = self._requests.exhausted(keys, now, shared)
        if empty is not None:
            limit = self.limits.requests.limit(empty[0]) or 0
            return _limit_refusal(status, f"requests in {REQUEST_WINDOW:.0f} seconds", empty[0], limit)
        self._requests.take(keys, 1, now)
        if self.draining:
            return Refusal(status, DRAINING, "draining")
        return None

    def _circuit_limit(self, *decisions: Decision) -> Limit | None:
        guest = any(decision.rule == GUEST_RULE for decision in decisions)
        limit = self.limits.guest_circuit if guest else self.limits.circuit
        return None if limit.unlimited else limit

    def _drop_reservation(self, peer: PeerId) -> HeldReservation | None:
        held = self._reservations.pop(peer, None)
        if held is not None:
            self._reserved.remove(held.keys)
        return held

    def _push(self, deadline: float, what: PeerId | int) -> None:
        if deadline == math.inf:
            return
        if len(self._deadlines) > 2 * (len(self._reservations) + len(self._circuits)) + 64:
            self._deadlines = list(self._all_deadlines())
            heapq.heapify(self._deadlines)
        else:
            self._pushed += 1
            heapq.heappush(self._deadlines, (deadline, self._pushed, what))

    def _all_deadlines(self) -> Iterator[tuple[float, int, PeerId | int]]:
        for held in self._reservations.values():
            self._pushed += 1
            yield held.expires, self._pushed, held.peer
        for circuit in self._circuits.values():
            if circuit.deadline < math.inf:
                self._pushed += 1
                yield circuit.deadline, self._pushed, circuit.number

    def _is_current(self, entry: tuple[float, int, PeerId | int]) -> bool:
        """Whether a deadline was not moved or taken away since it was pushed."""
        deadline, _, what = entry
        if isinstance(what, PeerId):
            held = self._reservations.get(what)
            return held is not None and held.expires == deadline
        circuit = self._circuits.get(what)
        return circuit is not None and circuit.deadline == deadline

    def _collect_due(self, now: float) -> None:
        while self._deadlines and self._deadlines[0][0] <= now:
            entry = heapq.heappop(self._deadlines)
            if not self._is_current(entry):
                continue
            what = entry[2]
            if isinstance(what, PeerId):
                held = self._drop_reservation(what)
                if held is not None:
                    self._gone.append((held, Refusal(Status.NO_RESERVATION, "the reservation has expired", "expired")))
                continue
            circuit = self._circuits[what]
            self.close(circuit, now)
            self._cut.append((circuit, _overdue(circuit)))


def _overdue(circuit: Circuit) -> Refusal:
    if not circuit.is_open:
        return Refusal(Status.CONNECTION_FAILED, "the peer did not answer in time", "handshake-timeout")
    seconds = circuit.limit.duration if circuit.limit is not None else 0
    return Refusal(Status.RESOURCE_LIMIT_EXCEEDED, f"the limit of {seconds} seconds is reached", "circuit-seconds")
