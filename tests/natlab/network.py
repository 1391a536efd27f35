"""The nodes of a laboratory, and their uplinks in networks.

A node is a namespace. A network is a node in which others have their uplink: the public core (`core.py`) or the inside
of a NAT (`nat.py`). An uplink is one interface of a node, the cable, and the port at the network's end.

Neighbours are written down instead of asked for with ARP: on a cable with delay the question would cost a round trip
that no test expects, and one that is lost costs a second.
"""

from __future__ import annotations

import abc
import dataclasses
import ipaddress
import socket
import subprocess
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

from tests.natlab.namespaces import LabError, Namespace
from tests.natlab.wires import Attendant, Link, plain_cable

ROUTER6 = "fe80::1"  # the IPv6 gateway in every network
NODE6 = "fe80::2"  # the other end of a cable to the core
IPv4 = ipaddress.IPv4Address
Socket = socket.socket  # nodes have a method of that name


def _mac(number: int) -> str:
    return f"02:00:{number >> 24 & 255:02x}:{number >> 16 & 255:02x}:{number >> 8 & 255:02x}:{number & 255:02x}"


@dataclasses.dataclass(frozen=True)
class Lease:
    """What a network gives to an uplink.

    Attributes:
        address: IPv4 address with prefix length, as in `192.168.1.2/24`.
        gateway: IPv4 gateway; `onlink` if it is in no network of the interface.
        address6: IPv6 address with prefix length, or None where there is no IPv6.
        prefix6: an IPv6 network that is routed to the uplink, for a router's own hosts; or None.
    """

    address: ipaddress.IPv4Interface
    gateway: IPv4
    address6: ipaddress.IPv6Interface | None = None
    prefix6: ipaddress.IPv6Network | None = None


class Surroundings:
    """What all nodes of one laboratory share: numbers that are given once, the forwarder, the public addresses."""

    def __init__(self, attendant: Attendant, public: str, public6: str) -> None:
        self.attendant = attendant
        self.public = ipaddress.IPv4Network(public)
        self.public6 = ipaddress.IPv6Network(public6)
        self._wires: Namespace | None = None
        self._macs = 0
        self._ports = 0

    @property
    def wires(self) -> Namespace:
        """Where the forwarder's halves of veth pairs are; nothing there says a word of its own."""
        if self._wires is None:
            self._wires = Namespace("wires")
            self._wires.sysctl(ipv6__conf__default__disable_ipv6=1)
        return self._wires

    def close(self) -> None:
        """Give up what is shared, after all nodes have been released."""
        if self._wires is not None:
            self._wires.close()

    def new_mac(self) -> str:
        """An Ethernet address that nothing else in this laboratory has."""
        self._macs += 1
        return _mac(self._macs)

    def new_port(self) -> str:
        """A name for the network's end of a cable; a port that moves to another network keeps it."""
        self._ports += 1
        return f"p{self._ports}"


