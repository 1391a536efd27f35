"""Switchboards that talk to each other over loopback."""

import dataclasses
import os
import socket

import pytest
import trio

from actors.switchboard import actor as switchboard_module
from actors.switchboard import publishers as publishers_module
from actors.switchboard.actor import Switchboard
from protocol.messages import Descriptor
from protocol.messages.config import ConfigSnapshot, NameEntry
from protocol.messages.gate import PolicyPublished, SubscribePolicy
from protocol.messages.switchboard import (
    AttachSocket,
    Connect,
    Disconnect,
    InboundStream,
    NeedPeer,
    OpenAttached,
    OpenStream,
    PingPeer,
    ReadStatus,
    ReleasePeer,
    ServeProtocol,
    WithdrawProtocol,
)
from protocol.policy import Policy
from protocol.protocol_ids import DELIVERY, IDENTIFY, PING, PINGPONG, RECALL
from protocol.stream_descriptor import FINISH_MESSAGE, RESET, ResetCode, parse_reset
from supervisor.actor import Actor, handles
from supervisor.errors import RefusedError
from tests.actors.local_node import FakeGate, LocalNode, peer_of, two_nodes, until

ECHO = "/peerup/echo/1.0.0"


class Server(Actor):
    """Serves a protocol and keeps the streams it gets."""

    def __init__(self, protocol=ECHO):
        self.protocol = protocol
        self.streams = []

    async def start(self, checkpoint):
        await self.context.ask("switchboard", ServeProtocol(self.protocol), timeout=5)
        return {}

    async def stop(self, reason):
        for _, stream in self.streams:
            stream.close()

    @handles(InboundStream)
    async def inbound(self, message):
        self.streams.append((message, open_descriptor(message.stream)))


def open_descriptor(descriptor):
    sock = socket.socket(fileno=descriptor.detach())
    sock.setblocking(False)
    return sock


async def read(sock):
    """One message of a stream descriptor; empty at its end."""
    with trio.fail_after(10):
        while True:
            try:
                return sock.recv(70000)
            except BlockingIOError:
                await trio.lowlevel.wait_readable(sock)


async def refusal(asking):
    with pytest.raises(RefusedError) as caught:
        await asking
    return caught.value


async def test_connect_tells_who_is_there_and_how():
    async with two_nodes() as (alice, bob):
        connected = await alice.ask("switchboard", Connect(bob.peer))
        info = connected.connection
        assert (info.peer, info.direction, info.path, info.transport) == (bob.peer, "outbound", "direct", "tcp")
        assert str(info.remote_address) == bob.address
        assert info.agent.startswith("peerup")
        assert set(info.protocols) == {IDENTIFY, "/ipfs/id/push/1.0.0", PING, PINGPONG, DELIVERY, RECALL}
        assert connected.tried[0].startswith(f"{bob.address}: connected in")
        again = await alice.ask("switchboard", Connect(bob.peer))
        assert again.connection.id == info.id
        await until(lambda: bob.connections("alice")[0].identification is not None)
        told = bob.connections("alice")[0].identification
        assert told.peer_record.peer_id == alice.peer
        assert [str(address) for address in told.peer_record.addresses] == [alice.address]
        assert alice.connections("bob")[0].identification.observed_address == info.local_address


async def test_the_ping_of_peer_up_can_be_switched_off():
    async with two_nodes(pingpong=False) as (alice, bob):
        connected = await alice.ask("switchboard", Connect(bob.peer))
        assert set(connected.connection.protocols) == {IDENTIFY, "/ipfs/id/push/1.0.0", PING, DELIVERY, RECALL}
        assert (await alice.ask("switchboard", PingPeer(bob.peer))).protocol == PING


async def test_somebody_else_at_the_address_is_wrong_peer():
    async with two_nodes() as (alice, bob):
        alice.config.say_where("carol", bob.address)
        await until(lambda: alice.switchboard._reach.book.addresses(peer_of("carol")))
        error = await refusal(alice.ask("switchboard", Connect(peer_of("carol"))))
        assert error.code == "wrong-peer"
        assert str(bob.peer) in str(error)
        assert not alice.connections("carol")
        assert not bob.connections("alice")


