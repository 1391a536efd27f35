"""How many round trips to the relay lie between the wish for a tunnel and its first byte.

Alice and Bob reach the relay over forwarders that delay everything. A round trip is long here, so that the work of all
three nodes, which share this process, is small beside it; the bounds are those of the specification, and what is
expected is well within.
"""

import contextlib

import pytest
import trio

from protocol.messages.switchboard import Connect, Disconnect
from protocol.multiaddr import Multiaddr
from tests.actors.local_node import tcp_server, until
from tests.actors.switchboard.test_through_relays import node, relay, reserve

ROUND_TRIP = 0.4
"""Seconds."""


@contextlib.asynccontextmanager
async def far(target):
    """A TCP address that leads to `target` (a port), half a round trip away; so is the completion of a connection."""

    async def carry(source, sink, begin):
        sending, arriving = trio.open_memory_channel(10_000)

        async def read():
            async with sending:
                with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                    async for data in source:
                        await sending.send((max(trio.current_time(), begin) + ROUND_TRIP / 2, data))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                async for due, data in arriving:
                    await trio.sleep_until(due)
                    await sink.send_all(data)
            nursery.cancel_scope.cancel()

    async def handle(stream):
        begin = trio.current_time() + ROUND_TRIP  # when the caller would know that it is connected
        async with await trio.open_tcp_stream("127.0.0.1", target) as onward, trio.open_nursery() as nursery:
            for one, other in ((stream, onward), (onward, stream)):

                async def one_way(source=one, sink=other):
                    await carry(source, sink, begin)
                    nursery.cancel_scope.cancel()

                nursery.start_soon(one_way)

    async with tcp_server(handle) as port:
        yield port


@contextlib.asynccontextmanager
async def far_world(service):
    """Alice, the relay, Bob with a reservation and a service; ready when all have identified each other."""
    async with (
        relay() as middle,
        far(int(Multiaddr(middle.address).value("tcp"))) as alices,
        far(int(Multiaddr(middle.address).value("tcp"))) as bobs,
        node("alice", peers=["bob"]) as alice,
        node("bob", peers=["alice"], services={"it": None}) as bob,
        tcp_server(service) as port,
    ):
        for one, way in ((alice, alices), (bob, bobs)):
            one.config.relays = (f"/ip4/127.0.0.1/tcp/{way}/p2p/{middle.peer}",)
            one.config.tell()
            await until(lambda one=one: middle.peer in one.switchboard._reach.relays)
        await bob.serve("it", port)
        await reserve(bob, middle)
        await alice.ask("switchboard", Connect(middle.peer))
        await until(lambda: all(one.identification for one in middle.switchboard._table))
        yield alice, middle


async def first_byte(alice, client_first):
    """Round trips from the start of the proxy to the service's first byte."""
    began = trio.current_time()
    address = await alice.proxy("bob", "it")
    with trio.fail_after(30):
        async with await trio.open_tcp_stream(*address) as stream:
            if client_first:
                await stream.send_all(b"GET / HTTP/1.1\r\n\r\n")
            assert await stream.receive_some() == b"hello"
            return (trio.current_time() - began) / ROUND_TRIP


async def speaks_first(stream):
    await stream.send_all(b"hello")
    await stream.receive_some()


async def speaks_when_asked(stream):
    assert await stream.receive_some() == b"GET / HTTP/1.1\r\n\r\n"
    await stream.send_all(b"hello")
    await stream.receive_some()


@pytest.mark.parametrize("client_first", [False, True])
@pytest.mark.parametrize("connected", [True, False])
async def test_round_trips_to_the_first_byte(client_first, connected, record_property):
    async with far_world(speaks_when_asked if client_first else speaks_first) as (alice, middle):
        if not connected:
            await alice.ask("switchboard", Disconnect(middle.peer))
            await until(lambda: not alice.connections("relay"))
            alice.switchboard._reach.book._learned.clear()  # where the relay says that it is, which is near
        taken = await first_byte(alice, client_first)
        record_property("round_trips", taken)
        print(f"{'running' if connected else 'cold'} relay connection, {client_first=}: {taken:.2f} round trips")
        assert taken < (6 if connected else 8)


async def test_a_second_tunnel_takes_the_round_trip_of_the_service_alone(record_property):
    async with far_world(speaks_when_asked) as (alice, _):
        await first_byte(alice, client_first=True)
        await until(lambda: alice.connections("bob")[0].identification)
        proxy = alice.actors["proxy/bob/it"].describe()["listen"]
        host, _, port = proxy.rpartition(":")
        began = trio.current_time()
        with trio.fail_after(30):
            async with await trio.open_tcp_stream(host, int(port)) as stream:
                await stream.send_all(b"GET / HTTP/1.1\r\n\r\n")
                assert await stream.receive_some() == b"hello"
        taken = (trio.current_time() - began) / ROUND_TRIP
        record_property("round_trips", taken)
        print(f"warm: {taken:.2f} round trips")
        assert taken < 3, "to the peer and back is two"
