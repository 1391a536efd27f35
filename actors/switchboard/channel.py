"""A channel: one stream of a link, in memory at first, then with another end than callbacks.

That other end is a descriptor that another actor has (`hand_over`, told here), or whatever `join` is given, such as the
socket of `actors.switchboard.socket_end`.

Theory of operation. In memory (the switchboard negotiates a protocol on it, or answers pings itself) bytes come and go
by callbacks and `send`. `hand_over` makes a socket pair, whose one end, the seam, stays here; then:

    seam -> peer   The seam becomes readable: the channel stands in the link's queue; the link fetches its messages, one
                   each time round, while the peer's window lasts; when it does not, the seam is not read, nor watched.
    peer -> seam   The link delivers. What the seam does not take is kept, at most one window, since it is not reported
                   to yamux as consumed before it has been taken; and as far as the peer's budget lasts.

The seam's other end may close at any time. When it does while the seam is not being read, what is left in it is read at
once (a kernel buffer at most); a reset behind it waits `draining.PATIENCE` seconds for a peer that admits nothing.
Likewise what came from the peer before it reset the stream is still passed on to the seam, and the reset behind it.
"""

from __future__ import annotations

import math
import socket
from collections import deque
from collections.abc import Callable
from typing import Final, Protocol

from actors.draining import give_up_without_progress
from actors.reactor import HANG_UP, READ, WRITE, Reactor
from actors.switchboard.budget import Budget
from actors.switchboard.inflow import FAST, Inflow
from protocol import yamux
from protocol.errors import LimitExceededError, PeerupError, ProtocolError
from protocol.stream_descriptor import (
    DATA,
    FINISH_MESSAGE,
    MAX_DATA,
    MAX_MESSAGE,
    RESET,
    ResetCode,
    parse_reset,
    reset_message,
)

CHANNEL_QUEUE: Final = 1024 * 1024
"""Bytes that a channel in memory may have waiting for the peer's window."""

_PIECE: Final = 16 * 1024  # up to which small messages are kept as one: else a byte could cost a hundred

SEAM_BUFFER: Final = 1024 * 1024
"""Bytes of kernel buffer asked for on each end of a stream descriptor; the kernel may give less."""


class LinkClosedError(PeerupError):
    """The link, or the stream, is closed or closing: nothing more can be done on it."""

    code = "link-closed"


class Carrier(Protocol):
    """What a channel needs of its link."""

    @property
    def reactor(self) -> Reactor:
        """Where the seam is registered."""
        ...

    @property
    def session(self) -> yamux.Session:
        """Whose stream it is."""
        ...

    @property
    def budget(self) -> Budget:
        """What the peer may make us keep."""
        ...

    @property
    def inflow(self) -> Inflow:
        """What goes on to sockets of what comes from the peer."""
        ...

    def enqueue(self, channel: Channel) -> None:
        """The channel may have something to send."""

    def pass_on(self, channel: Channel, buffer: memoryview, start: int, end: int) -> bool:
        """Send `buffer[start:end]` at once, from there, if nothing else waits; whether it was possible."""
        ...

    def settle_later(self, end: SettlingEnd) -> None:
        """Call `end.settle` when all that has come in has been delivered; until then that stays where it is."""

    def plan_flush(self) -> None:
        """Something waits to be sent."""

    def progress(self) -> int:
        """See `Wire.progress`."""
        ...


class SettlingEnd(Protocol):
    """Who asked to be called after the deliveries."""

    def settle(self, now: float) -> None:
        """All has been delivered."""


class MovableEnd(Protocol):
    """An end that can go on with another stream, as long as nothing has come from the peer."""

    def pause(self) -> None:
        """Take nothing more for the peer."""

    def move(self, channel: Channel, *, finished: bool) -> None:
        """Go on with this channel, which has taken over what was sent; `finished`: and the end of it."""


class LocalEnd(Protocol):
    """What a channel is joined with: where its bytes go to and come from."""

    def fetch(self, buffer: memoryview, start: int, limit: int) -> int:
        """Move up to `limit` bytes for the peer to `buffer[start:]`. `limit` is 0 while the peer admits none.

        Returns the length; 0 when there is nothing to send, or when that was the end (see `Channel.finish_now`).
        """
        ...

    def deliver(self, buffer: memoryview, start: int, end: int, now: float) -> None:
        """`buffer[start:end]` came from the peer. Say `Channel.consumed` of what has gone on.

        The bytes are good until this returns, or, if it has said `Channel.settle_later`, until `settle` does.
        """

    def peer_finished(self) -> None:
        """The peer will send no more."""

    def stream_closed(self) -> None:
        """Both directions of the stream are finished; what was delivered may still have to go on."""

    def over(self, code: int) -> None:
        """The stream was reset with this code. Not called again."""


