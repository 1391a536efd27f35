"""A relay is stopped: what its clients, whole nodes in one process, do about it."""

import contextlib
import random

import pytest
import trio

from actors.switchboard.connections import LINGER, Connection, ConnectionTable
from actors.switchboard.departures import PATIENCE, PAUSE, RETURN, SUCCESSOR, Departures
from actors.switchboard.wire import Way
from protocol.messages.reachability import ConnectionLeaving, WatchConnections
from protocol.messages.relay import DrainRelay, ServeRelay, WithdrawRelay
from protocol.messages.switchboard import Connect, NeedPeer
from protocol.multiaddr import Multiaddr
from supervisor.actor import Actor, handles
from supervisor.errors import RefusedError
from tests.actors.local_node import echo, tcp_server, until
from tests.actors.switchboard.relay_world import rules
from tests.actors.switchboard.support import peer_of
from tests.actors.switchboard.test_through_relays import node, relay, reserve, world


class Drain:
    """The drain of a relay; its circuits may last for ever."""

    def __init__(self, middle, nursery):
        self.over = False
        nursery.start_soon(self._run, middle)

    async def _run(self, middle):
        await middle.actors["relay/server"].context.ask("switchboard", DrainRelay(), timeout=60)
        self.over = True


async def withdraw(middle):
    await middle.actors["relay/server"].context.ask("switchboard", WithdrawRelay(), timeout=20)


async def serve(middle):
    await middle.actors["relay/server"].context.ask("switchboard", ServeRelay(rules()), timeout=20)


async def says(stream, data):
    await stream.send_all(data)
    assert await stream.receive_some(len(data)) == data


async def test_an_idle_circuit_is_closed_by_its_ends_so_that_the_relay_need_not_wait():
    async with world() as (alice, middle, bob), trio.open_nursery() as nursery:
        await alice.ask("switchboard", Connect(bob.peer))
        (near,), (far,) = alice.connections("bob"), bob.connections("alice")
        await until(lambda: near.identification and far.identification)
        drain = Drain(middle, nursery)
        await until(lambda: drain.over)  # without end if nobody closes the circuit
        await until(lambda: near.end and far.end)
        assert {near.end.code, far.end.code} <= {"relay-leaving", "remote-close", "remote-go-away"}
        assert "relay-leaving" in {near.end.code, far.end.code}
        (to_relay,) = alice.connections("relay")
        assert to_relay.leaving
        assert to_relay.end is None, "its end is to tell when the relay has ended"


async def test_what_runs_goes_on_and_the_drain_ends_with_it():
    async with (
        world(services={"echo": None}) as (alice, middle, bob),
        tcp_server(echo) as port,
        trio.open_nursery() as nursery,
    ):
        await bob.serve("echo", port)
        address = await alice.proxy("bob", "echo")
        async with await trio.open_tcp_stream(*address) as stream:
            await says(stream, b"before")
            drain = Drain(middle, nursery)
            await until(lambda: peer_of("relay") in alice.switchboard._reach.departures)
            (relayed,) = alice.connections("bob")
            with trio.move_on_after(1.5):  # longer than whatever closes what is idle takes
                while True:
                    await says(stream, b"meanwhile")
            assert not drain.over
            assert relayed.end is None
            with pytest.raises(RefusedError) as caught:
                await alice.ask("switchboard", Connect(bob.peer))
            assert f"the relay {middle.peer} is shutting down" in caught.value.reason
            assert len(alice.connections("relay")) == 1, "nobody dials a relay that is leaving"
        await until(lambda: drain.over and relayed.end)


async def test_what_is_cut_in_the_end_is_told_why():
    async with (
        world(services={"echo": None}) as (alice, middle, bob),
        tcp_server(echo) as port,
        trio.open_nursery() as nursery,
    ):
        await bob.serve("echo", port)
        address = await alice.proxy("bob", "echo")
        async with await trio.open_tcp_stream(*address) as stream:
            await says(stream, b"before")
            Drain(middle, nursery)
            await until(lambda: peer_of("relay") in alice.switchboard._reach.departures)
            (near,), (far,) = alice.connections("bob"), bob.connections("alice")
            await withdraw(middle)
            with contextlib.suppress(trio.BrokenResourceError):
                assert await stream.receive_some() == b""
        await until(lambda: near.end and far.end)
        for end in (near.end, far.end):
            assert (end.code, end.reason) == ("circuit-cut", f"the relay {middle.peer} is shutting down")
        proxy = alice.actors["proxy/bob/echo"]
        await until(lambda: f"the relay {middle.peer} is shutting down" in proxy.describe()["last_failure"])


