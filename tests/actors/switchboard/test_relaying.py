"""The relay's room: reservations, circuits, limits, policy; with real links and clients made of the same machines."""

import contextlib
import hashlib
import random
import time

import pytest
import trio

import actors.switchboard.hop_streams
import actors.switchboard.relaying
from actors import draining
from actors.reactor import READ
from protocol.circuit.addresses import circuit_address
from protocol.circuit.messages import HopMessage, HopType, Status, encode_message
from protocol.circuit.messages import Peer as Destination
from protocol.errors import LimitExceededError
from protocol.messages.relay import CircuitLimit
from protocol.multiaddr import Multiaddr
from protocol.multistream import encode_message as multistream_message
from protocol.protocol_ids import CIRCUIT_STOP
from protocol.stream_descriptor import ResetCode
from tests.actors.dataplane import no_leaks, until
from tests.actors.switchboard.relay_world import ANNOUNCED, content, relaying, rules, scoped, sends


async def pair(world):
    """Two peers, of which `home` has a reservation."""
    home, laptop = world.connect("home"), world.connect("laptop", ip="198.51.100.9")
    assert (await home.reserve()).state == "granted"
    return home, laptop


async def test_a_reservation_tells_addresses_expiry_limit_and_a_voucher_that_verifies():
    async with no_leaks(), relaying(rules(ttl=1800, circuit=CircuitLimit(60, 5000))) as world:
        home = world.connect("home")
        machine = await home.reserve()
        grant = machine.grant
        assert abs(grant.expire - (time.time() + 1800)) < 30
        relay = world.key.peer_id
        assert grant.addresses == (circuit_address(ANNOUNCED.with_peer_id(relay), home.id),)
        assert (grant.limit.duration, grant.limit.data) == (60, 5000)
        assert grant.voucher.expiration == grant.expire
        (held,) = world.room.status().held
        assert (held.peer, held.expires, held.renewed) == (home.id, grant.expire, False)
        await home.reserve()
        assert world.room.status().held[0].renewed
        assert world.room.status().requests == {"reserve granted": 2}


async def test_who_is_out_in_the_internet_is_told_of_public_addresses_alone():
    async with relaying() as world:
        private, public, name = (
            Multiaddr(text) for text in ("/ip4/10.0.0.5/tcp/1", "/ip4/5.6.7.8/tcp/1", "/dns4/relay.example/tcp/1")
        )

        async def told(client, ip):
            granted = (await world.connect(client, ip=ip).reserve()).grant
            return [str(address).partition("/p2p/")[0] for address in granted.addresses]

        world.addresses = (private, public, name)
        assert await told("far", "51.15.1.1") == [str(public), str(name)]
        assert await told("near", "10.0.0.9") == [str(private), str(public), str(name)]
        world.addresses = (private,)
        # it announces the address that it has dialled itself
        assert await told("farther", "51.15.1.2") == []


async def test_without_the_keyring_a_reservation_goes_without_a_voucher():
    async with relaying() as world:
        world.context.keyring_is_there = False
        machine = await world.connect("home").reserve()
        assert machine.state == "granted"
        assert machine.grant.voucher is None
        assert world.context.series()["peerup_relay_vouchers_missing_total{}"] == 1


async def test_a_circuit_carries_bytes_both_ways_and_each_end_by_itself():
    async with no_leaks(), relaying() as world:
        home, laptop = await pair(world)
        near, far = await laptop.circuit(home)
        near.channel.send(b"question")
        near.channel.finish()
        await until(lambda: far.finished, "the end of the question")
        assert far.take() == b"question"
        far.channel.send(b"answer")
        await until(lambda: near.data == b"answer", "the answer")
        assert not near.finished
        (open_circuit,) = world.room.status().open
        assert (open_circuit.source, open_circuit.destination) == (laptop.id, home.id)
        assert (open_circuit.to_destination, open_circuit.to_source) == (8, 6)
        far.channel.finish()
        await until(lambda: near.finished, "the end of the answer")
        await until(lambda: world.room.status().circuits == 0, "the end of the circuit")
        assert world.room.status().requests["circuit finished"] == 1
        status = world.room.status()
        assert (status.to_destination, status.to_source) == (8, 6)
        assert world.exchanges == 0


