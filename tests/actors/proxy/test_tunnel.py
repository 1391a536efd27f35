"""Whole tunnels: client, proxy, switchboard, network, switchboard, service, server."""

import contextlib
import hashlib
import os
import socket
import struct

import pytest
import trio

from protocol.messages import Descriptor
from protocol.messages.proxy import Attach
from protocol.messages.switchboard import StreamReport
from supervisor.errors import RefusedError
from tests.actors.local_node import echo, peer_of, tcp_server, two_nodes, until

MIB = 1024 * 1024
NO_LINGER = struct.pack("ii", 1, 0)


@contextlib.asynccontextmanager
async def tunnel(handler=echo, **proxy_options):
    """A server behind a tunnel; yields both nodes and the proxy's address."""
    async with tcp_server(handler) as port, two_nodes(services={"echo": None}) as (alice, bob):
        await bob.serve("echo", port)
        address = await alice.proxy("bob", "echo", **proxy_options)
        yield alice, bob, address


def counters(node, actor, name, **labels):
    return node.actors[actor].context.metrics.counter(name, **labels).value


async def read_all(stream):
    data = bytearray()
    async for piece in stream:
        data += piece
    return bytes(data)


async def is_reset(address, first=b""):
    """Whether a client that connects is reset."""
    try:
        client = await trio.open_tcp_stream(*address)
    except OSError:
        return b"", True  # so soon that it looks like a failed connection
    async with client:
        try:
            if first:
                await client.send_all(first)
            return await client.receive_some(10), False
        except trio.BrokenResourceError:
            return b"", True


async def test_one_byte_comes_back_through_the_tunnel():
    async with tunnel() as (alice, bob, address):
        with trio.fail_after(10):
            client = await trio.open_tcp_stream(*address)
            async with client:
                await client.send_all(b"x")
                assert await client.receive_some(10) == b"x"
                await client.send_eof()
                assert await client.receive_some(10) == b""
            await until(lambda: alice.gate.ended and bob.gate.ended)
        near, far = alice.gate.ended[0], bob.gate.ended[0]
        assert (near.role, near.service, near.peer) == ("client", "echo", bob.peer)
        assert (far.role, far.service, far.peer) == ("server", "echo", alice.peer)
        for ended in (near, far):
            assert (ended.sent, ended.received, ended.outcome) == (1, 1, "finished")
            assert ended.path.startswith("direct tcp /ip4/127.0.0.1/tcp/")
        allowed = [one for one in bob.gate.decided if one.subject == "/peerup/echo/1.0.0"]
        assert [(one.peer, one.allowed, one.rule) for one in allowed] == [(alice.peer, True, "authorized_keys:1")]
        labels = {"service": "echo", "role": "client"}
        assert counters(alice, "proxy/bob/echo", "peerup_tunnel_bytes_total", direction="sent", **labels) == 1
        assert counters(alice, "proxy/bob/echo", "peerup_tunnels_ended_total", outcome="finished", **labels) == 1


async def test_forty_streams_in_parallel_keep_their_bytes():
    async with tunnel() as (_, _, address):
        wrong = []

        async def exchange(number):
            content = hashlib.shake_256(str(number).encode()).digest(300_000)
            client = await trio.open_tcp_stream(*address)
            async with client, trio.open_nursery() as nursery:

                async def send():
                    for start in range(0, len(content), 7_001):
                        await client.send_all(content[start : start + 7_001])
                    await client.send_eof()

                nursery.start_soon(send)
                if hashlib.sha256(await read_all(client)).digest() != hashlib.sha256(content).digest():
                    wrong.append(number)

        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                for number in range(40):
                    nursery.start_soon(exchange, number)
        assert not wrong


async def test_each_direction_ends_by_itself():
    questions = []

    async def answers_after_the_end(stream):
        questions.append(await read_all(stream))
        await stream.send_all(b"answer")
        await stream.send_eof()

    async with tunnel(answers_after_the_end) as (_, _, address):
        with trio.fail_after(10):
            client = await trio.open_tcp_stream(*address)
            async with client:
                await client.send_all(b"question")
                await client.send_eof()
                assert await read_all(client) == b"answer"
    assert questions == [b"question"]


