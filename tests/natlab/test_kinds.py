"""Every kind of NAT does what its name says, as our own probes see it."""

from __future__ import annotations

import itertools
import socket

import pytest

from tests.natlab.behaviour import (
    FULL_CONE,
    PORT_RESTRICTED,
    RESTRICTED,
    SYMMETRIC,
    SYMMETRIC_SEQUENTIAL,
    Behaviour,
    Filtering,
    Mapping,
    Ports,
    Unsolicited,
)
from tests.natlab.lab import Lab
from tests.natlab.probes import Servers, connects, exchange, hairpins, judge_mapping, probe_tcp, probe_udp, reaches


@pytest.mark.parametrize("filtering", Filtering, ids=lambda kind: f"{kind.value} filtering")
@pytest.mark.parametrize("mapping", Mapping, ids=lambda kind: f"{kind.value} mapping")
def test_each_mapping_with_each_filtering(natlab: Lab, mapping: Mapping, filtering: Filtering) -> None:
    servers = Servers(natlab)
    nat = natlab.nat("home", mapping=mapping, filtering=filtering)
    host = natlab.host("laptop", behind=nat)

    seen = probe_udp(host, servers)

    assert (seen.mapping, seen.filtering) == (mapping, filtering)
    assert {address for address, _ in seen.sources} == {nat.address}
    assert judge_mapping(probe_tcp(host, servers, 7000)) is mapping


@pytest.mark.parametrize("mapping", Mapping, ids=lambda kind: f"{kind.value} mapping")
def test_filtering_of_tcp(natlab: Lab, mapping: Mapping) -> None:
    """An endpoint-independent filter lets connections in to a port that a connection went out from; others do not."""
    servers = Servers(natlab)
    stranger = natlab.host("stranger")
    for filtering in (Filtering.ENDPOINT_INDEPENDENT, Filtering.ADDRESS_AND_PORT_DEPENDENT):
        nat = natlab.nat(f"nat-{filtering.name}", mapping=mapping, filtering=filtering, unsolicited=Unsolicited.REJECT)
        host = natlab.host(f"host-{filtering.name}", behind=nat)
        with host.socket(socket.SOCK_STREAM) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            listener.bind(("0.0.0.0", 7100))
            listener.listen()
            with servers.tcp() as ends, host.socket(socket.SOCK_STREAM) as out:
                out.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                out.bind(("0.0.0.0", 7100))
                out.connect(ends[0].getsockname())
                accepted, outside = ends[0].accept()
                with accepted:
                    tried = connects(stranger, outside)
        assert tried.ok == (filtering is Filtering.ENDPOINT_INDEPENDENT)
        assert tried.ok or isinstance(tried.error, ConnectionRefusedError)


def test_ports_are_preserved_random_or_sequential(natlab: Lab) -> None:
    servers = Servers(natlab)

    def ports(name: str, behaviour: Behaviour) -> list[int]:
        host = natlab.host(name, behind=natlab.nat(f"nat-{name}", behaviour))
        return [port for _, port in probe_udp(host, servers, 5555).sources]

    assert ports("preserved", PORT_RESTRICTED) == [5555] * 4
    changed = ports("changed", Behaviour(ports=Ports.RANDOM))
    assert len(set(changed)) == 1
    assert changed[0] != 5555
    random = ports("random", SYMMETRIC)
    assert len(set(random)) == 4
    assert 5555 not in random
    sequential = ports("sequential", SYMMETRIC_SEQUENTIAL)
    assert [b - a for a, b in itertools.pairwise(sequential)] == [1, 1, 1]
    one_port = ports("sequential-cone", Behaviour(ports=Ports.SEQUENTIAL))
    assert len(set(one_port)) == 1
    assert one_port[0] >= 40000


