"""A relay's table of reservations and circuits, and the token buckets that it uses. Time is an argument."""

from __future__ import annotations

import dataclasses
import ipaddress
import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, multiple, rule

from protocol.circuit.exchange import HANDSHAKE_TIMEOUT
from protocol.circuit.messages import Limit, Refusal, Status
from protocol.errors import InvalidValueError
from protocol.keys import PrivateKey
from protocol.policy import Decision, PeerRule, Policy, PolicyIndex
from protocol.reservations import (
    LEAST_BURST,
    LEAST_CHUNK,
    REQUEST_WINDOW,
    Circuit,
    Direction,
    HeldReservation,
    RelayLimits,
    RelayTable,
    network_prefix,
)
from protocol.token_bucket import UNLIMITED, Scoped, ScopedBuckets, TokenBucket

PEERS = [PrivateKey.from_seed(bytes((number,)) * 32).peer_id for number in range(12)]
A, B, C, D = PEERS[:4]
IP = ipaddress.ip_address("192.0.2.1")
IP2 = ipaddress.ip_address("192.0.2.2")
FAR = ipaddress.ip_address("198.51.100.9")
WALL = 1_700_000_000.5
FREE = RelayLimits(UNLIMITED, UNLIMITED, UNLIMITED, UNLIMITED, 3600, Limit(), Limit(120, 1 << 17))


def everybody(peer, now_wall):
    return Decision(allowed=True, rule="authorized_keys:1")


def only(*peers):
    return lambda peer, _: Decision(allowed=peer in peers, rule="listed" if peer in peers else "not-listed")


def table(acl=everybody, **limits):
    return RelayTable(dataclasses.replace(FREE, **limits), acl)


def refused(result, status, rule):
    assert isinstance(result, Refusal)
    assert (result.status, result.rule) == (status, rule)
    return result


def circuit(made, source=A, destination=B, now=0.0):
    found = made.connect(source, IP, destination, now, WALL)
    assert isinstance(found, Circuit)
    made.opened(found, now)
    return found


def test_a_reservation_lasts_its_time_and_no_longer():
    made = table()
    held = made.reserve(A, IP, 100.0, WALL)
    assert (held.peer, held.expires, held.expire_wall, held.limit) == (A, 3700.0, 1_700_003_600, None)
    assert not held.renewed
    assert made.next_deadline() == 3700.0
    assert made.expire(3699.9).reservations == ()
    assert made.reservation_of(A, 3699.9) is held
    assert made.reservation_of(A, 3700.0) is None
    refused(made.connect(B, IP, A, 3700.0, WALL), Status.NO_RESERVATION, "no-reservation")
    ((gone, why),) = made.expire(3700.0).reservations
    assert (gone, why.rule) == (held, "expired")
    assert made.next_deadline() is None
    assert made.expire(9999.0).reservations == ()


def test_a_renewal_extends_and_leaves_one_reservation():
    made = table(reservations=Scoped(1, 1, 1, 1))
    made.reserve(A, IP, 0.0, WALL)
    held = made.reserve(A, IP2, 1000.0, WALL + 1000)
    assert held.renewed
    assert held.expires == 4600.0
    assert made.expire(3600.0).reservations == ()
    assert [each.peer for each in made.reservations] == [A]
    refused(made.reserve(B, FAR, 1000.0, WALL), Status.RESERVATION_REFUSED, "reservations-total")


def test_an_expired_reservation_makes_room_and_is_told_later():
    made = table(reservations=Scoped(None, None, None, 1))
    first = made.reserve(A, IP, 0.0, WALL)
    assert isinstance(made.reserve(B, IP, 3600.0, WALL), HeldReservation)
    assert made.next_deadline() == -math.inf
    assert [held for held, _ in made.expire(3600.0).reservations] == [first]
    assert not made.reserve(B, IP, 9000.0, WALL).renewed