@pytest.mark.parametrize("direct", [True, False])
async def test_much_both_ways_at_once(direct):
    async with relaying(direct=direct) as world:
        home, laptop = await pair(world)
        near, far = await laptop.circuit(home)
        up, down = content(20_000_000, 1), content(20_000_000, 2)
        sends(near, up)
        sends(far, down)
        await until(lambda: near.finished and far.finished, "all of it")
        assert hashlib.sha256(far.data).digest() == hashlib.sha256(up).digest()
        assert hashlib.sha256(near.data).digest() == hashlib.sha256(down).digest()
        await until(lambda: world.room.status().circuits == 0, "the end of the circuit")
        assert world.room.describe()["windows_grown_by"] == 0


@pytest.mark.parametrize("limited", [False, True])
async def test_many_circuits_between_the_same_peers_with_pieces_of_all_sizes(limited):
    # small frames share messages; what is sealed straight from where it came must leave its neighbours alone
    limits = rules(bytes_per_second=scoped(total=1_000_000_000)) if limited else rules()
    async with no_leaks(), relaying(limits) as world:
        home, laptop = await pair(world)
        circuits = [await laptop.circuit(home) for _ in range(12)]
        dice = random.Random(7)
        sent = {end: bytearray() for circuit in circuits for end in circuit}
        for _ in range(400):
            for circuit in circuits:
                source, target = dice.sample(circuit, 2)
                piece = dice.randbytes(dice.choice((1, 11, 13, 200, 5000, 65_507)) if dice.random() < 0.5 else 30)
                with contextlib.suppress(LimitExceededError):  # its queue is full
                    source.channel.send(piece)
                    sent[target] += piece
            await trio.lowlevel.checkpoint()
        for circuit in circuits:
            for end in circuit:
                end.channel.finish()
        await until(lambda: all(end.finished for circuit in circuits for end in circuit), "all of it")
        assert all(end.data == sent[end] for circuit in circuits for end in circuit)
        total = sum(map(len, sent.values()))
        status = world.room.status()
        assert status.to_destination + status.to_source == total
        await until(lambda: world.room.status().circuits == 0, "the end of all circuits")


async def test_early_bytes_travel_behind_connect_and_what_follows_ok_behind_ok():
    async with relaying() as world:
        home, laptop = await pair(world)
        near, far = await laptop.circuit(home, early=b"hello early")
        assert far.take() == b"hello early"
        (offered,) = home.offered
        # in one piece with the proposal: no round trip lies between them
        assert offered.first.startswith(b"\x13/multistream/1.0.0\n" + multistream_message(CIRCUIT_STOP))
        assert offered.first.endswith(b"hello early")
        assert offered.machine.source == laptop.id
        near.channel.send(b"more")
        await until(lambda: far.data == b"more", "what came later")
        assert world.room.status().to_destination == len(b"hello early" + b"more")


async def test_a_reset_passes_through_with_its_code():
    async with relaying() as world:
        home, laptop = await pair(world)
        near, far = await laptop.circuit(home)
        near.channel.reset(0x4711)
        await until(lambda: far.code is not None, "the reset")
        assert far.code == 0x4711
        near, far = await laptop.circuit(home)
        far.channel.send(b"x" * 1000)
        far.channel.reset(ResetCode.LOCAL_RESET)
        await until(lambda: near.code is not None, "the reset back")
        assert near.code == ResetCode.LOCAL_RESET
        await until(lambda: world.room.status().circuits == 0, "no circuit")
        assert world.room.status().requests["circuit reset"] == 2


@pytest.mark.parametrize("lost", [False, True])
async def test_a_reset_stays_behind_what_came_before_it(lost):
    async with relaying(rules(bytes_per_second=scoped(total=100_000))) as world:
        home, laptop = await pair(world)
        near, far = await laptop.circuit(home)
        sent = content(250_000)  # within a window, and much more than goes on at once
        before = near.channel.sent
        near.channel.send(sent)
        await until(lambda: near.channel.sent == before + len(sent), "all of it on its way to the relay")
        await until(lambda: world.room.describe()["waiting_for_rate"] > 0, "bytes that wait at the relay")
        if lost:
            await until(lambda: laptop.connections[0].link.received > len(sent), "all of it at the relay")
            laptop.links[0].abort()
        else:
            near.channel.reset(ResetCode.LOCAL_RESET)
        await until(lambda: far.code is not None, "the reset")
        assert bytes(far.data) == sent
        assert far.code == (ResetCode.CONNECTION_LOST if lost else ResetCode.LOCAL_RESET)
        await until(lambda: world.room.status().circuits == 0, "no circuit")


