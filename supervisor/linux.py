"""The few Linux calls that the runtime needs and Python does not offer, each with the reason why it is used."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import resource
import socket
import struct
import termios
import time
from collections.abc import Collection, Iterable

_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE = 4
_PR_SET_NAME = 15
_PR_SET_CHILD_SUBREAPER = 36
_PR_SET_NO_NEW_PRIVS = 38

IN_MODIFY = 0x2
IN_ATTRIB = 0x4
IN_CLOSE_WRITE = 0x8
IN_MOVED_FROM = 0x40
IN_MOVED_TO = 0x80
IN_CREATE = 0x100
IN_DELETE = 0x200
IN_DELETE_SELF = 0x400
IN_MOVE_SELF = 0x800
IN_UNMOUNT = 0x2000
IN_Q_OVERFLOW = 0x4000
IN_IGNORED = 0x8000
_IN_MASK_ADD = 0x20000000
_IN_NONBLOCK = os.O_NONBLOCK
_IN_CLOEXEC = os.O_CLOEXEC
_INOTIFY_HEADER = struct.Struct("iIII")

_TIMER = struct.Struct("4l")

_F_ADD_SEALS = 1033
_F_GET_SEALS = 1034
_ALL_SEALS = 0x1 | 0x2 | 0x4 | 0x8  # seal, shrink, grow, write

_PEER_CREDENTIALS = struct.Struct("3i")

_SIG_SETMASK = 2
_SIGNAL_SET_BYTES = 128

_libc = ctypes.CDLL(None, use_errno=True)
_prctl_call = _libc.prctl
_sigprocmask = _libc.sigprocmask
_inotify_init1 = _libc.inotify_init1
_inotify_add_watch = _libc.inotify_add_watch


def _check(result: int, call: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{call}: {os.strerror(number)}")
    return result


def _prctl(option: int, argument: int | bytes) -> None:
    _check(_prctl_call(option, argument, 0, 0, 0), "prctl")


class SignalMask:
    """Which signals are blocked. Python's own call makes a set of enumeration members of each mask, in 0.1 ms."""

    def __init__(self, *, full: bool = False) -> None:
        self._set = ctypes.create_string_buffer(_SIGNAL_SET_BYTES)
        if full:
            _check(_libc.sigfillset(self._set), "sigfillset")

    def install(self) -> SignalMask:
        """Make it the mask of this thread; the mask before."""
        before = SignalMask()
        _check(_sigprocmask(_SIG_SETMASK, self._set, before._set), "sigprocmask")
        return before


NO_SIGNALS = SignalMask()
ALL_SIGNALS = SignalMask(full=True)


def die_with_parent(parent: int, signal_number: int) -> None:
    """Have the kernel send this signal to the calling process when its parent ends, however it ends.

    The parent may have ended between the fork and this call; then the process ends here.
    """
    _prctl(_PR_SET_PDEATHSIG, signal_number)
    if os.getppid() != parent:
        os._exit(os.EX_UNAVAILABLE)


def outlive_parent() -> None:
    """Take :func:`die_with_parent` back for the calling process."""
    _prctl(_PR_SET_PDEATHSIG, 0)


def unread(sock: socket.socket) -> int:
    """What the kernel keeps of what was sent on a Unix socket, because the other end has not read it; in its bytes."""
    (kept,) = struct.unpack("i", fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)))
    return int(kept)


def forbid_inspection() -> None:
    """No core dumps of this process, and no ptrace or /proc/PID/mem by processes of the same user."""
    _prctl(_PR_SET_DUMPABLE, 0)


def forbid_new_privileges() -> None:
    """No set-user-id program that this process might run gives it anything."""
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent ended, so that none is left as a zombie of init's."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def raise_descriptor_limit(wanted: int = 65536) -> None:
    """Allow this process and its children so many descriptors, or as many as the system grants without privileges."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    granted = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < granted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (granted, hard))


def set_process_name(name: str) -> None:
    """What `ps` and `top` show: the first 15 bytes of the name."""
    _prctl(_PR_SET_NAME, name.encode()[:15])


def close_all_descriptors(keep: Collection[int] = ()) -> None:
    """Close every descriptor above standard error but these."""
    low = 3
    for fd in sorted(fd for fd in keep if fd > 2):
        os.closerange(low, fd)
        low = fd + 1
    os.closerange(low, os.sysconf("SC_OPEN_MAX"))


def peer_credentials(sock: socket.socket) -> tuple[int, int]:
    """(pid, uid) of the process that connected this Unix socket, or that listens on it."""
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size)
    pid, uid, _ = _PEER_CREDENTIALS.unpack(raw)
    return pid, uid


def watch_directories(paths: Iterable[str], mask: int) -> int:
    """A new, non-blocking inotify descriptor for the changes of these directories."""
    fd = _check(_inotify_init1(_IN_NONBLOCK | _IN_CLOEXEC), "inotify_init1")
    try:
        for path in paths:
            _check(_inotify_add_watch(fd, os.fsencode(path), mask), "inotify_add_watch")
    except OSError:
        os.close(fd)
        raise
    return fd


def watch_also(fd: int, path: str, mask: int) -> bool:
    """Have an inotify descriptor report these changes of one more directory, too; whether that could be done.

    What it reports of this directory already it goes on reporting.
    """
    return int(_inotify_add_watch(fd, os.fsencode(path), mask | _IN_MASK_ADD)) >= 0


def read_changes(fd: int) -> list[tuple[int, str]]:
    """What an inotify descriptor reports: (mask, file name) pairs; empty if there is nothing."""
    changes: list[tuple[int, str]] = []
    while True:
        try:
            block = os.read(fd, 65536)
        except BlockingIOError:
            return changes
        at = 0
        while at < len(block):
            _, mask, _, length = _INOTIFY_HEADER.unpack_from(block, at)
            at += _INOTIFY_HEADER.size
            changes.append((mask, os.fsdecode(block[at : at + length].rstrip(b"\0"))))
            at += length


def ticking_timer(seconds: float) -> int:
    """A new, non-blocking descriptor that is readable after each `seconds`; read eight bytes to have it wait again."""
    fd = _check(_libc.timerfd_create(time.CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC), "timerfd_create")
    interval = int(seconds), int(seconds % 1 * 1e9)
    try:
        _check(_libc.timerfd_settime(fd, 0, _TIMER.pack(*interval, *interval), None), "timerfd_settime")
    except OSError:
        os.close(fd)
        raise
    return fd


def sealed_memory(content: bytes) -> int:
    """A descriptor of memory with this content that nobody can change any more."""
    fd = os.memfd_create("peerup-message", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        view = memoryview(content)
        while view:
            view = view[os.write(fd, view) :]
        fcntl.fcntl(fd, _F_ADD_SEALS, _ALL_SEALS)
    except OSError:
        os.close(fd)
        raise
    return fd


def read_sealed_memory(fd: int, limit: int) -> bytes:
    """The content of a descriptor made by :func:`sealed_memory`, at most `limit` bytes.

    Raises:
        OSError: it is not sealed memory, or is larger.
    """
    if fcntl.fcntl(fd, _F_GET_SEALS) & _ALL_SEALS != _ALL_SEALS:
        raise OSError(errno.EPERM, "the memory is not sealed")
    size = os.fstat(fd).st_size
    if size > limit:
        raise OSError(errno.EMSGSIZE, f"{size} bytes are over the limit of {limit}")
    content = os.pread(fd, size, 0)
    if len(content) != size:
        raise OSError(errno.EIO, "the memory could not be read whole")
    return content
