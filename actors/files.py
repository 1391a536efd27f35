"""Files that must never be half-written: atomic replacement, exclusive creation, and locks with a deadline.

Theory of operation. A file that a person or another process may read at any moment is only ever replaced
whole: the new content goes to a temporary file beside it, is flushed to the disk, takes over mode and owner of the old
file and then its name, and the directory entry is flushed too. Whatever fails on the way (no space, no permission, a
kill at any instruction) leaves the old file as it was. Who reads a file in order to write it again holds the lock of
that file meanwhile (:func:`locked`), so two editors never lose each other's change.

The lock is `flock` on a separate file `.<name>.lock`, which stays: the file itself is replaced by every
writer, so a lock on it would lock the past.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import secrets
import shlex
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from protocol.errors import PeerupError
from supervisor.lending import open_for_reading

LOCK_SECONDS = 10.0
"""How long an edit waits for another one: far longer than an edit takes, short enough for a person to wait."""

_LOCK_POLL_SECONDS = 0.01
_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_BUSY = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EAGAIN, errno.EINTR})


class FileError(PeerupError):
    """A file cannot be used as it has to be. The message names the file, the cause and what helps."""

    code = "file-error"


class FileMissingError(FileError):
    """The file, or the directory that it belongs in, does not exist."""

    code = "file-missing"


class FileExistsAlreadyError(FileError):
    """The file is there already and is not overwritten."""

    code = "file-exists"


class PermissionsError(FileError):
    """The file may not be read or written, or others may read or write it who must not."""

    code = "bad-permissions"


class DiskFullError(FileError):
    """There is no space left; what was there before is unharmed."""

    code = "disk-full"


class FileLockedError(FileError):
    """Another process holds the file's lock and did not let go in time."""

    code = "file-locked"


class BusyError(FileError):
    """This machine has no descriptors or memory left for now, so nothing is known of the file."""

    code = "machine-busy"


def file_error(doing: str, path: Path, error: OSError) -> FileError:
    """The error to raise for an :class:`OSError` that came while `doing` (such as `write`) something with a file."""
    what = f"cannot {doing} {path}: {error.strerror or error}"
    if error.errno in _NO_SPACE:
        return DiskFullError(f"{what}. Nothing was changed; make room and try again")
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return FileMissingError(what)
    if error.errno == errno.EEXIST:
        return FileExistsAlreadyError(what)
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return PermissionsError(f"{what}. Check its owner and mode: ls -ld {path.parent} {path}")
    if error.errno in _BUSY:
        return BusyError(f"{what}; try again")
    return FileError(what)


def read_limited(path: Path, limit: int) -> tuple[bytes, os.stat_result]:
    """The whole of a regular file that must not be longer than `limit` bytes, and its status when it was read.

    Raises:
        FileError: it cannot be read, is not a regular file, or is too long.
    """
    try:
        descriptor = open_for_reading(path)
        with open(descriptor, "rb") as file:  # noqa: PTH123  # Path.open cannot take a descriptor
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise FileError(f"{path} is not a regular file")
            content = file.read(limit + 1)
    except OSError as error:
        raise file_error("read", path, error) from error
    if len(content) > limit:
        raise FileError(f"{path} is longer than {limit} bytes, which no such file should be")
    return content, status