async def test_what_cannot_be_reached_is_told_with_each_attempt():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    async with LocalNode.open("alice") as alice:
        error = await refusal(alice.ask("switchboard", Connect(peer_of("bob"))))
        assert error.code == "no-addresses"
        assert "peerup names add" in error.action
        alice.config.say_where("bob", f"/ip4/127.0.0.1/tcp/{port}", "/dns4/nowhere.invalid/tcp/4001")
        await until(lambda: alice.switchboard._reach.book.addresses(peer_of("bob")))
        error = await refusal(alice.ask("switchboard", OpenStream(peer_of("bob"), (ECHO,))))
        assert error.code == "unreachable"
        assert f"/ip4/127.0.0.1/tcp/{port}: connection refused" in str(error)
        assert "nowhere.invalid" in str(error)
        assert (await refusal(alice.ask("switchboard", Connect(alice.peer)))).code == "unreachable"


async def test_an_unauthorised_peer_is_closed_and_told_so_by_its_own_node():
    async with two_nodes() as (alice, bob):
        bob.gate.publish(peers=["carol"])
        await until(lambda: bob.switchboard._publishers.policy.policy.version == bob.gate.policy.version)
        error = await refusal(alice.ask("switchboard", Connect(bob.peer)))
        assert error.code == "not-authorised"
        assert "peerup auth add" in str(error)
        error = await refusal(alice.ask("switchboard", OpenStream(bob.peer, (ECHO,))))
        assert error.code == "not-authorised"
        assert not bob.connections("alice")
        await until(lambda: bob.gate.decided)
        decided = bob.gate.decided[0]
        assert (decided.peer, decided.subject, decided.allowed, decided.rule) == (
            alice.peer,
            "connection",
            False,
            "not-listed",
        )


async def test_before_the_first_policy_everything_is_denied():
    async with two_nodes() as (alice, bob):
        bob.gate.policy = None
        await bob.stop("gate")
        await bob.stop("switchboard")
        await bob.start_switchboard()
        error = await refusal(alice.ask("switchboard", Connect(bob.peer)))
        assert error.code == "not-authorised"


async def test_data_finish_and_reset_cross_the_descriptors():
    async with two_nodes(services={"echo": None}) as (alice, bob):
        server = Server()
        await bob.start(server, "service/echo")
        opened = await alice.ask("switchboard", OpenStream(bob.peer, (ECHO,)))
        assert opened.protocol == ECHO
        with open_descriptor(opened.stream) as near:
            await until(lambda: server.streams)
            message, far = server.streams[0]
            assert (message.peer, message.protocol, message.rule) == (alice.peer, ECHO, "authorized_keys:1")
            with far:
                near.send(b"D" + b"question")
                near.send(FINISH_MESSAGE)
                assert await read(far) == b"Dquestion"
                assert await read(far) == FINISH_MESSAGE
                far.send(b"Danswer")
                assert await read(near) == b"Danswer"
                far.send(b"R" + (4711).to_bytes(4, "big"))
                assert parse_reset(await read(near)) == 4711


async def test_what_was_sent_with_the_proposal_arrives():
    """A peer may send its data behind the proposal, without waiting for the answer."""
    async with two_nodes(services={"echo": None}) as (alice, bob):
        server = Server()
        await bob.start(server, "service/echo")
        await alice.ask("switchboard", Connect(bob.peer))
        from protocol.multistream import Initiator

        channel = alice.connections("bob")[0].link.open_stream()
        got = []
        channel.on_data = got.append
        channel.send(Initiator((ECHO,)).data_to_send() + b"early")
        channel.finish()
        await until(lambda: server.streams)
        with server.streams[0][1] as far:
            assert await read(far) == b"Dearly"
            assert await read(far) == FINISH_MESSAGE
            far.send(b"Dlate")
            far.send(FINISH_MESSAGE)
            await until(lambda: b"".join(got).endswith(b"late"))


