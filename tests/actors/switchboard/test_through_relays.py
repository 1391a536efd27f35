"""Connections through relays, between whole nodes in one process; the relay is one of ours."""

import contextlib
import hashlib
import random
import socket

import pytest
import trio

import actors.switchboard.circuit_pipes
import actors.switchboard.dialer
import actors.switchboard.upgrade
from actors.relay.hop import exchange
from protocol.circuit.hop_client import ConnectClient, ReserveClient
from protocol.circuit.stop import StopInitiator
from protocol.messages.paths import MeasurePaths, TracePath
from protocol.messages.relay import CircuitLimit, ServeRelay
from protocol.messages.switchboard import Connect, Disconnect, OpenStream, PingPeer
from protocol.multiaddr import Multiaddr
from protocol.protocol_ids import CIRCUIT_HOP
from supervisor.errors import RefusedError
from tests.actors.local_node import Asker, LocalNode, echo, peer_of, tcp_server, until
from tests.actors.switchboard.relay_world import rules

ECHO = "/peerup/echo/1.0.0"


@contextlib.asynccontextmanager
async def relay(name="relay", *, peers=("alice", "bob"), **changes):
    """A node that is a relay for these peers."""
    async with LocalNode.open(name) as node:
        node.gate.publish(peers=list(peers), services={})
        await node.start(Asker(), "relay/server")
        server = node.actors["relay/server"].context
        await server.ask("switchboard", ServeRelay(rules(**changes)), timeout=20)
        await until(lambda: node.switchboard._publishers.policy.policy.version == node.gate.policy.version)
        yield node


def where(node):
    return str(Multiaddr(node.address).with_peer_id(node.peer))


async def reserve(node, at):
    """Have a node keep a reservation, once."""
    opened = await node.ask("switchboard", OpenStream(at.peer, (CIRCUIT_HOP,)))
    client = ReserveClient(at.peer, node.peer)
    with trio.fail_after(20):
        await exchange(socket.socket(fileno=opened.stream.detach()), client)
    assert client.state == "granted"


@contextlib.asynccontextmanager
async def node(name, *relays, peers=(), services=None, listen=()):
    """A node that nobody can dial, with these relays."""
    async with LocalNode.open(name, listen=listen) as made:
        made.config.relays = tuple(where(one) for one in relays)
        made.config.tell()
        made.gate.publish(peers=list(peers), services=services or {})
        await until(lambda: made.switchboard._publishers.policy.policy.version == made.gate.policy.version)
        await until(lambda: all(one.peer in made.switchboard._reach.relays for one in relays))
        yield made


@contextlib.asynccontextmanager
async def world(*, services=None, reserved=True, bobs_peers=("alice",), **changes):
    """Alice and Bob, who can reach each other only through a relay."""
    async with (
        relay(**changes) as middle,
        node("alice", middle, peers=["bob"]) as alice,
        node("bob", middle, peers=bobs_peers, services=services) as bob,
    ):
        if reserved:
            await reserve(bob, middle)
        yield alice, middle, bob


async def test_a_ping_through_a_relay_and_what_both_sides_say_of_it():
    async with world() as (alice, middle, bob):
        pong = await alice.ask("switchboard", PingPeer(bob.peer))
        info = pong.connection
        assert (info.peer, info.path, info.transport, info.relay) == (bob.peer, "relayed", "tcp", middle.peer)
        assert str(info.remote_address) == f"{where(middle)}/p2p-circuit"
        assert pong.connected_in is not None
        (near,), (far,) = alice.connections("bob"), bob.connections("alice")
        assert far.way.startswith(f"relayed via {middle.peer} tcp /ip4/127.0.0.1/tcp/")
        assert not far.outbound
        assert near.via.limit is None
        await until(lambda: near.identification and far.identification)
        assert near.identification.observed_address is None, "nobody sees anything but the relay's socket"
        decisions = {(one.peer, one.subject): one for one in bob.gate.decided}
        assert decisions[middle.peer, "/libp2p/circuit/relay/0.2.0/stop"].rule == "configured-relay"
        assert decisions[alice.peer, "connection"].path.startswith(f"relayed via {middle.peer}")