async def test_new_tunnels_go_through_another_relay_while_the_old_one_runs():
    async with (
        relay("one") as first,
        relay("two") as second,
        node("alice", first, second, peers=["bob"]) as alice,
        node("bob", first, second, peers=["alice"], services={"echo": None}) as bob,
        tcp_server(echo) as port,
        trio.open_nursery() as nursery,
    ):
        for each in (first, second):
            await reserve(bob, each)
        await bob.serve("echo", port)
        address = await alice.proxy("bob", "echo")
        async with await trio.open_tcp_stream(*address) as old:
            await says(old, b"old")
            (through,) = alice.connections("bob")
            leaves, stays = (first, second) if through.via.relay == first.peer else (second, first)
            drain = Drain(leaves, nursery)
            await until(lambda: through.gone_away)
            async with await trio.open_tcp_stream(*address) as new:
                await says(new, b"new")
                ways = {one.via.relay: one for one in alice.connections("bob")}
                assert set(ways) == {leaves.peer, stays.peer}
                assert ways[leaves.peer] is through
                await says(old, b"still there")
                assert not drain.over
                await old.send_eof()
                assert await old.receive_some(1) == b""
                await until(lambda: drain.over)
                await says(new, b"still there as well")


async def test_whoever_needs_a_relay_or_a_peer_behind_it_has_them_back_after_its_restart():
    async with world() as (alice, middle, bob), trio.open_nursery() as nursery:
        alice.tell("switchboard", NeedPeer(middle.peer))
        alice.tell("switchboard", NeedPeer(bob.peer))
        await until(lambda: alice.connections("bob") and alice.connections("relay"))
        drain = Drain(middle, nursery)
        await until(lambda: drain.over)
        (old,) = alice.connections("relay")
        await middle.stop("switchboard")
        await until(lambda: old.end)
        assert peer_of("relay") not in alice.switchboard._reach.departures
        assert not alice.connections("bob")
        await middle.start_switchboard()
        await serve(middle)
        await until(lambda: alice.connections("relay"))
        await reserve(bob, middle)
        await until(lambda: alice.connections("bob"))


async def test_watchers_hear_of_a_relay_that_leaves():
    class Watcher(Actor):
        def __init__(self):
            self.told = []

        async def start(self, checkpoint):
            await self.context.ask("switchboard", WatchConnections((peer_of("relay"),)), timeout=20)
            return {}

        @handles(ConnectionLeaving)
        async def leaving(self, message):
            self.told.append(message.connection)

    async with world() as (_, middle, bob), trio.open_nursery() as nursery:
        watcher = Watcher()
        await bob.start(watcher, "relay/keeper")
        Drain(middle, nursery)
        await until(lambda: watcher.told)
        assert watcher.told[0].peer == middle.peer


async def test_a_request_that_meets_the_relays_goodbye_is_told_so_and_nothing_is_held_against_it():
    async with world() as (alice, middle, bob), trio.open_nursery() as nursery:
        await alice.ask("switchboard", Connect(middle.peer))
        with trio.CancelScope(shield=True):
            # The relay has said it, and alice, who is just asking, has not heard it yet.
            (client,) = middle.connections("alice")
            client.say_go_away()
            with pytest.raises(RefusedError) as caught:
                await alice.ask("switchboard", Connect(bob.peer))
        assert "is shutting down" in caught.value.reason
        assert alice.switchboard._reach.relays.takes_early(middle.peer)
        nursery.cancel_scope.cancel()


async def test_who_asks_a_relay_that_is_draining_over_a_new_connection_is_told_why():
    async with world() as (alice, middle, bob), trio.open_nursery() as nursery:
        drain = Drain(middle, nursery)
        await until(lambda: drain.over)
        with pytest.raises(RefusedError) as caught:
            await alice.ask("switchboard", Connect(bob.peer))
        assert "the relay is shutting down" in caught.value.reason
        assert "too many circuits" not in caught.value.reason
        assert "it grants nothing any more" in caught.value.reason


