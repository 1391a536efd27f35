"""Real processes for the tests of the runtime: peers forked from the test, and whole services."""

from __future__ import annotations

import base64
import contextlib
import os
import pathlib
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Self

from protocol.messages import Message, encode_body, message
from protocol.messages.system import ChildSpec, ChildStatus, ReadTree, Strategy, SupervisorSpec
from supervisor.errors import AskError
from supervisor.visitor import Visitor
from tests.supervisor.toy_actors import Echo, Echoed
from tests.support.processes import is_alive, tree, wait_until

ROOT = pathlib.Path(__file__).parents[2]
VISITOR = "tester"
"""The visitor of a toy service, who may do everything to it."""
TOY = "tests.supervisor.toy_actors:Toy"


@message("toy.root-spec")
class RootSpec(Message):
    """A tree, on its way to a service's command line."""

    root: SupervisorSpec


@contextlib.contextmanager
def run_directory() -> Iterator[str]:
    """An empty 0700 directory; it must be empty again at the end unless the test removes it."""
    with tempfile.TemporaryDirectory(prefix="peerup-run-") as path:
        yield path


@contextlib.contextmanager
def forked(function: Callable[[], object]) -> Iterator[int]:
    """A child process that runs the function; killed and waited for at the end."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            function()
            status = 0
        finally:
            os._exit(status)
    try:
        yield pid
    finally:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def visitor_ready(path: str, name: str) -> Callable[[], bool]:
    """A condition: somebody is registered as `name` in this run directory."""

    def ready() -> bool:
        return (pathlib.Path(path) / "names" / name).is_symlink()

    return ready


def spec(
    *children: ChildSpec,
    strategy: Strategy = Strategy.ONE_FOR_ONE,
    intensity: int = 20,
    window: float = 10.0,
    backoff: float = 0.05,
) -> SupervisorSpec:
    """A supervisor with these children."""
    return SupervisorSpec(strategy, intensity, window, backoff, 0.5, children, starters=(VISITOR,))


def toy(name: str, **arguments: object) -> ChildSpec:
    """A toy actor."""
    return ChildSpec(name, TOY, dict(arguments), heartbeat=0.5, heartbeat_deadline=1.0)


class ToyService:
    """A service in a process of its own, and a visitor in it."""

    def __init__(self, path: str, root: SupervisorSpec, *, allow_faults: bool = False, deadline: float = 20.0) -> None:
        self.path = path
        body, _ = encode_body(RootSpec(root))
        command = [sys.executable, "-m", "tests.supervisor.toy_service", path, base64.b64encode(body).decode()]
        if allow_faults:
            command.append("--allow-faults")
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.lines: list[str] = []
        self._partial = b""
        self._visitor: Visitor | None = None
        try:
            self.wait_ready(1, deadline)
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def visitor(self) -> Visitor:
        """A registered name in the run directory, made at first use."""
        if self._visitor is None:
            self._visitor = Visitor(self.path, VISITOR)
        return self._visitor

    def leave(self) -> None:
        """Close the visitor; the next use makes a new one."""
        if self._visitor is not None:
            self._visitor.close()
            self._visitor = None

    def wait_ready(self, times: int, deadline: float = 20.0) -> None:
        """Until the service has said `ready` so often."""
        end = time.monotonic() + deadline
        assert self.process.stdout is not None
        fd = self.process.stdout.fileno()
        while self.lines.count("ready") < times:
            left = end - time.monotonic()
            assert left > 0, f"not ready within {deadline:g} s: {self.lines} {self.errors()}"
            if select.select([fd], [], [], left)[0]:
                block = os.read(fd, 65536)
                assert block, f"the service ended: {self.process.wait(5)} {self.errors()}"
                *whole, self._partial = (self._partial + block).split(b"\n")
                self.lines += [line.decode() for line in whole]

    def errors(self) -> str:
        """What it has written to standard error so far."""
        assert self.process.stderr is not None
        fd = self.process.stderr.fileno()
        text = b""
        while select.select([fd], [], [], 0)[0]:
            block = os.read(fd, 65536)
            if not block:
                break
            text += block
        return text.decode(errors="replace")

    def echo(self, name: str, timeout: float = 5.0) -> Echoed:
        """One round trip."""
        return self.visitor.ask(name, Echo(b"?"), timeout=timeout)

    def echo_from_another(self, name: str, pid: int, deadline: float = 10.0) -> Echoed:
        """The first answer of another process than `pid` under this name."""

        def answered() -> Echoed | None:
            try:
                answer = self.visitor.ask(name, Echo(b"?"), timeout=1.0)
            except AskError:
                self.visitor.transport.wait(0.005)
                return None
            return answer if answer.pid != pid else None

        found = wait_until(answered, within=deadline, what=f"{name} answers from a new process", every=0.001)
        assert found is not None
        return found

    def status(self, name: str) -> ChildStatus:
        """The root's view of one actor."""
        return next(child for child in self.visitor.ask("root", ReadTree()).children if child.name == name)

    def entry_pid(self, name: str) -> int:
        """The process that the registry has for a name."""
        entry = self.visitor.directory.read(name)
        assert entry is not None
        return entry.pid

    def pids(self) -> list[int]:
        """Every process of the service, zombies included."""
        return [process.pid for process in tree(self.pid)]

    def stop(self, number: int = signal.SIGTERM, deadline: float = 15.0) -> int:
        """Signal it, wait for its end; its exit status."""
        self.leave()
        self.process.send_signal(number)
        return self.process.wait(deadline)

    def close(self) -> None:
        """Stop it if it runs, and make sure that nothing of it stays."""
        self.leave()
        pids = self.pids()
        try:
            if self.process.poll() is None:
                self.process.terminate()
                assert self.process.wait(20) == 0
                assert not list(pathlib.Path(self.path).iterdir())
        finally:
            self.process.kill()
            self.process.wait(10)
            for stream in (self.process.stdout, self.process.stderr):
                if stream is not None:
                    stream.close()
            wait_until(lambda: not [pid for pid in pids if is_alive(pid)], within=5, what="all processes are gone")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
