"""Clients of a relay that mean harm: floods, silence, oversized and slow messages. Bounded, counted, and others go on.

The relay's room with real links; the peers here pass the policy, for those that do not never get this far.
"""

import contextlib
import gc
import time
import tracemalloc

import pytest
import trio

import actors.switchboard.hop_streams
import actors.switchboard.relaying
from actors.reactor import READ
from actors.switchboard.relaying import MAX_EXCHANGES_PER_CONNECTION
from protocol.circuit.exchange import HANDSHAKE_TIMEOUT, MAX_EARLY
from protocol.circuit.hop_client import ConnectClient, ReserveClient
from protocol.circuit.messages import HopMessage, HopType, Refusal, Status, encode_message
from protocol.circuit.messages import Peer as Destination
from protocol.errors import PeerupError
from protocol.stream_descriptor import ResetCode
from protocol.varint import encode_varint
from tests.actors.dataplane import no_leaks, until
from tests.actors.switchboard.relay_world import ANNOUNCED, content, key_of, relaying, rules, scoped

RESERVE = encode_message(HopMessage(HopType.RESERVE))


async def works(world, name="witness"):
    """Somebody else gets a reservation, and a circuit to it that carries bytes."""
    target = world.connect(f"{name}'s home", ip="198.51.100.77")
    assert (await target.reserve()).state == "granted"
    near, far = await world.connect(name, ip="203.0.113.77").circuit(target)
    near.channel.send(b"still here")
    await until(lambda: far.data == b"still here", "the bytes of somebody else")
    near.channel.reset(0)


async def test_reservations_of_many_peers_at_one_address_are_limited_and_others_get_theirs():
    limits = rules(reservations=scoped(ip=5, network=7, total=12))
    async with no_leaks(), relaying(limits) as world:
        states = [(await world.connect(f"flood {number}", ip="192.0.2.1").reserve()).state for number in range(20)]
        assert states.count("granted") == 5
        neighbours = [(await world.connect(f"near {number}", ip="192.0.2.2").reserve()).state for number in range(5)]
        assert neighbours.count("granted") == 2  # the network is full
        await works(world)
        told = world.room.status()
        assert told.requests["reserve reservations-per-ip"] == 15
        assert told.requests["reserve reservations-per-network"] == 3
        assert told.reservations == 8


async def test_one_peer_that_asks_all_the_time_is_refused_and_pays_for_it_alone():
    async with relaying(rules(requests=scoped(peer=10, ip=15))) as world:
        flood = world.connect("flood", ip="192.0.2.1")
        results = [await flood.reserve() for _ in range(30)]
        refused = [machine.refusal for machine in results if machine.state == "refused"]
        assert len(refused) == 20
        assert {refusal.status for refusal in refused} == {Status.RESERVATION_REFUSED}
        assert "limit of 10 requests in 60 seconds for each peer" in refused[0].reason
        # its reservation, made before, is as it was; its neighbours at the same address have what is left of theirs
        assert world.room.status().reservations == 1
        assert (await world.connect("neighbour", ip="192.0.2.1").reserve()).state == "granted"
        await works(world)
        assert world.room.status().requests["reserve requests-per-peer"] == 20


async def test_circuits_to_peers_without_a_reservation_cost_nobody_a_stream():
    async with relaying(rules(requests=scoped(peer=50))) as world:
        flood, quiet = world.connect("flood"), world.connect("quiet")
        for number in range(60):
            machine, _ = await flood.ask(quiet)
            expected = Status.NO_RESERVATION if number < 50 else Status.RESOURCE_LIMIT_EXCEEDED
            assert machine.refusal.status == expected
        assert quiet.offered == []
        stranger = ConnectClient(key_of("nobody at all").peer_id)
        stream = world.connect("other").hop(stranger.data_to_send())
        await until(lambda: stream.over, "the answer")
        stream.channel.finish()
        assert world.room.status().circuits == 0
        await until(lambda: world.exchanges == 0, "the end of all exchanges")
        assert world.room.status().requests["connect no-reservation"] == 50


