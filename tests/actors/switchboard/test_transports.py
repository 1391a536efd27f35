import contextlib
import errno
import socket

import pytest
import trio

from actors.switchboard.addresses import MAX_LEARNED, AddressBook
from actors.switchboard.errors import AddressError
from actors.switchboard.interfaces import expand, machine_addresses
from actors.switchboard.transports import (
    accept_tcp,
    connect_tcp,
    inherit_listener,
    is_dialable,
    listen_tcp,
    local_multiaddr,
    parse_route,
    remote_multiaddr,
    resolve,
)
from protocol.identify import Identification
from protocol.messages.config import AddressEntry
from protocol.multiaddr import Multiaddr

from .support import peer_of

P2P = f"/p2p/{peer_of('x')}"


@pytest.mark.parametrize("host", ["/ip4/127.0.0.1", "/ip6/::1"])
async def test_listen_connect_accept(host):
    with listen_tcp(Multiaddr(f"{host}/tcp/0")) as listener:
        address = local_multiaddr(listener)
        with await connect_tcp(address) as near:
            assert remote_multiaddr(near) == address
            await trio.lowlevel.wait_readable(listener)
            far, source = accept_tcp(listener)
            with far:
                assert source == host.split("/")[2]
                assert remote_multiaddr(far) == local_multiaddr(near)
                assert far.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert accept_tcp(listener) is None


async def test_nobody_listens():
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = local_multiaddr(free)
    with pytest.raises(AddressError, match="connection refused"):
        await connect_tcp(address)


async def test_a_process_without_descriptors_cannot_dial_and_does_not_end(monkeypatch):
    def out_of_descriptors(*_):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(socket, "socket", out_of_descriptors)
    with pytest.raises(AddressError, match="too many open files"):
        await connect_tcp(Multiaddr("/ip4/127.0.0.1/tcp/1"))


@pytest.mark.parametrize(
    "address",
    [
        "/ip4/127.0.0.1/udp/1/quic-v1",
        "/ip4/127.0.0.1/tcp/1/tls",
        "/ip4/127.0.0.1/udp/1/ws",
        "/ip4/127.0.0.1/tcp/1/ws/ws",
        "/unix/a",
        P2P,
        f"/ip4/1.2.3.4/tcp/1{P2P}/p2p-circuit{P2P}",
    ],
)
async def test_other_transports_are_not_dialled(address):
    assert not is_dialable(Multiaddr(address))
    with pytest.raises(AddressError, match="neither TCP nor WebSocket"):
        await connect_tcp(Multiaddr(address))


def test_what_can_be_dialled():
    routes = {
        "/ip4/1.2.3.4/tcp/1": ("tcp", None),
        f"/ip6/::1/tcp/1{P2P}": ("tcp", None),
        "/dns4/a.example/tcp/1": ("tcp", None),
        "/ip6zone/lo/ip6/fe80::1/tcp/1": ("tcp", None),
        f"/ip4/1.2.3.4/tcp/1/ws{P2P}": ("websocket", None),
        "/ip6zone/lo/ip6/fe80::1/tcp/1/ws": ("websocket", None),
        "/dns/a.example/tcp/443/wss": ("wss", None),
        "/ip6/::1/tcp/443/tls/ws": ("wss", None),
        f"/ip4/1.2.3.4/tcp/443/tls/sni/a.example/ws{P2P}": ("wss", "a.example"),
    }
    for text, (transport, name) in routes.items():
        assert is_dialable(Multiaddr(text)), text
        route = parse_route(Multiaddr(text))
        assert (route.transport, route.server_name) == (transport, name), text


async def test_names_resolve_to_addresses():
    found = await resolve(Multiaddr("/dns4/localhost/tcp/4001"))
    assert found == [Multiaddr("/ip4/127.0.0.1/tcp/4001")]
    for text in ("/ip4/1.2.3.4/tcp/1", "/ip4/1.2.3.4/tcp/1/ws", "/ip4/1.2.3.4/tcp/1/tls/ws"):
        assert await resolve(Multiaddr(text)) == [Multiaddr(text)]
    assert await resolve(Multiaddr("/dns4/localhost/tcp/80/ws")) == [Multiaddr("/ip4/127.0.0.1/tcp/80/ws")]
    # The name is still the one whose certificate is expected.
    for text, name in {"/wss": "localhost", "/tls/ws": "localhost", "/tls/sni/a.example/ws": "a.example"}.items():
        found = await resolve(Multiaddr(f"/dns4/localhost/tcp/443{text}"))
        assert found == [Multiaddr(f"/ip4/127.0.0.1/tcp/443/tls/sni/{name}/ws")]
    with pytest.raises(AddressError, match=r"nowhere\.invalid cannot be resolved"):
        await resolve(Multiaddr("/dns/nowhere.invalid/tcp/1"))


