"""The registry: which process stands behind a name. A directory of links, so there is no process of it that could die.

Theory of operation. The run directory (0700, on a file system of this machine) holds::

    sockets/<pid>     the SOCK_SEQPACKET socket that the process listens on
    names/<escaped>   a symbolic link whose text is `<state>:<incarnation>:<pid>:<owner>:<name>`

A link is read and replaced atomically (`readlink`, `rename`), so a reader never sees half an entry and needs no
lock. `state` is `starting` or `ready`; `owner` is the quoted name of the supervisor that runs the actor, by which a
supervisor's successor finds what its predecessor left. The process behind a starting entry is 0 until it exists.

Who writes: the supervisor of a name, and between its fork and its first own line of code the child itself (that
is how a child is known before anybody can hear of it). A child that died is set back by its supervisor after it has
been waited for, so for each name the writes are in order.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import functools
import glob
import hashlib
import os
import pathlib
import shutil
import stat
import urllib.parse

from protocol.errors import PeerupError
from supervisor import linux
from supervisor.port import NameState

LONGEST_ESCAPED = 240
"""Bytes of an escaped name that still can be a file name (NAME_MAX is 255)."""


class RunDirectoryError(PeerupError):
    """The run directory cannot be used."""

    code = "run-directory"


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """What the registry knows of one name. `pid` is 0 while no process exists."""

    state: NameState
    incarnation: int
    pid: int
    owner: str


def escape(name: str) -> str:
    """The file name that stands for an actor's name. A very long one is cut and made unique by a hash."""
    escaped = _quote(name)
    if len(escaped) > LONGEST_ESCAPED:
        digest = hashlib.sha256(name.encode()).hexdigest()
        escaped = f"{escaped[: LONGEST_ESCAPED - len(digest) - 1]}~{digest}"
    return escaped


# What a supervisor has quoted its children need not quote again: they have this by the fork.
@functools.lru_cache(maxsize=4096)
def _quote(name: str) -> str:
    quoted = urllib.parse.quote(name, safe="")
    return "%2E" + quoted[1:] if quoted.startswith(".") else quoted


@functools.lru_cache(maxsize=4096)
def _unquote(quoted: str) -> str:
    return urllib.parse.unquote(quoted)


POLL_INTERVAL = 0.5
"""Seconds between looks at the names where the kernel does not tell of changes."""

_NO_INOTIFY = (errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.ENOMEM)


class Changes:
    """Tells which names may have changed, by a descriptor that becomes readable then.

    The kernel tells it, as long as it lets this user have one more inotify instance. It often lets a user have 128 for
    all programs together, and each process that watches a name takes one. Without one the names are looked at often.

    Attributes:
        fd: to wait for; readable when :meth:`read` has something to say.
        polled: the kernel does not tell.
    """

    def __init__(self, directory: RunDirectory) -> None:
        self.polled = False
        try:
            self.fd = linux.watch_directories([directory.names_path()], linux.IN_MOVED_TO | linux.IN_DELETE)
        except OSError as error:
            if error.errno not in _NO_INOTIFY:
                raise
            self.polled = True
            self.fd = linux.ticking_timer(POLL_INTERVAL)

    def read(self) -> frozenset[str] | None:
        """The escaped names that have changed since the last call, or None: any may have."""
        if self.polled:
            with contextlib.suppress(BlockingIOError):
                os.read(self.fd, 8)
            return None
        changes = linux.read_changes(self.fd)
        if any(mask & linux.IN_Q_OVERFLOW for mask, _ in changes):
            return None
        return frozenset(file for _, file in changes)

    def close(self) -> None:
        """Look no more."""
        os.close(self.fd)


