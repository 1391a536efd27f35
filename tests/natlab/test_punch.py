"""Hole punching through pairs of NATs comes out as theory says: what later tests of real programs rely on."""

from __future__ import annotations

import contextlib
import select
import socket
import time

import pytest

from tests.natlab.behaviour import (
    FULL_CONE,
    PORT_RESTRICTED,
    RESTRICTED,
    SYMMETRIC,
    SYMMETRIC_SEQUENTIAL,
    Behaviour,
    Unsolicited,
)
from tests.natlab.lab import Lab
from tests.natlab.probes import Address, Servers, exchange

ROUNDS = 5
PAUSE = 0.03

KINDS = {
    "full": FULL_CONE,
    "restricted": RESTRICTED,
    "port": PORT_RESTRICTED,
    "symmetric": SYMMETRIC,
    "sequential": SYMMETRIC_SEQUENTIAL,
}
# Neither side can say through which port its packets to the other will go.
HOPELESS = {
    ("port", "symmetric"),
    ("port", "sequential"),
    ("symmetric", "symmetric"),
    ("symmetric", "sequential"),
    ("sequential", "sequential"),
}


def punch(sides: list[tuple[socket.socket, list[Address]]]) -> bool:
    """Send from both sides to all candidates of the other, answer the source of what arrives, until both have heard."""
    heard = [False, False]
    clients = [client for client, _ in sides]
    for _ in range(ROUNDS):
        for client, candidates in sides:
            for candidate in candidates:
                client.sendto(b"punch", candidate)
        until = time.monotonic() + PAUSE
        while (left := until - time.monotonic()) > 0:
            for client in select.select(clients, [], [], left)[0]:
                got, source = client.recvfrom(100)
                if got in {b"punch", b"answer"}:
                    heard[clients.index(client)] = True
                    if got == b"punch":
                        client.sendto(b"answer", source)
            if all(heard):
                return True
    return False


def meet(lab: Lab, servers: Servers, first: Behaviour, second: Behaviour, name: str, *, guesses: int = 0) -> bool:
    """Make two hosts behind these NATs, let them learn their outside addresses from a server, and punch."""
    hosts = [lab.host(f"{name}{n}", behind=lab.nat(f"nat{name}{n}", kind)) for n, kind in enumerate((first, second))]
    with contextlib.ExitStack() as stack:
        ends = stack.enter_context(servers.udp())
        clients = [stack.enter_context(host.udp()) for host in hosts]
        seen = []
        for client in clients:
            address, port = [exchange(client, end) for end in ends][-1]
            seen.append([(address, port + guess) for guess in range(guesses + 1)])
        return punch([(clients[0], seen[1]), (clients[1], seen[0])])


@pytest.mark.parametrize("first", KINDS)
def test_pairs_of_nats(natlab: Lab, first: str) -> None:
    servers = Servers(natlab)
    outcomes = {}
    for second in list(KINDS)[list(KINDS).index(first) :]:
        outcomes[first, second] = meet(natlab, servers, KINDS[first], KINDS[second], f"{first}-{second}-")
    assert outcomes == {pair: pair not in HOPELESS for pair in outcomes}


def test_sequential_ports_can_be_guessed_and_random_ones_cannot(natlab: Lab) -> None:
    servers = Servers(natlab)
    assert meet(natlab, servers, PORT_RESTRICTED, SYMMETRIC_SEQUENTIAL, "a", guesses=4)
    assert not meet(natlab, servers, PORT_RESTRICTED, SYMMETRIC, "b", guesses=4)


def test_nats_that_refuse_can_be_punched_and_those_that_accept_cannot(natlab: Lab) -> None:
    """The reason why unsolicited packets must never reach the NAT's own connection tracking as its own."""
    servers = Servers(natlab)
    outcomes = {
        unsolicited: meet(
            natlab,
            servers,
            Behaviour(unsolicited=unsolicited),
            Behaviour(unsolicited=unsolicited),
            unsolicited.value,
        )
        for unsolicited in Unsolicited
    }
    assert outcomes == {Unsolicited.DROP: True, Unsolicited.REJECT: True, Unsolicited.ACCEPT: False}