async def test_a_stream_to_a_known_service_is_usable_before_the_peer_has_answered():
    async with two_nodes(services={"echo": None}) as (alice, bob):
        server = Server()
        await bob.start(server, "service/echo")
        await alice.ask("switchboard", Connect(bob.peer))
        await until(lambda: ECHO in alice.connections("bob")[0].identification.protocols)
        heard = []
        accept = bob.switchboard._inbound.accept
        bob.switchboard._inbound.accept = lambda *stream: heard.append(stream)  # bob does not answer yet
        opened = await alice.ask("switchboard", OpenStream(bob.peer, (ECHO,)))
        with open_descriptor(opened.stream) as near:
            near.send(b"Dquestion")
            await until(lambda: heard)
            bob.switchboard._inbound.accept = accept
            near.send(b"D, continued")
            connection, channel = heard[0]
            accept(connection, channel)
            from protocol.multistream import Initiator

            channel.on_data(Initiator((ECHO,)).data_to_send() + b"question")
            await until(lambda: server.streams)
            far = server.streams[0][1]
            assert await read(far) == b"Dquestion"
            far.send(b"Danswer")
            assert await read(near) == b"Danswer", "nothing of the negotiation is left in it"


async def test_a_service_that_went_away_just_now_resets_a_stream_that_was_opened_ahead():
    async with two_nodes(services={"echo": None}) as (alice, bob):
        server = Server()
        await bob.start(server, "service/echo")
        await alice.ask("switchboard", Connect(bob.peer))
        await until(lambda: ECHO in alice.connections("bob")[0].identification.protocols)
        bob.gate.publish(services={})
        await until(lambda: bob.switchboard._publishers.policy.policy.version == bob.gate.policy.version)
        opened = await alice.ask("switchboard", OpenStream(bob.peer, (ECHO,)))
        with open_descriptor(opened.stream) as near:
            assert parse_reset(await read(near)) == ResetCode.NEGOTIATION_FAILED
        await until(lambda: not alice.connections("bob")[0].link.streams)


@pytest.mark.parametrize(
    ("services", "rule"),
    [
        ({"echo": ["carol"]}, "service:echo"),
        ({}, "unknown-service"),
    ],
)
async def test_a_service_that_is_not_ours_cannot_be_told_from_one_that_does_not_exist(services, rule):
    async with two_nodes(services=services) as (alice, bob):
        server = Server()
        await bob.start(server, "service/echo")
        error = await refusal(alice.ask("switchboard", OpenStream(bob.peer, (ECHO,))))
        assert error.code == "protocol-not-supported"
        assert "allowed_peers" in str(error)
        assert not server.streams
        await until(lambda: any(one.subject != "connection" for one in bob.gate.decided))
        assert [(one.subject, one.allowed, one.rule) for one in bob.gate.decided if one.subject != "connection"] == [
            (ECHO, False, rule)
        ]
        assert ECHO not in alice.connections("bob")[0].identification.protocols


async def test_a_service_whose_actor_is_away_says_so():
    async with two_nodes(services={"echo": None}) as (alice, bob):
        error = await refusal(alice.ask("switchboard", OpenStream(bob.peer, (ECHO,))))
        assert error.code == "stream-refused"
        assert "service-unavailable" in str(error)


async def test_the_first_of_several_protocols_that_is_spoken_is_used():
    async with two_nodes(services={"echo": None}) as (alice, bob):
        await bob.start(Server(), "service/echo")
        opened = await alice.ask("switchboard", OpenStream(bob.peer, ("/peerup/other/1.0.0", ECHO)))
        assert opened.protocol == ECHO


async def test_streams_of_the_peer_are_judged_on_connections_that_we_dialled():
    async with two_nodes() as (alice, bob):
        bob.gate.publish(peers=["alice"])
        alice.gate.publish(peers=[], services={"echo": None})
        await until(lambda: alice.switchboard._publishers.policy.policy.version == alice.gate.policy.version)
        server = Server()
        await alice.start(server, "service/echo")
        await alice.ask("switchboard", Connect(bob.peer))
        error = await refusal(bob.ask("switchboard", OpenStream(alice.peer, (ECHO,))))
        assert error.code == "stream-refused"
        assert "policy" in str(error)
        assert not server.streams


