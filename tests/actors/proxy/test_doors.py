"""Doors: the switchboard accepts for proxies and connects to services, and asks their actors only where it must."""

import contextlib
import dataclasses
import errno
import os
import socket

import pytest
import trio

from actors.proxy import client as client_module
from actors.switchboard import doors as doors_module
from actors.switchboard.doors import Doors
from protocol.errors import LimitExceededError
from protocol.messages import Descriptor
from protocol.messages.doors import LendListener, ServeAt
from protocol.messages.switchboard import ServeProtocol
from protocol.yamux import BacklogError
from supervisor.errors import RefusedError
from tests.actors.dataplane import running
from tests.actors.local_node import echo, peer_of, tcp_server, two_nodes, until
from tests.support.processes import descriptors

ECHO = "/peerup/echo/1.0.0"
PROXY, SERVICE = "proxy/bob/echo", "service/echo"


@contextlib.asynccontextmanager
async def tunnel(handler=echo, *, serve=None, **proxy_options):
    """Two connected nodes, a service behind one and a proxy to it on the other: all that is known to both."""
    async with tcp_server(handler) as port, two_nodes(services={"echo": None}) as (alice, bob):
        await bob.serve("echo", port, **(serve or {}))
        address = await alice.proxy("bob", "echo", **proxy_options)
        await until(lambda: alice.switchboard._reach.known_to_speak(bob.peer, (ECHO,)))
        yield alice, bob, address


def listen_for(node, monkeypatch):
    """The kinds of messages that the node's proxy or service and its switchboard tell each other from now on."""
    kinds = []
    deliver = node.deliver

    def hear(envelope, descriptors):
        if {envelope.sender.partition("/")[0], envelope.target.partition("/")[0]} & {"proxy", "service"}:
            kinds.append(envelope.kind)
        deliver(envelope, descriptors)

    monkeypatch.setattr(node, "deliver", hear)
    return kinds


async def exchange(address, data=b"x"):
    """Through a new connection, to its clean end."""
    with trio.fail_after(10):
        async with await trio.open_tcp_stream(*address) as client:
            await client.send_all(data)
            await client.send_eof()
            received = b""
            async for part in client:
                received += part
            assert received == data


async def is_refused(address):
    with trio.fail_after(10):
        try:
            async with await trio.open_tcp_stream(*address) as client:
                return await client.receive_some(1) is None
        except (trio.BrokenResourceError, OSError):  # OSError: so soon that it looks like a failed connection
            return True


def ended(node, outcome):
    actor = PROXY if PROXY in node.actors else SERVICE
    role = "client" if actor == PROXY else "server"
    return (
        node.actors[actor]
        .context.metrics.counter("peerup_tunnels_ended_total", service="echo", role=role, outcome=outcome)
        .value
    )


async def test_a_tunnel_is_made_without_asking_the_actors(monkeypatch):
    async with tunnel() as (alice, bob, address):
        near, far = listen_for(alice, monkeypatch), listen_for(bob, monkeypatch)
        for _ in range(5):
            await exchange(address)
        await until(lambda: len(alice.gate.ended) == len(bob.gate.ended) == 5)
        for kinds in (near, far):
            assert set(kinds) <= {"switchboard.stream-report", "gate.tunnel-ended", "system.ok", "answer"} | {
                kind for kind in kinds if kind.startswith("system.")
            }
        for node, peer, role in ((alice, bob.peer, "client"), (bob, alice.peer, "server")):
            for one in node.gate.ended:
                assert (one.sent, one.received, one.outcome, one.peer, one.role) == (1, 1, "finished", peer, role)
                assert one.path.startswith("direct tcp /ip4/127.0.0.1/tcp/")
            assert ended(node, "finished") == 5
        assert alice.actors[PROXY].describe()["accepted_by"] == "switchboard"
        assert alice.switchboard.describe()["doors"] == {PROXY: f"accepts at port {address[1]} for {ECHO}"}
        assert bob.switchboard.describe()["doors"][SERVICE].startswith("connects to 127.0.0.1 port ")