async def test_a_tunnel_through_a_relay_with_hashes():
    content = random.Random(3).randbytes(8_000_000)
    async with world(services={"echo": None}) as (alice, _, bob), tcp_server(echo) as port:
        await bob.serve("echo", port)
        address = await alice.proxy("bob", "echo")
        stream = await trio.open_tcp_stream(*address)
        received = bytearray()
        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:

                async def send():
                    await stream.send_all(content)
                    await stream.send_eof()

                nursery.start_soon(send)
                async for data in stream:
                    received += data
        await stream.aclose()
        assert hashlib.sha256(received).digest() == hashlib.sha256(content).digest()
        await until(lambda: bob.gate.ended and alice.gate.ended)
        for ended in (*bob.gate.ended, *alice.gate.ended):
            assert ended.path.startswith("relayed via")


async def test_what_a_relay_refuses_is_told_in_words():
    async with world(reserved=False) as (alice, middle, bob):
        with pytest.raises(RefusedError) as caught:
            await alice.ask("switchboard", Connect(bob.peer))
        assert f"the relay {middle.peer} refuses the circuit" in caught.value.reason
        assert "NO_RESERVATION" in caught.value.reason


async def test_a_relay_that_does_not_list_us_is_told_as_that():
    async with (
        relay(peers=["bob"]) as middle,
        node("alice", middle, peers=["bob"]) as alice,
    ):
        with pytest.raises(RefusedError) as caught:
            await alice.ask("switchboard", Connect(peer_of("bob")))
        assert f"the relay {middle.peer} hung up when it knew who we are" in caught.value.reason
        assert "peerup relay authorize" in caught.value.reason


async def test_a_relay_that_is_not_there_is_told_as_that():
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        port = nobody.getsockname()[1]
    absent = peer_of("relay")
    async with node("alice", peers=["bob"]) as alice:
        alice.config.relays = (f"/ip4/127.0.0.1/tcp/{port}/p2p/{absent}",)
        alice.config.tell()
        await until(lambda: absent in alice.switchboard._reach.relays)
        with pytest.raises(RefusedError) as caught:
            await alice.ask("switchboard", Connect(peer_of("bob")))
        assert f"the relay {absent} cannot be reached" in caught.value.reason
        assert "connection refused" in caught.value.reason


async def test_a_peer_that_does_not_authorise_us_is_told_as_that():
    async with world(bobs_peers=("carol",)) as (alice, _, bob):
        with pytest.raises(RefusedError) as caught:
            await alice.ask("switchboard", Connect(bob.peer))
        assert caught.value.code == "not-authorised"
        refused = [one for one in bob.gate.decided if one.peer == alice.peer]
        assert [one.allowed for one in refused] == [False]
        assert refused[0].path.startswith("relayed via")


@pytest.mark.parametrize(
    ("services", "bobs_peers", "words"),
    [({}, ["alice"], "does not offer"), ({"echo": None}, ["carol"], "does not authorise this node")],
)
async def test_a_tunnel_that_cannot_be_is_told_in_the_right_words(services, bobs_peers, words):
    async with world(services=services, bobs_peers=bobs_peers) as (alice, _, _bob):
        address = await alice.proxy("bob", "echo")
        stream = await trio.open_tcp_stream(*address)
        with trio.fail_after(20), contextlib.suppress(trio.BrokenResourceError):
            await stream.send_all(b"hello")
            assert await stream.receive_some() == b""
        await stream.aclose()
        proxy = alice.actors["proxy/bob/echo"]
        await until(lambda: proxy.describe()["last_failure"])
        assert words in proxy.describe()["last_failure"]


