"""`peerup status` on a real node in an outage: it fails, and names the cause."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator
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