@pytest.mark.parametrize(
    ("limits", "second", "address", "rule"),
    [
        (Scoped(None, 1, None, None), B, IP, "reservations-per-ip"),
        (Scoped(None, None, 1, None), B, IP2, "reservations-per-network"),
        (Scoped(None, None, None, 1), B, FAR, "reservations-total"),
    ],
)
def test_reservations_have_limits_that_the_refusal_names(limits, second, address, rule):
    made = table(reservations=limits)
    made.reserve(A, IP, 0.0, WALL)
    why = refused(made.reserve(second, address, 0.0, WALL), Status.RESERVATION_REFUSED, rule)
    assert "limit of 1 reservations" in why.reason
    made.disconnected(A)
    assert isinstance(made.reserve(second, address, 0.0, WALL), HeldReservation)


def test_a_limit_of_nothing_grants_nothing():
    refused(
        table(reservations=Scoped(0, None, None, None)).reserve(A, IP, 0.0, WALL),
        Status.RESERVATION_REFUSED,
        "reservations-per-peer",
    )
    refused(
        table(requests=Scoped(None, None, None, 0)).reserve(A, IP, 0.0, WALL),
        Status.RESERVATION_REFUSED,
        "requests-total",
    )


def test_a_refused_renewal_leaves_the_old_reservation_counted():
    made = table(reservations=Scoped(None, 1, None, None))
    made.reserve(A, IP, 0.0, WALL)
    made.reserve(B, IP2, 0.0, WALL)
    refused(made.reserve(A, IP2, 10.0, WALL), Status.RESERVATION_REFUSED, "reservations-per-ip")
    assert made.reservation_of(A, 3599.0).expires == 3600.0
    refused(made.reserve(C, IP, 10.0, WALL), Status.RESERVATION_REFUSED, "reservations-per-ip")


def test_addresses_are_counted_as_what_one_household_has():
    made = table(reservations=Scoped(None, 1, None, None))
    made.reserve(A, ipaddress.ip_address("2001:db8:1:2::1"), 0.0, WALL)
    same = made.reserve(B, ipaddress.ip_address("2001:db8:1:2:3::4"), 0.0, WALL)
    refused(same, Status.RESERVATION_REFUSED, "reservations-per-ip")
    assert isinstance(made.reserve(B, ipaddress.ip_address("2001:db8:1:3::1"), 0.0, WALL), HeldReservation)
    made.reserve(C, IP, 0.0, WALL)
    mapped = made.reserve(D, ipaddress.ip_address("::ffff:192.0.2.1"), 0.0, WALL)
    refused(mapped, Status.RESERVATION_REFUSED, "reservations-per-ip")
    assert network_prefix(IP) == network_prefix(IP2) != network_prefix(FAR)


def test_the_network_of_an_address_can_be_something_else():
    def autonomous_system(address):
        return 64496 if address in {IP, FAR} else None

    limits = dataclasses.replace(FREE, reservations=Scoped(None, None, 1, None))
    made = RelayTable(limits, everybody, network_of=autonomous_system)
    made.reserve(A, IP, 0.0, WALL)
    refused(made.reserve(B, FAR, 0.0, WALL), Status.RESERVATION_REFUSED, "reservations-per-network")
    assert isinstance(made.reserve(C, IP2, 0.0, WALL), HeldReservation)
    assert isinstance(made.reserve(D, IP2, 0.0, WALL), HeldReservation)


def test_both_ends_of_a_circuit_must_be_allowed():
    made = table(only(A, B))
    assert isinstance(made.reserve(B, IP, 0.0, WALL), HeldReservation)
    refused(made.reserve(C, IP, 0.0, WALL), Status.PERMISSION_DENIED, "not-listed")
    refused(made.connect(C, IP, B, 0.0, WALL), Status.PERMISSION_DENIED, "not-listed")
    # A stranger learns nothing of who has a reservation, and a listed peer reaches no stranger.
    refused(made.connect(C, IP, D, 0.0, WALL), Status.PERMISSION_DENIED, "not-listed")
    refused(made.connect(A, IP, C, 0.0, WALL), Status.PERMISSION_DENIED, "not-listed")
    assert isinstance(made.connect(A, IP, B, 0.0, WALL), Circuit)
    refused(made.connect(B, IP, A, 0.0, WALL), Status.NO_RESERVATION, "no-reservation")
    refused(made.connect(B, IP, B, 0.0, WALL), Status.CONNECTION_FAILED, "self")