async def test_a_client_that_sends_and_leaves_at_once_is_heard():
    heard = []

    async def listens(stream):
        data = b""
        async for part in stream:
            data += part
        heard.append(data)

    async with tunnel(listens) as (_, _, address):
        for _ in range(3):
            async with await trio.open_tcp_stream(*address) as client:
                await client.send_all(b"all that I have to say")
                await client.send_eof()
                with trio.fail_after(10):
                    assert await client.receive_some(1) == b""
        await until(lambda: len(heard) == 3)
        assert set(heard) == {b"all that I have to say"}


async def test_a_client_that_comes_while_the_peer_is_not_connected_comes_to_the_proxy(monkeypatch):
    async with tunnel() as (alice, _, address):
        for connection in alice.connections("bob"):
            connection.link.close()
        kinds = listen_for(alice, monkeypatch)
        # the keeper may be as fast as we are, so connections are closed again until a client comes in between
        with trio.fail_after(20):
            while "switchboard.caller-accepted" not in kinds:
                for connection in alice.connections("bob"):
                    connection.link.close()
                await exchange(address)
        assert "switchboard.open-attached" in kinds


async def test_the_switchboard_stops_accepting_when_the_proxy_dies_and_its_successor_goes_on():
    async with tunnel() as (alice, _, address):
        await alice.kill(PROXY)
        await until(lambda: not alice.switchboard._doors.describe())
        async with await trio.open_tcp_stream(*address) as client:  # it waits in the backlog
            await client.send_all(b"x")
            assert await alice.proxy("bob", "echo") == address
            with trio.fail_after(10):
                assert await client.receive_some(1) == b"x"
        await until(lambda: alice.actors[PROXY].describe()["accepted_by"] == "switchboard")


async def test_a_proxy_that_was_stopped_leaves_no_open_port():
    async with tunnel() as (alice, _, address):
        await alice.stop(PROXY)
        alice.checkpoints.clear()  # nobody is to follow
        assert not alice.switchboard._doors.describe()
        with pytest.raises(OSError, match="all attempts to connect"):
            await trio.open_tcp_stream(*address)


async def test_a_new_switchboard_is_lent_the_listener_and_meanwhile_the_proxy_accepts():
    async with tunnel() as (alice, _, address):
        await alice.stop("switchboard")
        await until(lambda: alice.actors[PROXY].describe()["accepted_by"] == PROXY)
        alice.starting.add("switchboard")
        async with await trio.open_tcp_stream(*address) as client:
            await client.send_all(b"x")
            await until(lambda: alice.actors[PROXY].describe()["being_set_up"] == 1)
            await alice.start_switchboard()
            with trio.fail_after(10):
                assert await client.receive_some(1) == b"x"
        await until(lambda: alice.actors[PROXY].describe()["accepted_by"] == "switchboard")
        await exchange(address)


async def test_a_proxy_without_descriptors_accepts_by_itself_and_lends_later(monkeypatch):
    """That it cannot lend its listener costs neither its life nor a descriptor."""
    monkeypatch.setattr(client_module, "LEND_PAUSE", 0.05)
    async with tunnel() as (alice, _, address):
        proxy = alice.actors[PROXY]
        real, starved = os.pipe2, True
        failures = []

        def pipe2(flags):
            if starved:
                failures.append(len(descriptors(os.getpid())))
                raise OSError(errno.EMFILE, "Too many open files")
            return real(flags)

        await alice.stop("switchboard")
        await until(lambda: proxy.describe()["accepted_by"] == PROXY)
        monkeypatch.setattr(os, "pipe2", pipe2)
        await alice.start_switchboard()
        await exchange(address)
        await until(lambda: len(failures) >= 3)
        assert alice.actors[PROXY] is proxy
        assert proxy.describe()["accepted_by"] == PROXY
        # What the exchange has left open goes; if each attempt cost a descriptor, five in a row were never equal.
        count = len(failures)
        await until(lambda: len(failures) >= count + 5 and len(set(failures[-5:])) == 1)
        starved = False
        await until(lambda: proxy.describe()["accepted_by"] == "switchboard")
        await exchange(address)


