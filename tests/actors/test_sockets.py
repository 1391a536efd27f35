"""Sockets within this machine are neither paced nor small; others are left alone."""

import socket

import pytest

from actors.sockets import fit_for_loopback, send_at_once


def options(sock):
    control = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0")
    return control, sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1"])
def test_over_loopback_nothing_is_paced(host):
    with socket.socket() as sock:
        before = options(sock)
        fit_for_loopback(sock, host)
        assert options(sock)[0] == b"reno"
        assert options(sock)[1] > before[1]


@pytest.mark.parametrize("host", ["192.0.2.1", "2001:db8::1", "0.0.0.0", "::", "1270.example"])
def test_towards_others_the_administrators_choice_stays(host):
    with socket.socket() as sock:
        before = options(sock)
        fit_for_loopback(sock, host)
        assert options(sock) == before


def test_accepted_connections_inherit_it():
    with socket.socket() as listener:
        fit_for_loopback(listener, "127.0.0.1")
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        with socket.create_connection(listener.getsockname()):
            accepted, _ = listener.accept()
            with accepted:
                assert options(accepted)[0] == b"reno"


def test_what_is_no_tcp_socket_is_borne():
    near, far = socket.socketpair()
    with near, far:
        send_at_once(near)
