"""Tunnels whose sockets the switchboard has: who owns them, who outlives whom, and what is counted."""

import contextlib
import socket
import struct

import pytest
import trio

from actors.proxy import tunnels as tunnels_module
from actors.proxy.service import ServiceServer
from actors.proxy.tunnels import is_untouched
from actors.switchboard import attached as attached_module
from actors.switchboard import closing as closing_module
from protocol.messages import Descriptor
from protocol.messages.switchboard import AdoptStreams, AttachSocket, CloseStreams, OpenAttached, PingPeer
from supervisor.errors import RefusedError
from tests.actors.local_node import LocalNode, echo, tcp_server, two_nodes, until

ECHO = "/peerup/echo/1.0.0"
PROXY, SERVICE = "proxy/bob/echo", "service/echo"


@contextlib.asynccontextmanager
async def tunnel(handler=echo):
    """A connected client behind a tunnel that has carried a byte each way."""
    async with tcp_server(handler) as port, two_nodes(services={"echo": None}) as (alice, bob):
        await bob.serve("echo", port)
        client = await trio.open_tcp_stream(*await alice.proxy("bob", "echo"))
        async with client:
            await exchange(client, b"x")
            yield alice, bob, client, port


async def exchange(client, data):
    await client.send_all(data)
    received = b""
    with trio.fail_after(10):
        while len(received) < len(data):
            part = await client.receive_some(65536)
            assert part, "the tunnel ended"
            received += part
    assert received == data


async def finish(client):
    await client.send_eof()
    with trio.fail_after(10):
        assert await client.receive_some(10) == b""


def let_attempts_never_end(monkeypatch, node):
    """From now on connections to the service are made by its actor, or rather never made."""

    async def never():
        await trio.sleep_forever()

    monkeypatch.setattr(node.actors[SERVICE], "_targets", ())
    monkeypatch.setattr(node.actors[SERVICE], "_look_up", never)
    node.switchboard._doors.forget(ECHO)


def counted(node, actor, direction):
    counter = node.actors[actor].context.metrics.counter(
        "peerup_tunnel_bytes_total",
        service="echo",
        role="client" if actor == PROXY else "server",
        direction=direction,
    )
    return counter.value


@pytest.mark.parametrize("side", ["client", "server"])
async def test_a_tunnel_outlives_the_actor_that_opened_it(side):
    async with tunnel() as (alice, bob, client, port):
        node, name = (alice, PROXY) if side == "client" else (bob, SERVICE)
        await node.kill(name)
        await exchange(client, bytes(100_000))
        if side == "client":
            await alice.proxy("bob", "echo")
        else:
            await bob.serve("echo", port)
        successor = node.actors[name].describe()
        assert successor["open"] == successor["attached"] == 1
        await exchange(client, b"once more")
        await finish(client)
        await until(lambda: alice.gate.ended and bob.gate.ended)
        assert node.actors[name].describe()["open"] == 0
        for ended in (alice.gate.ended, bob.gate.ended):
            assert [(one.sent, one.received, one.outcome) for one in ended] == [(100_010, 100_010, "finished")]


async def test_a_tunnel_that_ends_while_nobody_owns_it_is_still_in_the_audit_log():
    async with tunnel() as (alice, bob, client, _):
        await alice.kill(PROXY)
        await exchange(client, bytes(1000))
        await finish(client)
        await until(lambda: bob.gate.ended and not len(alice.switchboard._attached))
        assert not alice.gate.ended
        await alice.proxy("bob", "echo")
        await until(lambda: alice.gate.ended)
        ended = alice.gate.ended[0]
        assert (ended.sent, ended.received, ended.outcome, ended.peer) == (1001, 1001, "finished", bob.peer)
        await until(lambda: counted(alice, PROXY, "sent") == 1001)
        await until(lambda: not alice.switchboard._attached._owners)
        assert len(alice.gate.ended) == 1


