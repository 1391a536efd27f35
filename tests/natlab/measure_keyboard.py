"""What a keystroke costs while bulk uses the same path: peerup beside `ssh -L`, in the laboratory.

    python -m tests.natlab.measure_keyboard                        the table of docs/performance.md; needs root
    python -m tests.natlab.measure_keyboard --cell 10M --way relayed --control bbr --seconds 20
    python -m tests.natlab.measure_keyboard --checkout ../old      the nodes run from another checkout
    python -m tests.natlab.measure_keyboard --json keyboard.json

A keyboard sends 16 bytes every 40 ms to an echo service, whether or not the earlier ones have come back, while a bulk
transfer runs without end. What is reported is the time from each keystroke to its echo, and the bulk rate meanwhile.
All ways share one bottleneck: the access link of the machine that has the services.

    ssh one        echo and bulk through one `ssh -L`
    ssh two        echo through one `ssh -L`, bulk through another: the reference
    direct         both through one peerup connection
    relayed        both through one circuit; the relay is on the fast side of the bottleneck
    other peer     echo through one circuit, bulk of a different peer through another; same relay, same service
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import getpass
import itertools
import json
import os
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

from tests.natlab import peerup_nodes
from tests.natlab.lab import Host, Lab
from tests.natlab.network import Node as Machine
from tests.natlab.peerup_nodes import Peerup, relay_address, wait_for
from tests.natlab.wires import Link

WAYS: Final = ("ssh one", "ssh two", "direct", "relayed", "other peer")
REFERENCE: Final = "ssh two"
CONTROLS: Final = ("bbr", "cubic", "reno")
DIRECTIONS: Final = ("down", "up")
INTERVAL: Final = 0.04
"""Seconds between keystrokes."""
WARM_UP: Final = 5.0
"""Seconds of bulk before anything counts: the time in which queues fill."""
STROKE: Final = struct.Struct("!Qd")
SSH_PORT: Final = 2222


@dataclasses.dataclass(frozen=True)
class Network:
    """A bottleneck: bits per second, seconds one way, share of packets lost, and the queue before it in bytes."""

    rate: float
    delay: float
    loss: float = 0.0
    queue: int = 256 * 1024


NETWORKS: Final = {
    "10M": Network(10e6, 0.02),
    "10M-1MiB": Network(10e6, 0.02, queue=1024 * 1024),
    "4M": Network(4e6, 0.02),
    "1M": Network(1e6, 0.02),
    "150ms-1%": Network(10e6, 0.075, loss=0.01),
}
DEFAULT_NETWORKS: Final = ("10M", "1M", "150ms-1%")


@dataclasses.dataclass
class Cell:
    """One measurement. Times in milliseconds, rate in Mbit/s."""

    network: str
    control: str
    direction: str
    way: str
    p50: float = 0.0
    p95: float = 0.0
    p99: float = 0.0
    strokes: int = 0
    unanswered: int = 0
    bulk: float = 0.0
    failure: str = ""


class Service:
    """In a host: what a connection's first byte asks for: `e` echoes, `d` sends without end, `u` reads without end."""

    def __init__(self, host: Machine, address: str = "127.0.0.1") -> None:
        self.taken = 0  # bytes that were read for `u`
        self._listener = host.socket(socket.SOCK_STREAM)
        self._listener.bind((address, 0))
        self._listener.listen(64)
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

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
            threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        block = bytes(65536)
        with sock, contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            kind = sock.recv(1)
            while kind == b"d":
                sock.sendall(block)
            while data := sock.recv(65536):
                if kind == b"e":
                    sock.sendall(data)
                else:
                    self.taken += len(data)


class Bulk:
    """A transfer that runs until it is closed."""

    def __init__(self, sock: socket.socket, direction: str, service: Service) -> None:
        self._sock = sock
        self._service = service
        self._direction = direction
        self._received = 0
        sock.settimeout(None)
        sock.sendall(b"u" if direction == "up" else b"d")
        threading.Thread(target=self._send if direction == "up" else self._receive, daemon=True).start()

    @property
    def carried(self) -> int:
        """Bytes that have arrived."""
        return self._service.taken if self._direction == "up" else self._received

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()

    def _send(self) -> None:
        block = bytes(65536)
        with contextlib.suppress(OSError):
            while True:
                self._sock.sendall(block)

    def _receive(self) -> None:
        room = bytearray(65536)
        with contextlib.suppress(OSError):
            while length := self._sock.recv_into(room):
                self._received += length