async def test_only_the_gate_says_what_the_policy_is():
    async with two_nodes() as (_, bob):
        anybody = Policy(99, gating=False, peers=(), services=())
        bob.tell("switchboard", PolicyPublished(anybody))
        nowhere = ConfigSnapshot(99, gating=False, services=(), names=(NameEntry("eve", bob.peer),), addresses=())
        bob.tell("switchboard", nowhere)
        await bob.ask("switchboard", ReadStatus())  # handled after both
        assert bob.switchboard._publishers.policy.policy == bob.gate.policy
        assert bob.switchboard._names == {}


async def test_an_older_policy_that_comes_late_is_not_applied():
    async with LocalNode.open("bob") as bob:
        older = bob.gate.policy
        bob.gate.publish(peers=["alice"])
        bob.gate.context.tell("switchboard", PolicyPublished(older))
        await bob.ask("switchboard", ReadStatus())
        await until(lambda: bob.switchboard._publishers.policy.policy == bob.gate.policy)
        await bob.ask("switchboard", ReadStatus())
        assert bob.switchboard._publishers.policy.policy == bob.gate.policy


async def test_a_gate_that_was_slow_to_answer_is_asked_again(monkeypatch):
    monkeypatch.setattr(publishers_module, "SUBSCRIBE_DEADLINE", 0.05)
    monkeypatch.setattr(switchboard_module, "TICK", 0.05)
    async with two_nodes() as (_, bob):
        slow = trio.Event()
        answer = FakeGate.subscribe

        async def wait(gate, request):
            await slow.wait()
            return await answer(gate, request)

        entry = FakeGate.handlers[SubscribePolicy.KIND]
        monkeypatch.setitem(FakeGate.handlers, SubscribePolicy.KIND, dataclasses.replace(entry, function=wait))
        await bob.stop("switchboard")
        await bob.start_switchboard()
        assert bob.switchboard._publishers.policy.policy is None
        slow.set()
        await until(lambda: bob.switchboard._publishers.policy.policy == bob.gate.policy)


async def test_a_policy_that_got_lost_on_its_way_is_asked_for(monkeypatch):
    monkeypatch.setattr(switchboard_module, "TICK", 0.05)
    monkeypatch.setattr(publishers_module, "ASK_AGAIN", 0.1)
    async with two_nodes() as (alice, bob):
        await alice.ask("switchboard", Connect(bob.peer))
        bob.gate.subscribers.clear()
        bob.gate.publish(peers=[])
        await until(lambda: not bob.connections("alice"))


async def test_a_peer_that_is_removed_during_its_handshake_is_not_let_in():
    async with two_nodes() as (alice, bob):
        upgrade = bob.switchboard._reach._upgrader.inbound

        async def slow(sock, judge, account):
            upgraded = await upgrade(sock, judge, account)
            bob.gate.publish(peers=[])
            await until(lambda: bob.switchboard._publishers.policy.policy == bob.gate.policy)
            return upgraded

        bob.switchboard._reach._upgrader.inbound = slow
        error = await refusal(alice.ask("switchboard", Connect(bob.peer)))
        assert error.code == "not-authorised"
        assert not bob.connections("alice")
        assert [one.allowed for one in bob.gate.decided if one.peer == alice.peer] == [True, False]


async def test_descriptors_that_are_no_sockets_are_refused(tmp_path):
    async with two_nodes() as (alice, bob):
        file = os.open(tmp_path, os.O_RDONLY)
        error = await refusal(alice.ask("switchboard", OpenAttached(bob.peer, (ECHO,), Descriptor(os.dup(file)))))
        assert error.code == "not-a-tcp-socket"
        alice.tell("switchboard", AttachSocket("1-1", Descriptor(file)))
        await alice.ask("switchboard", ReadStatus())


async def test_only_actors_of_services_serve_what_services_are_called_by():
    async with LocalNode.open("bob") as bob:
        error = await refusal(bob.ask("switchboard", ServeProtocol(ECHO)))
        assert error.code == "not-allowed"
        assert ECHO not in bob.switchboard._protocols.names()


