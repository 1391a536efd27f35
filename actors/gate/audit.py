"""The audit log: who reached what, allowed or refused, by which rule, as lines of JSON in a file of its own.

Theory of operation. A line is one `write` to a file opened for appending, so it is in the kernel when the call returns
and survives the end of this process. :meth:`AuditLog.sync` brings what was written to the disk; its owner calls it
from time to time. A line is written wholly or not at all: when the disk fills up in the middle of one, the file
is cut back to its last whole line. Lost lines are counted, and the count is the first thing written when there is
room again. Before a file grows over its limit it becomes `<name>.1`, and so on up to a number of old files.

Two processes may write to one log: a relay that lets its circuits end, and its successor. Each line is written, and
each file moved on, under a lock (flock) on the file that is at the log's path, which no process holds for longer than
that takes. Who has not noticed yet that the file was moved on writes a little more to `<name>.1`.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

MAX_BYTES = 16 * 1024 * 1024
"""Some 60,000 events; with the old files together 96 MiB."""

KEEP = 5
"""Old files that are kept."""


def sync_and_close(descriptor: int) -> str:
    """Bring this file to the disk and close the descriptor; what failed, empty if nothing did. Blocks."""
    try:
        os.fdatasync(descriptor)
    except OSError as error:
        return str(error)
    finally:
        os.close(descriptor)
    return ""


class AuditLog:
    """One audit log. Nothing here raises for a full or failing disk; see `lost` and `last_error`.

    Attributes:
        written: lines written.
        lost: lines that could not be written.
        last_error: why the last one was lost; empty if none was.
    """

    def __init__(self, path: Path, *, max_bytes: int = MAX_BYTES, keep: int = KEEP) -> None:
        self.path = path
        self.written = 0
        self.lost = 0
        self.last_error = ""
        self._max_bytes = max_bytes
        self._keep = keep
        self._descriptor = -1
        self._unreported = 0
        self._dirty = False

    def write(self, event: str, wall: float, fields: Mapping[str, object]) -> bool:
        """Append one event that happened at `wall` (seconds since the epoch); whether it was written."""
        if self._unreported:
            report = self._line("events-lost", wall, {"count": self._unreported, "reason": self.last_error})
            if self._append(report):
                self._unreported = 0
        if not self._unreported and self._append(self._line(event, wall, fields)):
            self.written += 1
            return True
        self.lost += 1
        self._unreported += 1
        return False

    def sync(self) -> None:
        """Bring everything to the disk. Blocks; where that must not be, do the same in a thread with `unsynced`."""
        descriptor = self.unsynced()
        if descriptor is not None:
            self.last_error = sync_and_close(descriptor) or self.last_error

    def unsynced(self) -> int | None:
        """If there are lines that are not on the disk yet: a descriptor of their file, which the caller owns.

        It is one of its own, so that a thread may sync it while this log goes on, closes its file or begins another.
        """
        if self._descriptor < 0 or not self._dirty:
            return None
        try:
            descriptor = os.dup(self._descriptor)
        except OSError as error:
            self.last_error = str(error)
            return None
        self._dirty = False
        return descriptor

    def follow(self) -> None:
        """Notice when the file was moved away: the next line begins a new one."""
        if self._descriptor < 0:
            return
        try:
            if not self._is_at_path():
                self._close()
        except OSError as error:
            self.last_error = str(error)

    def _is_at_path(self) -> bool:
        """Whether the file that is open is the one at the log's path."""
        here = os.fstat(self._descriptor)
        try:
            there = self.path.stat()
        except FileNotFoundError:
            return False
        return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)

    def close(self) -> None:
        """Sync and close."""
        self.sync()
        self._close()

    @staticmethod
    def _line(event: str, wall: float, fields: Mapping[str, object]) -> bytes:
        moment = dt.datetime.fromtimestamp(wall, dt.UTC).isoformat(timespec="milliseconds")
        line = {"time": moment.replace("+00:00", "Z"), "event": event, **fields}
        return json.dumps(line, separators=(",", ":"), ensure_ascii=True).encode() + b"\n"

    def _append(self, line: bytes) -> bool:
        try:
            if self._descriptor < 0:
                self._open()
            if (size := os.fstat(self._descriptor).st_size) > 0 and size + len(line) > self._max_bytes:
                self._rotate()
            with self._locked():
                return self._append_locked(line)
        except OSError as error:
            self.last_error = str(error)
            return False

    def _append_locked(self, line: bytes) -> bool:
        written = os.write(self._descriptor, line)
        if written == len(line):
            self._dirty = True
            return True
        self.last_error = "the disk is full"
        with contextlib.suppress(OSError):
            os.ftruncate(self._descriptor, os.fstat(self._descriptor).st_size - written)
        return False

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """No other process writes to the file, or moves it on, meanwhile."""
        descriptor = self._descriptor
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing it would not do: a thread may hold a copy

    def _open(self) -> None:
        self._descriptor = os.open(
            self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600
        )
        try:
            with self._locked():
                size = os.fstat(self._descriptor).st_size
                if size and os.pread(self._descriptor, 1, size - 1) != b"\n":
                    # A predecessor was killed, or its machine was, within a line. End that line, so that ours is whole.
                    os.write(self._descriptor, b"\n")
        except OSError:
            self._close()
            raise

    def _rotate(self) -> None:
        with self._locked():
            if self._is_at_path():  # otherwise another process has moved it on
                for number in range(self._keep, 1, -1):
                    with contextlib.suppress(FileNotFoundError):
                        self._old(number - 1).replace(self._old(number))
                with contextlib.suppress(FileNotFoundError):
                    self.path.replace(self._old(1))
        os.fdatasync(self._descriptor)
        self._close()
        self._open()

    def _old(self, number: int) -> Path:
        return self.path.with_name(f"{self.path.name}.{number}")

    def _close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)
