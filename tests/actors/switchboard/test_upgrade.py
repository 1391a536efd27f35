"""Upgrades over real loopback sockets, and everything a stranger can do instead."""

import contextlib
import socket

import pytest
import trio

from actors.switchboard import ciphers, upgrade
from actors.switchboard.errors import HandshakeError, NotAuthorisedError, WrongPeerError
from actors.switchboard.upgrade import RefusedPeerError
from actors.switchboard.wire import SocketPipe
from protocol.multistream import Initiator, Responder, encode_message
from protocol.noise import NoiseHandshake
from protocol.noise_cipher import Cipher
from protocol.yamux import Role

from .support import key_of, noise_identity, peer_of, tcp_pair, upgrader_of


@contextlib.contextmanager
def closing(*socks):
    try:
        yield socks
    finally:
        for sock in socks:
            sock.close()


def everybody(_):
    return True


async def both(client_sock, server_sock, *, expected="bob", judge=everybody):
    results = {}

    async def side(name, function, *args):
        try:
            results[name] = await function(*args)
        except HandshakeError as error:
            results[name] = error

    async with trio.open_nursery() as nursery:
        nursery.start_soon(side, "client", upgrader_of("alice").outbound, SocketPipe(client_sock), peer_of(expected))

        async def server():
            await side("server", upgrader_of("bob").inbound, SocketPipe(server_sock), judge)
            if isinstance(results["server"], HandshakeError):
                server_sock.close()

        nursery.start_soon(server)
    return results["client"], results["server"]


async def test_both_sides_know_each_other_and_share_keys():
    with closing(*tcp_pair()) as (left, right):
        client, server = await both(left, right)
    assert client.peer == peer_of("bob")
    assert server.peer == peer_of("alice")
    assert (client.role, server.role) == (Role.CLIENT, Role.SERVER)
    assert server.receive.decrypt(client.send.encrypt(b"hello")) == b"hello"
    assert client.receive.decrypt(server.send.encrypt(b"there")) == b"there"
    assert client.plaintext == server.plaintext == b""


@pytest.mark.parametrize("slow", [(), ("client",), ("server",), ("client", "server")])
async def test_aes_is_used_if_it_is_faster_for_both(monkeypatch, slow):
    real = NoiseHandshake

    def handshake(*, initiator, ciphers, **rest):
        here = "client" if initiator else "server"
        return real(initiator=initiator, ciphers=() if here in slow else (Cipher.AES_GCM,), **rest)

    monkeypatch.setattr(upgrade, "NoiseHandshake", handshake)
    with closing(*tcp_pair()) as (left, right):
        client, server = await both(left, right)
    assert client.send.cipher is server.receive.cipher is (Cipher.CHACHA_POLY if slow else Cipher.AES_GCM)
    assert server.receive.decrypt(client.send.encrypt(b"hello")) == b"hello"
    assert client.receive.decrypt(server.send.encrypt(b"there")) == b"there"


@pytest.mark.parametrize("faster", [True, False])
def test_a_cipher_is_named_if_it_takes_clearly_less_time(monkeypatch, faster):
    times = {Cipher.CHACHA_POLY: 10.0, Cipher.AES_GCM: 7.0 if faster else 9.0}
    monkeypatch.setattr(ciphers, "_seconds", times.__getitem__)
    assert ciphers.better_ciphers.__wrapped__() == ((Cipher.AES_GCM,) if faster else ())


@pytest.mark.parametrize("without", ["client", "server"])
async def test_the_muxer_is_negotiated_where_one_side_cannot_do_it_early(monkeypatch, without):
    real = NoiseHandshake

    def handshake(*, initiator, muxers, **rest):
        return real(initiator=initiator, muxers=() if initiator == (without == "client") else muxers, **rest)

    monkeypatch.setattr(upgrade, "NoiseHandshake", handshake)
    with closing(*tcp_pair()) as (left, right):
        client, server = await both(left, right)
    assert server.receive.decrypt(client.send.encrypt(b"hello")) == b"hello"
    assert client.receive.decrypt(server.send.encrypt(b"there")) == b"there"


async def test_somebody_else_at_the_address_learns_nothing():
    with closing(*tcp_pair()) as (left, right):
        results = {}

        async def server():
            with pytest.raises(HandshakeError) as caught:
                await upgrader_of("bob").inbound(SocketPipe(right), everybody)
            results["server"] = caught.value

        async with trio.open_nursery() as nursery:
            nursery.start_soon(server)
            with pytest.raises(WrongPeerError) as caught:
                await upgrader_of("alice").outbound(SocketPipe(left), peer_of("carol"))
            left.close()
    assert caught.value.code == "wrong-peer"
    assert str(peer_of("bob")) in str(caught.value)
    assert results["server"].stage == "handshake", "it never saw who called"


async def test_who_is_refused_hears_nothing_after_the_handshake():
    asked = []

    def nobody(peer):
        asked.append(peer)
        return False

    with closing(*tcp_pair()) as (left, right):
        client, server = await both(left, right, judge=nobody)
        assert isinstance(server, RefusedPeerError)
        assert server.peer == peer_of("alice")
        assert asked == [peer_of("alice")]
        assert left.recv(100) == b"", "the connection was closed without a word"
    assert client.peer == peer_of("bob")