async def test_a_removed_peer_is_cut_at_once():
    async with two_nodes(services={"echo": None}) as (alice, bob):
        server = Server()
        await bob.start(server, "service/echo")
        opened = await alice.ask("switchboard", OpenStream(bob.peer, (ECHO,)))
        await until(lambda: server.streams)
        with open_descriptor(opened.stream) as near, server.streams[0][1] as far:
            bob.gate.publish(peers=[])
            assert parse_reset(await read(near)) == ResetCode.CONNECTION_LOST
            assert (await read(far))[0] == RESET
            await until(lambda: not bob.connections("alice") and not alice.connections("bob"))
        error = await refusal(alice.ask("switchboard", Connect(bob.peer)))
        assert error.code == "not-authorised"


async def test_a_peer_that_we_removed_is_cut_also_where_we_dialled():
    async with two_nodes() as (alice, bob):
        await alice.ask("switchboard", Connect(bob.peer))
        alice.gate.publish(peers=[])
        await until(lambda: not bob.connections("alice") and not alice.connections("bob"))


async def test_a_service_that_is_taken_away_loses_its_streams_and_nothing_else():
    async with two_nodes(services={"echo": None, "other": None}) as (alice, bob):
        echo, other = Server(), Server("/peerup/other/1.0.0")
        await bob.start(echo, "service/echo")
        await bob.start(other, "service/other")
        lost = await alice.ask("switchboard", OpenStream(bob.peer, (ECHO,)))
        kept = await alice.ask("switchboard", OpenStream(bob.peer, ("/peerup/other/1.0.0",)))
        await until(lambda: echo.streams and other.streams)
        with open_descriptor(lost.stream) as near, open_descriptor(kept.stream) as unharmed:
            bob.gate.publish(services={"echo": ["carol"], "other": None})
            assert parse_reset(await read(near)) == ResetCode.GATED
            unharmed.send(b"Dx")
            assert await read(other.streams[0][1]) == b"Dx"
            assert len(bob.connections("alice")) == 1
        for _, far in (*echo.streams, *other.streams):
            far.close()


async def test_an_expired_peer_is_cut_by_the_clock():
    async with two_nodes(services={"echo": None}) as (alice, bob):
        await alice.ask("switchboard", Connect(bob.peer))
        bob.gate.publish(peers=["alice"], expires={"alice": bob.switchboard.context.wall() + 0.3})
        await until(lambda: bob.switchboard._publishers.policy.policy.version == bob.gate.policy.version)
        assert bob.connections("alice")
        await until(lambda: not bob.connections("alice"))
        wall = bob.switchboard.context.wall()
        assert bob.switchboard._publishers.policy.decide_connection(alice.peer, wall).rule == "expired:1"


async def test_both_sides_dial_at_once_and_keep_the_same_connection():
    async with two_nodes(services={"echo": None}) as (alice, bob):
        bob.config.say_where("alice", alice.address)
        await until(lambda: bob.switchboard._reach.book.addresses(alice.peer))
        server = Server()
        await bob.start(server, "service/echo")
        dialled = []

        async def dial(node, peer):
            connection, _ = await node.switchboard._dial_now(peer)
            dialled.append(connection)

        for node in (alice, bob):
            node.switchboard._dial_now = dial_without_looking(node.switchboard)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(dial, alice, bob.peer)
            nursery.start_soon(dial, bob, alice.peer)
        await until(lambda: len(alice.connections("bob")) == len(bob.connections("alice")) == 2)
        near, far = alice.connections("bob")[0], bob.connections("alice")[0]
        assert near.local_address == far.remote_address, "both use the same one of the two"
        await until(lambda: len(alice.connections("bob")) == len(bob.connections("alice")) == 1)
        assert alice.connections("bob") == [near]
        assert bob.connections("alice") == [far]
        assert (near.outbound and alice.peer < bob.peer) or (not near.outbound and bob.peer < alice.peer)
        opened = await alice.ask("switchboard", OpenStream(bob.peer, (ECHO,)))
        assert opened.connection.id == near.id