async def test_ends_that_nobody_was_told_of_are_kept_of_every_peer(monkeypatch):
    monkeypatch.setattr(attached_module, "MAX_UNTOLD", 8)
    monkeypatch.setattr(attached_module, "TRIMMED", 1)
    monkeypatch.setattr(closing_module, "PACE", 0.0)
    async with tcp_server(echo) as port, two_nodes(services={"echo": None}) as (alice, bob):
        await bob.serve("echo", port)
        async with LocalNode.open("carol") as carol, contextlib.AsyncExitStack() as stack:
            carol.gate.publish(peers=["bob"], services={})
            carol.config.say_where("bob", bob.address)
            bob.gate.publish(peers=["alice", "carol"], services={"echo": None})
            clients = []
            for node, count in ((carol, 2), (alice, 12)):
                address = await node.proxy("bob", "echo")
                for _ in range(count):
                    clients.append(await stack.enter_async_context(await trio.open_tcp_stream(*address)))
                    await exchange(clients[-1], b"x")
            await bob.kill(SERVICE)
            for client in clients:
                await finish(client)
            await until(lambda: not bob.switchboard.describe()["streams_attached"])
            for node in (carol, alice):  # behind the question whether they have received everything
                await bob.ask("switchboard", PingPeer(node.peer))
            await bob.serve("echo", port)
            await until(lambda: len(bob.gate.ended) >= 8)
            ended = [one.peer for one in bob.gate.ended]
            assert len(ended) == 8
            assert ended.count(carol.peer) == 2, "one peer's many ends do not displace those of another"


async def test_streams_that_wait_for_the_address_of_their_service_wait_for_one_lookup():
    class Slow(trio.abc.HostnameResolver):
        def __init__(self):
            self.asked, self.answer = 0, trio.Event()

        async def getaddrinfo(self, host, port, *_):
            self.asked += 1
            await self.answer.wait()
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", int(port)))]

        async def getnameinfo(self, *_):
            raise NotImplementedError

    slow = Slow()
    async with tcp_server(echo) as port, two_nodes(services={"echo": None}) as (alice, bob):
        before = trio.socket.set_custom_hostname_resolver(slow)
        try:
            await bob.start(ServiceServer("echo", f"service.test:{port}"), SERVICE)
            address = await alice.proxy("bob", "echo")
            async with contextlib.AsyncExitStack() as stack:
                clients = [
                    await stack.enter_async_context(await trio.open_tcp_stream("127.0.0.1", address[1]))
                    for _ in range(60)
                ]
                for client in clients:
                    await client.send_all(b"y")
                await until(lambda: bob.actors[SERVICE].describe()["open"] == 60)
                assert slow.asked == 1
                slow.answer.set()
                for client in clients:
                    with trio.fail_after(10):
                        assert await client.receive_some(1) == b"y"
                assert slow.asked == 1
        finally:
            trio.socket.set_custom_hostname_resolver(before)


async def test_a_successor_adopts_later_from_a_switchboard_that_hangs(monkeypatch):
    monkeypatch.setattr(tunnels_module, "ADOPT_DEADLINE", 0.05)
    async with tunnel() as (alice, _, client, _):
        await alice.kill(PROXY)
        asked = []
        deliver = alice.deliver

        def loses(envelope, descriptors):
            if envelope.kind != AdoptStreams.KIND or asked.append(1) or len(asked) > 2:
                deliver(envelope, descriptors)

        monkeypatch.setattr(alice, "deliver", loses)
        await alice.proxy("bob", "echo")
        assert alice.actors[PROXY].describe()["open"] == 0
        await exchange(client, bytes(1000))
        await finish(client)
        await until(lambda: alice.gate.ended)
        assert (alice.gate.ended[0].sent, len(asked)) == (1001, 3)


async def test_bytes_are_counted_while_they_flow_and_once(monkeypatch):
    monkeypatch.setattr(attached_module, "TRAFFIC_INTERVAL", 0.0)
    async with tunnel() as (alice, bob, client, _):
        await exchange(client, bytes(5000))
        for node, name in ((alice, PROXY), (bob, SERVICE)):
            await until(lambda node=node, name=name: counted(node, name, "sent") == 5001)
            assert node.actors[name].describe()["sent_by_open"] == 5001
        await alice.kill(PROXY)
        await alice.proxy("bob", "echo")
        await exchange(client, bytes(300))
        await finish(client)
        await until(lambda: alice.gate.ended)
        assert counted(alice, PROXY, "sent") == 300  # what the successor has not heard from its predecessor's report
        assert alice.gate.ended[0].sent == 5301


