"""More clients than a peer takes: the surplus is refused here, with a reason, and harms nobody else."""

from __future__ import annotations

import contextlib
import resource
import selectors
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from tests.abuse.world import World
from tests.chaos.load import echo_works
from tests.support.processes import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

CLIENTS = 1150
TAKEN = 992
"""Streams of tunnels that one connection to a peer of our kind carries."""
RETRYING = 20.0


class SelectEcho:
    """An echo service for a thousand connections, in one thread."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self._listener.setblocking(False)
        self.port: int = self._listener.getsockname()[1]
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._stopping = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopping = True
        self._thread.join(10)

    def _run(self) -> None:
        try:
            self._serve()
        finally:
            for key in list(self._selector.get_map().values()):
                assert isinstance(key.fileobj, socket.socket)
                key.fileobj.close()
            self._selector.close()

    def _serve(self) -> None:
        while not self._stopping:
            for key, _ in self._selector.select(0.1):
                if key.fileobj is self._listener:
                    connection, _ = self._listener.accept()
                    connection.setblocking(False)
                    self._selector.register(connection, selectors.EVENT_READ)
                    continue
                assert isinstance(key.fileobj, socket.socket)
                with contextlib.suppress(BlockingIOError):
                    try:
                        received = key.fileobj.recv(4096)
                    except OSError:
                        received = b""
                    if received:
                        key.fileobj.send(received)
                    else:
                        self._selector.unregister(key.fileobj)
                        key.fileobj.close()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 8192:
        pytest.skip("it takes some thousand descriptors")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 8192), hard))
    try:
        with contextlib.ExitStack() as stack:
            world = World(tmp_path_factory.mktemp("s"), stack)
            service = SelectEcho()
            stack.callback(service.stop)
            world.home.run("service", "add", "many", f"127.0.0.1:{service.port}")
            yield world
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def connected(port: int, *, timeout: float = 60.0) -> socket.socket | None:
    """A client whose first byte has been answered; None if it was refused."""
    client = socket.socket()
    try:
        client.settimeout(timeout)
        client.connect(("127.0.0.1", port))
        client.sendall(b"?")
        if client.recv(1) == b"?":
            return client
    except OSError:
        pass
    client.close()
    return None


def test_clients_beyond_what_the_peer_takes_harm_nobody(world: World) -> None:
    """1,150 of them: as many tunnels as the peer takes go on while the others come again and again."""
    many = int(world.laptop.run_json("proxy", "home", "many", "0")["listen"].rpartition(":")[2])
    (before,) = (one["id"] for one in world.describe("switchboard")["description"]["connections"])
    good: list[socket.socket] = []
    refusals = [0]
    stopping = threading.Event()
    lock = threading.Lock()

    def keep_trying(count: int) -> None:
        for _ in range(count):
            while not stopping.is_set():
                client = connected(many, timeout=15.0)
                if client is not None:
                    with lock:
                        good.append(client)
                    break
                refusals[0] += 1

    threads = [threading.Thread(target=keep_trying, args=(CLIENTS // 50,), daemon=True) for _ in range(50)]
    for thread in threads:
        thread.start()
    try:
        wait_until(lambda: len(good) >= TAKEN - 16, within=120, what="as many tunnels as the peer takes")
        began = time.monotonic()
        while time.monotonic() - began < RETRYING:
            with lock:
                chosen = good[:: len(good) // 50]
            for client in chosen:
                client.sendall(b"!")
                assert client.recv(1) == b"!", "a good tunnel was ended for the sake of the surplus"
            time.sleep(0.2)
        assert refusals[0] > 0
        (after,) = (one["id"] for one in world.describe("switchboard")["description"]["connections"])
        assert after == before, "the connection was ended"
        assert world.total("peerup_connections_closed_total", reason="yamux-flood") == 0
        assert "as many connections to the peer are open as it takes" in world.log("laptop")
    finally:
        stopping.set()
        for thread in threads:
            thread.join(30)
        for client in good:
            client.close()
    wait_until(lambda: echo_works(world.tunnel), within=30, what="room for others when they have gone")


def test_a_thousand_tunnels_that_are_reset_together_end_nothing_else(world: World) -> None:
    many = int(world.laptop.run_json("proxy", "home", "many", "0")["listen"].rpartition(":")[2])
    (before,) = (one["id"] for one in world.describe("switchboard")["description"]["connections"])
    beside = connected(world.tunnel)
    assert beside is not None
    for _ in range(3):
        clients = []
        for _ in range(TAKEN - 32):
            client = connected(many)
            assert client is not None
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            clients.append(client)
        for client in clients:
            client.close()
        beside.sendall(b"!")
        assert beside.recv(1) == b"!"
    beside.close()
    (after,) = (one["id"] for one in world.describe("switchboard")["description"]["connections"])
    assert after == before, "the connection was ended"
