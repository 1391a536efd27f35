"""Measurements of a relay: bulk through it beside the direct way, and a crowd of clients on one core.

Two nodes listen on loopback alone and know each other by the relay: what a peer says of its loopback addresses leads
nowhere unless it is connected directly, so they have no other way. A fourth node has been told the direct one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.load import Load, LoadError
from bench.relay_crowd import client_key
from bench.tunnels import PROBE, Scale
from demo.node import Node
from protocol.authorized_keys import AuthorizedKeys
from tests.support.processes import cpu_seconds, pss_bytes, tree

DIRECT = "direct"
"""The reference: the same two nodes without a relay between them."""

SERVICE = "load"
CLIENTS = 500
CIRCUITS = 200
FREE = """
relay_service:
  enabled: true
  drain_time: 1s
  reservations: {per_ip: unlimited, per_network: unlimited, total: unlimited}
  circuits: {per_peer: unlimited, per_ip: unlimited, per_network: unlimited, total: unlimited}
  requests_per_minute: {per_peer: unlimited, per_ip: unlimited, per_network: unlimited, total: unlimited}
"""

Values = dict[str, float]


@dataclasses.dataclass(frozen=True)
class Ways:
    """The ports of a proxy through the relay and of a direct one, and the relay's switchboard."""

    relayed: int
    direct: int
    switchboard: int


def measure(scale: Scale, *, quick: bool) -> tuple[Values, Values]:
    """One pass: our values, and those of the direct way.

    Raises:
        DemoError, LoadError: something failed.
    """
    ours, direct = _bulk(scale)
    return ours | _crowd(seconds=1.0 if quick else 4.0), direct


def _bulk(scale: Scale) -> tuple[Values, Values]:
    load = Load()
    relayed: Values = {}
    direct: Values = {}
    with load.server() as server, _ways(server.port) as ways:
        for port in (ways.relayed, ways.direct):
            load.first(port, 30.0)
        for direction in ("up", "down"):
            probe = load.bulk(ways.relayed, PROBE, direction=direction)
            size = max(PROBE, min(scale.bulk_bytes, int(PROBE / probe.seconds * scale.bulk_seconds)))
            name = f"relayed_bulk_{direction}"
            direct[name] = load.bulk(ways.direct, size, direction=direction).megabytes_per_second
            before = cpu_seconds(ways.switchboard)
            moved = load.bulk(ways.relayed, size, direction=direction)
            relayed[f"relay_cpu_{direction}"] = (cpu_seconds(ways.switchboard) - before) / (moved.bytes / 1e9)
            relayed[name] = moved.megabytes_per_second
        for values, port in ((relayed, ways.relayed), (direct, ways.direct)):
            values["relayed_round_trip_p50"] = load.echo(port, scale.echo_rounds).p50 * 1e6
    return relayed, direct


@contextlib.contextmanager
def _ways(target: int) -> Iterator[Ways]:
    with tempfile.TemporaryDirectory(prefix="peerup-bench-") as directory:
        relay = _relay(Path(directory))
        home, laptop, knowing = (Node(name, Path(directory)) for name in ("home", "laptop", "knowing"))
        for node in (home, laptop, knowing):
            node.initialise()
        for node in (home, laptop):
            relay.run("auth", "add", node.peer_id)
            node.run("auth", "add", relay.peer_id)
            node.run("relay", "add", f"{relay.address}/p2p/{relay.peer_id}")
        for node in (laptop, knowing):
            home.run("auth", "add", node.peer_id)
            node.run("auth", "add", home.peer_id)
        laptop.run("names", "add", "home", home.peer_id)
        knowing.run("names", "add", "home", home.peer_id, "--address", home.address)
        home.run("service", "add", SERVICE, f"127.0.0.1:{target}")
        nodes = (relay, home, laptop, knowing)
        try:
            for node in nodes:
                node.start()
            ports = [
                int(node.run_json("proxy", "home", SERVICE, "0")["listen"].rpartition(":")[2])
                for node in (laptop, knowing)
            ]
            yield Ways(*ports, switchboard=_switchboard(relay))
        finally:
            for node in reversed(nodes):
                node.stop()


def _crowd(*, seconds: float) -> Values:
    """500 reservations and 200 circuits at a relay that has one core."""
    with tempfile.TemporaryDirectory(prefix="peerup-bench-") as directory:
        relay = _relay(Path(directory))
        keys = relay.home / "authorized_keys"
        listed = AuthorizedKeys.parse(keys.read_bytes())
        for number in range(CLIENTS):
            listed = listed.add(client_key(number).peer_id)
        keys.write_bytes(listed.to_bytes())
        try:
            relay.start()
            switchboard = _switchboard(relay)
            _pin(relay.daemon_pid)
            return _with_crowd(relay, switchboard, seconds)
        finally:
            relay.stop()


def _with_crowd(relay: Node, switchboard: int, seconds: float) -> Values:
    arguments = [relay.address, relay.peer_id, str(CLIENTS), str(CIRCUITS), str(seconds)]
    command = [sys.executable, "-m", "bench.relay_crowd", *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as crowd:
        try:
            idle = pss_bytes([switchboard])
            _reached(crowd, "connected")
            _go_on(crowd)
            granted = _reached(crowd, "reserved")["granted"]
            reserved = pss_bytes([switchboard])
            _go_on(crowd)
            opened = _reached(crowd, "opened")["circuits"]
            with_circuits = pss_bytes([switchboard])
            before = cpu_seconds(switchboard)
            _go_on(crowd)
            done = _reached(crowd, "done")
            used = cpu_seconds(switchboard) - before
            _go_on(crowd)
        finally:
            crowd.kill()
    rounds = done["rounds"]
    return {
        "relay_reservation_failures": CLIENTS - granted + done["lost"],
        "relay_reservation_memory": (reserved - idle) / 1024 / CLIENTS,
        "relay_circuit_failures": CIRCUITS - opened + done["broken"],
        "relay_circuit_memory": (with_circuits - reserved) / 1024 / CIRCUITS,
        "relay_circuit_round_trips": sum(rounds) / done["seconds"],
        "relay_circuit_fairness": sum(rounds) ** 2 / (len(rounds) * sum(each**2 for each in rounds)),
        "relay_circuit_worst": done["worst"] * 1e3,
        "relay_circuit_cpu": used / done["seconds"] * 100,
    }


def _relay(directory: Path) -> Node:
    relay = Node("relay", directory)
    relay.initialise()
    with (relay.home / "config.yaml").open("a") as config:
        config.write(FREE)
    return relay


def _switchboard(node: Node) -> int:
    (pid,) = (actor["pid"] for actor in node.actors() if actor["name"] == "switchboard")
    return int(pid)


def _pin(root: int) -> None:
    first = min(os.sched_getaffinity(0))
    for process in tree(root):
        os.sched_setaffinity(process.pid, {first})


def _reached(crowd: subprocess.Popen[str], stage: str) -> dict[str, Any]:
    assert crowd.stdout is not None
    line = crowd.stdout.readline()
    told: dict[str, Any] = json.loads(line) if line else {}
    if told.get("stage") != stage:
        raise LoadError(f"the crowd did not get as far as {stage!r}")
    return told


def _go_on(crowd: subprocess.Popen[str]) -> None:
    assert crowd.stdin is not None
    crowd.stdin.write("\n")
    crowd.stdin.flush()
