"""The addresses in reservations: what a relay tells of itself, and what a client makes of it for others."""

from __future__ import annotations

from collections.abc import Iterable

from protocol.multiaddr import Component, Multiaddr, MultiaddrError
from protocol.peer_id import PeerId

_CIRCUIT = Component("p2p-circuit", "", b"")


def announced_addresses(addresses: Iterable[Multiaddr], relay: PeerId) -> tuple[Multiaddr, ...]:
    """A relay's addresses in the form of a reservation: each with the relay's own id at its end, once each.

    It serves both sides. A relay calls it on its addresses before it sends them. A client calls it on what it has
    received, because js-libp2p sends addresses without the id and older go-libp2p with the id twice. An address of
    another peer, or through a relay, is left out: nobody may be led there in this relay's name.
    """
    found: dict[Multiaddr, None] = {}
    for address in addresses:
        plain: Multiaddr = address
        try:
            while plain.peer_id == relay:
                plain = plain.without_peer_id()
            if not any(component.name in {"p2p", "p2p-circuit"} for component in plain.components):
                found[plain.with_peer_id(relay)] = None
        except MultiaddrError:
            continue  # nothing but the id, or too long with it
    return tuple(found)


def circuit_address(relay_address: Multiaddr, peer: PeerId) -> Multiaddr:
    """The address of a peer through a relay: `RELAY/p2p-circuit/p2p/PEER`.

    Raises:
        MultiaddrError: the relay's address does not end in its peer id, leads through a relay itself, or the result
            would be too long.
    """
    if relay_address.peer_id is None or relay_address.is_relayed:
        raise MultiaddrError(f"{relay_address} is not the address of a relay with its peer id")
    return Multiaddr.from_components((*relay_address.components, _CIRCUIT)).with_peer_id(peer)


def circuit_addresses(addresses: Iterable[Multiaddr], relay: PeerId, peer: PeerId) -> tuple[Multiaddr, ...]:
    """The addresses at which a peer with a reservation can be dialled, from what the relay told of itself."""
    found: list[Multiaddr] = []
    for address in announced_addresses(addresses, relay):
        try:
            found.append(circuit_address(address, peer))
        except MultiaddrError:
            continue  # too long with all that
    return tuple(found)
