"""yamux: single frames against the spec, harm done by a peer, and two sessions back to back under any interleaving."""

import contextlib
import random
import struct
from collections import defaultdict

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from protocol.allowance import Allowance
from protocol.stream_descriptor import ResetCode
from protocol.yamux import (
    ACK,
    DATA,
    FIN,
    GO_AWAY,
    INITIAL_WINDOW,
    LEAST_WINDOW,
    PING,
    RST,
    SYN,
    WINDOW_UPDATE,
    BacklogError,
    FloodError,
    GoneAwayError,
    Limits,
    Role,
    Session,
    StreamIdsUsedUpError,
    TooManyStreamsError,
    WindowExceededError,
    YamuxError,
)


def frame(kind, flags, stream, length, body=b""):
    return struct.pack(">BBHII", 0, kind, flags, stream, length) + body


def data(stream, body, flags=0):
    return frame(DATA, flags, stream, len(body), body)


def frames(raw):
    """(type, flags, stream, length, body) of each frame."""
    result = []
    while raw:
        _, kind, flags, stream, length = struct.unpack(">BBHII", raw[:12])
        body = raw[12 : 12 + length] if kind == DATA else b""
        raw = raw[12 + len(body) :]
        result.append((kind, flags, stream, length, body))
    return result


class End:
    """One side: a session and what it was told."""

    def __init__(self, role, **limits):
        self.now = 0.0
        self.session = Session(role, self, now=0.0, limits=Limits(**limits))
        self.opened, self.resets, self.pongs, self.gone = [], {}, [], []
        self.received = defaultdict(bytearray)
        self.finished = set()
        self.windows = []

    def stream_opened(self, stream):
        self.opened.append(stream)

    def stream_data(self, stream, buffer, start, end):
        assert start >= 1
        self.received[stream.id] += buffer[start:end]
        buffer[start - 1] = 0xEE  # which we are allowed to do

    def stream_finished(self, stream):
        assert stream.id not in self.finished
        self.finished.add(stream.id)

    def stream_reset(self, stream, code):
        assert stream.closed
        self.resets[stream.id] = code

    def window_opened(self, stream):
        self.windows.append(stream.id)

    def pong(self, value):
        self.pongs.append(value)

    def gone_away(self, code):
        self.gone.append(code)

    def feed(self, raw, piece=1 << 20):
        for start in range(0, len(raw), piece):
            part = raw[start : start + piece]
            self.session.receive(memoryview(bytearray(b"?" + part)), 1, 1 + len(part), self.now)

    def said(self):
        room = memoryview(bytearray(1 << 17))
        return frames(bytes(room[: self.session.take_control(room, 0, len(room))]))

    def said_raw(self):
        room = memoryview(bytearray(1 << 17))
        return [bytes(room[: self.session.take_control(room, 0, len(room))])]

    def send(self, stream, body):
        room = memoryview(bytearray(12 + len(body)))
        self.session.data_header(room, 0, stream, len(body))
        room[12:] = body
        return bytes(room)


@pytest.mark.parametrize("piece", [1, 5, 13, 1 << 20])
def test_a_stream_from_syn_to_fin(piece):
    server = End(Role.SERVER)
    server.feed(frame(WINDOW_UPDATE, SYN, 1, 0) + data(1, b"hello ") + data(1, b"world", FIN), piece)
    (stream,) = server.opened
    assert server.received[1] == b"hello world"
    assert server.finished == {1}
    assert server.said() == []  # acknowledged with the first frame
    (answer,) = frames(server.send(stream, b"yes"))
    assert answer == (DATA, ACK, 1, 3, b"yes")
    server.session.finish(stream)
    server.session.finish(stream)
    assert server.said() == [(WINDOW_UPDATE, FIN, 1, 0, b"")]
    assert stream.closed
    assert server.session.streams == 0


def test_syn_with_data_and_window():
    server = End(Role.SERVER)
    server.feed(data(1, b"x", SYN | FIN) + frame(WINDOW_UPDATE, SYN, 3, 1000))
    assert server.received[1] == b"x"
    assert server.finished == {1}
    assert server.opened[1].send_window == INITIAL_WINDOW + 1000


def test_opening_announces_and_counts_ids():
    client, server = End(Role.CLIENT), End(Role.SERVER)
    first, second = client.session.open(0.0), client.session.open(0.0)
    assert (first.id, second.id) == (1, 3)
    assert server.session.open(0.0).id == 2
    assert client.said() == [(WINDOW_UPDATE, SYN, 1, 0, b""), (WINDOW_UPDATE, SYN, 3, 0, b"")]
    assert frames(client.send(second, b"x")) == [(DATA, 0, 3, 1, b"x")]


