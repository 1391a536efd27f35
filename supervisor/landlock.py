"""Landlock: which files, ports and processes a process may reach from now on, kept by the kernel (landlock(7)).

A ruleset names what is governed; each rule allows something below one directory, of one file, or at one TCP port; what
is governed and not allowed is refused. A process that has put one in force cannot take it away, and neither can what it
makes. The kernel also keeps it from looking into processes that are not under the same ruleset or a stricter one:
ptrace, `/proc/PID/mem`, `maps`, `environ`, `fd`, `process_vm_readv` and `pidfd_getfd` all fail.

What the ruleset governs depends on the version of the kernel's interface (:func:`version`): 1 files, 2 moving files
between directories, 3 truncating, 4 TCP ports, 5 devices' ioctl, 6 signals and abstract Unix sockets. It
never governs: metadata (stat, chmod, chown, extended attributes), connecting to Unix sockets by path, UDP. Those are
for :mod:`supervisor.seccomp`, as far as it sees them.

Rules are about files, not names: a file that is put in the place of another (as editors do) is another. A rule for a
file that changes must therefore be one for its directory.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import stat
import struct
from typing import Final

from protocol.errors import PeerupError

EXECUTE: Final = 1 << 0
WRITE_FILE: Final = 1 << 1
READ_FILE: Final = 1 << 2
READ_DIR: Final = 1 << 3
REMOVE_DIR: Final = 1 << 4
REMOVE_FILE: Final = 1 << 5
MAKE_REG: Final = 1 << 8
MAKE_SOCK: Final = 1 << 9
MAKE_SYM: Final = 1 << 12
TRUNCATE: Final = 1 << 14

READ: Final = READ_FILE | READ_DIR
"""Read files and list directories."""

WRITE: Final = READ | WRITE_FILE | TRUNCATE | MAKE_REG | REMOVE_FILE
"""Besides, make, write, rename and remove files in a directory."""

MAKE_SOCKETS: Final = MAKE_SOCK | REMOVE_FILE
"""Make and remove Unix sockets in a directory."""

BIND_TCP: Final = 1 << 0
CONNECT_TCP: Final = 1 << 1

SCOPE_ABSTRACT_UNIX: Final = 1 << 0
SCOPE_SIGNAL: Final = 1 << 1

NETWORK_VERSION: Final = 4
"""From which version on TCP ports are governed."""

SCOPE_VERSION: Final = 6
"""From which version on signals and abstract Unix sockets are."""

_FILES_BY_VERSION: Final = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1, 5: (1 << 16) - 1}
_FOR_FILES: Final = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | 1 << 15
_CREATE, _ADD, _RESTRICT = 444, 445, 446  # the same on every machine
_ASK_VERSION: Final = 1
_PATH_BENEATH, _NET_PORT = 1, 2
_ATTRIBUTES = struct.Struct("=QQQ")
_PATH_RULE = struct.Struct("=Qi")
_PORT_RULE = struct.Struct("=QQ")
_PR_SET_NO_NEW_PRIVS: Final = 38

_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long


class LandlockUnavailableError(PeerupError):
    """The kernel has no Landlock, or does not let this process use it."""

    code = "landlock-unavailable"


def version() -> int:
    """The version of the kernel's interface; 0 where there is no Landlock, or where it is switched off."""
    return max(0, int(_syscall(ctypes.c_long(_CREATE), None, ctypes.c_size_t(0), ctypes.c_uint32(_ASK_VERSION))))


class Ruleset:
    """What this process will be allowed. All files are governed; of the network and the scopes what is asked for.

    Arguments:
        network: `BIND_TCP`, `CONNECT_TCP` or both: what needs a rule for each port.
        scopes: `SCOPE_SIGNAL`, `SCOPE_ABSTRACT_UNIX` or both: what must not reach processes outside the ruleset.

    Raises:
        LandlockUnavailableError: see the class.
    """

    def __init__(self, *, network: int = 0, scopes: int = 0) -> None:
        found = version()
        if not found:
            raise LandlockUnavailableError("this kernel has no Landlock, or it is switched off (kernel option `lsm=`)")
        self._files = _FILES_BY_VERSION.get(found, _FILES_BY_VERSION[5])
        self._network = network if found >= NETWORK_VERSION else 0
        attributes = _ATTRIBUTES.pack(self._files, self._network, scopes if found >= SCOPE_VERSION else 0)
        size = 8 if found < NETWORK_VERSION else 16 if found < SCOPE_VERSION else 24
        self.fd = _call(_CREATE, attributes[:size], ctypes.c_size_t(size), 0)

    def allow_path(self, path: str, rights: int, *, follow: bool = True) -> int | None:
        """Allow this below a directory, or of a file. What does not exist gets no rule.

        Returns:
            A descriptor of the directory or file, for the caller to close; None if it does not exist.
        """
        try:
            flags = os.O_PATH | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
            fd = os.open(path, flags)
        except OSError:
            return None
        try:
            if not stat.S_ISDIR(os.fstat(fd).st_mode):
                rights &= _FOR_FILES
            if rights & self._files:
                _call(_ADD, ctypes.c_int(self.fd), _PATH_BENEATH, _PATH_RULE.pack(rights & self._files, fd))
        except BaseException:
            os.close(fd)
            raise
        return fd

    def allow_port(self, port: int, rights: int) -> None:
        """Allow `BIND_TCP`, `CONNECT_TCP` or both at this TCP port (0: any that the kernel picks)."""
        rights &= self._network
        if rights:
            _call(_ADD, ctypes.c_int(self.fd), _NET_PORT, _PORT_RULE.pack(rights, port))

    def enforce(self) -> None:
        """Put it in force for this thread and all that it makes from now on, and close it."""
        _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        try:
            _call(_RESTRICT, ctypes.c_int(self.fd), 0)
        finally:
            self.close()

    def close(self) -> None:
        """Give it up; harmless when it is in force."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            with contextlib.suppress(OSError):
                os.close(fd)


def _call(number: int, first: bytes | ctypes.c_int, second: ctypes.c_size_t | int, *rest: int | bytes) -> int:
    plain = [ctypes.c_char_p(value) if isinstance(value, bytes) else value for value in (first, second, *rest)]
    wide = [ctypes.c_long(value) if isinstance(value, int) else value for value in plain]
    result = int(_syscall(ctypes.c_long(number), *wide, ctypes.c_long(0)))
    if result < 0:
        error = ctypes.get_errno()
        if error in (errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM):
            raise LandlockUnavailableError(f"the kernel takes no Landlock rules: {os.strerror(error)}")
        raise OSError(error, f"landlock: {os.strerror(error)}")
    return result
