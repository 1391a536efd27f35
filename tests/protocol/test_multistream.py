from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import multistream
from protocol.errors import InvalidValueError, LimitExceededError
from protocol.multistream import (
    HEADER,
    INITIATOR_TRANSITIONS,
    MAX_MESSAGE,
    MAX_TRIES,
    NOT_AVAILABLE,
    RESPONDER_TRANSITIONS,
    Initiator,
    NegotiationError,
    ProtocolNotSupportedError,
    Responder,
    encode_list,
    encode_message,
)
from protocol.varint import decode_varint, encode_varint

SSH = "/peerup/ssh/1.0.0"
WEB = "/peerup/web/1.0.0"
ids = st.text(st.characters(codec="utf-8", exclude_characters="\n"), min_size=1, max_size=40).filter(
    lambda text: text not in {"na", "ls"}
)


def pieces(data, cuts):
    """The bytes cut at these places."""
    places = sorted({cut % (len(data) + 1) for cut in cuts} | {0, len(data)})
    return [data[start:end] for start, end in itertools.pairwise(places)]


def feed_all(machine, split):
    for piece in split:
        machine.receive_data(piece)


def test_bytes_on_the_wire_are_those_of_the_spec():
    assert encode_message("na").hex() == "036e610a"
    assert encode_message("ls").hex() == "036c730a"
    assert HEADER == b"\x13/multistream/1.0.0\n"
    assert Initiator([SSH]).data_to_send() == HEADER + b"\x12/peerup/ssh/1.0.0\n"


def test_agreement_at_once():
    initiator, responder = Initiator([SSH]), Responder({SSH})
    responder.receive_data(initiator.data_to_send() + b"early")
    assert (responder.state, responder.result, responder.leftover) == ("agreed", SSH, b"early")
    answer = responder.data_to_send()
    assert answer == HEADER + encode_message(SSH)
    initiator.receive_data(answer + b"greeting")
    assert (initiator.state, initiator.result, initiator.leftover) == ("agreed", SSH, b"greeting")
    assert initiator.data_to_send() == responder.data_to_send() == b""


@given(
    st.lists(ids, min_size=1, max_size=6, unique=True),
    st.sets(ids, max_size=4),
    st.integers(0, 6),
    st.binary(max_size=50),
    st.binary(max_size=50),
    st.lists(st.integers(0, 2000), max_size=30),
    st.booleans(),
)
def test_the_first_common_protocol_is_found_in_any_pieces(wanted, spoken, common, early, greeting, cuts, one_by_one):  # noqa: PLR0917 (hypothesis gives each its own)
    supported = spoken | set(wanted[common : common + 1])
    expected = next((protocol for protocol in wanted if protocol in supported), None)
    initiator, responder = Initiator(wanted), Responder(supported)
    split = (lambda data: [data[i : i + 1] for i in range(len(data))]) if one_by_one else (lambda d: pieces(d, cuts))
    greeted = False
    try:
        for _ in range(20):
            for piece in split(initiator.data_to_send() + (early if initiator.proposal == expected else b"")):
                responder.receive_data(piece)
            answer = responder.data_to_send()
            if responder.result is not None and not greeted:
                answer, greeted = answer + greeting, True
            for piece in split(answer):
                initiator.receive_data(piece)
            if initiator.result is not None:
                break
        else:
            pytest.fail("the negotiation does not end")
    except ProtocolNotSupportedError:
        assert expected is None
        assert initiator.state == "failed"
        assert responder.refused == wanted
        return
    assert initiator.result == responder.result == expected
    assert responder.leftover == early
    assert initiator.leftover == greeting
    assert responder.refused == wanted[: wanted.index(expected)]


def test_a_single_protocol_is_optimistic():
    assert Initiator([SSH]).optimistic
    assert not Initiator([SSH, WEB]).optimistic


def test_header_and_answer_of_other_implementations_come_apart():
    # go-libp2p sends its header at once and the echo later.
    initiator = Initiator([SSH])
    initiator.receive_data(HEADER)
    assert initiator.result is None
    initiator.receive_data(encode_message(SSH))
    assert initiator.result == SSH
    # An initiator that waits for the header before it proposes.
    responder = Responder({SSH})
    responder.receive_data(HEADER)
    assert responder.data_to_send() == HEADER
    responder.receive_data(encode_message(SSH))
    assert responder.data_to_send() == encode_message(SSH)


def test_what_comes_after_the_agreement_is_kept():
    responder = Responder({SSH})
    responder.receive_data(HEADER + encode_message(SSH))
    responder.receive_data(b"one")
    responder.receive_data(b"two")
    assert responder.leftover == b"onetwo"


def parse_list(data):
    length, offset = decode_varint(data)
    body = data[offset:]
    assert len(body) == length
    found, offset = [], 0
    while body[offset:] != b"\n":
        size, offset = decode_varint(body, offset)
        assert body[offset + size - 1 : offset + size] == b"\n"
        found.append(body[offset : offset + size - 1].decode())
        offset += size
    return found


@given(st.lists(ids, max_size=5))
def test_ls_is_answered(protocols):
    responder = Responder(lambda _: False, listed=protocols)
    responder.receive_data(HEADER + encode_message("ls"))
    out = responder.data_to_send()
    assert out == HEADER + encode_list(protocols)
    assert parse_list(out[len(HEADER) :]) == protocols


def test_ls_does_not_end_the_negotiation():
    responder = Responder([SSH, WEB])
    responder.receive_data(HEADER + encode_message("ls") + encode_message(WEB))
    assert responder.data_to_send() == HEADER + encode_list([SSH, WEB]) + encode_message(WEB)
    assert responder.result == WEB