def test_reset_before_anybody_knew_says_nothing():
    client = End(Role.CLIENT)
    stream = client.session.open(0.0)
    client.session.reset(stream)
    assert client.said() == []
    assert client.session.streams == 0


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (frame(WINDOW_UPDATE, RST, 1, 0x1008), 0x1008),
        (frame(DATA, RST, 1, 0), 0),
        (frame(DATA, RST, 1, 4, b"lost"), 0),
    ],
)
def test_reset_by_peer(raw, code):
    server = End(Role.SERVER)
    server.feed(frame(WINDOW_UPDATE, SYN, 1, 0) + raw + data(1, b"late") + frame(WINDOW_UPDATE, SYN, 3, 0))
    assert server.resets == {1: code}
    assert server.received[1] == b""
    assert [stream.id for stream in server.opened] == [1, 3]


def test_reset_by_us_carries_the_code():
    server = End(Role.SERVER)
    server.feed(frame(WINDOW_UPDATE, SYN, 1, 0))
    server.session.reset(server.opened[0], ResetCode.GATED)
    server.session.reset(server.opened[0], ResetCode.NONE)
    assert server.said() == [(WINDOW_UPDATE, RST, 1, 0x1008, b"")]
    server.feed(data(1, b"still on its way" * 100) + frame(WINDOW_UPDATE, 0, 1, 5))
    assert server.received[1] == b""


