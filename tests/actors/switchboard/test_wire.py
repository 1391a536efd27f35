"""What a TCP connection's kernel tells about the other end."""

import socket
import types

from actors.switchboard.wire import UNACKNOWLEDGED, SocketWire
from tests.actors.switchboard.support import tcp_pair
from tests.support.processes import wait_until


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


def test_what_is_sent_must_be_acknowledged_in_time():
    client, server = tcp_pair()
    with client, server:
        wire_of(client)
        assert client.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == UNACKNOWLEDGED * 1000


def test_nobody_knows_of_a_socket_that_is_not_tcp():
    one, other = socket.socketpair()
    with one, other:
        assert wire_of(one).acknowledgement() is None
