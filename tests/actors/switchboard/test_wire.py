"""What a TCP connection's kernel tells about the other end."""

import socket
import types

import pytest

from actors.config.schema import LONGEST_SILENCE
from actors.switchboard.wire import LONGEST_RETRY, SocketWire
from tests.actors.switchboard.support import tcp_pair
from tests.support.processes import wait_until

RTO_MAX_MS = 44  # TCP_RTO_MAX_MS of Linux 6.15


def wire_of(sock):
    return SocketWire(types.SimpleNamespace(scratch=None, call_soon=None), sock)


def test_acknowledgements_are_told():
    client, server = tcp_pair()
    with client, server:
        wire = wire_of(client)
        assert 0 <= wire.acknowledgement().ago < 5
        wait_until(lambda: wire.acknowledgement().ago > 0.1, within=5, what="time passes")
        client.send(b"hello")
        wait_until(lambda: wire.acknowledgement().ago < 0.1, within=5, what="an acknowledgement")
        wait_until(lambda: not wire.acknowledgement().outstanding, within=5, what="all is acknowledged")
        before = wire.acknowledgement().acknowledged
        client.send(b"hello again")
        wait_until(lambda: wire.acknowledgement().acknowledged == before + 11, within=5, what="all of it is counted")


def test_what_is_not_acknowledged_is_told(natlab):
    server = natlab.host("server", link=natlab.link())
    laptop = natlab.host("laptop")
    with server.socket(socket.SOCK_STREAM) as listener, laptop.socket(socket.SOCK_STREAM) as client:
        listener.bind((server.address, 5000))
        listener.listen()
        client.connect(listener.getsockname())
        wire = wire_of(client)
        server.uplink.link.cut()
        client.send(b"hello")
        assert wire.acknowledgement().outstanding
        wait_until(lambda: wire.acknowledgement().ago > 0.5, within=5, what="time passes")
        assert wire.acknowledgement().outstanding
        server.uplink.link.mend()
        wait_until(lambda: not wire.acknowledgement().outstanding, within=20, what="it is sent again")


@pytest.mark.slow
def test_the_kernel_gives_nothing_up_and_sends_again_soon_after_the_network_is_back(natlab):
    server = natlab.host("server", link=natlab.link())
    laptop = natlab.host("laptop")
    with server.socket(socket.SOCK_STREAM) as listener, laptop.socket(socket.SOCK_STREAM) as client:
        listener.bind((server.address, 5000))
        listener.listen()
        client.connect(listener.getsockname())
        wire = wire_of(client)
        if client.getsockopt(socket.IPPROTO_TCP, RTO_MAX_MS) != LONGEST_RETRY * 1000:
            pytest.skip("this kernel retries when it likes")
        server.uplink.link.cut()
        client.send(b"hello")
        wait_until(lambda: wire.acknowledgement().ago > 26, within=40, what="time passes")  # 26 more without the option
        server.uplink.link.mend()
        wait_until(lambda: not wire.acknowledgement().outstanding, within=LONGEST_RETRY + 3, what="it is sent again")


def test_a_slow_reader_that_takes_little_by_little_is_not_given_up():
    """The kernel counts the time for which a receiver's window is full, whatever it takes: it must not be the judge."""
    client, server = tcp_pair()
    with client, server:
        wire_of(client)
        assert client.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) > LONGEST_SILENCE * 1000


def test_nobody_knows_of_a_socket_that_is_not_tcp():
    one, other = socket.socketpair()
    with one, other:
        assert wire_of(one).acknowledgement() is None
