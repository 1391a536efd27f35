"""Files that a supervisor opens for reading on behalf of a confined child.

Theory of operation. A file that people edit is replaced, moved, or reached by a symbolic link that leads elsewhere
tomorrow; rules for directories that would allow all that would also allow what lies beside it, such as the identity
key. So the child gets no right to such a file at all. Over a socket pair of its own it names one of the files that its
specification lists, and its supervisor, whom the kernel does not confine so, opens it and sends the descriptor.

The child waits for the answer: it comes from the supervisor's event loop, which waits for nothing itself. Without a
socket pair (a process that is not confined, tests, commands) files are simply opened.
"""

from __future__ import annotations

import array
import errno
import os
import socket
import threading
from collections.abc import Callable, Collection

_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK  # not to hang at a named pipe in the file's place
_LONGEST = 4096
"""Bytes of a path, as in the kernel."""
_PATIENCE = 5.0
"""Seconds for the supervisor to answer; it takes well below a millisecond."""


class Borrower:
    """The child's side.

    Arguments:
        sock: this end of the pair, which it owns.
        paths: what may be asked for.
    """

    def __init__(self, sock: socket.socket, paths: Collection[str]) -> None:
        sock.settimeout(_PATIENCE)
        self._socket = sock
        self._paths = frozenset(paths)
        self._lock = threading.Lock()

    def knows(self, path: str) -> bool:
        """Whether the file is one of those."""
        return path in self._paths

    def open(self, path: str) -> int:
        """A descriptor of the file, for reading.

        Raises:
            OSError: as `open` does, and EAGAIN where the supervisor does not answer: nothing is known of the file then.
        """
        asked = os.fsencode(path)
        with self._lock:
            try:
                self._socket.send(asked)
                number, descriptor = self._answer_to(asked)
            except OSError as error:
                raise OSError(errno.EAGAIN, "the supervisor does not open it", path) from error
        if descriptor is None:
            raise OSError(number, os.strerror(number), path)
        return descriptor

    def _answer_to(self, asked: bytes) -> tuple[int, int | None]:
        while True:
            answer, descriptors, _, _ = socket.recv_fds(self._socket, _LONGEST + 16, 1, socket.MSG_CMSG_CLOEXEC)
            if not answer:
                raise BrokenPipeError(errno.EPIPE, "the supervisor has ended")
            number, _, path = answer.partition(b" ")
            if path == asked:
                # Without a descriptor and without an error, this process had none left to take it with.
                return int(number) or errno.EMFILE, descriptors[0] if descriptors else None
            for descriptor in descriptors:  # the answer to a question that was given up
                os.close(descriptor)


class _State:
    borrower: Borrower | None = None


def borrow_from(borrower: Borrower | None) -> None:
    """From now on have files opened this way in this process."""
    _State.borrower = borrower


def open_for_reading(path: str | os.PathLike[str]) -> int:
    """A descriptor of this file for reading, from the supervisor if it lends it.

    Raises:
        OSError: it cannot be opened.
    """
    name = os.fspath(path)
    borrower = _State.borrower
    if borrower is not None and borrower.knows(name):
        return borrower.open(name)
    return os.open(name, _FLAGS)


class Lender:
    """The supervisor's side for one child.

    Attributes:
        socket: this end of the pair; whoever owns the lender calls :meth:`serve` when it is readable.
        other: the child's end, to be closed here when the child has been made.
    """

    def __init__(self, paths: Collection[str]) -> None:
        self.socket, self.other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        self.socket.setblocking(False)
        self._paths = frozenset(paths)

    def serve(self, gone: Callable[[], None]) -> None:
        """Answer what has been asked. `gone` is called when the child has no end any more."""
        try:
            asked = self.socket.recv(_LONGEST)
        except BlockingIOError:
            return
        except OSError:
            asked = b""
        if not asked:
            gone()
            return
        path = os.fsdecode(asked)
        try:
            if path not in self._paths:
                raise PermissionError(errno.EACCES, "not lent")
            fd = os.open(path, _FLAGS)
        except (OSError, ValueError) as error:
            number = getattr(error, "errno", None) or errno.EINVAL
            self._answer(f"{number} ".encode() + asked, ())
            return
        try:
            self._answer(b"0 " + asked, (fd,))
        finally:
            os.close(fd)

    def _answer(self, text: bytes, descriptors: Collection[int]) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        try:
            self.socket.sendmsg([text], rights, socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)
        except OSError:
            return  # it has ended, or asks without reading the answers; it will time out

    def close(self) -> None:
        """Lend no more."""
        self.socket.close()
        self.other.close()
