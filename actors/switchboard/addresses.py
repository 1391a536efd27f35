"""Where peers may be reached: what the configuration says, and what peers that we know have told us."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from actors.switchboard.connections import Connection
from actors.switchboard.own_machine import OwnMachine
from actors.switchboard.transports import is_dialable
from protocol.messages.config import AddressEntry
from protocol.multiaddr import Multiaddr
from protocol.peer_id import PeerId

NOTHING_KNOWN = OwnMachine()
MAX_LEARNED = 16
"""Addresses kept of what one peer told."""
MAX_PEERS = 256
"""Peers of which such addresses are kept; the one heard of longest ago is forgotten first."""


def _is_usable(address: Multiaddr) -> bool:
    """Whether it can be dialled, or leads through a relay that can."""
    if not address.is_relayed:
        return is_dialable(address)
    relay = address.relay
    return relay is not None and relay.peer_id is not None and is_dialable(relay)


def _first_hop(address: Multiaddr) -> Multiaddr | None:
    """Where the first connection to this address goes, without a peer's id."""
    hop = address.relay if address.is_relayed else address
    return hop.without_peer_id() if hop is not None and hop.endpoint is not None else None


class AddressBook:
    """Addresses by peer; those of the configuration come first and are never forgotten."""

    def __init__(self) -> None:
        self._configured: dict[PeerId, tuple[Multiaddr, ...]] = {}
        self._learned: OrderedDict[PeerId, tuple[Multiaddr, ...]] = OrderedDict()
        self._on_this_machine: dict[PeerId, frozenset[Multiaddr]] = {}
        self._typed: frozenset[Multiaddr] = frozenset()

    def configure(self, entries: Iterable[AddressEntry], relays: Iterable[Multiaddr] = ()) -> list[PeerId]:
        """Take the configuration's addresses in place of the ones before; peers whose addresses changed.

        `relays` are addresses of relays, each with its `/p2p/…`.
        """
        configured = {entry.peer: entry.addresses for entry in entries}
        for address in relays:
            if (relay := address.peer_id) is not None and not address.is_relayed:
                configured[relay] = tuple(dict.fromkeys((*configured.get(relay, ()), address)))
        before, self._configured = self._configured, configured
        self._typed = frozenset(
            place
            for addresses in configured.values()
            for address in addresses
            if (place := _first_hop(address)) is not None
        )
        return [peer for peer in {*before, *configured} if before.get(peer) != configured.get(peer)]

    def learn(self, connection: Connection, here: OwnMachine = NOTHING_KNOWN) -> None:
        """Keep what the peer of this connection said in identify, its signed record before anything else.

        An address that leads to this machine leads to the peer only if that is where the peer is.
        """
        told = connection.identification
        if told is None:
            return
        addresses = told.peer_record.addresses if told.peer_record is not None else told.listen_addresses
        # Through a relay the address is the relay's.
        same_machine = not connection.relayed and here.has(connection.remote_address.ip)
        usable = [
            address.without_peer_id()
            for address in addresses
            if _is_usable(address) and (same_machine or not here.why_not(address))
        ]
        self._on_this_machine.pop(connection.peer, None)
        if usable:
            if same_machine:
                self._on_this_machine[connection.peer] = frozenset(usable)
            self._learned[connection.peer] = tuple(dict.fromkeys(usable))[:MAX_LEARNED]
            self._learned.move_to_end(connection.peer)
            if len(self._learned) > MAX_PEERS:
                forgotten, _ = self._learned.popitem(last=False)
                self._on_this_machine.pop(forgotten, None)

    def addresses(self, peer: PeerId) -> tuple[Multiaddr, ...]:
        """Where to try."""
        configured = [address.without_peer_id() for address in self._configured.get(peer, ())]
        return tuple(dict.fromkeys([*configured, *self._learned.get(peer, ())]))

    def may_lead_here(self, address: Multiaddr) -> bool:
        """Whether this address may be dialled though it leads to this machine.

        A person wrote it into the configuration, or a peer that is on this machine said so.
        """
        return address in self._typed or any(address in told for told in self._on_this_machine.values())

    def peers(self) -> tuple[PeerId, ...]:
        """Peers with a configured address."""
        return tuple(self._configured)
