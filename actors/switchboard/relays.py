"""What is known of relays: which ones the configuration names, where they are, and how they take a CONNECT."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from actors.switchboard.connections import Connection
from protocol.circuit.addresses import circuit_address
from protocol.multiaddr import Multiaddr, MultiaddrError
from protocol.peer_id import PeerId
from protocol.protocol_ids import CIRCUIT_HOP

MAX_REMEMBERED = 256
"""Relays of which it is remembered how they take early bytes; the one used longest ago is forgotten first."""

AHEAD_AGENTS: Sequence[str] = (
    "peerup/",
    "relay-server/",  # peer-up's
    "github.com/libp2p/go-libp2p",
    "go-libp2p",
    "kubo/",
    "js-libp2p",
    "rust-libp2p",
)
"""Beginnings of the agents of relays that are proven to pass on what comes right behind CONNECT."""


class RelayBook:
    """The relays of the configuration, and what was learned of any relay."""

    def __init__(self) -> None:
        self._configured: dict[PeerId, tuple[Multiaddr, ...]] = {}
        self._ahead: OrderedDict[PeerId, bool] = OrderedDict()

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

    def takes_early(self, connection: Connection) -> bool:
        """Whether the relay at the other end passes on what comes right behind CONNECT."""
        known = self._ahead.get(connection.peer)
        if known is not None:
            self._ahead.move_to_end(connection.peer)
            return known
        told = connection.identification
        return told is not None and (told.agent_version or "").startswith(tuple(AHEAD_AGENTS))

    def learn(self, connection: Connection) -> None:
        """Remember what the agent of a relay means, for when it is connected anew."""
        relay, told = connection.peer, connection.identification
        is_relay = relay in self._configured or (told is not None and CIRCUIT_HOP in told.protocols)
        if is_relay and relay not in self._ahead:
            self._remember(relay, early=self.takes_early(connection))

    def lost_early(self, relay: PeerId) -> None:
        """What came behind CONNECT was lost at this relay: let it wait from now on."""
        self._remember(relay, early=False)

    def _remember(self, relay: PeerId, *, early: bool) -> None:
        self._ahead[relay] = early
        self._ahead.move_to_end(relay)
        if len(self._ahead) > MAX_REMEMBERED:
            self._ahead.popitem(last=False)
