"""`peerup status` on a real node in an outage: it fails, and names the cause."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from protocol.keys import PrivateKey
from tests.support.nodes import Node
from tests.support.ports import own_port
from tests.support.processes import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

PEER = PrivateKey.from_seed(bytes([1]) * 32).peer_id


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    node = Node("node", tmp_path)
    node.initialise()
    yield node
    node.stop()


def status(node: Node) -> subprocess.CompletedProcess[str]:
    return subprocess.run(node.command("status"), check=False, capture_output=True, text=True, timeout=60)


def problem(node: Node, *words: str) -> bool:
    """Whether `status` fails, and one of its problems has all these words."""
    done = status(node)
    found = [line for line in done.stdout.splitlines() if line.startswith("problem")]
    return done.returncode == 1 and any(all(word in line for word in words) for line in found)


def test_a_relay_that_is_not_there(node: Node) -> None:
    node.run("relay", "add", f"/ip4/127.0.0.1/tcp/{own_port()}/p2p/{PEER}")
    node.start()
    wait_until(lambda: problem(node, "reservation", "refused"), what="the missing reservation", within=30)


def test_a_proxy_that_cannot_listen_after_a_restart(node: Node, tmp_path: Path) -> None:
    node.start()
    port = own_port()
    node.run("names", "add", "home", str(PEER))
    node.run("proxy", "home", "ssh", str(port))
    assert status(node).returncode == 0, status(node).stdout
    node.stop()
    again = Node("node", tmp_path)
    with socket.create_server(("127.0.0.1", port)):
        again.start()
        try:
            wait_until(lambda: problem(again, "proxy/home/ssh"), what="the proxy that does not listen", within=30)
        finally:
            again.stop()


def test_a_relay_that_held_a_reservation_and_goes_silent(tmp_path: Path) -> None:
    """Its sockets stay open and its kernel acknowledges all, so nothing but silence tells of the outage."""
    with contextlib.ExitStack() as stack:
        relay, node = Node("relay", tmp_path), Node("node", tmp_path)
        for each in (relay, node):
            each.initialise()
        with (relay.home / "config.yaml").open("a") as config:
            config.write("\nrelay_service:\n  enabled: true\n")
        relay.run("auth", "add", node.peer_id)
        node.run("relay", "add", f"{relay.address}/p2p/{relay.peer_id}")
        for each in (relay, node):
            stack.callback(each.stop)
            each.start()
        wait_until(lambda: status(node).returncode == 0, what="the reservation", within=30)
        processes = relay.process_ids()
        with stopped(processes):
            # Whoever looks at it meanwhile, which sends something that is acknowledged, does not make it seem alive.
            wait_until(
                lambda: node.run("paths") and problem(node, "reservation"), what="the missing reservation", within=60
            )
            (row,) = node.run_json("relay", "list")
            assert row["state"] not in ("held", "renewing")
        wait_until(lambda: status(node).returncode == 0, what="the reservation, again", within=60)


@contextlib.contextmanager
def stopped(processes: Iterable[int]) -> Iterator[None]:
    """They do not run meanwhile."""
    processes = list(processes)
    try:
        for pid in processes:
            os.kill(pid, signal.SIGSTOP)
        yield
    finally:
        for pid in processes:
            os.kill(pid, signal.SIGCONT)
