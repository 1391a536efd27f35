"""The four ends of hop and stop streams, without sockets."""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.circuit import hop_client, hop_server, stop
from protocol.circuit.exchange import MAX_EARLY
from protocol.circuit.hop_client import ConnectClient, ReserveClient
from protocol.circuit.hop_server import HopServer
from protocol.circuit.messages import (
    MAX_MESSAGE,
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
)
from protocol.circuit.stop import StopInitiator, StopResponder
from protocol.circuit.voucher import VoucherError, seal_voucher
from protocol.delimited import encode_delimited
from protocol.errors import InvalidValueError, LimitExceededError, PeerupError
from protocol.keys import PrivateKey
from protocol.multiaddr import Multiaddr
from protocol.varint import VarintError, encode_varint

RELAY_KEY = PrivateKey.from_seed(b"r" * 32)
RELAY = RELAY_KEY.peer_id
SOURCE = PrivateKey.from_seed(b"s" * 32).peer_id
TARGET = PrivateKey.from_seed(b"t" * 32).peer_id
ADDRESS = Multiaddr("/ip4/192.0.2.1/tcp/4001")
LIMIT = Limit(60, 1 << 20)
RESERVATION = Reservation(2_000_000_000, (ADDRESS,), seal_voucher(RELAY_KEY, TARGET, 2_000_000_000))
RESERVE = encode_message(HopMessage(HopType.RESERVE))
CONNECT = encode_message(HopMessage(HopType.CONNECT, peer=Peer(TARGET)))
HOP_OK = encode_message(HopMessage(HopType.STATUS, status=Status.OK))
HOP_GRANT = encode_message(HopMessage(HopType.STATUS, status=Status.OK, reservation=RESERVATION, limit=LIMIT))
HOP_NO = encode_message(HopMessage(HopType.STATUS, status=Status.NO_RESERVATION, reason="nobody here"))
STOP_CONNECT = encode_message(StopMessage(StopType.CONNECT, peer=Peer(SOURCE), limit=LIMIT))
STOP_OK = encode_message(StopMessage(StopType.STATUS, status=Status.OK))
STOP_NO = encode_message(StopMessage(StopType.STATUS, status=Status.PERMISSION_DENIED))
TOO_LONG = encode_varint(MAX_MESSAGE + 1)
BAD_LENGTH = b"\x80\x00"


def pieces(data, cuts):
    """The bytes cut at these places."""
    places = sorted({cut % (len(data) + 1) for cut in cuts} | {0, len(data)})
    return [data[start:end] for start, end in itertools.pairwise(places)]


CUTS = st.lists(st.integers(0, 5000), max_size=12)


def feed(machine, data, cuts=None):
    for piece in [data[place : place + 1] for place in range(len(data))] if cuts is None else pieces(data, cuts):
        machine.receive_data(piece)


@given(CUTS)
def test_a_reservation(cuts):
    client, server = ReserveClient(RELAY, TARGET), HopServer()
    feed(server, client.data_to_send(), cuts)
    assert server.state == "reserving"
    server.grant(RESERVATION, LIMIT)
    feed(client, server.data_to_send(), cuts)
    assert (client.state, server.state) == ("granted", "granted")
    grant = client.grant
    assert grant.relay == RELAY
    assert grant.expire == 2_000_000_000
    assert grant.limit == client.limit == LIMIT
    assert grant.addresses == (Multiaddr(f"{ADDRESS}/p2p/{RELAY}/p2p-circuit/p2p/{TARGET}"),)
    assert (grant.voucher.relay, grant.voucher.peer, grant.voucher.expiration) == (RELAY, TARGET, 2_000_000_000)
    assert not client.data_to_send()
    assert not server.data_to_send()
    client.finish()


