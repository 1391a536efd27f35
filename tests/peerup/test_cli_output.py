"""What people see: tables in 80 columns to the letter, colours only on a terminal, time and sizes in words."""

from __future__ import annotations

import json
import os
import pty
import re
import socket
import subprocess
import sys
import threading
import time

import click
import pytest

from peerup.cli.actors import TREE_COLUMNS, outline, print_tree
from peerup.cli.framework import DURATION
from peerup.cli.output import Column, render_table, size, span
from peerup.cli.proxies import parse_listen
from peerup.stdio import PassOnError, pass_on, pump


def actor(name: str, supervisor: str, **values):
    values = {
        "pid": 12345,
        "state": "running",
        "uptime": 3723.0,
        "restarts": 0,
        "mailbox": 0,
        "handled": 98765,
    } | values
    return {"name": name, "supervisor": supervisor, "last_failure": ""} | values


TREE = [
    actor("root", "main"),
    actor("gate", "root", restarts=2, last_failure="killed by SIGKILL"),
    actor("proxies", "root"),
    actor(
        "proxy/a-peer-with-a-very-long-name.example/service",
        "proxies",
        state="backing-off",
        pid=None,
        last_failure="cannot listen on 127.0.0.1:8080: another program does",
    ),
    actor("api", "root", pid=7, handled=0),
]

GOLDEN_80 = """\
NAME                                 PID  STATE           UP  RST  MBOX  HANDLED
root                               12345  running      1h02m    0     0    98765
  gate                             12345  running      1h02m    2     0    98765
  proxies                          12345  running      1h02m    0     0    98765
    proxy/a-peer-with-a-very-long      -  backing-off      -    0     0    98765
-name.example/service
  api                                  7  running      1h02m    0     0        0

last failures:
  gate: killed by SIGKILL
  proxy/a-peer-with-a-very-long-name.example/service: cannot listen on
    127.0.0.1:8080: another program does"""


def test_the_tree_in_80_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    print_tree(TREE)
    printed = capsys.readouterr().out.rstrip("\n")
    assert max(map(len, printed.splitlines())) <= 80
    assert printed == GOLDEN_80


def test_the_tree_tells_what_busy_actors_wait_for(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    work = {"kind": "config.read", "age": 12.0, "waits_for": "gate", "waiting": 11.0}
    print_tree([actor | {"work": work if actor["name"] == TREE[-1]["name"] else None} for actor in TREE])
    printed = capsys.readouterr().out
    assert f"busy:\n  {TREE[-1]['name']}: handling config.read for 12s, waiting for gate for 11s" in printed


def test_nothing_is_cut_in_a_pipe(capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    print_tree(TREE)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    assert "    proxy/a-peer-with-a-very-long-name.example/service" in lines[4]
    assert lines[4].endswith("cannot listen on 127.0.0.1:8080: another program does")


def test_colours_only_where_asked_for():
    rows = [("a", "b")]
    columns = (Column("X"), Column("Y"))
    assert "\x1b" not in render_table(columns, rows, width=80, coloured=False)
    assert "\x1b[" in render_table(columns, rows, width=80, coloured=True)


@pytest.mark.parametrize(("extra", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False), ({"NO_COLOR": ""}, True)])
def test_a_terminal_gets_colours_unless_no_color(tmp_path, extra, coloured):
    home = tmp_path / "node"
    environment = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "COLUMNS", "PEERUP_HOME")}
    environment |= {"TERM": "xterm"} | extra
    run = [sys.executable, "-m", "peerup", "--home", str(home)]
    shown = run_in_terminal([*run, "init", "--yes"], environment)
    assert ("\x1b[" in shown) is coloured
    failed = run_in_terminal([*run, "actors"], environment)
    assert "no node is running" in re.sub(r"\x1b\[[0-9;]*m", "", failed)
    assert ("\x1b[" in failed) is coloured


def run_in_terminal(command: list[str], environment: dict[str, str]) -> str:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    shown = b""
    while True:
        try:
            data = os.read(ours, 4096)
        except OSError:  # EIO: the last one at the other end has gone
            break
        if not data:
            break
        shown += data
    os.close(ours)
    process.wait(20)
    return shown.decode()


def test_markup_in_data_is_only_text(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    print_tree([actor("root", "main", last_failure="[bold]x[/bold] [link=y]")])
    assert "[bold]x" in capsys.readouterr().out
    assert len(TREE_COLUMNS) == 7


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "-"), (0.04, "0.0s"), (9.96, "10.0s"), (12.7, "12s"), (125, "2m05s"), (7380, "2h03m"), (443000, "5d03h")],
)
def test_spans_of_time(seconds, text):
    assert span(seconds) == text


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (2**30, "1.0 GiB")])
def test_sizes(count, text):
    assert size(count) == text


@pytest.mark.parametrize(
    ("text", "seconds"), [("10", 10), ("500ms", 0.5), ("1m30s", 90), ("2h", 7200), ("7d", 604800), ("1.5s", 1.5)]
)
def test_durations(text, seconds):
    assert DURATION.convert(text, None, None) == seconds


