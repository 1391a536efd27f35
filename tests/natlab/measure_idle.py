"""What an idle node sends and receives: packets a minute with one relay and one idle peer behind it.

    python -m tests.natlab.measure_idle [--seconds 120] [--checkout DIRECTORY]

A laptop is connected to one relay and, through it, to one peer; an open stream to the peer says nothing. What passes
the laptop's interface is counted, and what passes the peer's, which keeps a reservation. `--checkout` runs the nodes of
another checkout of this repository.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import time
from pathlib import Path

from tests.natlab import peerup_nodes
from tests.natlab.behaviour import PORT_RESTRICTED, SYMMETRIC
from tests.natlab.lab import Lab
from tests.natlab.network import Node
from tests.natlab.peerup_nodes import Echo, Pair, Peerup, running, wait_for

SETTLED = 20.0
"""Seconds until what a new connection says of itself has been said."""


def packets(host: Node) -> int:
    """Packets, both ways, over all interfaces of a host but the loopback."""
    found = 0
    for line in host.run("cat", "/proc/net/dev").splitlines()[2:]:
        name, _, counts = line.partition(":")
        if name.strip() != "lo":
            fields = counts.split()
            found += int(fields[1]) + int(fields[9])
    return found


def measure(seconds: float, directory: Path) -> dict[str, float]:
    """Packets a minute, by host."""
    with Lab() as lab, contextlib.ExitStack() as stack:
        relay = Peerup(lab.host("relay", link=lab.link(delay=0.02)), directory / "relay")
        relay.serve_as_relay()
        nodes = [
            Peerup(lab.host(name, behind=lab.nat(f"{name}-nat", kind)), directory / name)
            for name, kind in (("laptop", PORT_RESTRICTED), ("home", SYMMETRIC))
        ]
        pair = stack.enter_context(running(Pair(nodes[0], nodes[1], [relay])))
        address = pair.laptop.proxy("home", "echo")
        wait_for(lambda: pair.greeting(address, 5), "a first connection", 60)
        sock = stack.enter_context(pair.laptop.connect(address))
        assert sock.recv(100) == Echo.GREETING
        time.sleep(SETTLED)
        before = {node.host.name: packets(node.host) for node in nodes}
        time.sleep(seconds)
        found = {node.host.name: (packets(node.host) - before[node.host.name]) * 60 / seconds for node in nodes}
        sock.sendall(b"still there")
        assert sock.recv(100) == b"still there"
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--checkout", type=Path, default=None, help="run the nodes of this checkout")
    options = parser.parse_args()
    if options.checkout is not None:
        peerup_nodes.CHECKOUT = options.checkout.resolve()
    with tempfile.TemporaryDirectory(prefix="idle") as directory:
        for name, rate in measure(options.seconds, Path(directory)).items():
            print(f"{name}: {rate:.0f} packets a minute")


if __name__ == "__main__":
    main()
