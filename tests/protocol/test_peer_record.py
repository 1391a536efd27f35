"""Signed envelopes and the peer records in them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import LimitExceededError, PeerupError
from protocol.keys import BadSignatureError, PrivateKey
from protocol.multiaddr import Multiaddr
from protocol.pb import peer_record_pb2
from protocol.peer_record import (
    DOMAIN,
    LOOKED_AT,
    MAX_ADDRESSES,
    MAX_SEQ,
    PAYLOAD_TYPE,
    PeerRecord,
    PeerRecordError,
    open_peer_record,
    parse_addresses,
    seal_peer_record,
)
from protocol.signed_envelope import (
    MAX_ENVELOPE,
    Envelope,
    EnvelopeError,
    open_envelope,
    seal_envelope,
    signing_buffer,
)

KEY = PrivateKey.from_seed(b"k" * 32)
OTHER = PrivateKey.from_seed(b"o" * 32)
ADDRESSES = (Multiaddr("/ip4/192.0.2.1/tcp/4001"), Multiaddr("/ip6/2001:db8::1/udp/4001/quic-v1"))


def test_a_record_that_go_libp2p_signed():
    vector = json.loads((Path(__file__).parent / "data/peer_record_go.json").read_text())
    envelope = bytes.fromhex(vector["envelope"])
    key = PrivateKey.from_protobuf(bytes.fromhex(vector["private_key"]))
    record = open_peer_record(envelope)
    assert record.peer_id == key.peer_id
    assert record.addresses == tuple(Multiaddr(f"/ip4/1.2.3.4/tcp/{port}") for port in range(10))
    # Ed25519 signatures are deterministic, so the same record sealed here must be the same bytes.
    assert seal_peer_record(key, record.addresses, record.seq) == envelope


def test_the_signed_buffer_is_that_of_the_rfc():
    assert signing_buffer("ab", b"\x03\x01", b"x" * 300) == b"\x02ab\x02\x03\x01\xac\x02" + b"x" * 300


@given(st.binary(max_size=300), st.binary(max_size=20), st.text(max_size=30))
def test_an_envelope_opens_for_its_domain_and_type_alone(payload, payload_type, domain):
    sealed = seal_envelope(KEY, domain, payload_type, payload)
    assert open_envelope(sealed.to_bytes(), domain, payload_type) == sealed
    with pytest.raises(BadSignatureError):
        open_envelope(sealed.to_bytes(), domain + "x", payload_type)
    with pytest.raises(EnvelopeError):
        open_envelope(sealed.to_bytes(), domain, payload_type + b"x")
    with pytest.raises(BadSignatureError):
        open_envelope(
            Envelope(OTHER.public_key, payload_type, payload, sealed.signature).to_bytes(), domain, payload_type
        )
    changed = Envelope(KEY.public_key, payload_type, payload + b"x", sealed.signature)
    with pytest.raises(BadSignatureError):
        open_envelope(changed.to_bytes(), domain, payload_type)


@given(st.data())
def test_no_flipped_bit_of_an_envelope_is_believed(data):
    sealed = bytearray(seal_peer_record(KEY, ADDRESSES, 7))
    place = data.draw(st.integers(0, len(sealed) - 1))
    sealed[place] ^= 1 << data.draw(st.integers(0, 7))
    try:
        record = open_peer_record(bytes(sealed))
    except PeerupError:
        return
    assert record == PeerRecord(KEY.peer_id, 7, ADDRESSES)


def test_envelopes_have_bounds():
    with pytest.raises(LimitExceededError):
        open_envelope(bytes(MAX_ENVELOPE + 1), DOMAIN, PAYLOAD_TYPE)


@pytest.mark.parametrize("data", [b"", b"\x0a", b"\xff" * 20, b"\x12\x02\x03\x01", b"\x0a\x02\x08\x01"])
def test_what_is_no_envelope(data):
    with pytest.raises(EnvelopeError):
        open_envelope(data, DOMAIN, PAYLOAD_TYPE)


def test_a_record_of_somebody_else_is_refused():
    stolen = seal_envelope(KEY, DOMAIN, PAYLOAD_TYPE, PeerRecord(OTHER.peer_id, 1, ADDRESSES).to_bytes())
    with pytest.raises(PeerRecordError, match="signed a record of"):
        open_peer_record(stolen.to_bytes())


@pytest.mark.parametrize("payload", [b"", b"\xff\xff", b"\x0a\x01\x00", b"\x10\x05"])
def test_a_payload_that_is_no_record_is_refused(payload):
    with pytest.raises(PeerRecordError):
        open_peer_record(seal_envelope(KEY, DOMAIN, PAYLOAD_TYPE, payload).to_bytes())


def test_addresses_that_are_unknown_or_too_many_are_left_out():
    raw = [b"\xff\xff", b"", ADDRESSES[0].to_bytes(), b"\x03\x01", ADDRESSES[0].to_bytes(), ADDRESSES[1].to_bytes()]
    message = peer_record_pb2.PeerRecord(
        peer_id=KEY.peer_id.multihash,
        seq=1,
        addresses=[peer_record_pb2.PeerRecord.AddressInfo(multiaddr=data) for data in raw],
    )
    sealed = seal_envelope(KEY, DOMAIN, PAYLOAD_TYPE, message.SerializeToString())
    assert open_peer_record(sealed.to_bytes()).addresses == ADDRESSES
    many = [Multiaddr(f"/ip4/10.0.0.1/tcp/{port}") for port in range(1, MAX_ADDRESSES + 50)]
    assert open_peer_record(seal_peer_record(KEY, many, 1)).addresses == tuple(many[:MAX_ADDRESSES])


def test_no_more_addresses_are_looked_at_than_could_be_honest():
    looked_at = 0

    def raw():
        nonlocal looked_at
        for _ in range(10_000):
            looked_at += 1
            yield b""

    assert parse_addresses(raw(), 16) == ()
    assert looked_at <= 16 * LOOKED_AT + 1


def test_only_a_greater_seq_replaces():
    old, new = PeerRecord(KEY.peer_id, 5, ()), PeerRecord(KEY.peer_id, 6, ())
    assert new.replaces(old)
    assert not old.replaces(new)
    assert not old.replaces(old)
    assert old.replaces(None)
    assert not PeerRecord(OTHER.peer_id, 9, ()).replaces(old)


def test_seq_has_64_bits():
    assert open_peer_record(seal_peer_record(KEY, (), MAX_SEQ)).seq == MAX_SEQ
    for seq in (-1, MAX_SEQ + 1):
        with pytest.raises(PeerRecordError):
            seal_peer_record(KEY, (), seq)