@given(CUTS, st.binary(max_size=200), st.binary(max_size=200), st.binary(max_size=200), st.booleans())
def test_a_circuit_from_end_to_end_with_early_bytes(cuts, early, answer, later, limited):
    limit = LIMIT if limited else None
    client, server = ConnectClient(TARGET, early=early), HopServer()
    feed(server, client.data_to_send(), cuts)
    assert (server.state, server.destination) == ("connecting", TARGET)
    initiator, responder = StopInitiator(SOURCE, limit, early=server.leftover), StopResponder()
    feed(responder, initiator.data_to_send(), cuts)
    assert (responder.state, responder.source, responder.limit) == ("deciding", SOURCE, limit)
    responder.accept()
    feed(initiator, responder.data_to_send() + answer, cuts)
    assert (initiator.state, initiator.leftover) == ("open", answer)
    server.open(limit)
    feed(client, server.data_to_send() + initiator.leftover, cuts)
    assert (client.state, client.limit, client.leftover) == ("open", limit, answer)
    feed(responder, later, cuts)
    feed(server, later, cuts)
    assert (responder.state, responder.leftover) == ("open", early + later)
    assert server.leftover == early + later


@given(st.binary(max_size=100), st.integers(1, 50))
def test_bytes_that_come_before_the_decision_wait_for_it(early, step):
    server = HopServer()
    server.receive_data(CONNECT)
    for start in range(0, len(early), step):
        server.receive_data(early[start : start + step])
    server.open()
    assert server.leftover == early


@pytest.mark.parametrize("machine", [ConnectClient(TARGET), ReserveClient(RELAY, TARGET)])
def test_a_refusal_says_why(machine):
    feed(machine, HOP_NO)
    assert machine.state == "refused"
    assert machine.refusal == Refusal(Status.NO_RESERVATION, "nobody here")
    machine.receive_data(b"more")
    machine.finish()
    assert machine.leftover == b""


def test_a_target_refuses():
    initiator, responder = StopInitiator(SOURCE), StopResponder()
    responder.receive_data(initiator.data_to_send())
    responder.refuse(Status.PERMISSION_DENIED, "not listed", rule="not-listed")
    initiator.receive_data(responder.data_to_send())
    assert initiator.state == responder.state == "refused"
    assert initiator.refusal == Refusal(Status.PERMISSION_DENIED, "not listed")
    assert responder.refusal.rule == "not-listed"


def test_an_unknown_status_is_a_refusal():
    client = ConnectClient(TARGET)
    client.receive_data(encode_delimited(b"\x08\x02\x28\x09"))
    assert client.state == "refused"
    assert str(client.refusal) == "status 9"


@pytest.mark.parametrize("relayed", [False, True])
@pytest.mark.parametrize(
    ("data", "status"),
    [
        (encode_delimited(b""), Status.MALFORMED_MESSAGE),
        (encode_delimited(b"\xff"), Status.MALFORMED_MESSAGE),
        (encode_delimited(b"\x08\x01"), Status.MALFORMED_MESSAGE),
        (TOO_LONG, Status.MALFORMED_MESSAGE),
        (BAD_LENGTH, Status.MALFORMED_MESSAGE),
        (encode_delimited(b"\x08\x02\x28\x64"), Status.UNEXPECTED_MESSAGE),
        (encode_delimited(b"\x08\x09"), Status.UNEXPECTED_MESSAGE),
    ],
)
def test_a_relay_answers_a_bad_request(data, status, relayed):
    server = HopServer(relayed=relayed)
    feed(server, data)
    assert server.state == "refused"
    assert server.refusal.status == status
    client = ConnectClient(TARGET)
    client.receive_data(server.data_to_send())
    assert client.refusal.status == status
    server.receive_data(b"x" * 100_000)
    assert server.leftover == b""
    assert not server.data_to_send()


@pytest.mark.parametrize("request_", [RESERVE, CONNECT])
def test_nothing_is_granted_over_a_relayed_connection(request_):
    server = HopServer(relayed=True)
    server.receive_data(request_)
    assert server.refusal.status == Status.PERMISSION_DENIED
    assert server.state == "refused"


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (encode_delimited(b""), Status.MALFORMED_MESSAGE),
        (encode_delimited(b"\x08\x00"), Status.MALFORMED_MESSAGE),
        (TOO_LONG, Status.MALFORMED_MESSAGE),
        (STOP_OK, Status.UNEXPECTED_MESSAGE),
        (encode_delimited(b"\x08\x05"), Status.UNEXPECTED_MESSAGE),
    ],
)
def test_a_target_answers_a_bad_request(data, status):
    responder = StopResponder()
    feed(responder, data)
    initiator = StopInitiator(SOURCE)
    initiator.receive_data(responder.data_to_send())
    assert initiator.refusal.status == responder.refusal.status == status


