"""Shaped links delay, lose and slow down real packets as asked, on either kind of device, and change at any time."""

from __future__ import annotations

import errno
import socket
import threading
import time
from collections.abc import Callable

import pytest

from tests.natlab.forwarder import Shape
from tests.natlab.lab import Host, Lab
from tests.natlab.namespaces import LabError
from tests.natlab.probes import exchange
from tests.natlab.wires import Device, best_device

DEVICES: list[Device] = ["tap", "packet"]
SLACK = 0.2  # seconds that a busy machine may add; the lower bounds are what a fault would break
DONT_FRAGMENT = 2  # IP_PMTUDISC_DO
IP_MTU_DISCOVER = 10
IP_MTU = 14
PORT = 9000


@pytest.fixture(params=DEVICES)
def lab(request: pytest.FixtureRequest, natlab_factory: Callable[..., Lab]) -> Lab:
    if request.param == "tap" and best_device() != "tap":
        pytest.skip("/dev/net/tun may not be opened here; links use packet sockets instead, which are tested")
    return natlab_factory(device=request.param)


def round_trip(client: Host, server: Host) -> float:
    with client.udp() as one, server.udp(PORT, server.address) as other:
        started = time.monotonic()
        exchange(one, other, tries=1)
        return time.monotonic() - started


def burst(sender: Host, receiver: Host, count: int, size: int = 100) -> list[int]:
    """Numbers of the datagrams that arrive, of `count` that are sent at once and a last one over a good way back."""
    arrived: list[int] = []
    with receiver.udp(PORT) as sink, sender.udp() as source:
        sink.settimeout(0.5)
        for number in range(count):
            source.sendto(number.to_bytes(4, "big") + bytes(size - 4), (receiver.address, PORT))
            if number % 50 == 49:  # no socket buffer on the way is that large
                _drain(sink, arrived, until=number)
        _drain(sink, arrived, until=count - 1)
    return arrived


def _drain(sink: socket.socket, arrived: list[int], until: int) -> None:
    sink.settimeout(0.1)
    try:
        while not arrived or arrived[-1] < until:
            arrived.append(int.from_bytes(sink.recv(65536)[:4], "big"))
    except TimeoutError:
        return


def test_delay_of_the_first_packet_and_of_every_other(lab: Lab) -> None:
    """Also the first: nobody has to ask for an Ethernet address over the slow cable."""
    server = lab.host("server", link=lab.link(delay=0.01))
    links = [lab.link(delay=0.005), lab.link(delay=0.02)]
    inside = lab.host("inside", behind=lab.nat("home", link=links[1]), link=links[0])
    times = [round_trip(inside, server) for _ in range(10)]
    assert 0.07 <= min(times) < 0.07 + SLACK / 4
    assert times[0] < 0.07 + SLACK
    assert sorted(times)[5] < 0.07 + SLACK
    # Nothing travels but what was sent.
    assert [counted["passed"] for link in links for counted in link.counters()] == [10] * 4


def test_each_direction_has_its_own_shape(lab: Lab) -> None:
    link = lab.link(out=Shape(delay=0.05), back=Shape(delay=0.001))
    host, server = lab.host("host", link=link), lab.host("server")
    with host.udp() as client, server.udp(PORT, server.address) as far:
        started = time.monotonic()
        client.sendto(b"?", far.getsockname())
        _, source = far.recvfrom(10)
        there = time.monotonic() - started
        far.sendto(b"!", source)
        client.recv(10)
        back = time.monotonic() - started - there
    assert 0.05 <= there < 0.05 + SLACK
    assert 0.001 <= back < there


def test_loss_is_seeded(natlab_factory: Callable[..., Lab]) -> None:
    """The same seed loses the same packets; only those that this test sends travel on the cable."""
    results = []
    for seed in (7, 7, 8):
        lab = natlab_factory(seed=seed)
        link = lab.link(out=Shape(loss=0.2))
        host, server = lab.host("host", link=link), lab.host("server")
        arrived = burst(host, server, 400)
        counted = link.counters()[0]
        assert counted["passed"] == len(arrived)
        assert counted["passed"] + counted["lost"] == 400
        results.append(arrived)
    assert results[0] == results[1]
    assert results[0] != results[2]
    assert 280 < len(results[0]) < 360


def test_changes_are_in_force_at_once(lab: Lab) -> None:
    link = lab.link()
    host, server = lab.host("host", link=link), lab.host("server")
    assert round_trip(host, server) < SLACK
    link.change(delay=0.1)
    assert round_trip(host, server) >= 0.2
    link.change("out", delay=0.0)
    assert 0.1 <= min(round_trip(host, server) for _ in range(3)) < 0.2
    link.change(delay=0.0)
    assert link.out == link.back == Shape()
    link.cut()
    with host.udp() as client, server.udp(PORT, server.address, timeout=0.2) as far:
        client.sendto(b"?", far.getsockname())
        with pytest.raises(TimeoutError):
            far.recv(10)
    link.mend()
    assert round_trip(host, server) < SLACK


