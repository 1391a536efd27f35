"""Switchboards that talk to each other over WebSocket, in TLS or not, and everybody else who calls there."""

import contextlib
import hashlib
import http.client
import os
import socket
import ssl

import pytest
import trio

from actors.switchboard import pipes as pipes_module
from actors.switchboard import tls as tls_module
from actors.switchboard import websocket as websocket_module
from actors.switchboard.errors import AddressError, HandshakeError
from actors.switchboard.pipes import Pipes, TlsFiles
from actors.switchboard.transports import SECURE_WEBSOCKET, TCP, WEBSOCKET, listen_tcp, local_multiaddr
from actors.switchboard.wire import SocketPipe
from protocol.messages.switchboard import Connect, PingPeer
from protocol.multiaddr import Multiaddr
from protocol.websocket import Frames, WebSocketError
from protocol.websocket_opening import ClientOpening
from supervisor.errors import RefusedError
from tests.actors.local_node import LocalNode, echo, tcp_server, two_nodes, until
from tests.support.certificates import Authority

from .support import tcp_pair

HERE = "/ip4/127.0.0.1/tcp/0"


@pytest.fixture
def authority(tmp_path):
    return Authority(tmp_path)


def tls_of(authority, *names, **options):
    certificate, key = authority.issue(*names, **options)
    return {"certificate": str(certificate), "key": str(key), "trusted": str(authority.file)}


def port_of(node):
    return Multiaddr(node.address).endpoint.port


async def transfer(alice, bob, size):
    """Send some MB through a tunnel to an echo service and back; whether they are the same."""
    async with tcp_server(echo) as server:
        await bob.serve("echo", server)
        host, port = await alice.proxy("bob", "echo")
        block = os.urandom(1 << 20)
        sent, received = hashlib.sha256(), hashlib.sha256()
        stream = await trio.open_tcp_stream(host, port)

        async def send():
            for _ in range(size >> 20):
                await stream.send_all(block)
                sent.update(block)
            await stream.send_eof()

        async with stream, trio.open_nursery() as nursery:
            nursery.start_soon(send)
            async for data in stream:
                received.update(data)
        return sent.digest() == received.digest()


async def test_a_tunnel_over_websocket():
    async with two_nodes(listen=(f"{HERE}/ws",), services={"echo": None}) as (alice, bob):
        assert Multiaddr(bob.address).components[-1].name == "ws"
        connected = await alice.ask("switchboard", Connect(bob.peer))
        assert connected.connection.transport == "websocket"
        assert str(connected.connection.remote_address) == bob.address
        inbound = bob.connections("alice")[0]
        assert inbound.via.transport == "websocket"
        assert inbound.remote_address.components[-1].name == "ws"
        with trio.fail_after(60):
            assert await transfer(alice, bob, 24 << 20)
        assert (await alice.ask("switchboard", PingPeer(bob.peer))).rtt < 5


async def test_a_tunnel_over_websocket_in_tls(authority):
    tls = tls_of(authority, "127.0.0.1")
    async with two_nodes(listen=(f"{HERE}/wss",), services={"echo": None}, tls=tls) as (alice, bob):
        assert bob.address.endswith("/tls/ws")
        connected = await alice.ask("switchboard", Connect(bob.peer))
        assert connected.connection.transport == "wss"
        assert bob.connections("alice")[0].via.transport == "wss"
        with trio.fail_after(60):
            assert await transfer(alice, bob, 24 << 20)


async def test_the_name_of_the_certificate_is_announced_and_verified(authority):
    tls = tls_of(authority, "relay.example.org", "*.example.org")
    async with two_nodes(listen=(f"{HERE}/tls/ws",), tls=tls) as (alice, bob):
        assert bob.address.endswith("/tls/sni/relay.example.org/ws")
        assert str(bob.switchboard._ourselves.announced()[0]) == bob.address
        connected = await alice.ask("switchboard", Connect(bob.peer))
        assert str(connected.connection.remote_address) == bob.address


async def test_a_name_is_resolved_and_its_certificate_expected(authority):
    tls = tls_of(authority, "localhost")
    async with two_nodes(listen=(f"{HERE}/wss",), tls=tls) as (alice, bob):
        alice.config.say_where("bob", f"/dns4/localhost/tcp/{port_of(bob)}/wss")
        named = Multiaddr(f"/dns4/localhost/tcp/{port_of(bob)}/tls/ws")
        await until(lambda: alice.switchboard._reach.book.addresses(bob.peer) == (named,))
        connected = await alice.ask("switchboard", Connect(bob.peer))
        assert connected.connection.transport == "wss"


