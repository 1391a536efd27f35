from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.delimited import TruncatedMessageError, encode_delimited
from protocol.errors import LimitExceededError, ProtocolError
from protocol.identify import (
    MAX_ADDRESSES,
    MAX_MESSAGE,
    MAX_MESSAGES,
    MAX_PROTOCOLS,
    MAX_TOTAL,
    MAX_VERSION_LENGTH,
    Identification,
    IdentifyError,
    IdentifyReader,
    encode_identification,
    printable,
)
from protocol.keys import BadSignatureError, PrivateKey
from protocol.multiaddr import Multiaddr
from protocol.pb import identify_pb2
from protocol.peer_record import PeerRecord, seal_peer_record
from protocol.signed_envelope import seal_envelope

KEY = PrivateKey.from_seed(b"k" * 32)
OTHER = PrivateKey.from_seed(b"o" * 32)
PUBLIC = KEY.public_key.to_protobuf()
TCP = Multiaddr("/ip4/192.0.2.1/tcp/4001")
QUIC = Multiaddr("/ip4/192.0.2.1/udp/4001/quic-v1")


def read(data, peer=KEY.peer_id, size=1 << 20):
    reader = IdentifyReader()
    for start in range(0, len(data), size):
        reader.receive_data(data[start : start + size])
    return reader.finish(peer)


def message(**fields):
    return encode_delimited(identify_pb2.Identify(**fields).SerializeToString())


def encode(**changes):
    fields = {
        "public_key": PUBLIC,
        "agent_version": "peerup/0.1.0",
        "protocol_version": "peerup/0.1.0",
        "protocols": ("/ipfs/ping/1.0.0", "/peerup/ssh/1.0.0"),
        "listen_addresses": (TCP, QUIC),
        "observed_address": TCP,
        "signed_peer_record": seal_peer_record(KEY, (TCP,), 3),
    }
    return encode_identification(**(fields | changes))


@pytest.mark.parametrize("size", [1, 7, 100, 1 << 20])
def test_it_comes_back_in_any_pieces(size):
    found = read(encode(), size=size)
    assert found == Identification(
        public_key=KEY.public_key,
        protocol_version="peerup/0.1.0",
        agent_version="peerup/0.1.0",
        protocols=("/ipfs/ping/1.0.0", "/peerup/ssh/1.0.0"),
        listen_addresses=(TCP, QUIC),
        observed_address=TCP,
        peer_record=PeerRecord(KEY.peer_id, 3, (TCP,)),
        signed_peer_record=seal_peer_record(KEY, (TCP,), 3),
    )


def test_field_numbers_are_those_of_the_spec():
    data = encode(protocols=("/a",), listen_addresses=(TCP,), observed_address=QUIC, signed_peer_record=None)
    expected = b"\x0a\x24" + PUBLIC
    expected += b"\x12\x08" + TCP.to_bytes()
    expected += b"\x1a\x02/a"
    expected += b"\x22" + bytes((len(QUIC.to_bytes()),)) + QUIC.to_bytes()
    expected += b"\x2a\x0cpeerup/0.1.0\x32\x0cpeerup/0.1.0"
    assert data == encode_delimited(expected)
    envelope = seal_peer_record(KEY, (), 1)
    assert identify_pb2.Identify(signed_peer_record=envelope).SerializeToString()[:1] == b"\x42"


@given(
    st.lists(st.text(st.characters(categories=["L", "N", "P"]), min_size=1, max_size=250), max_size=250, unique=True),
    st.integers(0, MAX_ADDRESSES),
)
def test_what_does_not_fit_one_message_goes_into_several(protocols, count):
    addresses = tuple(Multiaddr(f"/ip4/10.0.0.1/tcp/{port}") for port in range(1, count + 1))
    record = seal_peer_record(KEY, addresses, 1)
    try:
        data = encode(protocols=protocols, listen_addresses=addresses, signed_peer_record=record)
    except LimitExceededError:
        assert sum(len(protocol.encode()) + 3 for protocol in protocols) > MAX_TOTAL // 2
        return
    found = read(data)
    assert found.listen_addresses == addresses
    assert found.protocols == tuple(protocols)
    assert found.peer_record.addresses == addresses


def test_usual_ones_fit_the_single_message_that_js_libp2p_reads():
    data = encode(listen_addresses=[Multiaddr(f"/ip4/10.0.0.1/tcp/{port}") for port in range(1, 30)])
    assert len(data) < 1500
    reader = IdentifyReader()
    reader.receive_data(data)
    assert reader._messages == 1


def test_parts_are_merged_as_protobuf_merges():
    data = message(agent_version=b"one", protocols=[b"/a"], listen_addrs=[TCP.to_bytes()])
    data += message(agent_version=b"two", protocols=[b"/b", b"/a"], listen_addrs=[QUIC.to_bytes()])
    found = read(data)
    assert (found.agent_version, found.protocols, found.listen_addresses) == ("two", ("/a", "/b"), (TCP, QUIC))
    assert found.public_key is None
    assert found.peer_record is None


