"""The negotiation of inbound streams, with pretended channels."""

import pytest

from actors.switchboard.protocols import InboundStreams, ProtocolTable, ProtocolTakenError
from protocol.multistream import HEADER, NOT_AVAILABLE, Initiator, encode_message
from protocol.policy import Decision
from protocol.stream_descriptor import ResetCode

ECHO = "/peerup/echo/1.0.0"


class FakeChannel:
    def __init__(self):
        self.sent = b""
        self.code = None
        self.finished = False
        self.on_closed = lambda: None

    def send(self, data):
        assert self.code is None
        self.sent += data

    def reset(self, code):
        assert self.code is None
        self.code = code

    def finish(self):
        assert self.code is None
        self.finished = True


class FakeTimer:
    def __init__(self, function):
        self.function = function
        self.cancelled = False

    def cancel(self):
        self.cancelled = True


class Room:
    """Inbound streams of one connection, and what became of them."""

    def __init__(self, allowed=(ECHO,), served=(ECHO,), *, may_connect=True):
        self.judged = []
        self.handed_out = []
        self.timers = []
        self.table = ProtocolTable()
        for protocol in served:
            self.table.serve(protocol, f"server of {protocol}")

        def judge(_, protocol):
            self.judged.append(protocol)
            return Decision(allowed=may_connect and protocol in allowed, rule="the rule")

        def call_later(_, function):
            self.timers.append(FakeTimer(function))
            return self.timers[-1]

        self.streams = InboundStreams(
            self.table,
            call_later,
            judge,
            lambda _: may_connect,
            lambda _, __, agreed: self.handed_out.append(agreed),
        )

    def open(self):
        channel = FakeChannel()
        self.streams.accept("connection", channel)
        return channel


def test_an_allowed_and_served_protocol_is_handed_out_with_what_came_behind():
    room = Room()
    channel = room.open()
    channel.on_data(Initiator((ECHO,)).data_to_send() + b"early")
    assert channel.sent == HEADER + encode_message(ECHO)
    (agreed,) = room.handed_out
    assert agreed == (ECHO, f"server of {ECHO}", "the rule", b"early")
    assert room.timers[0].cancelled
    assert room.streams.negotiating == 0


def test_byte_by_byte():
    room = Room()
    channel = room.open()
    for byte in Initiator((ECHO,)).data_to_send():
        channel.on_data(bytes([byte]))
    assert room.handed_out[0].unread == b""


@pytest.mark.parametrize("served", [(ECHO,), ()])
def test_refused_and_unknown_look_the_same_and_the_next_proposal_is_heard(served):
    room = Room(allowed=("/other",), served=(*served, "/other"))
    channel = room.open()
    channel.on_data(Initiator((ECHO,)).data_to_send())
    assert channel.sent == HEADER + NOT_AVAILABLE
    channel.on_data(encode_message("/other"))
    assert room.judged == [ECHO, "/other"]
    assert room.handed_out[0].protocol == "/other"


def test_the_policy_is_asked_before_anything_is_said_of_the_protocol():
    room = Room(may_connect=False)
    channel = room.open()
    channel.on_data(Initiator((ECHO,)).data_to_send())
    assert channel.sent == b""
    assert channel.code == ResetCode.GATED
    assert not room.handed_out


def test_an_allowed_protocol_without_its_actor_says_so():
    room = Room(served=())
    channel = room.open()
    channel.on_data(Initiator((ECHO,)).data_to_send())
    assert channel.code == ResetCode.SERVICE_UNAVAILABLE


def test_asking_for_the_list_tells_nothing():
    room = Room()
    channel = room.open()
    channel.on_data(HEADER + encode_message("ls"))
    assert ECHO.encode() not in channel.sent
    assert room.judged == []