# ---- by themselves, under virtual time

OURS, RELAY, FAR = (peer_of(name) for name in ("us", "relay", "far"))
ADDRESS = Multiaddr("/ip4/192.0.2.1/tcp/4001")


class FakeLink:
    def __init__(self):
        self.streams = self.sent = self.received = 0
        self.end = None
        self.rtt = None
        self.closed = []

    def close(self, code, reason):
        self.closed.append((code, reason))
        self.end = code


class Room:
    """Departures with pretended links."""

    def __init__(self, nursery, *, relays=(RELAY,)):
        self.table = ConnectionTable(OURS)
        self.lines = []
        self.departures = Departures(
            nursery,
            self.table,
            is_relay=lambda peer: peer in relays,
            now=trio.current_time,
            randomness=random.Random(1),
            log=self.lines.append,
        )

    def connection(self, peer, *, through=None, ident="1"):
        via = Way("direct" if through is None else "relayed", "tcp", ADDRESS, ADDRESS, through)
        now = trio.current_time()
        made = Connection(ident, peer, outbound=True, via=via, opened=now, opened_at=now)
        made.link = FakeLink()
        self.table.add(made, now)
        return made

    def opened(self, connection):
        """As the switchboard says it."""
        self.departures.opened(connection)
        return connection

    def end(self, connection):
        self.table.remove(connection, "ended")


@contextlib.asynccontextmanager
async def room(**options):
    async with trio.open_nursery() as nursery:
        yield Room(nursery, **options)
        nursery.cancel_scope.cancel()


async def test_the_connection_to_a_leaving_relay_is_kept_for_a_while(autojump_clock):
    async with room() as made:
        there = made.connection(RELAY)
        made.departures.said(there)
        made.departures.said(there)
        assert len(made.lines) == 1
        assert RELAY in made.departures
        await trio.sleep(PATIENCE / 2)
        assert made.table.drained(trio.current_time()) == []
        await trio.sleep(PATIENCE / 2 + LINGER + 0.1)
        assert made.table.drained(trio.current_time()) == [there]
        assert RELAY not in made.departures


async def test_it_is_waited_for_until_it_has_ended_and_a_moment_more(autojump_clock):
    async with room() as made:
        there = made.connection(RELAY)
        made.departures.said(there)
        began = trio.current_time()

        async def end():
            await trio.sleep(SUCCESSOR / 2)
            made.end(there)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(end)
            await made.departures.until_gone(RELAY)
        assert SUCCESSOR / 2 + PAUSE[0] <= trio.current_time() - began <= SUCCESSOR / 2 + PAUSE[1]
        await trio.testing.wait_all_tasks_blocked()
        assert RELAY not in made.departures
        await made.departures.until_gone(RELAY)


async def test_it_is_not_waited_for_without_end(autojump_clock):
    async with room() as made:
        made.departures.said(made.connection(RELAY))
        began = trio.current_time()
        await made.departures.until_gone(RELAY)
        assert SUCCESSOR <= trio.current_time() - began <= SUCCESSOR + PAUSE[1]


async def test_it_is_expected_back_and_waited_for_once_but_not_one_that_leaves_again_and_again(autojump_clock):
    async with room() as made:
        assert not made.departures.returning(RELAY)
        left = trio.current_time()
        made.departures.said(made.connection(RELAY))
        await made.departures.until_gone(RELAY)
        first = trio.current_time()
        for _ in range(10):
            await made.departures.until_gone(RELAY)
        assert trio.current_time() == first
        for number in range(int(RETURN)):
            made.departures.said(made.opened(made.connection(RELAY, ident=f"again {number}")))
            assert made.departures.returning(RELAY) is (trio.current_time() - left < RETURN)
            await made.departures.until_gone(RELAY)
            assert trio.current_time() - first >= SUCCESSOR + PAUSE[0], "each of them is given its time"
            first = trio.current_time()
            if first - left > RETURN:
                break
        assert not made.departures.returning(RELAY)
        made.departures.said(made.opened(made.connection(RELAY, ident="later")))
        assert made.departures.returning(RELAY)