async def test_the_relays_limit_cuts_the_circuit_and_the_end_says_so():
    async with world(services={"echo": None}, circuit=CircuitLimit(None, 100_000)) as (alice, middle, bob):
        await alice.ask("switchboard", Connect(bob.peer))
        (near,) = alice.connections("bob")
        assert near.info().limit_bytes == 100_000
        async with tcp_server(echo) as port:
            await bob.serve("echo", port)
            address = await alice.proxy("bob", "echo")
            stream = await trio.open_tcp_stream(*address)
            with trio.fail_after(20), pytest.raises(trio.BrokenResourceError):
                await stream.send_all(bytes(64_000_000))
            await stream.aclose()
        await until(lambda: near.end is not None)
        proxy = alice.actors["proxy/bob/echo"]
        await until(lambda: str(middle.peer) in proxy.describe()["last_failure"])
        assert "100000 bytes each way" in proxy.describe()["last_failure"], "whoever had the tunnel is told why"
        assert near.end.code == "circuit-cut"
        assert str(middle.peer) in near.end.reason
        assert "100000 bytes each way" in near.end.reason


async def test_a_relay_that_dies_ends_its_circuits_with_words():
    async with world() as (alice, middle, bob):
        await alice.ask("switchboard", Connect(bob.peer))
        (near,), (far,) = alice.connections("bob"), bob.connections("alice")
        middle.switchboard._reception.close()
        for connection in list(middle.switchboard._table):
            connection.link.abort()
        await until(lambda: near.end is not None and far.end is not None)
        for end in (near.end, far.end):
            assert end.code == "circuit-lost"
            assert f"the connection to the relay {middle.peer} ended" in end.reason


async def test_no_circuit_is_asked_for_over_a_circuit():
    """A dial of the relay that is joined may come through another relay."""
    async with world() as (alice, _, bob):
        with socket.socket() as nobody:
            nobody.bind(("127.0.0.1", 0))
            dead = f"/ip4/127.0.0.1/tcp/{nobody.getsockname()[1]}"
            carol = peer_of("carol")
            alice.config.say_where("carol", f"{dead}/p2p/{bob.peer}/p2p-circuit")
            refusals = []

            async def reach_carol():
                with pytest.raises(RefusedError) as caught:
                    await alice.ask("switchboard", Connect(carol))
                refusals.append(str(caught.value))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(alice.ask, "switchboard", Connect(bob.peer))
                nursery.start_soon(reach_carol)
        assert f"the relay {bob.peer} cannot be reached" in refusals[0]
        assert "is no relay" not in refusals[0]


async def test_every_address_of_a_relay_is_tried_that_a_peer_is_said_to_be_behind():
    async with relay() as middle, node("bob", middle, peers=["alice"]) as bob:
        await reserve(bob, middle)
        async with node("alice", peers=["bob"]) as alice:
            with socket.socket() as nobody:
                nobody.bind(("127.0.0.1", 0))
                dead = f"/ip4/127.0.0.1/tcp/{nobody.getsockname()[1]}/p2p/{middle.peer}"
                alice.config.say_where("bob", f"{dead}/p2p-circuit", f"{where(middle)}/p2p-circuit")
                connected = await alice.ask("switchboard", Connect(bob.peer))
            assert connected.connection.relay == middle.peer


async def test_a_second_relay_is_used_when_the_first_has_no_reservation():
    async with (
        relay("one") as first,
        relay("two") as second,
        node("alice", first, second, peers=["bob"]) as alice,
        node("bob", first, second, peers=["alice"]) as bob,
    ):
        await reserve(bob, second)
        connected = await alice.ask("switchboard", Connect(bob.peer))
        assert connected.connection.relay == second.peer
        assert any("NO_RESERVATION" in attempt for attempt in connected.tried)
        await alice.ask("switchboard", Disconnect(bob.peer))
        await until(lambda: not alice.connections("bob"))
        connected = await alice.ask("switchboard", Connect(bob.peer))
        assert connected.connection.relay == second.peer
        assert len(connected.tried) == 1, "what worked last is tried first"