@pytest.mark.parametrize(
    ("names", "address", "reason"),
    [
        (("192.0.2.1",), "/ip4/127.0.0.1/tcp/{}/wss", "IP address mismatch"),
        (("a.example",), "/ip4/127.0.0.1/tcp/{}/tls/sni/b.example/ws", "b.example"),
    ],
)
async def test_a_certificate_for_somebody_else_is_not_believed(authority, names, address, reason):
    async with two_nodes(listen=(f"{HERE}/wss",), tls=tls_of(authority, *names)) as (alice, bob):
        alice.config.say_where("bob", address.format(port_of(bob)))
        wanted = Multiaddr(address.format(port_of(bob)))
        await until(lambda: alice.switchboard._reach.book.addresses(bob.peer) == (wanted,))
        with pytest.raises(RefusedError, match=reason) as caught:
            await alice.ask("switchboard", Connect(bob.peer))
        assert "not believed" in str(caught.value)


async def test_an_unknown_authority_and_an_expired_certificate_are_not_believed(authority, tmp_path):
    expired = tls_of(authority, "127.0.0.1", days=-1)
    own = {"trusted": str(authority.file)}
    (tmp_path / "other").mkdir()
    others = Authority(tmp_path / "other", "another authority")
    for tls, reason in ((expired, "expired"), (tls_of(others, "127.0.0.1"), "local issuer")):
        async with LocalNode.open("bob", (f"{HERE}/wss",), tls=tls) as bob, LocalNode.open("alice", tls=own) as alice:
            alice.config.say_where("bob", bob.address)
            await until(lambda: alice.switchboard._reach.book.addresses(bob.peer))  # called at once
            with pytest.raises(RefusedError, match=reason):
                await alice.ask("switchboard", Connect(bob.peer))


async def test_a_self_signed_certificate_is_believed_where_it_is_named(tmp_path):
    certificate, key = Authority(tmp_path).issue("127.0.0.1", self_signed=True)
    tls = {"certificate": str(certificate), "key": str(key), "trusted": str(certificate)}
    async with two_nodes(listen=(f"{HERE}/wss",), tls=tls) as (alice, bob):
        assert (await alice.ask("switchboard", Connect(bob.peer))).connection.transport == "wss"


async def test_one_port_serves_all_transports(authority):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    at = f"/ip4/127.0.0.1/tcp/{port}"
    listen = (at, f"{at}/ws", f"{at}/wss")
    tls = tls_of(authority, "127.0.0.1")
    async with LocalNode.open("bob", listen, tls=tls) as bob:
        bob.gate.publish(peers=["alice"], services={})
        assert len(bob.switchboard._listeners.sockets()) == 1
        for address, transport in zip(listen, ("tcp", "websocket", "wss"), strict=True):
            async with LocalNode.open("alice", tls=tls) as alice:
                alice.config.say_where("bob", address)
                await until(lambda: alice.switchboard._reach.book.addresses(bob.peer))  # called at once
                connected = await alice.ask("switchboard", Connect(bob.peer))
                assert connected.connection.transport == transport
        assert set(map(str, bob.switchboard._ourselves.announced())) == {at, f"{at}/ws", f"{at}/tls/ws"}


async def test_listening_sockets_outlive_the_switchboard(authority):
    tls = tls_of(authority, "127.0.0.1")
    async with two_nodes(listen=(f"{HERE}/ws", f"{HERE}/wss"), tls=tls) as (alice, bob):
        await alice.ask("switchboard", Connect(bob.peer))
        before = [str(listener.address) for listener in bob.switchboard._listeners]
        killed = bob.switchboard
        links = [connection.link for connection in killed._table]
        await bob.kill("switchboard")
        for address in before:  # the kernel takes callers meanwhile
            with socket.create_connection(("127.0.0.1", Multiaddr(address).endpoint.port)):
                pass
        killed._listeners.close()
        for link in links:
            link._wire._below._socket.close()
        await bob.start_switchboard()
        assert [str(listener.address) for listener in bob.switchboard._listeners] == before
        for address in before:
            alice.config.say_where("bob", address)
            wanted = (Multiaddr(address),)
            await until(lambda: alice.switchboard._reach.book.addresses(bob.peer)[:1] == wanted)  # noqa: B023  # at once
            await until(lambda: not alice.connections("bob"))
            await alice.ask("switchboard", Connect(bob.peer))
            for connection in alice.connections("bob"):
                connection.link.close()


