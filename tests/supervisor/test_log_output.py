"""A log's reader may stop reading at any time: a pipe, a terminal, a socket, a file."""

from __future__ import annotations

import contextlib
import os
import pty
import socket

import pytest

from supervisor.log_output import PENDING, LogOutput, say_once
from supervisor.logging import LogControl

LINE = "x" * 199 + "\n"


def read_all(fd: int) -> bytes:
    os.set_blocking(fd, False)
    found = b""
    with contextlib.suppress(BlockingIOError):
        while block := os.read(fd, 65536):
            found += block
    return found


@pytest.fixture(params=["pipe", "socket", "terminal"])
def ends(request):
    """(read, write): both descriptors wait, as those of a shell do."""
    if request.param == "pipe":
        read, write = os.pipe()
    elif request.param == "terminal":
        read, write = pty.openpty()
    else:
        first, second = socket.socketpair()
        read, write = first.detach(), second.detach()
    yield read, write
    os.close(read)
    os.close(write)


def test_a_reader_that_has_stopped_holds_nobody_up_and_hears_how_much_it_missed(ends):
    read, write = ends
    output = LogOutput(write)
    for _ in range(20 * PENDING // len(LINE)):  # returns, which is what is tested
        output.write(LINE)
    assert output.stuck
    assert output.lost > 0
    received = b""
    while not output.retry():
        received += read_all(read)
    received += read_all(read)
    written = 20 * PENDING // len(LINE) - output.take_lost()
    assert received.replace(b"\r", b"") == written * LINE.encode()
    assert os.get_blocking(write)  # what it shares with others is as it was
    output.close()


def test_a_file_is_appended_to_where_the_others_of_the_node_are(tmp_path):
    file = tmp_path / "log"
    fd = os.open(file, os.O_WRONLY | os.O_CREAT)
    try:
        first, second = LogOutput(fd), LogOutput(fd)
        first.write("one\n")
        second.write("two\n")
        first.write("three\n")
    finally:
        os.close(fd)
    assert file.read_text() == "one\ntwo\nthree\n"


def test_nobody_left_to_read_and_a_closed_descriptor_are_errors_and_no_more(ends):
    read, write = os.pipe()
    os.close(read)
    output = LogOutput(write)
    with pytest.raises(OSError, match="Broken pipe"):
        output.write(LINE)
    output.close()
    os.close(write)
    say_once(LINE, write)
    control = LogControl("gate", sink=LogOutput(write))
    control.logger.info("heard by nobody")
    control.close()


def test_a_child_that_has_closed_the_own_descriptor_writes_to_no_other_file(tmp_path):
    read, write = os.pipe()
    output = LogOutput(write)
    output.write("parent\n")
    file = tmp_path / "unrelated"
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.closerange(write + 1, 64)  # as a fork of the runtime does
            kept = [os.open(file, os.O_WRONLY | os.O_CREAT) for _ in range(8)]
            output.write("child\n")
            status = 0 if kept else 1
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0
    assert file.read_text() == ""
    assert read_all(read) == b"parent\nchild\n"
    output.close()
    os.close(read)
    os.close(write)


def test_lost_records_are_told_when_the_log_flows_again(monkeypatch):
    read, write = os.pipe()
    saved = os.dup(2)
    os.dup2(write, 2)
    try:
        control = LogControl("gate", colour=False)
        timers = []
        control.retry_with(lambda seconds, function: timers.append((seconds, function)))
        for _ in range(3000):
            control.logger.info(LINE.strip())
        assert len(timers) == 1
        received = read_all(read)
        while timers:
            seconds, function = timers.pop()
            assert 0 < seconds < 2
            function()
            received += read_all(read)
        control.close()
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(write)
        os.close(read)
    *records, last = received.decode().splitlines()
    assert all(LINE.strip() in record for record in records)
    assert f" {3000 - len(records)} records were left out" in last