async def test_a_server_that_speaks_first_and_ends_first():
    heard = []

    async def greets(stream):
        await stream.send_all(b"SSH-2.0-test\r\n")
        await stream.send_eof()
        heard.append(await read_all(stream))

    async with tunnel(greets) as (_, _, address):
        with trio.fail_after(10):
            client = await trio.open_tcp_stream(*address)
            async with client:
                assert await read_all(client) == b"SSH-2.0-test\r\n"
                await client.send_all(b"bye")
                await client.send_eof()
                await until(lambda: heard)
    assert heard == [b"bye"]


async def test_a_reset_by_the_server_reaches_the_client_as_a_reset():
    async def resets(stream):
        await stream.receive_some(1)
        stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NO_LINGER)
        stream.socket.close()

    async with tunnel(resets) as (alice, bob, address):
        with trio.fail_after(10):
            assert await is_reset(address, b"x") == (b"", True)
        await until(lambda: alice.gate.ended and bob.gate.ended)
        assert bob.gate.ended[0].outcome == "local-reset: local-reset"
        assert alice.gate.ended[0].outcome == "stream-reset: local-reset"
        told = alice.actors["proxy/bob/echo"].describe()["last_failure"]
        assert told == "stream-reset: local-reset (the service, on the peer's side, broke the connection off)"


async def test_a_reset_by_the_client_reaches_the_server_as_a_reset():
    seen, heard = [], []

    async def watches(stream):
        try:
            while data := await stream.receive_some(100):
                heard.append(data)
            seen.append("end")
        except trio.BrokenResourceError:
            seen.append("reset")

    async with tunnel(watches) as (alice, _, address):
        client = await trio.open_tcp_stream(*address)
        await client.send_all(b"x")
        await until(lambda: heard)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NO_LINGER)
        await client.aclose()
        await until(lambda: seen)
        await until(lambda: alice.gate.ended)
        assert alice.gate.ended[0].outcome == "local-reset: local-reset"
    assert seen == ["reset"]


async def test_a_client_that_resets_before_there_is_a_stream_is_told_of():
    async with tunnel() as (alice, _, address):
        await alice.stop("switchboard")
        alice.starting.add("switchboard")
        client = await trio.open_tcp_stream(*address)
        await until(lambda: alice.actors["proxy/bob/echo"].describe()["being_set_up"])
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NO_LINGER)
        await client.aclose()
        await alice.start_switchboard()
        await until(lambda: alice.gate.ended)
        assert alice.gate.ended[0].outcome == "socket-lost"


async def test_a_slow_reader_stops_the_sender_and_nothing_piles_up():
    async def holds(stream):
        await go_on.wait()
        received.append(len(await read_all(stream)))
        await stream.send_eof()

    go_on, received = trio.Event(), []
    async with tunnel(holds) as (_alice, _bob, address):
        client = await trio.open_tcp_stream(*address)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
        sent = 0
        async with client:
            block = bytes(65536)
            while True:  # as much as the whole way takes while nobody reads
                with trio.move_on_after(0.5) as blocked:
                    sent += await client.socket.send(block)
                if blocked.cancelled_caught:
                    break
                assert sent < 64 * MIB, "somebody buffers without bound"
            other = await trio.open_tcp_stream(*address)  # other streams go on
            await other.aclose()
            go_on.set()
            await client.send_all(b"end")
            await client.send_eof()
            assert await read_all(client) == b""
        await until(lambda: len(received) == 2)
        assert max(received) == sent + 3