@pytest.mark.parametrize("text", ["", "s", "5 m", "-3s", "1y", "10sm"])
def test_bad_durations(text):
    with pytest.raises(click.BadParameter):
        DURATION.convert(text, None, None)


@pytest.mark.parametrize(
    ("text", "listen"),
    [
        ("0", "127.0.0.1:0"),
        ("2222", "127.0.0.1:2222"),
        ("0.0.0.0:80", "0.0.0.0:80"),
        ("[::1]:80", "[::1]:80"),
        ("localhost:0", "localhost:0"),
    ],
)
def test_local_ports(text, listen):
    assert parse_listen(text) == listen


def test_outline_of_nested_data():
    data = {"a": 1, "b": {"c": [], "d": None}, "e": [{"x": True, "y": 0.123456789}, "z"]}
    assert outline(data, "") == ["a: 1", "b:", "  c: none", "  d: -", "e:", "  - x: yes", "    y: 0.123457", "  - z"]


# Standard input and output


class Pumped:
    """`pump` in a thread, between two pipes and a socket pair."""

    def __init__(self, outcome: bytes = b"finished") -> None:
        self.far, near = socket.socketpair()
        told, telling = os.pipe()
        os.write(telling, outcome)
        os.close(telling)
        self.far.settimeout(10)
        source, self.stdin = os.pipe()
        self.stdout, sink = os.pipe()
        self.source = source
        self.results: list[int] = []
        self.thread = threading.Thread(target=lambda: self.results.append(pump(near, told, source, sink)))
        self.thread.start()

    def finish(self) -> int:
        self.thread.join(10)
        assert not self.thread.is_alive()
        return self.results[0]


def read_all(fd: int) -> bytes:
    with os.fdopen(fd, "rb") as file:
        return file.read()


def test_the_end_of_input_is_a_half_close_and_the_answer_still_comes():
    pumped = Pumped()
    os.write(pumped.stdin, b"question")
    os.close(pumped.stdin)
    asked = b"".join(iter(lambda: pumped.far.recv(100), b""))
    assert asked == b"question"
    pumped.far.sendall(b"answer")
    pumped.far.close()
    assert read_all(pumped.stdout) == b"answer"
    assert pumped.finish() == 0


def test_after_the_far_sides_end_input_still_goes_out():
    pumped = Pumped()
    pumped.far.sendall(b"bye")
    pumped.far.shutdown(socket.SHUT_WR)
    assert read_all(pumped.stdout) == b"bye"
    os.write(pumped.stdin, b"still here")
    assert pumped.far.recv(100) == b"still here"
    os.close(pumped.stdin)
    assert pumped.far.recv(100) == b""
    pumped.far.close()
    assert pumped.finish() == 0


def test_when_the_far_side_is_gone_nobody_waits_for_input():
    pumped = Pumped()
    pumped.far.close()
    assert read_all(pumped.stdout) == b""
    assert pumped.finish() == 0
    os.close(pumped.stdin)


def test_a_far_side_that_broke_off_is_a_failure():
    pumped = Pumped()
    os.write(pumped.stdin, b"unread")
    wait_until_readable(pumped.far)
    pumped.far.close()  # with something unread: a reset
    assert pumped.finish() == 1
    os.close(pumped.stdin)
    os.close(pumped.stdout)


@pytest.mark.parametrize(
    ("outcome", "words"),
    [
        (b"stream-reset: service-unreachable", "service-unreachable"),
        (b"", "the part of the node that carried it ended"),
    ],
)
def test_an_end_that_was_none_is_a_failure(capsys, outcome, words):
    pumped = Pumped(outcome)
    pumped.far.close()
    assert read_all(pumped.stdout) == b""
    assert pumped.finish() == 1
    assert words in capsys.readouterr().err
    os.close(pumped.stdin)


def test_a_connection_is_handed_over_as_a_descriptor():
    far, near = socket.socketpair()
    ours, theirs = socket.socketpair()
    pass_on(near, theirs.fileno())
    data, (fd,), _, _ = socket.recv_fds(ours, 10, 1)
    assert data == b"\0"
    with socket.socket(fileno=fd) as passed:
        passed.sendall(b"hello")
        assert far.recv(10) == b"hello"
    assert far.recv(10) == b"", "nobody else holds it"
    for sock in (far, ours, theirs):
        sock.close()


def test_a_pipe_takes_no_descriptor():
    far, near = socket.socketpair()
    read, write = os.pipe()
    with pytest.raises(PassOnError, match="ProxyUseFdpass"):
        pass_on(near, write)
    assert far.recv(10) == b""
    far.close()
    os.close(read)
    os.close(write)


def wait_until_readable(sock: socket.socket) -> None:
    assert sock.recv(1, socket.MSG_PEEK)


def test_the_command_line_starts_quickly():
    """Not a benchmark: only that nobody imports half of the node for `peerup version`."""
    code = "import sys, peerup.cli.shell, peerup.cli; print(sorted(set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(json.loads(done.stdout.replace("'", '"')))
    assert not loaded & {"trio", "rich", "loguru", "cryptography", "ruamel.yaml", "http.client", "thespian", "h11"}
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "peerup", "version"], capture_output=True, check=True)
    assert time.perf_counter() - began < 5