async def test_only_configured_relays_may_announce_circuits():
    async with world() as (alice, middle, bob):
        bob.config.relays = ()
        bob.config.tell()
        await until(lambda: middle.peer not in bob.switchboard._reach.relays)
        with pytest.raises(RefusedError) as caught:
            await alice.ask("switchboard", Connect(bob.peer))
        assert "CONNECTION_FAILED" in caught.value.reason
        assert not bob.connections("alice")


async def test_a_relayed_connection_gives_way_to_a_direct_one(monkeypatch):
    async with world(services={"echo": None}) as (alice, _, bob), tcp_server(echo) as port:
        await bob.serve("echo", port)
        await alice.ask("switchboard", Connect(bob.peer))
        (relayed,) = alice.connections("bob")
        assert relayed.relayed
        held = await alice.ask("switchboard", OpenStream(bob.peer, (ECHO,)))
        async with trio.open_nursery() as nursery:
            # bob gets an address; alice learns it, and finds the direct way by herself
            listener = trio.socket.socket()
            await listener.bind(("127.0.0.1", 0))
            listener.listen()
            address = f"/ip4/127.0.0.1/tcp/{listener.getsockname()[1]}"
            stdlib = socket.socket(fileno=listener.detach())
            stdlib.setblocking(False)
            nursery.start_soon(bob.switchboard._reception.listen, stdlib)
            alice.config.say_where("bob", address)
            await until(lambda: alice.connections("bob") and not alice.connections("bob")[0].relayed)
            best = alice.connections("bob")[0]
            await until(lambda: bob.switchboard._table.best(alice.peer).via.path == "direct")
            assert relayed.draining
            assert relayed.end is None, "a stream still uses it"
            opened = await alice.ask("switchboard", OpenStream(bob.peer, (ECHO,)))
            assert opened.connection.id == best.id
            opened.stream.close()
            held.stream.close()
            await until(lambda: relayed.end is not None)
            assert relayed.end.code in {"superseded", "remote-close", "circuit-cut"}
            nursery.cancel_scope.cancel()
        stdlib.close()


async def test_relays_wait_for_direct_addresses_a_moment_and_no_longer(monkeypatch):
    monkeypatch.setattr(actors.switchboard.dialer, "RELAY_HEAD_START", 0.0)
    async with world() as (alice, _, bob):
        with socket.socket() as silent:
            silent.bind(("127.0.0.1", 0))
            silent.listen(0)
            alice.config.say_where("bob", f"/ip4/127.0.0.1/tcp/{silent.getsockname()[1]}")
            await until(lambda: len(alice.switchboard._reach.addresses(bob.peer)) == 2)
            connected = await alice.ask("switchboard", Connect(bob.peer))
        assert connected.connection.path == "relayed"


async def test_early_bytes_that_a_relay_loses_are_said_again_and_never_early_again(monkeypatch):
    """As a relay would that reads more than the request."""
    real = ConnectClient.__init__
    asked = []

    def losing(self, peer, *, early=b""):
        asked.append(bool(early))
        real(self, peer)

    monkeypatch.setattr(
        actors.switchboard.circuit_pipes, "ConnectClient", type("Losing", (ConnectClient,), {"__init__": losing})
    )
    monkeypatch.setattr(actors.switchboard.upgrade, "STAGE_DEADLINE", 0.5)
    async with world() as (alice, middle, bob):
        connected = await alice.ask("switchboard", Connect(bob.peer))
        assert connected.connection.path == "relayed"
        assert asked == [True, False]
        assert not alice.switchboard._reach.relays.takes_early(middle.peer)


