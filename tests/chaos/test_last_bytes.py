"""The last bytes of a tunnel arrive, for whatever reason its connection is closed behind them.

Real nodes with a slow line between them: what a client has sent, and closed, is still under way in buffers of its node
and of the kernel when the connection that carries it is closed. Every byte is counted at the far service.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from peerup.client import Client
from tests.support.nodes import Node
from tests.support.processes import wait_until
from tests.support.slow_way import SlowWay

pytestmark = pytest.mark.slow

CONTENT = random.Random(7).randbytes(513_216)
HELLO = b"hello"
RATE = 150_000.0
"""Bytes a second of the slow line: all of it takes some seconds."""


class Sink:
    """A service that says nothing, and remembers what each of its clients has sent and whether it ended well."""

    def __init__(self) -> None:
        self.received: list[tuple[bytes, bool]] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def stop(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                threading.Thread(target=self._read, args=(connection,), daemon=True).start()

    def _read(self, connection: socket.socket) -> None:
        data, whole = bytearray(), False
        with connection, contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_WR)
            while part := connection.recv(65536):
                data += part
            whole = True
        self.received.append((bytes(data), whole))


class World:
    """`laptop` reaches a sink behind `home` over a slow line: directly, or through `relay`, between it and `home`."""

    def __init__(self, directory: Path, stack: contextlib.ExitStack, *, relayed: bool) -> None:
        self.stack = stack
        self.sink = Sink()
        stack.callback(self.sink.stop)
        self.relay, self.home, self.laptop = nodes = [Node(name, directory) for name in ("relay", "home", "laptop")]
        for node in nodes:
            node.initialise()
            stack.callback(node.stop)
        template = (self.laptop.home / "config.yaml").read_text()
        audited, count = re.subn(r"(  audit:\n(?:    #.*\n)*    )#? ?enabled: false", r"\1enabled: true", template)
        assert count == 1
        (self.laptop.home / "config.yaml").write_text(audited)
        slow = self.relay if relayed else self.home
        self.way = SlowWay(int(slow.address.rpartition("/")[2]))
        stack.callback(self.way.stop)
        self.home.run("auth", "add", self.laptop.peer_id)
        self.laptop.run("auth", "add", self.home.peer_id)
        self.home.run("service", "add", "sink", f"127.0.0.1:{self.sink.port}")
        slow_address = f"/ip4/127.0.0.1/tcp/{self.way.port}"
        if relayed:
            config = self.relay.home / "config.yaml"
            config.write_text(f"{config.read_text()}\nrelay_service:\n  enabled: true\n  drain_time: 20s\n")
            for node, address in ((self.home, slow_address), (self.laptop, self.relay.address)):
                self.relay.run("auth", "add", node.peer_id)
                node.run("auth", "add", self.relay.peer_id)
                node.run("relay", "add", f"{address}/p2p/{self.relay.peer_id}")
            self.laptop.run("names", "add", "home", self.home.peer_id)
            self.relay.start()
        else:
            self.laptop.run("names", "add", "home", self.home.peer_id, "--address", slow_address)
        self.home.start()
        self.laptop.start()
        self.port = int(self.laptop.run_json("proxy", "home", "sink", "0")["listen"].rpartition(":")[2])
        wait_until(self._connects, within=30, what="the way to home")

    def _connects(self) -> bool:
        """Whether a short conversation arrives."""
        count = len(self.sink.received)
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=10) as sock:
            sock.sendall(HELLO)
            sock.shutdown(socket.SHUT_WR)
            assert sock.recv(1) == b""
            wait_until(lambda: len(self.sink.received) > count, within=10, what="the end of it")
            return True
        return False

    def send(self, *, wait: bool = True) -> None:
        """Send everything, close, and return at once or when only buffers hold what is under way."""
        self._keep_talking()
        self.way.rate = RATE
        with socket.create_connection(("127.0.0.1", self.port), timeout=60) as sock:
            sock.sendall(CONTENT)
            sock.shutdown(socket.SHUT_WR)
            assert sock.recv(1) == b""
        if wait:
            wait_until(self._nothing_open, within=30, what="the end of the stream at laptop")

    def _keep_talking(self) -> None:
        """Have home say something all the time: what comes for a closed socket makes the kernel reset it."""
        talker = subprocess.Popen(
            self.home.command("ping", self.laptop.peer_id, "--count", "0", "--interval", "0.05"),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self.stack.callback(talker.wait, 20)
        self.stack.callback(talker.kill)

    def _nothing_open(self) -> bool:
        told = Client(self.laptop.home / "run" / "control.sock", timeout=10).get("/v1/actors/switchboard")
        return bool(told["description"]["streams_attached"] == 0)

    def outcome(self) -> str:
        """How the tunnel ended, by laptop's audit log."""
        return wait_until(self._last_outcome, within=40, what="a record of the tunnel")

    def _last_outcome(self) -> str | None:
        log = self.laptop.home / "log" / "audit.jsonl"
        lines = log.read_text().splitlines() if log.exists() else []  # it begins with the first tunnel that is over
        for each in map(json.loads, lines):
            if each.get("sent", 0) > len(HELLO):
                return str(each["outcome"])
        return None

    def check_all_arrived(self) -> None:
        wait_until(lambda: len(self.sink.received) == 2, within=60, what="the end of what home received")
        data, whole = self.sink.received[1]
        assert len(data) == len(CONTENT)
        assert whole
        assert hashlib.sha256(data).digest() == hashlib.sha256(CONTENT).digest()


def disconnect(world: World) -> None:
    world.laptop.run("disconnect", "home")


def stop(world: World) -> None:
    os.kill(world.laptop.daemon_pid, signal.SIGTERM)


def stop_by_command(world: World) -> None:
    world.laptop.run("stop")


def stop_the_relay(world: World) -> None:
    os.kill(world.relay.daemon_pid, signal.SIGTERM)


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as made:
        yield made


@pytest.mark.parametrize(
    ("relayed", "close", "outcomes"),
    [
        (False, disconnect, {"finished"}),
        # who stops waits some seconds for the peer to confirm it, and then has to say what is known
        (False, stop, {"finished", "reset"}),
        (False, stop_by_command, {"finished", "reset"}),
        (True, disconnect, {"finished"}),
        (True, stop, {"finished", "reset"}),
        (True, stop_the_relay, {"finished"}),
    ],
)
def test_all_arrives(
    tmp_path: Path,
    stack: contextlib.ExitStack,
    *,
    relayed: bool,
    close: Callable[[World], None],
    outcomes: set[str],
) -> None:
    world = World(tmp_path, stack, relayed=relayed)
    world.send()
    close(world)
    world.check_all_arrived()
    assert world.outcome() in outcomes


def test_what_was_lost_has_not_finished(tmp_path: Path, stack: contextlib.ExitStack) -> None:
    world = World(tmp_path, stack, relayed=False)
    everybody = sorted(world.home.process_ids())  # found out before: the line is slow, but not that slow
    world.send(wait=False)
    for pid in everybody:
        os.kill(pid, signal.SIGKILL)
    assert len(world.sink.received) == 1, "too fast: everything had arrived"
    assert world.outcome() != "finished"