async def test_a_reset_waits_for_nobody_who_does_not_read(monkeypatch):
    monkeypatch.setattr(draining, "PATIENCE", 0.2)
    async with relaying() as world:
        home, laptop = await pair(world)
        near, far = await laptop.circuit(home)
        home.links[0].reactor.modify(home.sockets[0].fileno(), 0)  # it reads nothing any more
        sends(near, content(30_000_000))
        (session,) = (connection.link.session for connection in laptop.connections)
        await until(lambda: any(stream.receive_window < 65_507 for stream in session), "a window that is used up")
        near.channel.reset(ResetCode.LOCAL_RESET)
        await until(lambda: world.room.status().circuits == 0, "the end of the circuit")
        home.links[0].reactor.modify(home.sockets[0].fileno(), READ)
        await until(lambda: far.code is not None, "the reset, once it reads again")


async def test_a_lost_connection_ends_its_circuits_and_its_reservation():
    async with relaying() as world:
        home, laptop = await pair(world)
        near, _ = await laptop.circuit(home)
        home.links[0].abort()
        await until(lambda: near.code is not None, "the end of the circuit")
        assert near.code == ResetCode.CONNECTION_LOST
        assert world.room.status().reservations == 0
        machine, _ = await laptop.ask(home)
        assert machine.refusal.status == Status.NO_RESERVATION


async def test_a_reservation_stays_with_another_direct_connection_but_not_with_a_relayed_one():
    async with relaying() as world:
        home, laptop = await pair(world)
        world.connect("home")
        home.links[0].abort()
        await until(lambda: len(world.table.of(home.id)) == 1, "the end of one connection")
        assert world.room.status().reservations == 1
        await laptop.circuit(home)
        world.connect("home", relayed=True)
        home.links[1].abort()
        await until(lambda: world.room.status().reservations == 0, "the end of the reservation")


async def test_nothing_is_granted_over_a_relayed_connection():
    async with relaying() as world:
        home = world.connect("home", relayed=True)
        machine = await home.reserve()
        assert machine.refusal.status == Status.PERMISSION_DENIED


async def test_both_ends_need_the_policy_and_refusals_are_noted():
    async with relaying() as world:
        home, laptop = await pair(world)
        world.denied = {"home"}
        machine, _ = await laptop.ask(home)
        assert machine.refusal.status == Status.PERMISSION_DENIED
        (noted,) = world.refused
        assert (noted[0].peer, noted[1].rule) == (laptop.id, "not-listed")
        world.denied = {"nobody"}
        machine, _ = await laptop.ask(home)
        assert machine.state == "open"


async def test_a_new_policy_ends_what_it_does_not_allow():
    async with relaying() as world:
        home, laptop = await pair(world)
        near, far = await laptop.circuit(home)
        world.denied = {"laptop"}
        world.room.policy_changed()
        await until(lambda: near.over and far.over, "the end of the circuit")
        assert far.code == near.code == ResetCode.GATED
        assert world.room.status().reservations == 1
        world.denied = {"home"}
        world.room.policy_changed()
        assert world.room.status().reservations == 0


async def test_refusals_say_which_limit():
    async with relaying(rules(circuits=scoped(peer=1), reservations=scoped(ip=1))) as world:
        home, laptop = await pair(world)
        await laptop.circuit(home)
        machine, _ = await laptop.ask(home)
        assert machine.refusal.status == Status.RESOURCE_LIMIT_EXCEEDED
        assert "limit of 1 circuits for each peer" in machine.refusal.reason
        other = world.connect("other")
        machine = await other.reserve()
        assert machine.refusal.status == Status.RESERVATION_REFUSED
        assert "each IP address" in machine.refusal.reason
        assert world.room.status().requests["reserve reservations-per-ip"] == 1
        series = world.context.series()
        assert series["peerup_relay_events_total{kind=connect,outcome=circuits-per-peer}"] == 1


async def test_the_limit_of_bytes_cuts_after_just_so_many():
    async with relaying(rules(circuit=CircuitLimit(None, 100_000))) as world:
        home, laptop = await pair(world)
        near, far = await laptop.circuit(home, early=b"e" * 1000)
        sends(near, content(300_000))
        await until(lambda: far.code is not None and near.code is not None, "the cut")
        assert far.code == ResetCode.LIMIT_EXCEEDED
        assert len(far.data) <= 100_000
        assert world.room.status().to_destination == 100_000
        near, far = await laptop.circuit(home)
        sends(far, content(100_000))
        await until(lambda: near.finished, "exactly as many")
        assert len(near.data) == 100_000


async def test_the_limit_of_seconds_cuts_in_time():
    async with relaying(rules(circuit=CircuitLimit(1, None))) as world:
        home, laptop = await pair(world)
        near, far = await laptop.circuit(home)
        began = time.monotonic()
        await until(lambda: near.code is not None and far.code is not None, "the cut")
        assert near.code == ResetCode.LIMIT_EXCEEDED
        assert time.monotonic() - began > 0.9
        assert world.room.status().requests["circuit circuit-seconds"] == 1