async def test_the_source_that_a_relay_claims_must_be_the_one_that_is_proven(monkeypatch):
    real = StopInitiator.__init__

    def lying(self, source, limit=None, **options):
        real(self, peer_of("mallory"), limit, **options)

    async with world() as (alice, _, bob):
        monkeypatch.setattr(StopInitiator, "__init__", lying)
        with pytest.raises(RefusedError):
            await alice.ask("switchboard", Connect(bob.peer))
        assert not bob.connections("alice")
        assert not [one for one in bob.gate.decided if one.peer == alice.peer], "it was not even judged"


async def test_paths_are_measured_and_hops_are_traced():
    async with world() as (alice, middle, bob):
        traced = await alice.ask("switchboard", TracePath(bob.peer))
        assert [(hop.role, hop.peer) for hop in traced.hops] == [
            ("node", alice.peer),
            ("relay", middle.peer),
            ("peer", bob.peer),
        ]
        assert traced.connected_in is not None
        assert traced.path.startswith(f"relayed via {middle.peer}")
        assert all(hop.rtt is not None and not hop.failure for hop in traced.hops)
        again = await alice.ask("switchboard", TracePath(bob.peer))
        assert again.connected_in is None
        measured = await alice.ask("switchboard", MeasurePaths(None))
        assert {path.connection.peer for path in measured.paths} == {middle.peer, bob.peer}
        assert all(path.rtt is not None and path.in_use for path in measured.paths)
        (to_bob,) = (await alice.ask("switchboard", MeasurePaths(bob.peer))).paths
        assert to_bob.connection.relay == middle.peer
        assert (await alice.ask("switchboard", MeasurePaths(peer_of("nobody")))).paths == ()


@contextlib.asynccontextmanager
async def thread_that_can_be_cut(target):
    """A TCP address that leads to `target` until `cut` is set; from then on nothing passes, not even an end."""
    cut = trio.Event()

    async def handle(stream):
        async with await trio.open_tcp_stream("127.0.0.1", target) as onward, trio.open_nursery() as nursery:

            async def one_way(source, sink):
                with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                    async for data in source:
                        if cut.is_set():
                            break
                        await sink.send_all(data)
                await trio.sleep_forever()

            nursery.start_soon(one_way, stream, onward)
            nursery.start_soon(one_way, onward, stream)

    async with tcp_server(handle) as port:
        yield port, cut


async def test_a_peer_that_comes_back_through_a_relay_is_not_sought_on_a_direct_connection_that_died_in_silence():
    async with (
        relay() as middle,
        node("alice", middle, peers=["bob"]) as alice,
        node("bob", middle, peers=["alice"], listen=("/ip4/127.0.0.1/tcp/0",)) as bob,
        thread_that_can_be_cut(int(Multiaddr(bob.address).value("tcp"))) as (port, cut),
    ):
        await reserve(bob, middle)
        alice.config.say_where("bob", f"/ip4/127.0.0.1/tcp/{port}")
        await until(lambda: alice.switchboard._reach.book.addresses(bob.peer))
        await alice.ask("switchboard", Connect(bob.peer))
        (direct,) = bob.connections("alice")
        await until(lambda: direct.identification)
        alice.switchboard._reach.book._learned.clear()  # the way around the thread
        direct.opened -= 60  # it is not of this moment
        cut.set()
        (lost,) = alice.connections("bob")
        lost.link.abort()
        await until(lambda: lost.end is not None)
        connected = await alice.ask("switchboard", Connect(bob.peer))
        assert connected.connection.path == "relayed"
        await until(lambda: direct.doubted_since is not None or direct.end is not None, seconds=20)
        best = bob.switchboard._table.best(alice.peer)
        assert best.relayed
        assert best.id == bob.connections("alice")[0].id
        assert alice.connections("bob")[0].end is None, "it was not closed meanwhile"
        pong = await bob.ask("switchboard", PingPeer(alice.peer))
        assert pong.connected_in is None