async def test_streams_that_never_ask_take_a_bounded_part_of_the_room(monkeypatch):
    monkeypatch.setattr(actors.switchboard.hop_streams, "REQUEST_TIMEOUT", 1.0)
    async with relaying() as world:
        silent = world.connect("silent")
        streams = [silent.hop() for _ in range(MAX_EXCHANGES_PER_CONNECTION + 40)]
        await until(lambda: sum(stream.code is not None for stream in streams) == 40, "the reset of those too many")
        assert {stream.code for stream in streams} == {None, ResetCode.LIMIT_EXCEEDED}
        assert world.exchanges == MAX_EXCHANGES_PER_CONNECTION
        await works(world)
        await until(lambda: all(stream.code is not None for stream in streams), "the end of the silent ones")
        assert world.exchanges == 0
        assert (await silent.reserve()).state == "granted"
        assert world.room.status().requests["unknown too-many-exchanges"] == 40
        assert world.room.status().requests["unknown request-timeout"] == MAX_EXCHANGES_PER_CONNECTION


@pytest.mark.parametrize("crowd", [4, 160])
async def test_all_connections_together_cannot_fill_the_room(monkeypatch, crowd):
    monkeypatch.setattr(actors.switchboard.relaying, "MAX_EXCHANGES", 100)
    async with relaying() as world:
        clients = [world.connect(f"silent {number}") for number in range(crowd)]
        streams = [client.hop() for client in clients for _ in range(160 // crowd)]
        await until(lambda: sum(stream.code is not None for stream in streams) == 60, "the reset of those too many")
        assert world.exchanges == 100
        # Those who say nothing keep nobody out.
        await works(world)
        assert world.exchanges <= 100
        counted = world.room.status().requests
        assert counted.get("unknown displaced", 0) + counted.get("unknown too-many-exchanges", 0) >= 60


async def test_circuits_that_never_open_cannot_fill_the_room_either(monkeypatch):
    monkeypatch.setattr(actors.switchboard.relaying, "MAX_EXCHANGES", 60)
    async with no_leaks(), relaying() as world:
        target = world.connect("their own")
        target.silent = True
        assert (await target.reserve()).state == "granted"
        for number in range(3):
            client = world.connect(f"client {number}")
            for _ in range(30):
                client.hop(ConnectClient(target.id).data_to_send())
        await until(lambda: world.exchanges == 60 and len(world.room.status().open) >= 50, "a full room")
        await works(world)
        assert world.exchanges <= 60
        assert world.room.status().circuits <= 60


@pytest.mark.parametrize(
    "data",
    [
        encode_varint(5000) + b"x" * 5000,
        encode_varint(1 << 40),
        b"\x80" * 30,
        b"\x00",
        encode_message(HopMessage(HopType.STATUS, status=Status.OK)),
        b"\x02\x08\x07",
        b"GET / HTTP/1.1\r\nHost: relay\r\n\r\n" * 100,
    ],
)
async def test_oversized_and_senseless_messages_are_answered_once_and_forgotten(data):
    async with relaying() as world:
        rude = world.connect("rude")
        for _ in range(20):
            stream = rude.hop(data)
            assert await rude.agreed(stream)
            await until(lambda stream=stream: stream.over, "an answer")
            stream.channel.reset(0)
        await until(lambda: world.exchanges == 0, "the end of all exchanges")
        outcomes = world.room.status().requests
        assert sum(outcomes.values()) == 20
        assert set(outcomes) <= {"unknown malformed", "unknown unexpected"}
        await works(world)


async def test_a_message_that_comes_byte_by_byte_has_its_time_and_no_more(monkeypatch):
    monkeypatch.setattr(actors.switchboard.hop_streams, "REQUEST_TIMEOUT", 0.5)
    async with relaying() as world:
        slow = world.connect("slow")
        stream = slow.hop()
        began = time.monotonic()
        whole = encode_message(HopMessage(HopType.CONNECT, peer=Destination(slow.id)))

        def drip(position=0):
            if stream.code is None and position < len(whole) - 1:
                stream.channel.send(whole[position : position + 1])
                world.reactor.call_later(0.05, lambda: drip(position + 1))

        drip()
        await until(lambda: stream.code is not None, "the end of patience")
        assert time.monotonic() - began < 5
        assert world.exchanges == 0


async def test_more_than_a_first_flight_before_the_circuit_is_open_is_refused():
    async with relaying() as world:
        home, eager = world.connect("home"), world.connect("eager")
        await home.reserve()
        home.silent = True
        stream = eager.hop(ConnectClient(home.id, early=b"e" * 100).data_to_send())
        await until(lambda: home.offered, "the stop stream")
        for _ in range(20):
            stream.channel.send(b"x" * 1024)
        await until(lambda: stream.over, "the refusal")
        assert await eager.agreed(stream)
        answer = HopMessage.from_bytes(stream.take()[1:])
        assert answer.status == Status.RESOURCE_LIMIT_EXCEEDED
        assert str(MAX_EARLY) in answer.reason
        await until(lambda: home.offered[0].stream.code is not None, "the reset at the target")
        assert world.room.status().circuits == 0


async def test_tiny_frames_to_a_peer_that_does_not_read_cost_about_their_bytes():
    async with relaying() as world:
        home, laptop = world.connect("home"), world.connect("laptop")
        await home.reserve()
        near, far = await laptop.circuit(home)
        (session,) = (connection.link.session for connection in laptop.connections)
        world.reactor.modify(home.sockets[0].fileno(), 0)  # it reads nothing any more
        near.channel.send(content(330_000))  # more than one window, and less than its consumption lets in
        await until(lambda: arrived(world, session) == 330_000, "what it does not admit")
        assert kept(session) > 100_000
        gc.collect()
        tracemalloc.start()
        try:
            for _ in range(20_000):
                near.channel.send(b"x")
            await until(lambda: arrived(world, session) == 350_000, "the tiny frames")
            grown = tracemalloc.get_traced_memory()[0]
        finally:
            tracemalloc.stop()
        assert kept(session) > 100_000, "it did read"
        assert grown < 20_000 * 20, f"20,000 frames of a byte cost {grown} bytes"
        world.reactor.modify(home.sockets[0].fileno(), READ)
        await until(lambda: len(far.data) == 350_000, "all of it")


def kept(session):
    """Bytes that a peer has sent and that did not go on."""
    return sum(stream.undelivered for stream in session)


def arrived(world, session):
    """Bytes of circuits that have come from this peer, which alone opens them."""
    return kept(session) + world.room.status().to_destination


async def test_a_flood_of_requests_leaves_nothing_behind():
    async with relaying(rules(requests=scoped(peer=100))) as world:
        flood = world.connect("flood")
        await flood.reserve()

        async def flood_some(count):
            for _ in range(count):
                machine = ReserveClient(world.key.peer_id, flood.id)
                stream = flood.hop(machine.data_to_send())
                await until(lambda stream=stream: stream.over, "the answer")
                stream.channel.finish()
            await until(lambda: world.exchanges == 0, "the end of all exchanges")
            gc.collect()

        await flood_some(200)
        tracemalloc.start()
        try:
            await flood_some(20)
            before = tracemalloc.get_traced_memory()[0]
            await flood_some(500)
            grown = tracemalloc.get_traced_memory()[0] - before
        finally:
            tracemalloc.stop()
        # timers that were cancelled stay in the reactor's heap until they would have been due, and nothing else does
        assert grown < 250_000, f"500 requests left {grown} bytes"


# ---- what changes while something is under way


@pytest.mark.parametrize("who", ["caller", "target"])
async def test_a_peer_that_loses_its_right_while_a_circuit_is_opened_gets_none(who):
    async with no_leaks(), relaying() as world:
        target, caller = world.connect("target"), world.connect("caller", ip="192.0.2.9")
        assert (await target.reserve()).state == "granted"
        target.silent = True
        machine = ConnectClient(target.id, early=b"first flight")
        stream = caller.hop(machine.data_to_send())
        assert await caller.agreed(stream)
        await until(lambda: target.offered and target.offered[0].machine.state == "deciding", "the offer")
        offered = target.offered[0]
        world.denied.add(who)
        world.room.policy_changed()
        await until(lambda: stream.over, "the refusal")
        machine.receive_data(stream.take())
        assert machine.refusal.status == Status.PERMISSION_DENIED
        # An answer that was on its way already opens nothing.
        offered.machine.accept()
        with contextlib.suppress(PeerupError):
            offered.stream.channel.send(offered.machine.data_to_send())
        await until(lambda: offered.stream.code is not None, "the end of the stop stream")
        assert world.room.status().circuits == 0
        stream.channel.finish()
        await until(lambda: world.exchanges == 0, "the end of the exchange")


async def test_an_answer_that_comes_as_the_time_for_it_ends_harms_nobody():
    async with no_leaks(), relaying() as world:
        target, caller = world.connect("target"), world.connect("caller", ip="192.0.2.9")
        assert (await target.reserve()).state == "granted"
        target.silent = True
        machine = ConnectClient(target.id)
        stream = caller.hop(machine.data_to_send())
        await until(lambda: target.offered and target.offered[0].machine.state == "deciding", "the offer")
        offered = target.offered[0]
        # Somebody asks for something at that moment, so that the table has closed the circuit and not told of it yet.
        table, later = world.room._served.table, world.context.now() + HANDSHAKE_TIMEOUT + 1
        assert not isinstance(table.reserve(caller.id, ANNOUNCED.ip, later, world.context.wall()), Refusal)
        offered.machine.accept()
        offered.stream.channel.send(offered.machine.data_to_send())
        await until(lambda: offered.stream.code is not None and stream.code is not None, "the end of both streams")
        await until(lambda: world.exchanges == 0, "the end of the exchange")
        assert world.room.status().circuits == 0
        assert world.room.status().open == ()
        assert target.connections[0].link.end is None
        assert caller.connections[0].link.end is None
        target.silent = False
        await works(world)


async def test_a_peer_that_loses_its_right_while_its_voucher_is_signed_gets_no_reservation(monkeypatch):
    async with no_leaks(), relaying() as world:
        signing, signed, ask = trio.Event(), trio.Event(), world.context.ask

        async def slowly(*arguments, **options):
            signing.set()
            await signed.wait()
            return await ask(*arguments, **options)

        monkeypatch.setattr(world.context, "ask", slowly)
        client = world.connect("client")
        machine = ReserveClient(world.key.peer_id, client.id)
        stream = client.hop(machine.data_to_send())
        with trio.fail_after(20):
            await signing.wait()
        assert world.room.status().reservations == 1
        world.denied.add("client")
        world.room.policy_changed()
        signed.set()
        assert await client.agreed(stream)
        await until(lambda: stream.over, "the answer")
        machine.receive_data(stream.take())
        assert machine.state == "refused"
        assert machine.refusal.status == Status.PERMISSION_DENIED
        assert world.room.status().reservations == 0
        stream.channel.finish()


async def test_nobody_reaches_itself_or_the_relay_by_way_of_the_relay():
    async with no_leaks(), relaying() as world:
        client = world.connect("client")
        second = world.connect("client")
        assert (await client.reserve()).state == "granted"
        for _ in range(2):
            machine, _ = await client.ask(second)
            assert (machine.state, machine.refusal.status) == ("refused", Status.CONNECTION_FAILED)
        relay = world.peers["relay"] = type(client)(world, "relay")
        machine, _ = await client.ask(relay)
        assert machine.state == "refused"
        assert machine.refusal.status in {Status.NO_RESERVATION, Status.PERMISSION_DENIED}
        assert not client.offered
        assert world.room.status().circuits == 0
