"""peerup as a tunnel to be measured: two complete nodes on loopback, set up by the commands a person would use."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from bench.references import Tunnel
from demo.node import DemoError, Node
from demo.relayed import Relay
from tests.support.processes import wait_until

SERVICE = "load"

RESERVED_WITHIN = 30.0
"""Seconds for a node to get a place at a relay; it takes a fraction of one."""


@dataclasses.dataclass(frozen=True)
class NodePair(Tunnel):
    """A tunnel through two nodes, or a node alone.

    Attributes:
        ready: seconds from starting a node until it said `ready`, for each.
    """

    ready: tuple[float, float] = (0.0, 0.0)


@contextlib.contextmanager
def peerup(target: int) -> Iterator[NodePair]:
    """Two nodes that know and authorise each other: one exposes the server, the other has a proxy to it.

    Making keys and configuration is not part of a start, so the clock begins with the first daemon.
    """
    with tempfile.TemporaryDirectory(prefix="peerup-bench-") as directory:
        near, far = Node("near", Path(directory)), Node("far", Path(directory))
        for node in (near, far):
            node.initialise()
        for node, other in ((near, far), (far, near)):
            node.run("auth", "add", other.peer_id, "--comment", other.name)
        near.run("names", "add", far.name, far.peer_id, "--address", far.address)
        far.run("service", "add", SERVICE, f"127.0.0.1:{target}")
        started = time.monotonic()
        try:
            ready = _start(far), _start(near)
            listen = near.run_json("proxy", far.name, SERVICE, "0")["listen"]
            yield NodePair(
                name="peerup",
                port=int(listen.rpartition(":")[2]),
                roots=(near.daemon_pid, far.daemon_pid),
                started=started,
                ready=ready,
            )
        finally:
            for node in (near, far):
                node.stop()


def _start(node: Node) -> float:
    """Start it; where that fails, tell what it said, since its directory will be gone.

    Raises:
        DemoError: it did not get ready.
    """
    try:
        return node.start()
    except DemoError as error:
        said = node.home.with_suffix(".log").read_text(errors="replace").strip().splitlines()[-10:]
        raise DemoError("\n".join([str(error), *said])) from error


@contextlib.contextmanager
def lone_node() -> Iterator[NodePair]:
    """One node with nothing to do: what it costs to have it."""
    with tempfile.TemporaryDirectory(prefix="peerup-bench-") as directory:
        node = Node("lone", Path(directory))
        node.initialise()
        started = time.monotonic()
        try:
            ready = _start(node)
            yield NodePair("peerup node", 0, (node.daemon_pid,), started, (ready, ready))
        finally:
            node.stop()


@contextlib.contextmanager
def reachable_node() -> Iterator[NodePair]:
    """One node as a person leaves it behind NAT: it exposes a service and keeps a place at a relay, idle otherwise."""
    with tempfile.TemporaryDirectory(prefix="peerup-bench-") as directory:
        relay, node = Relay("relay", Path(directory)), Node("reachable", Path(directory))
        relay.initialise()
        node.initialise()
        relay.run("relay", "authorize", node.peer_id)
        node.run("relay", "add", f"{relay.address}/p2p/{relay.peer_id}")
        node.run("service", "add", SERVICE, "127.0.0.1:22")
        try:
            _start(relay)
            started = time.monotonic()
            ready = _start(node)
            # The relay is asked, so that the node itself has nothing to answer.
            wait_until(
                lambda: relay.run_json("relay", "list-peers")[0]["reserved"],
                within=RESERVED_WITHIN,
                what="the node has a place at the relay",
                every=0.5,
            )
            yield NodePair("peerup node at a relay", 0, (node.daemon_pid,), started, (ready, ready))
        finally:
            node.stop()
            relay.stop()