@pytest.mark.parametrize("side", ["client", "server"])
async def test_stopping_an_actor_closes_its_tunnels(side):
    async with tunnel() as (alice, bob, client, _):
        node, name = (alice, PROXY) if side == "client" else (bob, SERVICE)
        await node.stop(name)
        with trio.fail_after(10), pytest.raises(trio.BrokenResourceError):
            await client.receive_some(1)
        assert node.gate.ended, "the account was closed before the actor ended"
        await until(lambda: alice.gate.ended and bob.gate.ended)
        assert node.gate.ended[0].outcome == "aborted: shutdown"
        assert (node.gate.ended[0].sent, node.gate.ended[0].received) == (1, 1)
        other = (bob if node is alice else alice).gate.ended[0]
        assert other.outcome == "stream-reset: shutdown"


async def test_the_end_of_the_switchboard_is_the_end_of_its_tunnels():
    async with tunnel() as (alice, bob, client, _):
        await alice.stop("switchboard")
        with trio.fail_after(10), pytest.raises(trio.BrokenResourceError):
            await client.receive_some(1)
        await until(lambda: alice.gate.ended and bob.gate.ended)
        # one that is stopped, not killed, still tells what it carried
        assert (alice.gate.ended[0].sent, alice.gate.ended[0].outcome) == (1, "stream-reset: shutdown")
        assert alice.actors[PROXY].describe()["open"] == 0


async def test_the_death_of_the_switchboard_is_the_end_of_its_tunnels_as_well():
    async with tunnel() as (alice, _, _, _):
        await until(lambda: alice.actors[PROXY].describe()["open"] == 1)
        await alice.kill("switchboard")
        await until(lambda: alice.gate.ended)
        assert alice.gate.ended[0].outcome == "stream-lost: lost"
        assert alice.actors[PROXY].describe()["open"] == 0
        for listener in alice.switchboard._listeners:
            listener.socket.close()
        for connection in alice.switchboard._table:
            connection.link._wire.close()
        for stream in alice.switchboard._attached._streams.values():
            stream.end._socket.close()


async def test_tunnels_of_an_owner_that_never_comes_back_are_reset(monkeypatch):
    monkeypatch.setattr(attached_module, "OWNER_PATIENCE", 0.1)
    async with tunnel() as (alice, _, client, _):
        await alice.kill(PROXY)
        with trio.fail_after(10), pytest.raises(trio.BrokenResourceError):
            await client.receive_some(1)
        await until(lambda: not alice.switchboard._attached._owners)


async def test_a_stream_that_waits_for_its_service_is_reset_in_time(monkeypatch):
    monkeypatch.setattr(attached_module, "OFFER_DEADLINE", 0.3)
    async with tcp_server(echo) as port, two_nodes(services={"echo": None}) as (alice, bob):
        await bob.serve("echo", port)
        address = await alice.proxy("bob", "echo")
        let_attempts_never_end(monkeypatch, bob)
        client = await trio.open_tcp_stream(*address)
        async with client:
            with trio.fail_after(10), pytest.raises(trio.BrokenResourceError):
                await client.receive_some(1)
        await until(lambda: alice.gate.ended and bob.gate.ended)
        assert alice.gate.ended[0].outcome == "stream-reset: service-unreachable"
        assert bob.gate.ended[0].outcome == "aborted: service-unreachable"
        assert bob.switchboard._attached.offered == 0


async def test_a_stream_that_waits_when_its_service_dies_is_reset(monkeypatch):
    async with tcp_server(echo) as port, two_nodes(services={"echo": None}) as (alice, bob):
        await bob.serve("echo", port)
        address = await alice.proxy("bob", "echo")
        let_attempts_never_end(monkeypatch, bob)
        client = await trio.open_tcp_stream(*address)
        async with client:
            await until(lambda: bob.switchboard._attached.offered == 1)
            await bob.kill(SERVICE)
            with trio.fail_after(10), pytest.raises(trio.BrokenResourceError):
                await client.receive_some(1)


