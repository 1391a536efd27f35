"""Changes of names are noticed with the kernel's help, and without it where it gives none to this user any more."""

from __future__ import annotations

import errno
import os
import select

import pytest

from supervisor import linux
from supervisor.port import NameState
from supervisor.registry import POLL_INTERVAL, Changes, Entry, RunDirectory
from supervisor.visitor import Visitor
from tests.supervisor.process_harness import run_directory


@pytest.fixture(params=["told", "polled"])
def how(request, monkeypatch):
    if request.param == "polled":

        def refuse(*_):
            raise OSError(errno.EMFILE, "Too many open files")

        monkeypatch.setattr(linux, "watch_directories", refuse)
    return request.param


def until(visitor, condition, seconds=10):
    visitor.run(condition, timeout=seconds)


def test_comings_and_goings_of_names_are_noticed(how):
    with run_directory() as path, Visitor(path, "watcher") as watcher, Visitor(path, "other") as other:
        seen = []
        watcher.exchange.name_up = lambda name, incarnation: seen.append((name, incarnation))
        watcher.exchange.name_down = lambda name, _: seen.append((name, "down"))
        watcher.exchange.watch("other")
        watcher.exchange.watch("late")
        other.directory.write("late", Entry(NameState.READY, 4, os.getpid(), "late"))
        until(watcher, lambda: seen == [("late", 4)])
        other.directory.write("late", Entry(NameState.STARTING, 4, 0, "late"))
        until(watcher, lambda: seen == [("late", 4), ("late", "down")])
        other.directory.write("other", Entry(NameState.READY, 2, os.getpid(), "other"))
        until(watcher, lambda: seen[2:] == [("other", "down"), ("other", 2)])
        assert (watcher.transport.refusals["no-inotify"] == 1) == (how == "polled")
        other.directory.remove("late")


def test_waiting_for_a_name_ends_when_it_is_there(how):
    with run_directory() as path, Visitor(path, "watcher") as watcher:
        with pytest.raises(Exception, match="not within"):
            watcher.wait_for("late", timeout=POLL_INTERVAL / 2)
        with Visitor(path, "late"):
            watcher.wait_for("late", timeout=10)


def test_a_polling_watch_sleeps_between_its_looks(monkeypatch):
    def refuse(*_):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(linux, "watch_directories", refuse)
    with run_directory() as path:
        directory = RunDirectory(path)
        changes = Changes(directory)
        try:
            assert select.select([changes.fd], [], [], 0)[0] == []
            assert select.select([changes.fd], [], [], 10)[0] == [changes.fd]
            assert changes.read() is None
            assert select.select([changes.fd], [], [], 0)[0] == []
            assert changes.read() is None, "reading too early does no harm"
        finally:
            changes.close()
            directory.close()


def test_another_failure_is_not_taken_for_want_of_instances(monkeypatch):
    def refuse(*_):
        raise OSError(errno.EACCES, "no")

    monkeypatch.setattr(linux, "watch_directories", refuse)
    with run_directory() as path:
        directory = RunDirectory(path)
        try:
            with pytest.raises(PermissionError):
                Changes(directory)
        finally:
            directory.close()