async def test_guests_have_limits_of_their_own():
    async with relaying(rules(guest_circuit=CircuitLimit(60, 1000))) as world:
        world.guests = {"home"}
        home, laptop = await pair(world)
        machine, _ = await laptop.ask(home)
        assert (machine.limit.duration, machine.limit.data) == (60, 1000)
        world.guests = set()
        machine, _ = await laptop.ask(home)
        assert machine.limit is None


async def test_rates_are_kept_and_shared_evenly():
    async with relaying(rules(bytes_per_second=scoped(total=16_000_000))) as world:
        home = world.connect("home")
        await home.reserve()
        circuits = [await world.connect(f"client {number}").circuit(home) for number in range(8)]
        began = time.monotonic()
        sent = content(8_000_000)
        for near, _ in circuits:
            sends(near, sent)

        def got():
            return [len(far.data) for _, far in circuits]

        # what may come at once goes to whoever comes first; from then on everybody gets the same
        await until(lambda: sum(got()) > 6_000_000, "the burst")
        before = got()
        await until(lambda: sum(got()) > 22_000_000, "a second's worth")
        elapsed = time.monotonic() - began
        shares = [after - earlier for after, earlier in zip(got(), before, strict=True)]
        assert min(shares) > 0.7 * max(shares), shares
        assert sum(got()) <= 16_000_000 * elapsed + 4_000_000 + 8 * 65_507
        # limits that change apply at once
        world.room.serve(rules())
        await until(lambda: all(far.finished for _, far in circuits), "all of it, without a limit")
        assert all(len(far.data) == len(sent) for _, far in circuits)


async def test_one_who_waits_for_a_budget_of_its_own_holds_up_nobody():
    async with relaying(rules(bytes_per_second=scoped(ip=100_000))) as world:
        home, laptop = world.connect("home", ip="192.0.2.1"), world.connect("laptop", ip="192.0.2.2")
        fast, quick = world.connect("fast", ip="198.51.100.1"), world.connect("quick", ip="198.51.100.2")
        await home.reserve()
        await fast.reserve()
        slow_near, slow_far = await laptop.circuit(home)
        sends(slow_near, content(10_000_000))
        await until(lambda: world.room.describe()["waiting_for_rate"] > 0, "somebody who waits")
        near, far = await quick.circuit(fast)
        sends(near, content(60_000))
        await until(lambda: far.finished, "what is within the other budget")
        assert not slow_far.finished


async def test_a_peer_that_does_not_read_costs_no_more_than_a_window():
    async with relaying() as world:
        home, laptop = await pair(world)
        near, far = await laptop.circuit(home)
        home.links[0].reactor.modify(home.sockets[0].fileno(), 0)  # it reads nothing any more
        sends(near, content(30_000_000))
        (session,) = (connection.link.session for connection in laptop.connections)
        await until(lambda: any(stream.receive_window < 65_507 for stream in session), "a window that is used up")
        assert sum(stream.window for stream in session) <= 1024 * 1024
        home.links[0].reactor.modify(home.sockets[0].fileno(), READ)
        await until(lambda: far.finished, "all of it, once it reads again")
        assert len(far.data) == 30_000_000


async def test_windows_of_all_circuits_together_keep_within_the_budget(monkeypatch):
    monkeypatch.setattr(actors.switchboard.relaying, "WINDOW_GROWTH", 300_000)
    async with relaying() as world:
        home, laptop = await pair(world)
        circuits = [await laptop.circuit(home) for _ in range(4)]
        grown = 0

        def all_arrived():
            nonlocal grown
            grown = max(grown, world.room.describe()["windows_grown_by"])
            return all(far.finished for _, far in circuits)

        for near, _ in circuits:
            sends(near, content(8_000_000))
        await until(all_arrived, "all of it")
        assert 0 < grown < 300_000 + 256 * 1024


async def test_a_target_that_refuses_does_not_speak_stop_or_hangs_up_is_told_as_failed():
    async with relaying() as world:
        home, laptop = await pair(world)
        home.accept = False
        machine, _ = await laptop.ask(home)
        assert machine.refusal.status == Status.CONNECTION_FAILED
        assert "not you" in machine.refusal.reason
        home.speaks_stop = False
        machine, _ = await laptop.ask(home)
        assert machine.refusal.status == Status.CONNECTION_FAILED
        home.speaks_stop = True
        home.silent = True
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def hang_up():
                await until(lambda: len(home.offered) == 3, "the third circuit")
                home.offered[-1].stream.channel.reset(ResetCode.GATED)

            machine, _ = await laptop.ask(home)
        assert machine.refusal.status == Status.CONNECTION_FAILED
        assert "gated" in machine.refusal.reason
        assert world.room.status().circuits == 0
        await until(lambda: world.exchanges == 0, "the end of all exchanges")


