"""The nftables rules that make a router behave like a given NAT.

Theory of operation. Linux's own source NAT keeps a port while it can and picks one per flow when it cannot, so it is
"endpoint-independent" only by luck. Here sets and maps, filled by the packets themselves, decide:

    outside   inside address and port (and, for address-dependent mapping, destination) -> outside port
    inside    outside port -> inside address and port: whom a packet from outside is for
    taken     outside ports in use
    welcome   outside port and remote address: who was written to (address-dependent filtering)

    postrouting nat     a new flow of a known inside endpoint reuses its port from `outside`; an unknown one gets a
                        port as the behaviour says
    postrouting, after  `learn` sees the port that was really chosen and writes it to the maps, again with each packet,
                        so that their time-out is that of an idle mapping
    prerouting nat      a new flow from outside goes where `inside` says, if the filtering lets it; address-and-port-
                        dependent filtering needs no rule: only packets of known flows come in
    forward             from outside only known flows and those that prerouting let in; from inside what `outbound`
                        allows
    input               what is left is unsolicited

Unsolicited packets must not be accepted by the router itself, see `behaviour.Unsolicited`.
"""

from __future__ import annotations

from collections.abc import Iterator

from tests.natlab.behaviour import Behaviour, Filtering, Mapping, Outbound, Ports, Unsolicited

FIRST_SEQUENTIAL_PORT = 40000
SEQUENTIAL_PORTS = 1024
TABLE_SIZE = 65535


def _table(family: str, body: Iterator[str]) -> str:
    # Declared, deleted and made anew in one transaction: loading again empties the maps, as a reboot does.
    head = f"table {family} natlab\ndelete table {family} natlab\ntable {family} natlab {{\n"
    return head + "\n".join(body) + "\n}\n"


def _chain(name: str, hook: str, rules: Iterator[str]) -> str:
    return f" chain {name} {{\n  type {hook}\n" + "".join(f"  {rule}\n" for rule in rules) + " }"


def _dictionary(kind: str, name: str, types: str) -> str:
    return f" {kind} {name} {{\n  type {types}\n  flags dynamic,timeout\n  size {TABLE_SIZE}\n }}"


def nat_rules(behaviour: Behaviour, outside: str) -> str:
    """The script for a NAT with interfaces `wan` and `lan`.

    Args:
        outside: its IPv4 address on `wan`.
    """
    return _table("ip", _nat_table(behaviour, outside))


def _nat_table(behaviour: Behaviour, outside: str) -> Iterator[str]:
    by_address = behaviour.mapping is Mapping.ADDRESS_DEPENDENT
    destination = " . ipv4_addr" if by_address else ""
    yield _dictionary("map", "outside", f"inet_proto . ipv4_addr . inet_service{destination} : inet_service")
    yield _dictionary("map", "inside", "inet_proto . inet_service : ipv4_addr . inet_service")
    yield _dictionary("set", "taken", "inet_proto . inet_service")
    yield _dictionary("set", "welcome", "inet_proto . inet_service . ipv4_addr")
    if behaviour.drop_fragments:  # before the connection tracking puts them together
        yield _chain("fragments", "filter hook prerouting priority -500", iter(["ip frag-off & 0x3fff != 0 drop"]))
    yield _chain("prerouting", "nat hook prerouting priority dstnat", _arriving(behaviour, outside))
    yield _chain("postrouting", "nat hook postrouting priority srcnat", _leaving(behaviour, outside))
    yield _chain("learn", "filter hook postrouting priority srcnat + 50", _learning(behaviour))
    yield _chain("forward", "filter hook forward priority filter", _forwarding(behaviour, "icmp"))
    yield _chain("input", "filter hook input priority filter", _unsolicited(behaviour))


def _arriving(behaviour: Behaviour, outside: str) -> Iterator[str]:
    to_inside = "dnat ip to meta l4proto . th dport map @inside"
    if behaviour.filtering is Filtering.ENDPOINT_INDEPENDENT:
        yield f'iifname "wan" ip daddr {outside} meta l4proto {{ tcp, udp }} {to_inside}'
    elif behaviour.filtering is Filtering.ADDRESS_DEPENDENT:
        welcome = "meta l4proto . th dport . ip saddr @welcome"
        yield f'iifname "wan" ip daddr {outside} meta l4proto {{ tcp, udp }} {welcome} {to_inside}'
    if behaviour.hairpin:
        yield f'iifname "lan" ip daddr {outside} meta l4proto {{ tcp, udp }} {to_inside}'