class Node:
    """One machine of the laboratory."""

    def __init__(self, name: str, surroundings: Surroundings) -> None:
        self.name = name
        self.ns = Namespace(name)
        self.surroundings = surroundings
        self.uplinks: list[Uplink] = []
        self._processes: list[subprocess.Popen[Any]] = []
        surroundings.attendant.guard(self.ns)
        settings: dict[str, int] = {
            # IPv6 only where a network gives it; the loopback keeps it.
            "ipv6__conf__default__disable_ipv6": 1,
            "ipv6__conf__default__accept_dad": 0,
            "ipv6__conf__default__accept_ra": 0,
            "ipv4__conf__all__rp_filter": 0,
            "ipv4__conf__default__rp_filter": 0,
            "ipv4__icmp_ratelimit": 0,  # no answer is left out because there was one just before
        }
        self.ns.sysctl(**settings)
        # The same on every machine: some kernels come with bbr, which hides loss. Not all of those allow cubic in
        # namespaces; reno is allowed everywhere and answers loss much like it.
        try:
            self.ns.sysctl(ipv4__tcp_congestion_control="cubic")
        except OSError:
            self.ns.sysctl(ipv4__tcp_congestion_control="reno")

    def __repr__(self) -> str:
        return f"<{type(self).__name__.lower()} {self.name} {', '.join(str(each.address) for each in self.uplinks)}>"

    @property
    def uplink(self) -> Uplink:
        """The first uplink."""
        return self.uplinks[0]

    @property
    def address(self) -> str:
        """The IPv4 address on the first uplink."""
        return str(self.uplink.address)

    @property
    def address6(self) -> str:
        """The IPv6 address on the first uplink.

        Raises:
            LabError: it has none.
        """
        lease = self.uplink.lease
        if lease.address6 is None:
            raise LabError(f"{self.name} has no IPv6 address; give ipv6=True to it and to its NAT")
        return str(lease.address6.ip)

    def enter(self) -> AbstractContextManager[None]:
        """Run the body of a `with` here; see `Namespace.enter`."""
        return self.ns.enter()

    def run(self, *arguments: str, timeout: float = 30, check: bool = True, text_in: str | None = None) -> str:
        """Run a program here to its end and return its standard output; see `Namespace.run`."""
        return self.ns.run(arguments, timeout=timeout, check=check, text_in=text_in)

    def popen(self, *arguments: str, **options: Any) -> subprocess.Popen[Any]:
        """Start a program here. It is killed when the laboratory closes, at the latest, with all that it started."""
        process = self.ns.popen(arguments, **options)
        self._processes.append(process)
        return process

    def socket(self, kind: int = socket.SOCK_DGRAM, family: int = socket.AF_INET) -> Socket:
        """A socket of the test's own process that lives here."""
        return self.ns.socket(family, kind)

    def udp(self, port: int = 0, address: str = "0.0.0.0", timeout: float = 5.0) -> Socket:
        """A bound UDP socket here that waits at most `timeout` seconds."""
        bound = self.socket(socket.SOCK_DGRAM, socket.AF_INET6 if ":" in address else socket.AF_INET)
        bound.settimeout(timeout)
        bound.bind((address, port))
        return bound

    def release(self) -> None:
        """Wait for the processes that were started here and have been killed, and give the namespace up."""
        for process in self._processes:
            process.wait(10)
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream is not None:
                    stream.close()
        self.ns.close()


class Network(Node):
    """A node that others can have their uplink in.

    Attributes:
        members: the uplinks that are here now.
    """

    def __init__(self, name: str, surroundings: Surroundings) -> None:
        super().__init__(name, surroundings)
        self.members: list[Uplink] = []
        self.ns.sysctl(ipv4__ip_forward=1, ipv6__conf__all__forwarding=1)

    @property
    @abc.abstractmethod
    def has_ipv6(self) -> bool:
        """Whether it gives IPv6 addresses to those who want them."""

    @abc.abstractmethod
    def new_lease(self, *, ipv6: bool) -> Lease:
        """Addresses that nobody has yet."""

    @abc.abstractmethod
    def port_commands(self, uplink: Uplink) -> Iterator[str]:
        """ip(8) commands that make the network's end of a cable work; they may be given again."""

    @abc.abstractmethod
    def forget_commands(self, uplink: Uplink) -> Iterator[str]:
        """ip(8) commands that undo what `port_commands` did for the present addresses of `uplink`."""

    @abc.abstractmethod
    def gateway_mac(self, uplink: Uplink) -> str:
        """The Ethernet address of the gateway, as `uplink` sees it."""

    def running_with(self, uplink: Uplink) -> list[str]:
        """Interfaces here that must run before frames of `uplink` travel."""
        return [uplink.port]