@pytest.mark.parametrize("mapping", Mapping, ids=lambda kind: f"{kind.value} mapping")
def test_two_hosts_with_one_source_port_never_share_a_mapping(natlab: Lab, mapping: Mapping) -> None:
    """Linux alone lets them share the port towards different servers, and is no cone any more from then on."""
    servers = Servers(natlab)
    nat = natlab.nat("home", mapping=mapping)
    hosts = [natlab.host(name, behind=nat) for name in ("one", "other")]
    with servers.udp() as ends, hosts[0].udp(5000) as one, hosts[1].udp(5000) as other:
        # To different servers first: nothing but our own rules keeps these two apart.
        assert exchange(one, ends[0]) != exchange(other, ends[3])
        sources = [[exchange(client, end) for end in ends] for client in (one, other)]
        again = [exchange(client, end) for client in (one, other) for end in ends]
    assert not set(sources[0]) & set(sources[1])
    assert [judge_mapping(tuple(each)) for each in sources] == [mapping, mapping]
    assert again == sources[0] + sources[1]


@pytest.mark.parametrize(
    "behaviour", [FULL_CONE, RESTRICTED, PORT_RESTRICTED, SYMMETRIC], ids=["full", "restricted", "port", "symmetric"]
)
def test_hairpin_only_where_it_is_wanted(natlab: Lab, behaviour: Behaviour) -> None:
    servers = Servers(natlab)
    for hairpin in (True, False):
        nat = natlab.nat(f"nat-{hairpin}", behaviour, hairpin=hairpin)
        one, other = (natlab.host(f"{name}-{hairpin}", behind=nat) for name in ("one", "other"))
        for receiver in (other, one):  # to another host, and to itself
            source = hairpins(one, receiver, servers)
            # The receiver sees the outside address, so that its answer goes back through the NAT (RFC 4787, REQ-9).
            assert (source and source[0]) == (nat.address if hairpin else None)


def test_hosts_behind_one_nat_reach_each_other_directly(natlab: Lab) -> None:
    nat = natlab.nat("home")
    one, other = (natlab.host(name, behind=nat) for name in ("one", "other"))
    with one.udp(4000) as client, other.udp(4000, other.address) as server:
        assert exchange(client, server) == (one.address, 4000)


def test_a_mapping_made_by_two_protocols_is_two_mappings(natlab: Lab) -> None:
    servers = Servers(natlab)
    nat = natlab.nat("home", FULL_CONE)
    host = natlab.host("laptop", behind=nat)
    probe_tcp(host, servers, 7000)
    assert set(nat.mappings()) == {("tcp", 7000)}
    with servers.udp() as ends, host.udp(7000) as client:
        exchange(client, ends[0])
    assert nat.mappings() == {("tcp", 7000): (host.address, 7000), ("udp", 7000): (host.address, 7000)}


@pytest.mark.parametrize("unsolicited", [Unsolicited.DROP, Unsolicited.REJECT])
def test_unsolicited_packets_are_dropped_or_refused(natlab: Lab, unsolicited: Unsolicited) -> None:
    nat = natlab.nat("home", unsolicited=unsolicited)
    stranger = natlab.host("stranger")
    tried = connects(stranger, (nat.address, 22), timeout=0.3)
    assert isinstance(tried.error, TimeoutError if unsolicited is Unsolicited.DROP else ConnectionRefusedError)
    with stranger.socket() as udp:
        udp.settimeout(0.3)
        udp.connect((nat.address, 4000))
        udp.send(b"hello")
        with pytest.raises(TimeoutError if unsolicited is Unsolicited.DROP else ConnectionRefusedError):
            udp.recv(100)


def test_a_full_cone_lets_a_stranger_in_and_the_stranger_sees_its_answer(natlab: Lab) -> None:
    servers = Servers(natlab)
    stranger = natlab.host("stranger")
    host = natlab.host("laptop", behind=natlab.nat("home", FULL_CONE))
    with servers.udp() as ends, host.udp() as client, stranger.udp() as other:
        outside = exchange(client, ends[0])
        assert reaches(other, outside, client, fence=ends[0])
        other.sendto(b"question", outside)
        got, source = client.recvfrom(100)
        while got != b"question":
            got, source = client.recvfrom(100)
        client.sendto(b"answer", source)
        assert other.recvfrom(100) == (b"answer", outside)


def test_behaviour_that_contradicts_itself_is_refused() -> None:
    with pytest.raises(ValueError, match="preserves ports"):
        Behaviour(mapping=Mapping.ADDRESS_DEPENDENT, ports=Ports.PRESERVED)
    with pytest.raises(ValueError, match="whole second"):
        Behaviour(udp_life=0)
