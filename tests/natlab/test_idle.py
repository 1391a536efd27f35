"""An idle node is quiet, and yet reachable behind a NAT that forgets connections soon."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import pytest

from tests.natlab.behaviour import PORT_RESTRICTED, SYMMETRIC
from tests.natlab.lab import Lab
from tests.natlab.measure_idle import measure
from tests.natlab.peerup_nodes import Echo, Pair, Peerup, running

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

FORGETS = 30
"""Seconds of silence after which the least patient NATs forget a TCP connection."""


@pytest.mark.usefixtures("natlab")
def test_an_idle_node_sends_and_receives_little(tmp_path: Path) -> None:
    found = measure(60, tmp_path)
    print(f"\npackets a minute: {found}")
    assert max(found.values()) <= 30


def test_a_nat_that_forgets_soon_is_kept_from_it(natlab: Lab, tmp_path: Path) -> None:
    relay = Peerup(natlab.host("relay", link=natlab.link(delay=0.02)), tmp_path / "relay")
    relay.serve_as_relay()
    nats = [
        natlab.nat("laptop-nat", PORT_RESTRICTED, tcp_life=FORGETS, tcp_loose=False),
        natlab.nat("home-nat", SYMMETRIC, tcp_life=FORGETS, tcp_loose=False),
    ]
    nodes = [Peerup(natlab.host(n, behind=nat), tmp_path / n) for n, nat in zip(("laptop", "home"), nats, strict=True)]
    with contextlib.ExitStack() as stack:
        pair = stack.enter_context(running(Pair(nodes[0], nodes[1], [relay])))
        address = pair.laptop.proxy("home", "echo")
        sock = stack.enter_context(pair.laptop.connect(address))
        assert sock.recv(100) == Echo.GREETING
        time.sleep(2 * FORGETS)  # nothing but keepalives, from the first silence and from one that follows a keepalive
        sock.sendall(b"still there")
        assert sock.recv(100) == b"still there"
