"""Measures the actor runtime with real processes. Each function returns samples; `python -m bench.runtime_processes`.

Round trips are given beside the floor of the machine: two processes that do nothing but pass a packet to and fro.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import select
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

from bench.runtime_actors import FACTORY, NAMES, Echo, Echoed, TimeEcho, TimeTell
from protocol.messages.system import ChildSpec, StartChild, StopChild, Strategy
from supervisor.errors import AskError
from supervisor.visitor import Visitor

ROOT = pathlib.Path(__file__).parents[1]
SIZE = 64
"""Bytes of text in an echo."""


@contextlib.contextmanager
def _forked(function: object) -> Iterator[int]:
    pid = os.fork()
    if pid == 0:
        try:
            assert callable(function)
            function()
        finally:
            os._exit(0)
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@contextlib.contextmanager
def _service(strategy: Strategy = Strategy.ONE_FOR_ONE) -> Iterator[Visitor]:
    with tempfile.TemporaryDirectory(prefix="peerup-bench-") as path:
        command = [sys.executable, "-m", "bench.runtime_actors", path, strategy.value]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
            try:
                assert process.stdout is not None
                assert process.stdout.readline() == b"ready\n"
                with Visitor(path, "bench") as visitor:
                    yield visitor
            finally:
                process.terminate()
                process.wait(20)


def floor_round_trip(rounds: int = 5000) -> list[float]:
    """Seconds for a packet to and fro between two processes by the same system calls, and nothing else."""
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def echo(sock: socket.socket) -> None:
        waiting = select.epoll()
        waiting.register(sock.fileno(), select.EPOLLIN)
        while True:
            waiting.poll()
            sock.send(sock.recv(4096))

    with here, there, _forked(lambda: echo(there)):
        waiting = select.epoll()
        waiting.register(here.fileno(), select.EPOLLIN)
        samples = []
        packet = bytes(SIZE + 90)
        for _ in range(rounds):
            before = time.perf_counter()
            here.send(packet)
            waiting.poll()
            here.recv(4096)
            samples.append(time.perf_counter() - before)
        waiting.close()
    return samples


def bare_round_trip(rounds: int = 5000, size: int = SIZE) -> list[float]:
    """Seconds of an ask between two processes without trio, as supervisors are."""
    with tempfile.TemporaryDirectory(prefix="peerup-bench-") as path:

        def serve() -> None:
            with Visitor(path, "server") as server:
                server.exchange.on(
                    Echo, lambda ask, envelope: server.exchange.answer(envelope, Echoed(ask.text, os.getpid()))
                )
                server.run(lambda: False, timeout=120)

        with _forked(serve), Visitor(path, "client") as client:
            client.wait_for("server")
            samples = []
            for _ in range(rounds):
                before = time.perf_counter()
                client.ask("server", Echo(bytes(size)))
                samples.append(time.perf_counter() - before)
    return samples


def trio_round_trip(rounds: int = 5000, size: int = SIZE) -> list[float]:
    """Seconds of an ask from one actor to another, each a trio process."""
    with _service() as visitor:
        return list(visitor.ask("first", TimeEcho("second", rounds, size), timeout=120).seconds)


def one_way(count: int = 50_000, repeats: int = 5) -> list[float]:
    """Messages per second from one actor to another, until the last has been handled."""
    with _service() as visitor:
        return [count / visitor.ask("first", TimeTell("second", count), timeout=120).seconds[0] for _ in range(repeats)]


def spawn(count: int = 30) -> list[float]:
    """Seconds from asking the supervisor for a new actor until it says that the actor is ready."""
    samples = []
    with _service() as visitor:
        for number in range(count):
            name = f"spawned/{number}"
            before = time.perf_counter()
            visitor.ask("root", StartChild(ChildSpec(name, FACTORY, {}, heartbeat=0)))
            samples.append(time.perf_counter() - before)
            visitor.ask("root", StopChild(name))
    return samples


def kill_to_answer(strategy: Strategy, count: int = 30) -> list[float]:
    """Seconds from SIGKILL of the first of three siblings until it, and all restarted with it, answer again."""
    samples = []
    with _service(strategy) as visitor:
        for _ in range(count):
            before = {name: visitor.ask(name, Echo(b"")).pid for name in NAMES}
            struck = time.perf_counter()
            os.kill(before["first"], signal.SIGKILL)
            waiting = NAMES if strategy is not Strategy.ONE_FOR_ONE else NAMES[:1]
            for name in waiting:
                _answers_anew(visitor, name, before[name])
            samples.append(time.perf_counter() - struck)
    return samples


def _answers_anew(visitor: Visitor, name: str, old: int) -> None:
    end = time.monotonic() + 20
    while time.monotonic() < end:
        try:
            if visitor.ask(name, Echo(b""), timeout=1).pid != old:
                return
        except AskError:
            visitor.transport.wait(0.0005)
    raise TimeoutError(f"{name} did not come back")


def measure() -> dict[str, tuple[str, list[float]]]:
    """Every measurement: name to unit and samples."""
    results = {
        "floor_round_trip": ("s", floor_round_trip()),
        "bare_round_trip": ("s", bare_round_trip()),
        "trio_round_trip": ("s", trio_round_trip()),
        "trio_round_trip_16k": ("s", trio_round_trip(2000, 16 * 1024)),
        "one_way": ("msg/s", one_way()),
        "spawn": ("s", spawn()),
    }
    for strategy in Strategy:
        results[f"kill_to_answer_{strategy.value}"] = ("s", kill_to_answer(strategy))
    return results


def main() -> None:
    """Print a line for each measurement."""
    for name, (unit, samples) in measure().items():
        ordered = sorted(samples)
        middle, late = statistics.median(ordered), ordered[int(len(ordered) * 0.99)]
        if unit == "s":
            print(f"{name:32} p50 {middle * 1e6:10.1f} us   p99 {late * 1e6:10.1f} us   n {len(samples)}")
        else:
            print(f"{name:32} p50 {middle:10.0f} {unit}  n {len(samples)}")


if __name__ == "__main__":
    main()
