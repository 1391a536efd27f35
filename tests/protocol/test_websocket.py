"""WebSocket frames and the opening handshake: the examples of RFC 6455, properties, and what breaks the rules."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import InvalidValueError
from protocol.websocket import MAX_HELD, CloseCode, Closed, Frames, WebSocketError
from protocol.websocket_opening import (
    MAX_REQUEST,
    MAX_RESPONSE,
    ClientOpening,
    OpeningError,
    ServerOpening,
    accept_token,
)


def keys(seed=1):
    counter = itertools.count(seed)
    return lambda: (next(counter) * 0x9E3779B1 % 2**32).to_bytes(4, "big")


def pair():
    return Frames(client=True, random_key=keys()), Frames(client=False)


def receive(frames, *pieces):
    """All payload that comes out when these pieces are received one after another."""
    payload = b""
    for piece in pieces:
        buffer = memoryview(bytearray(frames.held + piece))
        payload += bytes(buffer[: frames.decode(buffer, len(buffer))])
        assert len(frames.held) <= MAX_HELD
    return payload


def cut(data, places):
    marks = sorted({0, len(data), *(place % (len(data) + 1) for place in places)})
    return [data[begin:end] for begin, end in itertools.pairwise(marks)]


PLACES = st.lists(st.integers(0, 2**20), max_size=12)
CONTENTS = st.lists(st.one_of(st.binary(max_size=300), st.integers(0, 140_000).map(bytes)), max_size=6)


@given(contents=CONTENTS, places=PLACES, from_client=st.booleans())
def test_what_one_side_sends_the_other_receives_in_any_pieces(contents, places, from_client):
    client, server = pair()
    sender, receiver = (client, server) if from_client else (server, client)
    wire = b"".join(sender.encode(content) for content in contents)
    assert receive(receiver, *cut(wire, places)) == b"".join(contents)
    assert receiver.held == b""
    assert receiver.closed is None


@given(content=st.binary(max_size=1000), places=PLACES, more=PLACES, from_client=st.booleans())
def test_fragments_and_control_frames_between_them(content, places, more, from_client):
    client, server = pair()
    sender, receiver = (client, server) if from_client else (server, client)
    parts = cut(content, places) or [b""]
    wire = b""
    for number, part in enumerate(parts):
        frame = bytearray(sender.encode(part))
        frame[0] = (0x80 if number == len(parts) - 1 else 0) | (2 if number == 0 else 0)
        wire += bytes(frame) + sender._frame(9, b"ping %d" % number) + sender._frame(10, b"")
    assert receive(receiver, *cut(wire, more)) == content
    pong = receiver.pong()
    assert receiver.pong() == b"", "one answer is enough"
    assert receive(sender, pong) == b""
    expected = b"ping %d" % (len(parts) - 1)
    assert pong == (receiver._frame(10, expected) if from_client else pong)
    assert len(pong) == len(expected) + (2 if from_client else 6)


@given(data=st.binary(max_size=400), places=PLACES, client=st.booleans())
def test_any_bytes_are_taken_or_refused_and_pieces_make_no_difference(data, places, client):
    def fate(pieces):
        frames = Frames(client=client, random_key=keys())
        payload = b""
        try:
            for piece in pieces:
                payload += receive(frames, piece)
        except WebSocketError as error:
            return payload[:0], str(error), None
        return payload, None, frames.closed

    assert fate([data]) == fate(cut(data, places))


def test_the_examples_of_the_rfc():
    """RFC 6455, section 5.7, those that are binary or control frames."""
    server, client = Frames(client=False), Frames(client=True, random_key=keys())
    assert server._frame(9, b"Hello") == bytes.fromhex("890548656c6c6f")
    assert receive(server, bytes.fromhex("898537fa213d7f9f4d5158")) == b""
    assert server.pong() == bytes.fromhex("8a0548656c6c6f")
    assert receive(server, bytes.fromhex("8a8537fa213d7f9f4d5158")) == b""
    content = bytes(range(256))
    assert server.encode(content) == bytes.fromhex("827e0100") + content
    assert receive(client, bytes.fromhex("827e0100") + content) == content
    large = bytes(65536)
    assert server.encode(large) == bytes.fromhex("827f0000000000010000") + large
    assert receive(client, server.encode(large)) == large


def test_a_masked_frame_looks_as_the_rfc_says():
    client = Frames(client=True, random_key=lambda: bytes.fromhex("37fa213d"))
    assert client.encode(b"Hello") == bytes.fromhex("828537fa213d7f9f4d5158")


@pytest.mark.parametrize("length", [0, 1, 124, 125, 126, 127, 65_535, 65_536, 32_767, 32_769, 100_003])
@pytest.mark.parametrize("from_client", [True, False])
def test_every_form_of_length(length, from_client):
    client, server = pair()
    sender, receiver = (client, server) if from_client else (server, client)
    content = bytes(number * 7 % 251 for number in range(length))
    assert receive(receiver, sender.encode(content)) == content


BROKEN = {
    "a reserved bit": "c28000000000",
    "an unknown data opcode": "838000000000",
    "an unknown control opcode": "8b8000000000",
    "a text message": "818000000000",
    "no mask": "8200",
    "a continuation of nothing": "808000000000",
    "a message within a message": "028000000000" + "828000000000",
    "a fragmented ping": "098000000000",
    "a long ping": "89fe007e",
    "a length in 2 bytes that fits 7 bits": "82fe007d",
    "a length in 8 bytes that fits 2": "82ff000000000000ffff",
    "a negative length": "82ff8000000000000000",
    "a close frame of one byte": "88810000000003",
    "a close code that cannot be": "8882000000000063",
    "a close reason that is not text": "888300000000" + "03e8ff",
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_rules_are_refused_as_soon_as_they_show(kind):
    with pytest.raises(WebSocketError) as caught:
        receive(Frames(client=False), bytes.fromhex(BROKEN[kind]))
    expected = CloseCode.UNSUPPORTED_DATA if kind == "a text message" else CloseCode.PROTOCOL_ERROR
    assert caught.value.close_code == expected


def test_a_client_takes_no_masked_frames():
    with pytest.raises(WebSocketError, match="the other way round"):
        receive(Frames(client=True, random_key=keys()), bytes.fromhex("828000000000"))


def test_a_client_without_keys_is_a_mistake():
    with pytest.raises(ValueError, match="needs keys"):
        Frames(client=True)


@pytest.mark.parametrize("code", [CloseCode.NORMAL, CloseCode.GOING_AWAY, CloseCode.PROTOCOL_ERROR])
def test_close_ends_what_is_received(code):
    client, server = pair()
    wire = client.encode(b"last") + client.close(code) + b"whatever follows"
    assert receive(server, wire) == b"last"
    assert server.closed == Closed(code, "")
    assert receive(server, b"more") == b""


def test_close_without_a_code_and_with_a_reason():
    for wire, closed in (("8800", Closed(1005, "")), ("880503e8627965", Closed(1000, "bye"))):
        client = Frames(client=True, random_key=keys())
        assert receive(client, bytes.fromhex(wire)) == b""
        assert client.closed == closed


def test_an_announced_length_costs_nothing():
    server = Frames(client=False)
    header = bytes.fromhex("82ff7fffffffffffffff") + bytes(4)
    assert receive(server, header) == b""
    for _ in range(10):
        assert receive(server, bytes(5000)) == bytes(5000)
    assert server.held == b""


# ---- the opening handshake

NONCE = b"the sample nonce"
DATE = "Sun, 06 Nov 1994 08:49:37 GMT"


def answer_to(*pieces):
    opening = ServerOpening(DATE)
    for piece in pieces:
        assert not opening.answer
        opening.receive_data(piece)
    return opening


def test_the_token_of_the_rfc():
    assert accept_token(b"dGhlIHNhbXBsZSBub25jZQ==") == b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo="


@given(places=PLACES, more=PLACES, behind=st.binary(max_size=20))
def test_both_sides_agree_in_any_pieces_and_lose_nothing(places, more, behind):
    client, server = ClientOpening("relay.example.org:8443", NONCE), ServerOpening(DATE)
    for piece in cut(client.request, places):
        server.receive_data(piece)
    assert server.accepted
    assert server.rest == b""
    pieces = cut(server.answer + behind, more)
    got = None
    for piece in pieces:
        if got is None:
            got = client.receive_data(piece)
        else:
            got += piece
    assert got == behind


def test_frames_that_come_with_the_request_are_kept():
    opening = answer_to(ClientOpening("a", NONCE).request + b"\x82\x80")
    assert opening.accepted
    assert opening.rest == b"\x82\x80"


def request(method=b"GET", version=b"HTTP/1.1", *, without=(), **headers):
    base = {
        "Host": "a",
        "Connection": "keep-alive, Upgrade",
        "Upgrade": "WebSocket",
        "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
        "Sec-WebSocket-Version": "13",
        "Origin": "https://somewhere.example",
        "Sec-WebSocket-Extensions": "permessage-deflate",
        "Sec-WebSocket-Protocol": "chat",
    }
    for name, value in headers.items():
        base[name.replace("_", "-")] = value
    lines = [f"{name}: {value}\r\n".encode() for name, value in base.items() if name not in without]
    return method + b" /any/path?x=1 " + version + b"\r\n" + b"".join(lines) + b"\r\n"


def test_a_browser_is_let_in_without_what_it_offers():
    opening = answer_to(request())
    assert opening.accepted
    assert b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=" in opening.answer
    assert b"Extensions" not in opening.answer
    assert b"WebSocket-Protocol" not in opening.answer


@pytest.mark.parametrize(
    ("asked", "status"),
    [
        (b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", 404),
        (b"GET / HTTP/1.0\r\n\r\n", 404),
        (b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc", 404),
        (request(b"POST"), 404),
        (request(without=["Upgrade"]), 404),
        (request(without=["Connection"]), 404),
        (request(Upgrade="h2c"), 404),
        (request(without=["Sec-WebSocket-Version"]), 426),
        (request(Sec_WebSocket_Version="8"), 426),
        (request(without=["Sec-WebSocket-Key"]), 400),
        (request(Sec_WebSocket_Key="c2hvcnQ="), 400),
        (request(Sec_WebSocket_Key="no base64!"), 400),
        (request(Content_Length="5") + b"abcde", 400),
        (request(without=["Host"]), 400),
        (b"GET /\r\n\r\n", 400),
        (b"\x16\x03\x01\x00\xa5", 400),
        (b"\x13/multistream/1.0.0\n", 400),
        (b"GET / HTTP/1.1\r\nBad Header: a\r\n\r\n", 400),
        (b"GET /" + b"a" * MAX_REQUEST, 431),
        (b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * MAX_REQUEST, 431),
    ],
)
def test_any_other_request_gets_a_web_servers_answer(asked, status):
    opening = answer_to(asked)
    assert not opening.accepted
    head, _, body = opening.answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status)
    assert f"Date: {DATE}".encode() in head
    assert b"Content-Length: %d" % len(body) in head
    assert b"Connection: close" in head


def test_head_gets_no_body():
    answer = answer_to(b"HEAD / HTTP/1.1\r\nHost: a\r\n\r\n").answer
    assert answer.endswith(b"\r\n\r\n")
    assert b"Content-Length: 14" in answer


def test_who_hangs_up_is_told_of():
    opening = ServerOpening(DATE)
    opening.receive_data(b"GET / HT")
    for caller in (opening, ServerOpening(DATE)):
        with pytest.raises(OpeningError, match="closed"):
            caller.receive_data(b"")


@pytest.mark.parametrize("host", ["a\r\nX: b", "\N{SNOWMAN}.example", " a", "a\0"])
def test_a_host_that_cannot_be_asked_for_is_refused(host):
    with pytest.raises(InvalidValueError, match="not the name of a web server"):
        ClientOpening(host, NONCE)


def test_the_answer_is_bounded():
    client = ClientOpening("a", NONCE)
    assert client.receive_data(b"HTTP/1.1 200 O") is None
    assert client.receive_data(b"K" * (MAX_RESPONSE - 100)) is None
    with pytest.raises(OpeningError, match="no WebSocket is here"):
        client.receive_data(b"K" * 200)