def digest_of(content: bytes) -> str:
    """What tells one content of a file from another: the SHA-256 in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def check_not_writable_by_others(path: Path, status: os.stat_result) -> None:
    """Refuse a file whose content somebody other than this user (and root) may decide.

    Raises:
        PermissionsError: with the command that repairs it.
    """
    us = os.geteuid()
    if us != 0 and status.st_uid not in (us, 0):
        raise PermissionsError(f"{path} belongs to another user ({status.st_uid}), who decides what it says")
    if status.st_mode & 0o022:
        raise PermissionsError(
            f"others may write to {path}, so they decide what it says; repair it: chmod 600 {shlex.quote(str(path))}"
        )


def write_atomic(path: Path, content: bytes, *, mode: int | None = None) -> None:
    """Replace the file's content, or create the file, as one step that happens wholly or not at all.

    Through a symbolic link the file that it leads to is replaced and the link stays. An existing file keeps owner
    and mode, unless `mode` says otherwise; a new one gets `mode`, or 0600.

    Raises:
        FileError: it could not be done; the old file is unharmed and nothing is left behind.
    """
    target = Path(os.path.realpath(path))
    try:
        old = target.stat()
    except FileNotFoundError:
        old = None
    except OSError as error:
        raise file_error("write", path, error) from error
    if old is not None and not stat.S_ISREG(old.st_mode):
        raise FileError(f"cannot write {path}: it is not a regular file")
    wanted = mode if mode is not None else (stat.S_IMODE(old.st_mode) if old is not None else 0o600)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(6)}.tmp")
    try:
        _write_new(temporary, content, wanted, old)
        temporary.replace(target)
        _sync_directory(target.parent)
    except OSError as error:
        raise file_error("write", path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def create_exclusive(path: Path, content: bytes, *, mode: int = 0o600) -> None:
    """Create a file that must not exist yet, with this mode from its first moment, wholly or not at all.

    Raises:
        FileExistsAlreadyError: it exists.
        FileError: it could not be done; nothing is left behind.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        _write_new(temporary, content, mode, None)
        os.link(temporary, path)  # unlike rename, fails when the name is taken
        _sync_directory(path.parent)
    except FileExistsError as error:
        raise FileExistsAlreadyError(f"{path} exists already and is not overwritten") from error
    except OSError as error:
        raise file_error("create", path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def make_private_directory(path: Path) -> None:
    """Create a directory for this user alone (0700), with its parents, or check that an existing one belongs to us.

    Raises:
        FileError: it cannot be made, is not a directory, or others may write to it.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.stat()
    except OSError as error:
        raise file_error("create the directory", path, error) from error
    if found.st_uid != os.geteuid():
        raise PermissionsError(f"the directory {path} belongs to user {found.st_uid}, not to us ({os.geteuid()})")
    if found.st_mode & 0o022 and not found.st_mode & stat.S_ISVTX:
        raise PermissionsError(
            f"others may write to the directory {path}; repair it: chmod 700 {shlex.quote(str(path))}"
        )


@contextlib.contextmanager
def locked(path: Path, *, timeout: float = LOCK_SECONDS) -> Iterator[None]:
    """Hold the lock of this file while the block runs; wait for it at most `timeout` seconds.

    Raises:
        FileLockedError: another process still holds it; the message says which.
        FileError: the directory is missing or not writable.
    """
    target = Path(os.path.realpath(path))
    lock = target.with_name(f".{target.name}.lock")
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise file_error("lock", path, error) from error
    try:
        _acquire(descriptor, path, timeout)
        os.ftruncate(descriptor, 0)
        with contextlib.suppress(OSError):  # who holds it is only told for the sake of a better message
            os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        _remove_leftovers(target)
        yield
    finally:
        os.close(descriptor)


def _acquire(descriptor: int, path: Path, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                holder = os.pread(descriptor, 20, 0).decode("ascii", "replace") or "unknown"
                raise FileLockedError(
                    f"{path} is being edited by another process (pid {holder}) for more than {timeout:g} seconds; "
                    "try again when it is done"
                ) from None
            time.sleep(_LOCK_POLL_SECONDS)
        except OSError as error:
            raise file_error("lock", path, error) from error
        else:
            return


def _remove_leftovers(target: Path) -> None:
    """Remove temporary files of editors that were killed; only the holder of the lock may have one."""
    for leftover in target.parent.glob(f".{target.name}.*.tmp"):
        with contextlib.suppress(OSError):
            leftover.unlink()


def _write_new(path: Path, content: bytes, mode: int, owner: os.stat_result | None) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        rest = memoryview(content)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        if owner is not None and (owner.st_uid, owner.st_gid) != (os.geteuid(), os.getegid()):
            os.fchown(descriptor, owner.st_uid, owner.st_gid)
        os.fchmod(descriptor, mode)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
