"""The queue before the handshakes, without sockets and without a clock."""

import pytest

from actors.switchboard.admission import HANDED_ON, Admission, Limits
from actors.switchboard.crowd import Source, source_of


def admit_all(admission, now):
    places = []
    while (place := admission.next(now)) is not None:
        places.append(place)
    return places


@pytest.mark.parametrize(
    ("address", "region", "network", "home"),
    [
        ("192.0.2.1", "192.0.2.0/24", "192.0.2.1", ""),
        ("2001:db8:1:2:3:4:5:6", "2001:db8::/32", "2001:db8:1::/48", "2001:db8:1:2::/64"),
        ("2001:db8:1:3::1", "2001:db8::/32", "2001:db8:1::/48", "2001:db8:1:3::/64"),
        ("2001:db8:2:3::1", "2001:db8::/32", "2001:db8:2::/48", "2001:db8:2:3::/64"),
        ("fe80::1%eth0", "fe80::/32%eth0", "fe80::/48%eth0", "fe80::/64%eth0"),
    ],
)
def test_a_source_has_three_levels(address, region, network, home):
    assert source_of(address) == Source(network, home, region)


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
    assert sorted(place.source.network for place in admit_all(admission, 0.0)) == ["a", "a", "b", "b"]


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
    friends = [caller for caller in admitted[:32] if caller[0] == "friend"]
    assert friends == [("friend", each) for each in range(20)], "one turn in four is for those who had one lately"
    assert admission.waiting == 0


def test_one_network_with_many_homes_is_one_source_and_its_homes_take_turns():
    limits = Limits(concurrent=4, concurrent_per_source=2, queued=100, queued_per_source=80, burst=2, rate=1)
    admission = Admission(limits)
    for number in range(300):
        admission.arrive(source_of(f"2001:db8:1:{number:x}::1"), number)
    assert admission.waiting == 80
    assert admission.arrive(source_of("2001:db8:1:1::2"), "neighbour") == "neighbour", "each has as many"
    assert admission.arrive(source_of("2001:db8:2::1"), "friend") is None
    assert [place.caller for place in admit_all(admission, 0.0)] == [0, "friend"], "one provider has half of the places"
    assert admission.arrive(source_of("2001:db9:2::1"), "another") is None
    assert [place.caller for place in admit_all(admission, 0.0)] == ["another"]
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


def test_a_silent_caller_has_no_place_and_goes_first_when_there_is_no_room():
    admission = Admission(Limits(concurrent=2, queued=10, queued_per_source=5))
    for number in range(10):
        assert admission.greet(source_of(f"10.0.{number}.1"), number, 0.0) is None
    assert admission.next(0.0) is None
    assert (admission.silent, admission.waiting, admission.running) == (10, 10, 0)
    assert admission.greet(source_of("10.9.0.1"), "friend", 1.0) == 0, "who came first and has said nothing"
    assert admission.speaks("friend")
    assert admission.next(1.0).caller == "friend"
    assert admission.silent_for_too_long(5.9) == []
    assert admission.silent_for_too_long(6.0) == list(range(1, 10))
    assert admission.waiting == 0


def test_who_has_most_silent_callers_loses_one():
    admission = Admission(Limits(queued=10, queued_per_source=8))
    for number in range(9):
        admission.greet(source_of(f"2001:db8:{number:x}::1"), number, 0.0)
    admission.greet(source_of("10.0.0.1"), "single", 0.0)
    for number in range(20):
        gone = admission.greet(source_of(f"10.1.{number}.1"), f"friend {number}", 0.0)
        assert gone in range(9), "of the provider with many networks"
        if gone == 7:
            break


def test_known_sources_come_first_and_have_a_share_of_their_own():
    limits = Limits(concurrent=4, concurrent_per_source=4, queued=8, queued_per_source=8)
    admission = Admission(limits)
    admission.remember(source_of("192.0.2.1"), 0.0)
    for number in range(20):
        admission.arrive(source_of(f"10.0.{number}.1"), number)
    assert len(admit_all(admission, 0.0)) == 4
    for number in range(20):
        admission.arrive(source_of(f"10.1.{number}.1"), number)
    assert admission.waiting == 8
    assert admission.arrive(source_of("192.0.2.1"), "friend", 1.0) is None, "a waiting place that strangers cannot take"
    place = admission.next(1.0)
    assert place.caller == "friend", "a place that they cannot take either"
    assert place.known
    assert admission.next(1.0) is None
    week = 7 * 86400.0
    assert admission.is_known(source_of("192.0.2.1"), week - 1)
    assert not admission.is_known(source_of("192.0.2.1"), week)
    assert not admission.is_known(source_of("192.0.2.2"), 0.0)