def test_another_access_list_is_in_force_at_once():
    made = table()
    for peer in (A, B, C):
        made.reserve(peer, IP, 0.0, WALL)
    kept, lost_source, lost_target = circuit(made, A, B), circuit(made, C, A), circuit(made, A, C)
    ended = made.set_acl(only(A, B), 1.0, WALL)
    assert [held.peer for held, _ in ended.reservations] == [C]
    assert {cut.number for cut, _ in ended.circuits} == {lost_source.number, lost_target.number}
    assert all(why.status == Status.PERMISSION_DENIED for _, why in ended.circuits)
    assert list(made.circuits) == [kept]
    refused(made.reserve(C, IP, 1.0, WALL), Status.PERMISSION_DENIED, "not-listed")


def test_a_line_that_expires_ends_what_it_allowed():
    policy = PolicyIndex(
        Policy(1, True, (PeerRule(A, 1, None, ""), PeerRule(B, 2, WALL + 50, "")), ()),
    )
    made = table(policy.decide_connection)
    made.reserve(B, IP, 0.0, WALL)
    found = circuit(made)
    assert made.revalidate(49.0, WALL + 49) == made.expire(49.0)
    ended = made.revalidate(50.0, WALL + 50)
    assert [held.peer for held, _ in ended.reservations] == [B]
    ((cut, why),) = ended.circuits
    assert (cut, why.rule) == (found, "expired:2")


def test_a_denied_renewal_ends_the_reservation():
    allowed = {A}
    made = table(lambda peer, _: Decision(allowed=peer in allowed, rule="x"))
    held = made.reserve(A, IP, 0.0, WALL)
    allowed.clear()
    refused(made.reserve(A, IP, 1.0, WALL), Status.PERMISSION_DENIED, "x")
    assert [gone for gone, _ in made.expire(1.0).reservations] == [held]


def test_a_disconnected_peer_has_no_reservation():
    made = table()
    held = made.reserve(A, IP, 0.0, WALL)
    assert made.disconnected(A) is held
    assert made.disconnected(A) is None
    refused(made.connect(B, IP, A, 0.0, WALL), Status.NO_RESERVATION, "no-reservation")
    assert made.next_deadline() is None


@pytest.mark.parametrize(
    ("limits", "rule"),
    [
        (Scoped(2, None, None, None), "circuits-per-peer"),
        (Scoped(None, 2, None, None), "circuits-per-ip"),
        (Scoped(None, None, 2, None), "circuits-per-network"),
        (Scoped(None, None, None, 2), "circuits-total"),
    ],
)
def test_circuits_have_limits_and_count_until_they_are_closed(limits, rule):
    made = table(circuits=limits)
    made.reserve(B, IP, 0.0, WALL)
    first = made.connect(A, IP, B, 0.0, WALL)
    circuit(made)
    why = refused(made.connect(A, IP, B, 0.0, WALL), Status.RESOURCE_LIMIT_EXCEEDED, rule)
    assert "limit of 2 circuits" in why.reason
    made.close(first, 1.0)
    made.close(first, 1.0)
    circuit(made)
    refused(made.connect(A, IP, B, 0.0, WALL), Status.RESOURCE_LIMIT_EXCEEDED, rule)


def test_the_destinations_limit_counts_circuits_from_others():
    made = table(circuits=Scoped(1, None, None, None))
    made.reserve(B, IP, 0.0, WALL)
    circuit(made)
    refused(made.connect(C, FAR, B, 0.0, WALL), Status.RESOURCE_LIMIT_EXCEEDED, "circuits-per-peer")


