"""What many strangers at once cost a switchboard and its friends."""

import contextlib
import errno
import socket
import time

import pytest
import trio
import trio.lowlevel

from actors.switchboard import upgrade
from actors.switchboard.errors import HandshakeError
from actors.switchboard.upgrade import Upgrader
from actors.switchboard.wire import SocketPipe
from protocol import yamux
from protocol.messages.switchboard import Connect, PingPeer
from protocol.multistream import Initiator
from protocol.noise import NoiseHandshake
from tests.actors.local_node import LocalNode, key_of, two_nodes, until

from .support import noise_identity


async def stranger(number, port, ends):
    """Connects, proves an identity that nobody has authorised, and waits for the end."""
    static, identity = noise_identity(key_of(f"stranger {number}"))
    try:
        stream = await trio.open_tcp_stream("127.0.0.1", port)
    except OSError:
        ends.append("security")  # displaced so soon that it looks like a failed connection
        return
    async with stream:
        sock = stream.socket._sock
        try:
            await Upgrader(static, identity).outbound(SocketPipe(sock), key_of("bob").peer_id)
        except HandshakeError as error:
            ends.append(error.stage)
            return
        try:
            data = await stream.receive_some(1000)
        except trio.BrokenResourceError:
            data = b""
        ends.append("silence" if data == b"" else data)


@pytest.mark.slow
async def test_a_thousand_strangers_do_not_keep_a_friend_waiting():
    strangers = 1000
    async with two_nodes() as (alice, bob):
        port = int(bob.address.rsplit("/", 1)[1])
        await alice.ask("switchboard", Connect(bob.peer))
        ends, pings = [], []
        async with trio.open_nursery() as nursery:
            for number in range(strangers):
                nursery.start_soon(stranger, number, port, ends)
            while len(ends) < strangers:
                began = time.monotonic()
                await alice.ask("switchboard", PingPeer(bob.peer))
                pings.append(time.monotonic() - began)
                await trio.sleep(0.01)
        # Each was refused without a word: after its handshake, or displaced when it was slow in its part of that.
        assert set(ends) <= {"silence", "handshake", "security"}
        refused = ends.count("silence")
        assert refused > strangers / 2
        assert len(pings) > 5
        assert max(pings) < 5, "here the strangers' own work is done in the same thread, which is most of it"
        await until(lambda: bob.switchboard._reception.handshakes == 0)
        assert len(bob.connections("alice")) == 1
        assert len(bob.switchboard._table) == 1
        told = [one for one in bob.gate.decided if not one.allowed]
        await until(lambda: sum(one.count for one in bob.gate.decided if not one.allowed) >= refused)
        assert len(told) < strangers / 2, "decisions of a flood are folded"


async def test_a_friend_gets_in_among_strangers_from_the_same_address():
    async with two_nodes() as (alice, bob):
        port = int(bob.address.rsplit("/", 1)[1])
        ends = []
        async with trio.open_nursery() as nursery:
            for number in range(60):
                nursery.start_soon(stranger, number, port, ends)
            with trio.fail_after(20):
                connected = await alice.ask("switchboard", Connect(bob.peer))
            assert connected.connection.peer == bob.peer
        assert ends == ["silence"] * 60


async def test_a_few_sources_that_fill_the_queue_do_not_keep_a_friend_out():
    limits = {"concurrent": 4, "concurrent_per_source": 2, "queued": 40, "queued_per_source": 30}
    async with LocalNode.open("bob", admission=limits) as bob, LocalNode.open("alice") as alice:
        bob.gate.publish(peers=["alice"])
        port = int(bob.address.rsplit("/", 1)[1])
        reception = bob.switchboard._reception
        with contextlib.ExitStack() as stack:
            for source in ("127.0.0.2", "127.0.0.3"):
                for _ in range(40):
                    silent = stack.enter_context(socket.socket())
                    silent.bind((source, 0))
                    silent.setblocking(False)
                    assert silent.connect_ex(("127.0.0.1", port)) in (0, errno.EINPROGRESS)
            await until(lambda: reception.waiting == 40)
            alice.config.say_where("bob", bob.address)
            with trio.fail_after(20):
                connected = await alice.ask("switchboard", Connect(bob.peer))
            assert connected.connection.peer == bob.peer