NO_RESERVATION_FIELD = HOP_OK
FOREIGN_VOUCHER = encode_message(
    HopMessage(
        HopType.STATUS,
        status=Status.OK,
        reservation=Reservation(5, (), seal_voucher(PrivateKey.from_seed(b"x" * 32), TARGET, 5)),
    )
)


@pytest.mark.parametrize(
    ("make", "data", "error"),
    [
        (lambda: ReserveClient(RELAY, TARGET), NO_RESERVATION_FIELD, CircuitMessageError),
        (lambda: ReserveClient(RELAY, TARGET), FOREIGN_VOUCHER, VoucherError),
        (lambda: ReserveClient(RELAY, SOURCE), HOP_GRANT, VoucherError),
        (lambda: ReserveClient(RELAY, TARGET), RESERVE, CircuitMessageError),
        (lambda: ConnectClient(TARGET), CONNECT, CircuitMessageError),
        (lambda: ConnectClient(TARGET), encode_delimited(b"\x08\x02"), CircuitMessageError),
        (lambda: ConnectClient(TARGET), TOO_LONG, LimitExceededError),
        (lambda: ConnectClient(TARGET), BAD_LENGTH, VarintError),
        (lambda: StopInitiator(SOURCE), STOP_CONNECT, CircuitMessageError),
        (lambda: StopInitiator(SOURCE), encode_delimited(b"\x08\x01"), CircuitMessageError),
    ],
)
def test_a_bad_answer_fails_for_good(make, data, error):
    machine = make()
    with pytest.raises(error):
        machine.receive_data(data)
    assert machine.state == "failed"
    machine.receive_data(HOP_OK + STOP_OK)
    assert machine.state == "failed"
    assert machine.leftover == b""


def test_a_relay_without_voucher_and_addresses_is_reached_where_it_was_dialled():
    answer = encode_message(HopMessage(HopType.STATUS, status=Status.OK, reservation=Reservation(5)))
    client = ReserveClient(RELAY, TARGET, dialled=ADDRESS)
    client.receive_data(answer)
    assert client.grant.voucher is None
    assert client.grant.addresses == (Multiaddr(f"{ADDRESS}/p2p/{RELAY}/p2p-circuit/p2p/{TARGET}"),)
    plain = ReserveClient(RELAY, TARGET)
    plain.receive_data(answer)
    assert plain.grant.addresses == ()


@pytest.mark.parametrize("make", [lambda: ConnectClient(TARGET), lambda: StopInitiator(SOURCE)])
@pytest.mark.parametrize("cut", [0, 1, 2])
def test_a_stream_that_ends_before_the_answer_has_failed(make, cut):
    machine = make()
    machine.receive_data(HOP_OK[:cut])
    with pytest.raises(CircuitMessageError):
        machine.finish()
    assert machine.state == "failed"


@pytest.mark.parametrize("make", [HopServer, StopResponder])
@pytest.mark.parametrize("cut", [0, 1, 2])
def test_a_stream_that_ends_before_the_request_gets_no_answer(make, cut):
    machine = make()
    machine.receive_data(CONNECT[:cut])
    machine.finish()
    assert machine.state == "failed"
    assert not machine.data_to_send()


def test_a_client_may_close_its_side_behind_its_request():
    server = HopServer()
    server.receive_data(RESERVE)
    server.finish()
    assert (server.state, server.finished) == ("reserving", True)
    server.grant(RESERVATION)
    assert server.data_to_send()


def test_early_bytes_have_bounds():
    with pytest.raises(LimitExceededError):
        ConnectClient(TARGET, early=bytes(MAX_EARLY + 1))
    with pytest.raises(LimitExceededError):
        StopInitiator(SOURCE, early=bytes(MAX_EARLY + 1))
    for machine, request in ((HopServer(), CONNECT), (StopResponder(), STOP_CONNECT)):
        machine.receive_data(request + bytes(MAX_EARLY))
        assert machine.refusal is None
        machine.receive_data(b"x")
        assert machine.state == "refused"
        assert machine.refusal.status == Status.RESOURCE_LIMIT_EXCEEDED
        assert machine.leftover == b""
        machine.receive_data(bytes(MAX_EARLY))
        assert machine.leftover == b""