def test_a_push_changes_what_it_says_and_nothing_else():
    before = read(encode())
    push = read(message(listen_addrs=[QUIC.to_bytes()], signed_peer_record=seal_peer_record(KEY, (QUIC,), 4)))
    after = before.updated_by(push)
    assert after.listen_addresses == (QUIC,)
    assert after.peer_record == PeerRecord(KEY.peer_id, 4, (QUIC,))
    assert (after.agent_version, after.protocols, after.public_key) == (
        before.agent_version,
        before.protocols,
        before.public_key,
    )


@pytest.mark.parametrize("seq", [2, 3])
def test_a_push_with_an_old_record_keeps_the_present_one(seq):
    before = read(encode())
    after = before.updated_by(read(message(signed_peer_record=seal_peer_record(KEY, (QUIC,), seq))))
    assert after.peer_record == before.peer_record
    assert after.signed_peer_record == before.signed_peer_record


def test_the_key_must_be_the_peers_own():
    with pytest.raises(IdentifyError, match="public key of"):
        read(message(public_key=OTHER.public_key.to_protobuf()))
    with pytest.raises(IdentifyError, match="is none"):
        read(message(public_key=b"\x08\x01"))
    with pytest.raises(IdentifyError):
        read(encode(), peer=OTHER.peer_id)


def test_the_peer_record_must_be_the_peers_own():
    with pytest.raises(IdentifyError, match="peer record of"):
        read(message(signed_peer_record=seal_peer_record(OTHER, (TCP,), 1)))
    broken = bytearray(seal_peer_record(KEY, (TCP,), 1))
    broken[-1] ^= 1
    with pytest.raises(BadSignatureError):
        read(message(signed_peer_record=bytes(broken)))
    with pytest.raises(ProtocolError):
        read(message(signed_peer_record=b"\x01\x02"))


def test_a_record_of_a_kind_that_we_do_not_know_takes_nothing_else_away():
    """As rust-libp2p signs them, unless told otherwise."""
    older = seal_envelope(KEY, "libp2p-routing-state", b"/libp2p/routing-state-record", b"anything").to_bytes()
    said = read(message(signed_peer_record=older, listen_addrs=[TCP.to_bytes()], protocols=[b"/a"]))
    assert (said.peer_record, said.signed_peer_record) == (None, None)
    assert (said.listen_addresses, said.protocols) == ((TCP,), ("/a",))


def test_texts_are_harmless():
    found = read(message(agent_version=b"a\x1b[2J\xe2\x80\xaeb\n\xff" + b"x" * 500, protocol_version=b""))
    assert found.agent_version.startswith("a\ufffd[2J\ufffdb\ufffd\ufffdxxx")
    assert len(found.agent_version) == MAX_VERSION_LENGTH
    assert found.agent_version.isprintable()
    assert found.protocol_version == ""
    assert printable("ä€😀".encode(), 2) == "ä€"


def test_what_cannot_be_used_is_left_out():
    found = read(
        message(
            listen_addrs=[b"\xff", b"", TCP.to_bytes(), TCP.to_bytes(), b"\x04\x01"],
            observed_addr=b"\x04\x01",
            protocols=[b"", b"\xff", b"/a\x00", b"/ok", b"/ok", b"x" * 300],
        )
    )
    assert found.listen_addresses == (TCP,)
    assert found.observed_address is None
    assert found.protocols == ("/ok",)


def test_lists_have_bounds():
    addresses = [Multiaddr(f"/ip4/10.0.0.1/tcp/{port}").to_bytes() for port in range(1, 600)]
    assert len(read(message(listen_addrs=addresses)).listen_addresses) == MAX_ADDRESSES
    protocols = [f"/{number}".encode() for number in range(1000)]
    assert len(read(message(protocols=protocols)).protocols) == MAX_PROTOCOLS


def test_streams_have_bounds():
    with pytest.raises(LimitExceededError):
        read(b"\x81\x40")  # announces MAX_MESSAGE + 1
    assert MAX_MESSAGE + 1 == 0x40 << 7 | 1
    with pytest.raises(LimitExceededError):
        read(message(protocols=[b"/a"]) * (MAX_MESSAGES + 1))
    part = message(protocols=[b"x" * 250] * 31)
    with pytest.raises(LimitExceededError):
        read(part * (MAX_TOTAL // len(part) + 1), size=100)
    with pytest.raises(LimitExceededError):
        encode(protocols=["x" * 250] * 200)
    with pytest.raises(LimitExceededError):
        encode(signed_peer_record=bytes(MAX_MESSAGE))


def test_broken_streams():
    with pytest.raises(IdentifyError, match="without a message"):
        read(b"")
    with pytest.raises(TruncatedMessageError):
        read(encode()[:-1])
    with pytest.raises(IdentifyError, match="parsed"):
        read(encode_delimited(b"\xff\xff"))