def _leaving(behaviour: Behaviour, outside: str) -> Iterator[str]:
    by_address = " . ip daddr" if behaviour.mapping is Mapping.ADDRESS_DEPENDENT else ""
    reuse = f"snat ip to {outside} : meta l4proto . ip saddr . th sport{by_address} map @outside"
    if behaviour.hairpin:
        hairpin = 'iifname "lan" oifname "lan" ct status dnat'
        if behaviour.mapping is Mapping.ENDPOINT_INDEPENDENT:
            yield f"{hairpin} meta l4proto {{ tcp, udp }} {reuse}"
        yield f"{hairpin} meta l4proto {{ tcp, udp }} snat ip to {outside}"
    ours = 'oifname "wan" meta l4proto { tcp, udp }'
    if behaviour.mapping is not Mapping.ADDRESS_AND_PORT_DEPENDENT:
        yield f"{ours} {reuse}"  # an unknown endpoint falls through
    match behaviour.allocation:
        case Ports.PRESERVED:
            yield f'oifname "wan" meta l4proto . th sport @taken snat ip to {outside} fully-random'
            yield f"{ours} snat ip to {outside}"
        case Ports.RANDOM:
            yield f"{ours} snat ip to {outside} fully-random"
        case Ports.SEQUENTIAL:
            # A map, because `numgen ... offset` counts in the byte order of the machine, in steps of 256.
            last = FIRST_SEQUENTIAL_PORT + SEQUENTIAL_PORTS
            ports = ", ".join(f"{n} : {port}" for n, port in enumerate(range(FIRST_SEQUENTIAL_PORT, last)))
            yield f"{ours} snat ip to {outside} : numgen inc mod {SEQUENTIAL_PORTS} map {{ {ports} }}"
    yield f'oifname "wan" snat ip to {outside}'


def _learning(behaviour: Behaviour) -> Iterator[str]:
    by_address = " . ip daddr" if behaviour.mapping is Mapping.ADDRESS_DEPENDENT else ""
    yield 'iifname != "lan" return'
    for protocol, life in (("udp", behaviour.udp_life), ("tcp", behaviour.tcp_life)):
        # In packets of a flow that began outside, the inside endpoint is the source of the *reply* direction.
        for way in ("original", "reply"):
            match = f"ct direction {way} meta l4proto {protocol}"
            inner = f"ct {way} ip saddr . ct {way} proto-src"
            yield f"{match} update @outside {{ meta l4proto . {inner}{by_address} timeout {life}s : th sport }}"
            yield f"{match} update @inside {{ meta l4proto . th sport timeout {life}s : {inner} }}"
        yield f"meta l4proto {protocol} update @taken {{ meta l4proto . th sport timeout {life}s }}"
        yield f"meta l4proto {protocol} update @welcome {{ meta l4proto . th sport . ip daddr timeout {life}s }}"


def _forwarding(behaviour: Behaviour, icmp: str) -> Iterator[str]:
    yield 'iifname "wan" ct state established,related accept'
    yield 'iifname "wan" ct status dnat accept'
    yield 'iifname "wan" drop'
    match behaviour.outbound:
        case Outbound.NO_UDP:
            yield "meta l4proto udp drop"
        case Outbound.NO_UDP_REJECTED:
            yield f"meta l4proto udp reject with {icmp} admin-prohibited"
        case Outbound.ONLY_443:
            yield "ct state established,related accept"
            yield "tcp dport != 443 drop"
            yield "meta l4proto != tcp drop"
        case Outbound.ANYTHING:
            pass
    # Judged by the very first packet: until an answer comes, those that follow are "new" as well.
    first = "ct state new ct status & confirmed == 0"
    if behaviour.new_flows:
        rate = f"limit rate over {behaviour.new_flows}/second burst {behaviour.new_flows_burst} packets"
        yield f"{first} {rate} drop"
    if behaviour.sessions:
        yield f"{first} ct count over {behaviour.sessions} drop"


def _unsolicited(behaviour: Behaviour) -> Iterator[str]:
    yield 'iifname != "wan" accept'
    yield "ct state established,related accept"
    yield "icmp type echo-request accept"
    match behaviour.unsolicited:
        case Unsolicited.REJECT:
            yield "meta l4proto tcp reject with tcp reset"
            yield "reject with icmp port-unreachable"
        case Unsolicited.DROP:
            yield "drop"
        case Unsolicited.ACCEPT:
            yield "accept"


def firewall6_rules(behaviour: Behaviour) -> str:
    """The script for IPv6 without translation: what inside hosts began may come in, and nothing else."""
    return _table("ip6", _firewall6(behaviour))


def _firewall6(behaviour: Behaviour) -> Iterator[str]:
    essential = (
        "icmpv6 type { packet-too-big, nd-neighbor-solicit, nd-neighbor-advert, nd-router-solicit, echo-request }"
    )
    yield _chain("forward", "filter hook forward priority filter", _forwarding(behaviour, "icmpv6"))
    yield _chain(
        "input",
        "filter hook input priority filter",
        iter(['iifname != "wan" accept', "ct state established,related accept", f"{essential} accept", "drop"]),
    )
