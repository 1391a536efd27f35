from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.delimited import DelimitedReader, TruncatedMessageError, encode_delimited
from protocol.errors import InvalidValueError, LimitExceededError
from protocol.ping import (
    MAX_LINE,
    PING_SIZE,
    PingError,
    PingInitiator,
    PingPongInitiator,
    PingPongResponder,
    PingResponder,
)
from protocol.varint import VarintError, encode_varint


@given(st.lists(st.binary(min_size=32, max_size=32), max_size=5), st.integers(1, 100))
def test_pings_are_echoed_in_any_pieces(payloads, size):
    initiator, responder = PingInitiator(), PingResponder()
    for payload in payloads:
        data = initiator.start(payload)
        echo = b""
        for start in range(0, len(data), size):
            responder.receive_data(data[start : start + size])
            echo += responder.data_to_send()
        answers = [initiator.receive_data(echo[start : start + size]) for start in range(0, len(echo), size)]
        assert answers == [False] * (len(answers) - 1) + [True]
    responder.finish()
    assert responder.count == len(payloads)
    assert responder.data_to_send() == b""


def test_pings_sent_together_are_echoed_together():
    responder = PingResponder()
    responder.receive_data(bytes(range(80)))
    assert responder.data_to_send() == bytes(range(64))
    with pytest.raises(PingError, match="16 bytes"):
        responder.finish()


def test_wrong_echoes():
    initiator = PingInitiator()
    with pytest.raises(PingError):
        initiator.receive_data(b"x")  # nothing was asked
    initiator = PingInitiator()
    initiator.start(bytes(32))
    with pytest.raises(PingError, match="echo"):
        initiator.receive_data(b"x" * 32)
    initiator = PingInitiator()
    initiator.start(bytes(32))
    with pytest.raises(PingError, match="more"):
        initiator.receive_data(bytes(33))
    with pytest.raises(InvalidValueError):
        initiator.start(bytes(32))  # the last is not answered
    with pytest.raises(InvalidValueError):
        PingInitiator().start(bytes(PING_SIZE - 1))


@pytest.mark.parametrize(
    ("line", "answer"),
    [(b"ping\n", b"pong\n"), (b"ping\r\n", b"pong\n"), (b"hello\n", b"unknown\n"), (b"\n", b"unknown\n")],
)
def test_pingpong_answers_one_line(line, answer):
    responder = PingPongResponder()
    answers = [responder.receive_data(line[i : i + 1]) for i in range(len(line))]
    assert answers == [b""] * (len(line) - 1) + [answer]
    assert responder.done
    assert responder.receive_data(b"ping\n") == b""


def test_pingpong_asks():
    assert PingPongInitiator.REQUEST == b"ping\n"
    initiator = PingPongInitiator()
    assert [initiator.receive_data(piece) for piece in (b"po", b"ng", b"\n")] == [False, False, True]
    with pytest.raises(PingError):
        PingPongInitiator().receive_data(b"unknown\n")


@pytest.mark.parametrize("side", [PingPongInitiator, PingPongResponder])
def test_pingpong_lines_have_bounds(side):
    side().receive_data(b"x" * (MAX_LINE - 1))
    with pytest.raises(LimitExceededError):
        side().receive_data(b"x" * MAX_LINE)
    with pytest.raises(LimitExceededError):
        side().receive_data(b"x" * MAX_LINE + b"\n")


@given(st.lists(st.binary(max_size=300)), st.integers(1, 400), st.binary(max_size=3))
def test_delimited_messages_come_back(messages, size, rest):
    data = b"".join(map(encode_delimited, messages))
    reader, found = DelimitedReader(300), []
    for start in range(0, len(data), size):
        reader.receive_data(data[start : start + size])
        while (message := reader.next_message()) is not None:
            found.append(message)
    reader.finish()
    assert found == messages
    reader.receive_data(rest)
    assert reader.take_rest() == rest
    assert reader.take_rest() == b""


def test_delimited_messages_have_bounds():
    reader = DelimitedReader(10)
    reader.receive_data(encode_varint(11))
    with pytest.raises(LimitExceededError):
        reader.next_message()
    reader = DelimitedReader(10)
    reader.receive_data(b"\x80\x00")
    with pytest.raises(VarintError):
        reader.next_message()


@pytest.mark.parametrize("data", [b"\x03ab", b"\x80", b"\x01"])
def test_a_stream_that_ends_inside_a_message(data):
    reader = DelimitedReader(10)
    reader.receive_data(data)
    assert reader.next_message() is None
    with pytest.raises(TruncatedMessageError):
        reader.finish()