async def test_more_bytes_than_may_wait_reset_their_stream(monkeypatch):
    monkeypatch.setattr(attached_module, "MAX_OFFERED_BYTES", 100_000)
    async with tcp_server(echo) as port, two_nodes(services={"echo": None}) as (alice, bob):
        await bob.serve("echo", port)
        address = await alice.proxy("bob", "echo")
        let_attempts_never_end(monkeypatch, bob)
        async with await trio.open_tcp_stream(*address) as modest, await trio.open_tcp_stream(*address) as greedy:
            await modest.send_all(bytes(50_000))
            await until(lambda: bob.switchboard._attached._offered_bytes == 50_000)
            await greedy.send_all(bytes(90_000))
            with trio.fail_after(10), pytest.raises(trio.BrokenResourceError):
                await greedy.receive_some(1)
            assert bob.switchboard._attached._offered_bytes == 50_000
            assert bob.switchboard._attached.offered == 1
            waiting = next(iter(bob.switchboard._attached._streams))
            server = await trio.open_tcp_stream("127.0.0.1", port)
            sock = server.socket.detach()
            await until(lambda: bob.actors[SERVICE]._tunnels.has_attached(waiting))
            bob.actors[SERVICE].connected(socket.socket(fileno=sock), waiting)
            await until(lambda: bob.switchboard._attached._offered_bytes == 0)
            with trio.fail_after(10):
                received = 0
                while received < 50_000:
                    received += len(await modest.receive_some(65536))


@pytest.mark.parametrize("limit", ["MAX_OFFERED", "MAX_OFFERED_PER_PEER"])
async def test_more_streams_than_may_wait_are_refused(monkeypatch, limit):
    monkeypatch.setattr(attached_module, limit, 0)
    async with tcp_server(echo) as port, two_nodes(services={"echo": None}) as (alice, bob):
        await bob.serve("echo", port)
        bob.switchboard._doors.forget(ECHO)
        address = await alice.proxy("bob", "echo")
        # OSError: so soon that it looks like a failed connection
        with trio.fail_after(10), pytest.raises((trio.BrokenResourceError, OSError)):
            async with await trio.open_tcp_stream(*address) as client:
                await client.receive_some(1)
        await until(lambda: alice.gate.ended)
        # the first stream to a peer waits for its agreement, a later one does not
        assert alice.gate.ended[0].outcome in ("stream-refused", "stream-reset: limit-exceeded")
        assert "limit-exceeded" in alice.actors[PROXY].describe()["last_failure"]


async def test_nobody_can_attach_to_or_close_what_another_owns():
    async with tunnel() as (alice, bob, client, _):
        near, far = socket.socketpair()
        with near:
            bob.tell("switchboard", AttachSocket("1-1", Descriptor(far.detach())))
            near.settimeout(5)
            assert await trio.to_thread.run_sync(near.recv, 1) == b""
        assert (await alice.ask("switchboard", CloseStreams())).ended == ()
        assert (await alice.ask("switchboard", AdoptStreams())).streams == ()
        await exchange(client, b"still here")


async def test_only_a_tcp_socket_can_be_attached():
    async with tunnel() as (alice, bob, _, _):
        near, far = socket.socketpair()
        with near:
            with pytest.raises(RefusedError) as caught:
                await alice.ask("switchboard", OpenAttached(bob.peer, (ECHO,), Descriptor(far.detach())))
            assert caught.value.code == "not-a-tcp-socket"
            assert near.recv(1) == b""


async def test_a_policy_cut_reaches_attached_streams():
    async with tunnel() as (alice, bob, client, _):
        bob.gate.publish(services={"echo": ["carol"]})
        with trio.fail_after(10), pytest.raises(trio.BrokenResourceError):
            await client.receive_some(1)
        await until(lambda: alice.gate.ended and bob.gate.ended)
        assert alice.gate.ended[0].outcome == bob.gate.ended[0].outcome == "stream-reset: gated"


def test_a_socket_is_untouched_until_somebody_reads_or_writes():
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accepted():
            client = socket.create_connection(server.getsockname())
            return client, server.accept()[0]

        client, sock = accepted()
        with client, sock:
            assert is_untouched(sock)
            client.sendall(b"hello")
            assert sock.recv(5, socket.MSG_PEEK) == b"hello"
            assert is_untouched(sock)
            client.shutdown(socket.SHUT_WR)
            sock.setblocking(True)
            assert sock.recv(10, socket.MSG_PEEK | socket.MSG_WAITALL) == b"hello"  # the end has come, too
            assert is_untouched(sock)
            sock.recv(1)
            assert not is_untouched(sock)
        client, sock = accepted()
        with client, sock:
            sock.sendall(b"x")
            assert not is_untouched(sock)
        client, sock = accepted()
        with sock:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.close()
        assert not is_untouched(sock)
    near, far = socket.socketpair()
    with near, far:
        assert not is_untouched(near)
