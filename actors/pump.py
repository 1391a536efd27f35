"""The pump: carries bytes between a connected stream socket and a stream descriptor.

Theory of operation. Two directions, each of which is open or ended:

    local -> stream   reads the local socket, sends D messages; end of file becomes F
    stream -> local   reads messages, writes D to the local socket; F becomes a shutdown for writing

Both ended: the pump is done, cleanly. A reset on either side ends both and crosses over, behind what came before it: R
makes the local socket close with RST, a failure of the local socket makes an R with `LOCAL_RESET`. Each direction
holds at most what one read gave and the other side has not taken, and reads no more until it has: the kernel's buffers
do the rest. A pump that waits holds no memory of its own; bytes pass through the reactor's scratch buffer.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import select
import socket
from collections.abc import Callable
from typing import Final

from actors.draining import give_up_without_progress, unacknowledged, when_gone
from actors.reactor import ERROR, HANG_UP, READ, WRITE, Reactor
from actors.sockets import RESET_ON_CLOSE, send_at_once
from protocol.stream_descriptor import (
    DATA,
    FINISH,
    FINISH_MESSAGE,
    MAX_DATA,
    MAX_MESSAGE,
    ResetCode,
    check_message,
    parse_reset,
    reset_message,
)

_ROUNDS: Final = 8  # reads of one callback: about half a megabyte
_GATHER: Final = 4 * MAX_MESSAGE  # of one write to the local socket


class Outcome(enum.Enum):
    """How a pump ended."""

    FINISHED = "finished"  # both directions finished cleanly
    STREAM_RESET = "stream-reset"  # the far side reset the stream; `code` says why
    LOCAL_RESET = "local-reset"  # the local socket was reset or failed
    STREAM_LOST = "stream-lost"  # the process at the other end of the descriptor is gone
    ABORTED = "aborted"  # `abort` was called here


@dataclasses.dataclass(frozen=True)
class PumpResult:
    """The account of a finished pump.

    Attributes:
        code: the reset code sent or received; 0 when finished.
        sent: bytes from the local socket to the stream.
        received: bytes from the stream to the local socket.
    """

    outcome: Outcome
    code: int
    sent: int
    received: int


class Pump:
    """Takes ownership of both sockets; both are closed before `on_done` is called (exactly once, from the reactor).

    With `confirm` it is done when the stream, opened with `OpenStream.confirm`, has told what came of it at the far
    end; and a local socket that is closed, rather than shut down, before the far side has finished was lost.

    Attributes:
        sent: bytes taken from the local socket for the stream so far.
        received: bytes taken from the stream for the local socket so far.
    """

    __slots__ = (
        "_confirm",
        "_confirmed",
        "_done",
        "_local",
        "_local_attached",
        "_local_broken",
        "_local_events",
        "_local_fd",
        "_local_finished",
        "_on_done",
        "_reactor",
        "_stream",
        "_stream_attached",
        "_stream_ended",
        "_stream_events",
        "_stream_fd",
        "_stream_finished",
        "_to_local",
        "_to_stream",
        "received",
        "sent",
    )

    def __init__(
        self,
        reactor: Reactor,
        local: socket.socket,
        stream: socket.socket,
        on_done: Callable[[PumpResult], None],
        *,
        confirm: bool = False,
    ) -> None:
        self.sent = 0
        self.received = 0
        self._reactor = reactor
        self._local = local
        self._stream = stream
        self._on_done = on_done
        self._to_stream = b""  # a message that the stream did not take yet
        self._to_local = b""  # bytes that the local socket did not take yet
        self._local_finished = False  # end of file was read
        self._stream_finished = False  # F was read
        self._local_broken = False  # the local socket failed; what it holds has yet to go to the stream
        self._stream_ended: tuple[Outcome, int] | None = (
            None  # how, when it did not finish; what came before goes first
        )
        self._done = False
        self._confirm = confirm
        self._confirmed = not confirm
        local.setblocking(False)
        stream.setblocking(False)
        send_at_once(local)
        self._local_fd = local.fileno()
        self._stream_fd = stream.fileno()
        self._local_events = READ
        self._stream_events = READ
        self._local_attached = True
        self._stream_attached = True
        reactor.register(self._local_fd, READ, self._local_ready, self._local_failed)
        reactor.register(self._stream_fd, READ, self._stream_ready, self._stream_failed)

    def abort(self, code: int) -> None:
        """Reset both sides now. `on_done` is called with `Outcome.ABORTED` before this returns."""
        self._reset(Outcome.ABORTED, code, tell_stream=True)

    # ---- local -> stream

    def _local_ready(self, ready: int) -> None:
        if ready & WRITE and self._to_local:
            self._flush_local()
        if self._done:
            return
        if ready & READ:
            if self._local_events & READ:
                self._read_local()
        elif ready & ERROR:
            number = self._local.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            self._local_failed(OSError(number, "the local connection failed"))
        elif ready & HANG_UP:
            if self._local_events & READ:
                self._read_local()
            else:
                # both directions are shut; what is unread stays readable, and there is nothing to wait for until then
                self._detach_local()

    def _read_local(self) -> None:
        local, stream, scratch = self._local, self._stream, self._reactor.scratch
        body = scratch[1:MAX_MESSAGE]
        for _ in range(_ROUNDS):
            try:
                length = local.recv_into(body)
            except BlockingIOError:
                return
            except OSError as error:
                self._local_failed(error)
                return
            if not length:
                if self._confirm and not self._stream_finished and _is_closed(local):
                    self._local_failed(ConnectionResetError("the local program has ended"))
                    return
                self._local_finished = True
                self._want_local(self._local_events & ~READ)
                self._send_stream(FINISH_MESSAGE)
                self._check_done()
                return
            self.sent += length
            scratch[0] = DATA
            try:
                stream.send(scratch[: length + 1])
            except BlockingIOError:
                self._to_stream = bytes(scratch[: length + 1])
                self._want_local(self._local_events & ~READ)
                self._want_stream(self._stream_events | WRITE)
                return
            except OSError:
                self._stream_gone()
                return
            if length < MAX_DATA >> 1:
                return  # most likely all there was

    def _send_stream(self, message: bytes) -> None:
        """Send a message, or keep it until the stream takes it. Nothing is kept yet, unless it is data before F."""
        if self._to_stream:
            return  # _flush_stream sends F by itself after the data
        try:
            self._stream.send(message)
        except BlockingIOError:
            self._to_stream = message
            self._want_stream(self._stream_events | WRITE)
        except OSError:
            self._stream_gone()

    def _flush_stream(self) -> None:
        message = self._to_stream
        try:
            self._stream.send(message)
        except BlockingIOError:
            return
        except OSError:
            self._stream_gone()
            return
        self._to_stream = b""
        self._want_stream(self._stream_events & ~WRITE)
        if self._local_broken:
            self._send_last()
            return
        if not self._local_finished:
            self._want_local(self._local_events | READ)
        elif message[0] != FINISH:
            self._send_stream(FINISH_MESSAGE)
        self._check_done()

    def _stream_gone(self) -> None:
        """Sending failed: the other end is closed. Why may still be there to read."""
        self._to_stream = b""
        self._want_local(self._local_events & ~READ)
        self._want_stream(self._stream_events & ~WRITE)
        if self._stream_finished:
            self._reset(Outcome.STREAM_LOST, ResetCode.LOST, tell_stream=False)
        elif self._stream_events & READ:
            self._read_stream()

    # ---- stream -> local

    def _stream_ready(self, ready: int) -> None:
        if ready & WRITE and self._to_stream:
            self._flush_stream()
        if self._done or not ready & (READ | HANG_UP | ERROR):
            return
        if self._local_broken:
            if ready & (HANG_UP | ERROR):  # nobody is left to take what the local socket held
                self._reset(Outcome.LOCAL_RESET, ResetCode.LOCAL_RESET, tell_stream=False)
        elif self._stream_finished:
            if self._local_finished and not self._to_stream and not self._confirmed:
                self._hear_outcome()
            elif self._local_finished and not self._to_stream:
                self._detach_stream()  # all was said both ways; the local socket has yet to take the last of it
            else:
                self._reset(Outcome.STREAM_LOST, ResetCode.LOST, tell_stream=False)
        elif self._stream_events & READ:
            self._read_stream()
        elif ready & HANG_UP:
            # what is left in it is read when the local socket has taken what it was given
            self._detach_stream()

    def _read_stream(self) -> None:
        """Take messages until there are no more or one write's worth; write their data in one go."""
        stream, scratch = self._stream, self._reactor.scratch
        for _ in range(2):
            end = 1  # data is in scratch[1:end]; a message's type byte falls on the last byte of the data before it
            control = -1
            while end < _GATHER:
                saved = scratch[end - 1]
                try:
                    length = stream.recv_into(scratch[end - 1 : end + MAX_MESSAGE])
                except BlockingIOError:
                    break
                except ConnectionResetError:
                    continue  # the other end was closed with messages unread; its own are still to be read
                kind = scratch[end - 1]
                if kind == DATA and length > 1:
                    scratch[end - 1] = saved
                    end += length - 1
                    continue
                control = end
                if length:
                    check_message(kind, length)
                message = bytes(scratch[end - 1 : end - 1 + length])
                scratch[end - 1] = saved
                break
            if control > 0 and (not message or message[0] != FINISH):
                # whatever came before it, this is not a clean end
                lost = Outcome.STREAM_LOST, int(ResetCode.LOST)
                self._stream_ended = (Outcome.STREAM_RESET, parse_reset(message)) if message else lost
                if end > 1:
                    self._write_local(scratch[1:end])
                self._write_last()
                return
            if end > 1 and not self._write_local(scratch[1:end]):
                self._stream_finished = control > 0
                return
            if control > 0:
                self._stream_finished = True
                self._want_stream(self._stream_events & ~READ)
                self._shutdown_local()
                return
            if end < _GATHER:
                return

    def _write_local(self, data: memoryview) -> bool:
        """Write; keep what is not taken and stop reading the stream. Whether all was taken."""
        self.received += len(data)
        try:
            taken = self._local.send(data)
        except BlockingIOError:
            taken = 0
        except OSError as error:
            self._local_failed(error)
            return False
        if taken == len(data):
            return True
        self._to_local = bytes(data[taken:])
        self._want_stream(self._stream_events & ~READ)
        self._want_local(self._local_events | WRITE)
        return False

    def _flush_local(self) -> None:
        try:
            taken = self._local.send(self._to_local)
        except BlockingIOError:
            return
        except OSError as error:
            self._local_failed(error)
            return
        self._to_local = self._to_local[taken:]
        if self._to_local:
            return
        self._want_local(self._local_events & ~WRITE)
        if self._stream_ended is not None:
            return
        if self._stream_finished:
            self._shutdown_local()
        else:
            self._want_stream(self._stream_events | READ)

    def _shutdown_local(self) -> None:
        try:
            self._local.shutdown(socket.SHUT_WR)
        except OSError as error:
            self._local_failed(error)
            return
        self._check_done()

    # ---- ends

    def _check_done(self) -> None:
        if self._local_finished and self._stream_finished and not self._to_local and not self._to_stream:
            if self._confirmed:
                self._finish(Outcome.FINISHED, ResetCode.NONE)
            else:
                self._want_stream(READ)

    def _hear_outcome(self) -> None:
        """Both directions have finished: what came of it at the far end?"""
        try:
            message = self._stream.recv(MAX_MESSAGE)
        except BlockingIOError:
            return
        except OSError:
            message = b""
        if not message:
            self._reset(Outcome.STREAM_LOST, ResetCode.LOST, tell_stream=False)
        elif code := parse_reset(message):
            self._reset(Outcome.STREAM_RESET, code, tell_stream=False)
        else:
            self._confirmed = True
            self._detach_stream()
            self._check_done()

    def _write_last(self) -> None:
        """The stream is over: when the local socket's other end has what came before, reset it."""
        if self._done or self._stream_ended is None:
            return
        self._want_local(self._local_events & ~READ)
        self._want_stream(0)
        if self._stream_attached:
            self._detach_stream()
        outcome, code = self._stream_ended
        when_gone(self._reactor, self._unwritten, lambda: self._reset(outcome, code, tell_stream=False))

    def _unwritten(self) -> int | None:
        if self._done:
            return None
        # what a Unix socket has taken lies with its reader
        taken = 0 if self._local.family == socket.AF_UNIX else unacknowledged(self._local)
        return len(self._to_local) + taken

    def _send_last(self) -> None:
        """The local socket is broken: send what it still holds, as the stream takes it, then reset."""
        local, stream, scratch = self._local, self._stream, self._reactor.scratch
        while not self._to_stream:
            length = 0
            if not self._local_finished:
                with contextlib.suppress(OSError):
                    length = local.recv_into(scratch[1:MAX_MESSAGE])
            if not length:
                self._reset(Outcome.LOCAL_RESET, ResetCode.LOCAL_RESET, tell_stream=True)
                return
            self.sent += length
            scratch[0] = DATA
            try:
                stream.send(scratch[: length + 1])
            except BlockingIOError:
                self._to_stream = bytes(scratch[: length + 1])
            except OSError:
                self._reset(Outcome.LOCAL_RESET, ResetCode.LOCAL_RESET, tell_stream=False)
                return
        self._want_stream(WRITE)

    def _local_failed(self, error: Exception) -> None:
        if self._done or self._local_broken:
            return
        if self._stream_ended is not None:
            outcome, code = self._stream_ended  # nobody is left to take what came before it
            self._reset(outcome, code, tell_stream=False)
            return
        self._local_broken = True
        self._to_local = b""
        if self._local_attached:
            self._detach_local()
        self._local_events = 0
        self._want_stream(0)
        give_up_without_progress(
            self._reactor,
            lambda: None if self._done else self.sent,
            lambda: self._reset(Outcome.LOCAL_RESET, ResetCode.LOCAL_RESET, tell_stream=True),
        )
        self._send_last()

    def _stream_failed(self, error: Exception) -> None:
        self._reset(Outcome.STREAM_LOST, ResetCode.LOST, tell_stream=False)

    def _reset(self, outcome: Outcome, code: int, *, tell_stream: bool) -> None:
        if self._done:
            return
        if tell_stream:
            # if it is full or gone: that it closes without F says the same, less exactly
            with contextlib.suppress(OSError):
                self._stream.send(reset_message(code))
        with contextlib.suppress(OSError):
            self._local.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
        self._finish(outcome, code)

    def _finish(self, outcome: Outcome, code: int) -> None:
        if self._done:
            return
        self._done = True
        self._to_local = self._to_stream = b""
        self._reactor.unregister(self._local_fd)
        self._reactor.unregister(self._stream_fd)
        self._local.close()
        self._stream.close()
        self._on_done(PumpResult(outcome, code, self.sent, self.received))

    # ---- what to wait for

    def _want_local(self, events: int) -> None:
        if not self._local_attached:
            if events:
                self._local_attached = True
                self._reactor.register(self._local_fd, events, self._local_ready, self._local_failed)
        elif events != self._local_events:
            self._reactor.modify(self._local_fd, events)
        self._local_events = events

    def _want_stream(self, events: int) -> None:
        if not self._stream_attached:
            if events:
                self._stream_attached = True
                self._reactor.register(self._stream_fd, events, self._stream_ready, self._stream_failed)
        elif events != self._stream_events:
            self._reactor.modify(self._stream_fd, events)
        self._stream_events = events

    def _detach_local(self) -> None:
        """Hear of no hang-up until there is something to wait for again."""
        self._reactor.unregister(self._local_fd)
        self._local_attached = False

    def _detach_stream(self) -> None:
        self._reactor.unregister(self._stream_fd)
        self._stream_attached = False


def _is_closed(sock: socket.socket) -> bool:
    """Whether the other end of a Unix socket is closed, and not just shut down for writing."""
    poll = select.poll()
    poll.register(sock, 0)
    return any(events & select.POLLHUP for _, events in poll.poll(0))
