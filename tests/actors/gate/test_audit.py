"""The audit log: whole lines, private, rotated; a full disk costs events but no harm, and it is said how many."""

import errno
import json
import os
import stat
import subprocess
import sys

import pytest

from actors.gate.audit import AuditLog, sync_and_close


@pytest.fixture
def path(tmp_path):
    return tmp_path / "audit.jsonl"


def events(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_one_line_for_each_event(path):
    log = AuditLog(path)
    assert log.write("decision", 1_800_000_000.25, {"peer": "x", "allowed": True})
    assert log.write("tunnel", 1_800_000_001, {"service": "a\nb\u2028"})
    log.close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert events(path) == [
        {"time": "2027-01-15T08:00:00.250Z", "event": "decision", "peer": "x", "allowed": True},
        {"time": "2027-01-15T08:00:01.000Z", "event": "tunnel", "service": "a\nb\u2028"},
    ]
    assert path.read_bytes().count(b"\n") == 2


def test_a_successor_goes_on_and_ends_a_torn_line(path):
    first = AuditLog(path)
    first.write("a", 0, {})
    first.close()
    with path.open("ab") as file:
        file.write(b'{"torn')
    second = AuditLog(path)
    second.write("b", 0, {})
    second.close()
    lines = path.read_bytes().splitlines()
    assert lines[1] == b'{"torn'
    assert [json.loads(lines[0])["event"], json.loads(lines[2])["event"]] == ["a", "b"]


def test_old_files_are_kept_up_to_a_number(path):
    log = AuditLog(path, max_bytes=1000, keep=2)
    for number in range(100):
        log.write("e", 0, {"number": number})
    log.close()
    names = sorted(one.name for one in path.parent.iterdir())
    assert names == ["audit.jsonl", "audit.jsonl.1", "audit.jsonl.2"]
    kept = [event["number"] for name in reversed(names) for event in events(path.with_name(name))]
    assert kept == list(range(kept[0], 100))
    assert all(one.stat().st_size <= 1000 for one in path.parent.iterdir())
    assert all(stat.S_IMODE(one.stat().st_mode) == 0o600 for one in path.parent.iterdir())


def test_a_full_disk_loses_events_and_says_so_later(path, monkeypatch):
    log = AuditLog(path)
    assert log.write("before", 0, {})
    real, full = os.write, True

    def write(descriptor, data):
        if full:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data)

    monkeypatch.setattr("actors.gate.audit.os.write", write)
    assert not log.write("lost", 0, {})
    assert not log.write("lost", 0, {})
    assert (log.lost, log.last_error) == (2, "[Errno 28] No space left on device")
    full = False
    assert log.write("after", 0, {})
    log.close()
    assert [event["event"] for event in events(path)] == ["before", "events-lost", "after"]
    assert events(path)[1]["count"] == 2


def test_a_disk_that_fills_within_a_line_leaves_whole_lines(path, monkeypatch):
    log = AuditLog(path)
    log.write("before", 0, {})
    real, room = os.write, 10

    def write(descriptor, data):
        return real(descriptor, data[:room])

    monkeypatch.setattr("actors.gate.audit.os.write", write)
    assert not log.write("cut", 0, {})
    room = 1000
    assert log.write("after", 0, {})
    log.close()
    assert [event["event"] for event in events(path)] == ["before", "events-lost", "after"]


def test_a_file_that_was_moved_away_is_made_anew(path):
    log = AuditLog(path)
    log.write("a", 0, {})
    path.rename(path.with_name("kept"))
    log.follow()
    log.write("b", 0, {})
    log.close()
    assert [event["event"] for event in events(path)] == ["b"]
    assert [event["event"] for event in events(path.with_name("kept"))] == ["a"]


def test_a_sync_in_a_thread_has_a_descriptor_of_its_own(path):
    """Another one may be open under the log's old number by the time that the thread gets to it."""
    log = AuditLog(path, max_bytes=100)
    assert log.unsynced() is None
    log.write("a", 0, {})
    descriptor = log.unsynced()
    assert log.unsynced() is None
    log.write("b", 0, {"long": "x" * 100})  # goes to a file of its own
    assert os.fstat(descriptor).st_ino == path.with_name("audit.jsonl.1").stat().st_ino
    assert sync_and_close(descriptor) == ""
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
    log.close()


def test_a_directory_that_is_missing_loses_events_until_it_is_there(tmp_path):
    path = tmp_path / "log" / "audit.jsonl"
    log = AuditLog(path)
    assert not log.write("a", 0, {})
    path.parent.mkdir()
    assert log.write("b", 0, {})
    log.close()
    assert [event["event"] for event in events(path)] == ["events-lost", "b"]


def test_a_link_or_pipe_in_the_logs_place_is_not_written_to(path):
    victim = path.with_name("victim")
    victim.touch()
    path.symlink_to(victim)
    assert not AuditLog(path).write("a", 0, {})
    assert victim.read_bytes() == b""


WRITER = """
import sys
from pathlib import Path
from actors.gate.audit import AuditLog

log = AuditLog(Path(sys.argv[1]), max_bytes=2_000, keep=1_000)
for number in range(2_000):
    assert log.write(sys.argv[2], 0, {"number": number})
    if number % 50 == 0:
        log.follow()
log.close()
"""


def test_two_processes_may_write_to_it_while_one_relieves_the_other(path):
    """As a relay and its successor do (decision 21): nothing is torn, lost, or counted as old before its time."""
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, path, name]) for name in ("old", "new")]
    assert [writer.wait(60) for writer in writers] == [0, 0]
    files = sorted(path.parent.iterdir(), key=lambda file: -int(file.suffix[1:]) if file.suffix[1:].isdecimal() else 0)
    found = [event for file in files for event in events(file)]
    for name in ("old", "new"):
        assert sorted(event["number"] for event in found if event["event"] == name) == list(range(2_000)), name
    # Whoever has not noticed yet that the file was moved writes a little more to it, but begins none before its time.
    sizes = sorted(file.stat().st_size for file in files if file != path)
    assert sizes[0] > 1_500, sizes


def test_a_line_for_which_there_was_no_room_takes_none_of_another_process(path, monkeypatch):
    first, second = AuditLog(path), AuditLog(path)
    assert first.write("a", 0, {})
    assert second.write("b", 0, {})
    real = os.write
    monkeypatch.setattr("actors.gate.audit.os.write", lambda descriptor, data: real(descriptor, data[:10]))
    assert not first.write("lost", 0, {})
    monkeypatch.undo()
    assert second.write("c", 0, {})
    first.close()
    second.close()
    assert [event["event"] for event in events(path)] == ["a", "b", "c"]
