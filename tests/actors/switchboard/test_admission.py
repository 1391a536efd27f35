"""The queue before the handshakes, without sockets and without a clock."""

import pytest

from actors.switchboard.admission import Admission, Limits, source_of


def admit_all(admission, now):
    places = []
    while (place := admission.next(now)) is not None:
        places.append(place)
    return places


@pytest.mark.parametrize(
    ("address", "source"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::1", "2001:db8:1:2::/64"),
        ("2001:db8:1:3::1", "2001:db8:1:3::/64"),
        ("fe80::1%eth0", "fe80::/64%eth0"),
    ],
)
def test_an_ipv6_network_is_one_source(address, source):
    assert source_of(address) == source


def test_callers_begin_in_order_of_arrival_within_a_source():
    admission = Admission(Limits())
    for caller in range(3):
        assert admission.arrive("a", caller)
    assert [place.caller for place in admit_all(admission, 0.0)] == [0, 1, 2]
    assert admission.waiting == 0
    assert admission.running == 3


def test_a_source_that_floods_delays_itself_alone():
    admission = Admission(Limits(concurrent=4, concurrent_per_source=4))
    for caller in range(100):
        admission.arrive("flood", caller)
    first = admit_all(admission, 0.0)
    admission.arrive("friend", "me")
    admission.leave(first[0], authenticated=False)
    admission.leave(first[1], authenticated=False)
    assert "me" in {place.caller for place in admit_all(admission, 0.0)}


def test_places_for_one_source_are_bounded_while_others_get_in():
    admission = Admission(Limits(concurrent=4, concurrent_per_source=2))
    for caller in range(10):
        admission.arrive("a", caller)
        admission.arrive("b", caller)
    assert sorted(place.source for place in admit_all(admission, 0.0)) == ["a", "a", "b", "b"]


def test_a_full_queue_turns_callers_away():
    admission = Admission(Limits(queued=3, queued_per_source=2))
    assert admission.arrive("a", 1)
    assert admission.arrive("a", 2)
    assert not admission.arrive("a", 3)
    assert admission.arrive("b", 1)
    assert not admission.arrive("c", 1)
    assert sorted(admission.drain()) == [1, 1, 2]
    assert admission.waiting == 0


def test_the_rate_holds_for_unknown_callers_and_not_for_authenticated_ones():
    admission = Admission(Limits(rate=10, burst=2, queued_per_source=100))
    for caller in range(10):
        admission.arrive("a", caller)
    first = admit_all(admission, 0.0)
    assert len(first) == 2
    assert admission.next_change(0.0) == pytest.approx(0.1)
    admission.leave(first[0], authenticated=False)
    assert admission.next(0.0) is None
    admission.leave(first[1], authenticated=True)
    assert admission.next(0.0) is not None, "the token of an authenticated caller comes back"
    assert admission.next(0.05) is None
    assert admission.next(0.11) is not None


def test_a_slow_handshake_loses_its_place_when_others_wait():
    admission = Admission(Limits(concurrent=2, concurrent_per_source=2, patience=1.0))
    displaced = []
    for caller in ("slow", "slower"):
        admission.arrive("a", caller)
    for place in admit_all(admission, 0.0):
        place.displace = lambda caller=place.caller: displaced.append(caller) is None
    assert admission.displace(5.0) == 0, "nobody waits"
    admission.arrive("b", "friend")
    assert admission.next_change(0.5) == pytest.approx(0.5)
    assert admission.displace(0.5) == 0
    assert admission.displace(1.0) == 1
    assert displaced == ["slow"]
    assert admission.next(1.0).caller == "friend"
    assert admission.running == 2


def test_a_handshake_that_is_not_to_blame_keeps_its_place():
    admission = Admission(Limits(concurrent=1, patience=1.0))
    admission.arrive("a", "honest")
    admission.next(0.0).displace = lambda: False
    admission.arrive("b", "friend")
    assert admission.displace(5.0) == 0
    assert admission.running == 1
    assert 0 < admission.next_change(5.0) < 1, "looked at again, and not without pause"


def test_a_source_at_its_limit_displaces_only_its_own():
    admission = Admission(Limits(concurrent=10, concurrent_per_source=1, patience=1.0))
    displaced = []
    for source in ("a", "b"):
        admission.arrive(source, source)
    for place in admit_all(admission, 0.0):
        place.displace = lambda caller=place.caller: displaced.append(caller) is None
    admission.arrive("b", "b2")
    assert admission.displace(2.0) == 1
    assert displaced == ["b"]


def test_a_process_with_few_descriptors_has_a_short_queue():
    limits = Limits().within(256)
    assert (limits.queued, limits.queued_per_source) == (32, 32)
    assert Limits().within(1_000_000) == Limits()


def test_leaving_twice_is_harmless():
    admission = Admission(Limits())
    admission.arrive("a", 1)
    place = admission.next(0.0)
    admission.leave(place, authenticated=False)
    admission.leave(place, authenticated=False)
    assert admission.running == 0


def test_buckets_of_many_sources_are_bounded():
    admission = Admission(Limits())
    for number in range(5000):
        admission.arrive(str(number), number)
        admission.leave(admission.next(0.0), authenticated=False)
    assert len(admission._buckets) <= 4096
