"""One function for each parser that meets a stranger's bytes. Each takes any bytes and returns, or fails the run.

A parser may refuse only by a `PeerupError`; any other exception is a finding. What it takes must survive the way
back. The tests call the targets with a few hundred inputs; `python -m tests.fuzz SECONDS [TARGET…]` runs longer.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import unicodedata
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import trio
import trio.testing
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from actors import http
from actors.switchboard.upgrade import Upgrader
from actors.switchboard.wire import SocketPipe
from protocol import authorized_keys as keys_file
from protocol import delimited, multistream, noise, ping, service, signed_envelope, varint, websocket, websocket_opening
from protocol.circuit.addresses import announced_addresses, circuit_addresses
from protocol.circuit.exchange import MAX_EARLY, Exchange
from protocol.circuit.hop_client import ConnectClient, ReserveClient
from protocol.circuit.hop_server import HopServer
from protocol.circuit.messages import (
    MAX_MESSAGE,
    HopMessage,
    HopType,
    Limit,
    Peer,
    Reservation,
    Status,
    StopMessage,
    StopType,
    encode_message,
)
from protocol.circuit.stop import StopInitiator, StopResponder
from protocol.circuit.voucher import Voucher, open_voucher, seal_voucher
from protocol.errors import PeerupError
from protocol.identify import IdentifyReader, printable
from protocol.keys import PrivateKey, PublicKey
from protocol.multiaddr import Multiaddr
from protocol.multibase import decode_base58, decode_multibase, encode_base58
from protocol.peer_id import PeerId
from protocol.peer_record import DOMAIN, PAYLOAD_TYPE, PeerRecord, open_peer_record, seal_peer_record
from protocol.policy import DENY_ALL

KEY_VECTORS = json.loads((Path(__file__).parents[1] / "protocol/data/key_vectors.json").read_text())["keys"]
OURS = PrivateKey.from_seed(bytes(range(32)))
OTHERS = PrivateKey.from_seed(bytes(range(1, 33)))
ADDRESS = Multiaddr("/ip4/192.0.2.1/udp/4001/quic-v1")
RELAYED = ADDRESS.with_peer_id(OTHERS.peer_id).to_bytes() + Multiaddr("/p2p-circuit").to_bytes()


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def fuzz_varint(data: bytes) -> None:
    try:
        value, end = varint.decode_varint(data)
    except PeerupError:
        return
    assert varint.encode_varint(value) == data[:end]


def fuzz_base58(data: bytes) -> None:
    try:
        decoded = decode_base58(_text(data))
    except PeerupError:
        return
    assert encode_base58(decoded) == _text(data)


def fuzz_multibase(data: bytes) -> None:
    try:
        decode_multibase(_text(data))
    except PeerupError:
        return


def fuzz_peer_id(data: bytes) -> None:
    for parse in (lambda: PeerId(data), lambda: PeerId.from_wire(data), lambda: PeerId.from_text(_text(data))):
        try:
            peer = parse()
        except PeerupError:
            continue
        assert PeerId.from_text(str(peer)) == peer
        assert PeerId.from_text(peer.to_cid()) == peer


def fuzz_multiaddr_bytes(data: bytes) -> None:
    try:
        address = Multiaddr.from_bytes(data)
    except PeerupError:
        return
    assert Multiaddr(str(address)) == address
    assert Multiaddr.from_bytes(address.to_bytes()) == address
    _touch_address(address)


def fuzz_multiaddr_text(data: bytes) -> None:
    try:
        address = Multiaddr(_text(data))
    except PeerupError:
        return
    assert Multiaddr(str(address)) == address
    assert Multiaddr.from_bytes(address.to_bytes()) == address
    _touch_address(address)


def _touch_address(address: Multiaddr) -> None:
    assert str(address).isprintable()
    _ = address.endpoint, address.transport, address.ip, address.relay, address.is_relayed
    if address.peer_id is None:
        assert address.without_peer_id() is address


def fuzz_public_key(data: bytes) -> None:
    try:
        key = PublicKey.from_protobuf(data)
    except PeerupError:
        return
    assert key.to_protobuf() == data
    try:
        key.verify(b"message", data[:64])
    except PeerupError:
        return


def fuzz_private_key(data: bytes) -> None:
    try:
        PrivateKey.from_protobuf(data)
    except PeerupError:
        return


def _run_negotiation(machine: multistream.Initiator | multistream.Responder, data: bytes) -> None:
    step = (data[0] % 40 + 1 if data else 1) + len(data) // 1000
    sent = 0
    try:
        for start in range(1, len(data), step):
            if machine.result is not None:
                return
            machine.receive_data(data[start : start + step])
            sent += len(machine.data_to_send())
            assert sent <= 64 * 1024
    except PeerupError:
        assert machine.state == "failed"
        return
    if machine.result is None:
        assert len(machine._buffer) <= multistream.MAX_MESSAGE + 40 + varint.MAX_LENGTH


def fuzz_multistream_initiator(data: bytes) -> None:
    _run_negotiation(multistream.Initiator(("/peerup/ssh/1.0.0", "/b")), data)


def fuzz_multistream_responder(data: bytes) -> None:
    _run_negotiation(multistream.Responder({"/peerup/ssh/1.0.0", "/b"}), data)


def fuzz_websocket_frames(data: bytes) -> None:
    """In both roles, in two pieces cut where the first byte says."""
    cut = 1 + (data[0] if data else 0)
    for client in (True, False):
        frames = websocket.Frames(client=client, random_key=lambda: b"abcd")
        try:
            for piece in (data[1:cut], data[cut:]):
                buffer = memoryview(bytearray(frames.held + piece))
                length = frames.decode(buffer, len(buffer))
                assert length <= len(buffer)
                assert len(frames.held) <= websocket.MAX_HELD
                frames.pong()
        except PeerupError:
            continue


def fuzz_websocket_request(data: bytes) -> None:
    opening = websocket_opening.ServerOpening("now")
    try:
        opening.receive_data(data)
    except PeerupError:
        return
    assert bool(opening.answer) or len(data) <= websocket_opening.MAX_REQUEST
    assert opening.accepted == opening.answer.startswith(b"HTTP/1.1 101 ")


def fuzz_websocket_response(data: bytes) -> None:
    opening = websocket_opening.ClientOpening("example.org", bytes(16))
    try:
        rest = opening.receive_data(data)
    except PeerupError:
        return
    assert rest is None or data.endswith(rest)


def fuzz_envelope(data: bytes) -> None:
    try:
        signed_envelope.open_envelope(data, DOMAIN, PAYLOAD_TYPE)
    except PeerupError:
        return


def fuzz_peer_record(data: bytes) -> None:
    """The bytes as a whole envelope, and as a payload that is rightly signed."""
    sealed = signed_envelope.seal_envelope(OURS, DOMAIN, PAYLOAD_TYPE, data).to_bytes()
    for envelope in (data, sealed):
        try:
            record = open_peer_record(envelope)
        except PeerupError:
            continue
        assert isinstance(record, PeerRecord)


def fuzz_identify(data: bytes) -> None:
    """The bytes as a stream, and as one message behind its length."""
    for stream in (data, delimited.encode_delimited(data)):
        reader = IdentifyReader()
        try:
            step = stream[0] % 50 + 1 if stream else 1
            for start in range(0, len(stream), step):
                reader.receive_data(stream[start : start + step])
            found = reader.finish(OURS.peer_id)
        except PeerupError:
            continue
        assert found.public_key in {None, OURS.public_key}
        assert found.peer_record is None or found.peer_record.peer_id == OURS.peer_id
        assert all(text is None or text.isprintable() for text in (found.agent_version, found.protocol_version))
        assert all(protocol.isprintable() for protocol in found.protocols)
        assert printable(data).isprintable()


def fuzz_hop_message(data: bytes) -> None:
    _check_circuit_message(HopMessage, data)


def fuzz_stop_message(data: bytes) -> None:
    _check_circuit_message(StopMessage, data)


def _check_circuit_message(kind: type[HopMessage | StopMessage], data: bytes) -> None:
    try:
        message = kind.from_bytes(data)
    except PeerupError:
        return
    again = kind.from_bytes(message.to_bytes())
    limit = None if message.limit is None or message.limit.unlimited else message.limit
    assert again == dataclasses.replace(message, limit=limit)
    assert message.reason.isprintable()
    if isinstance(message, HopMessage) and message.reservation is not None:
        addresses = message.reservation.addresses
        assert all(address.peer_id == OTHERS.peer_id for address in announced_addresses(addresses, OTHERS.peer_id))
        for address in circuit_addresses(addresses, OTHERS.peer_id, OURS.peer_id):
            assert address.relay is not None
            assert (address.relay.peer_id, address.peer_id) == (OTHERS.peer_id, OURS.peer_id)


def fuzz_voucher(data: bytes) -> None:
    for envelope in (data, signed_envelope.seal_envelope(OTHERS, "libp2p-relay-rsvp", b"\x03\x02", data).to_bytes()):
        try:
            voucher = open_voucher(envelope, relay=OTHERS.peer_id, peer=OURS.peer_id)
        except PeerupError:
            continue
        assert (voucher.relay, voucher.peer) == (OTHERS.peer_id, OURS.peer_id)


def fuzz_circuit_asker(data: bytes) -> None:
    for machine in (
        ConnectClient(OTHERS.peer_id),
        ReserveClient(OTHERS.peer_id, OURS.peer_id),
        StopInitiator(OTHERS.peer_id),
    ):
        _run_circuit(machine, data)
        assert machine.leftover == b"" or data.endswith(machine.leftover)


def fuzz_circuit_answerer(data: bytes) -> None:
    for machine in (HopServer(), StopResponder()):
        _run_circuit(machine, data)
        assert len(machine.leftover) <= MAX_EARLY
        assert (machine.refusal is not None) == (machine.state == "refused")
        assert bool(machine.data_to_send()) == (machine.state == "refused")


def _run_circuit(machine: Exchange, data: bytes) -> None:
    step = (data[0] % 40 + 1 if data else 1) + len(data) // 1000
    try:
        for start in range(0, len(data), step):
            machine.receive_data(data[start : start + step])
    except PeerupError:
        assert machine.state == "failed"
    assert machine.state in {state for pair in machine.TRANSITIONS.items() for state in (pair[0][0], pair[1])}
    assert len(machine._reader.take_rest()) <= MAX_MESSAGE + varint.MAX_LENGTH + step


def fuzz_delimited(data: bytes) -> None:
    reader = delimited.DelimitedReader(100)
    try:
        step = 7 + len(data) // 1000
        for start in range(0, len(data), step):
            reader.receive_data(data[start : start + step])
            while (message := reader.next_message()) is not None:
                assert len(message) <= 100
        reader.finish()
    except PeerupError:
        return


_STATIC = X25519PrivateKey.from_private_bytes(bytes(range(32)))
_PROOF = noise.Identity(
    OURS.public_key.to_protobuf(), OURS.sign(noise.SIGNATURE_PREFIX + _STATIC.public_key().public_bytes_raw())
)


def fuzz_noise_payload(data: bytes) -> None:
    """What a stranger says of itself, encrypted as it must be."""
    if len(data) > noise.MAX_HANDSHAKE_MESSAGE - 200:
        return
    stranger = noise.HandshakeXX(initiator=True, static_key=_STATIC)
    ours = noise.NoiseHandshake(initiator=False, static_key=_STATIC, identity=_PROOF, muxers=("/yamux/1.0.0",))
    first = stranger.write_message(b"")
    ours.receive_data(len(first).to_bytes(2, "big") + first)
    stranger.read_message(ours.data_to_send()[2:])
    last = stranger.write_message(data)
    try:
        ours.receive_data(len(last).to_bytes(2, "big") + last)
    except PeerupError:
        assert ours.result is None
        return
    assert ours.result is not None
    assert ours.result.peer_id == OURS.peer_id, "no other key has signed this stranger's Noise key"


class _Said(SocketPipe):
    """A pipe on which all of this comes, in pieces, and then the end."""

    def __init__(self, data: bytes) -> None:
        self._pieces = [data[start : start + 300] for start in range(0, len(data), 300)]

    async def receive(self) -> bytes:
        await trio.lowlevel.checkpoint()
        return self._pieces.pop(0) if self._pieces else b""

    async def send(self, data: bytes) -> None:
        await trio.lowlevel.checkpoint()


def fuzz_upgrade(data: bytes) -> None:
    """Whatever a caller says instead of a handshake."""

    async def main() -> None:
        upgrader = Upgrader(_STATIC, _PROOF)
        try:
            await upgrader.inbound(_Said(data), lambda _: False)
        except PeerupError:
            return
        raise AssertionError("nobody is let in")

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0.01))


async def _answer(request: http.HttpRequest) -> http.Response | http.Upgrade:
    async def stream() -> AsyncIterator[bytes]:
        for _ in range(2):
            yield b"x"

    async def run(stream: trio.abc.Stream, early: bytes) -> None:
        await stream.send_all(early)

    if request.body:
        request.json()
    match request.segments[0]:
        case "upgrade":
            return http.Upgrade("tap", run)
        case "stream":
            return http.Response(200, stream())
    return http.json_response({"query": dict(request.query), "headers": dict(request.headers)})


def fuzz_http_request(data: bytes) -> None:
    limits = http.HttpLimits(head_bytes=2048, body_bytes=4096)

    async def main() -> None:
        client, server = trio.testing.memory_stream_pair()

        async def send() -> None:
            with contextlib.suppress(trio.BrokenResourceError):
                await client.send_all(data)
                await client.send_eof()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: http.serve_connection(server, _answer, limits=limits))
            nursery.start_soon(send)
            with contextlib.suppress(trio.BrokenResourceError):
                while await client.receive_some(65536):
                    pass

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0.01))


def fuzz_ping(data: bytes) -> None:
    responder, half = ping.PingResponder(), len(data) // 2
    responder.receive_data(data[:half])
    out = responder.data_to_send()
    responder.receive_data(data[half:])
    out += responder.data_to_send()
    assert data.startswith(out)
    assert len(data) - len(out) < ping.PING_SIZE
    for run in (responder.finish, lambda: ping.PingInitiator().receive_data(data)):
        try:
            run()
        except PeerupError:
            continue


def fuzz_pingpong(data: bytes) -> None:
    for machine in (ping.PingPongResponder(), ping.PingPongInitiator()):
        try:
            for byte in data[:2000]:
                machine.receive_data(bytes((byte,)))
        except PeerupError:
            continue


def fuzz_authorized_keys(data: bytes) -> None:
    parsed = keys_file.AuthorizedKeys.parse(data)
    assert parsed.to_bytes() == data
    shown = "".join(entry.comment for entry in parsed.entries)
    assert not {unicodedata.category(character) for character in shown} & {"Cc", "Cf", "Cs", "Zl", "Zp"}
    if parsed.find(OURS.peer_id) is None:
        added = parsed.add(OURS.peer_id, "a comment", {"group": "0123abcd"})
        assert added.find(OURS.peer_id) is not None
        assert added.to_bytes().startswith(data)
        edited = added.set_attribute(OURS.peer_id, "expires", "2030-01-01T00:00:00Z")
        assert edited.set_attribute(OURS.peer_id, "expires", None).to_bytes() == added.to_bytes()
    for entry in parsed.entries[:3]:
        assert parsed.remove(entry.peer).find(entry.peer) is None


def fuzz_service(data: bytes) -> None:
    text = _text(data)
    for parse in (service.ServiceName, service.service_protocol, service.ServiceAddress.parse):
        try:
            parse(text)
        except PeerupError:
            continue
    service.service_of_protocol(text)
    assert not DENY_ALL.decide_stream(OURS.peer_id, text, 0.0).allowed


TARGETS: dict[str, Callable[[bytes], None]] = {
    name.removeprefix("fuzz_"): value for name, value in sorted(globals().items()) if name.startswith("fuzz_")
}
"""Every target by name."""

_LINE = f"{OTHERS.peer_id}  expires=2026-12-24T18:00:00Z group=01234567 x=y # Anna's phone\n".encode()
_NEGOTIATION = multistream.HEADER + multistream.encode_message("/c") + multistream.encode_message("/b")
_ANSWERS = multistream.HEADER + multistream.NOT_AVAILABLE + multistream.encode_message("/b")
_HOP_MESSAGES = [
    HopMessage(HopType.CONNECT, peer=Peer(OTHERS.peer_id, (ADDRESS,))),
    HopMessage(HopType.RESERVE),
    HopMessage(HopType.STATUS, status=Status.NO_RESERVATION, reason="nobody here"),
    HopMessage(
        HopType.STATUS,
        status=Status.OK,
        limit=Limit(60, 1 << 20),
        reservation=Reservation(5, (ADDRESS, Multiaddr.from_bytes(RELAYED)), seal_voucher(OTHERS, OURS.peer_id, 5)),
    ),
]
_STOP_MESSAGES = [
    StopMessage(StopType.CONNECT, peer=Peer(OTHERS.peer_id), limit=Limit(60)),
    StopMessage(StopType.STATUS, status=Status.OK),
]


def noise_payload(identity: noise.Identity) -> bytes:
    """The beginning of an honest payload."""
    key, signature = identity.public_key, identity.signature
    return b"\x0a" + bytes((len(key),)) + key + b"\x12" + bytes((len(signature),)) + signature


def _switching() -> bytes:
    server = websocket_opening.ServerOpening("now")
    server.receive_data(websocket_opening.ClientOpening("example.org", bytes(16)).request)
    return server.answer


SEEDS: dict[str, list[bytes]] = {
    "varint": [b"\x80\x01", b"\xff" * 8 + b"\x7f"],
    "base58": [str(OURS.peer_id).encode()],
    "multibase": [OURS.peer_id.to_cid().encode(), b"z" + str(OURS.peer_id).encode()],
    "peer_id": [OURS.peer_id.multihash, str(OURS.peer_id).encode(), OURS.peer_id.to_cid().encode()],
    "multiaddr_bytes": [RELAYED, Multiaddr("/ip6zone/eth0/ip6/fe80::1/tcp/1").to_bytes()],
    "multiaddr_text": [
        str(Multiaddr.from_bytes(RELAYED)).encode(),
        b"/dns4/example.org/tcp/443/tls/sni/example.org/ws",
        b"/unix/run/a.sock",
    ],
    "public_key": [bytes.fromhex(halves["public"]) for halves in KEY_VECTORS.values()],
    # Without RSA, whose check of the primes takes milliseconds; a private key comes from the node's own file.
    "private_key": [bytes.fromhex(halves["private"]) for kind, halves in KEY_VECTORS.items() if kind != "rsa"],
    "noise_payload": [
        noise_payload(_PROOF),
        noise_payload(_PROOF) + b"\x22\x0e\x12\x0c/yamux/1.0.0",
        b"\x0a\x24" + OTHERS.public_key.to_protobuf() + b"\x12\x40" + bytes(64),
    ],
    "upgrade": [multistream.HEADER + multistream.encode_message("/noise") + b"\x00\x20" + bytes(range(32)) + bytes(9)],
    "http_request": [
        b"GET /a%2fb?x=1 HTTP/1.1\r\nHost: a\r\n\r\nGET /stream HTTP/1.1\r\nHost: a\r\n\r\n",
        b"POST /a HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\n[1,2]",
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n{}",
        b"GET /upgrade HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: tap\r\n\r\nmore",
        b"GET /upgrade HTTP/1.1\r\nHost: a\r\n\r\nmore",
        b"HEAD nowhere HTTP/1.0\r\n\r\n",
    ],
    "multistream_initiator": [b"\x07" + _ANSWERS],
    "multistream_responder": [b"\x07" + _NEGOTIATION, b"\x01" + multistream.HEADER + b"\x03ls\n" * 40],
    "websocket_frames": [
        b"\x05" + websocket.Frames(client=True, random_key=lambda: b"abcd").encode(b"hello") * 3,
        b"\x02\x82\x05hello\x89\x01a\x88\x02\x03\xe8",
    ],
    "websocket_request": [
        websocket_opening.ClientOpening("example.org", bytes(16)).request,
        b"HEAD / HTTP/1.0\r\n\r\n",
    ],
    "websocket_response": [_switching(), b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"],
    "envelope": [seal_peer_record(OURS, [ADDRESS], 1)],
    "peer_record": [seal_peer_record(OURS, [ADDRESS], 1), PeerRecord(OURS.peer_id, 1, (ADDRESS,)).to_bytes()],
    "identify": [
        b"\x0a\x24" + OURS.public_key.to_protobuf() + b"\x1a\x06/a/1.0\x32\x05agent",
        delimited.encode_delimited(b"\x12" + bytes((len(RELAYED),)) + RELAYED),
    ],
    "hop_message": [message.to_bytes() for message in _HOP_MESSAGES],
    "stop_message": [message.to_bytes() for message in _STOP_MESSAGES],
    "voucher": [seal_voucher(OTHERS, OURS.peer_id, 5), Voucher(OTHERS.peer_id, OURS.peer_id, 5).to_bytes()],
    "circuit_asker": [encode_message(message) + b"early" for message in (*_HOP_MESSAGES, *_STOP_MESSAGES)],
    "circuit_answerer": [encode_message(message) + b"early" for message in (*_HOP_MESSAGES, *_STOP_MESSAGES)],
    "delimited": [delimited.encode_delimited(b"hello") * 3],
    "ping": [bytes(range(64))],
    "pingpong": [b"ping\n", b"pong\n", b"x" * 80],
    "authorized_keys": [b"# peers\n\n" + _LINE, _LINE.replace(b"\n", b"\r\n") + _LINE, b"\xef\xbb\xbf" + _LINE],
    "service": [b"ssh", b"127.0.0.1:22", b"[fe80::1%eth0]:22", b"/peerup/ssh/1.0.0"],
}
"""Well-formed inputs to begin mutating from."""