def test_a_successor_knows_the_sources_of_the_latest_authentications():
    before, after = Admission(), Admission()
    assert before.remember(source_of("192.0.2.1"), 0.0)
    for number in range(300):
        assert before.remember(source_of(f"2001:db8:{number:x}::1"), 10.0 + number)
    assert not before.remember(source_of("2001:db8:64::2"), 400.0), "its subnet is known"
    left = before.known_sources(500.0)
    assert len(left) == HANDED_ON
    assert sum(map(len, left)) < 12 * 1024
    after.recall(left, 600.0)
    assert after.is_known(source_of("2001:db8:64::3"), 600.0)
    assert after.is_known(source_of("2001:db8:12b::3"), 600.0)
    assert not after.is_known(source_of("2001:db8:1::3"), 600.0), "of those that came longest ago nothing is left"
    assert not after.is_known(source_of("192.0.2.1"), 600.0)
    assert not after.is_known(source_of("2001:db8:64::3"), 400.0 + 7 * 86400.0), "a restart does not prolong it"


def test_one_provider_with_thousands_of_networks_is_one_in_turn():
    admission = Admission(Limits(concurrent=1000, concurrent_per_source=10, queued=3000))
    for number in range(2000):
        admission.arrive(source_of(f"2001:db8:{number:x}::1"), number)
    for number in range(20):
        admission.arrive(source_of(f"10.0.{number}.1"), f"friend {number}")
    first = [place.caller for place in admit_all(admission, 0.0)][:30]
    assert {f"friend {number}" for number in range(20)} <= set(first)


def test_who_had_no_turn_lately_comes_before_those_who_come_again_and_again():
    admission = Admission(Limits(concurrent=1))
    for number in range(100):
        admission.arrive(source_of(f"10.0.{number}.1"), number)
    for number in range(200):
        place = admission.next(0.0)
        admission.leave(place, authenticated=False)
        admission.arrive(place.source, 1000 + number)
    admission.arrive(source_of("192.0.2.1"), "friend")
    turns = [admission.next(0.0)]
    while turns[-1].caller != "friend":
        admission.leave(turns[-1], authenticated=False)
        turns.append(admission.next(0.0))
    assert len(turns) <= 2


def test_patience_is_shorter_the_more_networks_wait_and_begins_anew_with_each_step():
    admission = Admission(Limits(concurrent=4, concurrent_per_source=4))
    for number in range(100):
        admission.arrive(source_of(f"10.0.{number}.1"), number)
    places = admit_all(admission, 0.0)
    assert admission.patience() == 0.25
    for place in places:
        place.displace = lambda: True
    places[0].progress(0.2)
    places[1].least_patience = 0.8
    places[2].begin_work(0.1)
    assert admission.displace(0.3) == 1, "only who did nothing for so long"
    assert admission.next(0.3).displace is None
    places[2].end_work(0.7)
    assert admission.displace(0.5) == 1, "the one with the new step"
    assert admission.next(0.5) is not None
    assert admission.displace(0.8) == 3, "the long round trip, and two newcomers"
    assert places[2].idle(0.8) == pytest.approx(0.2), "the time in which it waited for us does not count"


def test_work_is_charged_and_given_back_to_those_who_prove_to_be_welcome():
    admission = Admission(Limits(rate=200, burst=10))
    admission.arrive(source_of("10.0.0.1"), "dear")
    dear = admission.next(0.0)
    admission.worked(dear, 0.050, 0.0)
    admission.arrive(source_of("10.0.0.1"), "next")
    assert admission.next(0.0) is None
    assert admission.next(0.05) is None
    admission.leave(dear, authenticated=True, now=0.05)
    assert admission.next(0.05) is not None


def test_strangers_together_cost_half_a_processor_at_most():
    admission = Admission(Limits(concurrent=5000, queued=5000))
    admission.remember(source_of("192.0.2.1"), 0.0)
    began = 0
    for number in range(2500):
        admission.arrive(source_of(f"10.{number // 250}.{number % 250}.1"), number)
    for place in admit_all(admission, 0.0):
        admission.worked(place, 0.002, 0.0)
        began += 1
    assert began == 1000
    assert len(admit_all(admission, 1.0)) == 250
    admission.arrive(source_of("192.0.2.1"), "friend", 1.0)
    assert admission.next(1.0).caller == "friend"
