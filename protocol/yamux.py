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
and doubles while its reader empties it quickly, up to a limit for the stream and a budget for all of the session.

Reset codes and go-away codes travel in the length field (as go-yamux 5 does it); others send and read 0 there.

Not every oddity is an attack. Implementations differ, and some let go of a stream before they have announced it, so
frames for streams that never were, data behind FIN and unknown flags are passed over and charged to that allowance.
The session ends where the two sides can no longer agree on what the bytes mean, or where a bound that both know was
broken; docs/protocols.md compares these cases with what other implementations do.

A session does no I/O. It is fed with :meth:`Session.receive` and calls its :class:`Consumer` back, synchronously, with
views into the very buffer that it was fed with: nothing is copied. What it has to say by itself (window updates, pings,
resets) collects as ready frames, to be fetched by :meth:`Session.take_control`; data frames are the caller's
to lay out, with headers made by :meth:`Session.data_header`, for it is the caller who chooses among streams.

Against a peer that means harm: inbound streams are limited, all and unacknowledged ones apart; frames that cost us work
and move nothing (pings, refused SYNs, resets of its own streams, empty frames) draw on an allowance that refills
slowly; the queue of control frames is bounded. Who exceeds these has the session closed. So do window updates of a few
bytes, beyond one for each data frame that went out: a reader that grants what it has read, however little, is
well-behaved, but it cannot have read what was not sent. Small data frames are not limited, since terminals send them,
and busy services many; who feeds the session takes care that they hold up nobody else (`Session.frames_received`).
"""

from __future__ import annotations

import dataclasses
import enum
import struct
from collections.abc import Iterator
from typing import Any, Final, Protocol

from protocol.errors import LimitExceededError, ProtocolError
from protocol.stream_descriptor import ResetCode

PROTOCOL_ID: Final = "/yamux/1.0.0"
HEADER_LENGTH: Final = 12
INITIAL_WINDOW: Final = 256 * 1024
MAX_WINDOW: Final = 0xFFFF_FFFF

DATA: Final = 0
WINDOW_UPDATE: Final = 1
PING: Final = 2
GO_AWAY: Final = 3

SYN: Final = 1
ACK: Final = 2
FIN: Final = 4
RST: Final = 8

_FLAGS: Final = SYN | ACK | FIN | RST

_SMALL_UPDATE: Final = 512  # bytes; a window that moves by less makes more work than it is worth
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
        inbound_streams, outbound_streams: open at a time, by who opened them.
        unacknowledged: streams opened and not yet acknowledged, each way (the spec's ACK backlog).
        stream_window: bytes; the most that a stream's window may grow to.
        session_window: bytes; the most by which all windows together may have grown beyond their start.
        fast: seconds; a reader that takes half a window within this, or within four round trips, gets a larger one.
        idle_frames: allowance of frames that move nothing, at once.
        idle_frames_rate: by how many the allowance refills in a second.
        control_bytes: control frames that may wait; a peer that sends more frames meanwhile has the session closed.
    """

    inbound_streams: int = 1024
    outbound_streams: int = 4096
    unacknowledged: int = 256
    stream_window: int = 16 * 1024 * 1024
    session_window: int = 64 * 1024 * 1024
    fast: float = 0.02
    idle_frames: int = 1000
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
        local_finished, remote_finished: FIN was sent, received.
        closed: gone from the session.
        owner: whatever the consumer keeps with it.
    """

    __slots__ = (
        "acknowledged",
        "closed",
        "flags",
        "id",
        "inbound",
        "local_finished",
        "owner",
        "receive_window",
        "refilled_at",
        "remote_finished",
        "send_window",
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
        rtt: seconds; whoever measures it keeps it here, it tells how fast a fast reader is.
        remote_gone, local_gone: who said go away.
        frames_received: counts headers.
    """

    def __init__(self, role: Role, consumer: Consumer, *, now: float, limits: Limits = DEFAULT_LIMITS) -> None:
        self.rtt = 0.0
        self.remote_gone = False
        self.local_gone = False
        self.frames_received = 0
        self._consumer = consumer
        self._limits = limits
        self._streams: dict[int, Stream] = {}
        self._next_id = 1 if role is Role.CLIENT else 2
        self._last_remote_id = 0
        self._own_parity = self._next_id & 1
        self._inbound = 0
        self._inbound_unacknowledged = 0
        self._outbound_unacknowledged = 0
        self._updates_due = 0  # small window updates that data frames of ours are worth
        self._grown = 0  # bytes by which windows have grown, all streams
        self._control = bytearray()
        self._announce: list[Stream] = []
        self._header = bytearray()  # the beginning of a header that came in pieces
        self._body_left = 0
        self._body_stream: Stream | None = None
        self._body_flags = 0
        self._allowance = float(limits.idle_frames)
        self._allowance_at = now

    # ---- streams, from our side

    @property
    def streams(self) -> int:
        """Open streams, both directions."""
        return len(self._streams)

    def __iter__(self) -> Iterator[Stream]:
        """The open streams, as they are now."""
        return iter(list(self._streams.values()))

    def open(self, now: float) -> Stream:
        """Open a stream. Its SYN goes out with the next `take_control`; drain that before any data is laid out.

        Raises:
            GoneAwayError: never again on this session.
            TooManyStreamsError: not now; a `BacklogError` if it is worth a try in a moment.
        """
        if self.remote_gone or self.local_gone:
            raise GoneAwayError("the session takes no more streams")
        if self._next_id > _MAX_STREAM_ID:
            raise GoneAwayError("all stream ids of the session are used up")
        if len(self._streams) - self._inbound >= self._limits.outbound_streams:
            raise TooManyStreamsError(f"{self._limits.outbound_streams} streams are open already")
        if self._outbound_unacknowledged >= self._limits.unacknowledged:
            raise BacklogError(f"{self._limits.unacknowledged} streams wait for the peer to accept them")
        stream = Stream(self._next_id, inbound=False, now=now)
        self._next_id += 2
        self._streams[stream.id] = stream
        self._outbound_unacknowledged += 1
        self._announce.append(stream)
        return stream

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
        _HEADER.pack_into(buffer, offset, 0, DATA, flags, stream.id, length)

    def finish(self, stream: Stream) -> None:
        """Half-close: after all data laid out so far. Twice is once."""
        if stream.closed or stream.local_finished:
            return
        stream.local_finished = True
        self._stream_control(stream, FIN, 0)
        if stream.remote_finished:
            self._remove(stream)

    def reset(self, stream: Stream, code: int = ResetCode.NONE) -> None:
        """End both directions at once. Nothing is called back. A closed stream stays closed."""
        if stream.closed:
            return
        if stream.flags & SYN and not stream.inbound:
            # the peer never heard of it
            stream.flags = 0
        else:
            stream.flags = 0
            self._queue(WINDOW_UPDATE, RST, stream.id, code)
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
        if grant < stream.window >> 1:
            return False
        elapsed = now - stream.refilled_at
        stream.refilled_at = now
        if not stream.stalled and elapsed < max(4 * self.rtt, self._limits.fast):
            growth = min(stream.window, self._limits.stream_window - stream.window)
            growth = min(growth, self._limits.session_window - self._grown)
            if growth > 0:
                self._grown += growth
                stream.window += growth
                grant += growth
        stream.stalled = False
        stream.receive_window += grant
        self._stream_control(stream, 0, grant)
        return True

    def ping(self, value: int) -> None:
        """Ask for an answer that carries this 32-bit value back."""
        self._queue(PING, SYN, 0, value & 0xFFFF_FFFF)

    def go_away(self, code: int = GoAwayCode.NORMAL) -> None:
        """Take and open no more streams from now on."""
        self.local_gone = True
        self._queue(GO_AWAY, 0, 0, code)

    def take_control(self, buffer: memoryview, offset: int, room: int) -> int:
        """Move waiting control frames, whole ones, at most `room` bytes, to `buffer[offset:]`. Returns the bytes."""
        if self._announce:
            for stream in self._announce:
                if stream.flags and not stream.closed:
                    self._stream_control(stream, 0, 0)
            self._announce.clear()
        control = self._control
        length = len(control)
        if not length:
            return 0
        if length > room:
            length = room - room % HEADER_LENGTH
        buffer[offset : offset + length] = control[:length]
        del control[:length]
        return length

    @property
    def has_control(self) -> bool:
        """Something waits for `take_control`."""
        return bool(self._control or self._announce)

    # ---- bytes, from the peer

    def receive(self, buffer: memoryview, start: int, end: int, now: float) -> None:
        """Take `buffer[start:end]`, cut anywhere. `start` is at least 1; parts of the buffer may be overwritten.

        Raises:
            YamuxError: the peer broke the protocol; send what `take_control` gives (a go away) and close.
        """
        try:
            self._receive(buffer, start, end, now)
        except ProtocolError:
            if not self.local_gone:
                self._control.clear()
                self.go_away(GoAwayCode.PROTOCOL_ERROR)
            raise

    def _receive(self, buffer: memoryview, start: int, end: int, now: float) -> None:
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
            if len(self._control) > self._limits.control_bytes and not self.local_gone:
                raise FloodError("the peer asks for more answers than it reads")
            if version:
                raise YamuxError(f"a frame of version {version}")
            if flags > _FLAGS:
                self._spend(now)
                flags &= _FLAGS
            if kind <= WINDOW_UPDATE:
                self._stream_frame(kind, flags, stream_id, length, now)
            else:
                self._session_frame(kind, flags, length, now)

    def _session_frame(self, kind: int, flags: int, length: int, now: float) -> None:
        # Some implementations put a stream id into these frames. It says nothing.
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
            if stream is not None:
                if length > stream.receive_window:
                    raise WindowExceededError(
                        f"{length} bytes on stream {stream_id}, where {stream.receive_window} are allowed"
                    )
                stream.receive_window -= length
                if length and stream.remote_finished:
                    self._spend(now)
                    stream = None  # it is not granted anew, so there can be no more than one window of it
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

    def _window_update(self, stream: Stream | None, length: int, now: float) -> None:
        if length < _SMALL_UPDATE:
            if self._updates_due:
                self._updates_due -= 1
            else:
                self._spend(now)
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
        # some peers let a later stream speak first, so ids need not grow
        self._last_remote_id = max(self._last_remote_id, stream_id)
        limits = self._limits
        if (
            self.local_gone
            or self._inbound >= limits.inbound_streams
            or self._inbound_unacknowledged >= limits.unacknowledged
        ):
            self._spend(now)
            self._queue(WINDOW_UPDATE, RST, stream_id, 0 if self.local_gone else ResetCode.LIMIT_EXCEEDED)
            return None
        stream = Stream(stream_id, inbound=True, now=now)
        self._streams[stream_id] = stream
        self._inbound += 1
        self._inbound_unacknowledged += 1
        self._consumer.stream_opened(stream)
        return None if stream.closed else stream  # it may have been refused already

    def _was_opened(self, stream_id: int) -> bool:
        """Whether this may be a stream of the past; of the peer's ids we know no more than the highest."""
        if stream_id & 1 == self._own_parity:
            return 0 < stream_id < self._next_id
        return 0 < stream_id <= self._last_remote_id

    def _reset_by_peer(self, stream: Stream | None, kind: int, length: int, now: float) -> None:
        code = length
        if kind == DATA:
            self._body_left, self._body_stream, self._body_flags, code = length, None, 0, 0
        if stream is None or stream.inbound:
            # to open streams and take them back costs a peer nothing and us something
            self._spend(now)
        if stream is not None:
            self._remove(stream)
            self._consumer.stream_reset(stream, code)

    def _ping(self, flags: int, value: int, now: float) -> None:
        if flags & SYN:
            self._spend(now)
            self._queue(PING, ACK, 0, value)
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
        elif not stream.acknowledged:
            stream.acknowledged = True
            self._outbound_unacknowledged -= 1
        self._grown -= stream.window - INITIAL_WINDOW

    def _flags_sent(self, stream: Stream, flags: int) -> None:
        if flags & ACK and not stream.acknowledged:
            stream.acknowledged = True
            self._inbound_unacknowledged -= 1

    def _stream_control(self, stream: Stream, flags: int, length: int) -> None:
        pending = stream.flags
        if pending:
            stream.flags = 0
            flags |= pending
            self._flags_sent(stream, pending)
        self._queue(WINDOW_UPDATE, flags, stream.id, length)

    def _queue(self, kind: int, flags: int, stream_id: int, length: int) -> None:
        # Not bounded here: what we say of ourselves (resets, pings) must never fail. `_receive` looks at the sum.
        self._control += _HEADER.pack(0, kind, flags, stream_id, length)

    def _spend(self, now: float) -> None:
        limits = self._limits
        refill = (now - self._allowance_at) * limits.idle_frames_rate
        self._allowance_at = now
        self._allowance = min(limits.idle_frames, self._allowance + refill) - 1
        if self._allowance < 0:
            raise FloodError("too many frames that move nothing")