class Keyboard:
    """Types steadily on one connection; `times` has the seconds of each echo, by the stroke's number."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._over = threading.Event()
        self.sent = 0
        self.times: dict[int, float] = {}
        sock.settimeout(None)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.sendall(b"e")
        for work in (self._type, self._read):
            threading.Thread(target=work, daemon=True).start()

    def close(self) -> None:
        self._over.set()
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()

    def _type(self) -> None:
        due = time.monotonic()
        with contextlib.suppress(OSError):
            while not self._over.wait(max(0.0, due - time.monotonic())):
                self._sock.sendall(STROKE.pack(self.sent, time.monotonic()))
                self.sent += 1
                due += INTERVAL

    def _read(self) -> None:
        kept = b""
        with contextlib.suppress(OSError):
            while data := self._sock.recv(65536):
                now = time.monotonic()
                kept += data
                while len(kept) >= STROKE.size:
                    number, at = STROKE.unpack_from(kept)
                    kept = kept[STROKE.size :]
                    self.times[number] = now - at


Connect = Callable[[], socket.socket]


def measure(cell: Cell, keyboard: Connect, bulk: Connect, service: Service, seconds: float) -> None:
    """Fill in the cell."""
    with contextlib.ExitStack() as stack:
        typing = Keyboard(keyboard())
        stack.callback(typing.close)
        wait_for(lambda: typing.times, "an echo on a quiet path", 30)
        transfer = Bulk(bulk(), cell.direction, service)
        stack.callback(transfer.close)
        pause = threading.Event()
        pause.wait(WARM_UP)
        first, carried, began = typing.sent, transfer.carried, time.monotonic()
        pause.wait(seconds)
        last, took = typing.sent, time.monotonic() - began
        cell.bulk = (transfer.carried - carried) * 8 / took / 1e6
        # the last ones may still be on their way; what does not come back at all counts as the longest time
        deadline = time.monotonic() + 15
        while last - 1 not in typing.times and time.monotonic() < deadline:
            pause.wait(0.02)
        times = sorted(typing.times.get(number, 15.0) for number in range(first, last))
        cell.strokes = len(times)
        cell.unanswered = sum(number not in typing.times for number in range(first, last))
        cell.p50, cell.p95, cell.p99 = (round(1e3 * _quantile(times, share), 1) for share in (0.5, 0.95, 0.99))


def _quantile(ordered: Sequence[float], share: float) -> float:
    return statistics.quantiles(ordered, n=100, method="inclusive")[round(share * 100) - 1]


class World:
    """One laboratory with everything in it."""

    def __init__(self, lab: Lab, directory: Path, network: Network) -> None:
        self._stack = contextlib.ExitStack()
        self._directory = directory
        # the path through the relay is as long as the direct one: a quarter of it lies between laptop and relay
        quarter = network.delay / 4
        self.relay_host = lab.host("relay", link=lab.link(delay=quarter))
        self.server_link = _bottleneck(lab, network, network.delay)
        self.home_link = _bottleneck(lab, network, network.delay - quarter)
        self.server_host = lab.host("server", link=self.server_link)
        self.home_host = lab.host("home", behind=lab.nat("home-nat", link=self.home_link))
        self.laptop_host = lab.host("laptop", behind=lab.nat("laptop-nat"))
        self.other_host = lab.host("other", behind=lab.nat("other-nat"))
        self.hosts: list[Host] = [
            self.relay_host,
            self.server_host,
            self.home_host,
            self.laptop_host,
            self.other_host,
        ]
        self.services = {host.name: Service(host) for host in (self.server_host, self.home_host)}
        for service in self.services.values():
            self._stack.callback(service.close)
        self._nodes = {host.name: Peerup(host, directory / host.name) for host in self.hosts}
        self._proxies: dict[tuple[str, str], tuple[str, int]] = {}

    def start_nodes(self) -> None:
        """The peerup nodes."""
        relay, server, home, laptop, other = self._nodes.values()
        relay.serve_as_relay()
        for node in (home, laptop, other):
            relay("auth", "add", node.peer_id)
        for node in (server, home):
            node("service", "add", "load", f"127.0.0.1:{self.services[node.host.name].port}")
        for one, other_one in ((laptop, server), (laptop, home), (other, home)):
            one("auth", "add", other_one.peer_id)
            other_one("auth", "add", one.peer_id)
        home("relay", "add", relay_address(relay))
        laptop("names", "add", "server", server.peer_id, "--address", f"/ip4/{server.host.address}/tcp/{server.port}")
        for node in (laptop, other):
            circuit = f"{relay_address(relay)}/p2p-circuit/p2p/{home.peer_id}"
            node("names", "add", "home", home.peer_id, "--address", circuit)
        for node in self._nodes.values():
            self._stack.callback(node.stop)
        for node in self._nodes.values():
            node.start()
        for node in self._nodes.values():
            self._stack.callback(node.begin_stop)
        wait_for(home.held, "a reservation")
        for name, peer in (("laptop", "server"), ("laptop", "home"), ("other", "home")):
            self._proxies[name, peer] = self._nodes[name].proxy(peer, "load")

    def start_ssh(self) -> None:
        """sshd in the server's host."""
        directory = self._directory / "ssh"
        directory.mkdir()
        for key in ("host", "client"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", directory / key], check=True)
        (directory / "authorized_keys").write_text((directory / "client.pub").read_text())
        address = self.server_host.address
        (directory / "known_hosts").write_text(f"[{address}]:{SSH_PORT} {(directory / 'host.pub').read_text()}")
        settings = {
            "Port": SSH_PORT,
            "HostKey": directory / "host",
            "AuthorizedKeysFile": directory / "authorized_keys",
            "StrictModes": "no",
            "UsePAM": "no",
            "PidFile": "none",
            "PermitRootLogin": "prohibit-password",
            "AllowTcpForwarding": "local",
            "LogLevel": "ERROR",
        }
        (directory / "sshd_config").write_text("".join(f"{key} {value}\n" for key, value in settings.items()))
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        self.server_host.popen("/usr/sbin/sshd", "-D", "-f", str(directory / "sshd_config"))

    @contextlib.contextmanager
    def ssh(self, count: int) -> Iterator[list[tuple[str, int]]]:
        """Where so many `ssh -N -L` listen, in the laptop's host."""
        directory, address = self._directory / "ssh", self.server_host.address
        target = self.services["server"].port
        with contextlib.ExitStack() as stack:
            entries = []
            for entry in range(9000, 9000 + count):
                options = [
                    *("-F", "none", "-N", "-a", "-x", "-p", str(SSH_PORT), "-i", f"{directory}/client"),
                    *("-o", "BatchMode=yes", "-o", "ExitOnForwardFailure=yes", "-o", "GlobalKnownHostsFile=none"),
                    *("-o", f"UserKnownHostsFile={directory}/known_hosts", "-o", "ConnectionAttempts=10"),
                    *("-L", f"127.0.0.1:{entry}:127.0.0.1:{target}", f"{getpass.getuser()}@{address}"),
                ]
                process = self.laptop_host.popen("ssh", *options)
                stack.callback(process.wait, 10)
                stack.callback(process.terminate)
                entries.append(("127.0.0.1", entry))
            for entry in entries:
                wait_for(lambda entry=entry: _answers(self._connect("laptop", entry)), "ssh -L", 30)
            yield entries

    def measure(self, cell: Cell, seconds: float) -> None:
        """Fill in the cell; a failure is written into it."""
        try:
            with contextlib.ExitStack() as stack:
                keyboard, bulk, service = self._ways(cell.way, stack)
                measure(cell, keyboard, bulk, self.services[service], seconds)
        except (OSError, AssertionError) as error:
            cell.failure = str(error) or repr(error)

    def _ways(self, way: str, stack: contextlib.ExitStack) -> tuple[Connect, Connect, str]:
        if way.startswith("ssh"):
            entries = stack.enter_context(self.ssh(2 if way == "ssh two" else 1))
            keyboard, bulk = ("laptop", entries[0]), ("laptop", entries[-1])
        else:
            peer = "server" if way == "direct" else "home"
            typist, sender = "laptop", "other" if way == "other peer" else "laptop"
            keyboard, bulk = (typist, self._proxies[typist, peer]), (sender, self._proxies[sender, peer])
        return (
            lambda: self._connect(*keyboard),
            lambda: self._connect(*bulk),
            "home" if way in ("relayed", "other peer") else "server",
        )

    def use(self, control: str) -> None:
        """Have all connections that begin from now on use this congestion control."""
        for host in self.hosts:
            # by route: some kernels do not let a namespace have it as its default
            route = host.run("ip", "-4", "route", "show", "default").partition(" congctl")[0].strip()
            host.run("ip", "-4", "route", "change", *route.split(), "congctl", control)

    def _connect(self, host: str, address: tuple[str, int]) -> socket.socket:
        machine: Host = next(each for each in self.hosts if each.name == host)
        sock = machine.socket(socket.SOCK_STREAM)
        sock.settimeout(30)
        try:
            sock.connect(address)
        except BaseException:
            sock.close()
            raise
        return sock

    def close(self) -> None:
        self._stack.close()


def _answers(sock: socket.socket) -> bool:
    with sock:
        sock.settimeout(3)
        sock.sendall(b"e?")
        return sock.recv(1) == b"?"


def _bottleneck(lab: Lab, network: Network, delay: float) -> Link:
    return lab.link(rate=network.rate, delay=delay, loss=network.loss, queue=network.queue)


def run(options: argparse.Namespace, tell: Callable[[Cell], None]) -> list[Cell]:
    """All the cells that were asked for, in order."""
    cells: list[Cell] = []
    ways = options.way or WAYS
    for name, control in itertools.product(options.cell or DEFAULT_NETWORKS, options.control or CONTROLS):
        with Lab() as lab, tempfile.TemporaryDirectory(prefix="keyboard-") as directory:
            world = World(lab, Path(directory), NETWORKS[name])
            try:
                world.use(control)
                if any(way.startswith("ssh") for way in ways):
                    world.start_ssh()
                if not all(way.startswith("ssh") for way in ways):
                    world.start_nodes()
                for direction, way in itertools.product(options.direction or DIRECTIONS, ways):
                    cell = Cell(name, control, direction, way)
                    world.measure(cell, options.seconds)
                    cells.append(cell)
                    tell(cell)
            finally:
                world.close()
    return cells


def line(cell: Cell, reference: Cell | None) -> str:
    """One row of the table."""
    if cell.failure:
        return f"{cell.network:9} {cell.control:6} {cell.direction:5} {cell.way:11} {cell.failure}"
    ratio = f"{cell.p50 / reference.p50:6.2f}" if reference and reference.p50 else " " * 6
    return (
        f"{cell.network:9} {cell.control:6} {cell.direction:5} {cell.way:11} {cell.p50:8.0f} {cell.p95:8.0f} "
        f"{cell.p99:8.0f} {ratio} {cell.bulk:8.2f}" + (f"  {cell.unanswered} unanswered" if cell.unanswered else "")
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="What a keystroke costs beside bulk.")
    parser.add_argument("--cell", action="append", choices=NETWORKS, help="networks (repeatable)")
    parser.add_argument("--way", action="append", choices=WAYS)
    parser.add_argument("--control", action="append", choices=CONTROLS, help="TCP congestion control")
    parser.add_argument("--direction", action="append", choices=DIRECTIONS, help="of the bulk")
    parser.add_argument("--seconds", type=float, default=10.0, help="that each cell is measured for")
    parser.add_argument("--checkout", type=Path, help="run the nodes from here")
    parser.add_argument("--json", type=Path, help="write the cells there")
    options = parser.parse_args()
    if options.checkout:
        peerup_nodes.CHECKOUT = options.checkout.resolve()
    print("network   contr. bulk  way          p50 ms      p95      p99  ratio   Mbit/s", flush=True)
    references: dict[tuple[str, str, str], Cell] = {}

    def tell(cell: Cell) -> None:
        key = (cell.network, cell.control, cell.direction)
        if cell.way == REFERENCE:
            references[key] = cell
        print(line(cell, references.get(key)), flush=True)

    cells = run(options, tell)
    if options.json:
        options.json.write_text(json.dumps([dataclasses.asdict(cell) for cell in cells], indent=1) + "\n")
    sys.exit(any(cell.failure for cell in cells))


if __name__ == "__main__":
    main()