async def test_a_client_beyond_the_limit_is_reset_and_counted():
    async with tunnel(limit=1) as (alice, _, address):
        async with await trio.open_tcp_stream(*address) as client:
            await client.send_all(b"x")
            with trio.fail_after(10):
                assert await client.receive_some(1) == b"x"
            for _ in range(3):
                assert await is_refused(address)
            await until(lambda: ended(alice, "limit-exceeded") == 3)
            assert "limit" in alice.actors[PROXY].describe()["last_failure"]
        await until(lambda: not len(alice.switchboard._attached))
        await exchange(address)


async def test_a_stream_beyond_the_limit_of_the_service_is_reset_and_counted():
    async with tunnel(serve={"limit": 1}) as (alice, bob, address), await trio.open_tcp_stream(*address) as client:
        await client.send_all(b"x")
        with trio.fail_after(10):
            assert await client.receive_some(1) == b"x"
        assert await is_refused(address)
        await until(lambda: ended(bob, "limit-exceeded") == 1)
        await until(lambda: alice.gate.ended)
        assert alice.gate.ended[0].outcome == "stream-reset: limit-exceeded"


async def test_one_peer_has_no_more_than_its_share_of_a_service():
    async with tunnel(serve={"limit": 4}) as (alice, _, address), contextlib.AsyncExitStack() as stack:
        for _ in range(3):
            client = await stack.enter_async_context(await trio.open_tcp_stream(*address))
            await client.send_all(b"x")
            with trio.fail_after(10):
                assert await client.receive_some(1) == b"x"
        assert await is_refused(address)  # the fourth is kept for others
        await until(lambda: alice.gate.ended)
        assert alice.gate.ended[0].outcome == "stream-reset: limit-exceeded"
        await client.aclose()
        await until(lambda: len(alice.gate.ended) == 2)
        async with await trio.open_tcp_stream(*address) as again:
            await again.send_all(b"x")
            with trio.fail_after(10):
                assert await again.receive_some(1) == b"x"


class NoRoom:
    """A connection to a peer that takes no stream just now; the next time the kernel has no memory."""

    def __init__(self):
        self.link = self
        self.errors = [BacklogError("wait"), OSError(errno.ENOBUFS, "no buffer space")]

    def open_stream(self, **_):
        raise self.errors.pop(0) if self.errors else BacklogError("wait")


class Room:
    """All streams that there are."""

    def has_room(self, owner, limit):
        return True


async def test_a_failure_of_the_kernel_while_a_client_waits_costs_that_client_alone(monkeypatch):
    monkeypatch.setattr(doors_module, "PAUSE", 0.01)
    warned, told = [], []
    async with running() as reactor:
        connection = NoRoom()
        doors = Doors(
            reactor,
            Room(),
            speaking=lambda *_: connection,
            opened=lambda: None,
            tell=lambda *what: told.append(what),
            warn=warned.append,
        )
        reading, writing = os.pipe()
        with socket.create_server(("127.0.0.1", 0)) as listener:
            address = listener.getsockname()
            lent = LendListener(Descriptor(os.dup(listener.fileno())), Descriptor(reading), peer_of("bob"), "/x", 10)
            doors.lend("proxy/x", lent)
            with socket.create_connection(address), trio.fail_after(10):
                await until(lambda: warned)
            assert "no buffer space" in warned[0]
            connection.errors = [LimitExceededError("left to its actor")]
            with socket.create_connection(address), trio.fail_after(10):
                await until(lambda: told)  # it goes on accepting
        doors.close_all()
        os.close(writing)
        for _, message in told:
            message.socket.close()


