"""The public Internet of a laboratory.

Every uplink here is a cable of its own, with one or more public addresses routed to it, so a node can have any address
and take it elsewhere.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator

from tests.natlab.namespaces import LabError
from tests.natlab.network import NODE6, ROUTER6, IPv4, Lease, Network, Surroundings, Uplink

CORE_GATEWAY = "100.127.0.1"  # every node in the core has this default gateway, on its own cable


class Core(Network):
    """The public Internet: one router between all public addresses, and a route to nothing else."""

    def __init__(self, surroundings: Surroundings) -> None:
        super().__init__("core", surroundings)
        # It speaks with these, in errors above all; without IPv6 on `lo` it could not say "no route" or "too big".
        self.ns.ip(f"addr add {CORE_GATEWAY}/32 dev lo", f"addr add {surroundings.public6[1]}/128 dev lo nodad")
        self._given = 0

    @property
    def has_ipv6(self) -> bool:
        return True

    def new_lease(self, *, ipv6: bool) -> Lease:
        self._given += 1
        # One in each /24, as with customers of different providers: 128.66.1.10, 128.66.2.10, …
        block = self.surroundings.public.network_address + 256 * self._given
        address = ipaddress.IPv4Interface((block + 10, 32))
        if address.ip not in self.surroundings.public:
            raise LabError(f"{self.surroundings.public} has no address left")
        if not ipv6:
            return Lease(address, IPv4(CORE_GATEWAY))
        site = self.surroundings.public6.network_address + (self._given << 80)  # a /48 for each
        return Lease(
            address,
            IPv4(CORE_GATEWAY),
            address6=ipaddress.IPv6Interface((site + 0xA, 128)),
            prefix6=ipaddress.IPv6Network((site + (1 << 64), 64)),
        )

    def port_commands(self, uplink: Uplink) -> Iterator[str]:
        port, lease = uplink.port, uplink.lease
        yield f"link set {port} address {uplink.port_mac} mtu {uplink.mtu} up"
        for address in uplink.addresses:
            yield f"route replace {address}/32 dev {port}"
            yield f"neigh replace {address} lladdr {uplink.mac} dev {port} nud permanent"
        if lease.address6 is not None:
            yield f"addr replace {ROUTER6}/64 dev {port} nodad"
            yield f"neigh replace {NODE6} lladdr {uplink.mac} dev {port} nud permanent"
            yield f"route replace {lease.address6.ip}/128 via {NODE6} dev {port}"
            yield f"route replace {lease.prefix6} via {NODE6} dev {port}"

    def forget_commands(self, uplink: Uplink) -> Iterator[str]:
        yield f"route flush dev {uplink.port}"
        yield f"neigh flush dev {uplink.port} nud permanent"

    def gateway_mac(self, uplink: Uplink) -> str:
        return uplink.port_mac
