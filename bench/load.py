"""Drives the load generator: `load.c` where a C compiler is, else `load_fallback.py`, which does the same slower."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TIMEOUT = 180.0
"""Seconds that one measurement may take; far more than any should need, so that a hang ends as an error."""


class LoadError(Exception):
    """The load generator found a wrong byte, a refused connection or a stall; says which."""


@dataclasses.dataclass(frozen=True)
class Server:
    """A running load server. It is not part of the tunnel: its CPU and memory are not counted."""

    port: int
    pid: int


@dataclasses.dataclass(frozen=True)
class Times:
    """Quantiles in seconds of `count` measured times."""

    count: int
    failures: int
    p50: float
    p90: float
    p99: float
    max: float


@dataclasses.dataclass(frozen=True)
class Busy:
    """Many connections that each ask and wait, again and again.

    Attributes:
        round_trips: of all connections together; `least`, `median` and `most` of a single one.
        jain: Jain's fairness index of the round trips: 1 when all got the same, 1/count when one got all.
        worst: the longest round trip in seconds.
    """

    count: int
    failures: int
    seconds: float
    size: int
    round_trips: float
    least: float
    median: float
    most: float
    jain: float
    worst: float


@dataclasses.dataclass(frozen=True)
class Bulk:
    """Bytes moved, and the seconds until the last of them was confirmed; `each` has the seconds of every stream."""

    bytes: int
    seconds: float
    each: tuple[float, ...]

    @property
    def megabytes_per_second(self) -> float:
        """In units of 10^6 bytes."""
        return self.bytes / self.seconds / 1e6


class Load:
    """The load generator.

    Attributes:
        command: what starts it.
        description: `C` with the compiler's name, or `Python`; results of the two are not comparable.
    """

    def __init__(self) -> None:
        compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
        if compiler is None:
            self.command = [sys.executable, str(HERE / "load_fallback.py")]
            self.description = "Python (no C compiler found)"
        else:
            self.command = [str(_compile(compiler))]
            self.description = f"C ({Path(compiler).name})"

    @contextlib.contextmanager
    def server(self) -> Iterator[Server]:
        """A load server on a free loopback port while the context lasts."""
        with subprocess.Popen([*self.command, "server", "0"], stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout is not None
                word, _, port = process.stdout.readline().partition(" ")
                if word != "port":
                    raise LoadError("the load server did not start")
                yield Server(int(port), process.pid)
            finally:
                process.kill()

    def bulk(self, port: int, size: int, *, streams: int = 1, direction: str = "up") -> Bulk:
        """Move `size` bytes in all over `streams` connections; `up` is from client to server."""
        answer = self._run("bulk", port, size, streams, direction)
        return Bulk(answer["bytes"], answer["seconds"], tuple(answer["each"]))

    def echo(self, port: int, rounds: int) -> Times:
        """Round trips of one byte, one at a time, on one established connection."""
        return _times(self._run("echo", port, rounds))

    def connect(self, port: int, count: int) -> Times:
        """From connect to the first byte back, one new connection after the other."""
        return _times(self._run("connect", port, count))

    def busy(self, port: int, count: int, *, seconds: float, size: int) -> Busy:
        """`count` connections at once, each sending `size` bytes and waiting for them, for `seconds`."""
        answer = self._run("busy", port, count, seconds, size, check=False)
        del answer["mode"]
        return Busy(**answer)

    def first(self, port: int, patience: float) -> float:
        """The time (of CLOCK_MONOTONIC) at which one byte first went there and back."""
        return float(self._run("first", port, patience)["at"])

    @contextlib.contextmanager
    def hold(self, port: int, count: int) -> Iterator[float]:
        """Hold `count` connections, each used once; gives the seconds it took to open them.

        Raises:
            LoadError: not all opened, or at the end not all were still usable.
        """
        command = [*self.command, "hold", str(port), str(count)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdin is not None
                assert process.stdout is not None
                opened = json.loads(process.stdout.readline() or "{}")
                if opened.get("open") != count:
                    raise LoadError(f"of {count} connections {opened.get('open', 0)} opened")
                yield opened["seconds"]
                process.stdin.write("\n")
                process.stdin.flush()
                closed = json.loads(process.stdout.readline() or "{}")
                if closed.get("alive") != count:
                    raise LoadError(f"of {count} idle connections {closed.get('alive', 0)} were still usable")
            finally:
                process.kill()

    def _run(self, mode: str, *arguments: object, check: bool = True) -> dict[str, Any]:
        command = [*self.command, mode, *(str(argument) for argument in arguments)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
        except subprocess.TimeoutExpired as error:
            raise LoadError(f"{mode}: not finished within {TIMEOUT:g} s") from error
        if (check and done.returncode) or not done.stdout:
            raise LoadError(f"{mode}: exit status {done.returncode}: {done.stderr.strip() or done.stdout.strip()}")
        return dict(json.loads(done.stdout))


def _compile(compiler: str) -> Path:
    """The compiled generator, kept under a name that contains its source's hash, so a change compiles anew."""
    source = HERE / "load.c"
    digest = hashlib.sha256(source.read_bytes()).hexdigest()[:16]
    directory = HERE / "build"
    directory.mkdir(exist_ok=True)
    program = directory / f"load-{digest}"
    if not program.exists():
        with tempfile.TemporaryDirectory(dir=directory) as scratch:
            output = Path(scratch) / "load"
            subprocess.run([compiler, "-O2", "-pthread", "-o", output, source], check=True)
            output.rename(program)
    return program


def _times(answer: dict[str, Any]) -> Times:
    return Times(**{key: value for key, value in answer.items() if key != "mode"})
