"""Where a process's log goes, without ever waiting for whoever reads it.

Theory of operation. All processes of a node share one standard error, and a reader that has stopped (a pager, a full
pipe, a terminal after Ctrl-S) must not stop a supervisor with it. Whether a write waits is a property of the open file
description, which the node shares with whoever started it, so it cannot be set there. Instead:

- a pipe or a terminal is opened once more, without waiting, through `/proc/self/fd`;
- a socket is written to with `MSG_DONTWAIT`;
- a file never waits, and is written to as it is.

What the reader does not take is kept, up to `PENDING` bytes, and then dropped and counted. :meth:`LogOutput.retry`
tries again; whoever has a timer calls it from time to time while :attr:`LogOutput.stuck`.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import stat

PENDING = 64 * 1024
"""Bytes of records that are kept for a reader who does not read: some hundred lines for each process."""

ATOMIC = select.PIPE_BUF
"""Bytes that a pipe takes all or none of, and takes if it says that it is writable."""


class LogOutput:
    """One process's way to a descriptor, usually standard error. It is a text file as far as a log needs one.

    Attributes:
        lost: records that were dropped since :meth:`take_lost` was last called.
    """

    def __init__(self, fd: int = 2) -> None:
        self.lost = 0
        self._fd = fd
        self._own = -1
        self._pid = os.getpid()
        self._socket: socket.socket | None = None
        self._polled = False
        self._pending = bytearray()
        with contextlib.suppress(OSError):  # closed: every write fails, and that is no reason for an actor to end
            self._open(os.fstat(fd).st_mode)

    @property
    def stuck(self) -> bool:
        """Whether something waits for its reader."""
        return bool(self._pending)

    def isatty(self) -> bool:
        """Whether a person reads along."""
        return os.isatty(self._fd)

    def write(self, text: str) -> int:
        """Write one record, keep it, or drop and count it. Never waits.

        Raises:
            OSError: nobody can read it any more.
        """
        data = text.encode(errors="backslashreplace")
        if self._pending:
            self.retry()
        if self._pending:
            if len(self._pending) + len(data) > PENDING:
                self.lost += 1
            else:
                self._pending += data
            return len(text)
        taken = self._put(data)
        self._pending += data[taken:]
        return len(text)

    def flush(self) -> None:
        """Nothing to do: each record is written at once if it can be."""

    def retry(self) -> bool:
        """Write what was kept; whether all of it is gone.

        Raises:
            OSError: nobody can read it any more; it is thrown away.
        """
        try:
            while self._pending:
                taken = self._put(bytes(self._pending[: 16 * ATOMIC]))
                if not taken:
                    return False
                del self._pending[:taken]
        except OSError:
            self._pending.clear()
            raise
        return True

    def take_lost(self) -> int:
        """How many records were dropped since the last call."""
        lost, self.lost = self.lost, 0
        return lost

    def close(self) -> None:
        """Close what was opened here; the descriptor itself stays open."""
        if self._own >= 0 and self._pid == os.getpid():
            os.close(self._own)
        self._own = -1
        if self._socket is not None:
            self._socket.detach()
            self._socket = None

    def _open(self, mode: int) -> None:
        if stat.S_ISSOCK(mode):
            self._socket = socket.socket(fileno=self._fd)
        elif stat.S_ISFIFO(mode) or stat.S_ISCHR(mode):
            try:
                flags = os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
                self._own = os.open(f"/proc/self/fd/{self._fd}", flags)
            except OSError:
                self._polled = True  # somebody else's pipe, or no /proc

    def _put(self, data: bytes) -> int:
        """How many of these bytes were taken now."""
        try:
            if self._socket is not None:
                return self._socket.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            if self._own >= 0 and self._pid != os.getpid():
                self._own, self._polled = -1, True  # in a child whose fork has closed it, and has no log of its own yet
            if self._own >= 0:
                return os.write(self._own, data)
            if self._polled:
                # As good as it gets: another process may fill the pipe between the question and the write.
                poll = select.poll()
                poll.register(self._fd, select.POLLOUT)
                if not poll.poll(0):
                    return 0
                return os.write(self._fd, data[:ATOMIC])
            return os.write(self._fd, data)
        except BlockingIOError:
            return 0


def say_once(text: str, fd: int = 2) -> None:
    """Write this without waiting; lost if nobody reads. For a process that is about to end."""
    output = LogOutput(fd)
    try:
        with contextlib.suppress(OSError):
            output.write(text)
    finally:
        output.close()