def test_a_circuit_must_be_opened_in_time():
    made = table()
    made.reserve(B, IP, 0.0, WALL)
    found = made.connect(A, IP, B, 10.0, WALL)
    assert made.next_deadline() == 10.0 + HANDSHAKE_TIMEOUT
    ((cut, why),) = made.expire(10.0 + HANDSHAKE_TIMEOUT).circuits
    assert (cut, why.rule, why.status) == (found, "handshake-timeout", Status.CONNECTION_FAILED)
    with pytest.raises(InvalidValueError):
        made.opened(found, 41.0)
    with pytest.raises(InvalidValueError):
        made.allow(found, Direction.TO_SOURCE, 1, 41.0)


def test_own_devices_are_not_cut_and_guests_are():
    made = table(lambda peer, _: Decision(allowed=True, rule="gating-off" if peer == C else "authorized_keys:1"))
    assert made.reserve(B, IP, 0.0, WALL).limit is None
    assert made.reserve(C, IP, 0.0, WALL).limit == Limit(120, 1 << 17)
    mine = circuit(made, now=5.0)
    guests = [circuit(made, A, C, now=5.0), circuit(made, C, B, now=5.0)]
    assert mine.limit is None
    assert mine.deadline == math.inf
    assert made.next_deadline() == 125.0
    ended = made.expire(125.0)
    assert {cut.number for cut, _ in ended.circuits} == {each.number for each in guests}
    assert {str(why) for _, why in ended.circuits} == {"RESOURCE_LIMIT_EXCEEDED: the limit of 120 seconds is reached"}
    assert made.allow(guests[0], Direction.TO_SOURCE, 10, 125.0).over
    assert made.allow(mine, Direction.TO_SOURCE, 1 << 40, 1e6).count == 1 << 40


def test_no_crowd_of_guests_takes_all_of_what_is_shared():
    made = table(
        lambda peer, _: Decision(allowed=True, rule="authorized_keys:1" if peer in PEERS[:3] else "gating-off"),
        reservations=Scoped(None, None, None, 8),
        circuits=Scoped(4, None, None, 100),
        requests=Scoped(None, None, None, 40),
    )
    results = [made.reserve(peer, IP, 0.0, WALL) for peer in PEERS[3:]]
    assert sum(isinstance(one, HeldReservation) for one in results) == 6
    assert "limit of 6 reservations in all" in results[-1].reason
    assert isinstance(made.reserve(A, FAR, 0.0, WALL), HeldReservation)
    assert isinstance(made.reserve(B, FAR, 0.0, WALL), HeldReservation)
    refused(made.reserve(C, FAR, 0.0, WALL), Status.RESERVATION_REFUSED, "reservations-total")
    # ... nor of what others may have at one listed peer,
    results = [made.connect(peer, IP, A, 0.0, WALL) for peer in PEERS[4:9]]
    assert sum(isinstance(one, Circuit) for one in results) == 3
    refused(results[-1], Status.RESOURCE_LIMIT_EXCEEDED, "circuits-per-peer")
    assert isinstance(made.connect(B, FAR, A, 0.0, WALL), Circuit)
    # ... while a guest has all of its own.
    assert [type(made.connect(PEERS[9], IP, peer, 0.0, WALL)) for peer in (B, *PEERS[3:6])] == [Circuit] * 4
    # The last requests are for those who are listed.
    while (
        not isinstance(last := made.connect(PEERS[10], IP, PEERS[11], 0.0, WALL), Refusal)
        or "requests" not in last.rule
    ):
        assert isinstance(last, Refusal)
    assert last.rule == "requests-total"
    assert isinstance(made.reserve(A, FAR, 0.0, WALL), HeldReservation)


def test_a_circuit_does_not_end_with_the_reservation():
    made = table()
    made.reserve(B, IP, 0.0, WALL)
    found = circuit(made)
    assert made.expire(3600.0).circuits == ()
    assert list(made.circuits) == [found]