async def test_a_service_that_does_not_accept_at_once_is_left_to_its_actor(monkeypatch):
    async with two_nodes(services={"echo": None}) as (alice, bob):
        with socket.create_server(("127.0.0.1", 0), backlog=0) as server, contextlib.ExitStack() as waiting:
            port = server.getsockname()[1]
            await bob.serve("echo", port)
            address = await alice.proxy("bob", "echo")
            await until(lambda: alice.switchboard._reach.known_to_speak(bob.peer, (ECHO,)))
            kinds = listen_for(bob, monkeypatch)
            others = set()
            for _ in range(4):  # the kernel now answers nobody any more until one is accepted
                first = waiting.enter_context(socket.socket())
                first.setblocking(False)
                first.connect_ex(("127.0.0.1", port))
                others.add(first.getsockname())
            async with await trio.open_tcp_stream(*address) as client:
                await client.send_all(b"x")
                await until(lambda: "switchboard.stream-offered" in kinds)
                server.setblocking(False)
                with trio.fail_after(30):
                    while True:
                        await trio.lowlevel.wait_readable(server)
                        accepted, who = server.accept()
                        waiting.enter_context(accepted)
                        if who not in others:
                            break
                    accepted.setblocking(False)
                    await trio.lowlevel.wait_readable(accepted)
                    assert accepted.recv(2) == b"x"


async def test_a_service_elsewhere_is_connected_by_its_actor(monkeypatch):
    async with two_nodes(services={"echo": None}) as (_, bob):
        kinds = listen_for(bob, monkeypatch)
        await bob.serve("echo", 9, host="192.0.2.1")
        assert "switchboard.serve-protocol" in kinds
        assert "switchboard.serve-at" not in kinds
        assert not bob.switchboard._doors.describe()


async def test_a_kernel_without_memory_costs_one_client_and_not_the_actor(monkeypatch):
    def no_memory(*_):
        raise OSError(errno.ENOBUFS, "no buffer space")

    monkeypatch.setattr("actors.proxy.service.fit_for_loopback", no_memory)
    async with two_nodes(services={"echo": None}) as (alice, bob):
        await bob.serve("echo", 9, host="192.0.2.1")
        address = await alice.proxy("bob", "echo")
        for number in (1, 2):
            assert await is_refused(address)
            await until(lambda number=number: len(alice.gate.ended) == number)
            assert alice.gate.ended[-1].outcome == "stream-reset: service-unreachable"


async def test_the_address_of_a_service_is_known_no_longer_than_its_actor_says_so():
    async with tcp_server(echo) as first, tcp_server(echo) as second, two_nodes(services={"echo": None}) as (_, bob):
        await bob.serve("echo", first)
        assert str(first) in bob.switchboard._doors.describe()[SERVICE]
        await bob.stop(SERVICE)
        bob.actors["test"].context.watch(SERVICE)
        await bob.serve("echo", second)
        assert str(second) in bob.switchboard._doors.describe()[SERVICE]
        bob.switchboard._protocols.serve(ECHO, SERVICE, attach=True)
        sock = bob.switchboard._doors.connect(SERVICE, ECHO)
        with sock:
            assert sock.getpeername()[1] == second
        assert bob.switchboard._doors.connect("service/other", ECHO) is None


async def test_who_does_not_serve_a_protocol_cannot_say_where_it_is():
    async with tunnel() as (_, bob, _):
        with pytest.raises(RefusedError) as caught:
            await bob.ask("switchboard", ServeAt(ECHO, ("127.0.0.1:22",), 10))
        assert caught.value.code == "not-serving"