def _nothing() -> None:
    pass


def _no() -> bool:
    return False


class Channel:
    """One stream. Callbacks are plain attributes, made from the reactor; set them before control returns to it.

    - `on_data(data)`: bytes from the peer. They count as consumed: keep no more of them than you can bound.
    - `on_finish()`: the peer will send no more. Unless set, the answer is to finish, too, as every protocol without
      half-close needs it (js-libp2p counts a stream as open until then).
    - `on_reset(code)`: the stream is over, by the peer or with the link; not called for your own `reset`.
    - `on_both_finished()`: both directions have finished, or it has ended otherwise; after `await_delivery` alone.
    - `on_closed()`: the stream has left the link and its descriptor is closed, however it ended. The last call made.

    Attributes:
        id: the yamux stream id.
        inbound: the peer opened it.
        sent, received: bytes of the stream's data.
        queued: it stands in one of the link's queues (the link's to change).
        allowance, allowance_at: bytes that it might send before those that send much, and when that was so (likewise).
        stream: yamux's record of it.
        ended_by: the code that the peer reset it with, or that the end of the link did; None otherwise.
        movable: the end that it is joined with, if that can go on with another stream.
        on_lost: asked, when the link has ended and what was sent is kept, whether somebody will `move_to` or `abandon`
            it; see `keep_sent`.
        may_drain: it was not ended from here: what came before its end may still go on to whoever reads it.
    """

    __slots__ = (
        "_ahead",
        "_attached",
        "_closed_told",
        "_confirming",
        "_end",
        "_ended_as",
        "_events",
        "_finish_held",
        "_finishing",
        "_holding",
        "_kept",
        "_last_code",
        "_link",
        "_negotiation",
        "_pending",
        "_seam",
        "_seam_fd",
        "_unsent",
        "_unsent_bytes",
        "allowance",
        "allowance_at",
        "ended_by",
        "inbound",
        "may_drain",
        "movable",
        "on_both_finished",
        "on_closed",
        "on_data",
        "on_finish",
        "on_lost",
        "on_reset",
        "queued",
        "received",
        "sent",
        "stream",
    )

    on_data: Callable[[bytes], None]
    on_finish: Callable[[], None]
    on_reset: Callable[[int], None]
    on_closed: Callable[[], None]
    on_both_finished: Callable[[], None]
    on_lost: Callable[[], bool]

    def __init__(self, link: Carrier, stream: yamux.Stream) -> None:
        self.inbound = stream.inbound
        self.sent = 0
        self.received = 0
        self.ended_by: int | None = None
        self.may_drain = False
        self.stream = stream
        self.queued = False
        self.allowance = 0
        self.allowance_at = -math.inf
        self.on_data = lambda _: None
        self.on_finish = self.finish
        self.on_reset = lambda _: None
        self.on_closed = _nothing
        self.on_both_finished = _nothing
        self.on_lost = _no
        self.movable: MovableEnd | None = None
        self._ahead: bytearray | None = None  # all that was sent, while it is kept
        self._link = link
        self._end: LocalEnd | None = None
        self._seam: socket.socket | None = None
        self._seam_fd = -1
        self._attached = False  # the reactor watches the seam
        self._events = 0  # for what
        self._pending: deque[bytes | bytearray] = deque()  # messages that the seam did not take yet
        self._kept = 0  # bytes of data in them
        self._unsent: deque[bytes] = deque()  # data that the peer's window does not admit yet
        self._unsent_bytes = 0
        self._finishing = False  # finish, or have finished, after `_unsent`
        self._confirming = False  # after both have finished, the seam is told how it came out at the far end
        self._ended_as: int | None = None  # how it did
        self._holding = False  # do not finish yet
        self._finish_held = False  # what was not done therefore
        self._last_code: int | None = None  # reset with this code after `_unsent`
        self._closed_told = False
        self._negotiation: Callable[[bytes], bytes | None] | None = None  # what hears the peer before the seam does

    def __repr__(self) -> str:
        return f"<Channel {self.stream.id} of {self._link!r}>"

    @property
    def id(self) -> int:
        """The yamux stream id."""
        return self.stream.id

    @property
    def unsent(self) -> int:
        """Bytes given to `send` that have yet to go."""
        return self._unsent_bytes

    @property
    def closed(self) -> bool:
        """Both directions are finished, or it was reset."""
        return self.stream.closed

    # ---- used in memory

    def send(self, data: bytes) -> None:
        """Send; what the peer's window does not admit yet is queued.

        Raises:
            LimitExceededError: more than 1 MiB would be queued.
            LinkClosedError: the stream is finished, reset, or handed over.
        """
        if self.stream.closed or self._finishing or self._seam is not None or self._end is not None:
            raise LinkClosedError("nothing can be sent on this stream any more")
        if self._unsent_bytes + len(data) > CHANNEL_QUEUE:
            raise LimitExceededError("the peer does not read what is sent to it")
        for start in range(0, len(data), MAX_DATA):
            self._unsent.append(data[start : start + MAX_DATA])
        self._unsent_bytes += len(data)
        self._link.enqueue(self)

    def finish(self) -> None:
        """Half-close: nothing more will be sent, after what is queued. Twice is once."""
        if not self._finishing and not self.stream.closed:
            self._finishing = True
            self._link.enqueue(self)

    def reset(self, code: int) -> None:
        """End the stream both ways at once. Whoever has the descriptor, if it was handed over, is told the code."""
        self.may_drain = False
        if not self.stream.closed:
            self._link.session.reset(self.stream, code)
            self._link.plan_flush()
        self._drop(code)

    def hand_over(
        self, unread: bytes = b"", negotiation: Callable[[bytes], bytes | None] | None = None
    ) -> socket.socket:
        """Attach the stream to a new socket pair and return the other end, non-blocking, for somebody else.

        `unread` (bytes that came with the negotiation and belong to the application) are delivered first. From now on
        no callback but `on_closed` is made.

        A `negotiation` that the peer has not answered yet goes on: what is written to the descriptor flows to the peer
        at once, but what comes from the peer is given to `negotiation`, until that returns the bytes that belong to the
        application. If it raises a ProtocolError, or the peer finishes, the stream is reset (NEGOTIATION_FAILED).

        Raises:
            LinkClosedError: the stream is closed or finished.
            OSError: no descriptors are left.
        """
        self._check_free()
        seam, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        for end in (seam, other):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEAM_BUFFER)
        self._seam = seam
        self._negotiation = negotiation
        for start in range(0, len(unread), MAX_DATA):
            self._tell(b"D" + unread[start : start + MAX_DATA])
        if self.stream.remote_finished:
            self._tell(FINISH_MESSAGE)
        self._take_seam(seam, self._events | READ)
        self._link.session.acknowledge(self.stream)
        self._link.plan_flush()
        return other

    def join(self, end: LocalEnd, negotiation: Callable[[bytes], bytes | None] | None = None) -> None:
        """Let `end` have the stream, with a `negotiation` that goes on as in `hand_over`.

        Raises:
            LinkClosedError: the stream is closed or finished.
        """
        self._check_free()
        self._end = end
        self._negotiation = negotiation
        if self.stream.remote_finished:
            end.peer_finished()
        self._link.session.acknowledge(self.stream)
        self._link.plan_flush()

    def await_delivery(self) -> None:
        """After `hand_over`: do not finish before `let_finish`, nor let go of the seam before `delivered`."""
        self._confirming = self._holding = True

    @property
    def confirming(self) -> bool:
        """Whether somebody waits for `delivered`."""
        return self._confirming

    def let_finish(self) -> None:
        """The stream may finish as soon as the seam's other end has. Twice is once."""
        if self._holding:
            self._holding = False
            if self._finish_held and not self.stream.closed:
                self._finish_held = False
                self._finishing = True
                self._link.enqueue(self)

    def delivered(self, code: int) -> None:
        """This came of it at the far end: tell the seam's other end when both directions have finished."""
        self._ended_as = code
        self._check_closed()

    # ---- until the peer has said a word

    def keep_sent(self) -> None:
        """Keep all that is sent until the peer has agreed on a protocol, so that it can be sent on another stream."""
        self._ahead = bytearray()

    @property
    def sent_ahead(self) -> int | None:
        """Bytes that were sent and are kept; None if they are not."""
        return None if self._ahead is None else len(self._ahead)

    def move_to(self, new: Channel) -> None:
        """Go on with a fresh stream: all that was sent on this one, and whoever has it. This one is reset.

        Only where the peer has not seen this stream and never will.

        Raises:
            LinkClosedError, LimitExceededError: the new one does not take it; nothing has happened.
        """
        assert self._ahead is not None
        new.keep_sent()
        new.send(b"".join((self._ahead, *self._unsent)))
        new.on_closed, self.on_closed = self.on_closed, _nothing
        new._negotiation, self._negotiation = self._negotiation, None
        new._confirming, self._confirming = self._confirming, False
        new._holding, new._finish_held = self._holding, self._finish_held
        movable, finished = self.movable, self._finishing
        if self._seam is not None:
            seam, self._seam = self._seam, None
            if self._attached:
                self._attached = False
                self._link.reactor.unregister(self._seam_fd)
            new._take_seam(seam, READ if not (finished or self._finish_held) else 0)
        elif self._end is not None and movable is not None:
            new._end, self._end = self._end, None
            new.movable, self.movable = movable, None
            movable.move(new, finished=finished)
        if finished:
            new.finish()
        new._link.enqueue(new)
        if self.stream.closed:
            self._tell_closed()
        else:
            self.reset(ResetCode.CONNECTION_LOST)

    def abandon(self) -> None:
        """The link has ended, and nothing better was found: end as every stream of it has."""
        if self.stream.closed:
            self._drop(ResetCode.CONNECTION_LOST)

    def _take_seam(self, seam: socket.socket, events: int) -> None:
        self._seam, self._seam_fd, self._events = seam, seam.fileno(), events
        self._attached = True
        self._link.reactor.register(self._seam_fd, self._events, self._seam_ready, self._seam_failed)

    def _note_sent(self, sent: memoryview) -> None:
        ahead = self._ahead
        if ahead is not None:
            if self._link.budget.take(len(sent), len(ahead)):
                ahead += sent
            else:
                self._forget_sent()

    def _forget_sent(self) -> None:
        ahead, self._ahead = self._ahead, None
        if ahead:
            self._link.budget.give_back(len(ahead))

    def _check_free(self) -> None:
        if self.stream.closed:
            raise LinkClosedError(
                "the peer ended the stream as soon as it was open; most likely the service behind it is not running"
            )
        if self._finishing or self._seam is not None or self._end is not None:
            raise LinkClosedError("the stream cannot be handed over any more")

    # ---- used by the end that it is joined with

    @property
    def reactor(self) -> Reactor:
        """Where the stream's link lives."""
        return self._link.reactor

    @property
    def budget(self) -> Budget:
        """What the peer may make us keep."""
        return self._link.budget

    def enqueue(self) -> None:
        """Have `fetch` called: there may be something to send."""
        self._link.enqueue(self)

    def progress(self) -> int:
        """A number that changes when the link's peer has taken more of what the link sends."""
        return self._link.progress()

    def settle_later(self, end: SettlingEnd) -> None:
        """Have `end.settle` called; see `LocalEnd.deliver`."""
        self._link.settle_later(end)

    def pass_on(self, buffer: memoryview, start: int, end: int) -> bool:
        """Send `buffer[start:end]`, which was delivered to the end of another channel, without keeping it.

        Whether that was possible; otherwise have it fetched. What is delivered and its header may be overwritten.
        """
        stream = self.stream
        if self._unsent or self._finishing or stream.closed or stream.local_finished:
            return False
        if not self._link.pass_on(self, buffer, start, end):
            return False
        self.sent += end - start
        return True

    def finish_now(self) -> None:
        """Half-close at once; only from within `fetch`."""
        self._finishing = True
        self._link.session.finish(self.stream)
        self._check_closed()

    def consumed(self, length: int, now: float, *, behind: bool = False) -> None:
        """So many delivered bytes have gone on; `behind`: they had to wait. Grants the peer more in due course."""
        if self._link.session.consumed(self.stream, length, now, behind=behind):
            self._link.plan_flush()

    def keep_queue_short(self, inflow: Inflow, length: int, now: float) -> None:
        """As `consumed` of bytes that have gone on at once, but grant a sender of much little more than it needs."""
        session, stream = self._link.session, self.stream
        whole = self._link.inflow
        whole.came(length, now)
        inflow.came(length, now)
        window = inflow.window(session.least_rtt) if session.streams > 1 and whole.rate < FAST else None
        if window is not None and window < 2 * stream.window:
            # Gradually: half of what has gone on is granted again. A sender that is let run dry sends all of the next
            # grant as one message, which can be read when all of it is there, and so goes on in lumps with pauses.
            session.resize(stream, max(window, stream.window - length // 2))
            self.consumed(length, now, behind=True)  # it does not grow either
        else:
            self.consumed(length, now)

    def resize_window(self, rate: float, queue: float, least: int) -> None:
        """What the peer sends goes on at `rate` bytes a second: grant so much that about `queue` seconds of it wait.

        But no less than `least` bytes.

        Besides that so much is granted as is under way for the least round trip, and a half more, since grants come in
        pieces and late.
        """
        session = self._link.session
        session.resize(self.stream, max(least, round(rate * (1.5 * session.least_rtt + queue))))

    # ---- seam -> peer, called by the link

    def fetch(self, buffer: memoryview, start: int, limit: int) -> int:
        """Move data for the peer to `buffer[start:]`, no more than its window and `limit` allow; one message of a seam.

        Returns the length; 0 when there is nothing to send or it may not be sent (leave the queue), -1 when it is worth
        asking again. `buffer[start - 1]` and what is after the data, as far as a message reaches, are overwritten. A
        seam's message is not cut by `limit`.
        """
        stream = self.stream
        window = stream.send_window
        if self._unsent and not stream.closed:
            if not window:
                self._want(self._events & ~READ)  # else the seam would be told of again and again
                return 0
            return self._fetch_unsent(buffer, start, min(window, limit))
        if self._last_code is not None:
            self.reset(self._last_code)
            return 0
        if self._finishing:
            if not stream.local_finished and not stream.closed:
                self._link.session.finish(stream)
                self._check_closed()
            return 0
        if self._end is not None:
            if stream.closed:
                return 0
            length = self._end.fetch(buffer, start, min(window, limit))
            if self._ahead is not None and length > 0:
                self._note_sent(buffer[start : start + length])
            return length
        if self._seam is None or stream.closed or self._finish_held:
            return 0
        return self._fetch_message(self._seam, buffer, start, window)

    def _fetch_message(self, seam: socket.socket, buffer: memoryview, start: int, window: int) -> int:
        if not window:
            self._want(self._events & ~READ)
            return 0
        try:
            length = seam.recv_into(buffer[start - 1 : start + MAX_MESSAGE])
        except BlockingIOError:
            self._want(self._events | READ)
            return 0
        except ConnectionResetError:
            return -1  # the other end was closed with messages unread; its own are still to be read
        except OSError:
            self.reset(ResetCode.LOST)
            return 0
        if length < 2 or buffer[start - 1] != DATA:
            self._take_control(bytes(buffer[start - 1 : start - 1 + length]))
            return 0
        length -= 1
        if length > MAX_DATA:
            self.reset(ResetCode.PROTOCOL_VIOLATION)
            return 0
        if length > window:
            rest = bytes(buffer[start + window : start + length])
            self._unsent.append(rest)
            self._unsent_bytes += len(rest)
            length = window
        self.sent += length
        if self._ahead is not None:
            self._note_sent(buffer[start : start + length])
        return length

    def _fetch_unsent(self, buffer: memoryview, start: int, limit: int) -> int:
        data = self._unsent.popleft()
        if len(data) > limit:
            self._unsent.appendleft(data[limit:])
            data = data[:limit]
        length = len(data)
        self._unsent_bytes -= length
        buffer[start : start + length] = data
        self.sent += length
        if self._ahead is not None:
            self._note_sent(buffer[start : start + length])
        return length

    def window_opened(self) -> None:
        """More may be sent than before."""
        if self._unsent or self._seam is not None or self._end is not None:
            self._link.enqueue(self)

    def _take_control(self, message: bytes) -> None:
        """F, R, the end of the seam, or nonsense."""
        if message == FINISH_MESSAGE:
            self._want(self._events & ~READ)
            if self._holding:
                self._finish_held = True
            else:
                self.finish_now()
        else:
            self.reset(self._code_of(message))

    @staticmethod
    def _code_of(message: bytes) -> int:
        """Why a stream ends that ends with this message."""
        if not message:
            return ResetCode.LOST
        return parse_reset(message) if message[0] == RESET and len(message) == 5 else ResetCode.PROTOCOL_VIOLATION

    # ---- peer -> seam, called by the link

    def deliver(self, buffer: memoryview, start: int, end: int, now: float) -> None:
        """`buffer[start:end]` came from the peer. `buffer[start - 1]` is overwritten."""
        self.received += end - start
        if self._end is not None and self._negotiation is None:
            self._end.deliver(buffer, start, end, now)
            return
        if self._seam is None and self._end is None:
            self._link.session.consumed(self.stream, end - start, now)
            self.on_data(bytes(buffer[start:end]))
            return
        if self._negotiation is not None:
            self._negotiate(self._negotiation, bytes(buffer[start:end]), now)
            return
        while end - start > MAX_DATA:
            self._deliver_message(buffer, start, start + MAX_DATA, now)
            start += MAX_DATA
        self._deliver_message(buffer, start, end, now)

    def _negotiate(self, negotiation: Callable[[bytes], bytes | None], data: bytes, now: float) -> None:
        try:
            rest = negotiation(data)
        except ProtocolError:
            self.reset(ResetCode.NEGOTIATION_FAILED)
            return
        if rest is not None:
            self._negotiation = None
            self._forget_sent()
        end = self._end
        # what a descriptor is told may wait in our queue, but it is no more than came in at once
        left = len(rest) if rest is not None and end is not None else 0
        self._link.session.consumed(self.stream, len(data) - left, now)
        if rest and end is not None:
            end.deliver(memoryview(rest), 0, len(rest), now)
        elif rest:
            for start in range(0, len(rest), MAX_DATA):
                self._tell(b"D" + rest[start : start + MAX_DATA])

    def _deliver_message(self, buffer: memoryview, start: int, end: int, now: float) -> None:
        seam = self._seam
        if seam is None or self._last_code is not None:
            return  # it was lost a moment ago
        buffer[start - 1] = DATA
        if not self._pending:
            try:
                seam.send(buffer[start - 1 : end])
            except BlockingIOError:
                self._want(self._events | WRITE)
            except OSError:
                self._other_end_closed()
                return
            else:
                self._link.session.consumed(self.stream, end - start, now)
                return
        self._keep(buffer[start - 1 : end])

    def _keep(self, message: memoryview) -> None:
        length = len(message) - 1
        if not self._link.budget.take(length, self._kept):
            self.reset(ResetCode.LIMIT_EXCEEDED)
            return
        self._kept += length
        last = self._pending[-1] if self._pending else None
        if isinstance(last, bytearray) and len(last) + length <= _PIECE:
            last += message[1:]
        else:
            self._pending.append(bytearray(message))

    def _keep_nothing(self) -> None:
        self._pending.clear()
        self._link.budget.give_back(self._kept)
        self._kept = 0

    def peer_finished(self) -> None:
        """The peer will send no more."""
        if self._seam is None and self._end is None:
            self.on_finish()
        elif self._negotiation is not None:
            self.reset(ResetCode.NEGOTIATION_FAILED)
        elif self._end is not None:
            self._end.peer_finished()
        else:
            self._tell(FINISH_MESSAGE)
        self._check_closed()

    def over(self, code: int, *, at_once: bool = False) -> None:
        """The peer reset the stream, or the link is gone; `at_once`: because we ended it."""
        handed_over = self._seam is not None or self._end is not None
        self.ended_by = code
        if handed_over and self._ahead is not None and self._last_code is None and not at_once and self.on_lost():
            if self._seam is not None:
                self._want(self._events & ~READ)
            elif self.movable is not None:
                self.movable.pause()
            return
        self.may_drain = not at_once
        self._confirming = False
        if self._seam is not None and self._pending and not at_once:
            self._unsent.clear()
            self._unsent_bytes = 0
            self._tell(reset_message(code))  # after what came before it
            give_up_without_progress(self._link.reactor, self._left, self._give_up)
        else:
            self._drop(code)
        if not handed_over:
            self.on_reset(code)

    def _left(self) -> int | None:
        """How much was said before a reset and has not gone on yet; None when it is over."""
        if self._seam is None:
            return None
        return (len(self._pending) if self.stream.closed else self._unsent_bytes) or None

    def _give_up(self) -> None:
        """Wait no longer for a reader of the seam, or for a peer, that takes nothing."""
        if self.stream.closed:
            self._close_seam()
        elif self._last_code is not None:
            self.reset(self._last_code)

    # ---- the seam

    def _seam_ready(self, ready: int) -> None:
        if ready & WRITE and self._pending:
            self._flush_pending()
            if self._seam is None:
                return
        if not ready & ~WRITE:
            return
        if self.stream.closed:
            if ready & HANG_UP:
                self._close_seam()  # nobody is left to take what is pending
        elif self._events & READ and not self.queued and not self._finish_held:
            self._link.enqueue(self)
        elif ready & HANG_UP:
            self._other_end_closed()
        else:
            # it waits for its turn: do not tell again
            self._want(self._events & ~READ)

    def _seam_failed(self, error: Exception) -> None:
        self.reset(ResetCode.LOST if isinstance(error, OSError) else ResetCode.PROTOCOL_VIOLATION)

    def _other_end_closed(self) -> None:
        """Read what is left in the seam, whatever the peer's window, to learn how it ended."""
        seam, stream = self._seam, self.stream
        assert seam is not None
        if self._last_code is not None:
            return  # it was learnt before
        message = b""
        while not self._finishing:
            try:
                message = seam.recv(MAX_MESSAGE + 1)
            except ConnectionResetError:
                continue
            except OSError:
                message = b""
            if len(message) < 2 or message[0] != DATA:
                break
            self._unsent.append(message[1:])
            self._unsent_bytes += len(message) - 1
        if message == FINISH_MESSAGE and stream.remote_finished and not self._pending:
            # both directions ended well; only what it sent last has yet to go to the peer
            self._finishing = True
            self._close_seam()
            self._link.enqueue(self)
        else:
            # there is nobody left to hear what the peer may still say
            code = ResetCode.LOST if message == FINISH_MESSAGE else self._code_of(message)
            if not self._unsent:
                self.reset(code)
                return
            self._last_code = code
            self._keep_nothing()
            self._link.reactor.unregister(self._seam_fd)
            self._attached = False
            self._link.enqueue(self)
            give_up_without_progress(self._link.reactor, self._left, self._give_up)

    def _flush_pending(self) -> None:
        seam, pending, stream, session = self._seam, self._pending, self.stream, self._link.session
        assert seam is not None
        now = self._link.reactor.clock()
        try:
            while pending:
                seam.send(pending[0])
                message = pending.popleft()
                if isinstance(message, bytearray):  # else it never was in a window
                    self._kept -= len(message) - 1
                    self._link.budget.give_back(len(message) - 1)
                    session.consumed(stream, len(message) - 1, now, behind=True)
        except BlockingIOError:
            pass
        except OSError:
            self._keep_nothing()
            if stream.closed:
                self._close_seam()
            else:
                self._other_end_closed()
            return
        if session.has_control:
            self._link.plan_flush()
        if not pending:
            self._want(self._events & ~WRITE)
            self._check_closed()

    def _tell(self, message: bytes) -> None:
        """Send a message to the seam's other end, now or when it takes it."""
        seam = self._seam
        assert seam is not None
        if not self._pending:
            try:
                seam.send(message)
            except BlockingIOError:
                self._want(self._events | WRITE)
            except OSError:
                return  # the reactor tells that it has hung up
            else:
                return
        self._pending.append(message)

    def _drop(self, code: int) -> None:
        """The stream is over: forget what waits, tell the other end of the seam, close."""
        self._confirming = False
        self._keep_nothing()
        self._unsent.clear()
        self._unsent_bytes = 0
        if self._seam is not None:
            self._tell(reset_message(code))
        elif self._end is not None:
            self._end.over(code)
        self._check_closed()

    def _check_closed(self) -> None:
        if self.stream.closed and not self._pending:
            if self._end is not None:
                self._end.stream_closed()
            if self._confirming and self._seam is not None:
                if self._ended_as is None:
                    self.on_both_finished()
                    return
                self._confirming = False
                self._tell(reset_message(self._ended_as))
                if self._pending:
                    return
            self._close_seam()
            self._tell_closed()

    def _close_seam(self) -> None:
        seam, self._seam = self._seam, None
        if seam is not None:
            self._keep_nothing()
            if self._attached:
                self._attached = False
                self._link.reactor.unregister(self._seam_fd)
            seam.close()
        if self.stream.closed:
            self._tell_closed()

    def _tell_closed(self) -> None:
        if not self._closed_told:
            self._closed_told = True
            self._forget_sent()
            self.on_both_finished()
            self.on_closed()

    def _want(self, events: int) -> None:
        if events != self._events:
            self._events = events
            if self._attached:
                self._link.reactor.modify(self._seam_fd, events)