def dial_without_looking(switchboard):
    async def dial(peer):
        dialed = await switchboard._reach.dialer.dial(peer, switchboard._reach.book.addresses(peer))
        return dialed.connection, dialed.tried

    return dial


async def test_a_needed_peer_is_connected_again_after_its_switchboard_was_replaced():
    async with two_nodes() as (alice, bob):
        alice.tell("switchboard", NeedPeer(bob.peer))
        await until(lambda: alice.connections("bob"))
        first = alice.connections("bob")[0]
        await bob.stop("switchboard")
        await until(lambda: first.end is not None)
        await bob.start_switchboard()
        assert bob.address.split("/")[-1] == str(first.remote_address).rsplit("/", 1)[-1], "the same port"
        await until(lambda: alice.connections("bob"))
        status = await alice.ask("switchboard", ReadStatus())
        peer = next(one for one in status.peers if one.peer == bob.peer)
        assert peer.needed_by == ("test",)
        alice.tell("switchboard", ReleasePeer(bob.peer))
        await until(lambda: not alice.switchboard._reach.keeper.peers())


async def test_the_listening_socket_is_inherited_with_its_backlog():
    async with two_nodes() as (alice, bob):
        copies = [descriptor.fileno() for descriptor in bob.checkpoints["switchboard"].descriptors]
        assert len(copies) == 1
        await bob.stop("switchboard")
        with socket.create_connection(("127.0.0.1", int(bob.address.rsplit("/", 1)[1])), 5):
            await bob.start_switchboard()
            await until(lambda: bob.switchboard._reception.silent == 1)
        connected = await alice.ask("switchboard", Connect(bob.peer))
        assert connected.connection.peer == bob.peer


async def test_where_peers_come_from_is_known_to_a_successor():
    async with two_nodes() as (alice, bob):
        await alice.ask("switchboard", Connect(bob.peer))
        await until(lambda: bob.checkpoints["switchboard"].state["known"])
        known = bob.checkpoints["switchboard"].state["known"]
        assert set(known) == {"127.0.0.1"}
        for _ in range(2):
            await bob.stop("switchboard")
            assert bob.checkpoints["switchboard"].descriptors
            await bob.start_switchboard()
            assert bob.checkpoints["switchboard"].state["known"] == known
        assert not bob.connections("alice")


async def test_who_needs_and_serves_is_forgotten_with_the_actor():
    async with two_nodes(services={"echo": None}) as (alice, bob):
        await bob.start(Server(), "service/echo")

        class Needy(Actor):
            async def start(self, checkpoint):
                self.context.tell("switchboard", NeedPeer(alice.peer))
                return {}

        await bob.start(Needy(), "proxy/alice/x")
        await until(lambda: bob.switchboard._reach.keeper.needed_by(alice.peer) == ("proxy/alice/x",))
        assert bob.switchboard.describe()["protocols"][ECHO] == "service/echo"
        await bob.stop("proxy/alice/x")
        await bob.stop("service/echo")
        await until(lambda: not bob.switchboard._reach.keeper.peers())
        await until(lambda: ECHO not in bob.switchboard._protocols.names())


async def test_a_protocol_has_one_server():
    async with LocalNode.open("bob") as bob:
        await bob.start(Server(), "service/echo")
        error = await refusal(bob.ask("switchboard", ServeProtocol(ECHO)))
        assert error.code == "already-served"
        assert "service/echo" in str(error)
        error = await refusal(bob.ask("switchboard", ServeProtocol(PING)))
        assert error.code == "already-served"
        await bob.ask("switchboard", WithdrawProtocol(ECHO))
        assert ECHO in bob.switchboard._protocols.names(), "only its own server can withdraw it"


async def test_a_new_service_is_pushed_to_connected_peers():
    async with two_nodes(services={"echo": None}) as (alice, bob):
        await alice.ask("switchboard", Connect(bob.peer))
        assert ECHO not in alice.connections("bob")[0].identification.protocols
        await bob.start(Server(), "service/echo")
        await until(lambda: ECHO in alice.connections("bob")[0].identification.protocols)


