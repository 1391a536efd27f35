"""Where peers may be reached: what the configuration says, and what peers that we know have told us."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from actors.switchboard.connections import Connection
from actors.switchboard.transports import is_dialable
from protocol.messages.config import AddressEntry
from protocol.multiaddr import Multiaddr
from protocol.peer_id import PeerId

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


class AddressBook:
    """Addresses by peer; those of the configuration come first and are never forgotten."""

    def __init__(self) -> None:
        self._configured: dict[PeerId, tuple[Multiaddr, ...]] = {}
        self._learned: OrderedDict[PeerId, tuple[Multiaddr, ...]] = OrderedDict()

    def configure(self, entries: Iterable[AddressEntry], relays: Iterable[Multiaddr] = ()) -> list[PeerId]:
        """Take the configuration's addresses in place of the ones before; peers whose addresses changed.

        `relays` are addresses of relays, each with its `/p2p/…`.
        """
        configured = {entry.peer: entry.addresses for entry in entries}
        for address in relays:
            if (relay := address.peer_id) is not None and not address.is_relayed:
                configured[relay] = tuple(dict.fromkeys((*configured.get(relay, ()), address)))
        before, self._configured = self._configured, configured
        return [peer for peer in {*before, *configured} if before.get(peer) != configured.get(peer)]

    def learn(self, connection: Connection) -> None:
        """Keep what the peer of this connection said in identify, its signed record before anything else.

        A loopback address leads to the peer only if that is where the peer is.
        """
        told = connection.identification
        if told is None:
            return
        addresses = told.peer_record.addresses if told.peer_record is not None else told.listen_addresses
        here = connection.remote_address.ip
        same_machine = here is not None and here.is_loopback and not connection.relayed  # else it is the relay's
        usable = [
            address.without_peer_id()
            for address in addresses
            if _is_usable(address) and (same_machine or address.ip is None or not address.ip.is_loopback)
        ]
        if usable:
            self._learned[connection.peer] = tuple(dict.fromkeys(usable))[:MAX_LEARNED]
            self._learned.move_to_end(connection.peer)
            if len(self._learned) > MAX_PEERS:
                self._learned.popitem(last=False)

    def addresses(self, peer: PeerId) -> tuple[Multiaddr, ...]:
        """Where to try."""
        configured = [address.without_peer_id() for address in self._configured.get(peer, ())]
        return tuple(dict.fromkeys([*configured, *self._learned.get(peer, ())]))

    def peers(self) -> tuple[PeerId, ...]:
        """Peers with a configured address."""
        return tuple(self._configured)