def test_bytes_of_a_circuit_are_limited_each_way():
    made = table(circuit=Limit(0, 1000))
    made.reserve(B, IP, 0.0, WALL)
    found = circuit(made)
    assert made.allow(found, Direction.TO_SOURCE, 999, 0.0) == made.allow(found, Direction.TO_DESTINATION, 999, 0.0)
    last = made.allow(found, Direction.TO_SOURCE, 1, 0.0)
    assert (last.count, last.over) == (1, False)  # exactly the limit is within it
    more = made.allow(found, Direction.TO_SOURCE, 1, 0.0)
    assert (more.count, more.wait, more.over) == (0, 0.0, True)
    other = made.allow(found, Direction.TO_DESTINATION, 50, 0.0)
    assert (other.count, other.over) == (1, True)
    assert found.forwarded == [1000, 1000]


@pytest.mark.parametrize("scope", ["per_peer", "per_ip", "per_network", "total"])
def test_rates_hold_over_time(scope):
    rate = 1_000_000
    made = table(bytes_per_second=dataclasses.replace(UNLIMITED, **{scope: rate}))
    made.reserve(B, IP, 0.0, WALL)
    found = circuit(made)
    now, sent = 0.0, 0
    while now < 10:
        allowance = made.allow(found, Direction.TO_SOURCE, 65_536, now)
        sent += allowance.count
        assert not allowance.over
        if allowance.count < 65_536:
            assert allowance.wait > 0
            now += allowance.wait + 1e-9
    assert rate * 10 - LEAST_CHUNK <= sent <= rate * 10 + rate * 0.25 + LEAST_CHUNK


def test_circuits_that_ask_in_turns_have_even_shares():
    made = table(bytes_per_second=Scoped(None, None, None, 2_000_000))
    made.reserve(B, IP, 0.0, WALL)
    circuits = [circuit(made, peer) for peer in (A, C, D)]
    now = 0.0
    while now < 20:
        waits = [made.allow(each, Direction.TO_SOURCE, 16_384, now) for each in circuits]
        if any(allowance.count < 16_384 for allowance in waits):
            now += max(allowance.wait for allowance in waits) + 1e-9
        circuits = circuits[1:] + circuits[:1]
    shares = [each.forwarded[Direction.TO_SOURCE] for each in circuits]
    assert min(shares) > 0.9 * max(shares)


def test_a_peer_does_not_refill_its_budget_by_coming_back():
    made = table(bytes_per_second=Scoped(100_000, None, None, None))
    made.reserve(B, IP, 0.0, WALL)
    total = 0
    for _ in range(50):
        found = circuit(made)
        total += made.allow(found, Direction.TO_SOURCE, 1 << 20, 0.0).count
        made.close(found, 0.0)
    assert total <= LEAST_BURST


def test_a_rate_of_nothing_waits_for_ever():
    made = table(bytes_per_second=Scoped(None, None, None, 0))
    made.reserve(B, IP, 0.0, WALL)
    allowance = made.allow(circuit(made), Direction.TO_SOURCE, 100, 0.0)
    assert (allowance.count, allowance.wait, allowance.over) == (0, math.inf, False)


def test_new_limits_apply_to_open_circuits_rates():
    made = table()
    made.reserve(B, IP, 0.0, WALL)
    found = circuit(made)
    made.set_limits(dataclasses.replace(FREE, bytes_per_second=Scoped(None, None, None, 1)), 0.0)
    assert made.allow(found, Direction.TO_SOURCE, 1 << 20, 0.0).count == LEAST_BURST
    made.close(found, 0.0)


