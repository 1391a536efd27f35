import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.noise import MAX_PLAINTEXT
from protocol.stream_descriptor import (
    FINISH_MESSAGE,
    MAX_DATA,
    MAX_MESSAGE,
    ResetCode,
    StreamDescriptorError,
    check_message,
    parse_reset,
    reset_message,
)
from protocol.yamux import HEADER_LENGTH


def test_a_message_is_one_frame_in_one_noise_message():
    assert MAX_DATA + HEADER_LENGTH == MAX_PLAINTEXT


@given(st.integers(min_value=0, max_value=0xFFFF_FFFF))
def test_reset_round_trip(code):
    message = reset_message(code)
    check_message(message[0], len(message))
    assert parse_reset(message) == code


@pytest.mark.parametrize("message", [b"", b"R", b"R123", b"R12345", b"F1234", b"D1234"])
def test_what_is_no_reset(message):
    with pytest.raises(StreamDescriptorError):
        parse_reset(message)


@pytest.mark.parametrize(
    ("kind", "length", "good"),
    [
        (b"D", 1, False),
        (b"D", 2, True),
        (b"D", MAX_MESSAGE, True),
        (b"D", MAX_MESSAGE + 1, False),
        (FINISH_MESSAGE, 1, True),
        (FINISH_MESSAGE, 2, False),
        (b"R", 5, True),
        (b"R", 4, False),
        (b"X", 2, False),
    ],
)
def test_check(kind, length, good):
    if good:
        check_message(kind[0], length)
    else:
        with pytest.raises(StreamDescriptorError):
            check_message(kind[0], length)


def test_codes_have_names_for_people():
    assert ResetCode.describe(0x1008) == "gated"
    assert ResetCode.describe(0x4711) == "code 0x4711"
    assert all(0 <= code <= 0xFFFF_FFFF for code in ResetCode)