class Uplink:
    """An interface of a node with its cable to a network. Made by `Lab.host`, `Lab.nat` and `Host.add_uplink`."""

    def __init__(
        self,
        node: Node,
        network: Network,
        interface: str,
        *,
        link: Link | None,
        ipv6: bool,
        metric: int,
        lease: Lease | None,
    ) -> None:
        shared = node.surroundings
        self.node = node
        self.network = network
        self.interface = interface
        self.link = link
        self.port = shared.new_port()
        self.mac = shared.new_mac()
        self.port_mac = shared.new_mac()
        self.metric = metric
        self._ipv6 = ipv6
        self.lease = lease or network.new_lease(ipv6=ipv6)
        self.extra_addresses: list[IPv4] = []
        ends = ((node.ns, interface), (network.ns, self.port))
        if link is None:
            plain_cable(ends)
        else:
            link.connect(shared.attendant, ends, lambda: shared.wires)
        node.uplinks.append(self)
        network.members.append(self)
        self.configure()

    @property
    def mtu(self) -> int:
        """The largest packet, in bytes, that either end sends."""
        return self.link.mtu if self.link else 1500

    @property
    def address(self) -> IPv4:
        """The (first) IPv4 address."""
        return self.lease.address.ip

    @property
    def addresses(self) -> list[IPv4]:
        """All IPv4 addresses."""
        return [self.address, *self.extra_addresses]

    def configure(self) -> None:
        """Set everything at both ends as it should be, and wait until frames travel."""
        without = int(self.lease.address6 is None)
        self.node.ns.sysctl(**{f"ipv6__conf__{self.interface}__disable_ipv6": without})
        self.network.ns.sysctl(**{f"ipv6__conf__{self.port}__disable_ipv6": without})
        self.network.ns.ip(*self.network.port_commands(self))
        self.node.ns.ip(*self._commands())
        self.network.ns.wait_running(self.network.running_with(self))
        self.node.ns.wait_running([self.interface])
        if self.link is not None:
            self.link.wait_running()

    def _commands(self) -> Iterator[str]:
        name, lease = self.interface, self.lease
        gateway_mac = self.network.gateway_mac(self)
        yield f"link set {name} address {self.mac} mtu {self.mtu} up"
        yield f"addr replace {lease.address} dev {name}"
        for address in self.extra_addresses:
            yield f"addr replace {address}/32 dev {name}"
        yield f"neigh replace {lease.gateway} lladdr {gateway_mac} dev {name} nud permanent"
        onlink = "" if lease.gateway in lease.address.network else "onlink"
        yield f"route replace default via {lease.gateway} dev {name} {onlink} metric {self.metric}"
        if lease.address6 is not None:
            if lease.prefix6 is not None:
                yield f"addr replace {NODE6}/64 dev {name} nodad"
            yield f"addr replace {lease.address6} dev {name} nodad"
            yield f"neigh replace {ROUTER6} lladdr {gateway_mac} dev {name} nud permanent"
            yield f"route replace ::/0 via {ROUTER6} dev {name} metric {self.metric}"

    def down(self) -> None:
        """Take the node's interface down: its routes are gone and sending fails (ENETUNREACH)."""
        self.node.ns.ip(f"link set {self.interface} down")

    def up(self) -> None:
        """Take it up again, with the addresses and routes that it had, as a network manager does."""
        self.configure()

    def unplug(self) -> None:
        """Pull the cable at the other side: the node loses its carrier, keeps its routes, and what it sends is lost."""
        self.network.ns.ip(f"link set {self.port} down")

    def plug_in(self) -> None:
        """Put it back. The kernel reports a carrier at most once a second, so this can take that long."""
        self.configure()

    def move(self, network: Network) -> None:
        """Join another network with the same interface: new address, new routes, same index and Ethernet address."""
        self._forget()
        old, self.network = self.network, network
        old.members.remove(self)
        network.members.append(self)
        old.ns.ip(f"link set {self.port} nomaster", f"link set {self.port} netns {network.ns.path}")
        self._take_lease(network.new_lease(ipv6=self._ipv6 and network.has_ipv6))

    def new_address(self, address: str | None = None) -> None:
        """Get another IPv4 address from the same network; the old one is gone. IPv6 stays."""
        self._forget()
        new = self.network.new_lease(ipv6=False).address
        if address is not None:
            new = ipaddress.IPv4Interface((address, new.network.prefixlen))
        self._take_lease(dataclasses.replace(self.lease, address=new))

    def add_address(self, address: str | None = None) -> str:
        """Get one more IPv4 address on this interface, and return it."""
        new = IPv4(address) if address else self.network.new_lease(ipv6=False).address.ip
        self.extra_addresses.append(new)
        self.configure()
        return str(new)

    def _forget(self) -> None:
        self.network.ns.ip(*self.network.forget_commands(self))
        name = self.interface
        self.node.ns.ip(
            f"addr flush dev {name} scope global", f"route flush dev {name}", f"neigh flush dev {name} nud permanent"
        )

    def _take_lease(self, lease: Lease) -> None:
        self.extra_addresses.clear()
        self.lease = lease
        self.configure()
