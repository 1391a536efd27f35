"""What is known of relays: which ones the configuration names, where they are, and how they take a CONNECT."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from protocol.circuit.addresses import circuit_address
from protocol.multiaddr import Multiaddr, MultiaddrError
from protocol.peer_id import PeerId

MAX_REMEMBERED = 256
"""Relays of which it is remembered that they lose early bytes; the one found out longest ago is forgotten first."""


class RelayBook:
    """The relays of the configuration, and what was learned of any relay."""

    def __init__(self) -> None:
        self._configured: dict[PeerId, tuple[Multiaddr, ...]] = {}
        self._losing: OrderedDict[PeerId, None] = OrderedDict()

    def configure(self, addresses: Iterable[Multiaddr]) -> None:
        """Take the configuration's relays in place of the ones before; each address ends in its relay's id."""
        found: dict[PeerId, list[Multiaddr]] = {}
        for address in addresses:
            relay = address.peer_id
            if relay is not None and not address.is_relayed:
                found.setdefault(relay, []).append(address.without_peer_id())
        self._configured = {relay: tuple(dict.fromkeys(known)) for relay, known in found.items()}

    def __contains__(self, peer: PeerId) -> bool:
        """Whether the configuration names this relay."""
        return peer in self._configured

    def addresses(self, relay: PeerId) -> tuple[Multiaddr, ...]:
        """Where a configured relay is."""
        return self._configured.get(relay, ())

    def circuits(self, peer: PeerId, known: Iterable[Multiaddr]) -> tuple[Multiaddr, ...]:
        """One relayed address of the peer for each relay: of those known, and for each configured relay."""
        found: dict[PeerId, Multiaddr] = {}
        for address in known:
            relay = None if address.relay is None else address.relay.peer_id
            if relay is not None and relay != peer:
                found.setdefault(relay, address)
        for relay, addresses in self._configured.items():
            if relay == peer or relay in found:
                continue
            try:
                found[relay] = circuit_address(addresses[0].with_peer_id(relay), peer)
            except MultiaddrError:
                continue  # too long with that
        return tuple(found.values())

    def takes_early(self, relay: PeerId) -> bool:
        """Whether to send early what comes behind CONNECT: unless this relay was found to lose it."""
        return relay not in self._losing

    def lost_early(self, relay: PeerId) -> None:
        """What came behind CONNECT was lost at this relay: let it wait from now on."""
        self._losing[relay] = None
        self._losing.move_to_end(relay)
        if len(self._losing) > MAX_REMEMBERED:
            self._losing.popitem(last=False)
