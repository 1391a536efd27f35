"""Networks that are more than one NAT, or less than one: carriers, firewalls, small tables, short memories."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import ipaddress
import socket
import time

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
    Outbound,
    Ports,
)
from tests.natlab.lab import Lab
from tests.natlab.namespaces import LabError
from tests.natlab.probes import ANSWER, PORTS, Address, Servers, connects, exchange, hairpins, probe_udp, reaches


@pytest.mark.parametrize(
    ("outer", "inner", "mapping", "filtering"),
    [
        (FULL_CONE, FULL_CONE, Mapping.ENDPOINT_INDEPENDENT, Filtering.ENDPOINT_INDEPENDENT),
        (FULL_CONE, PORT_RESTRICTED, Mapping.ENDPOINT_INDEPENDENT, Filtering.ADDRESS_AND_PORT_DEPENDENT),
        (RESTRICTED, FULL_CONE, Mapping.ENDPOINT_INDEPENDENT, Filtering.ADDRESS_DEPENDENT),
        (SYMMETRIC, FULL_CONE, Mapping.ADDRESS_AND_PORT_DEPENDENT, Filtering.ADDRESS_AND_PORT_DEPENDENT),
    ],
)
def test_behind_a_carrier_the_stricter_of_both_is_seen(
    natlab: Lab, outer: Behaviour, inner: Behaviour, mapping: Mapping, filtering: Filtering
) -> None:
    servers = Servers(natlab)
    carrier = natlab.carrier_nat("isp", outer)
    home = natlab.nat("home", inner, behind=carrier)
    host = natlab.host("laptop", behind=home)
    assert ipaddress.ip_address(home.address) in ipaddress.ip_network("100.64.0.0/10")
    seen = probe_udp(host, servers)
    assert (seen.mapping, seen.filtering) == (mapping, filtering)
    assert {address for address, _ in seen.sources} == {carrier.address}


def test_two_homes_of_one_carrier_with_the_same_private_addresses(natlab: Lab) -> None:
    servers = Servers(natlab)
    carrier = natlab.carrier_nat("isp", FULL_CONE, hairpin=True)
    homes = [natlab.nat(f"home{n}", FULL_CONE, behind=carrier) for n in range(2)]
    one, other = (natlab.host(f"laptop{n}", behind=home) for n, home in enumerate(homes))
    assert one.address == other.address
    source = hairpins(one, other, servers)
    assert source
    assert source[0] == carrier.address


def test_networks_that_contain_each_other_must_differ(natlab: Lab) -> None:
    home = natlab.nat("home")
    with pytest.raises(LabError, match="both have"):
        natlab.nat("second", behind=home)
    natlab.nat("third", behind=home, lan="10.0.0.0/24")
    with pytest.raises(LabError, match="there is a 'third' already"):
        natlab.host("third")


@pytest.mark.parametrize(("outbound", "error"), [(Outbound.NO_UDP, TimeoutError), (Outbound.NO_UDP_REJECTED, OSError)])
def test_without_udp(natlab: Lab, outbound: Outbound, error: type[OSError]) -> None:
    servers = Servers(natlab)
    host = natlab.host("laptop", behind=natlab.nat("office", outbound=outbound))
    with servers.udp() as ends, host.udp(timeout=0.3) as client:
        client.connect(ends[0].getsockname())
        client.send(b"hello")
        with pytest.raises(error) as seen:
            client.recv(10)
        if error is OSError:
            assert seen.value.errno == errno.EHOSTUNREACH
        ends[0].settimeout(0.05)
        with pytest.raises(TimeoutError):
            ends[0].recv(10)
    with servers.tcp():
        assert connects(host, servers.addresses[0]).ok


def test_only_https_gets_out(natlab: Lab) -> None:
    server = natlab.host("server")
    host = natlab.host("laptop", behind=natlab.nat("hotel", outbound=Outbound.ONLY_443))
    with contextlib.ExitStack() as stack:
        for port in (80, 443, 4001):
            listener = stack.enter_context(server.socket(socket.SOCK_STREAM))
            listener.bind((server.address, port))
            listener.listen()
        tried = {
            port: connects(host, (server.address, port), timeout=ANSWER if port == 443 else 0.3)
            for port in (80, 443, 4001)
        }
    assert {port: each.ok for port, each in tried.items()} == {80: False, 443: True, 4001: False}
    assert isinstance(tried[80].error, TimeoutError)
    with server.udp(443) as far, host.udp(timeout=0.2) as client:
        far.settimeout(0.2)
        client.sendto(b"?", (server.address, 443))
        with pytest.raises(TimeoutError):
            far.recv(10)


@pytest.mark.slow
def test_short_mappings_end_after_their_life_and_not_before(natlab: Lab) -> None:
    """All kinds at once, because it is time that is tested here."""
    servers = Servers(natlab)
    kinds = {"port": PORT_RESTRICTED, "full": FULL_CONE, "symmetric": SYMMETRIC, "sequential": SYMMETRIC_SEQUENTIAL}
    life = 2
    with servers.udp() as ends, contextlib.ExitStack() as stack:
        clients, idlers = {}, {}
        for name, kind in kinds.items():
            # Preserved ports would come back the same, so the cones get random ones.
            nat = natlab.nat(f"nat-{name}", dataclasses.replace(kind, udp_life=life, ports=kind.ports or Ports.RANDOM))
            host = natlab.host(name, behind=nat)
            clients[name] = stack.enter_context(host.udp())
            idlers[name] = stack.enter_context(host.udp())

        def outside(sockets: dict[str, socket.socket] = clients) -> dict[str, Address]:
            return {name: exchange(client, ends[0]) for name, client in sockets.items()}

        first, once = outside(), outside(idlers)
        for _ in range(3):  # each packet gives a new life, so together longer than one
            _idle(0.4 * life, ends[3])
            assert outside() == first
        _idle(1.5 * life + 1, ends[3])
        later, again = outside(), outside(idlers)
        assert {name for name in kinds if later[name] == first[name] or again[name] == once[name]} == set()
        # What was let in before is unsolicited now.
        for name, client in clients.items():
            ends[0].sendto(b"late", first[name])
            ends[0].sendto(b"fence", later[name])
            assert client.recv(10) == b"fence"


def _idle(seconds: float, quiet: socket.socket) -> None:
    """Wait on a socket to which nobody sends."""
    quiet.settimeout(seconds)
    with pytest.raises(TimeoutError):
        quiet.recv(1)


def test_a_small_session_table_is_full_at_its_size(natlab: Lab) -> None:
    server = natlab.host("server")
    nat = natlab.nat("cheap", sessions=32)
    hosts = [natlab.host(name, behind=nat) for name in ("one", "other")]
    with server.udp(5000) as far, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(hosts[n % 2].udp()) for n in range(50)]
        for client in clients:
            client.sendto(b"?", (server.address, 5000))
        for client in clients[:32]:  # those that are in keep working
            client.sendto(b"!", (server.address, 5000))
        got = [far.recv(10) for _ in range(64)]
        assert (got.count(b"?"), got.count(b"!")) == (32, 32)
        far.settimeout(0.05)
        with pytest.raises(TimeoutError):
            far.recv(10)


def test_new_flows_come_at_a_limited_rate(natlab: Lab) -> None:
    server = natlab.host("server")
    host = natlab.host("laptop", behind=natlab.nat("strict", new_flows=20, new_flows_burst=5))
    with server.udp(5000) as far, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(host.udp()) for _ in range(100)]
        started = time.monotonic()
        for client in clients:
            client.sendto(b"?", (server.address, 5000))
        took = time.monotonic() - started
        passed = 0
        far.settimeout(0.1)
        with contextlib.suppress(TimeoutError):
            while passed < 100:
                far.recv(10)
                passed += 1
    # One more than the burst may pass at once, and twenty each second that the sending took.
    assert 5 <= passed <= 7 + 20 * took


def test_fragments_dropped(natlab: Lab) -> None:
    server = natlab.host("server")
    host = natlab.host("laptop", behind=natlab.nat("strict", drop_fragments=True))
    with server.udp(5000) as far, host.udp() as client:
        client.sendto(bytes(5000), (server.address, 5000))
        client.sendto(bytes(1000), (server.address, 5000))
        assert len(far.recv(10_000)) == 1000


def test_ipv6_without_translation_behind_a_stateful_firewall(natlab: Lab) -> None:
    server = natlab.host("server", ipv6=True)
    stranger = natlab.host("stranger", ipv6=True)
    nat = natlab.nat("home", ipv6=True)
    host = natlab.host("laptop", behind=nat, ipv6=True)
    only4 = natlab.host("printer", behind=nat)
    assert ipaddress.ip_address(host.address6).is_global
    with server.udp(5000, server.address6) as far, host.udp(6000, "::") as client, stranger.udp(7000, "::") as other:
        assert exchange(client, far) == (host.address6, 6000)
        assert not reaches(other, (host.address6, 6000), client, fence=far)
        client.sendto(b"out", (stranger.address6, 7000))
        assert other.recv(10) == b"out"
        assert reaches(other, (host.address6, 6000), client, fence=far)
    with host.socket(socket.SOCK_STREAM, socket.AF_INET6) as listener:
        listener.bind(("::", 22))
        listener.listen()
        assert isinstance(connects(stranger, (host.address6, 22), timeout=0.3).error, TimeoutError)
        assert connects(host, (host.address6, 22)).ok
    with server.socket(socket.SOCK_STREAM, socket.AF_INET6) as listener:
        listener.bind(("::", 443))
        listener.listen()
        assert connects(host, (server.address6, 443)).ok
        assert isinstance(connects(only4, (server.address6, 443)).error, OSError)
    with pytest.raises(LabError, match="no IPv6 address"):
        _ = only4.address6


def test_ipv6_follows_the_outbound_rules(natlab: Lab) -> None:
    server = natlab.host("server", ipv6=True)
    host = natlab.host("laptop", behind=natlab.nat("hotel", ipv6=True, outbound=Outbound.ONLY_443), ipv6=True)
    with contextlib.ExitStack() as stack:
        for port in (443, 4001):
            listener = stack.enter_context(server.socket(socket.SOCK_STREAM, socket.AF_INET6))
            listener.bind((server.address6, port))
            listener.listen()
        assert connects(host, (server.address6, 443)).ok
        assert not connects(host, (server.address6, 4001), timeout=0.3).ok


def test_servers_answer_on_two_addresses_and_two_ports(natlab: Lab) -> None:
    servers = Servers(natlab)
    assert len(set(servers.addresses)) == 4
    assert {port for _, port in servers.addresses} == set(PORTS)
    host = natlab.host("open")
    seen = probe_udp(host, servers)
    assert seen.sources == (seen.inside,) * 4
    assert seen.filtering is Filtering.ENDPOINT_INDEPENDENT