async def test_a_successor_serves_while_what_went_through_the_old_one_is_seen_off(autojump_clock):
    async with room() as made:
        there = made.connection(RELAY)
        old = made.connection(FAR, through=RELAY)
        old.link.streams = 1
        made.departures.said(there)
        await trio.sleep(5)
        made.opened(made.connection(RELAY, ident="2"))
        assert RELAY not in made.departures
        new = made.opened(made.connection(FAR, through=RELAY, ident="2"))
        await trio.sleep(5)
        assert not old.link.closed
        assert not new.link.closed
        assert made.table.best(FAR) is new
        old.link.streams = 0
        await trio.sleep(0.6)
        assert old.link.closed
        assert not new.link.closed


async def test_idle_ones_are_closed_soon_busy_ones_when_their_last_stream_has_ended(autojump_clock):
    async with room() as made:
        there = made.connection(RELAY)
        idle, busy = made.connection(FAR, through=RELAY), made.connection(peer_of("busy"), through=RELAY)
        elsewhere = made.connection(peer_of("elsewhere"), through=peer_of("another relay"))
        busy.link.streams = 1
        made.departures.said(there)
        assert made.table.best(FAR) is made.table.best(busy.peer) is None
        await trio.sleep(0.6)
        assert idle.link.closed
        made.end(idle)
        await trio.sleep(10)
        assert not busy.link.closed
        assert not elsewhere.link.closed
        assert made.table.best(elsewhere.peer) is elsewhere
        busy.link.streams = 0
        late = made.connection(FAR, through=RELAY, ident="2")  # a dial that was under way
        await trio.sleep(0.6)
        assert busy.link.closed == late.link.closed == [("relay-leaving", f"the relay {RELAY} is shutting down")]


async def test_one_that_comes_up_late_is_seen_off_as_well(autojump_clock):
    async with room() as made:
        made.departures.said(made.connection(RELAY))
        await trio.sleep(10)
        late = made.opened(made.connection(FAR, through=RELAY))
        made.opened(made.connection(peer_of("elsewhere"), through=peer_of("another relay")))
        await trio.sleep(0.6)
        assert late.gone_away
        assert late.link.closed
        made.end(late)
        await trio.sleep(PATIENCE)
        assert RELAY not in made.departures


async def test_a_stream_that_is_on_its_way_is_waited_for(autojump_clock):
    async with room() as made:
        there = made.connection(RELAY)
        relayed = made.connection(FAR, through=RELAY)
        made.departures.said(there)
        await trio.sleep(0.15)
        relayed.link.streams = 1
        await trio.sleep(5)
        assert not relayed.link.closed


async def test_where_round_trips_take_long_it_is_waited_for_longer(autojump_clock):
    async with room() as made:
        there = made.connection(RELAY)
        far, farther = made.connection(FAR, through=RELAY), made.connection(peer_of("moon"), through=RELAY)
        far.link.rtt, farther.link.rtt = 0.5, 20.0
        made.departures.said(there)
        await trio.sleep(0.9)
        assert not far.link.closed
        await trio.sleep(0.3)
        assert far.link.closed
        assert not farther.link.closed
        await trio.sleep(1)
        assert farther.link.closed


async def test_of_two_connections_one_may_go(autojump_clock):
    async with room() as made:
        one = made.connection(RELAY)
        await trio.sleep(100)
        made.connection(RELAY, ident="2")
        relayed = made.connection(FAR, through=RELAY)
        made.departures.said(one)
        assert RELAY not in made.departures
        assert not relayed.draining
        assert one.gone_away


async def test_a_peer_that_is_no_relay_goes_for_itself_alone(autojump_clock):
    async with room(relays=()) as made:
        there = made.connection(RELAY)
        made.departures.said(there)
        assert RELAY not in made.departures
        assert not made.lines
        assert made.table.drained(trio.current_time() + LINGER) == [there]
        unnamed = made.connection(peer_of("unnamed relay"))
        made.connection(FAR, through=unnamed.peer)
        made.departures.said(unnamed)
        assert unnamed.peer in made.departures, "it relays for us, though nobody has named it"


async def test_a_relayed_connection_whose_peer_leaves_is_just_that(autojump_clock):
    async with room(relays=(RELAY, FAR)) as made:
        relayed = made.connection(FAR, through=RELAY)
        made.departures.said(relayed)
        assert FAR not in made.departures
        assert relayed.leaving
