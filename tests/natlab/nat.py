"""A router with address translation. Behind it is a bridge `lan`, as in a home router's switch."""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Iterator

from tests.natlab.behaviour import Behaviour
from tests.natlab.namespaces import LabError
from tests.natlab.network import ROUTER6, IPv4, Lease, Network, Surroundings, Uplink
from tests.natlab.rules import firewall6_rules, nat_rules
from tests.natlab.wires import Link


class Nat(Network):
    """A router with address translation between `wan` and `lan`. Made by `Lab.nat`."""

    def __init__(self, name: str, surroundings: Surroundings, behaviour: Behaviour, *, lan: str) -> None:
        super().__init__(name, surroundings)
        self.behaviour = behaviour
        self.lan = ipaddress.IPv4Network(lan)
        self.lan_mac = surroundings.new_mac()
        self._given = 0
        # Where these exist, frames from one port of the LAN to another would go through the NAT's rules.
        for protocol in ("arp", "ip", "ip6"):
            key = f"bridge__bridge-nf-call-{protocol}tables"
            if self.ns.has_sysctl(key):
                self.ns.sysctl(**{key: 0})
        self.ns.ip(f"link add name lan address {self.lan_mac} type bridge mcast_snooping 0")

    def connect(self, network: Network, *, link: Link | None, ipv6: bool, lease: Lease | None) -> None:
        """Plug in `wan` and begin to work; once."""
        if isinstance(network, Nat) and network.lan.overlaps(self.lan):
            raise LabError(f"{self.name} and {network.name} both have {self.lan} inside: give one another lan=...")
        Uplink(self, network, "wan", link=link, ipv6=ipv6, metric=100, lease=lease)
        if self.has_ipv6:
            self.ns.sysctl(ipv6__conf__lan__disable_ipv6=0)
        self._configure_lan()
        self.load_rules()

    @property
    def has_ipv6(self) -> bool:
        return self.uplink.lease.prefix6 is not None

    @property
    def gateway(self) -> IPv4:
        """Its own address inside."""
        return self.lan.network_address + 1

    def load_rules(self) -> None:
        """(Re)load the firewall; all mappings are forgotten."""
        life = self.behaviour.udp_life
        self.ns.nft(nat_rules(self.behaviour, self.address))
        if self.has_ipv6:
            self.ns.nft(firewall6_rules(self.behaviour))
        self.ns.sysctl(
            netfilter__nf_conntrack_udp_timeout=life,
            netfilter__nf_conntrack_udp_timeout_stream=life,
            netfilter__nf_conntrack_tcp_timeout_established=self.behaviour.tcp_life,
            netfilter__nf_conntrack_tcp_loose=int(self.behaviour.tcp_loose),
        )

    def become(self, behaviour: Behaviour) -> None:
        """Behave otherwise from now on; all mappings and connections are forgotten."""
        self.behaviour = behaviour
        self.load_rules()
        self.forget_connections()

    def forget_connections(self) -> None:
        """Empty the connection tracking, as a reboot does."""
        self.ns.run(["conntrack", "-F"])

    def power_off(self) -> None:
        """Both sides are dead; hosts inside notice nothing but silence."""
        self.ns.ip("link set lan down", "link set wan down")

    def power_on(self) -> None:
        """Back with the same address and without any memory."""
        self.load_rules()
        self.forget_connections()
        self._configure_lan()
        self.uplink.configure()

    def reboot(self) -> None:
        """`power_off`, then at once `power_on`."""
        self.power_off()
        self.power_on()

    def new_address(self, address: str | None = None) -> str:
        """The provider gives it a new address outside; mappings are gone. Returns the address."""
        self.uplink.new_address(address)
        self.load_rules()
        self.forget_connections()
        return self.address

    def mappings(self) -> dict[tuple[str, int], tuple[str, int]]:
        """What it remembers: (protocol, outside port) -> inside address and port."""
        listed = json.loads(self.ns.run(["nft", "-j", "list", "map", "ip", "natlab", "inside"]))
        elements = next(item["map"].get("elem", []) for item in listed["nftables"] if "map" in item)
        found: dict[tuple[str, int], tuple[str, int]] = {}
        for key, value in elements:
            protocol, port = (key.get("elem", {}).get("val", key) if isinstance(key, dict) else key)["concat"]
            address, inside_port = value["concat"]
            found[str(protocol), int(port)] = (str(address), int(inside_port))
        return found

    def connections(self) -> list[str]:
        """The lines of `conntrack -L`, for looking at."""
        return self.ns.run(["conntrack", "-L"]).splitlines()

    def new_lease(self, *, ipv6: bool) -> Lease:
        self._given += 1
        address = ipaddress.IPv4Interface((self.gateway + self._given, self.lan.prefixlen))
        address6 = None
        if ipv6:
            prefix = self.uplink.lease.prefix6
            if prefix is None:
                raise LabError(f"{self.name} has no IPv6 network to give; make it with ipv6=True in the core")
            address6 = ipaddress.IPv6Interface((prefix.network_address + 0x100 + self._given, 64))
        return Lease(address, self.gateway, address6=address6)

    def port_commands(self, uplink: Uplink) -> Iterator[str]:
        yield f"link set {uplink.port} address {uplink.port_mac} mtu {uplink.mtu} master lan up"
        for address in (uplink.lease.address, uplink.lease.address6):
            if address is not None:
                yield f"neigh replace {address.ip} lladdr {uplink.mac} dev lan nud permanent"

    def forget_commands(self, uplink: Uplink) -> Iterator[str]:
        for address in (uplink.lease.address, uplink.lease.address6):
            if address is not None:
                yield f"neigh del {address.ip} dev lan"

    def running_with(self, uplink: Uplink) -> list[str]:
        return [uplink.port, "lan"]

    def _configure_lan(self) -> None:
        commands = ["link set lan up", f"addr replace {self.gateway}/{self.lan.prefixlen} dev lan"]
        prefix = self.uplink.lease.prefix6
        if prefix is not None:
            commands += [
                f"addr replace {ROUTER6}/64 dev lan nodad",
                f"addr replace {prefix.network_address + 1}/64 dev lan nodad",
            ]
        for uplink in self.members:
            commands += self.port_commands(uplink)
        self.ns.ip(*commands)

    def gateway_mac(self, uplink: Uplink) -> str:
        return self.lan_mac