@pytest.mark.parametrize("addresses", [(), ("192.0.2.1:22",), ("localhost:22",), ("nonsense",), ("[::1]:22",) * 5])
async def test_only_literal_addresses_of_this_machine_are_connected_to(addresses):
    async with two_nodes() as (_, bob):
        await bob.ask("switchboard", ServeProtocol("/test/1", attach=True))
        with pytest.raises(RefusedError) as caught:
            await bob.ask("switchboard", ServeAt("/test/1", addresses, 10))
        assert caught.value.code == "not-local"


async def test_only_proxies_can_lend_a_listener():
    async with two_nodes() as (alice, _):
        server, (reading, writing) = socket.create_server(("127.0.0.1", 0)), os.pipe()
        with pytest.raises(RefusedError) as caught:
            await alice.ask(
                "switchboard",
                LendListener(Descriptor(server.detach()), Descriptor(reading), peer_of("bob"), ECHO, 10),
            )
        os.close(writing)
        assert caught.value.code == "not-allowed"


@pytest.mark.parametrize("kind", ["pipe", "connected", "unix"])
async def test_only_a_listening_tcp_socket_can_be_lent(kind):
    async with tunnel(listen=None) as (alice, _, _):
        reading, writing = os.pipe()
        if kind == "pipe":
            descriptor = os.dup(reading)
        else:
            sock = socket.socket(socket.AF_UNIX if kind == "unix" else socket.AF_INET)
            descriptor = sock.detach()
        with pytest.raises(RefusedError) as caught:
            await alice.actors[PROXY].context.ask(
                "switchboard",
                LendListener(Descriptor(descriptor), Descriptor(reading), peer_of("bob"), ECHO, 10),
                timeout=10,
            )
        assert caught.value.code == "not-a-listener"
        with pytest.raises(BrokenPipeError):
            os.write(writing, b"the lease was given back")
        os.close(writing)


async def test_accepting_pauses_while_no_descriptor_is_left_and_goes_on(monkeypatch):
    monkeypatch.setattr(doors_module, "PAUSE", 0.02)
    async with tunnel() as (alice, _, address):
        door = alice.switchboard._doors._doors[PROXY]
        real, failures = door.listener, []

        class Starved:
            def accept(self):
                if len(failures) < 3:
                    failures.append(1)
                    raise OSError(errno.EMFILE, "too many open files")
                return real.accept()

            def __getattr__(self, name):
                return getattr(real, name)

        door.listener = Starved()
        await exchange(address)
        assert len(failures) == 3


async def test_clients_wait_while_the_peer_has_yet_to_accept_others(monkeypatch):
    async with tunnel() as (alice, _, address):
        session = alice.connections("bob")[0].link.session
        monkeypatch.setattr(session, "_limits", dataclasses.replace(session._limits, unacknowledged=2))
        async with trio.open_nursery() as nursery:
            for _ in range(60):
                nursery.start_soon(exchange, address)
        await until(lambda: len(alice.gate.ended) == 60)
        assert {one.outcome for one in alice.gate.ended} == {"finished"}


async def test_a_client_for_whom_no_stream_can_be_opened_is_told_of_in_time(monkeypatch):
    monkeypatch.setattr(doors_module, "PATIENCE", 0.1)
    async with tunnel() as (alice, _, address):
        session = alice.connections("bob")[0].link.session
        usual = session._limits
        monkeypatch.setattr(session, "_limits", dataclasses.replace(usual, unacknowledged=0))
        assert await is_refused(address)
        await until(lambda: alice.gate.ended)
        assert alice.gate.ended[0].outcome == "too-many-streams"
        # one that waits when its proxy is stopped is reset
        monkeypatch.setattr(doors_module, "PATIENCE", 60.0)
        async with await trio.open_tcp_stream(*address) as client:
            door = alice.switchboard._doors._doors[PROXY]
            await until(lambda: door.waiting is not None)
            await alice.stop(PROXY)
            with trio.fail_after(10), pytest.raises(trio.BrokenResourceError):
                await client.receive_some(1)