async def test_ping_and_peer_ups_ping():
    async with two_nodes() as (alice, bob):
        pinged = await alice.ask("switchboard", PingPeer(bob.peer))
        assert pinged.protocol == PING
        assert 0 < pinged.rtt < 1
        assert pinged.connected_in is not None
        assert (await alice.ask("switchboard", PingPeer(bob.peer))).connected_in is None
        bob.switchboard._protocols._own.pop(PING)
        bob.switchboard._publishers.policy._services.clear()
        denied = bob.switchboard._inbound.judge

        def without_ping(connection, protocol):
            from protocol.policy import Decision

            return Decision(allowed=False, rule="test") if protocol == PING else denied(connection, protocol)

        bob.switchboard._inbound.judge = without_ping
        pinged = await alice.ask("switchboard", PingPeer(bob.peer))
        assert pinged.protocol == PINGPONG


async def test_disconnect_closes_and_a_lost_peer_is_noticed():
    async with two_nodes() as (alice, bob):
        await alice.ask("switchboard", Connect(bob.peer))
        await alice.ask("switchboard", Disconnect(bob.peer))
        await until(lambda: not alice.connections("bob") and not bob.connections("alice"))


async def test_strangers_are_refused_and_counted_while_friends_get_in():
    async with two_nodes() as (alice, bob):
        host, port = "127.0.0.1", int(bob.address.rsplit("/", 1)[1])
        strangers = []
        for payload in (b"GET / HTTP/1.1\r\n\r\n", b"\x80\x80\x80\x80", b"\x13/multistream/2.0.0\n", b""):
            sock = socket.create_connection((host, port))
            sock.sendall(payload)
            strangers.append(sock)
        pinged = await alice.ask("switchboard", PingPeer(bob.peer))
        assert pinged.rtt < 1
        for sock in strangers[1:3]:
            sock.setblocking(False)
            assert await read_plain(sock) == b""
        for sock in strangers:
            sock.close()
        await until(lambda: bob.switchboard._reception.handshakes == 0)
        samples = bob.switchboard.context.metrics
        assert samples.counter("peerup_handshakes_refused_total", reason="security").value >= 3


async def read_plain(sock):
    with trio.fail_after(10):
        while True:
            try:
                return sock.recv(1000)
            except BlockingIOError:
                await trio.lowlevel.wait_readable(sock)
            except ConnectionResetError:
                return b""


async def test_slow_callers_do_not_keep_a_friend_out():
    async with two_nodes(admission={"concurrent": 4, "concurrent_per_source": 4, "patience": 0.2}) as (alice, bob):
        port = int(bob.address.rsplit("/", 1)[1])
        slow = [socket.create_connection(("127.0.0.1", port)) for _ in range(12)]
        for sock in slow:
            sock.sendall(b"\x13")
        await until(lambda: bob.switchboard._reception.waiting)
        with trio.fail_after(5):
            connected = await alice.ask("switchboard", Connect(bob.peer))
        assert connected.connection.peer == bob.peer
        for sock in slow:
            sock.close()
        samples = bob.switchboard.context.metrics
        assert samples.counter("peerup_handshakes_refused_total", reason="too-slow").value >= 4


async def test_a_port_in_use_is_told_in_words():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.RaisesGroup(pytest.RaisesExc(Exception, match="in use"), flatten_subgroups=True):
            async with LocalNode.open("alice", listen=(f"/ip4/127.0.0.1/tcp/{port}",)):
                pass


async def test_status_and_description_hold_no_secret_and_are_plain_data():
    import msgpack

    async with two_nodes() as (alice, bob):
        await alice.ask("switchboard", Connect(bob.peer))
        described = alice.switchboard.describe()
        assert msgpack.unpackb(msgpack.packb(described)) == described
        assert described["connections"][0]["peer"] == str(bob.peer)
        status = await alice.ask("switchboard", ReadStatus())
        assert [str(address) for address in status.listen_addresses] == [alice.address]


def test_unknown_limits_are_a_mistake_and_not_ignored():
    with pytest.raises(TypeError):
        Switchboard((), admission={"concurent": 1})