def test_a_function_may_decide_and_lists_nothing():
    responder = Responder(lambda protocol: protocol.startswith("/peerup/"))
    responder.receive_data(HEADER + encode_message("ls") + encode_message("/x") + encode_message(SSH))
    assert responder.data_to_send() == HEADER + encode_list([]) + NOT_AVAILABLE + encode_message(SSH)
    assert responder.refused == ["/x"]


BAD_FIRST = [
    b"\x14/multistream/1.0.01\n",
    b"\x13/multistream/2.0.0\n",
    b"\x12/multistream/1.0.0\n",
    b"GET / HTTP/1.1\r\n" + bytes(80),
    b"\x16\x03\x01\x02\x00\x01" + bytes(80),  # a TLS client
    b"\x00",
    b"\x80\x00",
    b"\x80" * 9,
    encode_message("na"),
    encode_message(SSH),
]


@pytest.mark.parametrize("data", BAD_FIRST)
@pytest.mark.parametrize("side", [lambda: Initiator([SSH]), lambda: Responder({SSH})])
def test_what_is_no_header_fails_for_good(side, data):
    for split in ([data], [data[i : i + 1] for i in range(len(data))]):
        machine = side()
        with pytest.raises(NegotiationError):
            feed_all(machine, split)
        assert machine.state == "failed"
        with pytest.raises(NegotiationError):
            machine.receive_data(HEADER)
        assert machine.result is None


@pytest.mark.parametrize(
    "answer", [encode_message("/other"), encode_message("ls"), HEADER, b"\x01\n", b"\x03na\x00", b"\x02\xff\n"]
)
def test_wrong_answers_fail(answer):
    initiator = Initiator([SSH, WEB])
    with pytest.raises(NegotiationError):
        initiator.receive_data(HEADER + answer)
    assert initiator.state == "failed"


def test_an_answer_to_another_proposal_is_wrong():
    initiator = Initiator([SSH, WEB])
    initiator.receive_data(HEADER + NOT_AVAILABLE)
    with pytest.raises(NegotiationError):
        initiator.receive_data(encode_message(SSH))


def test_a_proposal_that_is_not_utf8_fails():
    with pytest.raises(NegotiationError):
        Responder({SSH}).receive_data(HEADER + b"\x03\xff\xfe\n")


@pytest.mark.parametrize("side", [lambda: Initiator([SSH]), lambda: Responder({SSH})])
def test_a_long_message_is_refused_by_its_length_alone(side):
    machine = side()
    with pytest.raises(LimitExceededError):
        machine.receive_data(encode_varint(MAX_MESSAGE + 1))
    assert machine.state == "failed"


def test_the_longest_message_is_taken():
    longest = "/" + "x" * (MAX_MESSAGE - 2)
    responder = Responder({longest})
    responder.receive_data(HEADER + encode_message(longest))
    assert responder.result == longest


@pytest.mark.parametrize("message", [encode_message("/x"), encode_message("ls")])
def test_tries_are_counted(message):
    responder = Responder({SSH})
    responder.receive_data(HEADER + message * MAX_TRIES)
    with pytest.raises(LimitExceededError):
        responder.receive_data(message)


def test_bytes_of_the_negotiation_are_counted():
    responder = Responder({SSH})
    with pytest.raises(LimitExceededError):
        responder.receive_data(HEADER + encode_message("/" + "x" * 1000) * 10)


@pytest.mark.parametrize(
    "protocols", [[], [f"/{n}" for n in range(MAX_TRIES + 1)], [""], ["/a\n"], ["/\udcff"], ["x" * MAX_MESSAGE]]
)
def test_what_cannot_be_proposed(protocols):
    with pytest.raises(InvalidValueError):
        Initiator(protocols).data_to_send()


@pytest.mark.parametrize(("place", "table"), [(1, INITIATOR_TRANSITIONS), (2, RESPONDER_TRANSITIONS)])
def test_drawing_and_table_agree(place, table):
    drawing = multistream.__doc__.split("stateDiagram-v2")[place]
    drawn = {((before, event), after) for before, after, event in re.findall(r"(\w+) --> (\w+): (\w+)", drawing)}
    assert drawn == set(table.items())


def _events():
    """Every event of both machines, as what to feed in each state, and what becomes of it."""
    feed = {"header": HEADER, "bad": b"\x00", "ls": encode_message("ls")}
    initiator = feed | {"na": NOT_AVAILABLE, "echo": encode_message(SSH), "exhausted": NOT_AVAILABLE}
    responder = feed | {"supported": encode_message(SSH), "unsupported": encode_message("/x")}
    for (state, event), after in INITIATOR_TRANSITIONS.items():
        protocols = [SSH] if event == "exhausted" else [SSH, WEB]
        yield Initiator(protocols), HEADER if state == "answer" else b"", initiator[event], state, after
    for (state, event), after in RESPONDER_TRANSITIONS.items():
        yield Responder({SSH}), HEADER if state == "proposal" else b"", responder[event], state, after


@pytest.mark.parametrize(("machine", "before", "data", "state", "after"), list(_events()))
def test_the_machines_do_what_the_table_says(machine, before, data, state, after):
    machine.receive_data(before)
    assert machine.state == state
    if after == "failed":
        with pytest.raises((NegotiationError, ProtocolNotSupportedError)):
            machine.receive_data(data)
    else:
        machine.receive_data(data)
    assert machine.state == after
