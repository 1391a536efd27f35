"""The rehearsal really plays a life, changes nothing that lasts, and is no reason not to start."""

from __future__ import annotations

import signal
import tempfile
import threading
from pathlib import Path

import pytest

from supervisor import rehearsal
from supervisor.process import Leaf


def test_each_life_ends_as_it_should(monkeypatch: pytest.MonkeyPatch) -> None:
    statuses = []
    act = Leaf.act

    def watched(leaf, manager, log):
        status = act(leaf, manager, log)
        statuses.append(status)
        return status

    monkeypatch.setattr(Leaf, "act", watched)
    performed = []
    perform = rehearsal.Performer._perform

    async def counted(performer):
        await perform(performer)
        performed.append(performer.context.name)

    monkeypatch.setattr(rehearsal.Performer, "_perform", counted)
    rehearsal.rehearse()
    assert statuses == [0] * rehearsal.ROUNDS
    assert len(performed) == rehearsal.ROUNDS


def what_lasts() -> tuple[object, ...]:
    open_files = len(list(Path("/proc/self/fd").iterdir()))
    return open_files, signal.getsignal(signal.SIGTERM), threading.active_count(), Path("/proc/self/comm").read_text()


def test_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    rehearsal.rehearse()  # what is made once in a process is there now
    before = what_lasts()
    rehearsal.rehearse()
    assert what_lasts() == before
    assert list(tmp_path.iterdir()) == []


def test_where_nothing_can_be_written_it_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    rehearsal.rehearse()