# ---- those who are no libp2p peers


async def ask_http(port, method="GET", path="/", *, context=None, headers=()):
    """What a common HTTP client is answered: status, headers, body."""

    def ask():
        if context is None:
            client = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        else:
            client = http.client.HTTPSConnection("127.0.0.1", port, timeout=20, context=context)
        with contextlib.closing(client):
            client.request(method, path, body=b"x" * 5000 if method == "POST" else None, headers=dict(headers))
            answer = client.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()

    return await trio.to_thread.run_sync(ask)


@pytest.mark.parametrize("secure", [False, True])
async def test_a_web_client_sees_a_web_server(authority, secure):
    listen = f"{HERE}/wss" if secure else f"{HERE}/ws"
    context = ssl.create_default_context(cafile=authority.file) if secure else None
    async with LocalNode.open("bob", (listen,), tls=tls_of(authority, "127.0.0.1")) as bob:
        port = port_of(bob)
        for method in ("GET", "POST", "HEAD"):
            status, headers, body = await ask_http(port, method, "/index.html", context=context)
            assert status == 404
            assert headers["Connection"] == "close"
            assert headers["Content-Type"] == "text/plain"
            assert "Date" in headers
            assert body == (b"" if method == "HEAD" else b"404 not found\n")
        old = {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "8"}
        status, headers, _ = await ask_http(port, headers=old, context=context)
        assert (status, headers["Sec-WebSocket-Version"]) == (426, "13")
        await until(lambda: bob.switchboard._reception.handshakes == 0)


async def test_plain_http_at_a_port_for_tls_is_hung_up_on(authority):
    async with LocalNode.open("bob", (f"{HERE}/wss",), tls=tls_of(authority, "127.0.0.1")) as bob:
        with pytest.raises((OSError, http.client.HTTPException)):
            await ask_http(port_of(bob))
        await until(lambda: bob.switchboard._reception.handshakes == 0)


REQUEST = ClientOpening("example.org", bytes(16)).request

GARBAGE = {
    "TLS to plain": bytes.fromhex("16030100a5010000a1030300000000"),
    "multistream": b"\x13/multistream/1.0.0\n",
    "oversized headers": b"GET / HTTP/1.1\r\n" + b"Cookie: aaaaaaaaaaaaaaaaaaa\r\n" * 4000,
    "one oversized line": b"GET /" + b"a" * 100_000,
    "garbage after the upgrade": REQUEST + os.urandom(10) + b"\xff" * 100,
    "a frame that is not masked": REQUEST + b"\x82\x05hello",
    "a text message": REQUEST + b"\x81\x85\0\0\0\0hello",
    "an oversized control frame": REQUEST + b"\x89\xfe\xff\xff",
    "a body with the upgrade": REQUEST.replace(b"Upgrade: ", b"Content-Length: 10\r\nUpgrade: ", 1) + bytes(10),
    "no peer inside": REQUEST + b"\x82\x90\0\0\0\0GET / HTTP/1.1\r\n",
}


@pytest.mark.parametrize("kind", GARBAGE)
async def test_garbage_is_hung_up_on_at_once(kind):
    async with LocalNode.open("bob", (f"{HERE}/ws",)) as bob:
        began = trio.current_time()
        stream = await trio.open_tcp_stream("127.0.0.1", port_of(bob))
        async with stream:
            with contextlib.suppress(trio.BrokenResourceError):
                await stream.send_all(GARBAGE[kind])
                async for _ in stream:
                    pass
        await until(lambda: bob.switchboard._reception.handshakes == 0)
        assert trio.current_time() - began < websocket_module.OPENING_DEADLINE, "no deadline was needed"


async def accepting(data, transports, *, tls=None):
    """How a caller fares that sends this and then waits, on a clock that jumps; the error, and when it came."""
    pipes = Pipes(TlsFiles(**(tls or {})), wall=lambda: 0.0, warn=pytest.fail)
    if tls:
        pipes.prepare((Multiaddr(f"{HERE}/wss"),))
    left, right = tcp_pair()
    with left, right:
        left.sendall(data)
        began = trio.current_time()
        with pytest.raises(HandshakeError) as caught:
            await pipes.accept(right, SocketPipe(right), frozenset(transports))
        return caught.value, trio.current_time() - began


