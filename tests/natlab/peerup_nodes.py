"""peerup in the laboratory: nodes and relays as processes in its hosts, services, and people who use them.

The laboratory itself knows nothing of peerup; this does. Control sockets are files, so the test talks to a node in any
host from where it is.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from peerup.client import Client, ClientError
from tests.natlab.lab import Host
from tests.natlab.network import Node as Machine
from tests.support.nodes import run_here

READY = 60.0
"""Seconds for a daemon to be up on a busy machine."""

ORDERLY = 3.0
"""Seconds for a daemon to stop in good order. It may want half a minute for a peer that a lost network has cut off."""

STOP = 40.0
"""Seconds for a daemon to stop on a busy machine, where it takes one alone; one that hangs fails its test."""

PATIENCE = 60.0

CHECKOUT = Path(__file__).parents[2]
"""Whose nodes run; a measurement may name another checkout to compare with."""


def wait_for(condition: Callable[[], Any], what: str, within: float = PATIENCE) -> Any:
    """The first true value of the condition; what it raises of `ClientError` and `OSError` counts as false."""
    deadline = time.monotonic() + within
    problem: Exception | None = None
    pause = 0.01
    while True:
        try:
            value = condition()
        except (ClientError, OSError) as error:
            value, problem = None, error
        if value:
            return value
        assert time.monotonic() < deadline, f"{what}: not within {within} s ({problem})"
        threading.Event().wait(pause)
        pause = min(pause * 1.1, 0.05)  # a node that is asked all the time has less time for what is waited for


class Peerup:
    """One node in one host of the laboratory. It may also be a relay."""

    def __init__(self, host: Machine, home: Path, *, port: int = 4001, transport: str = "") -> None:
        """`transport` is what stands behind the port in the address that others dial, such as `/ws`."""
        self.host = host
        self.port = port
        self.transport = transport
        self.home = home
        self.log = home.with_suffix(".log")
        self.daemon: subprocess.Popen[bytes] | None = None
        self("init", "--yes", "--listen", f"/ip4/0.0.0.0/tcp/{port}{transport}")
        self.peer_id = self("whoami").strip()
        self.client = Client(home / "run" / "control.sock", timeout=60)

    def __call__(self, *arguments: str, status: int = 0) -> str:
        """What a command prints. It is run outside of the host: it only touches files and the control socket.

        While the node does not run, commands are run in this process, if it is of this checkout.
        """
        if self.daemon is None and not status and Path(__file__).parents[2] == CHECKOUT:
            return run_here(self.home, *arguments)
        done = subprocess.run(
            self.command(*arguments), capture_output=True, text=True, timeout=90, check=False, env=_environment()
        )
        assert done.returncode == status, f"{arguments} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
        return done.stdout if status == 0 else done.stderr

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "peerup", "--home", str(self.home), *arguments]

    def json(self, *arguments: str) -> Any:
        return json.loads(self(*arguments, "--json"))

    def serve_as_relay(self, *, limits: str = "  drain_time: 2s\n") -> None:
        """Be a relay from the next start on, which soon gives circuits up whose ends have gone away."""
        with (self.home / "config.yaml").open("a") as config:
            config.write(f"relay_service:\n  enabled: true\n{limits}")

    def start(self) -> None:
        self.begin_start()
        self.wait_ready()

    def begin_start(self) -> None:
        """Start it, and do not wait until it is up."""
        with self.log.open("ab") as log, self.host.enter():
            self.daemon = subprocess.Popen(
                self.command("daemon"), stdout=subprocess.DEVNULL, stderr=log, env=_environment(), cwd=self.home
            )

    def wait_ready(self) -> None:
        """Return when it answers."""
        daemon = self.daemon
        assert daemon is not None

        def answers() -> bool:
            assert daemon.poll() is None, f"the node in {self.host.name} has ended with status {daemon.returncode}"
            return bool(self.client.get("/v1/status")["peer_id"])

        wait_for(answers, f"the node in {self.host.name}", READY)

    def begin_stop(self) -> None:
        """Tell it to stop, and do not wait until it has."""
        if self.daemon is not None:
            self.daemon.terminate()

    def stop(self) -> None:
        """Stop it; it must do so by itself."""
        self.begin_stop()
        daemon, self.daemon = self.daemon, None
        if daemon is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(ORDERLY)
            daemon.terminate()  # the second time it means at once
            try:
                daemon.wait(STOP)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
                raise AssertionError(f"the node in {self.host.name} did not stop within {STOP:g} s") from None

    def kill(self) -> None:
        """All its processes at once, as when the power fails."""
        daemon, self.daemon = self.daemon, None
        assert daemon is not None
        pids = [child["pid"] for child in self.client.get("/v1/actors") if child["pid"]]
        # The main process first: it would begin to heal. The others end with their parents, and are killed in any case.
        for pid in [daemon.pid, *pids]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        daemon.wait(STOP)

    # ---- what it says

    @property
    def reservations(self) -> list[dict[str, Any]]:
        """The relays that it uses, and how the reservations are."""
        return list(self.client.get("/v1/relays"))

    def held(self) -> int:
        """At how many relays it has a reservation."""
        return sum(relay["state"] in ("held", "renewing") for relay in self.reservations)

    @property
    def dialing(self) -> list[str]:
        """The peers that it is dialling."""
        return list(self.client.get("/v1/actors/switchboard")["description"]["dialing"])

    def actor_pid(self, name: str) -> int | None:
        """The process of this actor; None where it does not run."""
        found = [child for child in self.client.get("/v1/actors") if child["name"] == name]
        return found[0]["pid"] if found and found[0]["state"] == "running" else None

    def path_to(self, peer: Peerup) -> dict[str, Any] | None:
        """The connection to this peer; None without one."""
        found = [path for path in self.client.get("/v1/paths") if path["peer_id"] == peer.peer_id]
        return found[0] if found else None

    def proxy(self, peer: str, service: str) -> tuple[str, int]:
        """Where the new proxy listens, in the host."""
        added = self.client.post("/v1/proxies", {"peer": peer, "service": service, "listen": "127.0.0.1:0"})
        host, _, port = added["listen"].rpartition(":")
        return host, int(port)

    def connect(self, address: tuple[str, int], timeout: float = 30.0) -> socket.socket:
        """A TCP connection from within the host."""
        sock = self.host.socket(socket.SOCK_STREAM)
        sock.settimeout(timeout)
        try:
            sock.connect(address)
        except BaseException:
            sock.close()
            raise
        return sock


class Echo:
    """A TCP service in a host: greets, then sends back what it gets."""

    GREETING = b"hello\n"

    def __init__(self, host: Machine) -> None:
        self._listener = host.socket(socket.SOCK_STREAM)
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen(16)
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True, name=f"echo in {host.name}").start()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(sock,), daemon=True, name="echo").start()

    def _serve(self, sock: socket.socket) -> None:
        with sock, contextlib.suppress(OSError):
            sock.sendall(self.GREETING)
            while data := sock.recv(65536):
                sock.sendall(data)


class Pair:
    """Two nodes that may use each other and the relays, which are the only way between them unless said otherwise.

    `home` offers the service `echo`, `laptop` knows it as `home`, at its relays.
    """

    def __init__(self, laptop: Peerup, home: Peerup, relays: list[Peerup]) -> None:
        self.laptop, self.home, self.relays = laptop, home, relays
        self.echo = Echo(home.host)
        home("service", "add", "echo", self.echo.address)
        for one, other in ((laptop, home), (home, laptop)):
            one("auth", "add", other.peer_id)
        for relay in relays:
            for node in (laptop, home):
                relay("auth", "add", node.peer_id)
        home("relay", "add", *map(relay_address, relays))
        circuits = [f"{relay_address(relay)}/p2p-circuit/p2p/{home.peer_id}" for relay in relays]
        laptop("names", "add", "home", home.peer_id, *(word for each in circuits for word in ("--address", each)))

    @property
    def nodes(self) -> list[Peerup]:
        return [*self.relays, self.home, self.laptop]

    def start(self) -> None:
        for nodes in (self.relays, [self.home, self.laptop]):
            for node in nodes:
                node.begin_start()
            for node in nodes:
                node.wait_ready()
        wait_for(lambda: self.home.held() == len(self.relays), "reservations at all relays")

    def greeting(self, address: tuple[str, int], timeout: float = 30.0) -> bool:
        """Whether a new tunnelled connection gets the service's first byte."""
        with contextlib.suppress(OSError), self.laptop.connect(address, timeout) as sock:
            return sock.recv(100) == Echo.GREETING
        return False

    def close(self) -> None:
        self.echo.close()
        # The relays last: they would wait for circuits that are open.
        with contextlib.ExitStack() as stack:
            for nodes in (self.relays, [self.home, self.laptop]):
                for node in nodes:
                    stack.callback(node.stop)
                for node in nodes:
                    stack.callback(node.begin_stop)