async def test_a_client_that_hangs_up_takes_its_circuit_along():
    async with relaying() as world:
        home, laptop = await pair(world)
        home.silent = True
        stream = laptop.hop(encode_message(HopMessage(HopType.CONNECT, peer=Destination(home.id))))
        await until(lambda: home.offered, "the stop stream")
        assert world.room.status().circuits == 1
        stream.channel.reset(7)
        await until(lambda: home.offered[0].stream.code == 7, "the reset at the target")
        assert world.room.status().circuits == 0
        assert world.exchanges == 0


async def test_a_target_that_never_answers_is_given_up(monkeypatch):
    monkeypatch.setattr("protocol.reservations.HANDSHAKE_TIMEOUT", 0.3)
    async with relaying() as world:
        home, laptop = await pair(world)
        home.silent = True
        machine, _ = await laptop.ask(home)
        assert machine.refusal.status == Status.CONNECTION_FAILED
        assert "in time" in machine.refusal.reason
        await until(lambda: home.offered[0].stream.code is not None, "the end of the stop stream")


async def test_streams_that_never_ask_are_ended_and_so_are_those_not_closed(monkeypatch):
    monkeypatch.setattr(actors.switchboard.hop_streams, "REQUEST_TIMEOUT", 0.2)
    monkeypatch.setattr(actors.switchboard.hop_streams, "LINGER", 0.2)
    async with relaying() as world:
        home = world.connect("home")
        silent = home.hop()
        slow = home.hop(b"\x05\x08")
        await until(lambda: silent.code is not None and slow.code is not None, "the end of both")
        assert world.room.status().requests == {"unknown request-timeout": 2}
        stubborn = home.hop(encode_message(HopMessage(HopType.RESERVE)))
        await until(lambda: stubborn.finished, "the answer")
        await until(lambda: stubborn.code is not None, "the reset")
        assert world.exchanges == 0


async def test_nonsense_is_answered_and_forgotten():
    async with relaying() as world:
        home = world.connect("home")
        for data, status in [
            (b"\x04\xff\xff\xff\xff", Status.MALFORMED_MESSAGE),
            (b"\xff\xff\xff\xff\x7f", Status.MALFORMED_MESSAGE),
            (encode_message(HopMessage(HopType.STATUS, status=Status.OK)), Status.UNEXPECTED_MESSAGE),
        ]:
            stream = home.hop(data)
            assert await home.agreed(stream)
            await until(lambda stream=stream: stream.over, "the answer")
            answer = HopMessage.from_bytes(stream.take()[1:])
            assert answer.status == status
            stream.channel.finish()
        await until(lambda: world.exchanges == 0, "the end of all exchanges")


async def test_hop_is_offered_only_while_this_node_serves_as_a_relay():
    async with relaying(None) as world:
        home = world.connect("home")
        stream = home.hop()
        assert not await home.agreed(stream)
        world.room.serve(rules())
        assert (await home.reserve()).state == "granted"
        near, _ = await world.connect("laptop").circuit(home)
        world.room.withdraw()
        await until(lambda: near.code is not None, "the end of the circuit")
        assert near.code == ResetCode.SHUTDOWN
        assert not world.room.status().serving
        stream = home.hop()
        assert not await home.agreed(stream)
        world.room.serve(rules())
        assert world.room.status().reservations == 0


async def test_a_drain_grants_nothing_new_and_is_done_with_the_last_circuit():
    async with relaying() as world:
        home, laptop = await pair(world)
        near, far = await laptop.circuit(home)
        drained = []
        world.room.drain(lambda: drained.append(True))
        machine, _ = await laptop.ask(home)
        assert (machine.refusal.status, machine.refusal.reason) == (
            Status.RESOURCE_LIMIT_EXCEEDED,
            "the relay is shutting down",
        )
        assert (await laptop.reserve()).refusal.status == Status.RESERVATION_REFUSED
        near.channel.send(b"still works")
        await until(lambda: far.data == b"still works", "bytes of an open circuit")
        assert not drained
        near.channel.finish()
        far.channel.finish()
        await until(lambda: drained, "the end of the drain")
        world.room.serve(rules())
        await laptop.circuit(home)
