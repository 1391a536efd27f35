"""Whoever crowds the control socket of a real node, its owner's commands get an answer."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from protocol.keys import PrivateKey
from tests.support.nodes import Node
from tests.support.ports import own_port
from tests.support.processes import descriptors, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

PEER = str(PrivateKey.from_seed(bytes(32)).peer_id)
CROWD = 150
"""More than twice as many as the node answers at once."""

PATIENCE = 15.0
"""Seconds that a command may take beside the crowd; it takes one on an idle machine."""


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with contextlib.ExitStack() as stack:
        deaf = stack.enter_context(socket.create_server(("127.0.0.1", own_port()), backlog=1024))
        node = Node("node", tmp_path)
        node.initialise()
        port = deaf.getsockname()[1]
        node.run("names", "add", "deaf", PEER, "--address", f"/ip4/127.0.0.1/tcp/{port}")
        stack.callback(node.stop)
        node.start()
        yield node


def connected(node: Node, stack: contextlib.ExitStack, says: bytes) -> socket.socket:
    client = stack.enter_context(socket.socket(socket.AF_UNIX))
    client.settimeout(PATIENCE)
    client.connect(str(node.home / "run" / "control.sock"))
    with contextlib.suppress(BrokenPipeError):  # it may have been closed in favour of a later one
        client.sendall(says)
    return client


def command(node: Node, *arguments: str) -> float:
    """Run a command that must succeed; how many seconds it took."""
    began = time.monotonic()
    done = subprocess.run(node.command(*arguments), check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, (arguments, done.stdout, done.stderr)
    return time.monotonic() - began


STATUS = b"GET /v1/status HTTP/1.1\r\nHost: x\r\n\r\n"
STDIO = (
    b"GET /v1/stdio?peer=deaf&service=ssh HTTP/1.1\r\nHost: x\r\n"
    b"Connection: upgrade\r\nUpgrade: peerup-descriptor\r\n\r\n"
)


@pytest.mark.parametrize(
    "says",
    [b"", STATUS[:20], b"POST /v1/resolve HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{", STATUS * 40, STDIO],
    ids=["idle", "slow-head", "slow-body", "no-reader", "waiting-stdio"],
)
def test_the_owner_gets_an_answer_beside_a_crowd(node: Node, says: bytes) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(CROWD):
            connected(node, stack, says)
        for arguments in (("status", "--json"), ("config", "reload"), ("auth", "add", PEER), ("stop",)):
            assert command(node, *arguments) < PATIENCE


def test_many_wait_and_each_that_leaves_makes_room(node: Node) -> None:
    api = next(actor["pid"] for actor in node.actors() if actor["name"] == "api")
    before = len(descriptors(api))
    for _ in range(3):
        with contextlib.ExitStack() as stack:
            for _ in range(CROWD):
                connected(node, stack, STDIO)
            extra: Callable[[], bool] = lambda: len(descriptors(api)) > before + CROWD  # noqa: E731
            wait_until(extra, within=PATIENCE, what="the crowd is served")
        wait_until(lambda: len(descriptors(api)) <= before + 5, within=PATIENCE, what="what they had is free again")
    assert command(node, "status", "--json") < PATIENCE
