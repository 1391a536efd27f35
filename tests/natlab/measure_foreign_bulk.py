"""What a round trip to another implementation takes while it sends bulk to a peerup over a slow line.

    python -m tests.natlab.measure_foreign_bulk [--sender go] [--cell 10M] [--control bbr] [--checkout DIRECTORY]

A foreign peer behind a bottleneck (one of those of `measure_keyboard`) uploads without end to a service of a
peerup node, which meanwhile pings it over the same connection: the answer waits behind what the sender has queued, as
the echo of a keystroke would. The reference is an echo over a plain TCP connection beside the same upload over another
one. `--sender peerup` has a peerup send, for comparison. Needs root and the built peers of `tests/interop`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import socket
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from tests.interop import toolchains
from tests.natlab import peerup_nodes
from tests.natlab.lab import Host, Lab
from tests.natlab.measure_keyboard import NETWORKS, Bulk, Cell, Network, Service, measure
from tests.natlab.peerup_nodes import Peerup, wait_for

REFERENCE: Final = "two TCPs"
SENDERS: Final = (REFERENCE, "peerup", *toolchains.BUILDERS)
WARM_UP: Final = 5.0
"""Seconds of bulk before anything counts: the time in which queues fill."""
ENDLESS: Final = 10**11


@dataclasses.dataclass
class Row:
    """One measurement. Times in milliseconds, rate in Mbit/s."""

    sender: str
    p50: float
    p95: float
    bulk: float


class Foreign:
    """A foreign peer of `tests/interop` in a host; see the README there for the commands."""

    def __init__(self, host: Host, command: list[str]) -> None:
        self.process = host.popen(*command, "--no-listen", stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._number = 0
        ready = self._read()
        self.peer_id: str = ready["peer"]

    def begin(self, do: str, **arguments: Any) -> int:
        """Give a command."""
        self._number += 1
        self.process.stdin.write(json.dumps({"id": self._number, "do": do, **arguments}) + "\n")
        self.process.stdin.flush()
        return self._number

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Give a command and wait until it is carried out."""
        number = self.begin(do, **arguments)
        while (answer := self._read()).get("id") != number:
            pass
        assert answer["ok"], answer
        return answer

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()

    def _read(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        assert line, "the foreign peer has ended"
        told: dict[str, Any] = json.loads(line)
        return told


def use(hosts: Sequence[Host], control: str) -> None:
    """Have all connections that begin from now on use this congestion control."""
    for host in hosts:
        route = host.run("ip", "-4", "route", "show", "default").partition(" congctl")[0].strip()
        host.run("ip", "-4", "route", "change", *route.split(), "congctl", control)


@contextlib.contextmanager
def _world(line: Network, control: str) -> Iterator[tuple[Host, Host, Service]]:
    with Lab() as lab, contextlib.ExitStack() as stack:
        sender = lab.host("sender", link=lab.link(rate=line.rate, delay=line.delay, loss=line.loss, queue=line.queue))
        server = lab.host("server")
        use((sender, server), control)
        service = Service(server)
        stack.callback(service.close)
        yield sender, server, service


def _connect(host: Host, address: str, port: int) -> socket.socket:
    sock = host.socket(socket.SOCK_STREAM)
    sock.settimeout(30)
    sock.connect((address, port))
    return sock


def _pings(node: Peerup, peer: str, service: Service, seconds: float) -> tuple[list[float], float]:
    """Round trips in milliseconds, each of which waits for the one before, and the bulk rate meanwhile."""
    began, carried = time.monotonic(), service.taken
    times: list[float] = []
    lines = node.client.lines(f"/v1/peers/{peer}/ping", count=0, interval=0.05, timeout=20.0)
    with contextlib.closing(lines):
        for line in lines:
            times.append(line["rtt_ms"] if line["rtt_ms"] is not None else 20_000.0)
            if time.monotonic() > began + seconds:
                break
    return sorted(times), (service.taken - carried) * 8 / (time.monotonic() - began) / 1e6


def run(name: str, line: Network, control: str, seconds: float, directory: Path) -> Row:
    """One row."""
    pause = threading.Event()
    with _world(line, control) as (sender, server, service), contextlib.ExitStack() as stack:
        if name == REFERENCE:
            # typed at the server and echoed in the sender's host: the echo goes the way of the upload
            echo, sink = Service(sender, sender.address), Service(server, server.address)
            for each in (echo, sink):
                stack.callback(each.close)
            cell = Cell("", control, "up", name)
            measure(
                cell,
                lambda: _connect(server, sender.address, echo.port),
                lambda: _connect(sender, server.address, sink.port),
                sink,
                seconds,
            )
            return Row(name, cell.p50, cell.p95, cell.bulk)
        node = Peerup(server, directory / "server")
        node("service", "add", "load", f"127.0.0.1:{service.port}")
        address = f"/ip4/{server.address}/tcp/{node.port}/p2p/{node.peer_id}"
        if name == "peerup":
            other = Peerup(sender, directory / "sender")
            other("auth", "add", node.peer_id)
            node("auth", "add", other.peer_id)
            other("names", "add", "server", node.peer_id, "--address", address.partition("/p2p/")[0])
            for each in (node, other):
                each.start()
                stack.callback(each.stop)
            bulk = Bulk(other.connect(other.proxy("server", "load")), "up", service)
            stack.callback(bulk.close)
            peer = other.peer_id
        else:
            foreign = Foreign(sender, toolchains.BUILDERS[name]())
            stack.callback(foreign.close)
            node("auth", "add", foreign.peer_id)
            node.start()
            stack.callback(node.stop)
            peer = foreign.peer_id
            foreign.ask("dial", address=address)
            foreign.begin(
                "exchange", peer=node.peer_id, protocol="/peerup/load/1.0.0", text="u", send=ENDLESS, timeout=600
            )
        wait_for(lambda: service.taken, "the upload")
        pause.wait(WARM_UP)
        times, carried = _pings(node, peer, service, seconds)
        return Row(name, statistics.median(times), times[int(0.95 * (len(times) - 1))], carried)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sender", action="append", choices=SENDERS, help="repeatable; default: all")
    parser.add_argument("--cell", choices=NETWORKS, default="10M", help="the sender's line, as of measure_keyboard")
    parser.add_argument("--control", default="bbr", help="TCP congestion control")
    parser.add_argument("--seconds", type=float, default=10.0, help="that each sender is measured for")
    parser.add_argument("--checkout", type=Path, help="run the nodes of this checkout")
    options = parser.parse_args()
    if options.checkout is not None:
        peerup_nodes.CHECKOUT = options.checkout.resolve()
    print("| sender | p50 ms | p95 ms | bulk Mbit/s |\n| --- | --- | --- | --- |", flush=True)
    for name in options.sender or SENDERS:
        with tempfile.TemporaryDirectory(prefix="foreign-") as directory:
            row = run(name, NETWORKS[options.cell], options.control, options.seconds, Path(directory))
        print(f"| {row.sender} | {row.p50:.0f} | {row.p95:.0f} | {row.bulk:.2f} |", flush=True)


if __name__ == "__main__":
    main()