def test_what_follows_a_reserve_is_dropped():
    server = HopServer()
    server.receive_data(RESERVE + b"x" * 100_000)
    server.receive_data(b"x" * 100_000)
    assert (server.state, server.leftover) == ("reserving", b"")
    assert server._reader.take_rest() == b""


def test_decisions_out_of_place_are_refused():
    for wrong in (
        lambda: HopServer().grant(RESERVATION),
        lambda: HopServer().open(),
        lambda: HopServer().refuse(Status.PERMISSION_DENIED),
        lambda: StopResponder().accept(),
        lambda: StopResponder().refuse(Status.OK),
    ):
        with pytest.raises(InvalidValueError):
            wrong()
    server = HopServer()
    server.receive_data(RESERVE)
    with pytest.raises(InvalidValueError):
        server.open()


@given(st.binary(max_size=300), CUTS)
def test_any_bytes_end_in_a_state_of_the_table(data, cuts):
    for machine in (
        HopServer(),
        StopResponder(),
        ConnectClient(TARGET),
        StopInitiator(SOURCE),
        ReserveClient(RELAY, TARGET),
    ):
        states = {state for state, _ in machine.TRANSITIONS} | set(machine.TRANSITIONS.values())
        try:
            feed(machine, data, cuts)
            machine.finish()
        except PeerupError:
            assert machine.state == "failed"
        assert machine.state in states


@pytest.mark.parametrize(
    ("module", "place", "table"),
    [
        (hop_client, 1, hop_client.RESERVE_TRANSITIONS),
        (hop_client, 2, hop_client.CONNECT_TRANSITIONS),
        (hop_server, 1, hop_server.TRANSITIONS),
        (stop, 1, stop.INITIATOR_TRANSITIONS),
        (stop, 2, stop.RESPONDER_TRANSITIONS),
    ],
)
def test_drawing_and_table_agree(module, place, table):
    drawing = module.__doc__.split("stateDiagram-v2")[place]
    drawn = {((before, event), after) for before, after, event in re.findall(r"(\w+) --> (\w+): (\w+)", drawing)}
    assert drawn == set(table.items())


def _all_moves():
    """Every entry of every table: how to get a machine into the state, and what makes the event."""
    reserve = {"granted": HOP_GRANT, "refused": HOP_NO, "bad": CONNECT}
    ask = {"opened": HOP_OK, "refused": HOP_NO, "bad": RESERVE}
    stop_ask = {"opened": STOP_OK, "refused": STOP_NO, "bad": STOP_CONNECT}
    for make, answers in (
        (lambda: ReserveClient(RELAY, TARGET), reserve),
        (lambda: ConnectClient(TARGET), ask),
        (lambda: StopInitiator(SOURCE), stop_ask),
    ):
        for (state, event), after in make().TRANSITIONS.items():
            act = (lambda m: m.finish()) if event == "end" else (lambda m, data=answers[event]: m.receive_data(data))
            yield make, b"", state, act, after
    asks = {"reserving": RESERVE, "connecting": CONNECT, "deciding": STOP_CONNECT, "request": b""}
    for make in (HopServer, StopResponder):
        for (state, event), after in make.TRANSITIONS.items():
            acts = {
                "reserve": lambda m: m.receive_data(RESERVE),
                "connect": lambda m: m.receive_data(CONNECT if isinstance(m, HopServer) else STOP_CONNECT),
                "bad": lambda m: m.receive_data(b"\x00"),
                "end": lambda m: m.finish(),
                "grant": lambda m: m.grant(RESERVATION),
                "open": lambda m: m.open(),
                "accept": lambda m: m.accept(),
                "refuse": lambda m: m.refuse(Status.CONNECTION_FAILED),
                "flood": lambda m: m.receive_data(bytes(MAX_EARLY + 1)),
            }
            yield make, asks[state], state, acts[event], after


@pytest.mark.parametrize(("make", "before", "state", "act", "after"), list(_all_moves()))
def test_the_machines_do_what_the_table_says(make, before, state, act, after):
    machine = make()
    if before:
        machine.receive_data(before)
    assert machine.state == state
    try:
        act(machine)
    except PeerupError:
        assert after == "failed"
    assert machine.state == after
