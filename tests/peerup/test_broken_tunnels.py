"""What becomes of a tunnel of real nodes when a process is killed: it goes on, or is reset, but never just ends."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.chaos.load import EchoServer
from tests.support.nodes import Node
from tests.support.processes import wait_until

SERVICE = "echo"


class World:
    """`laptop` reaches an echo service behind `home`."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        server = EchoServer()
        stack.callback(server.stop)
        self.laptop, self.home = Node("laptop", directory), Node("home", directory)
        for node in (self.laptop, self.home):
            node.initialise()
        self.laptop.run("auth", "add", self.home.peer_id)
        self.home.run("auth", "add", self.laptop.peer_id)
        self.laptop.run("names", "add", "home", self.home.peer_id, "--address", self.home.address)
        self.home.run("service", "add", SERVICE, f"127.0.0.1:{server.port}")
        for node in (self.laptop, self.home):
            stack.callback(node.stop)
            node.start()
        self.port = int(self.laptop.run_json("proxy", "home", SERVICE, "0")["listen"].rpartition(":")[2])

    def connect(self) -> socket.socket:
        """A tunnel that works, as soon as the test before this one leaves one."""
        return wait_until(self._try_to_connect, within=15, what="a tunnel")

    def _try_to_connect(self) -> socket.socket | None:
        with ExitStack() as stack:
            try:
                # A reset may come so soon that connecting itself reports it.
                client = stack.enter_context(socket.create_connection(("127.0.0.1", self.port), timeout=15))
                exchange(client, b"x")
            except ConnectionError:
                return None
            stack.pop_all()
            return client


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with ExitStack() as stack:
        yield World(tmp_path_factory.mktemp("b"), stack)


def exchange(client: socket.socket, data: bytes) -> None:
    client.sendall(data)
    received = b""
    while len(received) < len(data):
        part = client.recv(65536)
        assert part, "a broken tunnel looked like a clean end"
        received += part
    assert received == data


def kill(node: Node, name: str) -> None:
    """SIGKILL, and wait until the successor runs."""
    pid = next(actor["pid"] for actor in node.actors() if actor["name"] == name)
    os.kill(pid, signal.SIGKILL)
    wait_until(
        lambda: any(
            actor["name"] == name and actor["state"] == "running" and actor["pid"] != pid for actor in node.actors()
        ),
        within=15,
        what=f"{name} to be back",
    )


@pytest.mark.parametrize(
    ("side", "actor"),
    [("laptop", "proxy/home/echo"), ("home", "service/echo"), ("laptop", "proxies"), ("home", "proxies")],
)
def test_a_tunnel_outlives_the_proxies_at_its_ends(world: World, side: str, actor: str) -> None:
    with world.connect() as client:
        kill(getattr(world, side), actor)
        exchange(client, os.urandom(50_000))
        client.shutdown(socket.SHUT_WR)
        assert client.recv(1) == b""


@pytest.mark.parametrize("side", ["laptop", "home"])
def test_a_killed_switchboard_resets_its_tunnels(world: World, side: str) -> None:
    client = world.connect()
    with client:
        kill(getattr(world, side), "switchboard")
        with pytest.raises(ConnectionResetError):
            client.recv(1)


def test_a_removed_proxy_resets_its_tunnels(world: World) -> None:
    with world.connect() as client:
        world.laptop.run("proxy", "stop", "home", SERVICE)
        with pytest.raises(ConnectionResetError):
            client.recv(1)