def test_requests_are_limited_whether_granted_or_not():
    made = table(only(A), requests=Scoped(3, None, None, None))
    for _ in range(3):
        refused(made.reserve(B, IP, 0.0, WALL), Status.PERMISSION_DENIED, "not-listed")
    refused(made.reserve(B, IP, 0.0, WALL), Status.RESERVATION_REFUSED, "requests-per-peer")
    refused(made.connect(B, IP, A, 0.0, WALL), Status.RESOURCE_LIMIT_EXCEEDED, "requests-per-peer")
    assert isinstance(made.reserve(A, IP, 0.0, WALL), HeldReservation)
    refused(made.reserve(B, IP, REQUEST_WINDOW / 3 + 0.01, WALL), Status.PERMISSION_DENIED, "not-listed")


def test_a_flood_of_renewals_takes_no_memory():
    made = table()
    for moment in range(5000):
        made.reserve(A, IP, moment / 100, WALL)
    assert len(made._deadlines) < 100
    assert made.next_deadline() == 4999 / 100 + 3600


def test_a_flood_of_peers_leaves_no_buckets_behind():
    made = table(only(), requests=Scoped(2, 2, None, None))
    for number in range(5000):
        peer = PrivateKey.from_seed(number.to_bytes(32, "big")).peer_id if number < 50 else PEERS[number % 12]
        made.reserve(peer, ipaddress.ip_address(number << 8), number * REQUEST_WINDOW, WALL)
    assert len(made._requests) < 1000


def test_a_draining_relay_grants_nothing_new():
    made = table()
    made.reserve(B, IP, 0.0, WALL)
    found = circuit(made)
    made.drain()
    refused(made.reserve(A, IP, 0.0, WALL), Status.RESERVATION_REFUSED, "draining")
    refused(made.connect(A, IP, B, 0.0, WALL), Status.RESOURCE_LIMIT_EXCEEDED, "draining")
    assert made.allow(found, Direction.TO_SOURCE, 10, 0.0).count == 10


def test_limits_are_checked():
    with pytest.raises(InvalidValueError):
        Scoped(-1, None, None, None)
    with pytest.raises(InvalidValueError):
        dataclasses.replace(FREE, ttl=0)


@given(
    st.floats(1, 1e6),
    st.floats(1, 1e6),
    st.lists(st.tuples(st.floats(0, 10), st.floats(0, 1e6)), max_size=30),
)
def test_a_bucket_gives_no_more_than_its_rate_and_burst(rate, burst, steps):
    now, taken, bucket = 0.0, 0.0, TokenBucket(rate, burst, 0.0)
    for pause, wanted in steps:
        now += pause
        amount = min(wanted, bucket.level(now))
        bucket.take(amount, now)
        taken += amount
        assert 0 <= bucket.level(now) <= burst
        wait = bucket.wait(wanted, now)
        assert bucket.level(now + wait) >= min(wanted, burst) * (1 - 1e-6) - 1e-6
    assert taken <= (burst + rate * now) * (1 + 1e-9)


def test_a_bucket_does_not_mind_a_clock_that_stands_still():
    bucket = TokenBucket(1.0, 10.0, 100.0)
    bucket.take(10, 100.0)
    assert bucket.level(99.0) == 0
    bucket.take(0, 99.0)
    assert bucket.level(101.0) == 1


def test_an_empty_bucket_is_not_forgotten_before_it_is_full():
    buckets = ScopedBuckets(Scoped(1, None, None, None), burst_seconds=10, least_burst=1)
    for number in range(2000):
        buckets.take((("peer", number),), 10, 0.0)
    assert all(buckets._buckets["peer", number].level(5.0) == 5 for number in range(2000))
    (held,) = buckets.hold((("peer", 7),), 5.0)
    assert held.level(5.0) == 5
    for number in range(2000, 12_000):
        buckets.take((("peer", number),), 10, 10.0)
    assert ("peer", 8) not in buckets._buckets
    assert ("peer", 7) in buckets._buckets
    buckets.release((("peer", 7),), 20.0)
    assert not buckets._held


