"""Which addresses lead to this machine, however they are written.

A peer, a relay or a name server may say anything about where somebody is. An address that leads back to this machine
reaches whatever listens here for this machine alone, so it is not dialled unless a person wrote it into the
configuration, or the peer is itself on this machine.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import socket
from collections.abc import Iterable
from typing import Final

from protocol.multiaddr import Multiaddr

IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

_THIS_HOST: Final = ipaddress.IPv4Network("0.0.0.0/8")  # RFC 1122, section 3.2.1.3; Linux takes 0.0.0.0 for loopback
_LINK_LOCAL: Final = ipaddress.IPv4Network("169.254.0.0/16")
_LOW_32: Final = tuple(
    ipaddress.IPv6Network(text)
    for text in (
        "::/96",  # IPv4-compatible, RFC 4291, section 2.5.5.1
        "::ffff:0:0/96",  # IPv4-mapped, section 2.5.5.2
        "::ffff:0:0:0/96",  # IPv4-translated, RFC 2765
        "64:ff9b::/96",  # NAT64, RFC 6052
        "64:ff9b:1::/48",  # NAT64 of a site, RFC 8215
    )
)
_SIX_TO_FOUR: Final = ipaddress.IPv6Network("2002::/16")  # RFC 3056
_TEREDO: Final = ipaddress.IPv6Network("2001::/32")  # RFC 4380
_ISATAP: Final = (0x00005EFE, 0x02005EFE)  # RFC 5214, section 6.1


def spellings(address: IpAddress) -> frozenset[IpAddress]:
    """This address, and the IPv4 addresses that it is another spelling of or leads to by translation."""
    if isinstance(address, ipaddress.IPv4Address):
        return frozenset((address,))
    bare = ipaddress.IPv6Address(int(address))  # without a zone
    found: set[IpAddress] = {bare}
    bits = int(bare)
    low = bits & 0xFFFFFFFF
    if any(bare in network for network in _LOW_32) or (bits >> 32) & 0xFFFFFFFF in _ISATAP:
        found.add(ipaddress.IPv4Address(low))
    if bare in _SIX_TO_FOUR:
        found.add(ipaddress.IPv4Address((bits >> 80) & 0xFFFFFFFF))
    if bare in _TEREDO:
        found |= {ipaddress.IPv4Address((bits >> 64) & 0xFFFFFFFF), ipaddress.IPv4Address(low ^ 0xFFFFFFFF)}
    return frozenset(found)


@dataclasses.dataclass(frozen=True)
class OwnMachine:
    """What is known of this machine's addresses.

    Attributes:
        interfaces: the addresses of its network interfaces.
        public: addresses that others see it at, by announcement or observation: only with a port of ours it is us.
        ports: ports at which this node is reached.
    """

    interfaces: frozenset[IpAddress] = frozenset()
    public: frozenset[IpAddress] = frozenset()
    ports: frozenset[int] = frozenset()

    @classmethod
    def of(
        cls, interfaces: Iterable[IpAddress], announced: Iterable[Multiaddr], observed: Iterable[IpAddress]
    ) -> OwnMachine:
        """From the interfaces, what this node announces of itself, and the addresses that others see it at."""
        public, ports = set(observed), set()
        for address in announced:
            if not address.is_relayed and address.endpoint is not None:
                ports.add(address.endpoint.port)
                if address.ip is not None:
                    public |= spellings(address.ip)
        return cls(frozenset(interfaces), frozenset(public), frozenset(ports))

    def has(self, address: IpAddress | None) -> bool:
        """Whether this is an address of the machine itself."""
        return address is not None and any(each.is_loopback or each in self.interfaces for each in spellings(address))

    def why_not(self, address: Multiaddr) -> str:
        """Why this address of an IP host must not be dialled because of somebody else's word; empty: it may be."""
        ip, endpoint = address.ip, address.endpoint
        if ip is None or endpoint is None:
            return ""
        for each in spellings(ip):
            if each.is_loopback or each.is_unspecified or (each.version == 4 and each in _THIS_HOST):
                return "it leads to this machine"
            if each in self.interfaces:
                return "it is this machine's own address"
            if each in self.public and endpoint.port in self.ports:
                return "it is where this node itself is reached"
            if each.is_multicast or each == ipaddress.IPv4Address(0xFFFFFFFF):
                return "it is no address of one machine"
            if each.version == 4 and each in _LINK_LOCAL and not any(own in _LINK_LOCAL for own in self._of_version(4)):
                return "it is good on one link only, and this machine is on none such"
        if ip.version == 6 and ip.is_link_local and not _is_zone(endpoint.host.partition("%")[2]):
            return "it is good on one link only, and does not name one of this machine's"
        return ""

    def _of_version(self, version: int) -> list[IpAddress]:
        return [own for own in self.interfaces if own.version == version]


def _is_zone(name: str) -> bool:
    try:
        return bool(name) and socket.if_nametoindex(name) > 0
    except OSError:
        return False
