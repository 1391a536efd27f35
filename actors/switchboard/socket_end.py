"""The end of a channel that is a TCP socket: the switchboard itself carries the bytes of a tunnel.

Theory of operation. Two directions, each of which is open or ended:

    socket -> peer   The socket becomes readable: the channel stands in its link's queue; the link fetches one message
                     at each turn, while the peer's window lasts. While it does not, or while the link's own socket
                     takes nothing, this one is not read, and the kernel stops its client.
    peer -> socket   The link delivers, and lets what it has delivered settle: all goes to the socket with one call.
                     What the socket does not take is kept, at most one window, since only what the
                     socket has taken is reported to yamux as consumed; and as far as the peer's budget lasts.

An end of file here becomes a FIN of the stream, a FIN of the stream a shutdown for writing here. Both ended: closed.

A reset does not overtake what came before it. A service that refuses an upload answers and closes at once, with input
unread, which is a reset; its answer lies in our socket's receive buffer then, and the kernel keeps it there:

    socket broken -> peer   What the socket still holds is fetched and sent as the peer's window lasts; then the stream
                            is reset. What the peer sends meanwhile is dropped, and it is granted nothing more.
    stream reset -> socket  What came before is written to the socket. It is closed, with a reset, once the other
                            kernel has confirmed all of it.

Either is given up after `draining.PATIENCE` seconds without progress. What ends the stream here (the policy, its
owner, the end of the node) waits for nothing.

The socket closes with a reset (SO_LINGER 1, 0) from the moment that it was given to us until both directions have ended
well. So whatever goes wrong, be it that this process is killed, its client sees a reset and never mistakes a broken
tunnel for a complete one.

Before `attach` the end has no socket and keeps what is delivered, at most one window.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import math
import socket
from collections import deque
from collections.abc import Callable
from typing import Final

from actors.draining import give_up_without_progress, unacknowledged, unread, when_gone
from actors.pump import Outcome
from actors.reactor import ERROR, HANG_UP, READ, WRITE
from actors.sockets import (
    FINISH_ON_CLOSE,
    LARGE_BUFFER,
    RESET_ON_CLOSE,
    SMALL_BUFFER,
    buffer_is_larger,
    is_within_machine,
    send_at_once,
)
from actors.switchboard.channel import Channel
from actors.switchboard.inflow import Inflow
from protocol.stream_descriptor import ResetCode

_GATHER: Final = 16  # pieces of one send
_MUCH: Final = 1024 * 1024  # bytes of one direction after which its buffer may be large
_AGAIN: Final = 8 * 1024 * 1024  # bytes until that is asked for again
_CONFIRM_PAUSE: Final = 0.02  # seconds between looks whether the other kernel has confirmed everything
_DIRECTIONS: Final = 2
_PIECE: Final = 64 * 1024  # up to which small ones are kept as one: else a byte could cost some hundreds


class SocketEnd:
    """Joins `channel`, and owns the socket that it is given by `attach`.

    `unread` came with the stream's negotiation. `on_done(outcome, code)` is called once, from the reactor, when the
    stream is over and the socket closed. `admit(n)` is asked before `n` bytes are kept while there is no socket yet
    (the stream is reset if it says no), and told `-n` when they need no more room.

    Attributes:
        sent: bytes taken from the socket for the peer.
        received: bytes from the peer.
        attached: it has had a socket.

    Raises:
        LinkClosedError: the channel is closed.
    """

    __slots__ = (
        "_admit",
        "_admitted",
        "_broken",
        "_channel",
        "_code",
        "_confirming",
        "_done",
        "_drained",
        "_draining",
        "_events",
        "_fd",
        "_fresh",
        "_heard_end",
        "_inflow",
        "_kept",
        "_large_at",
        "_on_done",
        "_outcome",
        "_peer_finished",
        "_pending",
        "_registered",
        "_shrinks",
        "_shut",
        "_socket",
        "_uncounted",
        "attached",
        "received",
        "sent",
    )

    def __init__(
        self,
        channel: Channel,
        on_done: Callable[[Outcome, int], None],
        *,
        unread: bytes = b"",
        negotiation: Callable[[bytes], bytes | None] | None = None,
        admit: Callable[[int], bool] = lambda _: True,
    ) -> None:
        self.sent = 0
        self.received = len(unread)
        self.attached = False
        self._admit = admit
        self._admitted = 0
        self._channel = channel
        self._on_done = on_done
        self._socket: socket.socket | None = None
        self._fd = -1
        self._events = 0
        self._registered = False
        self._drained = False  # the last read took all there was
        self._pending: deque[bytearray] = deque()  # not taken by the socket yet
        self._fresh: list[memoryview] = []  # delivered, and not settled yet
        self._kept = 0  # bytes of it that are taken from the budget
        self._uncounted = len(unread)  # of its first bytes: those that yamux does not count
        self._peer_finished = False
        self._shut = False  # shut down for writing
        self._large_at = math.inf  # bytes, both ways, with which it is worth asking for large buffers
        self._shrinks: dict[int, Callable[[], bool]] = {}  # by which buffer: those that are large
        self._done = False
        self._outcome = Outcome.STREAM_RESET  # what a reset means
        self._broken = False  # the socket is; what it holds has yet to go to the peer
        self._inflow = Inflow()
        self._heard_end = False  # its other end had finished before it broke
        self._draining = False  # the stream was reset; what came before has yet to be taken by the socket's other end
        self._code = int(ResetCode.NONE)  # with which it was reset
        self._confirming = False  # it has not finished before the other kernel has confirmed everything
        if unread:
            self._pending.append(bytearray(unread))
        channel.join(self, negotiation)
        channel.movable = self

    def attach(self, sock: socket.socket, *, prepared: bool = False) -> None:
        """Carry bytes between the stream and this connected TCP socket, which is taken over.

        `prepared`: it does not block, sends without delay and closes with a reset already.

        Raises:
            OSError: the socket is not fit for it; it is closed, and the stream is as before.
        """
        if not prepared:
            try:
                sock.setblocking(False)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
                send_at_once(sock)
            except OSError:
                sock.close()
                raise
        self.attached = True
        self._release()
        self._socket = sock
        self._fd = sock.fileno()
        self._begin_small(sock)
        self._want(READ)
        if self._pending:
            self._flush()
        elif self._peer_finished:
            self._shut_down()

    def confirm(self) -> None:
        """Do not say that it has finished before the kernel at the socket's other end has confirmed every byte."""
        self._confirming = True

    @property
    def finishing(self) -> bool:
        """Whether the stream has ended well, and only the socket has not taken all of it yet."""
        return self._channel.closed and not self._done

    def abort(self, code: int) -> None:
        """Reset both sides now. `on_done` is called with `Outcome.ABORTED` before this returns."""
        self._reset(Outcome.ABORTED, code)

    # ---- to another stream, called by the channel

    def pause(self) -> None:
        """See `MovableEnd`."""
        if self._registered:
            self._want(self._events & ~READ)

    def move(self, channel: Channel, *, finished: bool) -> None:
        """See `MovableEnd`."""
        self._channel = channel
        if self._registered and not finished and not self._broken:
            self._want(self._events | READ)

    # ---- socket -> peer, called by the channel

    def fetch(self, buffer: memoryview, start: int, limit: int) -> int:
        """See `LocalEnd`."""
        sock = self._socket
        if sock is None:
            return 0
        if self._broken:
            return self._fetch_last(sock, buffer[start : start + limit])
        if not limit:
            self._want(self._events & ~READ)
            return 0
        if self._drained:
            self._drained = False
            self._want(self._events | READ)
            return 0
        try:
            length = sock.recv_into(buffer[start : start + limit])
        except BlockingIOError:
            self._want(self._events | READ)
            return 0
        except OSError:
            self._reset(Outcome.LOCAL_RESET, ResetCode.LOCAL_RESET)
            return 0
        if not length:
            self._want(self._events & ~READ)
            self._channel.finish_now()
            return 0
        self.sent += length
        if self.sent > self._large_at:
            self._enlarge(socket.SO_RCVBUF)
        self._drained = length < limit
        return length

    def _fetch_last(self, sock: socket.socket, room: memoryview) -> int:
        """What the broken socket still holds; when that is all, the reset."""
        if not room:
            return 0  # when the peer grants more, we are asked again
        try:
            length = sock.recv_into(room)
        except OSError:
            length = 0
        if length:
            self.sent += length
            return length
        if self._heard_end:  # it had said all that it would: that it takes no more is another matter
            self._channel.finish_now()
        self._reset(Outcome.LOCAL_RESET, ResetCode.LOCAL_RESET)
        return 0

    # ---- peer -> socket, called by the channel

    def deliver(self, buffer: memoryview, start: int, end: int, now: float) -> None:
        """See `LocalEnd`."""
        if self._broken:
            return
        self.received += end - start
        if self._socket is not None and not self._pending:
            if not self._fresh:
                self._channel.settle_later(self)
            self._fresh.append(buffer[start:end])
            if len(self._fresh) >= _GATHER:
                self.settle(now)
            return
        if self._socket is None:
            if not self._admit(end - start):
                self._reset(Outcome.ABORTED, ResetCode.LIMIT_EXCEEDED)
                return
            self._admitted += end - start
        self._keep(buffer[start:end])

    def settle(self, now: float) -> None:
        """Pass on what was delivered."""
        sock, fresh = self._socket, self._fresh
        if sock is None or not fresh:
            return  # it is over
        self._fresh = []
        try:
            taken = sock.send(fresh[0]) if len(fresh) == 1 else sock.sendmsg(fresh)
        except BlockingIOError:
            taken = 0
        except OSError as error:
            self._lost(error.errno)
            return
        if taken:
            self._channel.keep_queue_short(self._inflow, taken, now)
        if self.received > self._large_at:
            self._enlarge(socket.SO_SNDBUF)
        for piece in fresh:
            if taken < len(piece) and not self._done:
                self._keep(piece[taken:])
            taken = max(0, taken - len(piece))
        if self._pending:
            self._want(self._events | WRITE)
        elif self._peer_finished and not self._done:
            self._shut_down()

    def peer_finished(self) -> None:
        """See `LocalEnd`."""
        self._peer_finished = True
        if self._socket is not None and not self._pending and not self._fresh and not self._broken:
            self._shut_down()

    def stream_closed(self) -> None:
        """See `LocalEnd`."""
        if self._shut and not self._done and not self._draining:
            self._finish_well()

    def over(self, code: int) -> None:
        """See `LocalEnd`."""
        if self._done:
            return
        if self._socket is None or self._broken or self._draining or not self._channel.may_drain:
            if self._fresh and self._socket is not None:  # it came before the reset
                with contextlib.suppress(OSError):
                    self._socket.sendmsg(self._fresh)
            self._finish(self._outcome, code)
            return
        self._draining = True
        self._code = code
        reactor = self._channel.reactor
        self.settle(reactor.clock())
        if not self._done:
            self._want(WRITE if self._pending else 0)
            when_gone(reactor, self._left, lambda: self._finish(self._outcome, self._code))

    def _left(self) -> int | None:
        """Bytes from before the reset that the socket's other end has not got; None when it is over."""
        sock = self._socket
        return None if sock is None else sum(map(len, self._pending)) + unacknowledged(sock)

    # ---- the socket

    def _begin_small(self, sock: socket.socket) -> None:
        """Within this machine: no more of the kernel's memory than every stream may have."""
        if not is_within_machine(sock):
            return  # the kernel makes the buffers of other sockets as large as their way needs
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            with contextlib.suppress(OSError):  # it is broken already, which reading will tell
                if buffer_is_larger(sock, option, SMALL_BUFFER):
                    sock.setsockopt(socket.SOL_SOCKET, option, SMALL_BUFFER)
                    self._large_at = _MUCH

    def _enlarge(self, option: int) -> None:
        """Much goes through: ask for a large buffer in this direction."""
        budget, sock = self._channel.budget, self._socket
        if sock is None:
            return
        if option in self._shrinks or not budget.enlarge(shrink := lambda: self._shrink(option)):
            self._large_at = max(self.sent, self.received) + _AGAIN
            return
        self._shrinks[option] = shrink
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, option, LARGE_BUFFER)
        if len(self._shrinks) == _DIRECTIONS:
            self._large_at = math.inf

    def _shrink(self, option: int) -> bool:
        """Give a large buffer up for another stream, if nothing is in it."""
        sock = self._socket
        if sock is not None and (unacknowledged(sock) if option == socket.SO_SNDBUF else unread(sock)):
            return False
        self._channel.budget.no_longer_large(self._shrinks.pop(option))
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, option, SMALL_BUFFER)
        self._large_at = max(self.sent, self.received) + _AGAIN
        return True

    def _keep(self, data: memoryview) -> None:
        length = len(data)
        if not self._channel.budget.take(length, self._kept):
            self._reset(Outcome.ABORTED, ResetCode.LIMIT_EXCEEDED)
            return
        self._kept += length
        pending = self._pending
        if pending and len(pending[-1]) + length <= _PIECE:
            pending[-1] += data
        else:
            pending.append(bytearray(data))

    def _ready(self, ready: int) -> None:
        if ready & ERROR or (ready & HANG_UP and not self._shut):
            self._lost(self._pending_error())
            return
        if ready & WRITE and self._pending:
            self._flush()
            if self._socket is None:
                return
        if ready & (READ | HANG_UP):
            if self._events & READ and not self._channel.queued:
                self._drained = False
                self._channel.enqueue()
            elif ready & HANG_UP:
                # both directions are shut and what is unread stays readable: there is nothing to hear of until then
                self._channel.reactor.unregister(self._fd)
                self._registered = False
                self._events &= ~READ
            else:
                self._want(self._events & ~READ)  # it waits for its turn: do not tell again

    def _failed(self, error: Exception) -> None:
        self._reset(Outcome.LOCAL_RESET, ResetCode.LOCAL_RESET)

    def _flush(self) -> None:
        sock, pending = self._socket, self._pending
        assert sock is not None
        now = self._channel.reactor.clock()
        if self.received > self._large_at:
            self._enlarge(socket.SO_SNDBUF)
        try:
            while pending:
                self._taken(sock.sendmsg(list(itertools.islice(pending, _GATHER))), now)
        except BlockingIOError:
            self._want(self._events | WRITE)
        except OSError as error:
            self._lost(error.errno)
        else:
            self._want(self._events & ~WRITE)
            if self._peer_finished:
                self._shut_down()

    def _taken(self, length: int, now: float) -> None:
        pending, left = self._pending, length
        while left:
            piece = pending[0]
            if left < len(piece):
                del piece[:left]
                break
            left -= len(piece)
            pending.popleft()
        uncounted = min(length, self._uncounted)
        self._uncounted -= uncounted
        if counted := length - uncounted:
            self._kept -= counted
            self._channel.budget.give_back(counted)
            self._channel.consumed(counted, now, behind=True)

    def _shut_down(self) -> None:
        sock = self._socket
        assert sock is not None
        try:
            sock.shutdown(socket.SHUT_WR)
        except OSError:
            self._lost(self._pending_error())
            return
        self._shut = True
        if self._channel.closed and not self._draining:
            self._finish_well()

    # ---- ends

    def _finish_well(self) -> None:
        """Both directions have ended, and the socket has taken everything."""
        sock = self._socket
        if sock is None:
            return  # it was aborted meanwhile
        if self._confirming and unacknowledged(sock):
            if self._pending_error():
                self._finish(Outcome.LOCAL_RESET, ResetCode.LOCAL_RESET)
            else:
                self._channel.reactor.call_later(_CONFIRM_PAUSE, self._finish_well)
        elif self._confirming and self._pending_error():
            self._finish(Outcome.LOCAL_RESET, ResetCode.LOCAL_RESET)
        else:
            self._finish(Outcome.FINISHED, ResetCode.NONE)

    def _pending_error(self) -> int:
        """What the kernel has to say of the socket, once."""
        assert self._socket is not None
        try:
            return self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        except OSError as error:
            return error.errno or 0

    def _lost(self, number: int | None) -> None:
        """The socket broke, with this error: pass on what it holds, then reset the stream."""
        if self._done or self._broken:
            return
        if self._draining:
            self._finish(self._outcome, self._code)  # nobody is left to take what came before the stream's reset
            return
        if self._channel.closed:
            self._reset(Outcome.LOCAL_RESET, ResetCode.LOCAL_RESET)
            return
        self._broken = True
        # the kernel says so where it was reset after its other end had finished, and "connection reset" otherwise
        self._heard_end = number == errno.EPIPE
        self._unregister()
        self._keep_nothing()
        self._channel.enqueue()
        give_up_without_progress(
            self._channel.reactor,
            lambda: None if self._done else self.sent,
            lambda: self._reset(Outcome.LOCAL_RESET, ResetCode.LOCAL_RESET),
        )

    def _reset(self, outcome: Outcome, code: int) -> None:
        if self._done:
            return
        self._outcome = outcome
        if self._draining:
            self._finish(outcome, code)
        else:
            self._channel.reset(code)

    def _keep_nothing(self) -> None:
        self._pending.clear()
        self._fresh = []
        self._channel.budget.give_back(self._kept)
        self._kept = 0

    def _unregister(self) -> None:
        if self._registered:
            self._channel.reactor.unregister(self._fd)
            self._registered = False
            self._events = 0

    def _finish(self, outcome: Outcome, code: int) -> None:
        if self._done:
            return
        self._done = True
        self._keep_nothing()
        for shrink in self._shrinks.values():
            self._channel.budget.no_longer_large(shrink)
        self._shrinks = {}
        self._release()
        sock, self._socket = self._socket, None
        if sock is not None:
            self._unregister()
            if outcome is Outcome.FINISHED:
                with contextlib.suppress(OSError):  # it is broken already; then nothing is left to be said with care
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, FINISH_ON_CLOSE)
            sock.close()
        self._on_done(outcome, code)

    def _release(self) -> None:
        if self._admitted:
            self._admit(-self._admitted)
            self._admitted = 0

    def _want(self, events: int) -> None:
        if not self._registered:
            if events:
                self._registered = True
                self._channel.reactor.register(self._fd, events, self._ready, self._failed)
        elif events != self._events:
            self._channel.reactor.modify(self._fd, events)
        self._events = events
