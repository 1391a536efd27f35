"""The account of attached tunnels, where news of them come in any order."""

import types

from actors.proxy.tunnels import Tunnels
from protocol.messages.switchboard import AttachedStream, EndedStream, StreamReport
from supervisor.metrics import Registry
from tests.actors.local_node import peer_of

PEER = peer_of("bob")


def tunnels(**options):
    told = []
    context = types.SimpleNamespace(
        metrics=Registry(), now=lambda: 100.0, tell=lambda _, message: told.append(message), log=None
    )
    return Tunnels(context, None, "ssh", "client", **options), told


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