async def test_a_service_that_is_down_is_told_on_both_sides():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    async with two_nodes(services={"echo": None}) as (alice, bob):
        await bob.serve("echo", port)
        address = await alice.proxy("bob", "echo")
        with trio.fail_after(10):
            assert await is_reset(address) == (b"", True)
        await until(lambda: alice.gate.ended and bob.gate.ended)
        assert alice.gate.ended[0].outcome == "stream-reset: service-unreachable"
        assert bob.gate.ended[0].outcome == "service-unreachable"
        assert "connection refused" in bob.actors["service/echo"].describe()["last_failure"]
        assert alice.actors["proxy/bob/echo"].describe()["last_failure"] == (
            "stream-reset: service-unreachable (the service does not accept connections on the peer's side)"
        )


async def test_a_service_at_a_name_is_looked_up():
    async with tcp_server(echo) as port, two_nodes(services={"echo": None, "lost": None}) as (alice, bob):
        await bob.serve("echo", port, host="localhost")
        await bob.serve("lost", port, host="nowhere.invalid")
        with trio.fail_after(20):
            client = await trio.open_tcp_stream(*await alice.proxy("bob", "echo"))
            async with client:
                await client.send_all(b"x")
                assert await client.receive_some(1) == b"x"
            assert await is_reset(await alice.proxy("bob", "lost")) == (b"", True)
        await until(lambda: "nowhere.invalid" in bob.actors["service/lost"].describe()["last_failure"])


async def test_a_service_at_an_interface_that_is_not_there_is_told():
    async with two_nodes(services={"echo": None}) as (alice, bob):
        await bob.serve("echo", 9, host="[fe80::1%nowhere]")
        with trio.fail_after(10):
            assert await is_reset(await alice.proxy("bob", "echo")) == (b"", True)
        await until(lambda: bob.gate.ended)
        assert bob.gate.ended[0].outcome == "service-unreachable"


async def test_only_the_switchboard_brings_streams_and_news_of_them():
    async with tunnel() as (alice, bob, _):
        for node, actor in ((alice, "proxy/bob/echo"), (bob, "service/echo")):
            with pytest.raises(RefusedError, match="only the switchboard"):
                await node.ask(actor, StreamReport((), ()))


async def test_a_service_that_is_not_offered_resets_the_client_and_says_why():
    async with tunnel() as (alice, _bob, _):
        address = await alice.proxy("bob", "other")
        with trio.fail_after(10):
            assert await is_reset(address) == (b"", True)
        await until(lambda: alice.gate.ended)
        assert "does not offer" in alice.actors["proxy/bob/other"].describe()["last_failure"]
        assert alice.gate.ended[0].outcome == "protocol-not-supported"


async def test_a_peer_that_is_offline_resets_the_client_and_says_why():
    async with tunnel() as (alice, bob, address):
        await bob.stop("switchboard")
        bob.checkpoints.clear()  # and nobody keeps its port open
        await until(lambda: not alice.connections("bob"))
        with trio.fail_after(10):
            assert await is_reset(address) == (b"", True)
        assert "connection refused" in alice.actors["proxy/bob/echo"].describe()["last_failure"]


async def test_removing_the_peer_resets_its_tunnels():
    async with tunnel() as (_alice, bob, address):
        client = await trio.open_tcp_stream(*address)
        async with client:
            await client.send_all(b"x")
            assert await client.receive_some(1) == b"x"
            bob.gate.publish(peers=[])
            with trio.fail_after(10), pytest.raises(trio.BrokenResourceError):
                await client.receive_some(1)


async def test_a_new_connection_waits_for_a_switchboard_that_is_being_replaced():
    async with tunnel() as (alice, _bob, address):
        await alice.stop("switchboard")
        alice.starting.add("switchboard")
        client = await trio.open_tcp_stream(*address)
        async with client:
            await client.send_all(b"x")
            await until(lambda: alice.actors["proxy/bob/echo"].describe()["being_set_up"] == 1)
            await alice.start_switchboard()
            with trio.fail_after(10):
                assert await client.receive_some(1) == b"x"


async def test_a_service_is_registered_again_with_a_new_switchboard():
    async with tunnel() as (_alice, bob, address):
        await bob.stop("switchboard")
        await bob.start_switchboard()
        await until(lambda: "/peerup/echo/1.0.0" in bob.switchboard._protocols.names())
        with trio.fail_after(10):
            client = await trio.open_tcp_stream(*address)
            async with client:
                await client.send_all(b"x")
                assert await client.receive_some(1) == b"x"


