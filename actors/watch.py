"""Watching one file for changes, whatever way an editor or a person changes it.

What is watched is the file's directory, so that a file that is replaced, removed or made anew is seen like one that
is written to; where the file is a symbolic link, the directory of its target too. When the directory itself goes and
comes back the watch begins anew. Notification is not relied upon alone: file systems without it, and kernels that
have run out of watches, are covered by a slow look.
"""

from __future__ import annotations

import contextlib
import os.path
from collections.abc import Awaitable, Callable
from pathlib import Path

import trio
import watchfiles

STEP_MS = 500
"""A burst of changes is one change; and how often the watching thread looks, which costs CPU time when idle. What a
person changes in a file is taken over within a second; commands do not wait for that, they tell the node themselves."""

DEBOUNCE_MS = 1000
"""A burst that goes on for longer is seen in parts."""

SLOW_LOOK_SECONDS = 30.0
"""How long a change may stay unseen where the kernel does not tell."""

_RETRY_SECONDS = 2.0


async def watch_file(path: Path, changed: Callable[[], Awaitable[None]]) -> None:
    """Call `changed` once when the watch stands and after each change of the file, until cancelled.

    It is called from one task, also when nothing has changed after all: compare before doing work.
    """
    while True:
        directories = _directories(path)
        watched = list(map(_identity, directories))
        if None in watched:  # the directory is gone; whoever wants the file will see that it is not there
            await changed()
            await trio.sleep(_RETRY_SECONDS)
            continue
        if not await _watch_directories(path, directories, watched, changed):
            await trio.sleep(_RETRY_SECONDS)


async def _watch_directories(
    path: Path, directories: list[Path], watched: list[tuple[int, int] | None], changed: Callable[[], Awaitable[None]]
) -> bool:
    """Return True when the file is in other directories now, False when the kernel does not let us watch."""
    stop, gone = trio.Event(), trio.Event()
    own = {str(directory) for directory in directories}
    names = {path.name, _target(path).name, *(directory.name for directory in directories)}
    wake, woken = trio.open_memory_channel[None](1)

    async def stop_thread_when_cancelled() -> None:
        try:
            await trio.sleep_forever()
        finally:
            stop.set()  # the watching thread cannot be cancelled; it looks at this event

    async def notice() -> None:
        changes = watchfiles.awatch(
            *directories,
            watch_filter=lambda _, name: os.path.basename(name) in names,  # noqa: PTH119  # called for each event
            debounce=DEBOUNCE_MS,
            step=STEP_MS,
            stop_event=stop,
            rust_timeout=int(SLOW_LOOK_SECONDS * 1000),
            yield_on_timeout=True,
            recursive=False,
        )
        # RuntimeError is the base of the watcher's own error; both tell that a watch could not be set up or read.
        with wake, contextlib.suppress(OSError, RuntimeError):
            async with contextlib.aclosing(changes):
                async for seen in changes:
                    if any(name in own and change is watchfiles.Change.deleted for change, name in seen):
                        gone.set()  # one made anew may even have the same inode, but is not watched
                    with contextlib.suppress(trio.WouldBlock):  # a look is due already
                        wake.send_nowait(None)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(stop_thread_when_cancelled)
        nursery.start_soon(notice)
        # `notice` sets up the watch in its first step, so from the next step on no change can be missed.
        await trio.lowlevel.checkpoint()
        await changed()
        in_place = True
        while in_place:
            try:
                await woken.receive()
            except trio.EndOfChannel:
                break
            await changed()
            in_place = (
                not gone.is_set() and _directories(path) == directories and list(map(_identity, directories)) == watched
            )
        nursery.cancel_scope.cancel()
    return not in_place


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
