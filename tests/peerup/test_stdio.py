"""`peerup proxy PEER SERVICE --stdio`: its status tells what the far service got, whatever ends first."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import random
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.abuse.world import World
from tests.support.processes import wait_until

pytestmark = pytest.mark.slow
CONTENT = random.Random(9).randbytes(3_000_000)


class Service:
    """One connection at a time, handled as `behaviour` says; what it read, and how that ended."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.gate = threading.Event()
        self.connected = threading.Event()
        self.done = threading.Event()
        self.finish_first = self.break_off = False
        self.received = b""
        self.ended_with = ""
        threading.Thread(target=self._run, daemon=True).start()

    def expect(self, *, finish_first: bool = False, break_off: bool = False) -> None:
        self.gate.clear()
        self.connected.clear()
        self.done.clear()
        self.finish_first, self.break_off, self.received, self.ended_with = finish_first, break_off, b"", ""

    def _run(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            self.connected.set()
            with connection:
                if self.finish_first:
                    connection.shutdown(socket.SHUT_WR)
                self.gate.wait(60)
                if self.break_off:
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                else:
                    try:
                        while data := connection.recv(65536):
                            self.received += data
                        self.ended_with = "end"
                    except ConnectionResetError:
                        self.ended_with = "reset"
            self.done.set()


class Stage(World):
    """Two nodes and the service."""

    def __init__(self, directory: Path, stack: contextlib.ExitStack) -> None:
        super().__init__(directory, stack)
        self.service = Service()
        self.home.run("service", "add", "sink", f"127.0.0.1:{self.service.port}")

    def start(self, service: str = "sink", **options: int) -> subprocess.Popen[bytes]:
        descriptors = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
        return subprocess.Popen(self.laptop.command("proxy", "home", service, "--stdio"), **descriptors)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with contextlib.ExitStack() as stack:
        # A shell lets what it starts in the background ignore SIGINT, and what that starts inherits it.
        stack.callback(signal.signal, signal.SIGINT, signal.signal(signal.SIGINT, signal.default_int_handler))
        yield Stage(tmp_path_factory.mktemp("s"), stack)


def feed(process: subprocess.Popen[bytes], content: bytes) -> threading.Thread:
    assert process.stdin is not None
    stdin = process.stdin

    def write() -> None:
        with contextlib.suppress(OSError), stdin:
            stdin.write(content)

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize("finish_first", [True, False])
@pytest.mark.parametrize("size", [5, len(CONTENT)])
def test_it_ends_well_when_the_service_has_everything_and_not_before(
    stage: Stage, size: int, *, finish_first: bool
) -> None:
    stage.service.expect(finish_first=finish_first)
    with stage.start() as process:
        feed(process, CONTENT[:size])
        assert stage.service.connected.wait(20)
        if size > 5:
            # longer than anybody waited for the outcome, and the service reads nothing
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(7)
        stage.service.gate.set()
        assert process.wait(30) == 0, process.stderr.read()
        assert stage.service.done.wait(10)
        assert stage.service.received == CONTENT[:size]
        assert stage.service.ended_with == "end"


@pytest.mark.parametrize("finish_first", [True, False])
def test_a_service_that_breaks_off_is_a_failure(stage: Stage, *, finish_first: bool) -> None:
    stage.service.expect(finish_first=finish_first, break_off=True)
    with stage.start() as process:
        feed(process, CONTENT)
        assert stage.service.connected.wait(20)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1)
        stage.service.gate.set()
        assert process.wait(30) == 1
        assert b"broke" in process.stderr.read()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_one_that_is_killed_is_a_break_and_no_end(stage: Stage, number: int) -> None:
    stage.service.expect()
    stage.service.gate.set()
    with stage.start() as process:
        assert process.stdin is not None
        process.stdin.write(b"half of a backup")
        process.stdin.flush()
        wait_until(lambda: stage.service.received == b"half of a backup", within=20, what="what was written")
        process.send_signal(number)
        assert process.wait(20) != 0
        assert stage.service.done.wait(10)
        assert stage.service.ended_with == "reset"


def test_nobody_takes_the_output_any_more(stage: Stage) -> None:
    with stage.start("echo") as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"x")
        process.stdin.flush()
        assert process.stdout.read(1) == b"x"
        process.stdout.close()
        process.stdin.write(b"y")
        process.stdin.flush()
        assert process.wait(20) == 128 + signal.SIGPIPE
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()


def test_descriptors_that_do_not_block_lose_nothing(stage: Stage) -> None:
    source, feeding = os.pipe()
    reading, sink = os.pipe()
    os.set_blocking(source, False)
    os.set_blocking(sink, False)
    fcntl.fcntl(sink, fcntl.F_SETPIPE_SZ, 4096)
    with stage.start("echo", stdin=source, stdout=sink) as process:
        os.close(source)
        os.close(sink)

        def write() -> None:
            with os.fdopen(feeding, "wb", buffering=0) as file:
                for start in range(0, 1_000_000, 100_000):
                    time.sleep(0.02)  # so that there is nothing to read now and then
                    view = memoryview(CONTENT[start : start + 100_000])
                    while view:
                        view = view[file.write(view) or 0 :]

        threading.Thread(target=write, daemon=True).start()
        with os.fdopen(reading, "rb") as file:
            got = file.read()
        assert hashlib.sha256(got).digest() == hashlib.sha256(CONTENT[:1_000_000]).digest()
        assert process.wait(20) == 0, process.stderr.read()


def test_input_that_cannot_be_read_is_a_failure(stage: Stage) -> None:
    unreadable = os.open(os.devnull, os.O_WRONLY)
    stage.service.expect()
    stage.service.gate.set()
    with stage.start(stdin=unreadable) as process:
        os.close(unreadable)
        assert process.wait(20) == 1
        assert b"standard input cannot be read" in process.stderr.read()
        assert stage.service.done.wait(10)
        assert stage.service.ended_with == "reset"