def test_window_is_granted_as_bytes_are_consumed_and_grows_for_a_fast_reader():
    server = End(Role.SERVER, stream_window=1 << 20)
    server.feed(data(1, b"", SYN))
    (stream,) = server.opened
    half = bytes(INITIAL_WINDOW // 2)
    server.feed(data(1, half[1:]))
    assert not server.session.consumed(stream, len(half) - 1, 0.001)
    server.feed(data(1, b"x"))
    assert server.session.consumed(stream, 1, 0.001)
    assert server.said() == [(WINDOW_UPDATE, ACK, 1, len(half) + INITIAL_WINDOW, b"")]
    assert stream.window == stream.receive_window == 2 * INITIAL_WINDOW
    for round_ in range(2, 6):
        server.feed(data(1, bytes(stream.window // 2)))
        server.session.consumed(stream, stream.window // 2, 0.001 * round_)
    assert stream.window == 1 << 20


@pytest.mark.parametrize(("behind", "later"), [(True, 0.001), (False, 1.0)])
def test_window_does_not_grow_for_a_slow_reader(behind, later):
    server = End(Role.SERVER)
    server.feed(data(1, bytes(INITIAL_WINDOW), SYN))
    (stream,) = server.opened
    assert not server.session.consumed(stream, INITIAL_WINDOW // 2 - 1, later, behind=behind)
    assert server.session.consumed(stream, 1, later, behind=behind)
    # what the peer may send, and what is still here, are one window together
    assert stream.receive_window + stream.undelivered == stream.window == INITIAL_WINDOW


@pytest.mark.parametrize(
    ("took", "grown"),
    [(0.1, 4 * INITIAL_WINDOW), (0.19, 4 * INITIAL_WINDOW), (0.21, INITIAL_WINDOW)],
)
def test_streams_that_use_up_their_windows_in_the_same_time_come_to_have_equal_ones(took, grown):
    """Else they would for ever share the connection in the proportion of windows that they once happened to have."""
    server = End(Role.SERVER)
    for stream_id in (1, 3):
        server.feed(data(stream_id, b"", SYN))
    wide, narrow = server.opened

    def take_half(stream, now):
        server.feed(data(stream.id, bytes(stream.window // 2)))
        assert server.session.consumed(stream, stream.window // 2, now)

    take_half(wide, 0.001)
    take_half(wide, 0.002)
    assert wide.window == 4 * INITIAL_WINDOW
    take_half(narrow, 0.1)
    assert narrow.window == INITIAL_WINDOW, "it took long"
    for _ in range(4):
        take_half(wide, wide.refilled_at + 0.1)
        take_half(narrow, narrow.refilled_at + took)
    assert (wide.window, narrow.window) == (4 * INITIAL_WINDOW, grown)


def test_what_has_yet_to_come_of_a_frame_is_not_granted_again():
    end = End(Role.SERVER)
    begun, most = 150_000, 200_000
    end.feed(data(1, bytes(most), SYN)[: 12 + begun])
    (stream,) = end.opened
    assert end.session.consumed(stream, begun, 1.0)
    assert stream.window == INITIAL_WINDOW
    assert stream.receive_window + (most - begun) == INITIAL_WINDOW


def test_windows_grow_within_the_budget_of_the_session():
    server = End(Role.SERVER, session_window=INITIAL_WINDOW)
    for stream_id in (1, 3):
        server.feed(data(stream_id, bytes(INITIAL_WINDOW), SYN))
    for stream in server.opened:
        server.session.consumed(stream, INITIAL_WINDOW, 0.001)
    assert [stream.window for stream in server.opened] == [2 * INITIAL_WINDOW, INITIAL_WINDOW]
    server.session.reset(server.opened[0])
    server.feed(data(3, bytes(INITIAL_WINDOW)))
    server.session.consumed(server.opened[1], INITIAL_WINDOW, 0.002)
    assert server.opened[1].window == 2 * INITIAL_WINDOW


def test_more_than_granted_ends_the_session():
    server = End(Role.SERVER)
    server.feed(data(1, bytes(INITIAL_WINDOW), SYN))
    with pytest.raises(WindowExceededError):
        server.feed(data(1, b"x"))
    assert server.said() == [(GO_AWAY, 0, 0, 1, b"")]


@pytest.mark.parametrize(
    "raw",
    [
        b"\1" + frame(PING, SYN, 0, 0)[1:],
        frame(4, 0, 0, 0),
        frame(0xFF, 0, 1, 0),
        frame(WINDOW_UPDATE, SYN, 0, 0),
        frame(WINDOW_UPDATE, SYN, 2, 0),  # ours to open
        frame(WINDOW_UPDATE, SYN, 1, 0) * 2,
        frame(WINDOW_UPDATE, SYN, 1, 0xFFFF_FFFF) + frame(WINDOW_UPDATE, 0, 1, 1),
    ],
)
def test_broken_protocol_ends_the_session(raw):
    server = End(Role.SERVER)
    with pytest.raises(YamuxError):
        server.feed(raw)
    assert server.said()[-1] == (GO_AWAY, 0, 0, 1, b"")


NEVER_OPENED = [
    frame(kind, flags, stream, length, bytes(length) if kind == DATA else b"")
    for kind in (DATA, WINDOW_UPDATE)
    for flags in (0, ACK, FIN, RST, ACK | FIN, FIN | RST)
    for stream in (0, 5, 6, 0xFFFF_FFFE, 0xFFFF_FFFF)
    for length in (0, 5000)
]
ODD: list[bytes] = [
    *NEVER_OPENED,
    frame(PING, 0, 0, 7),
    frame(PING, 0x10, 0, 7),
    frame(PING, SYN, 3, 7),
    frame(WINDOW_UPDATE, 0x10, 1, 600),
    frame(WINDOW_UPDATE, 0x8000 | ACK, 1, 0),
    data(3, b"behind the end"),
]


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("raw", ODD, ids=[raw[:12].hex() for raw in ODD])
def test_frames_that_mean_nothing_are_passed_over(role, raw):
    end = End(role)
    one, other = (1, 3) if role is Role.SERVER else (2, 4)
    raw = raw.replace(frame(0, 0, 3, 0)[:8], frame(0, 0, other, 0)[:8])
    end.feed(data(one, b"", SYN) + data(other, b"all", SYN | FIN))
    end.feed(raw)
    end.feed(data(one, b"goes on"))
    assert end.received[one] == b"goes on"
    assert end.received[other] == b"all"
    assert end.session.streams == 2
    assert not end.resets


@pytest.mark.parametrize("raw", ODD, ids=[raw[:12].hex() for raw in ODD])
def test_frames_that_mean_nothing_are_not_for_nothing(raw):
    end = End(Role.SERVER)
    end.feed(data(1, b"", SYN) + data(3, b"all", SYN | FIN))
    with pytest.raises(FloodError):
        end.feed(raw * 2100)


def test_unknown_flags_do_not_hide_known_ones():
    end = End(Role.SERVER)
    end.feed(data(1, b"whole", 0x100 | SYN | FIN))
    assert (end.received[1], end.finished) == (b"whole", {1})
    end.feed(frame(PING, 0x20 | SYN, 0, 7))
    assert (PING, ACK, 0, 7, b"") in end.said()


def test_data_behind_the_end_is_no_more_than_a_window():
    end = End(Role.SERVER)
    end.feed(data(1, b"all", SYN | FIN))
    with pytest.raises(WindowExceededError):
        end.feed(data(1, bytes(INITIAL_WINDOW)))


def test_ping_is_answered_and_measured():
    client, server = End(Role.CLIENT), End(Role.SERVER)
    client.session.ping(0xABCD)
    ((kind, flags, stream, value, _),) = client.said()
    server.feed(frame(kind, flags, stream, value))
    ((kind, flags, stream, value, _),) = server.said()
    assert (kind, flags, stream, value) == (PING, ACK, 0, 0xABCD)
    client.feed(frame(kind, flags, stream, value))
    assert client.pongs == [0xABCD]


def test_go_away():
    client = End(Role.CLIENT)
    client.feed(frame(GO_AWAY, 0, 0, 0))
    assert client.gone == [0]
    with pytest.raises(GoneAwayError):
        client.session.open(0.0)
    server = End(Role.SERVER)
    server.session.go_away()
    server.feed(frame(WINDOW_UPDATE, SYN, 1, 0))
    assert server.opened == []
    assert server.said() == [(GO_AWAY, 0, 0, 0, b""), (WINDOW_UPDATE, RST, 1, 0, b"")]


def test_own_limits():
    client = End(Role.CLIENT, outbound_streams=3, unacknowledged=2)
    client.session.open(0.0)
    client.session.open(0.0)
    with pytest.raises(TooManyStreamsError):
        client.session.open(0.0)
    client.said()
    client.feed(frame(WINDOW_UPDATE, ACK, 1, 0))
    client.session.open(0.0)
    client.feed(frame(WINDOW_UPDATE, ACK, 3, 0))
    with pytest.raises(TooManyStreamsError):
        client.session.open(0.0)
    client.feed(frame(WINDOW_UPDATE, RST, 1, 0))
    client.session.open(0.0)


def accepted(count, **limits):
    """A client and as many streams of its own that the peer has accepted and answered."""
    client = End(Role.CLIENT, **limits)
    opened = []
    for _ in range(count):
        stream = client.session.open(client.now)
        client.said()
        client.feed(data(stream.id, b"welcome", ACK))
        stream.greeting = 0
        opened.append(stream)
    return client, opened


def test_no_more_streams_are_opened_than_the_peer_takes_but_the_nodes_own():
    client, opened = accepted(5, outbound_streams=5, own_streams=2)
    for _ in range(3):
        with pytest.raises(TooManyStreamsError):
            client.session.open(0.0)
        assert not client.session.has_room
    for _ in range(2):
        client.session.open(0.0, own=True)
    with pytest.raises(TooManyStreamsError):
        client.session.open(0.0, own=True)
    assert {frame[2] for frame in client.said()} == {11, 13}
    client.feed(frame(WINDOW_UPDATE, RST, opened[0].id, 0) + frame(WINDOW_UPDATE, RST, opened[1].id, 0))
    client.feed(frame(WINDOW_UPDATE, RST, opened[2].id, 0))
    client.session.open(0.0)


def test_the_peers_streams_count_where_it_takes_so_many_in_all():
    client, _ = accepted(2, total_streams=4)
    client.feed(data(2, b"", SYN) + data(4, b"", SYN))
    with pytest.raises(TooManyStreamsError):
        client.session.open(0.0)


def test_what_the_peer_takes_is_learned_from_its_refusals_and_tried_again_later():
    client, _ = accepted(50)
    surplus = client.session.open(0.0)
    client.said()
    client.feed(frame(WINDOW_UPDATE, RST, surplus.id, 0))
    with pytest.raises(BacklogError):
        client.session.open(0.0)
    client.session.open(0.0, own=True)
    client.session.open(1.0)
    opened = 0
    with contextlib.suppress(BacklogError):
        while opened < 100:
            client.session.open(1.0)
            opened += 1
    assert 5 < opened < 20


def test_a_refusal_for_another_reason_says_nothing_about_room():
    client, _ = accepted(50)
    for code in (ResetCode.GATED, ResetCode.SERVICE_UNAVAILABLE, ResetCode.SERVICE_UNREACHABLE):
        refused = client.session.open(0.0)
        client.said()
        client.feed(frame(WINDOW_UPDATE, RST, refused.id, code))
    client.session.open(0.0)


def test_streams_that_come_to_nothing_are_opened_ever_more_slowly():
    """The peer charges each of them, and would end the session with all that is good in it."""
    client = End(Role.CLIENT)
    opened = 0
    with contextlib.suppress(BacklogError):
        while opened < 5000:
            stream = client.session.open(client.now)
            opened += 1
            client.said()
            client.feed(frame(WINDOW_UPDATE, RST, stream.id, ResetCode.SERVICE_UNREACHABLE))
    assert opened == 1000
    client.session.open(1.0)


def test_a_peer_that_opens_as_many_again_as_are_refused_is_slowed_down_and_not_ended():
    server = End(Role.SERVER, inbound_streams=8)
    ids = iter(range(1, 1 << 31, 2))

    def opens(count):
        return b"".join(frame(WINDOW_UPDATE, SYN, next(ids), 0) for _ in range(count))

    server.feed(opens(8))
    for stream in server.opened:
        server.session.acknowledge(stream)
    waiting, refused = 80, 0
    server.feed(opens(waiting))
    for tick in range(2000):  # a hundred seconds
        server.now = tick * 0.05
        server.session.refuse_parked(server.now)
        over = sum(flags & RST > 0 for _, flags, *_ in server.said())
        refused += over
        server.feed(opens(over))
    assert refused > 5000
    assert server.session.streams == 8
    with pytest.raises(FloodError):
        server.feed(opens(2000))


@pytest.mark.parametrize("answered", [True, False])
def test_a_thousand_streams_that_are_reset_together_are_no_flood(answered):
    server = End(Role.SERVER)
    for stream in range(1, 2031, 2):
        server.feed(data(stream, b"proposal", SYN))
        if answered:
            server.send(server.opened[-1], b"agreed")
        else:
            server.session.acknowledge(server.opened[-1])
            server.said()
    server.feed(b"".join(frame(WINDOW_UPDATE, RST, stream, 0) for stream in range(1, 2031, 2)))
    assert server.session.streams == 0
    assert len(server.resets) == 1015


def test_what_waits_of_our_own_is_one_frame_of_each_stream_and_nobody_elses_fault():
    """The wire takes nothing for a while, and streams go on here: grants, ends and resets."""
    server = End(Role.SERVER)
    streams = range(1, 1601, 2)
    for stream in streams:
        server.feed(data(stream, bytes(10_000), SYN))
        server.session.acknowledge(server.opened[-1])
        server.said()
    for _ in range(20):
        for stream in server.opened:
            server.feed(data(stream.id, bytes(5_000)))
            server.session.consumed(stream, stream.undelivered, 100.0)
    for stream in server.opened[::2]:
        server.session.finish(stream)
    for stream in server.opened[::4]:
        server.session.reset(stream, ResetCode.SHUTDOWN)
    server.feed(frame(PING, SYN, 0, 1))
    said = server.said()
    assert len(said) <= len(streams) + 1
    by_stream = {stream: (flags, length) for kind, flags, stream, length, _ in said if kind == WINDOW_UPDATE}
    assert len(by_stream) == len(said) - 1
    for number, stream in enumerate(server.opened):
        flags, length = by_stream.get(stream.id, (0, 0))
        if number % 4 == 0:
            assert (flags, length) == (RST, ResetCode.SHUTDOWN)
        else:
            assert flags == (FIN if number % 2 == 0 else 0)
            assert length == stream.receive_window - (INITIAL_WINDOW - 110_000)


def test_a_stream_that_is_opened_and_reset_while_nothing_is_sent_leaves_no_trace():
    client = End(Role.CLIENT)
    for _ in range(10_000):
        stream = client.session.open(client.now, own=True)
        client.session.finish(stream)
        client.session.reset(stream)
    assert client.said() == []


def test_stream_ids_that_are_used_up():
    client = End(Role.CLIENT)
    assert client.session.ids_left == 1 << 31
    last = Session(Role.SERVER, client, now=0.0, next_id=0xFFFF_FFFC)
    assert [last.open(0.0).id, last.open(0.0).id, last.ids_left] == [0xFFFF_FFFC, 0xFFFF_FFFE, 0]
    with pytest.raises(StreamIdsUsedUpError):
        last.open(0.0)


def test_unacknowledged_streams_of_the_peer_are_limited():
    server = End(Role.SERVER, unacknowledged=2)
    server.feed(b"".join(frame(WINDOW_UPDATE, SYN, stream, 0) for stream in (1, 3, 5)))
    assert len(server.opened) == 2
    assert server.said() == [(WINDOW_UPDATE, RST, 5, ResetCode.LIMIT_EXCEEDED, b"")]
    server.session.acknowledge(server.opened[0])
    assert server.said() == [(WINDOW_UPDATE, ACK, 1, 0, b"")]
    server.feed(frame(WINDOW_UPDATE, SYN, 7, 0))
    assert len(server.opened) == 3


def flood(raws):
    """How many of these frames a server takes, each at the same moment, before it ends the session."""
    server = End(Role.SERVER)
    server.feed(frame(WINDOW_UPDATE, SYN, 1, 0))
    for count, raw in enumerate(raws):
        try:
            server.feed(raw)
        except FloodError:
            return count, server
        if count % 100 == 0:
            server.said()
    return None, server


@pytest.mark.parametrize(
    "raws",
    [
        [frame(WINDOW_UPDATE, SYN, stream, 0) for stream in range(3, 20003, 2)],
        [frame(WINDOW_UPDATE, flags, stream, 0) for stream in range(3, 20003, 2) for flags in (SYN, RST)],
        [frame(PING, SYN, 0, 0)] * 10000,
        [frame(PING, ACK, 0, 0)] * 10000,
        [data(1, b"")] * 10000,
        [frame(WINDOW_UPDATE, 0, 1, 0)] * 10000,
        [frame(WINDOW_UPDATE, FIN, 1, 0)] * 10000,
        [frame(WINDOW_UPDATE, ACK, 1, 0)] * 10000,
        [frame(WINDOW_UPDATE, RST, 1, 0)] * 10000,
        [frame(GO_AWAY, 0, 0, 0)] * 10000,
        [frame(WINDOW_UPDATE, 0, 1, 1)] * 10000,
        [frame(WINDOW_UPDATE, 0, 1, 511)] * 10000,
    ],
    ids=[
        *("syn", "rapid-reset", "ping", "pong", "empty-data", "empty-window", "fin", "ack", "rst", "go-away"),
        *("one-byte-window", "small-window"),
    ],
)
def test_floods_end_the_session(raws):
    count, server = flood(raws)
    assert count is not None
    assert count <= 2100
    assert server.session.streams <= 1024


def test_window_updates_that_nothing_was_sent_for_are_a_flood_in_the_end():
    server = End(Role.SERVER)
    server.feed(frame(WINDOW_UPDATE, SYN, 1, 0))
    server.feed(frame(WINDOW_UPDATE, 0, 1, 512) * 10_000)
    assert server.opened[0].send_window == INITIAL_WINDOW + 512 * 10_000
    with pytest.raises(FloodError):
        server.feed(frame(WINDOW_UPDATE, 0, 1, 512) * 5_000)


def test_window_updates_for_what_was_sent_are_not_charged():
    """js-libp2p grants anew after each frame; others less often."""
    server = End(Role.SERVER)
    server.feed(frame(WINDOW_UPDATE, SYN, 1, 0))
    for _ in range(30_000):
        server.send(server.opened[0], bytes(1000))
        server.feed(frame(WINDOW_UPDATE, 0, 1, 1000))


@pytest.mark.parametrize("answered", [True, False])
def test_frames_of_one_byte_are_charged_unless_the_service_answers(answered):
    server = End(Role.SERVER)
    server.feed(data(1, b"", SYN))
    (stream,) = server.opened
    ended = None
    for second in range(60):
        server.now = float(second)
        try:
            for _ in range(40):  # 40,000 a second
                server.feed(data(1, b"x") * 1000)
                server.session.consumed(stream, 1000, server.now)
                if answered:
                    for _ in range(1000):
                        server.send(stream, b"y")
                        stream.send_window += 1
        except FloodError:
            ended = second
            break
        server.said()
    assert (ended is None) == answered


def test_bulk_is_never_charged():
    server = End(Role.SERVER)
    server.feed(data(1, b"", SYN))
    (stream,) = server.opened
    for _ in range(20_000):
        server.feed(data(1, bytes(16_000)))
        server.session.consumed(stream, 16_000, server.now)
        server.said()


def test_a_debt_outlives_the_session():
    allowance = Allowance(0.0)
    one = Session(Role.SERVER, End(Role.SERVER), now=0.0, allowance=allowance)
    pings = memoryview(bytearray(1) + frame(PING, SYN, 0, 0) * 3000)
    with pytest.raises(FloodError, match="frames that move nothing"):
        one.receive(pings, 1, len(pings), 0.0)
    room = memoryview(bytearray(100))
    assert frames(bytes(room[: one.take_control(room, 0, 100)])) == [(GO_AWAY, 0, 0, ResetCode.RATE_LIMITED, b"")]
    another = Session(Role.SERVER, End(Role.SERVER), now=1.0, allowance=allowance)
    with pytest.raises(FloodError):
        another.receive(pings, 1, 13, 1.0)
    later = Session(Role.SERVER, End(Role.SERVER), now=8.0, allowance=allowance)
    later.receive(pings, 1, 13, 8.0)


def test_a_reader_that_grants_each_little_frame_anew_is_well_behaved():
    server = End(Role.SERVER)
    server.feed(frame(WINDOW_UPDATE, SYN, 1, 0))
    room = memoryview(bytearray(12))
    for _ in range(20_000):
        server.session.data_header(room, 0, server.opened[0], 1)
        server.feed(frame(WINDOW_UPDATE, 0, 1, 1))
    assert server.opened[0].send_window == INITIAL_WINDOW


def test_what_was_sent_long_ago_is_no_store_of_small_updates():
    server = End(Role.SERVER)
    server.feed(frame(WINDOW_UPDATE, SYN, 1, 0))
    room = memoryview(bytearray(12))
    for _ in range(50_000):
        server.session.data_header(room, 0, server.opened[0], 1)
    with pytest.raises(FloodError):
        server.feed(frame(WINDOW_UPDATE, 0, 1, 1) * 10_000)


def test_answers_that_nobody_reads_end_the_session():
    server = End(Role.SERVER, idle_frames=1_000_000, control_bytes=1200)
    with pytest.raises(FloodError):
        server.feed(frame(PING, SYN, 0, 0) * 102)


def test_what_we_say_of_ourselves_never_fails_for_a_peer_that_does_not_read():
    """It is said from timers and handlers, where an error would end the whole process and not one session."""
    server = End(Role.SERVER, idle_frames=1_000_000, control_bytes=1200)
    server.feed(frame(WINDOW_UPDATE, SYN, 1, 0) + frame(WINDOW_UPDATE, SYN, 3, 0) + frame(PING, SYN, 0, 0) * 100)
    server.session.ping(7)
    server.session.finish(server.opened[0])
    for stream in server.session:
        server.session.reset(stream, ResetCode.SHUTDOWN)
    assert server.session.streams == 0
    with pytest.raises(FloodError):
        server.feed(frame(PING, SYN, 0, 0))


def test_the_allowance_refills():
    server = End(Role.SERVER)
    for second in range(100):
        server.now = float(second)
        server.feed(frame(PING, SYN, 0, 0) * 150)
        assert len(server.said()) == 150


def test_pieces_of_control_are_whole_frames():
    client = End(Role.CLIENT)
    for value in range(10):
        client.session.ping(value)
    room = memoryview(bytearray(100))
    taken = b""
    while client.session.has_control:
        length = client.session.take_control(room, 3, 30)
        assert length in (12, 24)
        taken += room[3 : 3 + length]
    assert [value for _, _, _, value, _ in frames(taken)] == list(range(10))


class Pair(RuleBasedStateMachine):
    """Two sessions with a pipe each way that cuts anywhere. What was sent is what arrives, within the windows."""

    def __init__(self):
        super().__init__()
        self.ends = {Role.CLIENT: End(Role.CLIENT), Role.SERVER: End(Role.SERVER)}
        self.pipes = {Role.CLIENT: bytearray(), Role.SERVER: bytearray()}  # towards
        self.sent = {Role.CLIENT: defaultdict(bytearray), Role.SERVER: defaultdict(bytearray)}  # by
        self.reset = set()
        self.now = 0.0
        self.fill = random.Random(1)

    def flush(self, role):
        end = self.ends[role]
        room = memoryview(bytearray(1 << 16))
        other = Role.SERVER if role is Role.CLIENT else Role.CLIENT
        self.pipes[other] += room[: end.session.take_control(room, 0, len(room))]
        return other

    def streams(self, role):
        return sorted(self.ends[role].session, key=lambda stream: stream.id)

    @rule(role=st.sampled_from(Role))
    def open(self, role):
        if self.ends[role].session.streams < 20:
            self.ends[role].session.open(self.now)
            self.flush(role)

    @rule(role=st.sampled_from(Role), which=st.integers(0, 30), size=st.integers(1, 70_000))
    def send(self, role, which, size):
        able = [s for s in self.streams(role) if not s.local_finished and s.send_window]
        if able:
            stream = able[which % len(able)]
            body = self.fill.randbytes(min(size, stream.send_window))
            other = self.flush(role)
            self.pipes[other] += self.ends[role].send(stream, body)
            self.sent[role][stream.id] += body

    @rule(role=st.sampled_from(Role), which=st.integers(0, 30))
    def finish(self, role, which):
        if able := self.streams(role):
            self.ends[role].session.finish(able[which % len(able)])
            self.flush(role)

    @rule(role=st.sampled_from(Role), which=st.integers(0, 30), code=st.integers(0, 0xFFFF_FFFF))
    def reset_stream(self, role, which, code):
        if able := self.streams(role):
            stream = able[which % len(able)]
            self.ends[role].session.reset(stream, code)
            self.reset.add(stream.id)
            self.flush(role)

    @rule(role=st.sampled_from(Role), cut=st.integers(1, 200_000))
    def carry(self, role, cut):
        pipe = self.pipes[role]
        part, self.pipes[role] = bytes(pipe[:cut]), pipe[cut:]
        self.ends[role].feed(part)
        self.flush(role)

    @rule(role=st.sampled_from(Role), which=st.integers(0, 30), part=st.floats(0, 1), wait=st.floats(0, 0.1))
    def consume(self, role, which, part, wait):
        self.now += wait
        waiting = [s for s in self.streams(role) if s.undelivered]
        if waiting:
            stream = waiting[which % len(waiting)]
            length = max(1, int(stream.undelivered * part))
            self.ends[role].session.consumed(stream, length, self.now)
            self.flush(role)

    @invariant()
    def what_arrived_was_sent(self):
        for role, other in ((Role.CLIENT, Role.SERVER), (Role.SERVER, Role.CLIENT)):
            for stream_id, body in self.ends[role].received.items():
                sent = self.sent[other][stream_id]
                assert sent[: len(body)] == body
                if stream_id in self.ends[role].finished and stream_id not in self.reset:
                    assert sent == body

    @invariant()
    def windows_hold(self):
        for end in self.ends.values():
            for stream in end.session:
                if not stream.remote_finished:
                    assert stream.receive_window >= 0
                    assert stream.receive_window + stream.undelivered <= stream.window <= 16 << 20
                assert stream.send_window >= 0

    def teardown(self):
        for _ in range(3):
            for role in Role:
                self.flush(role)
            for role in Role:
                self.ends[role].feed(bytes(self.pipes[role]))
                self.pipes[role].clear()
        for role, other in ((Role.CLIENT, Role.SERVER), (Role.SERVER, Role.CLIENT)):
            for stream_id, body in self.sent[other].items():
                if stream_id not in self.reset:
                    assert self.ends[role].received[stream_id] == body
        known = [{stream.id for stream in end.session} for end in self.ends.values()]
        assert known[0] == known[1]


Pair.TestCase.settings = settings(
    max_examples=60, stateful_step_count=60, deadline=None, suppress_health_check=list(HealthCheck)
)
TestPair = Pair.TestCase


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 31), st.integers(0, 6), st.integers(0, 300_000)), max_size=30)
)
def test_any_frames_are_taken_or_refused(headers):
    server = End(Role.SERVER)
    try:
        for kind, flags, stream, length in headers:
            server.feed(frame(kind, flags, stream, length, bytes(length) if kind == DATA else b""))
    except YamuxError:
        assert server.session.local_gone
    assert server.session.streams == sum(1 for _ in server.session)


sizes = st.integers(1, 3 * INITIAL_WINDOW)


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.just("send"), sizes)
        | st.tuples(st.just("consume"), sizes)
        | st.tuples(st.just("behind"), sizes)
        | st.tuples(st.just("resize"), st.integers(0, 2**26)),
        max_size=60,
    ),
    st.integers(0, 1023),
)
def test_a_sender_is_always_let_go_on_however_the_window_is_resized(events, unused):
    """`unused`: what a sender leaves of its window, since it is not worth a frame."""
    client, server = End(Role.CLIENT), End(Role.SERVER)
    stream = client.session.open(0.0)
    server.feed(b"".join(client.said_raw()))
    (inbound,) = server.opened
    waiting = 0

    def send(most):
        nonlocal waiting
        length = min(most, stream.send_window, 60_000)
        if stream.send_window - length < unused:
            length = stream.send_window - unused
        if length > 0:
            server.feed(client.send(stream, bytes(length)))
            waiting += length

    def consume(most, *, behind=False):
        nonlocal waiting
        length = min(most, waiting)
        waiting -= length
        server.now += 0.001
        server.session.consumed(inbound, length, server.now, behind=behind)
        client.feed(b"".join(server.said_raw()))

    for what, size in events:
        if what == "send":
            send(size)
        elif what == "resize":
            server.session.resize(inbound, size)
        else:
            consume(size, behind=what == "behind")
        assert stream.send_window == inbound.receive_window
        assert inbound.window >= LEAST_WINDOW
    sent = len(server.received[inbound.id])
    for _ in range(200):
        send(60_000)
        consume(waiting, behind=True)
    assert len(server.received[inbound.id]) > sent + 100 * (LEAST_WINDOW // 4)


def test_a_smaller_window_takes_effect_as_bytes_are_consumed():
    server = End(Role.SERVER)
    server.feed(data(1, bytes(INITIAL_WINDOW), SYN))
    (stream,) = server.opened
    server.session.resize(stream, 32 * 1024)
    assert not server.session.consumed(stream, INITIAL_WINDOW - 26 * 1024, 9.0)
    assert server.session.consumed(stream, 2 * 1024, 19.0)
    assert stream.receive_window == 8 * 1024
    assert server.session.consumed(stream, 24 * 1024, 29.0)
    assert stream.receive_window == 32 * 1024
    server.session.resize(stream, 2**30)
    assert stream.window == INITIAL_WINDOW, "more than at the start only for a fast reader"


def test_a_stream_that_was_recalled_is_refused_and_others_are_not():
    server = End(Role.SERVER)
    server.feed(frame(WINDOW_UPDATE, SYN, 3, 0))
    recall = server.session.recall
    assert [recall(number) for number in (1, 3, 2, 5, 5)] == [False, False, False, True, True]
    server.said()
    server.feed(data(5, b"late", SYN) + frame(WINDOW_UPDATE, SYN, 7, 0))
    assert server.said() == [(WINDOW_UPDATE, RST, 5, ResetCode.CONNECTION_LOST, b"")]
    assert [stream.id for stream in server.session] == [3, 7]