def test_what_nobody_limits_has_no_buckets():
    buckets = ScopedBuckets(UNLIMITED, burst_seconds=1, least_burst=1)
    keys = (("peer", A), ("total", None))
    assert buckets.hold(keys, 0.0) == ()
    assert buckets.exhausted(keys, 0.0) is None
    assert len(buckets) == 0


class Table(RuleBasedStateMachine):
    """Whatever is asked for in whatever order: no limit is ever broken, and nothing is counted wrongly."""

    circuits = Bundle("circuits")
    LIMITS = RelayLimits(
        Scoped(1, 3, 5, 7), Scoped(2, 4, 6, 6), UNLIMITED, UNLIMITED, 50, Limit(40, 500), Limit(20, 100)
    )
    ADDRESSES = (IP, IP2, FAR)

    def __init__(self):
        super().__init__()
        self.now = 0.0
        self.allowed = set(PEERS)
        self.table = RelayTable(self.LIMITS, self.acl)
        self.open = {}
        self.held = {}

    def acl(self, peer, now_wall):
        return Decision(allowed=peer in self.allowed, rule="x")

    def forget(self, ended):
        for held, _ in ended.reservations:
            if self.held.get(held.peer) is held:
                del self.held[held.peer]
        for cut, _ in ended.circuits:
            self.open.pop(cut.number, None)

    @rule(peer=st.sampled_from(PEERS), address=st.sampled_from(ADDRESSES))
    def reserve(self, peer, address):
        result = self.table.reserve(peer, address, self.now, WALL + self.now)
        if isinstance(result, HeldReservation):
            self.held[peer] = result
        self.forget(self.table.expire(self.now))

    @rule(
        target=circuits,
        source=st.sampled_from(PEERS),
        destination=st.sampled_from(PEERS),
        which=st.sampled_from(ADDRESSES),
    )
    def connect(self, source, destination, which):
        result = self.table.connect(source, which, destination, self.now, WALL + self.now)
        self.forget(self.table.expire(self.now))
        if isinstance(result, Refusal):
            return multiple()
        assert {source, destination} <= self.allowed
        assert destination in self.held
        self.open[result.number] = result
        return result

    @rule(found=circuits)
    def opened(self, found):
        if found.number in self.open and not found.is_open:
            self.table.opened(found, self.now)

    @rule(found=circuits, wanted=st.integers(0, 300), direction=st.sampled_from(Direction))
    def forward(self, found, wanted, direction):
        if found.is_open:
            allowance = self.table.allow(found, direction, wanted, self.now)
            assert allowance.count <= wanted
            assert found.forwarded[direction] <= 500

    @rule(found=circuits)
    def close(self, found):
        self.table.close(found, self.now)
        self.open.pop(found.number, None)

    @rule(peer=st.sampled_from(PEERS))
    def disconnect(self, peer):
        assert self.table.disconnected(peer) is self.held.pop(peer, None)

    @rule(peer=st.sampled_from(PEERS))
    def change_list(self, peer):
        self.allowed ^= {peer}
        self.forget(self.table.revalidate(self.now, WALL + self.now))

    @rule(seconds=st.floats(0, 60))
    def pass_time(self, seconds):
        self.now += seconds
        deadline = self.table.next_deadline()
        ended = self.table.expire(self.now)
        assert bool(ended.reservations or ended.circuits) == (deadline is not None and deadline <= self.now)
        self.forget(ended)

    @invariant()
    def counts_agree(self):
        assert {held.peer: held for held in self.table.reservations} == self.held
        assert {found.number: found for found in self.table.circuits} == self.open
        for usage, owners, limits in (
            (self.table._reserved, self.held.values(), self.LIMITS.reservations),
            (self.table._connected, self.open.values(), self.LIMITS.circuits),
        ):
            counts = {}
            for key in itertools.chain.from_iterable(owner.keys for owner in owners):
                counts[key] = counts.get(key, 0) + 1
            assert usage._counts == counts
            assert all(count <= limits.limit(key[0]) for key, count in counts.items())


TestTable = Table.TestCase
TestTable.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
