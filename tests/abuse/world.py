"""Real nodes for tests of abuse: `home` is attacked, `laptop` is authorised and must not notice."""

from __future__ import annotations

import contextlib
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from protocol.keys import PrivateKey
from tests.abuse.attacker import new_key
from tests.chaos.load import EchoServer, echo_works
from tests.support.nodes import Node
from tests.support.ports import own_port
from tests.support.processes import descriptors, pss_bytes, wait_until


class World:
    """Two nodes and an insider: a key that `home` authorises and that behaves as badly as it likes."""

    def __init__(
        self,
        directory: Path,
        stack: contextlib.ExitStack,
        *,
        log_level: str = "info",
        prepare: Callable[[Node], None] | None = None,
    ) -> None:
        """`prepare` changes the configuration of `home` before it is started."""
        self.server = EchoServer()
        stack.callback(self.server.stop)
        self.directory = directory
        self.laptop, self.home = (Node(name, directory) for name in ("laptop", "home"))
        self.insider: PrivateKey = new_key()
        self.metrics_port = own_port()
        for node in (self.laptop, self.home):
            node.initialise()
        config = self.home.home / "config.yaml"
        text = config.read_text()
        for section, port in (("metrics", self.metrics_port), ("audit", None)):
            head, found, tail = text.partition(f"  {section}:\n")
            assert found
            text = head + found + tail.replace("enabled: false", "enabled: true", 1)
            if port is not None:
                text = text.replace("127.0.0.1:9091", f"127.0.0.1:{port}")
        config.write_text(text)
        if prepare is not None:
            prepare(self.home)
        self.laptop.run("auth", "add", self.home.peer_id)
        self.home.run("auth", "add", self.laptop.peer_id, "--comment", "laptop")
        self.home.run("auth", "add", str(self.insider.peer_id), "--comment", "insider")
        self.laptop.run("names", "add", "home", self.home.peer_id, "--address", self.home.address)
        self.home.run("service", "add", "echo", f"127.0.0.1:{self.server.port}")
        for node in (self.home, self.laptop):
            stack.callback(node.stop)
            node.start("--log-level", log_level)
        self.port = int(self.home.address.rpartition("/")[2])
        self.tunnel = self.proxy(self.laptop)
        wait_until(lambda: echo_works(self.tunnel), within=20, what="the tunnel before any attack")

    def another_insider(self) -> PrivateKey:
        """A key that `home` authorises, too, and whose peer owes nothing for what others have done."""
        key = new_key()
        self.home.run("auth", "add", str(key.peer_id), "--comment", "another insider")
        return key

    @staticmethod
    def proxy(node: Node) -> int:
        return int(node.run_json("proxy", "home", "echo", "0")["listen"].rpartition(":")[2])

    def metrics(self) -> dict[str, float]:
        """All series of `home`: value by `name{labels}`."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[:1] != "#")}

    def total(self, name: str, **labels: str) -> float:
        """The sum of the series of this name that carry these labels."""
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        return sum(
            value
            for series, value in self.metrics().items()
            if series.partition("{")[0] == name and all(label in series for label in wanted)
        )

    def switchboard(self) -> int:
        """The pid of `home`'s switchboard."""
        (pid,) = (actor["pid"] for actor in self.home.actors() if actor["name"] == "switchboard")
        return int(pid)

    def describe(self, actor: str) -> dict[str, Any]:
        """What an actor of `home` says of itself."""
        described: dict[str, Any] = self.home.run_json("actors", "get", actor)
        return described

    def log(self, node: str = "home") -> str:
        return (self.directory / f"{node}.log").read_text()


def fails(node: Node, *arguments: str, status: int = 1, **options: Any) -> str:
    """What a command says that must fail with this status; it says why, and shows nobody a traceback."""
    done = subprocess.run(node.command(*arguments), check=False, capture_output=True, text=True, timeout=60, **options)
    said = done.stdout + done.stderr
    assert done.returncode == status, f"`peerup {' '.join(arguments)}` ended with {done.returncode}: {said}"
    assert "Traceback" not in said, said
    assert done.stderr.strip() or done.stdout.strip(), "it failed without a word"
    return said


class Vitals:
    """What an attack must leave as it was: the switchboard's process, its memory within bounds, its descriptors."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.pid = world.switchboard()
        self.pss = pss_bytes([self.pid])
        self.descriptors = len(descriptors(self.pid))

    def growth(self) -> int:
        """Bytes by which the switchboard has grown."""
        return pss_bytes([self.pid]) - self.pss

    def check(self, *, growth: int, what: str) -> None:
        """The same process, not much larger, no descriptor kept, and the tunnel works."""
        assert echo_works(self._world.tunnel, timeout=10), f"the tunnel is dead after {what}"
        assert self._world.switchboard() == self.pid, f"the switchboard died of {what}"
        assert self.growth() < growth, f"{what} cost {self.growth()} bytes"
        wait_until(
            lambda: len(descriptors(self.pid)) <= self.descriptors + 1, within=15, what=f"no descriptor kept by {what}"
        )


class Witness:
    """Somebody authorised who makes new connections through the tunnel all the time, in a thread.

    Attributes:
        times: seconds for each connection to be answered.
        failed: connections that were not.
    """

    def __init__(self, port: int, *, pause: float = 0.005) -> None:
        self.times: list[float] = []
        self.failed = 0
        self._port = port
        self._pause = pause
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join(30)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        while not self._stopping.is_set():
            began = time.monotonic()
            if echo_works(self._port, timeout=10):
                self.times.append(time.monotonic() - began)
            else:
                self.failed += 1
            self._stopping.wait(self._pause)

    def summary(self) -> str:
        ordered = sorted(self.times)
        if not ordered:
            return f"no connection was made, {self.failed} failed"
        return (
            f"{len(ordered)} new connections, {self.failed} failed, p50 {ordered[len(ordered) // 2] * 1000:.1f} ms, "
            f"p99 {ordered[len(ordered) * 99 // 100] * 1000:.1f} ms, max {ordered[-1] * 1000:.1f} ms"
        )