@pytest.mark.parametrize("garbage", [b"GET / HTTP/1.1\r\n", b"\xff" * 12, HEADER + b"\x03\xff\xfe\n", b"\x05/abc\n"])
def test_garbage_resets_the_stream(garbage):
    room = Room()
    channel = room.open()
    channel.on_data(garbage + bytes(100))
    assert channel.code == ResetCode.NEGOTIATION_FAILED
    assert room.streams.negotiating == 0
    assert room.timers[0].cancelled


@pytest.mark.parametrize("behind", [b"GET / HTTP/1.1\r\n" * 10, bytes(500), b"\xff" * 5000, b"\x80\x40x"])
@pytest.mark.parametrize("at_once", [True, False])
def test_a_refusal_is_told_to_a_peer_that_did_not_wait_for_it(behind, at_once):
    room = Room(allowed=(), served=())
    channel = room.open()
    pieces = Initiator((ECHO,)).data_to_send(), behind
    for piece in [b"".join(pieces)] if at_once else pieces:
        channel.on_data(piece)
    assert channel.sent == HEADER + NOT_AVAILABLE
    assert channel.finished
    assert channel.code is None
    channel.on_data(b"still on its way" * 1000)
    channel.on_data(encode_message(ECHO))
    assert channel.sent == HEADER + NOT_AVAILABLE
    channel.on_finish()
    assert channel.code is None
    assert room.streams.negotiating == 0
    assert room.timers[0].cancelled


def test_a_peer_that_goes_on_behind_a_refusal_is_reset_in_time():
    room = Room(allowed=(), served=())
    channel = room.open()
    channel.on_data(Initiator((ECHO,)).data_to_send() + bytes(100))
    room.timers[0].function()
    assert channel.code == ResetCode.NEGOTIATION_FAILED
    assert room.streams.negotiating == 0


def test_a_refusal_is_told_to_a_peer_that_has_finished():
    room = Room(allowed=(), served=())
    channel = room.open()
    channel.on_data(Initiator((ECHO,)).data_to_send())
    channel.on_finish()
    assert (channel.sent, channel.finished, channel.code) == (HEADER + NOT_AVAILABLE, True, None)
    channel.on_reset(ResetCode.CONNECTION_LOST)  # before the answer has gone
    assert room.streams.negotiating == 0


def test_endless_proposals_are_ended():
    room = Room()
    channel = room.open()
    channel.on_data(HEADER)
    for number in range(100):
        if channel.code is None:
            channel.on_data(encode_message(f"/{number}"))
    assert channel.code == ResetCode.NEGOTIATION_FAILED


def test_a_stream_that_says_nothing_is_ended_in_time():
    room = Room()
    channel = room.open()
    assert room.streams.negotiating == 1
    room.timers[0].function()
    assert channel.code == ResetCode.NEGOTIATION_FAILED
    assert room.streams.negotiating == 0


def test_a_stream_that_ends_before_it_has_said_what_it_wants():
    room = Room()
    finished, reset = room.open(), room.open()
    finished.on_finish()
    reset.on_reset(0)
    assert finished.code == ResetCode.NEGOTIATION_FAILED
    assert reset.code is None
    assert room.streams.negotiating == 0


def test_a_handler_of_the_switchboard_comes_before_actors():
    room = Room(allowed=("/ping",), served=())
    taken = []
    room.table.serve_here("/ping", lambda *stream: taken.append(stream))
    channel = room.open()
    channel.on_data(Initiator(("/ping",)).data_to_send() + b"x")
    assert taken == [("connection", channel, b"x")]
    with pytest.raises(ProtocolTakenError, match="switchboard"):
        room.table.serve("/ping", "somebody")


def test_one_server_for_each_protocol():
    table = ProtocolTable()
    table.serve("/a", "one")
    table.serve("/a", "one")
    table.serve("/b", "one")
    with pytest.raises(ProtocolTakenError, match="one"):
        table.serve("/a", "two")
    table.withdraw("/a", "two")
    assert table.handler("/a") == "one"
    assert table.withdraw_all("one") == ["/a", "/b"]
    table.serve("/a", "two")
    assert table.names() == ("/a",)