class RunDirectory:
    """An open run directory. Everything is done relative to its descriptors, so paths of any length work."""

    def __init__(self, path: str) -> None:
        """Open the directory at `path`; `sockets` and `names` are made if they are missing.

        Raises:
            RunDirectoryError: it does not exist, belongs to somebody else, or is open to others.
        """
        self.path = str(pathlib.Path(path).absolute())
        self._moved = False
        try:
            self.fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise RunDirectoryError(f"the run directory {self.path} cannot be opened: {error.strerror}") from error
        self.sockets_fd = self.names_fd = -1
        try:
            self._check_permissions()
            self.sockets_fd = self._open_below("sockets")
            self.names_fd = self._open_below("names")
        except BaseException:
            self.close()
            raise

    def _check_permissions(self) -> None:
        status = os.fstat(self.fd)
        if status.st_uid != os.geteuid():
            raise RunDirectoryError(f"the run directory {self.path} belongs to user {status.st_uid}, not to you")
        if stat.S_IMODE(status.st_mode) & 0o077:
            raise RunDirectoryError(f"the run directory {self.path} is open to other users; run: chmod 700 {self.path}")

    def _open_below(self, name: str) -> int:
        with contextlib.suppress(FileExistsError):
            os.mkdir(name, 0o700, dir_fd=self.fd)
        return os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=self.fd)

    def close(self) -> None:
        """Close the descriptors; the directory stays."""
        for fd in self.descriptors():
            os.close(fd)
        self.fd = self.sockets_fd = self.names_fd = -1

    def descriptors(self) -> list[int]:
        """What must stay open over a fork."""
        return [fd for fd in (self.fd, self.sockets_fd, self.names_fd) if fd >= 0]

    def socket_path(self, pid: int) -> str:
        """Where the socket of a process is. Short however long the directory's path is (sun_path has 108 bytes)."""
        return f"/proc/self/fd/{self.sockets_fd}/{pid}"

    def names_path(self) -> str:
        """The directory of names, for inotify."""
        return f"/proc/self/fd/{self.names_fd}"

    def places(self) -> tuple[str, str]:
        """The directories of names and of sockets, by descriptors: the paths that this process can use."""
        return self.names_path(), f"/proc/self/fd/{self.sockets_fd}"

    def remove_socket(self, pid: int) -> None:
        """Remove what a process that ended has left.

        A confined process cannot remove its own; its supervisor does, once it has ended.
        """
        with contextlib.suppress(FileNotFoundError, PermissionError):
            os.unlink(str(pid), dir_fd=self.sockets_fd)

    def read(self, name: str) -> Entry | None:
        """The entry of a name, or None."""
        found = self._read(escape(name))
        return None if found is None else found[1]

    def _read(self, escaped: str) -> tuple[str, Entry] | None:
        try:
            text = os.readlink(escaped, dir_fd=self.names_fd)
        except OSError:
            return None
        try:
            state, incarnation, pid, owner, name = text.split(":")
            entry = Entry(NameState(state), int(incarnation), int(pid), _unquote(owner))
        except ValueError:
            return None
        return _unquote(name), entry

    def write(self, name: str, entry: Entry) -> None:
        """Make this the entry of the name, atomically."""
        escaped = escape(name)
        temporary = f".{os.getpid()}"
        text = f"{entry.state.value}:{entry.incarnation}:{entry.pid}:{_quote(entry.owner)}:{_quote(name)}"
        try:
            os.symlink(text, temporary, dir_fd=self.names_fd)
        except FileExistsError:  # left by an earlier process of this number that was killed between two lines
            os.unlink(temporary, dir_fd=self.names_fd)
            os.symlink(text, temporary, dir_fd=self.names_fd)
        os.rename(temporary, escaped, src_dir_fd=self.names_fd, dst_dir_fd=self.names_fd)

    def remove(self, name: str) -> None:
        """Free a name."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(escape(name), dir_fd=self.names_fd)

    def names(self) -> dict[str, Entry]:
        """All entries. A name that changes meanwhile is there in its old or its new form."""
        found = {}
        for escaped in os.listdir(self.names_fd):  # noqa: PTH208 - pathlib cannot list a descriptor
            read = None if escaped.startswith(".") else self._read(escaped)
            if read is not None:
                name, entry = read
                found[name] = entry
        return found

    def orphan(self, owner: str) -> list[str]:
        """A supervisor's process has ended, and so has all below it: those names are starting. Returns them."""
        entries = self.names()
        below: list[str] = []
        parents = [owner]
        while parents:
            parent = parents.pop()
            for name, entry in entries.items():
                if entry.owner == parent and name not in below and name != owner:
                    below.append(name)
                    parents.append(name)
        for name in below:
            entry = entries[name]
            self.write(name, Entry(NameState.STARTING, entry.incarnation, 0, entry.owner))
            self.remove_socket(entry.pid)
        return below

    def clear(self) -> None:
        """Remove every name and socket: only for whoever holds the run directory's lock, when nothing runs in it."""
        for directory in (self.sockets_fd, self.names_fd):
            for left in os.listdir(directory):  # noqa: PTH208 - pathlib cannot list a descriptor
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(left, dir_fd=directory)

    def move_away(self) -> None:
        """Give the directory another name beside its own, so that a successor of its user can make a new one.

        Everything in it works as before, since nobody uses its path.

        Raises:
            OSError: that is not possible.
        """
        moved = f"{self.path}.{os.getpid()}"
        pathlib.Path(self.path).rename(moved)
        self.path, self._moved = moved, True

    def remove_moved(self) -> None:
        """Remove the directory if it was moved away; all that was in it is gone or of no use."""
        if self._moved:
            with contextlib.suppress(OSError):
                shutil.rmtree(self.path)

    def remove_left_behind(self) -> None:
        """Remove what :meth:`move_away` of a predecessor has left beside this directory, if that was killed."""
        own = pathlib.Path(self.path)
        for moved in own.parent.glob(f"{glob.escape(own.name)}.*"):
            if moved.name.rpartition(".")[2].isdecimal():
                _remove_unlocked(moved)

    def remove_tree(self) -> None:
        """Clear it and remove `sockets` and `names` too; the run directory itself stays for its owner."""
        self.clear()
        for name in ("sockets", "names"):
            with contextlib.suppress(FileNotFoundError):
                os.rmdir(name, dir_fd=self.fd)


def _remove_unlocked(moved: pathlib.Path) -> None:
    """Remove a run directory that was moved away, unless it is no such thing or a process still holds its lock."""
    with contextlib.suppress(OSError):
        fd = os.open(moved, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            if os.fstat(fd).st_uid == os.geteuid() and {"names", "sockets"} <= set(os.listdir(fd)):  # noqa: PTH208
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(moved)
        finally:
            os.close(fd)
