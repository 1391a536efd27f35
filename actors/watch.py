"""Watching one file for changes, whatever way an editor or a person changes it.

What is watched is the file's directory, so that a file that is replaced, removed or made anew is seen like one that
is written to; where the file is a symbolic link, the directory of its target too. On the way to the file any directory
may be moved, and any symbolic link be pointed elsewhere, so that another file is meant: therefore each directory on
the way is watched for changes of the one name that leads on. Where the way has changed, the watch begins anew.
Notification is not relied upon alone: file systems without it, and kernels that have run out of watches, are covered
by a slow look, and directories on the way that may be passed but not read by a quick one.

The kernel is asked directly (inotify): a watch is one descriptor among those that the process waits for, it needs no
thread, and an idle one costs nothing.
"""

from __future__ import annotations

import os
import os.path
from collections.abc import Awaitable, Callable
from pathlib import Path

import trio

from supervisor import linux

QUIET_SECONDS = 0.2
"""A burst of changes is one change: it is over when nothing has changed for so long."""

LONGEST_BURST_SECONDS = 1.0
"""A burst that goes on for longer is seen in parts."""

SLOW_LOOK_SECONDS = 30.0
"""How long a change may stay unseen where the kernel does not tell."""

QUICK_LOOK_SECONDS = 1.0
"""The same for a change of the way to the file, where a directory on it cannot be watched."""

_RETRY_SECONDS = 1.0
_MOST_LINKS = 40
"""Symbolic links on the way to a file; the kernel follows no more either."""

_CHANGES = (
    linux.IN_MODIFY
    | linux.IN_ATTRIB
    | linux.IN_CLOSE_WRITE
    | linux.IN_MOVED_FROM
    | linux.IN_MOVED_TO
    | linux.IN_CREATE
    | linux.IN_DELETE
    | linux.IN_DELETE_SELF
    | linux.IN_MOVE_SELF
)
_NAMES = (
    linux.IN_MOVED_FROM
    | linux.IN_MOVED_TO
    | linux.IN_CREATE
    | linux.IN_DELETE
    | linux.IN_DELETE_SELF
    | linux.IN_MOVE_SELF
)
"""What may happen to a name on the way to the file."""

_GONE = linux.IN_DELETE_SELF | linux.IN_MOVE_SELF | linux.IN_UNMOUNT | linux.IN_IGNORED


async def watch_file(path: Path, changed: Callable[[], Awaitable[None]]) -> None:
    """Call `changed` once when the watch stands and after each change of the file, until cancelled.

    It is called from one task, also when nothing has changed after all: compare before doing work.
    """
    while True:
        directories, way = _directories(path), _way(path)
        identities = list(map(_identity, directories))
        watch = _begin(path, directories, way)
        if watch is None or None in identities:  # whoever wants the file will see whether it is there
            if watch is not None:
                watch.close()
            await changed()
            await trio.sleep(_RETRY_SECONDS)
            continue
        try:
            await changed()
            while not watch.gone and _way(path) == way and _directories(path) == directories:
                if list(map(_identity, directories)) != identities:
                    break
                if await watch.change():
                    await changed()
        finally:
            watch.close()


class _Watch:
    """The directories of one file under watch.

    Attributes:
        gone: one of them has been moved or removed. One made anew may even have the same inode, but is not watched.
    """

    def __init__(self, directories: list[Path], names: frozenset[str], way: list[tuple[str, str]]) -> None:
        """Raises OSError where the kernel does not let us watch."""
        self.gone = False
        self._slow_look = trio.current_time() + SLOW_LOOK_SECONDS
        self._names = names | {name for _, name in way}
        self._fd = linux.watch_directories([str(directory) for directory in directories], _CHANGES)
        watched = [linux.watch_also(self._fd, directory, _NAMES) for directory, _ in way]  # each, though one fails
        self._all_watched = all(watched)

    async def change(self) -> bool:
        """Return after the next burst of changes, or after some time without any; whether to look at the file.

        If not, then at the way to it: of that some directory could not be watched.
        """
        seconds = min(
            self._slow_look - trio.current_time(), SLOW_LOOK_SECONDS if self._all_watched else QUICK_LOOK_SECONDS
        )
        with trio.move_on_after(max(0.0, seconds)) as slow:
            await trio.lowlevel.wait_readable(self._fd)
            while not self._read():
                # Nothing of ours. A directory in which much happens must not keep us busy.
                await trio.sleep(QUIET_SECONDS)
                await trio.lowlevel.wait_readable(self._fd)
        if slow.cancelled_caught:
            due = trio.current_time() >= self._slow_look
            self._slow_look += SLOW_LOOK_SECONDS if due else 0.0
            return due
        self._slow_look = trio.current_time() + SLOW_LOOK_SECONDS
        end = trio.current_time() + LONGEST_BURST_SECONDS
        while (left := end - trio.current_time()) > 0:
            with trio.move_on_after(min(QUIET_SECONDS, left)) as quiet:
                await trio.lowlevel.wait_readable(self._fd)
            if quiet.cancelled_caught:
                return True
            self._read()
        return True

    def close(self) -> None:
        """Watch no more."""
        os.close(self._fd)

    def _read(self) -> bool:
        """Take what the kernel reports; whether it is about the file."""
        found = False
        for mask, name in linux.read_changes(self._fd):
            if mask & _GONE:
                self.gone = True
            # What has no name is about a directory itself, or says that more has changed than was kept.
            found = found or not name or name in self._names
        return found


def _begin(path: Path, directories: list[Path], way: list[tuple[str, str]]) -> _Watch | None:
    try:
        return _Watch(directories, frozenset((path.name, _target(path).name)), way)
    except OSError:
        return None


def _way(path: Path) -> list[tuple[str, str]]:
    """Each directory on the way to the file, with the name in it that leads on; symbolic links are followed."""
    ahead = os.path.join(os.getcwd(), path).split("/")  # noqa: PTH109, PTH118  # Path would drop what `..` means
    here, steps, links = "/", [], 0
    while ahead:
        name = ahead.pop(0)
        if name == "..":
            here = os.path.dirname(here)  # noqa: PTH120  # of texts
        if name in ("", ".", ".."):
            continue
        steps.append((here, name))
        there = f"{here.rstrip('/')}/{name}"
        try:
            target = os.readlink(there)  # noqa: PTH115  # the text of the link is wanted
        except OSError:
            here = there  # no link, or nothing at all
            continue
        links += 1
        if links > _MOST_LINKS:
            break
        if target.startswith("/"):
            here = "/"
        ahead = [*target.split("/"), *ahead]
    return list(dict.fromkeys(steps))


def _directories(path: Path) -> list[Path]:
    return list(dict.fromkeys([path.parent, _target(path).parent]))


def _target(path: Path) -> Path:
    return Path(os.path.realpath(path))  # unlike Path.resolve it bears loops of links


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino
