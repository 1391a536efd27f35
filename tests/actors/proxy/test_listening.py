import socket

import pytest

from actors.proxy.errors import ListenError, PortInUseError
from actors.proxy.listening import address_of, inherit, listen
from protocol.messages import Descriptor
from supervisor.actor import Checkpoint


@pytest.mark.parametrize("address", ["127.0.0.1:0", "localhost:0", "[::1]:0"])
def test_a_free_port_is_picked(address):
    with listen(address) as sock:
        port = sock.getsockname()[1]
        assert port
        assert address_of(sock).endswith(f":{port}")


def test_a_port_in_use_is_told_apart():
    with listen("127.0.0.1:0") as sock, pytest.raises(PortInUseError) as caught:
        listen(address_of(sock))
    assert caught.value.code == "port-in-use"


@pytest.mark.parametrize("address", ["", "22", "host:22", "127.0.0.1:x", "127.0.0.1:65536", "127.0.0.1:-1", ":22"])
def test_what_is_not_an_address_is_refused(address):
    with pytest.raises(ListenError):
        listen(address)


def test_an_address_that_is_not_ours_is_refused():
    with pytest.raises(ListenError, match="cannot assign"):
        listen("192.0.2.1:0")


def test_only_a_listening_socket_for_the_same_address_is_inherited():
    with listen("127.0.0.1:0") as sock:
        left = Checkpoint({"wanted": "127.0.0.1:0"}, (Descriptor(sock.dup().detach()),))
        with inherit(left, "127.0.0.1:0") as found:
            assert found.getsockname() == sock.getsockname()
        left = Checkpoint({"wanted": "127.0.0.1:0"}, (Descriptor(sock.dup().detach()),))
        assert inherit(left, "127.0.0.1:2222") is None
    plain = socket.socket()
    assert inherit(Checkpoint({"wanted": "a:1"}, (Descriptor(plain.detach()),)), "a:1") is None
    assert inherit(None, "a:1") is None


def test_the_port_that_was_found_is_inherited_by_who_asks_for_that_port():
    with listen("127.0.0.1:0") as first:
        address = address_of(first)
        left = Checkpoint({"wanted": "127.0.0.1:0", "listen": address}, (Descriptor(first.dup().detach()),))
        found = inherit(left, address)
        assert found is not None
        with found:
            assert address_of(found) == address
