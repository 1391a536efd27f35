"""A laboratory: build networks with NATs, hosts and bad cables, run programs in them, break them, throw them away.

    with Lab() as lab:
        relay = lab.host("relay", link=lab.link(delay=0.02))
        home = lab.nat("home", SYMMETRIC, link=lab.link(delay=0.02, loss=0.01))
        laptop = lab.host("laptop", behind=home)
        with laptop.enter():
            process = subprocess.Popen([...])
        home.reboot()

Everything is described in docs/natlab.md. Tests get one as the fixture `natlab` (`plugin.py`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import ipaddress
from types import TracebackType
from typing import Any, Self

from tests.natlab.behaviour import PORT_RESTRICTED, Behaviour
from tests.natlab.core import Core
from tests.natlab.forwarder import Shape
from tests.natlab.namespaces import LabError
from tests.natlab.nat import Nat
from tests.natlab.network import Lease, Network, Node, Surroundings, Uplink
from tests.natlab.wires import Attendant, Device, Link, best_device

HOME_LAN = "192.168.1.0/24"
CARRIER_LAN = "100.64.0.0/24"


class Host(Node):
    """A machine that runs programs. Made by `Lab.host`."""

    def move(self, behind: Network) -> None:
        """Join another network with the first interface; see `Uplink.move`."""
        self.uplink.move(behind)

    def add_uplink(self, behind: Network, *, link: Link | None = None, ipv6: bool = False, metric: int = 200) -> Uplink:
        """One more interface, `eth1` and so on, used when those with a smaller metric are down."""
        return Uplink(self, behind, f"eth{len(self.uplinks)}", link=link, ipv6=ipv6, metric=metric, lease=None)


class Lab:
    """One laboratory; several may exist at the same time, also in one process, and know nothing of each other.

    Nothing in it is connected to the namespace in which it is made, so nothing can leave it or come in.

    Args:
        public, public6: where the core's addresses are from. The default ones belong to nobody today and are "global"
            in the eyes of programs that ask, which addresses for documentation are not.
        seed: of all chances on shaped links; the same seed gives the n-th frame of a direction the same fate.
        device: how shaped links are made; see `wires.py`.

    Attributes:
        core: the public network.
    """

    def __init__(
        self,
        *,
        public: str = "128.66.0.0/16",
        public6: str = "3ffe:1::/32",
        seed: int = 1,
        device: Device | None = None,
    ) -> None:
        self.seed = seed
        self._device: Device = device or best_device()
        self._links = 0
        self._nodes: dict[str, Node] = {}
        self._attendant = Attendant()
        self._closed = False
        try:
            self._surroundings = Surroundings(self._attendant, public, public6)
            self.core = Core(self._surroundings)
        except BaseException:
            self._attendant.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __getitem__(self, name: str) -> Node:
        return self._nodes[name]

    @property
    def nodes(self) -> list[Node]:
        """The core, and all nodes in the order in which they were made."""
        return [self.core, *self._nodes.values()]

    @property
    def attendant_pid(self) -> int:
        """The process that carries the frames of shaped links."""
        return self._attendant.pid

    def link(self, *, mtu: int = 1500, out: Shape | None = None, back: Shape | None = None, **shape: Any) -> Link:
        """A cable with delay, loss and so on, to be given as `link` to one node.

        Args:
            shape: properties of `Shape` for both directions: `delay=0.02, loss=0.01`.
            out, back: instead, or for one direction only: towards the network, towards the node.
        """
        self._links += 1
        both = Shape(**shape)
        return Link(self._links, self.seed, self._device, mtu=mtu, out=out or both, back=back or both)

    def host(
        self,
        name: str,
        *,
        behind: Network | None = None,
        link: Link | None = None,
        ipv6: bool = False,
        address: str | None = None,
    ) -> Host:
        """A host in the public core, or behind a NAT.

        Args:
            address: a public IPv4 address for it, instead of the next free one.
        """
        network = behind or self.core
        host = Host(self._new_name(name), self._surroundings)
        self._nodes[name] = host
        Uplink(host, network, "eth0", link=link, ipv6=ipv6, metric=100, lease=self._lease(network, address, ipv6=ipv6))
        return host

    def nat(
        self,
        name: str,
        behaviour: Behaviour = PORT_RESTRICTED,
        *,
        behind: Network | None = None,
        lan: str = HOME_LAN,
        link: Link | None = None,
        ipv6: bool = False,
        address: str | None = None,
        **changes: Any,
    ) -> Nat:
        """A NAT with a network behind it.

        Args:
            behaviour: which kind; `changes` are properties of `Behaviour` that shall be otherwise:
                `lab.nat("home", mapping=Mapping.ADDRESS_DEPENDENT, filtering=Filtering.ENDPOINT_INDEPENDENT)`.
            behind: another NAT, for several levels. Its LAN must have another address.
            ipv6: IPv6 for the hosts that ask for it as well, without translation, behind a stateful firewall.
            address: a public IPv4 address for it, instead of the next free one.
        """
        network = behind or self.core
        self._new_name(name)
        nat = Nat(name, self._surroundings, dataclasses.replace(behaviour, **changes), lan=lan)
        self._nodes[name] = nat
        nat.connect(network, link=link, ipv6=ipv6, lease=self._lease(network, address, ipv6=ipv6))
        return nat

    def carrier_nat(self, name: str, behaviour: Behaviour = PORT_RESTRICTED, **options: Any) -> Nat:
        """A provider's NAT for many customers (CGNAT): `lab.nat("home", behind=lab.carrier_nat("isp"))`."""
        return self.nat(name, behaviour, lan=CARRIER_LAN, **options)

    def describe(self) -> str:
        """All networks and who is in them, for people."""
        lines: list[str] = []

        def tell(network: Network, depth: int) -> None:
            for uplink in network.members:
                node = uplink.node
                addresses = ", ".join(str(address) for address in uplink.addresses)
                how = f"  {uplink.link.out}" if uplink.link else ""
                lines.append(f"{'    ' * depth}{node.name} {uplink.interface} {addresses}{how}")
                if isinstance(node, Nat):
                    tell(node, depth + 1)

        tell(self.core, 0)
        return "\n".join(lines)

    def close(self) -> None:
        """End everything: processes in the hosts are killed, and the namespaces go away."""
        if self._closed:
            return
        self._closed = True
        with contextlib.ExitStack() as stack:
            stack.callback(self._surroundings.close)
            for node in self.nodes:
                stack.callback(node.release)
            stack.callback(self._attendant.close)  # first: it kills what `release` waits for

    def _new_name(self, name: str) -> str:
        if name in self._nodes or name == self.core.name:
            raise LabError(f"there is a {name!r} already")
        return name

    @staticmethod
    def _lease(network: Network, address: str | None, *, ipv6: bool) -> Lease | None:
        if address is None:
            return None
        lease = network.new_lease(ipv6=ipv6)
        return dataclasses.replace(lease, address=ipaddress.IPv4Interface((address, lease.address.network.prefixlen)))
