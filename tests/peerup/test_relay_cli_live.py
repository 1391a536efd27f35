"""A running relay as its owner sees it: three whole nodes on loopback, two of which meet only through the third."""

from __future__ import annotations

import hashlib
import http.server
import os
import signal
import socket
import subprocess
import threading
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

import pytest

from peerup.client import Client
from tests.peerup.test_node_end_to_end import Node, environment, free_port, wait_for
from tests.support.processes import is_alive

pytestmark = pytest.mark.slow

CONTENT = os.urandom(3_000_000)


class Relay(Node):
    """A relay in a directory of its own."""

    def __init__(self, home: Path, *settings: str) -> None:
        self.home = home
        self.port = free_port()
        self.address = f"/ip4/127.0.0.1/tcp/{self.port}"
        self.log = home.with_suffix(".log")
        self.daemon: subprocess.Popen[bytes] | None = None
        limits = [word for setting in settings for word in ("--limit", setting)]
        self.run("relay", "setup", "--yes", "--listen", self.address, *limits)
        self.peer_id = self.run("whoami").stdout.strip()
        self.client = Client(home / "run" / "control.sock", timeout=20)

    def command(self, *arguments: str) -> list[str]:
        if arguments[0] == "daemon":
            arguments = ("relay", "serve", *arguments[1:])
        return super().command(*arguments)

    def peers(self) -> dict[str, dict]:
        return {peer["comment"]: peer for peer in self.json("relay", "list-peers")}


class Hidden(Node):
    """A node that listens nowhere."""

    def __init__(self, home: Path) -> None:
        super().__init__(home)
        config = home / "config.yaml"
        text = config.read_text()
        listen = f'  listen_addresses:\n    - "{self.address}"\n'
        assert listen in text
        config.write_text(text.replace(listen, "  listen_addresses: []\n"))


class Three:
    """The relay, and two nodes with a web server behind one of them."""

    def __init__(self, directory: Path, *settings: str) -> None:
        self.relay = Relay(directory / "relay", *settings)
        self.home, self.laptop = Hidden(directory / "home"), Hidden(directory / "laptop")
        self.nodes = (self.relay, self.home, self.laptop)
        (where,) = self.relay.json("relay", "info")["addresses"]
        for name, node, other in (("home", self.home, self.laptop), ("laptop", self.laptop, self.home)):
            self.relay.run("relay", "authorize", node.peer_id, "--comment", name)
            node.run("auth", "add", other.peer_id)
            node.run("relay", "add", where)
        self.laptop.run("names", "add", "home", self.home.peer_id)

    def start(self) -> None:
        for node in self.nodes:
            node.start()
        for node in self.nodes[1:]:
            self.wait_reserved(node)

    def wait_reserved(self, node: Node, *, held: bool = True) -> None:
        wait_for(
            lambda: (node.json("relay", "list")[0]["state"] in ("held", "renewing")) is held,
            f"a reservation: {held}",
            30.0,
        )

    def proxy(self, port: int) -> int:
        """The local port through which the laptop reaches this port at home."""
        self.home.run("service", "add", "web", f"127.0.0.1:{port}")
        return int(self.laptop.json("proxy", "home", "web", "0")["listen"].rpartition(":")[2])

    def stop(self) -> None:
        for node in reversed(self.nodes):
            node.stop()


@pytest.fixture
def three(tmp_path) -> Iterator[Callable[..., Three]]:
    made: list[Three] = []

    def make(*settings: str) -> Three:
        made.append(Three(tmp_path, *settings))
        return made[-1]

    yield make
    for nodes in made:
        nodes.stop()


@pytest.fixture
def web() -> Iterator[int]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(CONTENT)))
            self.end_headers()
            self.wfile.write(CONTENT)

        def log_message(self, *_: object) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_port
    server.shutdown()
    server.server_close()
    thread.join()


def fetch(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=30) as answer:
        return hashlib.sha256(answer.read()).hexdigest()


