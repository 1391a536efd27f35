"""What happens to networks while one uses them: moving, rebooting, flapping, new addresses."""

from __future__ import annotations

import contextlib
import errno
import socket
import threading
from collections.abc import Callable, Sequence

import pytest

from tests.natlab.behaviour import FULL_CONE, SYMMETRIC, Behaviour, Ports
from tests.natlab.lab import Host, Lab
from tests.natlab.namespaces import LabError
from tests.natlab.probes import Servers, exchange, probe_udp, reaches
from tests.support.processes import wait_until


@pytest.mark.parametrize("shaped", [False, True], ids=["plain", "shaped"])
def test_a_host_moves_with_its_interface_and_its_sockets(natlab: Lab, *, shaped: bool) -> None:
    servers = Servers(natlab)
    home, cafe = natlab.nat("home"), natlab.nat("cafe", SYMMETRIC, lan="10.7.0.0/24")
    host = natlab.host("laptop", behind=home, link=natlab.link(delay=0.002) if shaped else None)
    before = host.ns.interfaces(), host.uplink.mac
    with servers.udp() as ends, host.udp(5000) as client:
        assert exchange(client, ends[0]) == (home.address, 5000)
        host.move(cafe)
        assert host.address == "10.7.0.2"
        source = exchange(client, ends[0])
        assert source[0] == cafe.address
        assert not reaches(ends[0], (home.address, 5000), client, fence=ends[0], fence_to=source)
        host.move(natlab.core)  # a public address of its own
        assert exchange(client, ends[0]) == (host.address, 5000)
        host.move(home)
        assert exchange(client, ends[0])[0] == home.address
    assert (host.ns.interfaces(), host.uplink.mac) == before
    assert [uplink.node for uplink in home.members] == [host]
    assert not cafe.members


def test_ipv6_changes_with_the_network(natlab: Lab) -> None:
    server = natlab.host("server", ipv6=True)
    home, cafe = natlab.nat("home", ipv6=True), natlab.nat("cafe", ipv6=True)
    old_style = natlab.nat("old")
    host = natlab.host("laptop", behind=home, ipv6=True)
    with server.udp(5000, server.address6) as far, host.udp(6000, "::") as client:
        seen = {exchange(client, far)}
        host.move(cafe)
        seen.add(exchange(client, far))
        assert seen == {(host.address6, 6000), ("3ffe:1:2:1::101", 6000)}
        host.move(old_style)
        with pytest.raises(OSError, match="unreachable"):
            client.sendto(b"?", far.getsockname())
        host.move(home)
        assert exchange(client, far) == (host.address6, 6000)


def test_a_second_uplink_takes_over(natlab: Lab) -> None:
    servers = Servers(natlab)
    home, mobile = natlab.nat("home"), natlab.carrier_nat("mobile")
    host = natlab.host("phone", behind=home)
    cellular = host.add_uplink(mobile, link=natlab.link(delay=0.005))
    with servers.udp() as ends, host.udp(5000) as client:
        assert exchange(client, ends[0])[0] == home.address
        host.uplink.down()
        assert exchange(client, ends[0])[0] == mobile.address
        host.uplink.up()
        assert exchange(client, ends[0])[0] == home.address
        cellular.down()
        host.uplink.down()
        with pytest.raises(OSError, match="unreachable") as error:
            client.sendto(b"?", ends[0].getsockname())
        assert error.value.errno == errno.ENETUNREACH


@pytest.mark.parametrize("where", ["home", "core"])
def test_an_interface_that_flaps_comes_back_as_it_was(natlab: Lab, where: str) -> None:
    servers = Servers(natlab)
    host = natlab.host("laptop", behind=natlab.nat("home") if where == "home" else None, ipv6=where == "core")
    with servers.udp() as ends, host.udp(5000) as client:
        before = exchange(client, ends[0])
        for _ in range(3):
            host.uplink.down()
            with pytest.raises(OSError, match="unreachable"):
                client.sendto(b"?", ends[0].getsockname())
            host.uplink.up()
            assert exchange(client, ends[0], tries=1) == before


def test_a_pulled_cable_loses_packets_but_no_routes(natlab: Lab) -> None:
    servers = Servers(natlab)
    host = natlab.host("laptop", behind=natlab.nat("home"))
    with servers.udp() as ends, host.udp(5000) as client:
        exchange(client, ends[0])
        host.uplink.unplug()
        client.sendto(b"lost", ends[0].getsockname())
        ends[0].settimeout(0.05)
        with pytest.raises(TimeoutError):
            ends[0].recv(10)
        ends[0].settimeout(5)
        host.uplink.plug_in()
        exchange(client, ends[0], tries=1)


@pytest.mark.parametrize(
    ("behaviour", "same_port"),
    [(FULL_CONE, True), (SYMMETRIC, False), (Behaviour(ports=Ports.RANDOM), False)],
    ids=["preserving", "symmetric", "random cone"],
)
def test_after_a_reboot_a_nat_knows_nobody(natlab: Lab, behaviour: Behaviour, *, same_port: bool) -> None:
    servers = Servers(natlab)
    nat = natlab.nat("home", behaviour)
    host = natlab.host("laptop", behind=nat)
    with servers.udp() as ends, host.udp(5000) as client:
        before = exchange(client, ends[0])
        assert nat.mappings()
        nat.power_off()
        client.sendto(b"lost", ends[0].getsockname())
        nat.power_on()
        assert nat.mappings() == {}
        ends[0].sendto(b"unsolicited now", before)
        client.sendto(b"?", ends[0].getsockname())
        got, after = ends[0].recvfrom(100)
        ends[0].sendto(b"answer", after)
        assert (got, client.recv(100)) == (b"?", b"answer")
        assert (after == before) == same_port
    assert probe_udp(host, servers).mapping is behaviour.mapping


