"""Messages, vouchers and addresses of circuit relay v2."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.circuit.addresses import announced_addresses, circuit_address, circuit_addresses
from protocol.circuit.messages import (
    MAX_ADDRESSES,
    MAX_DATA,
    MAX_DURATION,
    MAX_MESSAGE,
    MAX_REASON,
    CircuitMessageError,
    HopMessage,
    HopType,
    Limit,
    Peer,
    Refusal,
    Reservation,
    Status,
    StopMessage,
    StopType,
    encode_message,
    status_name,
)
from protocol.circuit.voucher import (
    DOMAIN,
    PAYLOAD_TYPE,
    Voucher,
    VoucherError,
    VoucherExpiredError,
    open_voucher,
    seal_voucher,
)
from protocol.delimited import DelimitedReader
from protocol.errors import InvalidValueError
from protocol.keys import BadSignatureError, PrivateKey
from protocol.multiaddr import Multiaddr, MultiaddrError
from protocol.pb import circuit_pb2
from protocol.peer_record import seal_peer_record
from protocol.signed_envelope import EnvelopeError, seal_envelope
from protocol.varint import encode_varint

RELAY_KEY = PrivateKey.from_seed(b"r" * 32)
RELAY = RELAY_KEY.peer_id
US = PrivateKey.from_seed(b"u" * 32).peer_id
OTHER = PrivateKey.from_seed(b"o" * 32).peer_id
ADDRESS = Multiaddr("/ip4/192.0.2.1/tcp/4001")
IDS = st.sampled_from([RELAY, US, OTHER])
LIMITS = st.builds(Limit, st.integers(0, MAX_DURATION), st.integers(0, MAX_DATA)).filter(lambda it: not it.unlimited)
ADDRESSES = st.lists(
    st.integers(1, 65535).map(lambda port: Multiaddr(f"/ip4/192.0.2.1/tcp/{port}")), max_size=MAX_ADDRESSES, unique=True
).map(tuple)
REASONS = st.text(
    st.characters(min_codepoint=32, max_codepoint=0x24F, exclude_categories=["C", "Z"]), max_size=MAX_REASON
)
STATUSES = st.sampled_from(list(Status)) | st.integers(0, (1 << 32) - 1)
RESERVATIONS = st.builds(Reservation, st.integers(0, MAX_DATA), ADDRESSES, st.none() | st.binary(max_size=300))
HOP = st.one_of(
    st.just(HopMessage(HopType.RESERVE)),
    st.builds(HopMessage, st.just(HopType.CONNECT), peer=st.builds(Peer, IDS)),
    st.builds(
        HopMessage,
        st.just(HopType.STATUS),
        reservation=st.none() | RESERVATIONS,
        limit=st.none() | LIMITS,
        status=STATUSES,
        reason=REASONS,
    ),
)
STOP = st.one_of(
    st.builds(StopMessage, st.just(StopType.CONNECT), peer=st.builds(Peer, IDS), limit=st.none() | LIMITS),
    st.builds(StopMessage, st.just(StopType.STATUS), status=STATUSES, reason=REASONS),
)


def test_bytes_on_the_wire_are_those_of_the_spec():
    assert encode_message(HopMessage(HopType.RESERVE)).hex() == "020800"
    peer = b"\x12" + bytes((len(OTHER.multihash) + 2,)) + b"\x0a" + bytes((len(OTHER.multihash),)) + OTHER.multihash
    assert HopMessage(HopType.CONNECT, peer=Peer(OTHER)).to_bytes() == b"\x08\x01" + peer
    status = HopMessage(HopType.STATUS, status=Status.OK, limit=Limit(120, 1 << 17))
    assert status.to_bytes().hex() == "0802" + "2206" + "0878" + "10808008" + "2864"
    assert StopMessage(StopType.CONNECT, peer=Peer(OTHER), limit=Limit(120)).to_bytes() == (
        b"\x08\x00" + peer + b"\x1a\x04\x08\x78\x10\x00"
    )
    assert StopMessage(StopType.STATUS, status=Status.CONNECTION_FAILED).to_bytes().hex() == "080120cb01"


def test_what_go_libp2p_wrote():
    vectors = json.loads((Path(__file__).parent / "data/circuit_go.json").read_text())
    made = {name: bytes.fromhex(value) for name, value in vectors.items() if name not in {"source", "relay", "peer"}}
    assert (vectors["relay"], vectors["peer"]) == (str(RELAY), str(US))
    limit = Limit(120, 1 << 17)
    voucher = seal_voucher(RELAY_KEY, US, 1_700_000_000)
    assert voucher == made["voucher"]  # Ed25519 signatures are deterministic
    assert open_voucher(made["voucher"], relay=RELAY, peer=US).expiration == 1_700_000_000
    reservation = Reservation(1_700_000_000, (ADDRESS.with_peer_id(RELAY),), voucher)
    for name, message in {
        "hop_reserve": HopMessage(HopType.RESERVE),
        "hop_connect": HopMessage(HopType.CONNECT, peer=Peer(US)),
        "hop_status_ok": HopMessage(HopType.STATUS, reservation=reservation, limit=limit, status=Status.OK),
        "hop_status_denied": HopMessage(HopType.STATUS, status=Status.PERMISSION_DENIED),
        "stop_connect": StopMessage(StopType.CONNECT, peer=Peer(US), limit=limit),
        "stop_status_ok": StopMessage(StopType.STATUS, status=Status.OK),
    }.items():
        assert message.to_bytes() == made[name], name
        assert type(message).from_bytes(made[name]) == message


def test_status_codes_are_those_of_the_spec():
    assert {status.name: status.value for status in Status} == {
        "UNUSED": 0,
        "OK": 100,
        "RESERVATION_REFUSED": 200,
        "RESOURCE_LIMIT_EXCEEDED": 201,
        "PERMISSION_DENIED": 202,
        "CONNECTION_FAILED": 203,
        "NO_RESERVATION": 204,
        "MALFORMED_MESSAGE": 400,
        "UNEXPECTED_MESSAGE": 401,
    }
    assert status_name(204) == "NO_RESERVATION"
    assert status_name(299) == "status 299"
    assert str(Refusal(Status.PERMISSION_DENIED, "go away")) == "PERMISSION_DENIED: go away"
    assert str(Refusal(7)) == "status 7"


@given(HOP)
def test_hop_messages_survive_the_way_there_and_back(message):
    assert HopMessage.from_bytes(message.to_bytes()) == message


@given(STOP)
def test_stop_messages_survive_the_way_there_and_back(message):
    assert StopMessage.from_bytes(message.to_bytes()) == message


@pytest.mark.parametrize(("kind", "connect"), [(HopMessage, HopType.CONNECT), (StopMessage, StopType.CONNECT)])
def test_addresses_in_a_connect_are_not_even_read(kind, connect, monkeypatch):
    data = kind(connect, peer=Peer(OTHER, (ADDRESS,) * 300)).to_bytes()
    monkeypatch.setattr(Multiaddr, "from_bytes", None)  # reading one would fail
    assert kind.from_bytes(data) == kind(connect, peer=Peer(OTHER))


@given(st.binary(max_size=200), st.sampled_from([HopMessage, StopMessage]))
def test_any_bytes_are_a_message_or_refused(data, kind):
    try:
        message = kind.from_bytes(data)
    except CircuitMessageError:
        return
    assert kind.from_bytes(message.to_bytes()) == message or message.limit is not None


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        (HopMessage, b""),  # no type
        (HopMessage, b"\xff\xff"),
        (HopMessage, b"\x08\x01"),  # CONNECT without peer
        (HopMessage, b"\x08\x01\x12\x00"),  # without id
        (HopMessage, b"\x08\x01\x12\x03\x0a\x01\x00"),  # with a bad id
        (HopMessage, b"\x08\x02"),  # STATUS without status
        (HopMessage, b"\x08\x02\x28\x64\x1a\x00"),  # a reservation that does not say when it expires
        (StopMessage, b""),
        (StopMessage, b"\x08\x00"),
        (StopMessage, b"\x08\x01"),
        (HopMessage, b"\x08\x00" + b"\x7a\x01x" * MAX_MESSAGE),  # too long
    ],
)
def test_malformed_messages_are_refused(kind, data):
    with pytest.raises(CircuitMessageError):
        kind.from_bytes(data)


def test_unknown_types_and_fields_and_those_of_other_types_are_skipped():
    assert HopMessage.from_bytes(b"\x08\x07").type == 7
    assert StopMessage.from_bytes(b"\x08\x07\x12\x00").type == 7
    # A RESERVE with a bad peer, an unknown field 9 and a status.
    assert HopMessage.from_bytes(b"\x08\x00\x12\x03\x0a\x01\x00\x4a\x01x\x28\x64") == HopMessage(HopType.RESERVE)


def test_an_unknown_status_is_kept():
    assert HopMessage.from_bytes(b"\x08\x02\x28\x01").status == 1


def test_a_limit_that_limits_nothing_is_not_sent_and_has_bounds():
    assert HopMessage(HopType.STATUS, status=Status.OK, limit=Limit()).to_bytes().hex() == "08022864"
    assert HopMessage.from_bytes(bytes.fromhex("080222002864")).limit == Limit()
    assert str(Limit()) == "unlimited time, unlimited data"
    assert str(Limit(60, 1024)) == "60 seconds, 1024 bytes each way"
    for bad in ((-1, 0), (MAX_DURATION + 1, 0), (0, -1), (0, MAX_DATA + 1)):
        with pytest.raises(InvalidValueError):
            Limit(*bad)
    with pytest.raises(InvalidValueError):
        Reservation(-1)


def test_a_reason_is_cut_and_made_printable():
    message = HopMessage(HopType.STATUS, status=Status.PERMISSION_DENIED, reason="a\x1b[31m" + "é" * 500)
    found = HopMessage.from_bytes(message.to_bytes()).reason
    assert len(found) == MAX_REASON
    assert found.startswith("a\N{REPLACEMENT CHARACTER}[31mé")
    plain = circuit_pb2.HopMessage(type=2, status=202, reason=b"\xff" * 3000)
    assert HopMessage.from_bytes(plain.SerializeToString()).reason == "\N{REPLACEMENT CHARACTER}" * MAX_REASON


def test_addresses_that_do_not_fit_are_left_out():
    many = tuple(Multiaddr(f"/dns4/{'relay' * 10}.example.org/tcp/{port}") for port in range(1, 200))
    message = HopMessage(HopType.STATUS, status=Status.OK, reservation=Reservation(5, many, b"v" * 500))
    reader = DelimitedReader(MAX_MESSAGE)
    reader.receive_data(encode_message(message))
    found = circuit_pb2.HopMessage.FromString(reader.next_message())
    sent = len(found.reservation.addrs)
    assert [Multiaddr.from_bytes(address) for address in found.reservation.addrs] == list(many[:sent])
    assert MAX_MESSAGE - 100 < found.ByteSize() <= MAX_MESSAGE
    assert len(HopMessage.from_bytes(found.SerializeToString()).reservation.addresses) == MAX_ADDRESSES
    encode_message(HopMessage(HopType.CONNECT, peer=Peer(OTHER, many)))
    with pytest.raises(InvalidValueError):
        encode_message(HopMessage(HopType.STATUS, status=Status.OK, reservation=Reservation(5, many, bytes(5000))))


def test_a_voucher_is_canonical_and_opens():
    sealed = seal_voucher(RELAY_KEY, US, 1_700_000_000)
    voucher = open_voucher(sealed, relay=RELAY, peer=US)
    assert voucher == Voucher(RELAY, US, 1_700_000_000)
    relay, peer = RELAY.multihash, US.multihash
    expected = b"\x0a" + bytes((len(relay),)) + relay + b"\x12" + bytes((len(peer),)) + peer + b"\x18"
    assert voucher.to_bytes() == expected + encode_varint(1_700_000_000)
    assert DOMAIN == "libp2p-relay-rsvp"
    assert PAYLOAD_TYPE in sealed
    voucher.check_expiration(1_699_999_999.9)
    for late in (1_700_000_000.0, float("nan")):
        with pytest.raises(VoucherExpiredError):
            voucher.check_expiration(late)


def test_a_voucher_of_or_for_somebody_else_is_refused():
    sealed = seal_voucher(RELAY_KEY, US, 5)
    with pytest.raises(VoucherError, match="not of the relay"):
        open_voucher(sealed, relay=OTHER, peer=US)
    with pytest.raises(VoucherError, match="not for"):
        open_voucher(sealed, relay=RELAY, peer=OTHER)
    forged = seal_envelope(RELAY_KEY, DOMAIN, PAYLOAD_TYPE, Voucher(OTHER, US, 5).to_bytes()).to_bytes()
    with pytest.raises(VoucherError, match="signed a voucher of"):
        open_voucher(forged, relay=OTHER, peer=US)
    with pytest.raises(EnvelopeError):
        open_voucher(seal_peer_record(RELAY_KEY, [ADDRESS], 1), relay=RELAY, peer=US)
    wrong_domain = seal_envelope(RELAY_KEY, "libp2p-peer-record", PAYLOAD_TYPE, Voucher(RELAY, US, 5).to_bytes())
    with pytest.raises(BadSignatureError):
        open_voucher(wrong_domain.to_bytes(), relay=RELAY, peer=US)


@pytest.mark.parametrize("payload", [b"", b"\xff\xff", b"\x0a\x01\x00", Voucher(RELAY, US, 5).to_bytes()[:-2]])
def test_a_payload_that_is_no_voucher_is_refused(payload):
    sealed = seal_envelope(RELAY_KEY, DOMAIN, PAYLOAD_TYPE, payload).to_bytes()
    with pytest.raises(VoucherError):
        open_voucher(sealed, relay=RELAY, peer=US)


def test_a_relays_addresses_get_its_id_once_and_lead_to_nobody_else():
    plain, whole = ADDRESS, ADDRESS.with_peer_id(RELAY)
    twice = Multiaddr(f"{ADDRESS}/p2p/{RELAY}/p2p/{RELAY}")
    foreign = ADDRESS.with_peer_id(OTHER)
    relayed = Multiaddr(f"{ADDRESS}/p2p/{OTHER}/p2p-circuit/p2p/{RELAY}")
    through = Multiaddr(f"{ADDRESS}/p2p/{OTHER}/p2p/{RELAY}")
    only = Multiaddr(f"/p2p/{RELAY}")
    second = Multiaddr("/dns4/relay.example.org/tcp/443/wss")
    found = announced_addresses([plain, whole, twice, foreign, relayed, through, only, second], RELAY)
    assert found == (whole, second.with_peer_id(RELAY))


def test_circuit_addresses():
    relay_address = ADDRESS.with_peer_id(RELAY)
    circuit = Multiaddr(f"{ADDRESS}/p2p/{RELAY}/p2p-circuit/p2p/{US}")
    assert circuit_address(relay_address, US) == circuit
    assert circuit.relay == relay_address
    assert circuit.peer_id == US
    assert circuit_addresses([ADDRESS, ADDRESS.with_peer_id(OTHER)], RELAY, US) == (circuit,)
    for bad in (ADDRESS, circuit):
        with pytest.raises(MultiaddrError):
            circuit_address(bad, US)