def test_bandwidth(lab: Lab) -> None:
    """A megabyte over 20 Mbit/s takes 0.4 s at least, and a TCP that knows its trade gets most of it.

    Not necessarily on a machine that has no time for it, so it may try again; too fast it must never be.
    """
    amount = 1_000_000
    host, server = lab.host("host", link=lab.link(rate=20e6)), lab.host("server")
    taken = []
    while len(taken) < 5 and not (taken and min(taken) < 2.5):
        taken.append(transfer(host, server, amount))
    assert amount * 8 / 20e6 * 0.95 < min(taken) < 2.5


def transfer(host: Host, server: Host, amount: int) -> float:
    """Seconds until so many bytes have come through a new TCP connection."""
    with server.socket(socket.SOCK_STREAM) as listener, host.socket(socket.SOCK_STREAM) as client:
        listener.bind((server.address, PORT))
        listener.listen()
        client.connect(listener.getsockname())
        accepted, _ = listener.accept()
        with accepted:

            def send() -> None:
                client.sendall(bytes(amount))
                client.shutdown(socket.SHUT_WR)

            sender = threading.Thread(target=send)
            started = time.monotonic()
            sender.start()
            received = 0
            while got := accepted.recv(65536):
                received += len(got)
            took = time.monotonic() - started
            sender.join()
    assert received == amount
    return took


def test_large_packets_and_checksums_survive(lab: Lab) -> None:
    """Frames that the kernel would give to a network card unfinished are complete on the shaped cable."""
    host, server = lab.host("host", behind=lab.nat("home"), link=lab.link()), lab.host("server", link=lab.link())
    with host.udp() as client, server.udp(PORT, server.address) as far:
        for size in (1, 1472, 1473, 20_000):
            exchange(client, far, bytes(range(256)) * (size // 256) + bytes(size % 256), tries=1)


def _send_without_fragmenting(client: socket.socket, size: int) -> None:
    client.send(bytes(size - 28))


def test_small_mtu_is_told_by_the_router(natlab: Lab) -> None:
    server = natlab.host("server")
    nat = natlab.nat("home", link=natlab.link(mtu=1280))
    host = natlab.host("host", behind=nat)
    with host.udp(timeout=0.3) as client, server.udp(PORT, server.address) as far:
        client.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, DONT_FRAGMENT)
        client.connect(far.getsockname())
        _send_without_fragmenting(client, 1500)
        with pytest.raises(OSError) as told:  # noqa: PT011 - judged by its number
            client.recv(10)
        assert told.value.errno == errno.EMSGSIZE
        assert client.getsockopt(socket.IPPROTO_IP, IP_MTU) == 1280
        _send_without_fragmenting(client, 1280)
        assert len(far.recv(2000)) == 1280 - 28


def test_a_path_mtu_black_hole_tells_nobody(lab: Lab) -> None:
    server = lab.host("server")
    host = lab.host("host", behind=lab.nat("home", link=lab.link(black_hole=1280)))
    with host.udp(timeout=0.3) as client, server.udp(PORT, server.address) as far:
        client.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, DONT_FRAGMENT)
        client.connect(far.getsockname())
        _send_without_fragmenting(client, 1281)
        _send_without_fragmenting(client, 1280)
        assert len(far.recv(2000)) == 1280 - 28
        with pytest.raises(TimeoutError):
            client.recv(10)
        assert client.getsockopt(socket.IPPROTO_IP, IP_MTU) == 1500


def test_tcp_stalls_in_a_black_hole(natlab: Lab) -> None:
    """The connection opens and small answers come: what makes such paths so hard to recognise."""
    server = natlab.host("server")
    host = natlab.host("host", behind=natlab.nat("home", link=natlab.link(black_hole=1280)))
    with server.socket(socket.SOCK_STREAM) as listener, host.socket(socket.SOCK_STREAM) as client:
        listener.bind((server.address, PORT))
        listener.listen()
        client.connect(listener.getsockname())
        accepted, _ = listener.accept()
        with accepted:
            client.sendall(b"small")
            assert accepted.recv(100) == b"small"
            client.sendall(bytes(5000))
            accepted.settimeout(0.5)
            with pytest.raises(TimeoutError):
                accepted.recv(100)


def test_a_link_has_one_node(natlab: Lab) -> None:
    link = natlab.link(delay=0.01)
    with pytest.raises(LabError, match="not the uplink"):
        link.counters()
    natlab.host("one", link=link)
    with pytest.raises(LabError, match="two ends"):
        natlab.host("two", link=link)
    with pytest.raises(ValueError, match="Shape"):
        link.change(loss=2)
    assert link.out.loss == 0
