"""Chains of client, relay and listener: of foreign peers alone, and with whole nodes of ours in them."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NamedTuple

import trio

from tests.interop import nodes
from tests.interop.conftest import StartForeign
from tests.interop.peers import Answer, ForeignPeer, Peer, do, waiting_for
from tests.support.nodes import Node

OURS = "peerup"
SERVICE = "web"
BEHIND = "--no-listen"
"""Peers at the ends of a chain accept nothing but circuits, or a direct connection might take the place of one."""


class Chain(NamedTuple):
    """A client, a relay, and a listener that has a reservation there; `address` is the listener's behind the relay."""

    client: Peer
    relay: Peer
    listener: Peer
    address: str


@contextlib.asynccontextmanager
async def foreign_relay(start: StartForeign, name: str, **limits: int) -> AsyncIterator[ForeignPeer]:
    """A relay with these limits, see `relay-serve`."""
    async with start(name) as relay:
        await do(relay, "relay-serve", **limits)
        yield relay


@contextlib.asynccontextmanager
async def foreign_chain(start: StartForeign, names: tuple[str, str, str], **limits: int) -> AsyncIterator[Chain]:
    """Client, relay and listener by the names of their implementations; nobody is dialled yet."""
    client_name, relay_name, listener_name = names
    async with (
        # rust-libp2p takes no reservation from a relay that tells no address.
        foreign_relay(start, relay_name, announce=listener_name == "rust", **limits) as relay,
        start(listener_name, BEHIND) as listener,
        start(client_name, BEHIND) as client,
    ):
        await do(listener, "reserve", address=relay.address)
        yield Chain(client, relay, listener, circuit(relay, listener))


def circuit(relay: Peer, listener: Peer) -> str:
    """The address of the listener behind the relay."""
    return f"{relay.address}/p2p-circuit/p2p/{listener.peer_id}"


async def relayed_connection(peer: Peer, other: Peer | Node) -> Answer:
    """The connection through a relay; the side that was dialled knows of it last."""
    with waiting_for(f"a relayed connection to {other.name}", peer, 20):
        found: list[Answer] = []
        while not found:
            connections = (await do(peer, "connections"))["connections"]
            found = [each for each in connections if each["peer"] == other.peer_id and each["relayed"]]
            await trio.sleep(0.01)
    return found[0]


class AnyRelay(NamedTuple):
    """A relay of any implementation; where it is, with its peer id."""

    address: str
    peer_id: str
    node: Node | None = None

    def circuit_to(self, peer: str) -> str:
        """The address of a peer behind it."""
        return f"{self.address}/p2p-circuit/p2p/{peer}"

    async def authorize(self, *peers: str) -> None:
        """Let it serve these peers; a foreign one serves everybody."""
        if self.node is not None:
            for peer in peers:
                await nodes.run(self.node, "relay", "authorize", peer)


class Cells:
    """Builds the chains of one test. Relays are stopped last: ours would wait for circuits that are open."""

    def __init__(self, start_foreign: StartForeign, directory: Path) -> None:
        self._start_foreign = start_foreign
        self._directory = directory

    @contextlib.asynccontextmanager
    async def relay(self, name: str, *limits: str) -> AsyncIterator[AnyRelay]:
        """A relay by the name of its implementation; the limits are for ours."""
        if name == OURS:
            async with nodes.running(nodes.RelayNode("relay", self._directory, *limits)) as node:
                yield AnyRelay(nodes.whole_address(node), node.peer_id, node)
        else:
            async with foreign_relay(self._start_foreign, name) as relay:
                yield AnyRelay(relay.address, relay.peer_id)

    @contextlib.asynccontextmanager
    async def ours_and_theirs(self, relay_name: str, foreign: str) -> AsyncIterator[tuple[Node, ForeignPeer, AnyRelay]]:
        """Our node and a foreign peer, each behind the same relay and nowhere else.

        The node serves a TCP sink as `web`, and knows the other as `friend`.
        """
        ours = Node("ours", self._directory)
        await trio.to_thread.run_sync(ours.initialise)
        async with (
            self.relay(relay_name) as relay,
            self._start_foreign(foreign, BEHIND) as friend,
            nodes.tcp_service(nodes.sink) as port,
        ):
            await relay.authorize(friend.peer_id, ours.peer_id)
            await do(friend, "reserve", address=relay.address)
            commands = (
                ("auth", "add", friend.peer_id, "--comment", "friend"),
                ("names", "add", "friend", friend.peer_id, "--address", relay.circuit_to(friend.peer_id)),
                ("service", "add", SERVICE, f"127.0.0.1:{port}"),
                ("relay", "add", relay.address),
            )
            async with nodes.running(ours, *commands, initialised=True):
                await nodes.reservation_held(ours, relay.peer_id)
                yield ours, friend, relay


async def only_relayed(ours: Node, peer: str) -> None:
    """Our node must not have found another way: what was measured went through the relay."""
    paths = [each["path"] for each in await nodes.run_json(ours, "paths") if each["peer_id"] == peer]
    assert paths == ["relayed"]
