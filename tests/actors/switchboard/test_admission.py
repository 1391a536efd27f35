"""The queue before the handshakes, without sockets and without a clock."""

import pytest

from actors.switchboard.admission import Admission, Limits, Source, source_of


def admit_all(admission, now):
    places = []
    while (place := admission.next(now)) is not None:
        places.append(place)
    return places


@pytest.mark.parametrize(
    ("address", "network", "home"),
    [
        ("192.0.2.1", "192.0.2.1", ""),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1::/48", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::1", "2001:db8:1::/48", "2001:db8:1:2::/64"),
        ("2001:db8:1:3::1", "2001:db8:1::/48", "2001:db8:1:3::/64"),
        ("2001:db8:2:3::1", "2001:db8:2::/48", "2001:db8:2:3::/64"),
        ("fe80::1%eth0", "fe80::/48%eth0", "fe80::/64%eth0"),
    ],
)
def test_what_one_customer_has_of_ipv6_is_one_source(address, network, home):
    assert source_of(address) == Source(network, home)


def test_callers_begin_in_order_of_arrival_within_a_source():
    admission = Admission(Limits())
    for caller in range(3):
        assert admission.arrive(Source("a"), caller) is None
    assert [place.caller for place in admit_all(admission, 0.0)] == [0, 1, 2]
    assert admission.waiting == 0
    assert admission.running == 3


def test_a_source_that_floods_delays_itself_alone():
    admission = Admission(Limits(concurrent=4, concurrent_per_source=4))
    for caller in range(100):
        admission.arrive(Source("flood"), caller)
    first = admit_all(admission, 0.0)
    admission.arrive(Source("friend"), "me")
    admission.leave(first[0], authenticated=False)
    admission.leave(first[1], authenticated=False)
    assert "me" in {place.caller for place in admit_all(admission, 0.0)}


def test_places_for_one_source_are_bounded_while_others_get_in():
    admission = Admission(Limits(concurrent=4, concurrent_per_source=2))
    for caller in range(10):
        admission.arrive(Source("a"), caller)
        admission.arrive(Source("b"), caller)
    assert sorted(place.source for place in admit_all(admission, 0.0)) == ["a", "a", "b", "b"]


def test_a_full_queue_turns_callers_away():
    admission = Admission(Limits(queued=3, queued_per_source=2))
    assert admission.arrive(Source("a"), "a1") is None
    assert admission.arrive(Source("a"), "a2") is None
    assert admission.arrive(Source("a"), "a3") == "a3"
    assert admission.arrive(Source("b"), "b1") is None
    assert admission.arrive(Source("b"), "b2") == "b2", "nobody has more"
    assert sorted(admission.drain()) == ["a1", "a2", "b1"]
    assert admission.waiting == 0


def test_who_fills_the_queue_makes_room_for_others():
    admission = Admission(Limits(concurrent=4, concurrent_per_source=2, queued=100, queued_per_source=60))
    for caller in range(500):
        admission.arrive(Source("flood 1"), ("flood", caller))
        admission.arrive(Source("flood 2"), ("flood", caller))
    assert admission.waiting == 100
    for number in range(20):
        gone = admission.arrive(Source(f"friend {number}"), ("friend", number))
        assert gone is not None
        assert gone[0] == "flood"
    assert admission.waiting == 100
    admitted = []
    while places := admit_all(admission, 0.0):
        admitted += [place.caller for place in places]
        for place in places:
            admission.leave(place, authenticated=False)
    assert [caller for caller in admitted[:28] if caller[0] == "friend"] == [("friend", each) for each in range(20)]
    assert admission.waiting == 0


def test_one_network_with_many_homes_is_one_source_and_its_homes_take_turns():
    limits = Limits(concurrent=4, concurrent_per_source=2, queued=100, queued_per_source=80, burst=2, rate=1)
    admission = Admission(limits)
    for number in range(300):
        admission.arrive(source_of(f"2001:db8:1:{number:x}::1"), number)
    assert admission.waiting == 80
    assert admission.arrive(source_of("2001:db8:1:1::2"), "neighbour") == "neighbour", "each has as many"
    assert admission.arrive(source_of("2001:db8:2::1"), "friend") is None
    assert [place.caller for place in admit_all(admission, 0.0)] == [0, "friend", 1]
    assert admit_all(admission, 0.0) == [], "the network has used up its places"
    crowd = Admission(limits)
    for number in range(80):
        crowd.arrive(source_of("2001:db8:1:1::1"), number)
    assert crowd.arrive(source_of("2001:db8:1:2::1"), "neighbour") == 79
    assert [place.caller for place in admit_all(crowd, 0.0)] == [0, "neighbour"]


def test_the_rate_holds_for_unknown_callers_and_not_for_authenticated_ones():
    admission = Admission(Limits(rate=10, burst=2, queued_per_source=100))
    for caller in range(10):
        admission.arrive(Source("a"), caller)
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
        admission.arrive(Source("a"), caller)
    for place in admit_all(admission, 0.0):
        place.displace = lambda caller=place.caller: displaced.append(caller) is None
    assert admission.displace(5.0) == 0, "nobody waits"
    admission.arrive(Source("b"), "friend")
    assert admission.next_change(0.5) == pytest.approx(0.5)
    assert admission.displace(0.5) == 0
    assert admission.displace(1.0) == 1
    assert displaced == ["slow"]
    assert admission.next(1.0).caller == "friend"
    assert admission.running == 2


def test_a_handshake_that_is_not_to_blame_keeps_its_place():
    admission = Admission(Limits(concurrent=1, patience=1.0))
    admission.arrive(Source("a"), "honest")
    admission.next(0.0).displace = lambda: False
    admission.arrive(Source("b"), "friend")
    assert admission.displace(5.0) == 0
    assert admission.running == 1
    assert 0 < admission.next_change(5.0) < 1, "looked at again, and not without pause"


def test_a_source_at_its_limit_displaces_only_its_own():
    admission = Admission(Limits(concurrent=10, concurrent_per_source=1, patience=1.0))
    displaced = []
    for source in ("a", "b"):
        admission.arrive(Source(source), source)
    for place in admit_all(admission, 0.0):
        place.displace = lambda caller=place.caller: displaced.append(caller) is None
    admission.arrive(Source("b"), "b2")
    assert admission.displace(2.0) == 1
    assert displaced == ["b"]


def test_a_process_with_few_descriptors_has_a_short_queue():
    limits = Limits().within(256)
    assert (limits.queued, limits.queued_per_source) == (32, 32)
    assert Limits().within(1_000_000) == Limits()


def test_leaving_twice_is_harmless():
    admission = Admission(Limits())
    admission.arrive(Source("a"), 1)
    place = admission.next(0.0)
    admission.leave(place, authenticated=False)
    admission.leave(place, authenticated=False)
    assert admission.running == 0


def test_buckets_of_many_sources_are_bounded():
    admission = Admission(Limits())
    for number in range(5000):
        admission.arrive(Source(str(number)), number)
        admission.leave(admission.next(0.0), authenticated=False)
    assert len(admission._buckets) <= 4096
