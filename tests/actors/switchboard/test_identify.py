"""Identify without a network: what a peer can make us keep, and what ends no connection."""

import types

from actors.switchboard.identify import MAX_PUSHES, IdentifyRoom, OwnDescription
from protocol.stream_descriptor import ResetCode

from .support import key_of, peer_of


class FakeChannel:
    def __init__(self):
        self.sent, self.finished, self.code = b"", False, None

    def send(self, data):
        self.sent += data

    def finish(self):
        self.finished = True

    def reset(self, code):
        self.code = code


class FakeConnection:
    peer = peer_of("bob")
    relayed = False
    remote_address = None
    identification = None


def room(protocols=(), timers=None):
    own = OwnDescription(key_of("alice").public_key.to_protobuf(), "test", (), None)
    kept = timers if timers is not None else []

    def call_later(_, function):
        timer = types.SimpleNamespace(function=function, cancelled=False)
        timer.cancel = lambda: setattr(timer, "cancelled", True)
        kept.append(timer)
        return timer

    return IdentifyRoom(lambda: own, lambda _: protocols, lambda _: None, call_later)


def test_pushes_that_do_not_end_are_few_and_are_given_up():
    timers = []
    made, connection = room(timers=timers), FakeConnection()
    channels = [FakeChannel() for _ in range(MAX_PUSHES + 1)]
    for channel in channels:
        made.serve_push(connection, channel, b"\x7f")
    assert [channel.code for channel in channels] == [None] * MAX_PUSHES + [ResetCode.LIMIT_EXCEEDED]
    timers[0].function()
    assert channels[0].code == ResetCode.PROTOCOL_VIOLATION
    channels[1].on_reset(0)
    channels[2].on_finish()
    assert channels[2].code == ResetCode.PROTOCOL_VIOLATION
    assert [timer.cancelled for timer in timers] == [True, True, True, False]
    late = FakeChannel()
    made.serve_push(connection, late, b"\x7f")
    assert late.code is None, "there is room again"


def test_more_services_than_a_peer_takes_reset_the_stream_alone():
    channel = FakeChannel()
    room([f"/peerup/{'x' * 59}{number:04}/1.0.0" for number in range(1000)]).serve_identify(
        FakeConnection(), channel, b""
    )
    assert channel.code == ResetCode.LIMIT_EXCEEDED
    assert not channel.finished
