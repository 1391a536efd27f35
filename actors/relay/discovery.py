"""Where this machine can be reached, from what peers see of it: for machines that do not know their public address.

Theory of operation. In identify each peer says from which address it sees us. Such a word counts if the peer is one
of ours and sees a public address; what peers in several networks say alike is believed (`QUORUM`): behind a 1:1 NAT, as
cloud machines are, everybody outside sees the same. Networks are counted and not connections, since one network may
see us by a way of its own, such as a private one, and nobody should be able to talk us into an address alone.

A believed address is combined with the ports that we listen on, and where a peer has dialled us, with the port that it
dialled. It stays believed when those who told it are gone, until others agree on another one.
"""

from __future__ import annotations

import dataclasses
import ipaddress
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Final

from protocol.multiaddr import Multiaddr
from protocol.peer_id import PeerId
from protocol.reservations import Ip, network_prefix

QUORUM: Final = 2
"""Networks, and peers, that must agree: most people's relay has no more than a handful of devices to be seen by."""

MAX_DIALLED: Final = 8
"""Addresses that peers have dialled that are told, besides our own ports."""


@dataclasses.dataclass(frozen=True)
class Observation:
    """What one peer said over one connection.

    Attributes:
        peer: who.
        network: where it is.
        address: of this node, as it sees it.
        dialled: it has dialled this address, so that the port is right as well.
    """

    peer: PeerId
    network: object
    address: Multiaddr
    dialled: bool


class AddressDiscovery:
    """See the module.

    Attributes:
        believed: the public addresses, one of each IP version.
    """

    def __init__(self, believed: Iterable[str] = ()) -> None:
        self.believed: dict[int, Ip] = {}
        for text in believed:
            ip = ipaddress.ip_address(text)
            self.believed[ip.version] = ip
        self._observations: dict[str, Observation] = {}

    @property
    def observations(self) -> tuple[Observation, ...]:
        """What counts at present."""
        return tuple(self._observations.values())

    @property
    def connections(self) -> frozenset[str]:
        """The connections that these came over."""
        return frozenset(self._observations)

    def observed(self, connection: str, peer: PeerId, where: Ip | None, address: Multiaddr, *, dialled: bool) -> bool:
        """A peer at `where` says over this connection that it sees us at `address`; whether that changes anything."""
        seen = address.ip
        if where is None or seen is None or not seen.is_global or address.is_relayed:
            return self.forget(connection)
        before = self._view()
        self._observations[connection] = Observation(peer, network_prefix(where), address.without_peer_id(), dialled)
        self._count_votes()
        return before != self._view()

    def forget(self, connection: str) -> bool:
        """A connection is gone; whether that changes anything."""
        before = self._view()
        self._observations.pop(connection, None)
        self._count_votes()
        return before != self._view()

    def addresses(self, listening: Sequence[Multiaddr]) -> tuple[Multiaddr, ...]:
        """The public addresses of a node that listens at these."""
        own = {address.ip for address in listening}
        found: dict[Multiaddr, None] = {}
        for ip in self.believed.values():
            if ip in own:
                continue  # it is this machine's own address, and known without
            for address in listening:
                if address.ip is not None and address.ip.version == ip.version and not address.ip.is_loopback:
                    found[_at(ip, address)] = None
        return tuple(dict.fromkeys([*found, *self._dialled()]))

    def _dialled(self) -> list[Multiaddr]:
        dialled = {
            each.address: None
            for each in self._observations.values()
            if each.dialled and each.address.ip in self.believed.values()
        }
        return list(dialled)[:MAX_DIALLED]

    def _view(self) -> tuple[object, ...]:
        return (dict(self.believed), self._dialled())

    def _count_votes(self) -> None:
        networks: dict[Ip, set[object]] = defaultdict(set)
        peers: dict[Ip, set[PeerId]] = defaultdict(set)
        for each in self._observations.values():
            if each.address.ip is not None:
                networks[each.address.ip].add(each.network)
                peers[each.address.ip].add(each.peer)
        for version in (4, 6):
            agreed = [
                ip for ip, by in networks.items() if ip.version == version and min(len(by), len(peers[ip])) >= QUORUM
            ]
            present = self.believed.get(version)
            if agreed:
                most = max(len(networks[ip]) for ip in agreed)
                if present is None or present not in agreed or len(networks[present]) < most:
                    self.believed[version] = next(ip for ip in agreed if len(networks[ip]) == most)


def _at(ip: Ip, listening: Multiaddr) -> Multiaddr:
    """The same port and transport at another IP address."""
    host = Multiaddr(f"/ip{ip.version}/{ip}")
    return Multiaddr.from_components((*host.components, *listening.without_peer_id().components[1:]))