@pytest.mark.parametrize("data", [b"", b"G", REQUEST[:-1], b"GET / HTTP/1.1\r\nCookie: a"])
async def test_a_slow_request_is_cut_off_in_time(data, autojump_clock):
    error, took = await accepting(data, {WEBSOCKET})
    assert "within" in str(error)
    assert took <= websocket_module.OPENING_DEADLINE + 0.1


@pytest.mark.parametrize("data", [b"", b"\x16\x03", bytes.fromhex("16030100a5010000a1030300000000")])
async def test_a_slow_tls_handshake_is_cut_off_in_time(data, autojump_clock, authority):
    certificate, key = authority.issue("localhost")
    error, took = await accepting(data, {SECURE_WEBSOCKET}, tls={"certificate": certificate, "key": key})
    assert error.stage == "tls"
    assert took <= tls_module.HANDSHAKE_DEADLINE + 0.1


async def test_who_says_nothing_where_the_first_byte_decides_is_cut_off_in_time(autojump_clock):
    error, took = await accepting(b"", {WEBSOCKET, TCP})
    assert error.stage == "transport"
    assert took <= pipes_module.FIRST_BYTE_DEADLINE + 0.1
    error, _ = await accepting(b"\x16\x03\x01", {WEBSOCKET, TCP})
    assert "nothing here begins with" in str(error)


async def test_a_refused_client_that_stays_is_cut_off_in_time(autojump_clock):
    error, took = await accepting(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", {WEBSOCKET})
    assert error.code == "not-websocket"
    assert took <= websocket_module.GOODBYE + 0.1


class Endless:
    """A pipe that always has something to read, and never anything in it."""

    def __init__(self, first, then):
        self.pieces = [then, first]
        self.readable = True

    async def receive(self):
        return self.pieces.pop() if len(self.pieces) > 1 else self.pieces[0]

    async def send(self, data):
        pass


@pytest.mark.parametrize("frame", ["828000000000", "898000000000", "8a8000000000", "008000000000"])
async def test_frames_without_content_are_heard_for_a_while_and_keep_nobody_waiting(frame):
    first = bytes.fromhex("028000000000" if frame[:2] == "00" else frame)
    endless = Endless(REQUEST, bytes.fromhex(frame) * 100)
    pipe = await websocket_module.accept_websocket(endless, wall=lambda: 0.0, secure=False)
    endless.pieces.append(first)
    turns = 0

    async def somebody_else():
        nonlocal turns
        while True:
            turns += 1
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(somebody_else)
        with pytest.raises(WebSocketError, match="nothing but empty frames"):
            await pipe.receive()
        nursery.cancel_scope.cancel()
    assert turns >= websocket_module.MAX_EMPTY // 600


async def test_interim_answers_without_end_keep_nobody_waiting():
    pipe = Endless(b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 102 Processing\r\n\r\n")
    with trio.move_on_after(0.05) as scope:
        await websocket_module.connect_websocket(
            pipe, Multiaddr(f"{HERE}/ws"), host="a", random=os.urandom, secure=False
        )
    assert scope.cancelled_caught


async def test_a_flood_of_slow_callers_does_not_keep_a_friend_out():
    async with two_nodes(listen=(f"{HERE}/ws",), admission={"concurrent": 8, "concurrent_per_source": 8}) as nodes:
        alice, bob = nodes
        slow = []
        try:
            for _ in range(40):
                sock = socket.create_connection(("127.0.0.1", port_of(bob)))
                sock.sendall(REQUEST[:20])
                slow.append(sock)
            await until(lambda: bob.switchboard._reception.handshakes == 8)
            with trio.fail_after(30):
                await alice.ask("switchboard", Connect(bob.peer))
        finally:
            for sock in slow:
                sock.close()


# ---- servers that are no peers


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", "the web server answers 200 OK"),
        (b"HTTP/1.1 502 Bad Gateway\r\n\r\n", "502 Bad Gateway"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "no WebSocket is here"),
        (b"", "closed the connection"),
        (b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: h2c\r\nConnection: Upgrade\r\n\r\n", "something else"),
        (
            b"HTTP/1.1 101 a\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: AAAA\r\n\r\n",
            "not one to our request",
        ),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", "404 Not Found"),
        (b"HTTP/1.1 101 a\r\n" + b"X: aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\r\n" * 1000, "no WebSocket is here"),
    ],
)
async def test_a_server_without_websocket_is_told_in_words(answer, reason):
    with listen_tcp(Multiaddr(HERE)) as listener:
        address = Multiaddr(f"{local_multiaddr(listener)}/ws")

        async def serve():
            await trio.lowlevel.wait_readable(listener)
            sock, _ = listener.accept()
            stream = trio.SocketStream(trio.socket.from_stdlib_socket(sock))
            async with stream:
                await stream.receive_some(4096)
                with contextlib.suppress(trio.BrokenResourceError):
                    await stream.send_all(answer)
                    await stream.send_eof()
                    await stream.receive_some(1)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            with trio.fail_after(20), pytest.raises(HandshakeError, match=reason) as caught:
                await Pipes(TlsFiles(), wall=lambda: 0.0, warn=pytest.fail).connect(address)
        assert caught.value.stage == "websocket"


async def test_names_that_no_server_can_have_are_refused_in_words():
    pipes = Pipes(TlsFiles(), wall=lambda: 0.0, warn=pytest.fail)
    with listen_tcp(Multiaddr(HERE)) as listener:
        at = local_multiaddr(listener)
        for name in (".a", "a" * 64 + ".example", "ä..example"):
            with pytest.raises(AddressError, match="name of the server"):
                await pipes.connect(Multiaddr(f"{at}/tls/sni/{name}/ws"))


# ---- certificates


async def served_certificate(pipes):
    """The serial number of the certificate that a client sees now."""
    left, right = tcp_pair()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.set_alpn_protocols(["http/1.1"])
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with left, right:
        client = tls_module.TlsPipe(SocketPipe(left), context, server_name="localhost")
        server = tls_module.TlsPipe(SocketPipe(right), pipes._certificate.context(), server_name=None)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.handshake)
            await client.handshake()
        assert client._tls.selected_alpn_protocol() == server._tls.selected_alpn_protocol() == "http/1.1"
        assert client._tls.version() == "TLSv1.3"
        return client._tls.getpeercert(binary_form=True)


