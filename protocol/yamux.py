"""yamux: many streams over one connection (libp2p specs, yamux/README.md; github.com/hashicorp/yamux spec.md).

Theory of operation. Everything is a frame: a header of 12 bytes, and after a data frame's header as many bytes as its
length says. A stream has two directions, each ended by FIN; RST ends both at once. A stream's life, seen from one side:

    opened  --FIN sent-->      local finished   --FIN received--> gone
    opened  --FIN received-->  remote finished  --FIN sent-->     gone
    any     --RST sent or received-->  gone

SYN travels with the first frame of whoever opened the stream, ACK with the first frame of the other. Data may follow
SYN at once. Each side may send as many bytes on a stream as the other granted: 256 KiB at the start, more by window
updates. Who sends more has broken the protocol. Bytes are granted anew only after the consumer reported them delivered
(:meth:`Session.consumed`), so what waits for a slow reader is never more than one window. A window starts at 256 KiB
and doubles while its reader empties it quickly, up to a limit for the stream and a budget for all of the session; and
while its reader empties it as quickly as another one a larger window, up to that, so that streams share evenly. A
consumer that would rather have less under way says so (:meth:`Session.resize`); what was granted stays granted, and the
next grants wait until so much has been consumed.

Reset codes and go-away codes travel in the length field (as go-yamux 5 does it); others send and read 0 there.

Not every oddity is an attack. Implementations differ, and some let go of a stream before they have announced it, so
frames for streams that never were, data behind FIN and unknown flags are passed over and charged to that allowance.
The session ends where the two sides can no longer agree on what the bytes mean, or where a bound that both know was
broken; docs/protocols.md compares these cases with what other implementations do.

A session does no I/O. It is fed with :meth:`Session.receive` and calls its :class:`Consumer` back, synchronously, with
views into the very buffer that it was fed with: nothing is copied. What it has to say by itself (window updates, pings,
resets) collects as ready frames, to be fetched by :meth:`Session.take_control`; data frames are the caller's
to lay out, with headers made by :meth:`Session.data_header`, for it is the caller who chooses among streams.

Against a peer that means harm: inbound streams are limited, all and unacknowledged ones apart; whatever costs us work
and moves little (pings, surplus streams, streams taken back, empty and tiny frames, needless window updates) is
charged to the peer's allowance (`protocol.allowance`), and what it asks to be answered is bounded. Whoever exceeds
these has the session closed. What we say of ourselves is at most one waiting frame for each stream, and never held
against the peer. Surplus streams are refused ever more slowly before they count as a flood.
"""

from __future__ import annotations

import dataclasses
import enum
import struct
from collections import deque
from collections.abc import Iterator
from typing import Any, Final, Protocol

from protocol import allowance as costs
from protocol.allowance import Allowance
from protocol.errors import LimitExceededError, ProtocolError
from protocol.stream_descriptor import ResetCode
from protocol.token_bucket import TokenBucket

PROTOCOL_ID: Final = "/yamux/1.0.0"
HEADER_LENGTH: Final = 12
INITIAL_WINDOW: Final = 256 * 1024
MAX_WINDOW: Final = 0xFFFF_FFFF
LEAST_WINDOW: Final = 8 * 1024
"""Bytes that a window is never made smaller than."""

DATA: Final = 0
WINDOW_UPDATE: Final = 1
PING: Final = 2
GO_AWAY: Final = 3

SYN: Final = 1
ACK: Final = 2
FIN: Final = 4
RST: Final = 8

_FLAGS: Final = SYN | ACK | FIN | RST

_LEAST_ROOM: Final = 16  # streams that a peer is always believed to take
_ROOM_GROWTH: Final = 0.25  # by how much of itself the room is believed to have grown after a second
_UNANSWERED: Final = (150.0, 1000.0)  # streams of ours that may come to nothing, in a second and at once
_NO_GREETING: Final = 1 << 62  # bytes; until it is known how many there were
_PARKED: Final = 512  # streams of the peer's that are refused later
_RECALLED: Final = 4096  # streams of one session that are refused if they come
_CHARGED_AT: Final = 10_000.0  # units that small frames may cost before the allowance is charged
_WIDEST_LASTS: Final = 2.0  # seconds for which the stream with the largest window is one that others share with
_UPDATES_AT_FIRST: Final = 16  # window updates that need no data: peers announce their windows, which grow
_ROUND_TRIPS: Final = 8  # that all have to be so long before a path counts as another one than before
_LONGER: Final = 4.0  # times the least round trip, and
_LONGER_BY: Final = 0.05  # seconds: what a queue of our own does not make of it where windows are bounded
_SMALL_UPDATE: Final = 512  # bytes; a window that moves by less makes more work than it is worth
_NO_ROOM: Final = frozenset({ResetCode.NONE, ResetCode.LIMIT_EXCEEDED})  # why a stream that got no word is reset
_UPDATES_DUE: Final = 4096  # small updates that may be waited for: more than frames are under way

