"""Every way in which a file may change is seen, and whatever happens to its directory."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

import pytest
import trio

from actors import watch
from supervisor import linux

PATIENCE = 20.0
"""Seconds for a change to be seen; it takes a fraction of one."""


class Watched:
    """Remembers what the file said at each look."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.looks = 0
        self._said: str | None = None
        self._looked = trio.Event()

    async def changed(self) -> None:
        """As the owner of a file does: read it again."""
        self.looks += 1
        try:
            self._said = self.path.read_text()
        except OSError:
            self._said = None
        self._looked.set()
        self._looked = trio.Event()

    async def until(self, text: str | None) -> None:
        """Wait for a look that found this."""
        with trio.fail_after(PATIENCE):
            while self.looks == 0 or self._said != text:
                await self._looked.wait()

    async def another_look(self) -> None:
        """Wait for the next look."""
        with trio.fail_after(PATIENCE):
            await self._looked.wait()


@contextlib.asynccontextmanager
async def watching(path: Path) -> AsyncIterator[Watched]:
    watched = Watched(path)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch.watch_file, path, watched.changed)
        yield watched
        nursery.cancel_scope.cancel()


async def test_a_file_that_is_written_to_in_place(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("one")
    async with watching(path) as watched:
        await watched.until("one")
        path.write_text("two")
        await watched.until("two")


async def test_a_file_that_is_replaced_removed_and_made_anew(tmp_path: Path) -> None:
    path, draft = tmp_path / "file", tmp_path / "draft"
    path.write_text("one")
    async with watching(path) as watched:
        await watched.until("one")
        draft.write_text("two")
        draft.replace(path)
        await watched.until("two")
        path.unlink()
        await watched.until(None)
        path.write_text("three")
        await watched.until("three")


async def test_permissions_are_a_change(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("one")
    async with watching(path) as watched:
        await watched.until("one")
        path.chmod(0o600)
        await watched.another_look()


async def test_the_target_of_a_link_and_the_link_itself(tmp_path: Path) -> None:
    for name in ("here", "there", "elsewhere"):
        (tmp_path / name).mkdir()
    (tmp_path / "there" / "target").write_text("one")
    (tmp_path / "elsewhere" / "target").write_text("other")
    path = tmp_path / "here" / "file"
    path.symlink_to(tmp_path / "there" / "target")
    async with watching(path) as watched:
        await watched.until("one")
        (tmp_path / "there" / "target").write_text("two")
        await watched.until("two")
        draft = tmp_path / "here" / "draft"
        draft.symlink_to(tmp_path / "elsewhere" / "target")
        draft.replace(path)
        await watched.until("other")
        (tmp_path / "elsewhere" / "target").write_text("another")
        await watched.until("another")


SOON = 2.5
"""Seconds for a change of the way to the file to be seen: far less than a slow look takes."""


async def test_a_link_on_the_way_that_is_pointed_elsewhere(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name / "etc" / "node").mkdir(parents=True)
        (tmp_path / name / "etc" / "node" / "file").write_text(name)
    link = tmp_path / "link"
    link.symlink_to("one")
    (tmp_path / "home").symlink_to(tmp_path / "link" / "etc")
    path = tmp_path / "home" / "node" / "file"
    async with watching(path) as watched:
        await watched.until("one")
        for name in ("two", "one", "two"):
            draft = tmp_path / "draft"
            draft.symlink_to(name)
            with trio.fail_after(SOON):
                draft.replace(link)
                await watched.until(name)
        (tmp_path / "two" / "etc" / "node" / "file").write_text("edited")
        await watched.until("edited")


async def test_a_directory_on_the_way_that_another_takes_the_place_of(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name / "deep" / "deeper").mkdir(parents=True)
        (tmp_path / name / "deep" / "deeper" / "file").write_text(name)
    path = tmp_path / "one" / "deep" / "deeper" / "file"
    async with watching(path) as watched:
        await watched.until("one")
        with trio.fail_after(SOON):
            (tmp_path / "one").rename(tmp_path / "old")
            (tmp_path / "two").rename(tmp_path / "one")
            await watched.until("two")
        path.write_text("edited")
        await watched.until("edited")


async def test_a_link_to_nowhere_that_is_mended(tmp_path: Path) -> None:
    link, target = tmp_path / "link", tmp_path / "there"
    link.symlink_to("nowhere/at/all")
    target.mkdir()
    (target / "file").write_text("found")
    async with watching(link / "file") as watched:
        await watched.until(None)
        draft = tmp_path / "draft"
        draft.symlink_to("there")
        with trio.fail_after(SOON):
            draft.replace(link)
            await watched.until("found")


async def test_where_the_way_cannot_be_watched_it_is_looked_at_more_often(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linux, "watch_also", lambda *_: False)
    monkeypatch.setattr(watch, "QUICK_LOOK_SECONDS", 0.05)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    link, draft = tmp_path / "link", tmp_path / "draft"
    link.symlink_to("one")
    async with watching(link / "file") as watched:
        await watched.until("one")
        draft.symlink_to("two")
        with trio.fail_after(SOON):
            draft.replace(link)
            await watched.until("two")


async def test_a_directory_that_goes_and_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "_RETRY_SECONDS", 0.05)
    directory = tmp_path / "directory"
    directory.mkdir()
    path = directory / "file"
    path.write_text("one")
    async with watching(path) as watched:
        await watched.until("one")
        path.unlink()
        directory.rmdir()
        await watched.until(None)
        directory.mkdir()
        path.write_text("two")
        await watched.until("two")
        directory.rename(tmp_path / "old")
        directory.mkdir()
        path.write_text("three")
        await watched.until("three")
        path.write_text("four")
        await watched.until("four")


async def test_another_file_of_the_directory_is_no_change(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("one")
    async with watching(path) as watched:
        await watched.until("one")
        looks = watched.looks
        (tmp_path / "other").write_text("x")
        (tmp_path / "other").unlink()
        path.write_text("two")
        await watched.until("two")
        # Both came from one queue of the kernel's, so what was no reason to look would have been one before.
        assert watched.looks == looks + 1


async def test_without_the_kernel_the_file_is_looked_at_now_and_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(paths: Iterable[str], mask: int) -> int:
        raise OSError(errno.EMFILE, "no more instances")

    monkeypatch.setattr(linux, "watch_directories", refuse)
    monkeypatch.setattr(watch, "_RETRY_SECONDS", 0.05)
    path = tmp_path / "file"
    path.write_text("one")
    async with watching(path) as watched:
        await watched.until("one")
        path.write_text("two")
        await watched.until("two")


async def test_where_the_kernel_is_silent_there_is_a_slow_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "SLOW_LOOK_SECONDS", 0.05)
    monkeypatch.setattr(watch, "_CHANGES", linux.IN_DELETE_SELF)
    path = tmp_path / "file"
    path.write_text("one")
    async with watching(path) as watched:
        await watched.until("one")
        path.write_text("two")
        await watched.until("two")


async def test_a_watch_that_ends_leaves_no_descriptor(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("one")
    async with watching(path) as watched:
        await watched.until("one")
        before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - only the number of entries is of interest
    # The watch's own descriptor, and those of trio's, which has been waiting the same way before and after.
    assert len(os.listdir("/proc/self/fd")) == before - 1  # noqa: PTH208 - see above