async def test_a_peer_that_opens_streams_without_end_is_bounded_and_others_are_served():
    async with two_nodes(services={"echo": None}) as (alice, bob), LocalNode.open("carol") as carol:
        bob.gate.publish(peers=["alice", "carol"])
        carol.config.say_where("bob", bob.address)
        await until(lambda: carol.switchboard._reach.book.addresses(bob.peer))
        await alice.ask("switchboard", Connect(bob.peer))
        link = alice.connections("bob")[0].link
        link.session._limits = yamux.Limits(outbound_streams=100_000, unacknowledged=100_000)
        most = 0
        for _ in range(100):
            if link.end is not None:
                break
            for _ in range(100):
                link.open_stream().send(b"\x13/multistream")  # and nothing more
            pinged = await carol.ask("switchboard", PingPeer(bob.peer))
            assert pinged.rtt < 5
            most = max(most, bob.switchboard._inbound.negotiating)
        assert most <= yamux.DEFAULT_LIMITS.unacknowledged
        await alice.stop("switchboard")
        await until(lambda: bob.switchboard._inbound.negotiating == 0)


async def test_muxer_frames_in_the_message_that_ends_the_negotiation_are_heard():
    static, identity = noise_identity(key_of("alice"))
    async with two_nodes() as (_, bob):
        with socket.create_connection(("127.0.0.1", int(bob.address.rsplit("/", 1)[1]))) as sock:
            sock.setblocking(False)
            exchange = upgrade._Exchange(SocketPipe(sock))
            hello = NoiseHandshake(initiator=True, static_key=static, identity=identity)
            await exchange.send(Initiator(("/noise",)).data_to_send() + hello.data_to_send())
            answer = Initiator(("/noise",))
            while answer.result is None:
                answer.receive_data(await exchange.receive())
            if answer.leftover:
                hello.receive_data(answer.leftover)
            while hello.result is None:
                hello.receive_data(await exchange.receive())
            ping = bytes.fromhex("00020001 00000000 00004711".replace(" ", ""))
            sealed = hello.result.send.encrypt(Initiator(("/yamux/1.0.0",)).data_to_send() + ping)
            await exchange.send(hello.data_to_send() + len(sealed).to_bytes(2, "big") + sealed)
            secured = upgrade._Secured(exchange, hello.result)
            heard = b""
            with trio.fail_after(10):
                while bytes.fromhex("000200020000000000004711") not in heard:
                    heard += await secured.receive()
            assert heard.startswith(Initiator(("/yamux/1.0.0",)).data_to_send())


async def test_a_defect_that_a_stranger_finds_costs_the_stranger_its_connection_alone(monkeypatch):
    async with two_nodes() as (alice, bob):
        port = int(bob.address.rsplit("/", 1)[1])
        await alice.ask("switchboard", Connect(bob.peer))
        judge = bob.switchboard._admittance.judge_peer

        def defect(peer, path):
            if peer == alice.peer:
                return judge(peer, path)
            raise AssertionError("what nobody foresaw")

        monkeypatch.setattr(bob.switchboard._admittance, "judge_peer", defect)
        ends = []
        for number in range(3):
            await stranger(number, port, ends)
        assert ends == ["silence"] * 3
        await until(lambda: bob.switchboard._reception.handshakes == 0)
        await alice.ask("switchboard", PingPeer(bob.peer))
        assert len(bob.connections("alice")) == 1, "the connection that was there before"
        assert bob.failures == []
        samples = bob.switchboard.context.metrics.samples()
        assert [one.value for one in samples if one.labels.get("reason") == "defect"] == [3]


async def guest(number, port, ends):
    """Connects and stays until it is hung up on."""
    static, identity = noise_identity(key_of(f"guest {number}"))
    async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
        with contextlib.suppress(HandshakeError, trio.BrokenResourceError):
            await Upgrader(static, identity).outbound(SocketPipe(stream.socket._sock), key_of("bob").peer_id)
            while await stream.receive_some(65536):
                pass
        ends.append(number)


async def test_guests_cannot_take_all_connections():
    async with LocalNode.open("bob", max_connections=4) as bob, LocalNode.open("alice") as alice:
        bob.gate.publish(peers=["alice"], gating=False)
        await until(lambda: bob.switchboard._publishers.policy.policy.version == bob.gate.policy.version)
        port = int(bob.address.rsplit("/", 1)[1])
        ends = []
        async with trio.open_nursery() as nursery:
            for number in range(5):
                nursery.start_soon(guest, number, port, ends)
            await until(lambda: len(ends) == 2)
            assert len(bob.switchboard._table) == 3
            alice.config.say_where("bob", bob.address)
            connected = await alice.ask("switchboard", Connect(bob.peer))
            assert connected.connection.peer == bob.peer
            await until(lambda: len(bob.connections("alice")) == 1)
            assert len(ends) == 2, "nobody had to go for that"
            nursery.cancel_scope.cancel()