def test_the_owner_sees_what_the_relay_does_and_changes_count_at_once(three, web):
    nodes = three("drain_time=1s")
    nodes.start()
    relay, laptop = nodes.relay, nodes.laptop

    info = relay.json("relay", "info")
    assert info["running"] is True
    assert info["live"]["serving"] is True
    assert info["live"]["reservations"] == 2
    assert info["addresses"] == [f"{relay.address}/p2p/{relay.peer_id}"]
    assert info["live"]["main_pid"] == relay.daemon.pid, "what a shell and systemd know"
    process = f"pid {info['live']['pid']} (main process {relay.daemon.pid})"
    assert process in relay.run("relay", "info").stdout
    assert process in relay.run("status").stdout

    port = nodes.proxy(web)
    assert fetch(port) == hashlib.sha256(CONTENT).hexdigest()
    assert " relayed " in laptop.run("ping", "home", "-c", "1").stdout
    peers = relay.peers()
    for peer in (peers["home"], peers["laptop"]):
        assert peer["connected"] is True
        assert peer["circuits"] == 1
        assert peer["bytes"] > len(CONTENT)
        assert peer["reserved"] is True
        assert peer["reserved_until"] is not None
    listing = relay.run("relay", "list-peers").stdout
    assert max(map(len, listing.splitlines())) <= 80
    assert relay.json("relay", "info")["live"]["bytes"] > len(CONTENT)

    done = relay.json("relay", "deauthorize", "laptop")
    assert done["node"] == {"running": True, "reloaded": True, "problems": []}

    def alone() -> bool:
        held = relay.client.get("/v1/relay")
        return [item["peer_id"] for item in held["held"]] == [nodes.home.peer_id] and not held["open"]

    wait_for(alone, "its reservation and its circuit end")
    assert not [
        peer for peer in relay.client.get("/v1/peers") if peer["peer_id"] == laptop.peer_id and peer["connections"]
    ]
    nodes.wait_reserved(laptop, held=False)
    assert set(relay.peers()) == {"home"}

    # A line in the file is all that it takes, whoever writes it.
    with (relay.home / "authorized_keys").open("a") as keys:
        keys.write(f"{laptop.peer_id} # laptop\n")
    nodes.wait_reserved(laptop)
    assert fetch(port) == hashlib.sha256(CONTENT).hexdigest()


