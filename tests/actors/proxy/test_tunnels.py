"""The account of attached tunnels, where news of them come in any order."""

import types

from actors.proxy import tunnels as tunnels_module
from actors.proxy.tunnels import Tunnels
from protocol.messages.switchboard import AttachedStream, EndedStream, StreamReport, StreamTraffic
from supervisor.metrics import Registry
from tests.actors.local_node import peer_of

PEER = peer_of("bob")


def tunnels(warned=None, **options):
    """An account; what it tells the gate is added to the list that comes with it, warnings to `warned`."""
    told = []
    context = types.SimpleNamespace(
        metrics=Registry(),
        now=lambda: 100.0,
        log=types.SimpleNamespace(warning=lambda _, reason: warned.append(reason)),
    )
    made = Tunnels(context, None, "ssh", "client", **options)
    made._gate = types.SimpleNamespace(send=told.append)
    return made, told


def ended(stream_id, sent=3, received=4):
    stream = AttachedStream(stream_id, PEER, "/peerup/ssh/1.0.0", "direct", 1.0, sent, received)
    return EndedStream(stream, 0.5, "finished", 0)


def test_an_end_that_is_told_before_the_beginning_is_noted():
    made, told = tunnels(limit=1)
    assert made.reserve()
    made.reported(StreamReport((), (ended("1-1"),)))
    made.attached("1-1", PEER, "direct")
    assert (made.count, [one.outcome for one in told]) == (0, ["finished"])
    assert (told[0].sent, told[0].received, told[0].duration) == (3, 4, 0.5)
    assert made.reserve(), "its place is free again"


def test_an_end_that_is_told_twice_counts_once():
    made, told = tunnels()
    made.reserve()
    made.attached("1-1", PEER, "direct")
    made.reported(StreamReport((), (ended("1-1"),)))
    made.reported(StreamReport((), (ended("1-1"),)))
    assert len(told) == 1
    assert made.describe()["open"] == 0


def test_a_stream_of_a_switchboard_that_was_lost_meanwhile_is_lost():
    made, told = tunnels()
    made.reserve()
    made.reserve()
    made.switchboard_lost()
    made.attached("1-1", PEER, "direct")
    assert made.count == 2, "nobody knows yet that this one was of the lost switchboard"
    made.switchboard_back(2)
    made.attached("1-2", PEER, "direct")
    assert made.count == 0
    assert [one.outcome for one in told] == ["stream-lost: lost", "stream-lost: lost"]
    made.reserve()
    made.attached("2-1", PEER, "direct")
    assert made.count == 1


def test_a_stream_that_was_over_before_it_was_told_of_is_noted_once():
    made, told = tunnels()
    made.reported(StreamReport((), (ended("1-1"),)))
    made.reported(StreamReport((), (ended("1-1"),), (ended("1-1").stream,)))
    assert [(one.sent, one.received, one.path, one.outcome) for one in told] == [(3, 4, "direct", "finished")]
    assert made.count == 0


def test_a_stream_that_the_switchboard_opened_is_told_of_and_counted():
    made, told = tunnels()
    opened = AttachedStream("1-1", PEER, "/peerup/ssh/1.0.0", "direct", 90.0, 0, 0)
    for _ in range(2):  # what was not answered in time is told again
        made.reported(StreamReport((StreamTraffic("1-1", 2, 1),), (), (opened,)))
    assert (made.count, made.describe()["sent_by_open"]) == (1, 2)
    made.reported(StreamReport((), (ended("1-1"),)))
    assert [(one.sent, one.received) for one in told] == [(3, 4)]
    assert made.count == 0


def test_a_stream_that_got_no_socket_is_not_noted_again():
    made, told = tunnels(warned := [])
    made.reserve()
    made.attached("1-1", PEER, "direct")
    made.attach_failed("1-1", "nobody is there", "service-unreachable")
    made.reported(StreamReport((), (ended("1-1"),)))
    assert [one.outcome for one in told] == ["service-unreachable"]
    assert warned == ["nobody is there"]


def test_callers_that_were_turned_away_are_counted():
    made, _ = tunnels(warned := [], limit=7)
    made.reported(StreamReport((), (), (), 3))
    counter = made._context.metrics.counter(
        "peerup_tunnels_ended_total", service="ssh", role="client", outcome="limit-exceeded"
    )
    assert counter.value == 3
    assert warned == [made.describe()["last_failure"]] == ["7 connections are open, the limit"]


def test_what_is_remembered_of_ended_streams_is_bounded(monkeypatch):
    monkeypatch.setattr(tunnels_module, "REMEMBERED", 3)
    made, told = tunnels()
    for number in range(10):
        made.reported(StreamReport((), (ended(f"1-{number}"),)))
    made.reported(StreamReport((), (ended("1-9"),)))
    assert (len(told), len(made._over)) == (10, 3)