async def test_a_renewed_certificate_is_used_without_a_restart(authority, tmp_path):
    certificate, key = authority.issue("localhost")
    warnings = []
    pipes = Pipes(TlsFiles(certificate, key), wall=lambda: 0.0, warn=warnings.append)
    assert pipes.prepare((Multiaddr(f"{HERE}/wss"),)) == "localhost"
    first = await served_certificate(pipes)
    assert await served_certificate(pipes) == first
    renewed, renewed_key = authority.issue("localhost", file="renewed")
    renewed.rename(certificate)  # an ACME client replaces one file, and then the other
    assert await served_certificate(pipes) == first
    assert len(warnings) == 1
    assert "is not the key of" in warnings[0]
    renewed_key.rename(key)
    second = await served_certificate(pipes)
    assert second != first
    certificate.write_text("nonsense")
    assert await served_certificate(pipes) == second
    key.unlink()
    assert await served_certificate(pipes) == second
    assert len(warnings) == 3


def test_files_that_cannot_be_used_are_named_with_the_remedy(authority, tmp_path):
    certificate, key = authority.issue("localhost")
    wss = (Multiaddr(f"{HERE}/wss"),)

    def prepare(**files):
        Pipes(TlsFiles(**files), wall=lambda: 0.0, warn=pytest.fail).prepare(wss)

    with pytest.raises(AddressError, match=r"network\.tls\.certificate_file"):
        prepare()
    with pytest.raises(AddressError, match="No such file"):
        prepare(certificate=tmp_path / "none.pem", key=key)
    with pytest.raises(AddressError, match="no certificate in PEM form"):
        prepare(certificate=key, key=key)
    _, other = authority.issue("localhost", file="other")
    with pytest.raises(AddressError, match="is not the key of"):
        prepare(certificate=certificate, key=other)
    key.chmod(0o604)
    with pytest.raises(AddressError, match=f"chmod 600 {key}"):
        prepare(certificate=certificate, key=key)
    key.chmod(0o640)  # a group such as ssl-cert is common
    prepare(certificate=certificate, key=key)


def test_a_certificate_that_ends_soon_is_told_of(authority):
    certificate, key = authority.issue("localhost", days=3)
    warnings = []
    import time

    tls_module.ServerCertificate(certificate, key, warn=warnings.append, wall=time.time)
    assert len(warnings) == 1
    assert "expires on" in warnings[0]


def test_masks_are_unpredictable():
    frames = Frames(client=True, random_key=lambda: os.urandom(4))
    assert len({frames.encode(b"")[2:6] for _ in range(100)}) > 90
