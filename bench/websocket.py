"""What WebSocket and TLS cost below a tunnel, beside plain TCP in the same run.

    python -m bench.websocket [--rounds N] [--quick]

Two complete nodes for each transport, in turns. `up` is from the dialling node to the other: what a WebSocket client
sends is masked (RFC 6455, section 5.3), what it receives is not. Nothing else should run on the machine.
Prints medians.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from bench.load import Load
from bench.references import Tunnel
from bench.tunnels import FULL, QUICK, Scale, bulk, new_connection, round_trip
from demo.node import Node
from tests.support.certificates import Authority

TRANSPORTS = {"tcp": "", "websocket": "/ws", "wss": "/tls/ws"}
GROUPS = (bulk(1, "up"), bulk(1, "down"))


@contextlib.contextmanager
def tunnel(transport: str, target: int) -> Iterator[Tunnel]:
    """Two nodes that are connected over this transport: one exposes the server, the other has a proxy to it."""
    with tempfile.TemporaryDirectory(prefix="peerup-bench-") as directory:
        authority = Authority(Path(directory))
        near, far = Node("near", Path(directory)), Node("far", Path(directory))
        far.address += TRANSPORTS[transport]
        for node in (near, far):
            node.initialise()
        (far.home / "tls").mkdir()
        certificate, key = authority.issue("127.0.0.1")
        certificate.rename(far.home / "tls" / "fullchain.pem")
        key.rename(far.home / "tls" / "privkey.pem")
        config = near.home / "config.yaml"
        config.write_text(config.read_text().replace("  # tls:\n", f"  tls:\n    trusted_file: {authority.file}\n"))
        for node, other in ((near, far), (far, near)):
            node.run("auth", "add", other.peer_id)
        near.run("names", "add", far.name, far.peer_id, "--address", far.address)
        far.run("service", "add", "load", f"127.0.0.1:{target}")
        started = time.monotonic()
        try:
            far.start()
            near.start()
            listen = near.run_json("proxy", far.name, "load", "0")["listen"]
            yield Tunnel(transport, int(listen.rpartition(":")[2]), (near.daemon_pid, far.daemon_pid), started)
        finally:
            for node in (near, far):
                node.stop()


def measure(load: Load, opened: Tunnel, scale: Scale) -> dict[str, float]:
    values: dict[str, float] = {}
    load.first(opened.port, 30.0)
    for group in GROUPS:
        values |= group.run(load, opened, scale)
    return values | round_trip(load, opened, scale) | new_connection(load, opened, scale)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    load = Load()
    found: dict[str, dict[str, list[float]]] = {}
    for _ in range(options.rounds):
        for transport in TRANSPORTS:
            with load.server() as server, tunnel(transport, server.port) as opened:
                for name, value in measure(load, opened, QUICK if options.quick else FULL).items():
                    found.setdefault(name, {}).setdefault(transport, []).append(value)
    print(f"{'':24}" + "".join(f"{transport:>12}" for transport in TRANSPORTS))
    for name, by_transport in found.items():
        print(f"{name:24}" + "".join(f"{statistics.median(values):12.2f}" for values in by_transport.values()))


if __name__ == "__main__":
    main()