def relay_address(relay: Peerup) -> str:
    """Where a relay is, in the core."""
    return f"/ip4/{relay.host.address}/tcp/{relay.port}{relay.transport}/p2p/{relay.peer_id}"


@contextlib.contextmanager
def running(pair: Pair) -> Iterator[Pair]:
    """The pair, up; stopped in the end."""
    try:
        pair.start()
        yield pair
    except BaseException:
        for node in pair.nodes:
            sys.stderr.write(f"---- {node.host.name}\n{node.log.read_text() if node.log.exists() else ''}\n")
        raise
    finally:
        pair.close()


def echoes(sock: socket.socket, content: bytes) -> bool:
    """Whether all of this comes back."""
    sender = threading.Thread(target=_send, args=(sock, content), daemon=True)
    sender.start()
    got = bytearray()
    while len(got) < len(content):
        data = sock.recv(65536)
        if not data:
            break
        got += data
    sender.join(10)
    return bytes(got) == content


def _send(sock: socket.socket, content: bytes) -> None:
    with contextlib.suppress(OSError):
        sock.sendall(content)


def _environment() -> dict[str, str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PEERUP")}
    environment["PYTHONPATH"] = str(CHECKOUT)
    return environment


__all__ = ["Echo", "Host", "Pair", "Peerup", "echoes", "relay_address", "running", "wait_for"]