async def test_a_hang_up_after_the_handshake_is_told_as_not_authorised(monkeypatch):
    real = NoiseHandshake
    monkeypatch.setattr(upgrade, "NoiseHandshake", lambda **given: real(**given | {"muxers": ()}))
    with closing(*tcp_pair()) as (left, right):
        client, _ = await both(left, right, judge=lambda _: False)
    assert isinstance(client, NotAuthorisedError)
    assert client.code == "not-authorised"


GARBAGE = {
    "an HTTP request": b"GET / HTTP/1.1\r\nHost: example\r\n\r\n",
    "a TLS hello": bytes.fromhex("16030100a5010000a1030300000000"),
    "zeros": bytes(100),
    "a length without end": b"\xff" * 20,
    "an oversized message": b"\x80\x80\x04" + bytes(70000),
    "SSH": b"SSH-2.0-OpenSSH_9.2\r\n",
    "plaintext": Initiator(("/plaintext/2.0.0",)).data_to_send() + encode_message("/plaintext/2.0.0") * 40,
    "noise garbage": Initiator(("/noise",)).data_to_send() + b"\x00\x20" + bytes(32) + b"\xff\xff" + bytes(9000),
}


@pytest.mark.parametrize("kind", GARBAGE)
async def test_garbage_is_refused_at_once(kind, autojump_clock):
    left, right = tcp_pair()
    with closing(left, right):
        left.setblocking(True)
        left.settimeout(5)
        with contextlib.suppress(TimeoutError):
            left.sendall(GARBAGE[kind])
        began = trio.current_time()
        with pytest.raises(HandshakeError):
            await upgrader_of("bob").inbound(SocketPipe(right), everybody)
    assert trio.current_time() - began < 1, "no deadline was needed"


async def test_plaintext_is_never_agreed_to():
    left, right = tcp_pair()
    with closing(left, right):
        left.sendall(Initiator(("/plaintext/2.0.0",)).data_to_send() + encode_message("/tls/1.0.0"))
        left.shutdown(socket.SHUT_WR)
        with pytest.raises(HandshakeError, match="closed"):
            await upgrader_of("bob").inbound(SocketPipe(right), everybody)
        answer = left.recv(1000)
    assert answer.endswith(encode_message("na") * 2)


@pytest.mark.parametrize("sent", [b"", b"\x13/multi", "noise"])
async def test_a_slow_caller_is_cut_off_in_time(sent, autojump_clock):
    left, right = tcp_pair()
    with closing(left, right):
        if sent == "noise":
            static, identity = noise_identity(key_of("mallory"))
            hello = NoiseHandshake(initiator=True, static_key=static, identity=identity)
            sent = Initiator(("/noise",)).data_to_send() + hello.data_to_send()
        left.sendall(sent)
        began = trio.current_time()
        with pytest.raises(HandshakeError, match="within"):
            await upgrader_of("bob").inbound(SocketPipe(right), everybody)
        assert trio.current_time() - began <= upgrade.UPGRADE_DEADLINE


async def test_a_wrong_signature_is_refused():
    static, identity = noise_identity(key_of("mallory"))
    forged = identity._replace(public_key=key_of("alice").public_key.to_protobuf())
    with closing(*tcp_pair()) as (left, right):
        async with trio.open_nursery() as nursery:

            async def server():
                with pytest.raises(HandshakeError, match="sign"):
                    await upgrader_of("bob").inbound(SocketPipe(right), everybody)

            nursery.start_soon(server)
            await upgrade.Upgrader(static, forged).outbound(SocketPipe(left), peer_of("bob"))


async def test_a_server_that_speaks_something_else_is_told_in_words():
    with closing(*tcp_pair()) as (left, right):
        right.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")
        with pytest.raises(HandshakeError) as caught:
            await upgrader_of("alice").outbound(SocketPipe(left), peer_of("bob"))
    assert caught.value.stage == "security"
    assert "SSH-2.0" in str(caught.value)


async def test_muxer_bytes_behind_the_negotiation_are_kept(monkeypatch):
    """A peer may send its muxer's first frames in the same Noise message as its proposal."""
    static, identity = noise_identity(key_of("alice"))
    with closing(*tcp_pair()) as (left, right):
        results = []

        async def server():
            results.append(await upgrader_of("bob").inbound(SocketPipe(right), everybody))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(server)
            exchange = upgrade._Exchange(SocketPipe(left))
            hello = NoiseHandshake(initiator=True, static_key=static, identity=identity)
            await exchange.send(Initiator(("/noise",)).data_to_send() + hello.data_to_send())
            answer = Initiator(("/noise",))
            while answer.result is None:
                answer.receive_data(await exchange.receive())
            hello.receive_data(answer.leftover) if answer.leftover else None
            while hello.result is None:
                hello.receive_data(await exchange.receive())
            sealed = hello.result.send.encrypt(Initiator(("/yamux/1.0.0",)).data_to_send() + b"frames")
            await exchange.send(hello.data_to_send() + len(sealed).to_bytes(2, "big") + sealed + b"more")
    assert results[0].plaintext == b"frames"
    assert results[0].received in {b"more", b""}


def test_the_responder_lists_noise_alone():
    responder = Responder(("/noise",), listed=("/noise",))
    responder.receive_data(Initiator(("/x",)).data_to_send() + encode_message("ls"))
    assert b"plaintext" not in responder.data_to_send()