class SlowFetch:
    """A request through a tunnel of which the second half waits for `finish`."""

    def __init__(self, port: int) -> None:
        self._sock = socket.create_connection(("127.0.0.1", port), timeout=30)
        self._sock.sendall(b"GET / HTTP/1.0\r\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._sock.close()

    def finish(self) -> str:
        self._sock.sendall(b"\r\n")
        received = bytearray()
        while data := self._sock.recv(1 << 16):
            received += data
        return hashlib.sha256(received.partition(b"\r\n\r\n")[2]).hexdigest()


def circuits(nodes: Three) -> int:
    return len(nodes.relay.client.get("/v1/relay")["open"])


def test_a_stop_lets_what_runs_end_and_nothing_else(three, web):
    nodes = three("drain_time=10m")
    nodes.start()
    port = nodes.proxy(web)
    assert fetch(port) == hashlib.sha256(CONTENT).hexdigest()
    with SlowFetch(port) as running:
        wait_for(lambda: any(row["streams"] for row in streams(nodes)), "the stream is open")
        daemon = nodes.relay.daemon
        # Whoever stops it at a terminal waits for its end; after SIGTERM a successor may come (test_relay_restart.py).
        daemon.send_signal(signal.SIGINT)
        wait_for(lambda: "nothing new is granted" in nodes.relay.log.read_text(), "it drains")
        nodes.wait_reserved(nodes.home, held=False)
        assert "the relay is shutting down" in nodes.home.run("relay", "list").stdout
        refused = nodes.laptop.run("ping", "home", "-c", "1", status=1)
        assert "is shutting down" in refused.stdout + refused.stderr
        assert daemon.poll() is None
        assert running.finish() == hashlib.sha256(CONTENT).hexdigest(), "what runs goes on"
    assert daemon.wait(60) == 0, "long before the relay's time is up"
    nodes.relay.stop()
    nodes.relay.start()
    for node in (nodes.home, nodes.laptop):
        nodes.wait_reserved(node)
    assert fetch(port) == hashlib.sha256(CONTENT).hexdigest()


def streams(nodes: Three) -> list[dict]:
    """The laptop's connections to home."""
    peers = nodes.laptop.client.get("/v1/peers")
    return [row for peer in peers if peer["peer_id"] == nodes.home.peer_id for row in peer["connections"]]


def test_a_stop_does_not_wait_for_circuits_that_carry_nothing(three, web):
    nodes = three("drain_time=10m")
    nodes.start()
    port = nodes.proxy(web)
    assert fetch(port) == hashlib.sha256(CONTENT).hexdigest()
    assert circuits(nodes) == 1
    daemon = nodes.relay.daemon
    daemon.send_signal(signal.SIGTERM)
    assert daemon.wait(60) == 0
    assert "no circuit is left" in nodes.relay.log.read_text()
    nodes.relay.stop()


def test_a_second_signal_does_not_wait_for_circuits(three, web):
    nodes = three("drain_time=10m")
    nodes.start()
    with SlowFetch(nodes.proxy(web)):
        wait_for(lambda: any(row["streams"] for row in streams(nodes)), "the stream is open")
        daemon = nodes.relay.daemon
        pids = nodes.relay.pids()
        daemon.send_signal(signal.SIGINT)
        wait_for(lambda: "nothing new is granted" in nodes.relay.log.read_text(), "it drains")
        assert daemon.poll() is None
        daemon.send_signal(signal.SIGINT)
        daemon.wait(20)
    wait_for(lambda: not any(map(is_alive, pids)), "no process left")
    daemon.stdout.close()
    nodes.relay.daemon = None


def test_systemd_is_told_how_long_the_drain_may_take(tmp_path):
    relay = Relay(tmp_path / "relay", "drain_time=100s")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd, relay.log.open("ab") as log:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(60)
        daemon = subprocess.Popen(
            relay.command("daemon"),
            stdout=subprocess.DEVNULL,
            stderr=log,
            env=environment() | {"NOTIFY_SOCKET": str(tmp_path / "notify")},
        )
        assert systemd.recv(1000).decode().split("\n")[0] == "READY=1"
        daemon.send_signal(signal.SIGTERM)
        told = dict(line.split("=") for line in systemd.recv(1000).decode().split("\n"))
        assert told["STOPPING"] == "1"
        assert int(told["EXTEND_TIMEOUT_USEC"]) >= 140_000_000
        assert daemon.wait(30) == 0


def test_it_says_what_takes_effect_with_the_next_start_only(tmp_path):
    relay = Relay(tmp_path / "relay")
    relay.start()
    try:
        assert relay.json("relay", "config", "validate")["after_restart"] == []
        assert "started again" not in relay.run("relay", "info").stderr
        config = relay.home / "config.yaml"
        text = config.read_text().replace("drain_time: 30s", "drain_time: 2m").replace("ttl: 1h", "ttl: 2h")
        config.write_text(text)
        assert relay.json("config", "reload")["problems"] == []
        for command in (("relay", "config", "validate"), ("config", "validate")):
            assert relay.json(*command)["after_restart"] == ["relay_service.drain_time"]
        for command in (("relay", "config", "validate"), ("config", "validate"), ("relay", "info")):
            assert "relay_service.drain_time: changed since the node was started" in relay.run(*command).stderr
    finally:
        relay.stop()
    assert relay.json("config", "validate")["after_restart"] is None


def test_a_node_says_that_it_is_no_relay(tmp_path):
    node = Hidden(tmp_path / "node")
    assert "is not a relay" in node.run("relay", "serve", status=1).stderr
