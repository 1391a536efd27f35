"""What a NAT does, in the words of RFC 4787 and RFC 5382. `rules.py` turns it into a firewall."""

from __future__ import annotations

import dataclasses
import enum


class Mapping(enum.Enum):
    """On what the outside port of an inside address and port depends (RFC 4787, 4.1)."""

    ENDPOINT_INDEPENDENT = "endpoint-independent"
    ADDRESS_DEPENDENT = "address-dependent"
    ADDRESS_AND_PORT_DEPENDENT = "address-and-port-dependent"


class Filtering(enum.Enum):
    """From whom a mapping lets packets in (RFC 4787, 5): anyone, addresses written to, or endpoints written to."""

    ENDPOINT_INDEPENDENT = "endpoint-independent"
    ADDRESS_DEPENDENT = "address-dependent"
    ADDRESS_AND_PORT_DEPENDENT = "address-and-port-dependent"


class Ports(enum.Enum):
    """How a new mapping's outside port is chosen (RFC 4787, 4.2)."""

    PRESERVED = "preserved"  # the inside port, unless another host has it already: then a random one
    RANDOM = "random"
    SEQUENTIAL = "sequential"  # 40000, 40001, …: what port prediction counts on


class Unsolicited(enum.Enum):
    """What becomes of a packet from outside that no mapping lets in."""

    DROP = "drop"
    REJECT = "reject"  # TCP reset, ICMP port unreachable
    # The NAT takes it for itself, as some do. The connection tracking then knows the early packet of a peer, the
    # inside host's own packet to that peer gets another port, and punching holes fails for ever.
    ACCEPT = "accept"


class Outbound(enum.Enum):
    """What the inside may send."""

    ANYTHING = "anything"
    NO_UDP = "no udp"  # dropped: programs see a time-out
    NO_UDP_REJECTED = "no udp, with an answer"  # ICMP administratively prohibited: programs see an error
    ONLY_443 = "only tcp 443"


@dataclasses.dataclass(frozen=True)
class Behaviour:
    """One kind of NAT.

    Attributes:
        mapping, filtering, unsolicited, outbound: see the classes.
        ports: None is `PRESERVED` for endpoint-independent mapping and `RANDOM` for the others, which cannot preserve
            ports: it would make them endpoint-independent.
        hairpin: inside hosts reach each other through the outside address (always filtered endpoint-independently).
        udp_life: whole seconds after which an idle UDP mapping is forgotten.
        tcp_life: the same for TCP.
        sessions: size of the session table of all inside hosts; new flows beyond it are dropped. 0: unlimited.
        new_flows: new flows per second, beyond a first burst of `new_flows_burst`, that are not dropped. 0: unlimited.
        drop_fragments: IP fragments vanish.
        tcp_loose: pick up TCP connections in the middle, as Linux does: with preserved ports they survive a reboot.
    """

    mapping: Mapping = Mapping.ENDPOINT_INDEPENDENT
    filtering: Filtering = Filtering.ADDRESS_AND_PORT_DEPENDENT
    ports: Ports | None = None
    hairpin: bool = False
    unsolicited: Unsolicited = Unsolicited.DROP
    outbound: Outbound = Outbound.ANYTHING
    udp_life: int = 120
    tcp_life: int = 7440
    sessions: int = 0
    new_flows: int = 0
    new_flows_burst: int = 5
    drop_fragments: bool = False
    tcp_loose: bool = True

    def __post_init__(self) -> None:
        if self.ports is Ports.PRESERVED and self.mapping is not Mapping.ENDPOINT_INDEPENDENT:
            raise ValueError("a NAT that preserves ports maps endpoint-independently")
        if min(self.udp_life, self.tcp_life) < 1:
            raise ValueError("a mapping lives for a whole second at least")

    @property
    def allocation(self) -> Ports:
        """`ports`, or what stands for None."""
        if self.ports is not None:
            return self.ports
        return Ports.PRESERVED if self.mapping is Mapping.ENDPOINT_INDEPENDENT else Ports.RANDOM


# The four classic names of RFC 3489, and symmetric NAT with ports that can be guessed.
FULL_CONE = Behaviour(filtering=Filtering.ENDPOINT_INDEPENDENT)
RESTRICTED = Behaviour(filtering=Filtering.ADDRESS_DEPENDENT)
PORT_RESTRICTED = Behaviour()
SYMMETRIC = Behaviour(mapping=Mapping.ADDRESS_AND_PORT_DEPENDENT)
SYMMETRIC_SEQUENTIAL = Behaviour(mapping=Mapping.ADDRESS_AND_PORT_DEPENDENT, ports=Ports.SEQUENTIAL)