def test_what_cannot_be_listened_on():
    with listen_tcp(Multiaddr("/ip4/127.0.0.1/tcp/0")) as taken, pytest.raises(AddressError, match="in use"):
        listen_tcp(local_multiaddr(taken))
    with pytest.raises(AddressError, match="give an IP address"):
        listen_tcp(Multiaddr("/dns4/localhost/tcp/0"))
    with pytest.raises(AddressError, match="does not have this address"):
        listen_tcp(Multiaddr("/ip4/192.0.2.1/tcp/0"))


def test_only_a_listening_tcp_socket_is_inherited():
    listener = listen_tcp(Multiaddr("/ip4/127.0.0.1/tcp/0"))
    with listener, inherit_listener(listener.dup().detach()) as inherited:
        assert inherited.getsockname() == listener.getsockname()
    assert inherit_listener(socket.socket().detach()) is None
    near, far = socket.socketpair()
    with near:
        assert inherit_listener(far.detach()) is None
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as unix:
        unix.bind("")
        unix.listen()
        assert inherit_listener(unix.dup().detach()) is None


def test_listening_everywhere_is_announced_as_each_interface():
    plain = Multiaddr("/ip4/127.0.0.1/tcp/4001")
    assert expand(plain) == [plain]
    announced = expand(Multiaddr("/ip4/0.0.0.0/tcp/4001"))
    own = [address for address in machine_addresses() if address.version == 4 and not address.is_loopback]
    assert announced == [Multiaddr(f"/ip4/{address}/tcp/4001") for address in own]


class Told:
    """A connection whose peer has said where it listens."""

    def __init__(self, remote, *addresses, relayed=False):
        self.peer = peer_of("x")
        self.relayed = relayed
        self.remote_address = Multiaddr(remote)
        self.identification = Identification(listen_addresses=tuple(Multiaddr(text) for text in addresses))


def test_configured_addresses_come_first_and_learned_ones_are_bounded():
    book = AddressBook()
    home = Multiaddr("/dns4/home.example/tcp/4001")
    assert book.configure([AddressEntry(peer_of("x"), (home,))]) == [peer_of("x")]
    assert book.configure([AddressEntry(peer_of("x"), (home,))]) == []
    book.learn(Told("/ip4/192.0.2.1/tcp/1", *(f"/ip4/192.0.2.1/tcp/{port}" for port in range(1, 100))))
    addresses = book.addresses(peer_of("x"))
    assert addresses[0] == home
    assert len(addresses) == 1 + MAX_LEARNED
    assert book.configure([]) == [peer_of("x")]
    assert home not in book.addresses(peer_of("x"))


def test_a_loopback_address_is_believed_only_from_this_machine():
    book = AddressBook()
    told = ("/ip4/127.0.0.1/tcp/4001", "/ip4/192.168.1.5/tcp/4001", "/ip4/1.2.3.4/udp/1")
    book.learn(Told("/ip4/192.0.2.1/tcp/1", *told))
    assert book.addresses(peer_of("x")) == (Multiaddr("/ip4/192.168.1.5/tcp/4001"),)
    book.learn(Told("/ip4/127.0.0.1/tcp/1", f"/ip4/127.0.0.1/tcp/4001{P2P}"))
    assert book.addresses(peer_of("x")) == (Multiaddr("/ip4/127.0.0.1/tcp/4001"),)


def test_what_a_peer_behind_a_relay_of_this_machine_tells_is_not_of_this_machine():
    book = AddressBook()
    relay = f"/ip4/203.0.113.1/tcp/4001/p2p/{peer_of('relay')}"
    told = ("/ip4/127.0.0.1/tcp/4001", f"{relay}/p2p-circuit", "/ip4/192.0.2.7/udp/1/p2p-circuit")
    book.learn(Told("/ip4/127.0.0.1/tcp/1", *told, relayed=True))
    assert book.addresses(peer_of("x")) == (Multiaddr(f"{relay}/p2p-circuit"),)
