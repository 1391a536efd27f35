"""A link: one secured, multiplexed connection to a peer, on a reactor.

Theory of operation. A link owns a wire (a TCP socket, say) that has the Noise handshake behind it. It runs yamux on it:

    wire -> one room -> decrypt into another -> yamux -> channels        (as the wire becomes readable)
    channels -> a room, laid out as frames -> encrypt into a buffer -> wire   (once a round of the reactor)

The plaintext lies in one piece on both sides of the ciphers, which cut it into Noise messages: so frames are as long as
they may be, whatever the length of a message, and a call of a channel, of yamux or of the kernel serves four messages.
Besides the ciphers only the kernel copies a byte, unless somebody does not keep up.

Sending. Channels that have something to send stand in one of two queues. Once a round the link goes round them, one
frame of each at a time, until a batch is full, and all goes out with one `send`. A batch is about four Noise messages,
but no more than a slow wire takes in a few milliseconds (`actors.switchboard.batch`), since what is sealed cannot be
overtaken. Control frames come first, then the channels that have sent little of late (`SPARSE`): a keystroke does not
wait behind bulk. They get no more than three quarters of a batch while others wait, so nobody starves. A channel that
is alone gets one long frame; where there are several each gets at most one message's worth at its turn. What the wire
does not take is kept with its buffer, and nothing more is read from any descriptor until it has gone. A stream whose
window is used up leaves the queue until the peer grants more.

Receiving. All messages that came in at once are decrypted, then given to yamux, and only then are the ends of streams
asked to pass on what they have got (`settle`): so whoever reads it is woken once for all of it, and by one system call.
What comes in at once is bounded, so that no link holds up the others. A peer whose frames are tiny, or dear, makes us
work much more for each byte, so less is taken from it at a time until that is over.

A link over a circuit (the inner one) works within the callbacks of the link to the relay (the outer one), so it has
rooms of its own: what it is given lies in the outer one's, and what it sends is sealed straight into the outer
one's frame.

The life of a link: alive, until one of the ends of :class:`LinkEnd`; then it resets what is open and tells `on_end`
from the loop. After `close` its wire goes on until the peer has received what it was sent
(`actors.switchboard.closing`); after every other end it is closed at once.

Silence. A link that has heard nothing for a while asks for a word, by a ping. The side that dialled does so first, so
that one ping serves both, and keeps the memory of NATs on the way alive. A link through a relay asks much more rarely:
the connection below it keeps the way open. What stays unanswered ends a link only after `Patience.silence`; whether
new streams still use it is decided much earlier (`actors.switchboard.liveness`). Only time in which this process ran
counts, so neither sleep nor a stopped process is taken for the peer's silence; and as long as the peer's kernel
acknowledges more than before, or the wire takes more, there is progress, however slow.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import deque
from collections.abc import Callable
from typing import Final

from actors.reactor import WRITE, Reactor
from actors.switchboard.batch import LEAST, Ahead
from actors.switchboard.budget import Budget
from actors.switchboard.channel import Channel, LinkClosedError, SettlingEnd
from actors.switchboard.closing import Closing, Confirmations
from actors.switchboard.inflow import Inflow
from actors.switchboard.wire import MAX_FRAME, Acknowledgement, Wire, network_failed
from protocol import allowance as costs
from protocol import yamux
from protocol.allowance import Allowance
from protocol.errors import PeerupError, ProtocolError
from protocol.messages.config import DEFAULT_SILENCE
from protocol.noise import MAX_PLAINTEXT
from protocol.noise_cipher import TAG_LENGTH, CipherState, NoiseError
from protocol.stream_descriptor import MAX_DATA, ResetCode
from protocol.yamux import GoAwayCode, Role
from supervisor.timers import Timer

__all__ = ["Channel", "Link", "LinkClosedError", "LinkEnd", "Patience"]

KEEPALIVE_INTERVAL: Final = 25.0
"""Seconds without a word of the peer's after which the side that dialled pings: shorter than the 30 s after which the
least patient NATs forget a TCP connection."""

KEEPALIVE_INTERVAL_RELAYED: Final = 60.0
"""The same for a link through a relay, which keeps nothing open: it only finds out that the peer has gone."""

KEEPALIVE_GRACE: Final = 10.0
"""Seconds by which the side that was dialled waits longer, so that it need not ping."""

LOOK: Final = 5.0
"""Seconds between looks at a link that waits for something."""

MUCH: Final = 64 * 1024
"""Bytes after which the round trip is measured anew at the next look."""

INTERRUPTED: Final = 4.0
"""Seconds after which the answer to a ping tells of an interruption, and not of how long a round trip takes."""

SPARSE: Final = 8 * 1024
"""Bytes that a channel may send at once before those that send much: a full screen of a terminal."""

SPARSE_RATE: Final = 32 * 1024
"""Bytes a second that it may go on sending so."""

CONTAIN_DEFECTS = True
"""Whether an error that nobody foresaw, in what is made of a peer's bytes, costs that peer its connection; otherwise
it ends the process, and with it all connections. Tests want the latter."""

_FRAGMENT: Final = 256  # bytes of one recv that are too few for the middle of a message
_PREFIX: Final = 2  # length of a Noise message
_HEADER: Final = yamux.HEADER_LENGTH
_FRAME: Final = MAX_FRAME
_SHARE: Final = _HEADER + MAX_DATA  # of one of several channels: a full Noise message
_BATCH: Final = 4 * MAX_PLAINTEXT  # of one send
_SEND_BUFFER: Final = 6 * _FRAME  # a batch, and resets that come up meanwhile
_LEAST_SPARSE: Final = SPARSE // 4  # what is left of it that is worth a turn: else bulk would be cut to pieces
_LEAST_FRAME: Final = 1024  # room for data that is worth a frame
_MOST_CONTROL: Final = MAX_PLAINTEXT  # beyond a batch
_RECEIVE: Final = 4 * _FRAME  # of one recv
_SEND_ROUNDS: Final = 4  # batches of one round of the reactor
_RECEIVE_ROUNDS: Final = 2
_LAST_ROUNDS: Final = 64  # of a broken wire: more than a kernel buffer holds
_PASSED: Final = 4 * _FRAME  # bytes that are passed on before they are sent
_OPENED: Final = 16  # where opened bytes begin: yamux and those who pass them on may write a little before them
_LAST_WORDS: Final = 32 * 1024  # of all that is said when a link ends
_LEAST_RECEIVE: Final = 8 * 1024  # of one recv from a peer that sends nothing but tiny frames
_MANY: Final = 512  # frames of one recv, if they are
_EMPTY: Final = _PREFIX + TAG_LENGTH  # a message that carries nothing
_EMPTY_COST: Final = 20.0  # of its units for one: nobody honest sends them
_IDS_KEPT: Final = 1024  # stream ids that are left when the connection should not be used for more
_REFUSED_EVERY: Final = 0.05  # seconds between refusals of surplus streams that wait for them
_DEAR: Final = 20_000.0  # of its units for what was read at once: others wait meanwhile
_TINY: Final = 256  # bytes on average, with their headers


class DefectError(PeerupError):
    """What the peer sent met an error of ours that nobody foresaw. The cause is the error."""

    code = "defect"


@dataclasses.dataclass
class Patience:
    """How long links wait; all of a node share one, and a change counts at once.

    Attributes:
        silence: seconds without any progress after which a link that waits for an answer, or to send, is ended.
    """

    silence: float = DEFAULT_SILENCE


class _Vigil:
    """What a link has seen of its peer at the last look.

    Attributes:
        interval: seconds of silence after which it asks for a word.
        looked_at: when that was; `next_look` is how many seconds later the next one is planned.
        seen: bytes received, acknowledged, and taken by the wire.
        waits: for a word or an acknowledgement.
        silent, stuck: seconds without progress while it waits to hear, and to send.
        measured: bytes both ways when the last ping was sent.
    """

    __slots__ = ("interval", "looked_at", "measured", "next_look", "seen", "silent", "stuck", "waits")

    def __init__(self, received: int, now: float, wire: Wire, role: Role) -> None:
        interval = KEEPALIVE_INTERVAL_RELAYED if wire.depth else KEEPALIVE_INTERVAL
        self.interval = interval + (KEEPALIVE_GRACE if role is Role.SERVER else 0.0)
        self.looked_at = now
        self.next_look = self.interval
        self.seen = received, 0, 0
        self.waits = False
        self.silent = self.stuck = 0.0
        self.measured = 0


@dataclasses.dataclass(frozen=True)
class LinkEnd:
    """Why a link ended.

    Attributes:
        code: `remote-close`, `remote-go-away`, `connection-lost`, `network-lost` (the kernel has given up),
            `keepalive-timeout`, `send-timeout`, the code of a protocol error of the peer's, `defect`, or what `close`
            or `abort` was given.
        reason: the same in words.
        defect: the error, if it was one of ours.
    """

    code: str
    reason: str
    defect: Exception | None = None


class Link:
    """Takes over a wire after the Noise handshake and muxer negotiation, in both roles alike.

    `received` is ciphertext that came in with the last handshake message, `plaintext` what a Noise message held behind
    the end of the muxer's negotiation. `on_stream` is called for each stream that the peer opens; `on_end` once, from
    the loop, when the link is gone; `on_gone_away` when the peer takes no more streams on it.
    `on_used_up` when there are few stream ids left on our side, so that no more streams should be opened.
    `budget` and `allowance` are shared by all links to the peer, `patience` by all links; `next_id` is for tests.

    Attributes:
        reactor, session: what its channels work with.
        budget: what the peer may make us keep.
        allowance: what it may make us do for nothing.
        sent, received: bytes on the wire since the link was made.
        rtt: seconds, smoothed; None until measured.
        inflow: what goes on to sockets of what comes from the peer.
        end: why the link ended; None while it lives.
        closed: its wire is closed, too.
        on_closed: called when that happens; to be set by whoever needs it.
    """

    def __init__(
        self,
        reactor: Reactor,
        wire: Wire,
        *,
        role: Role,
        send_cipher: CipherState,
        receive_cipher: CipherState,
        received: bytes,
        plaintext: bytes = b"",
        on_stream: Callable[[Channel], None],
        on_end: Callable[[LinkEnd], None],
        on_gone_away: Callable[[], None] = lambda: None,
        on_used_up: Callable[[], None] = lambda: None,
        limits: yamux.Limits = yamux.DEFAULT_LIMITS,
        budget: Budget | None = None,
        allowance: Allowance | None = None,
        next_id: int | None = None,
        patience: Patience | None = None,
    ) -> None:
        now = reactor.clock()
        self.reactor = reactor
        self.budget = Budget() if budget is None else budget
        self.allowance = Allowance(now) if allowance is None else allowance
        self.session = yamux.Session(role, self, now=now, limits=limits, allowance=self.allowance, next_id=next_id)
        self.sent = 0
        self.received = len(received) + len(plaintext)
        self.rtt: float | None = None
        self.inflow = Inflow()
        self.end: LinkEnd | None = None
        self.closed = False
        self.on_closed: Callable[[], None] = lambda: None
        self._clock, self._wire = reactor.clock, wire
        self._received, self._opened, self._outgoing = reactor.rooms[wire.depth]
        self._rounds = 1 if wire.depth else _SEND_ROUNDS
        self._send_cipher = send_cipher
        self._receive_cipher = receive_cipher
        self._receive = _RECEIVE
        self._tail = received  # the beginning of a Noise message
        self._plaintext = plaintext  # to be given to yamux before anything else
        self._on_stream = on_stream
        self._on_end = on_end
        self._on_gone_away = on_gone_away
        self._on_used_up: Callable[[], None] | None = on_used_up
        # a timer for surplus streams runs; the wire broke, and what it holds is yet to be read
        self._refusing, self._losing = False, False
        self._queue: deque[Channel] = deque()
        self._sparse: deque[Channel] = deque()  # those that have sent little; they come first
        # of a circuit only what its frames have no room for is sealed ahead
        self._ahead = Ahead(LEAST) if wire.depth else Ahead()
        self._limited = 0  # bytes ahead that the wire was told of
        self._full, self._shut = False, False  # the wire has enough for now; nothing is sent any more
        self._unsettled: list[SettlingEnd] = []
        self._flush_planned = False
        self._passed = 0  # bytes of `_passed_buffer`, sealed and not yet given to the wire
        self._passed_buffer: memoryview | None = None
        self._unsent: memoryview | None = None  # sealed, not taken by the wire yet; within `_unsent_buffer`
        self._unsent_buffer: memoryview | None = None
        self._now = now  # when the last bytes came
        self._patience = Patience() if patience is None else patience
        self._vigil = _Vigil(self.received, now, wire, role)
        self._ping_value = 0
        self._ping_at: float | None = None
        self._confirmations = Confirmations(reactor, self._ask, lambda: self.session.ends)
        self._closing: Closing | None = None
        wire.start(self._wire_ready, self._take, self._failed)
        self._limit_wire()
        self._timer: Timer = reactor.call_later(self._vigil.interval, self._tick)
        self._ping()
        self._unopened = bool(received or plaintext)
        if self._unopened:
            reactor.call_soon(self._open_first)

    def __repr__(self) -> str:
        return f"<Link {self._wire!r}{'' if self.end is None else ' ' + self.end.code}>"

    # ---- what others use

    @property
    def streams(self) -> int:
        """Open streams, both directions."""
        return self.session.streams

    def open_stream(self, *, own: bool = True) -> Channel:
        """Open a stream; usable at once. It is `own` if the node itself needs it, rather than a tunnel.

        Raises:
            LinkClosedError: closed, or one side said go away.
            LimitExceededError: too many streams, or too many not yet acknowledged.
        """
        if self.end is not None:
            raise LinkClosedError(f"the connection is closed: {self.end.reason}")
        if self._on_used_up is not None and self.session.ids_left <= _IDS_KEPT:
            on_used_up, self._on_used_up = self._on_used_up, None
            on_used_up()
        try:
            stream = self.session.open(self._clock(), own=own)
        except yamux.GoneAwayError as error:
            raise LinkClosedError(str(error)) from error
        stream.owner = channel = Channel(self, stream)
        self.plan_flush()
        return channel

    def charge(self, cost: float, what: str) -> None:
        """Charge the peer for work that it has made this node do; if its allowance is used up the link will end."""
        self.allowance.spend(cost, what, self._clock())

    def end_if_in_debt(self) -> None:
        """End the link if the peer has used up its allowance, perhaps on an earlier one."""
        if self.end is None and not self.allowance.recover(self._clock()):
            if not self.session.local_gone:
                self.session.go_away(ResetCode.RATE_LIMITED)
            self._failed(yamux.FloodError(self.allowance.reason))

    def acknowledgement(self) -> Acknowledgement | None:
        """How the peer's machine acknowledges what is sent; None where nobody knows."""
        return self._wire.acknowledgement()

    @property
    def asking(self) -> bool:
        """Whether a word of the peer's is waited for."""
        return self._ping_at is not None

    def ask(self) -> None:
        """Have the peer say a word, unless it was asked already. Whatever comes, `received` tells."""
        if self._ping_at is None and self.end is None:
            self._ping()

    def close(self, code: str = "local-close", reason: str = "closed by this node") -> None:
        """Reset what is open, say go away, and close the wire when the peer has received what it was sent.

        `on_end` follows from the loop, and `on_closed` when the wire is closed. Twice is once.
        """
        if self.end is None:
            worth = self._confirmations.pending
            self._conclude(LinkEnd(code, reason), ResetCode.SHUTDOWN, at_once=True)
            self._closing = Closing(self, self._wire, self.reactor, self._confirmations, worth=worth)
            if not self.session.local_gone:
                self.session.go_away()
            self.plan_flush()

    def confirm(self, told: Callable[[bool], None]) -> None:
        """Call `told(True)` when the peer has received all that was sent so far on streams that have ended.

        `told(False)` if the connection ends and nobody knows.
        """
        self._confirmations.ask(told)

    @property
    def unsent(self) -> bool:
        """Whether something is laid out, or waits to be, that the wire has not taken."""
        return self._unsent is not None or bool(self._passed) or self.session.has_control

    def progress(self) -> int:
        """See `Wire.progress`."""
        return self._wire.progress()

    def shut_down(self) -> None:
        """Send nothing more; read on. For `Closing`."""
        self._shut = True
        self._wire.shut_down()

    def destroy(self) -> None:
        """Close the wire. For `Closing`."""
        self._finish(LinkEnd("local-close", "closed by this node"), ResetCode.SHUTDOWN, None)

    def abort(self, code: str = "local-abort", reason: str = "cut off by this node", *, at_once: bool = False) -> None:
        """Close the wire now, without a word to the peer, even if `close` was called before.

        `on_end` follows from the loop. Twice is once. `at_once`: what came from the peer and was not taken by its
        readers yet is dropped.
        """
        self._finish(LinkEnd(code, reason), ResetCode.CONNECTION_LOST, None, at_once=at_once)

    def enqueue(self, channel: Channel) -> None:
        """The channel may have something to send."""
        if not channel.queued and self.end is None:
            channel.queued = True
            now = self._clock()
            allowance = channel.allowance + (now - channel.allowance_at) * SPARSE_RATE
            channel.allowance_at = now
            channel.allowance = allowance = SPARSE if allowance > SPARSE else int(allowance)
            (self._sparse if allowance >= _LEAST_SPARSE else self._queue).append(channel)
            if not self._flush_planned:
                self.plan_flush()

    def settle_later(self, end: SettlingEnd) -> None:
        """Call `end.settle` when all that has come in has been delivered; until then that stays where it is."""
        self._unsettled.append(end)

    def pass_on(self, channel: Channel, buffer: memoryview, start: int, end: int) -> bool:
        """Send `buffer[start:end]` on a stream straight from there, as a message of its own; whether that was possible.

        It is if nothing else waits to be sent. Of the buffer, a header's length before `start` is overwritten.
        """
        stream, session, length = channel.stream, self.session, end - start
        if (
            self._waits()
            or self._is_stuck()
            or start < _HEADER
            or length > stream.send_window
            or self._passed + length > min(_BATCH, self._ahead.size)
        ):
            return False
        if self._passed + length + 2 * _FRAME > _SEND_BUFFER:
            self._send_passed()
            if self._is_stuck():
                return False
        out = self._passed_buffer
        if out is None:
            out = self._passed_buffer = self.reactor.take_buffer(_SEND_BUFFER)
        session.data_header(buffer, start - _HEADER, stream, length)
        self._passed += self._seal(buffer[start - _HEADER : end], out[self._passed :])
        if self._passed >= _PASSED:
            self._send_passed()
        elif not self._flush_planned:
            self.plan_flush()
        return True

    def _waits(self) -> bool:
        """Something can be laid out."""
        return bool(self._queue or self._sparse or self.session.has_control)

    def _is_stuck(self) -> bool:
        """Nothing can be passed on now, or never again."""
        return self._is_blocked() or self.end is not None

    def _is_blocked(self) -> bool:
        """The wire takes nothing now, or never again."""
        return self._full or self._unsent is not None or self.closed or self._shut

    def plan_flush(self) -> None:
        """Something waits to be sent: do it at the end of this round."""
        if not self._flush_planned and not self._is_blocked():
            self._flush_planned = True
            self._wire.soon(self._flush)

    # ---- wire -> channels

    def _wire_ready(self, ready: int) -> None:
        if ready & WRITE:
            if self._unsent is not None:
                self._send_unsent()
            elif self._full:
                self._go_on()
        if ready & ~WRITE and not self.closed:
            self._read_wire()

    def _read_wire(self) -> None:
        received = self._received
        for _ in range(_RECEIVE_ROUNDS):
            room, frames = self._receive, self.session.frames_received
            allowance, now = self.allowance, self._clock()
            left = allowance.level(now)
            start = len(self._tail)
            stop = max(room, start + _LEAST_RECEIVE)  # so that it ends where a message ends if all of them are full
            try:
                length = self._wire.recv_into(received[start:stop])
            except BlockingIOError:
                return
            if not length and self._losing:
                return
            if not length:
                self._finish(LinkEnd("remote-close", "the peer closed the connection"), ResetCode.CONNECTION_LOST, None)
                return
            self.received += length
            self.session.charge(costs.READING)
            if start:
                received[:start] = self._tail
            self._open_messages(received[: start + length])
            if start and length < _FRAGMENT and len(self._tail) == start + length:
                self.session.charge(costs.FRAGMENT)
            frames = self.session.frames_received - frames
            dear = left - allowance.level(now) > _DEAR
            if dear or (frames > _MANY and frames * _TINY > length):
                self._receive = max(_LEAST_RECEIVE, room >> 1)
                return
            if frames and room < _RECEIVE:
                self._receive = min(_RECEIVE, room << 1)
            if start + length < stop or self.closed:
                return

    def _take(self, data: memoryview) -> None:
        """Bytes that the wire has at hand; for as long as the call lasts."""
        if self._unopened:
            self._open_first()
        if self.closed:
            return
        self.received += len(data)
        self.session.charge(costs.READING)
        tail = self._tail
        if not tail:
            self._open_messages(data)
            return
        # the message that has begun is put together, and the others stay where they are
        room = self._received
        start = len(tail)
        room[:start] = tail
        stop = min(len(data), max(0, _PREFIX - start))
        room[start : start + stop] = data[:stop]
        if start + stop >= _PREFIX:
            missing = min(_PREFIX + (room[0] << 8 | room[1]) - start, len(data))
            room[start + stop : start + missing] = data[stop:missing]
            stop = missing
        self._open_messages(room[: start + stop], data[stop:])
        if stop < _FRAGMENT and len(self._tail) == start + stop:
            self.session.charge(costs.FRAGMENT)

    def _open_first(self) -> None:
        """Take what came with the handshake, unless it was taken with what came after it."""
        unopened, self._unopened = self._unopened, False
        if not self.closed and unopened:
            try:
                self._open_messages(memoryview(self._tail))
            except (PeerupError, OSError) as error:
                self._failed(error)

    def _open_messages(self, *pieces: memoryview) -> None:
        """Decrypt the whole messages of these, then give them to yamux; keep the rest of the last one."""
        self._now = now = self._clock()
        opened, open_into = self._opened, self._receive_cipher.open_into
        end = _OPENED
        if self._plaintext:
            end += len(self._plaintext)
            opened[_OPENED:end] = self._plaintext
            self._plaintext = b""
        for sealed in pieces:
            position, length = 0, len(sealed)
            if not length:
                continue
            while length - position >= _PREFIX:
                stop = position + _PREFIX + (sealed[position] << 8 | sealed[position + 1])
                if stop > length:
                    break
                try:
                    end += open_into(sealed[position + _PREFIX : stop], opened[end:])
                except NoiseError:
                    self._hear(end, now)  # what came before it is good
                    raise
                self.session.charge(costs.MESSAGE if stop - position > _EMPTY else _EMPTY_COST)
                position = stop
            self._tail = bytes(sealed[position:])
        self._hear(end, now)
        if self.session.has_control:
            self.plan_flush()
        if self.session.parked and not self._refusing:
            self._refuse_later()

    def _refuse_later(self) -> None:
        self._refusing = True
        self.reactor.call_later(_REFUSED_EVERY, self._refuse_parked)

    def _refuse_parked(self) -> None:
        self._refusing = False
        if self.end is not None:
            return
        try:
            self.session.refuse_parked(self._clock())
        except PeerupError as error:
            self._failed(error)
            return
        if self.session.has_control:
            self.plan_flush()
        if self.session.parked:
            self._refuse_later()

    def _hear(self, end: int, now: float) -> None:
        """Give what was opened to yamux. Where nothing was, it charges the peer for that all the same."""
        try:
            self.session.receive(self._opened, _OPENED, end, now)
        except (PeerupError, OSError):
            raise
        except Exception as error:
            if CONTAIN_DEFECTS:
                raise DefectError(repr(error)) from error
            raise
        finally:
            if self._unsettled:
                self._settle(now)

    def _settle(self, now: float) -> None:
        unsettled, self._unsettled = self._unsettled, []
        for end in unsettled:
            end.settle(now)

    # ---- channels -> wire

    def _flush(self) -> None:
        self._flush_planned = False
        if self._passed:
            self._send_passed()
            if not self._waits():
                if not self._is_blocked():
                    self._ahead.nothing_left()
                return
        if self._is_blocked():
            return
        try:
            target = self._wire.target()
            if target is not None:
                self._fill(target)
            else:
                self._send_batches()
        except (PeerupError, OSError) as error:
            self._failed(error)

    def _fill(self, target: memoryview) -> None:
        """Seal what there is straight into where the wire wants it."""
        whole, rest = divmod(len(target), _FRAME)
        room = min(_BATCH, whole * MAX_PLAINTEXT + max(0, rest - _PREFIX - TAG_LENGTH))
        length = self._lay_out(room)
        if 0 < length <= room:
            sealed = self._seal(self._outgoing[:length], target)
            self._wire.filled(sealed)
            self.sent += sealed
        elif length and not self._give_sealed(length):  # the message of a descriptor is as long as it is
            return
        if self._waits():
            self.plan_flush()

    def _send_batches(self) -> None:
        ahead = self._ahead
        for number in range(self._rounds):
            room = min(_BATCH, ahead.size)
            length = self._lay_out(room)
            if length and not self._give_sealed(length):
                return
            if not self._waits():
                ahead.nothing_left()
                return
            if not length or self._is_blocked():
                return
            if number:
                ahead.in_a_row()
        self.plan_flush()

    def _limit_wire(self) -> None:
        """Tell the wire how much it may hold unsent, if that has changed by much."""
        base = self._ahead.base
        if not self._limited * 3 // 4 < base < self._limited * 4 // 3:
            self._limited = base
            self._wire.limit_unsent(base)

    def _give_sealed(self, length: int) -> bool:
        """Seal so much of what is laid out and give it to the wire. Whether it took all of it."""
        buffer = self.reactor.take_buffer(_SEND_BUFFER)
        if self._give(buffer, self._seal(self._outgoing[:length], buffer)):
            self.reactor.return_buffer(buffer)
            return True
        return False

    def _send_passed(self) -> None:
        """Send what was passed on: it is sealed, and so comes before all else."""
        buffer, end = self._passed_buffer, self._passed
        assert buffer is not None
        self._passed_buffer, self._passed = None, 0
        try:
            if not self.closed and not self._give(buffer, end):
                return
        except (PeerupError, OSError) as error:
            self._failed(error)
        self.reactor.return_buffer(buffer)

    def _give(self, buffer: memoryview, end: int) -> bool:
        """Give `buffer[:end]` to the wire. Whether it took all of it; if not, the buffer is kept with the rest."""
        try:
            taken = self._wire.send(buffer[:end])
        except BlockingIOError:
            taken = 0
        self.sent += taken
        self._ahead.taken(taken)
        if taken == end:
            # a kernel takes more than it was told to as long as its last segment is not full
            if self._ahead.base < _BATCH and self._wire.unsent() > self._ahead.base >> 1:
                self._full = True
                self._refused()
                self._wire.want_write(wanted=True)
            return True
        self._refused()
        self._unsent, self._unsent_buffer = buffer[taken:end], buffer
        self._wire.want_write(wanted=True)
        return False

    def _send_unsent(self) -> None:
        unsent = self._unsent
        assert unsent is not None
        try:
            taken = self._wire.send(unsent)
        except BlockingIOError:
            return
        self.sent += taken
        self._ahead.taken(taken)
        if taken < len(unsent):
            self._refused()
            self._unsent = unsent[taken:]
            return
        self._release_unsent()
        self._go_on()

    def _go_on(self) -> None:
        """The wire takes more."""
        self._full = False
        self._wire.want_write(wanted=False)
        if self._waits():
            self.plan_flush()
        else:
            self._ahead.nothing_left()

    def _refused(self) -> None:
        self._ahead.refused(self._clock())
        self._limit_wire()

    def _release_unsent(self) -> None:
        self._unsent = None
        if self._unsent_buffer is not None:
            self.reactor.return_buffer(self._unsent_buffer)
            self._unsent_buffer = None

    def _lay_out(self, room: int) -> int:
        """Lay out frames, about `room` bytes of them. Returns how many bytes they are.

        More it is only by frames of no length, and where `room` is less than a message of a descriptor.
        """
        session, queue, plain = self.session, self._queue, self._outgoing
        position = 0
        if session.has_control:
            # all of it (SYNs are among it) must go before any data
            position = session.take_control(plain, 0, room)
            if session.has_control:
                return position
        least = min(_HEADER + _LEAST_FRAME, room - position)
        if least <= _HEADER:
            return position
        sparse, stop = self._sparse, room - room // 4 if queue else room
        while sparse and stop - position >= least:
            channel = sparse[0]
            start = position + _HEADER
            length = channel.fetch(plain, start, min(channel.allowance, stop - start))
            if length > 0:
                session.data_header(plain, position, channel.stream, length)
                position = start + length
                channel.allowance -= length
                sparse.rotate(-1)
                if channel.allowance < _LEAST_FRAME:
                    queue.append(sparse.pop())
            elif length == 0:
                channel.queued = False
                sparse.popleft()
                position += session.take_control(plain, position, room + _MOST_CONTROL - position)
        reserve = min(_SHARE, room - position)
        while queue and position + reserve <= room and reserve >= least:
            channel = queue[0]
            start = position + _HEADER
            length = channel.fetch(plain, start, min(MAX_DATA, room - start) if len(queue) > 1 else room - start)
            if length > 0:
                session.data_header(plain, position, channel.stream, length)
                position = start + length
                if len(queue) > 1:
                    queue.rotate(-1)
            elif length == 0:
                channel.queued = False
                queue.popleft()
                # it finished, or was reset
                position += session.take_control(plain, position, room + _MOST_CONTROL - position)
        return position

    def _seal(self, plain: memoryview, out: memoryview) -> int:
        """Encrypt `plain` into `out`, as Noise messages with their lengths before them. Returns how many bytes."""
        seal_into, length = self._send_cipher.seal_into, len(plain)
        start = end = 0
        while start < length:
            stop = min(start + MAX_PLAINTEXT, length)
            sealed = seal_into(plain[start:stop], out[end + _PREFIX :])
            out[end] = sealed >> 8
            out[end + 1] = sealed & 0xFF
            end += _PREFIX + sealed
            start = stop
        return end

    # ---- what yamux tells

    def stream_opened(self, stream: yamux.Stream) -> None:
        """The peer opened a stream."""
        if self.end is not None:
            self.session.reset(stream, ResetCode.SHUTDOWN)  # `close` was called while this message is being read
            return
        stream.owner = channel = Channel(self, stream)
        self._on_stream(channel)

    def stream_data(self, stream: yamux.Stream, buffer: memoryview, start: int, end: int) -> None:
        """Bytes of a stream; straight on to whoever has it."""
        stream.owner.deliver(buffer, start, end, self._now)

    def stream_finished(self, stream: yamux.Stream) -> None:
        """The peer will send no more on this stream."""
        stream.owner.peer_finished()

    def stream_reset(self, stream: yamux.Stream, code: int) -> None:
        """The peer ended this stream."""
        stream.owner.over(code)

    def window_opened(self, stream: yamux.Stream) -> None:
        """More may be sent on this stream than before."""
        stream.owner.window_opened()

    def pong(self, value: int) -> None:
        """The answer to a ping of ours."""
        if self._confirmations.answered(value):
            return
        if self._ping_at is not None and value == self._ping_value:
            sample = self._now - self._ping_at
            self._ping_at = None
            if sample >= INTERRUPTED and self.rtt is not None:
                return
            self.rtt = sample if self.rtt is None else 0.875 * self.rtt + 0.125 * sample
            self.session.measured(sample)

    def gone_away(self, code: int) -> None:
        """The peer takes no more streams, or ends all of them."""
        if code == ResetCode.RATE_LIMITED:
            reason = "the peer ended the connection: this node made it work for nothing; its log says with what"
            self._finish(LinkEnd("remote-go-away", reason), ResetCode.CONNECTION_LOST, None)
        elif code != GoAwayCode.NORMAL:
            reason = f"the peer ended the connection with code {code}"
            self._finish(LinkEnd("remote-go-away", reason), ResetCode.CONNECTION_LOST, None)
        elif self.end is None:
            self._confirmations.hurry()  # it may close soon
            self._on_gone_away()

    # ---- life and death

    def _ping(self) -> None:
        self._ping_value = (self._ping_value + 1) & 0xFFFF_FFFF
        self._ping_at = self._clock()
        vigil = self._vigil
        vigil.measured = self.sent + self.received
        self.session.ping(self._ping_value)
        self.plan_flush()
        if vigil.next_look > LOOK:
            self._timer.cancel()
            vigil.next_look = self._clock() - vigil.looked_at + LOOK
            self._timer = self.reactor.call_later(LOOK, self._tick)

    def _ask(self, value: int) -> None:
        self.session.ping(value)
        self.plan_flush()

    def _tick(self) -> None:
        now, vigil = self._clock(), self._vigil
        # What is more than was planned is time in which this process did not run.
        passed, vigil.looked_at = min(now - vigil.looked_at, 2 * vigil.next_look), now
        received, acknowledged, sent = vigil.seen
        told = self._wire.acknowledgement()
        vigil.seen = (self.received, 0 if told is None else told.acknowledged, self.sent)
        progress = vigil.seen[1] > acknowledged
        waited, vigil.waits = vigil.waits, self._ping_at is not None or (told is not None and told.outstanding)
        silent = waited and vigil.waits and self.received == received and not progress
        vigil.silent = vigil.silent + passed if silent else 0.0
        stuck = (self._full or self._unsent is not None) and self.sent == sent and not progress
        vigil.stuck = vigil.stuck + passed if stuck else 0.0
        limit = self._patience.silence
        if vigil.silent >= limit:
            reason = f"the peer has been silent for {limit:g} s"
            self._finish(LinkEnd("keepalive-timeout", reason), ResetCode.CONNECTION_LOST, None)
            return
        if vigil.stuck >= limit:
            reason = f"the peer has taken no bytes for {limit:g} s"
            self._finish(LinkEnd("send-timeout", reason), ResetCode.CONNECTION_LOST, None)
            return
        # A ping that nothing has been heard after is on its way, or TCP sends it again: another one would say no more.
        heard = self._ping_at is None or self._now > self._ping_at
        much = self._ping_at is None and self.sent + self.received - vigil.measured > MUCH
        vigil.next_look = 0.0  # it is planned below
        if much or (heard and now - self._now >= vigil.interval):
            self._ping()
        if not (vigil.waits or self._full) and self._ping_at is None and self._unsent is None:
            vigil.next_look = max(LOOK, self._now + vigil.interval - now)
        else:
            vigil.next_look = min(LOOK, limit / 4)
        self._timer = self.reactor.call_later(vigil.next_look, self._tick)

    def _failed(self, error: Exception) -> None:
        if isinstance(error, DefectError):
            end = LinkEnd(error.code, f"a defect of this node: {error}", error)
            self._finish(end, ResetCode.CONNECTION_LOST, GoAwayCode.INTERNAL_ERROR)
        elif isinstance(error, ProtocolError):
            self._finish(LinkEnd(error.code, str(error)), ResetCode.CONNECTION_LOST, GoAwayCode.PROTOCOL_ERROR)
        elif isinstance(error, PeerupError):
            self._finish(LinkEnd(error.code, str(error)), ResetCode.CONNECTION_LOST, GoAwayCode.INTERNAL_ERROR)
        else:
            self._lose(error)

    def _lose(self, error: Exception) -> None:
        """The wire is broken, and what it still holds came before that: end when that was taken."""
        if self.closed or self._losing:
            return
        self._losing = True
        self._release_unsent()
        self._unsent = memoryview(b"")  # the wire takes nothing any more
        # not now: the rooms may be in use for another link, whose bytes are passed on to this one
        self.reactor.call_soon(lambda: self._read_last(error))

    def _read_last(self, error: Exception) -> None:
        with contextlib.suppress(OSError):
            for _ in range(_LAST_ROUNDS):
                received = self.received
                try:
                    self._read_wire()
                except PeerupError as unreadable:
                    self._failed(unreadable)
                if self.received == received or self.closed:
                    break
        code = "network-lost" if network_failed(error) else "connection-lost"
        self._finish(LinkEnd(code, str(error)), ResetCode.CONNECTION_LOST, None)

    def _conclude(self, end: LinkEnd, code: ResetCode, *, at_once: bool) -> None:
        """Nobody uses the link any more: reset what is open, tell `on_end`."""
        self.end = end
        self._timer.cancel()
        self._queue.clear()
        self._sparse.clear()
        for stream in self.session:
            self.session.reset(stream, code)
            stream.owner.over(code, at_once=at_once)
        self.reactor.call_soon(lambda: self._on_end(end))

    def _finish(self, end: LinkEnd, code: ResetCode, go_away: GoAwayCode | None, *, at_once: bool = False) -> None:
        """Close the wire, and end the link if it has not ended yet."""
        if self.closed:
            return
        received = not self._confirmations.pending or (end.code == "remote-close" and self._is_acknowledged())
        self._timer.cancel()
        if self._passed_buffer is not None:
            self.reactor.return_buffer(self._passed_buffer)
            if self._passed:
                go_away = None  # what was sealed before it is lost, and it could not be read
            self._passed_buffer, self._passed = None, 0
        if go_away is not None and self._unsent is None:
            self._say_go_away(go_away)
        self.closed = True
        self._release_unsent()
        self._wire.close()
        if self._closing is not None:
            self._closing.stop()
        if self.end is None:
            self._conclude(end, code, at_once=at_once)
        self._confirmations.end(received=received)
        self.on_closed()

    def _is_acknowledged(self) -> bool:
        """Whether everything has gone out and the peer's machine has taken it."""
        known = None if self.unsent or self._queue or self._sparse else self._wire.acknowledgement()
        return known is not None and known.complete

    def _say_go_away(self, code: GoAwayCode) -> None:
        """The last words, if the wire takes them at once."""
        words = memoryview(bytearray(_LAST_WORDS + _PREFIX + TAG_LENGTH))
        with contextlib.suppress(OSError, PeerupError):
            if not self.session.local_gone:
                self.session.go_away(code)
            plain = memoryview(bytearray(_LAST_WORDS))
            length = self.session.take_control(plain, 0, _LAST_WORDS)
            if not self.session.has_control:
                self.sent += self._wire.send(words[: self._seal(plain[:length], words)])