_HEADER: Final = struct.Struct(">BBHII")
_MAX_STREAM_ID: Final = 0xFFFF_FFFF


class GoAwayCode(enum.IntEnum):
    """Why a session ends."""

    NORMAL = 0
    PROTOCOL_ERROR = 1
    INTERNAL_ERROR = 2


class YamuxError(ProtocolError):
    """The peer broke the yamux protocol; the session is over."""

    code = "yamux"


class WindowExceededError(YamuxError):
    """The peer sent more than it was granted."""

    code = "yamux-window"


class FloodError(YamuxError, LimitExceededError):
    """The peer keeps us busy with frames that move nothing."""

    code = "yamux-flood"


class GoneAwayError(YamuxError):
    """No stream can be opened: one side said go away, or stream ids are used up."""

    code = "yamux-gone-away"


class StreamIdsUsedUpError(GoneAwayError):
    """No stream can be opened: the session has used all ids that there are for its streams."""

    code = "yamux-ids-used-up"


class TooManyStreamsError(LimitExceededError):
    """No stream can be opened now: too many are open, or too many not yet acknowledged."""

    code = "too-many-streams"


class BacklogError(TooManyStreamsError):
    """No stream can be opened now: the peer has yet to accept those that were opened before."""


class Role(enum.Enum):
    """Who dialled: the client's streams have odd ids, the server's even ones."""

    CLIENT = 1
    SERVER = 2


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one session may cost.

    Attributes:
        inbound_streams, outbound_streams: open at a time, by who opened them. A peer of our kind accepts 1024.
        own_streams: besides the outbound ones, for what the node itself opens, such as pings.
        total_streams: both kinds together beyond which none is opened.
        unacknowledged: streams opened and not yet acknowledged, each way (the spec's ACK backlog).
        stream_window: bytes; the most that a stream's window may grow to.
        session_window: bytes; the most by which all windows together may have grown beyond their start.
        fast: seconds; a reader that takes half a window within this, or within four round trips, gets a larger one.
        idle_frames: frames that move nothing for which a session without an allowance of its peer's has one.
        idle_frames_rate: by how many that refills in a second.
        control_bytes: answers that the peer asks for and that may wait; if it asks for more, the session is closed.
    """

    inbound_streams: int = 1024
    outbound_streams: int = 992
    own_streams: int = 16
    total_streams: int = 4096
    unacknowledged: int = 256
    stream_window: int = 16 * 1024 * 1024
    session_window: int = 64 * 1024 * 1024
    fast: float = 0.02
    idle_frames: int = 2000
    idle_frames_rate: float = 200.0
    control_bytes: int = 64 * 1024


DEFAULT_LIMITS: Final = Limits()


class Stream:
    """The session's record of one stream. Read it; change it only through the session.

    Attributes:
        id: as on the wire.
        inbound: the peer opened it.
        send_window: bytes that may be sent now.
        receive_window: bytes that the peer may still send.
        window: the size that `receive_window` is refilled to.
        undelivered: bytes received that :meth:`Session.consumed` was not told of.
        received: bytes that the peer has sent.
        greeting: of them, those that came before anybody answered: until more come, a stream of ours is unanswered.
        deposit: what the peer was charged for the stream and gets back when the stream is answered.
        silence: bytes that are sent to the peer before that.
        exempt: its data frames are charged to somebody else.
        local_finished, remote_finished: FIN was sent, received.
        closed: gone from the session.
        owner: whatever the consumer keeps with it.
    """

    __slots__ = (
        "acknowledged",
        "closed",
        "deposit",
        "exempt",
        "flags",
        "greeting",
        "id",
        "inbound",
        "local_finished",
        "owner",
        "receive_window",
        "received",
        "refilled_at",
        "remote_finished",
        "send_window",
        "silence",
        "stalled",
        "undelivered",
        "window",
    )

    def __init__(self, stream_id: int, *, inbound: bool, now: float) -> None:
        self.id = stream_id
        self.inbound = inbound
        self.send_window = INITIAL_WINDOW
        self.receive_window = INITIAL_WINDOW
        self.window = INITIAL_WINDOW
        self.undelivered = 0
        self.received = 0
        self.greeting = _NO_GREETING
        self.deposit = 0.0
        self.silence = 0
        self.exempt = False
        self.local_finished = False
        self.remote_finished = False
        self.closed = False
        self.acknowledged = False
        self.flags = ACK if inbound else SYN  # to travel with the next frame of this stream
        self.refilled_at = now
        self.stalled = False  # the reader fell behind since the window was last refilled
        self.owner: Any = None

    def __repr__(self) -> str:
        return f"<Stream {self.id}{' inbound' if self.inbound else ''}{' closed' if self.closed else ''}>"


class Consumer(Protocol):
    """What a session calls while it is fed. It may call the session back, except for :meth:`Session.receive`."""

    def stream_opened(self, stream: Stream) -> None:
        """The peer opened a stream. It is acknowledged with the first frame sent on it (or `acknowledge`)."""

    def stream_data(self, stream: Stream, buffer: memoryview, start: int, end: int) -> None:
        """Bytes of a stream: `buffer[start:end]`, good until the call returns.

        `start` is at least 1. Of the `HEADER_LENGTH` bytes before it those that the buffer has are of no use to anybody
        any more: they may be overwritten.
        """

    def stream_finished(self, stream: Stream) -> None:
        """The peer will send no more on this stream."""

    def stream_reset(self, stream: Stream, code: int) -> None:
        """The peer ended this stream; it is closed."""

    def window_opened(self, stream: Stream) -> None:
        """More may be sent on this stream than before."""

    def pong(self, value: int) -> None:
        """The answer to a ping of ours."""

    def gone_away(self, code: int) -> None:
        """The peer opens no more streams and accepts none. With another code than NORMAL it closes all, too."""


class Session:
    """One end of a yamux session.

    Attributes:
        least_rtt: seconds; a round trip without what waits on the way, as far as is known (:meth:`measured`).
        remote_gone, local_gone: who said go away.
        frames_received: counts headers.
        ends: counts the ends of streams, FIN and RST, that were laid out.
    """

    def __init__(
        self,
        role: Role,
        consumer: Consumer,
        *,
        now: float,
        limits: Limits = DEFAULT_LIMITS,
        allowance: Allowance | None = None,
        next_id: int | None = None,
    ) -> None:
        """A session that begins. `allowance` is the peer's, shared by all its sessions; `next_id` that of our first
        stream, if not the usual one.
        """
        self.least_rtt = 0.0
        self._round_trips: deque[float] = deque(maxlen=_ROUND_TRIPS)
        self.remote_gone = False
        self.local_gone = False
        self.frames_received = 0
        self.ends = 0
        self._consumer = consumer
        self._limits = limits
        self._streams: dict[int, Stream] = {}
        self._next_id = next_id or (1 if role is Role.CLIENT else 2)
        self._last_remote_id = 0
        self._recalled: set[int] = set()  # streams of the peer that will be refused if they come
        self._own_parity = self._next_id & 1
        self._inbound = 0
        self._inbound_unacknowledged = 0
        self._outbound_unacknowledged = 0
        self._updates_due = 0  # small window updates that data frames of ours are worth
        self._large_updates_due = _UPDATES_AT_FIRST  # and others
        self._grown = 0  # bytes by which windows have grown, all streams
        self._widest = 0  # bytes; the largest window that was refilled lately,
        self._widest_took = 0.0  # seconds since it was refilled before that,
        self._widest_at = 0.0  # and when that was
        self._answers = bytearray()  # pings, their answers, and refusals: ready frames
        self._frames: dict[int, tuple[int, int]] = {}  # one frame of each stream: flags and length
        self._resets = 0  # of them, those of the peer's streams that we have reset
        self._announce: list[Stream] = []
        self._parked: deque[int] = deque()  # streams that will be refused, but not at once
        self._room = float(limits.outbound_streams)  # that we believe the peer to have
        self._room_at = now
        self._unanswered = TokenBucket(*_UNANSWERED, now)
        self._now = now
        self._header = bytearray()  # the beginning of a header that came in pieces
        self._body_left = 0
        self._body_stream: Stream | None = None
        self._body_flags = 0
        self._allowance = allowance or Allowance(
            now, burst=limits.idle_frames * costs.IDLE, rate=limits.idle_frames_rate * costs.IDLE
        )
        self._small = 0.0  # what small frames have cost since the allowance was last charged

    # ---- streams, from our side

    @property
    def streams(self) -> int:
        """Open streams, both directions."""
        return len(self._streams)

    def __iter__(self) -> Iterator[Stream]:
        """The open streams, as they are now."""
        return iter(list(self._streams.values()))

    @property
    def ids_left(self) -> int:
        """How many more streams can be opened in all."""
        return max(0, (_MAX_STREAM_ID - self._next_id) // 2 + 1)

    def open(self, now: float, *, own: bool = False) -> Stream:
        """Open a stream. Its SYN goes out with the next `take_control`; drain that before any data is laid out.

        There are never more than the peer takes, as far as that is known: it would reset the surplus, and some peers
        end the session. `own` streams, which the node itself needs, find room when others do not any more.

        Raises:
            GoneAwayError: never again on this session.
            TooManyStreamsError: not now; a `BacklogError` if it is worth a try in a moment.
        """
        limits = self._limits
        self._now = now
        if self.remote_gone or self.local_gone:
            raise GoneAwayError("the session takes no more streams")
        if self._next_id > _MAX_STREAM_ID:
            raise StreamIdsUsedUpError("all stream ids of the session are used up")
        outbound = len(self._streams) - self._inbound
        more = limits.own_streams if own else 0
        if outbound >= limits.outbound_streams + more or len(self._streams) >= limits.total_streams + more:
            raise TooManyStreamsError(f"{outbound} streams to the peer are open, as many as it takes")
        if outbound >= self._known_room(now) and not own:
            raise BacklogError(f"the peer refuses more than {outbound} streams at present")
        if not own and self._unanswered.level(now) < 1:
            raise BacklogError("the peer has just left many streams unanswered")
        if self._outbound_unacknowledged >= self._limits.unacknowledged:
            raise BacklogError(f"{self._limits.unacknowledged} streams wait for the peer to accept them")
        stream = Stream(self._next_id, inbound=False, now=now)
        if own:
            stream.greeting = -1
        self._next_id += 2
        self._streams[stream.id] = stream
        self._outbound_unacknowledged += 1
        self._announce.append(stream)
        return stream

    @property
    def has_room(self) -> bool:
        """Whether fewer streams are open than the peer takes."""
        outbound = len(self._streams) - self._inbound
        return outbound < self._limits.outbound_streams and len(self._streams) < self._limits.total_streams

    def _known_room(self, now: float) -> float:
        """How many streams the peer is believed to take: fewer since it refused one, and more again with time."""
        most = self._limits.outbound_streams
        if self._room < most:
            self._room = min(most, self._room + (1 + self._room * _ROOM_GROWTH) * (now - self._room_at))
        self._room_at = now
        return self._room

    @property
    def newest_inbound(self) -> int:
        """The highest id of a stream that the peer has opened; 0 without one."""
        return self._last_remote_id

    def recall(self, stream_id: int) -> bool:
        """Whether this stream of the peer's has not reached us; it never will then: it is refused if it comes."""
        if (
            stream_id & 1 == self._own_parity
            or not self._last_remote_id < stream_id <= _MAX_STREAM_ID
            or len(self._recalled) >= _RECALLED
        ):
            return stream_id in self._recalled
        self._recalled.add(stream_id)
        return True

    def acknowledge(self, stream: Stream) -> None:
        """Accept an inbound stream without waiting for a first frame to send on it."""
        if stream.flags and not stream.closed:
            self._announce.append(stream)

    def data_header(self, buffer: memoryview, offset: int, stream: Stream, length: int) -> None:
        """Write the header of a data frame at `buffer[offset:offset + 12]` and charge the send window.

        The caller has checked that `length` is at most `stream.send_window` and that the stream is not finished.
        """
        flags = stream.flags
        if flags:
            stream.flags = 0
            self._flags_sent(stream, flags)
        stream.send_window -= length
        if self._updates_due < _UPDATES_DUE:
            self._updates_due += 1
        if self._large_updates_due < _UPDATES_DUE:
            self._large_updates_due += 1 + (length >> 16)
        self._small -= min(costs.ANSWER_MOST, costs.ANSWER + length * costs.ANSWER_BYTE)
        if stream.deposit:
            stream.silence -= length
            if stream.silence < 0:
                self._small -= stream.deposit
                stream.deposit = 0.0
        _HEADER.pack_into(buffer, offset, 0, DATA, flags, stream.id, length)

    def finish(self, stream: Stream) -> None:
        """Half-close: after all data laid out so far. Twice is once."""
        if stream.closed or stream.local_finished:
            return
        stream.local_finished = True
        self.ends += 1
        self._stream_control(stream, FIN, 0)
        if stream.remote_finished:
            self._remove(stream)

    def reset(self, stream: Stream, code: int = ResetCode.NONE) -> None:
        """End both directions at once. Nothing is called back. A closed stream stays closed."""
        if stream.closed:
            return
        waiting, _ = self._frames.pop(stream.id, (0, 0))
        announced = stream.inbound or not (stream.flags | waiting) & SYN  # else the peer has never heard of it
        stream.flags = 0
        if announced:
            self.ends += 1
            self._frames[stream.id] = (RST, code)
            self._resets += stream.inbound
        self._remove(stream)

    def consumed(self, stream: Stream, length: int, now: float, *, behind: bool = False) -> bool:
        """The consumer delivered `length` more bytes of this stream; grant new ones when enough have gone.

        `behind`: the bytes had to wait for their reader; a window does not grow while they do.
        Returns whether a window update was queued.
        """
        stream.undelivered -= length
        if behind:
            stream.stalled = True
        if stream.remote_finished or stream.closed:
            return False
        # what the peer may send plus what waits here fills up the window; the rest can be granted
        grant = stream.window - stream.receive_window - stream.undelivered
        if stream is self._body_stream:
            grant -= self._body_left  # what has yet to come of the present frame: its header charged all of it
        # a window that was made small leaves no room for grants to come late
        if grant < stream.window >> (1 if stream.window >= INITIAL_WINDOW else 2):
            return False
        elapsed = now - stream.refilled_at
        stream.refilled_at = now
        if not stream.stalled:
            most = stream.window
            if elapsed < max(4 * self.least_rtt, self._limits.fast):
                most = self._limits.stream_window
            elif self._is_held_back(stream, elapsed, now):
                most = self._widest
            growth = min(stream.window, most - stream.window)
            growth = min(growth, self._limits.session_window - self._grown)
            if growth > 0:
                self._set_window(stream, stream.window + growth)
                grant += growth
        stream.stalled = False
        if stream.window >= self._widest or now - self._widest_at > _WIDEST_LASTS:
            self._widest, self._widest_took, self._widest_at = stream.window, elapsed, now
        stream.receive_window += grant
        self._stream_control(stream, 0, grant)
        return True

    def _is_held_back(self, stream: Stream, elapsed: float, now: float) -> bool:
        """Whether only its window makes a stream slower than another: each uses up its own in about the same time.

        Otherwise streams would for ever share a connection in the proportion of the windows that they happened to have
        when it became busy.
        """
        return (
            INITIAL_WINDOW <= stream.window < self._widest
            and elapsed < 2 * self._widest_took
            and now - self._widest_at < _WIDEST_LASTS
        )

    def resize(self, stream: Stream, window: int) -> None:
        """Let the window be of this size from now on, but no larger than it is, or was at the start.

        A smaller one takes effect as bytes are consumed that are not granted anew. Nothing that the peer may still send
        is taken back, so it never stands still for good: when all of that has come and been consumed, the grant is a
        whole window.
        """
        self._set_window(stream, min(max(window, LEAST_WINDOW), max(stream.window, INITIAL_WINDOW)))

    def charge(self, cost: float) -> None:
        """Charge the peer's allowance, with the next frames that come from it, for work that is not to be seen here."""
        self._small += cost

    def charge_until_answered(self, stream: Stream, cost: float, *, waiting: int) -> None:
        """Charge the peer for this stream until more is sent to it than the `waiting` bytes that are not sent yet."""
        self._small += cost
        stream.deposit, stream.silence = cost, waiting

    def measured(self, rtt: float) -> None:
        """A ping of ours took so many seconds."""
        self._round_trips.append(rtt)
        lately = min(self._round_trips)
        if (
            not self.least_rtt
            or lately < self.least_rtt
            or (len(self._round_trips) == _ROUND_TRIPS and lately > _LONGER * self.least_rtt + _LONGER_BY)
        ):
            self.least_rtt = lately

    def ping(self, value: int) -> None:
        """Ask for an answer that carries this 32-bit value back."""
        self._answer(PING, SYN, 0, value & 0xFFFF_FFFF)

    def go_away(self, code: int = GoAwayCode.NORMAL) -> None:
        """Take and open no more streams from now on."""
        self.local_gone = True
        self._answer(GO_AWAY, 0, 0, code)

    def take_control(self, buffer: memoryview, offset: int, room: int) -> int:
        """Move waiting control frames, whole ones, at most `room` bytes, to `buffer[offset:]`. Returns the bytes."""
        if self._announce:
            for stream in self._announce:
                if stream.flags and not stream.closed:
                    self._stream_control(stream, 0, 0)
            self._announce.clear()
        position, end = offset, offset + room - HEADER_LENGTH
        frames = self._frames
        while frames and position <= end:
            stream_id = next(iter(frames))
            flags, length = frames.pop(stream_id)
            if flags & RST and stream_id & 1 != self._own_parity:
                self._resets -= 1
            _HEADER.pack_into(buffer, position, 0, WINDOW_UPDATE, flags, stream_id, length)
            position += HEADER_LENGTH
        if (answers := self._answers) and position <= end:
            left = offset + room - position
            length = min(len(answers), left - left % HEADER_LENGTH)
            buffer[position : position + length] = answers[:length]
            del answers[:length]
            position += length
        return position - offset

    @property
    def has_control(self) -> bool:
        """Something waits for `take_control`."""
        return bool(self._answers or self._frames or self._announce)

    @property
    def parked(self) -> int:
        """Streams beyond the limit that wait for their refusal; call `refuse_parked` now and then while there are."""
        return len(self._parked)

    def refuse_parked(self, now: float) -> None:
        """Refuse those surplus streams for which the peer's allowance has recovered.

        A program that opens another stream as soon as one is refused is slowed down so, and not taken for a flood.
        """
        while self._parked and self._allowance.level(now) >= 2 * costs.SURPLUS:
            self._refuse_surplus(self._parked.popleft(), now)

    # ---- bytes, from the peer

    def receive(self, buffer: memoryview, start: int, end: int, now: float) -> None:
        """Take `buffer[start:end]`, cut anywhere. `start` is at least 1; parts of the buffer may be overwritten.

        Raises:
            YamuxError: the peer broke the protocol; send what `take_control` gives (a go away) and close.
        """
        try:
            self._receive(buffer, start, end, now)
            self._settle_small(now)
        except ProtocolError as error:
            if not self.local_gone:
                self._answers.clear()
                self._frames.clear()
                self._resets = 0
                flood = isinstance(error, FloodError)
                self.go_away(ResetCode.RATE_LIMITED if flood else GoAwayCode.PROTOCOL_ERROR)
            raise

    def _receive(self, buffer: memoryview, start: int, end: int, now: float) -> None:
        allowance = self._allowance
        allowance.recover(now)
        self._now = now
        position = start
        while position < end:
            left = self._body_left
            if left:
                stop = min(position + left, end)
                self._body_left = left = left - (stop - position)
                stream = self._body_stream
                if stream is not None and not stream.closed:
                    stream.undelivered += stop - position
                    self._consumer.stream_data(stream, buffer, position, stop)
                position = stop
                if not left and self._body_flags:
                    self._end_of_frame()
                continue
            header = self._header
            if header or end - position < HEADER_LENGTH:
                missing = HEADER_LENGTH - len(header)
                header += buffer[position : min(position + missing, end)]
                position += missing
                if len(header) < HEADER_LENGTH:
                    return
                version, kind, flags, stream_id, length = _HEADER.unpack(header)
                header.clear()
            else:
                version, kind, flags, stream_id, length = _HEADER.unpack_from(buffer, position)
                position += HEADER_LENGTH
            self.frames_received += 1
            if allowance.exhausted or self._resets or self._answers:
                self._check_bounds()
            if flags > _FLAGS:
                self._spend(now)
                flags &= _FLAGS
            if kind <= WINDOW_UPDATE and not version:
                self._stream_frame(kind, flags, stream_id, length, now)
            else:
                self._session_frame(version, kind, flags, length, now)

    def _check_bounds(self) -> None:
        if self._allowance.exhausted:
            raise FloodError(self._allowance.reason)
        waiting = len(self._answers) + HEADER_LENGTH * self._resets
        if waiting > self._limits.control_bytes and not self.local_gone:
            raise FloodError("the peer asks for more answers than it reads")

    def _session_frame(self, version: int, kind: int, flags: int, length: int, now: float) -> None:
        # Some implementations put a stream id into these frames. It says nothing.
        if version:
            raise YamuxError(f"a frame of version {version}")
        if kind == PING:
            self._ping(flags, length, now)
        elif kind == GO_AWAY:
            self._spend(now)
            self.remote_gone = True
            self._consumer.gone_away(length)
        else:
            raise YamuxError(f"a frame of unknown type {kind}")

    def _stream_frame(self, kind: int, flags: int, stream_id: int, length: int, now: float) -> None:
        stream = self._streams.get(stream_id)
        if flags or stream is None or not length:
            if flags & SYN:
                stream = self._syn(stream, stream_id, now)
            else:
                self._examine(stream, flags, stream_id, length, now)
            if flags & RST:
                self._reset_by_peer(stream, kind, length, now)
                return
        if kind == DATA:
            if stream is None:
                self._small += costs.FRAME
            else:
                stream = self._charge_data(stream, length, now)
            self._body_left = length
            self._body_stream = stream
            self._body_flags = flags & FIN
            if not length and flags & FIN:
                self._end_of_frame()
            return
        if length:
            self._window_update(stream, length, now)
        if flags & FIN:
            self._body_stream = stream
            self._end_of_frame()

    def _charge_data(self, stream: Stream, length: int, now: float) -> Stream | None:
        """Charge a data frame to its stream's window and to the peer. The stream, if it gets the data."""
        if length > stream.receive_window:
            raise WindowExceededError(
                f"{length} bytes on stream {stream.id}, where {stream.receive_window} are allowed"
            )
        stream.receive_window -= length
        stream.received += length
        if not stream.exempt:
            self._small += costs.FRAME - length * costs.BYTE
            if self._small > _CHARGED_AT:
                self._settle_small(now)
        if length and stream.remote_finished:
            self._spend(now)
            return None  # it is not granted anew, so there can be no more than one window of it
        return stream

    def _window_update(self, stream: Stream | None, length: int, now: float) -> None:
        if length < _SMALL_UPDATE:
            if self._updates_due:
                self._updates_due -= 1
            else:
                self._spend(now)
        elif self._large_updates_due > 0:
            self._large_updates_due -= 1
        else:
            self._spend(now, costs.UPDATE, "window updates that nothing was sent for")
        if stream is not None and not stream.local_finished:
            stream.send_window += length
            if stream.send_window > MAX_WINDOW:
                raise YamuxError(f"the window of stream {stream.id} overflows")
            self._consumer.window_opened(stream)

    def _examine(self, stream: Stream | None, flags: int, stream_id: int, length: int, now: float) -> None:
        """Look at a frame without SYN that has flags, no stream or no length."""
        if stream is None and not self._was_opened(stream_id):
            if not flags & RST:  # that is charged anyway
                self._spend(now)
            return
        if stream is not None and flags & ACK and not stream.inbound and not stream.acknowledged:
            stream.acknowledged = True
            self._outbound_unacknowledged -= 1
            return
        if not length and not flags & RST and (stream is None or stream.remote_finished or not flags & FIN):
            self._spend(now)

    def _end_of_frame(self) -> None:
        """FIN takes effect after the data of its frame."""
        stream = self._body_stream
        self._body_flags = 0
        self._body_stream = None
        if stream is None or stream.closed or stream.remote_finished:
            return
        stream.remote_finished = True
        if stream.local_finished:
            self._remove(stream)
        self._consumer.stream_finished(stream)

    def _syn(self, stream: Stream | None, stream_id: int, now: float) -> Stream | None:
        if stream is not None or not stream_id or stream_id & 1 == self._own_parity:
            raise YamuxError(f"SYN for stream {stream_id}, which is not the peer's to open")
        if stream_id in self._recalled:
            self._recalled.discard(stream_id)
            self._spend(now)
            self._answer(WINDOW_UPDATE, RST, stream_id, ResetCode.CONNECTION_LOST)
            return None
        # some peers let a later stream speak first, so ids need not grow
        self._last_remote_id = max(self._last_remote_id, stream_id)
        limits = self._limits
        if (
            self.local_gone
            or self._inbound >= limits.inbound_streams
            or self._inbound_unacknowledged >= limits.unacknowledged
        ):
            if self.local_gone:
                self._spend(now)
                self._answer(WINDOW_UPDATE, RST, stream_id, ResetCode.NONE)
            elif self._allowance.level(now) < 2 * costs.SURPLUS and len(self._parked) < _PARKED:
                self._parked.append(stream_id)
            else:
                self._refuse_surplus(stream_id, now)
            return None
        stream = Stream(stream_id, inbound=True, now=now)
        self._streams[stream_id] = stream
        self._inbound += 1
        self._inbound_unacknowledged += 1
        self._small += costs.OPENED
        self._large_updates_due += 2
        self._consumer.stream_opened(stream)
        return None if stream.closed else stream  # it may have been refused already

    def _refuse_surplus(self, stream_id: int, now: float) -> None:
        self._spend(now, costs.SURPLUS, "opening more streams than are accepted")
        self._answer(WINDOW_UPDATE, RST, stream_id, ResetCode.LIMIT_EXCEEDED)

    def _was_opened(self, stream_id: int) -> bool:
        """Whether this may be a stream of the past; of the peer's ids we know no more than the highest."""
        if stream_id & 1 == self._own_parity:
            return 0 < stream_id < self._next_id
        return 0 < stream_id <= self._last_remote_id

    def _reset_by_peer(self, stream: Stream | None, kind: int, length: int, now: float) -> None:
        code = length
        if kind == DATA:
            self._body_left, self._body_stream, self._body_flags, code = length, None, 0, 0
        if stream is None:
            self._spend(now)
            return
        # to open streams and take them back costs a peer nothing and us something
        if stream.inbound and not stream.acknowledged:
            self._spend(now, costs.RESET, "resets of streams just opened")
        elif stream.inbound:
            self._small += costs.RESET_USED
        elif not stream.received and code in _NO_ROOM:
            outbound = len(self._streams) - self._inbound - 1
            self._room, self._room_at = max(_LEAST_ROOM, min(self._room, outbound)), now
        self._frames.pop(stream.id, None)
        self._remove(stream)
        self._consumer.stream_reset(stream, code)

    def _ping(self, flags: int, value: int, now: float) -> None:
        if flags & SYN:
            self._spend(now)
            self._answer(PING, ACK, 0, value)
        elif flags & ACK:
            self._spend(now)
            self._consumer.pong(value)
        else:
            self._spend(now)  # it neither asks nor answers

    # ---- bookkeeping

    def _remove(self, stream: Stream) -> None:
        stream.closed = True
        self._streams.pop(stream.id, None)
        if stream.inbound:
            self._inbound -= 1
            if not stream.acknowledged:
                stream.acknowledged = True
                self._inbound_unacknowledged -= 1
        else:
            if not stream.acknowledged:
                stream.acknowledged = True
                self._outbound_unacknowledged -= 1
            if stream.received <= stream.greeting:
                self._unanswered.take(1, self._now)
        self._set_window(stream, INITIAL_WINDOW)

    def _set_window(self, stream: Stream, window: int) -> None:
        self._grown += max(window, INITIAL_WINDOW) - max(stream.window, INITIAL_WINDOW)
        stream.window = window

    def _flags_sent(self, stream: Stream, flags: int) -> None:
        if flags & ACK and not stream.acknowledged:
            stream.acknowledged = True
            self._inbound_unacknowledged -= 1
            self._small -= costs.OPENED

    def _stream_control(self, stream: Stream, flags: int, length: int) -> None:
        pending = stream.flags
        if pending:
            stream.flags = 0
            flags |= pending
            self._flags_sent(stream, pending)
        # One frame of each stream waits, into which what comes later is merged. So while the wire takes nothing there
        # are never more than streams: what we say of ourselves needs no other bound, and is not held against the peer.
        waiting, more = self._frames.get(stream.id, (0, 0))
        self._frames[stream.id] = (waiting | flags, min(MAX_WINDOW, more + length))

    def _answer(self, kind: int, flags: int, stream_id: int, length: int) -> None:
        # Not bounded here: what we say must never fail. `_receive` looks at the sum.
        self._answers += _HEADER.pack(0, kind, flags, stream_id, length)

    def _spend(self, now: float, cost: float = costs.IDLE, what: str = "frames that move nothing") -> None:
        allowance = self._allowance
        allowance.spend(cost, what, now)
        if allowance.exhausted:
            raise FloodError(allowance.reason)

    def _settle_small(self, now: float) -> None:
        """Charge the allowance for what small frames have cost, or earn for large ones."""
        small, self._small = self._small, 0.0
        if small > 0:
            self._spend(now, small, "small frames and streams that come to nothing")
        elif small < 0:
            self._allowance.earn(-small, now)