async def test_the_local_port_outlives_the_proxy():
    async with tunnel() as (alice, _bob, address):
        actor = alice.actors["proxy/bob/echo"]
        await alice.stop("proxy/bob/echo")
        client = await trio.open_tcp_stream(*address)  # it waits in the backlog
        async with client:
            await client.send_all(b"x")
            assert await alice.proxy("bob", "echo") == address
            assert alice.actors["proxy/bob/echo"] is not actor
            with trio.fail_after(10):
                assert await client.receive_some(1) == b"x"


async def test_another_listen_address_does_not_inherit_the_old_one():
    async with tunnel() as (alice, _bob, address):
        await alice.stop("proxy/bob/echo")
        assert await alice.proxy("bob", "echo", "127.0.0.2:0") != address
        with pytest.raises(OSError, match="all attempts to connect"):
            await trio.open_tcp_stream(*address)


async def test_too_many_connections_are_refused_and_the_others_go_on():
    async with tunnel(limit=2) as (alice, _bob, address):
        async with contextlib.AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(await trio.open_tcp_stream(*address)) for _ in range(2)]
            for client in clients:
                await client.send_all(b"x")
                assert await client.receive_some(1) == b"x"
            assert await is_reset(address) == (b"", True)
            await until(lambda: alice.actors["proxy/bob/echo"].describe()["open"] == 2)
            await clients[0].send_all(b"y")
            assert await clients[0].receive_some(1) == b"y"
        await until(lambda: alice.actors["proxy/bob/echo"].describe()["open"] == 0)
        client = await trio.open_tcp_stream(*address)
        async with client:
            await client.send_all(b"x")
            assert await client.receive_some(1) == b"x"


async def test_a_socket_can_be_attached():
    async with tunnel() as (alice, _bob, _):
        await alice.stop("proxy/bob/echo")
        assert await alice.proxy("bob", "echo", None) is None
        near, far = socket.socketpair()
        await alice.ask("proxy/bob/echo", Attach(Descriptor(far.detach())))
        near.setblocking(False)
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(near))
        with trio.fail_after(10):
            async with stream:
                await stream.send_all(b"over standard input")
                await stream.send_eof()
                assert await read_all(stream) == b"over standard input"


async def test_a_descriptor_that_is_no_socket_is_refused(tmp_path):
    async with tunnel() as (alice, _bob, _):
        with pytest.raises(RefusedError) as caught:
            await alice.ask("proxy/bob/echo", Attach(Descriptor(os.open(tmp_path, os.O_RDONLY))))
        assert caught.value.code == "not-a-socket"


async def test_an_attached_socket_that_leads_nowhere_is_refused_in_words():
    async with tunnel() as (alice, _bob, _):
        await alice.proxy("bob", "other", None)
        near, far = socket.socketpair()
        with near:
            with pytest.raises(RefusedError, match="does not offer") as caught:
                await alice.ask("proxy/bob/other", Attach(Descriptor(far.detach())))
            assert caught.value.code == "protocol-not-supported"
            assert near.recv(1) == b""


async def test_descriptions_are_plain_data():
    import msgpack

    async with tunnel() as (alice, bob, address):
        client = await trio.open_tcp_stream(*address)
        async with client:
            await client.send_all(b"x")
            assert await client.receive_some(1) == b"x"
            proxy, service = alice.actors["proxy/bob/echo"], bob.actors["service/echo"]
            await until(lambda: proxy.describe()["open"] == service.describe()["open"] == 1)
            near, far = proxy.describe(), service.describe()
        for described in (near, far):
            assert msgpack.unpackb(msgpack.packb(described)) == described
        assert near["listen"] == f"{address[0]}:{address[1]}"
        assert near["peer"] == str(peer_of("bob"))
        assert far["registered"] is True