@pytest.mark.parametrize("survives", [True, False])
def test_tcp_over_a_reboot(natlab: Lab, *, survives: bool) -> None:
    """With preserved ports and connections picked up in the middle it survives; otherwise nothing passes any more."""
    server = natlab.host("server")
    nat = natlab.nat("home", tcp_loose=survives)
    host = natlab.host("laptop", behind=nat)
    with server.socket(socket.SOCK_STREAM) as listener, host.socket(socket.SOCK_STREAM) as client:
        listener.bind((server.address, 5000))
        listener.listen()
        client.connect(listener.getsockname())
        accepted, _ = listener.accept()
        with accepted:
            nat.reboot()
            client.sendall(b"still there?")
            accepted.settimeout(5 if survives else 1)
            with contextlib.nullcontext() if survives else pytest.raises(TimeoutError):
                assert accepted.recv(100) == b"still there?"


def test_the_provider_gives_a_new_address(natlab: Lab) -> None:
    servers = Servers(natlab)
    nat = natlab.nat("home", FULL_CONE, ipv6=True)
    host = natlab.host("laptop", behind=nat, ipv6=True)
    with servers.udp() as ends, host.udp(5000) as client:
        old = exchange(client, ends[0])
        new = nat.new_address("198.51.100.77")
        assert new == nat.address == "198.51.100.77"
        assert exchange(client, ends[0]) == (new, 5000)
        assert not reaches(ends[0], old, client, fence=ends[0], fence_to=(new, 5000))
    server6 = natlab.host("server6", ipv6=True)
    with server6.udp(5000, server6.address6) as far, host.udp(6000, "::") as client:
        assert exchange(client, far) == (host.address6, 6000)  # IPv6 stays


def test_a_host_gets_a_new_public_address(natlab: Lab) -> None:
    servers = Servers(natlab)
    host = natlab.host("vps", address="198.51.100.5")
    with servers.udp() as ends, host.udp(5000) as client:
        assert exchange(client, ends[0]) == ("198.51.100.5", 5000)
        host.uplink.new_address()
        assert exchange(client, ends[0]) == (host.address, 5000)
        assert host.address.startswith("128.66.")


def test_a_nat_becomes_another_kind(natlab: Lab) -> None:
    servers = Servers(natlab)
    nat = natlab.nat("home", FULL_CONE)
    host = natlab.host("laptop", behind=nat)
    assert probe_udp(host, servers).mapping is FULL_CONE.mapping
    nat.become(SYMMETRIC)
    seen = probe_udp(host, servers)
    assert (seen.mapping, seen.filtering) == (SYMMETRIC.mapping, SYMMETRIC.filtering)


def test_programs_that_watch_the_kernel_hear_of_changes(natlab: Lab) -> None:
    """Address changes are real: routing messages (RTM_NEWADDR, RTM_DELADDR) arrive in the host."""
    home, cafe = natlab.nat("home"), natlab.nat("cafe", lan="10.7.0.0/24")
    host = natlab.host("laptop", behind=home)
    heard: set[int] = set()
    with host.ns.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as watcher:
        watcher.bind((0, 0x10))  # RTMGRP_IPV4_IFADDR
        watcher.setblocking(False)

        def both() -> bool:
            with contextlib.suppress(BlockingIOError):
                while message := watcher.recv(65536):
                    heard.add(int.from_bytes(message[4:6], "little"))
            return heard >= {20, 21}

        host.move(cafe)
        wait_until(both, within=5, what="an address went and another came")


def test_traffic_goes_on_while_links_and_nats_change(natlab: Lab) -> None:
    """A stream of packets survives everything at once; how many are lost is what the events cost."""
    server = natlab.host("server", link=natlab.link(delay=0.002, loss=0.05))
    nat, other = natlab.nat("home"), natlab.nat("cafe", lan="10.7.0.0/24")
    host = natlab.host("laptop", behind=nat, link=natlab.link(jitter=0.002))
    assert _stream_through(host, server, [nat.reboot, lambda: host.move(other), nat.new_address, host.uplink.up])


def _stream_through(host: Host, server: Host, events: Sequence[Callable[[], object]]) -> bool:
    ended = threading.Event()
    seen: list[int] = []
    with server.udp(5000, server.address, timeout=0.1) as far, host.udp(timeout=0.1) as client:

        def count() -> None:
            while not ended.is_set():
                with contextlib.suppress(TimeoutError):
                    seen.append(int.from_bytes(far.recv(10), "big"))

        counter = threading.Thread(target=count)
        counter.start()
        sent = 0
        try:
            for event in events:
                event()

                def arrives(since: int = sent) -> bool:
                    nonlocal sent
                    sent += 1
                    client.sendto(sent.to_bytes(4, "big"), (server.address, 5000))
                    return bool(seen) and seen[-1] > since + 20

                wait_until(arrives, within=10, what="packets arrive again", every=0.002)
        finally:
            ended.set()
            counter.join()
    return len(set(seen)) > 0.7 * sent


def test_only_networks_give_addresses(natlab: Lab) -> None:
    home = natlab.nat("home")
    with pytest.raises(LabError, match="no IPv6 network"):
        natlab.host("laptop", behind=home, ipv6=True)
