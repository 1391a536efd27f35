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
        assert 0 <= wire.acknowledged_ago() < 5
        wait_until(lambda: wire.acknowledged_ago() > 0.1, within=5, what="time passes")
        client.send(b"hello")
        wait_until(lambda: wire.acknowledged_ago() < 0.1, within=5, what="an acknowledgement")


def test_what_is_sent_must_be_acknowledged_in_time():
    client, server = tcp_pair()
    with client, server:
        wire_of(client)
        assert client.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == UNACKNOWLEDGED * 1000


def test_nobody_knows_of_a_socket_that_is_not_tcp():
    one, other = socket.socketpair()
    with one, other:
        assert wire_of(one).acknowledged_ago() is None
