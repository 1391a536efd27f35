"""Which way is tried, when, and which one stays: direct before relayed, with virtual time where time matters."""

import random

import pytest
import trio

from actors.switchboard import relays as relays_module
from actors.switchboard.connections import DOUBT, LINGER, SIMULTANEOUS, Connection, ConnectionTable
from actors.switchboard.dialer import HEAD_START, RELAY_HEAD_START
from actors.switchboard.errors import AddressError, UnreachableError
from actors.switchboard.improver import Improver
from actors.switchboard.link import LinkEnd
from actors.switchboard.relays import RelayBook
from actors.switchboard.wire import Way
from protocol.circuit.addresses import circuit_address
from protocol.multiaddr import Multiaddr

from .support import peer_of
from .test_dialer import PEER, Transport, dialer

US, THEM = peer_of("us"), peer_of("them")
ONE, TWO = peer_of("one"), peer_of("two")
ADDRESS = Multiaddr("/ip4/192.0.2.1/tcp/4001")
DIRECT = [Multiaddr(f"/ip4/192.0.2.{n}/tcp/4001") for n in (1, 2, 3)]
RELAYS = [Multiaddr(f"/ip4/203.0.113.{n}/tcp/4001/p2p/{peer}") for n, peer in ((1, ONE), (2, TWO))]
VIA = [circuit_address(relay, PEER) for relay in RELAYS]
REFUSED = AddressError("connection refused")


# ---- when what is tried


async def started(autojump_transport, addresses, *, before=()):
    """When each attempt began, by address; `before` are dials of the same dialer that came first."""
    async with trio.open_nursery() as nursery:
        made = dialer(nursery, autojump_transport)
        for earlier in before:
            await made.dial(PEER, earlier)
        autojump_transport.attempts.clear()
        began = trio.current_time()
        await made.dial(PEER, addresses)
        return {address: pytest.approx(at - began) for at, address in autojump_transport.attempts}


async def test_without_a_direct_address_relays_are_tried_at_once_with_head_starts(autojump_clock):
    transport = Transport({VIA[0]: (60, None), VIA[1]: (0.1, None)})
    assert await started(transport, VIA) == {VIA[0]: 0.0, VIA[1]: HEAD_START}


async def test_direct_addresses_have_a_head_start_however_many_there_are(autojump_clock):
    transport = Transport(dict.fromkeys(DIRECT, (60, None)) | {VIA[0]: (0.1, None)})
    times = await started(transport, [VIA[0], *DIRECT])
    assert times[DIRECT[0]] == 0.0
    assert times[VIA[0]] == RELAY_HEAD_START


async def test_when_all_direct_addresses_fail_relays_are_tried_at_once(autojump_clock):
    transport = Transport({DIRECT[0]: (0.01, REFUSED), DIRECT[1]: (0.02, REFUSED), VIA[0]: (0.1, None)})
    times = await started(transport, [*DIRECT[:2], VIA[0]])
    assert times[VIA[0]] == 0.03


async def test_a_direct_answer_in_time_leaves_the_relays_alone(autojump_clock):
    transport = Transport({DIRECT[0]: (0.2, None), VIA[0]: (0.01, None)})
    assert await started(transport, [VIA[0], DIRECT[0]]) == {DIRECT[0]: 0.0}


async def test_what_worked_last_is_tried_first(autojump_clock):
    transport = Transport({DIRECT[0]: (60, None), DIRECT[1]: (0.01, None)})
    times = await started(transport, DIRECT[:2], before=[DIRECT[:2]])
    assert times == {DIRECT[1]: 0.0}
    transport = Transport({VIA[0]: (0.01, REFUSED), VIA[1]: (0.01, None)})
    assert await started(transport, VIA, before=[VIA]) == {VIA[1]: 0.0}


async def test_after_a_relayed_connection_the_relay_is_tried_beside_the_direct_addresses(autojump_clock):
    transport = Transport({DIRECT[0]: (60, None), VIA[0]: (0.1, None)})
    times = await started(transport, [DIRECT[0], VIA[0]], before=[[DIRECT[0], VIA[0]]])
    assert times == {DIRECT[0]: 0.0, VIA[0]: 0.0}


async def test_a_relay_that_swallows_everything_costs_one_head_start(autojump_clock):
    transport = Transport({VIA[0]: (60, None), VIA[1]: (0.1, None)})
    async with trio.open_nursery() as nursery:
        dialed = await dialer(nursery, transport).dial(PEER, VIA)
    assert dialed.connection == VIA[1]
    assert dialed.elapsed == pytest.approx(HEAD_START + 0.1)


# ---- which relays


def test_every_configured_relay_leads_to_every_peer_once():
    book = RelayBook()
    book.configure([*RELAYS, Multiaddr(f"/dns/vps.example/tcp/443/p2p/{ONE}"), ADDRESS])
    assert ONE in book
    assert THEM not in book
    assert len(book.addresses(ONE)) == 2
    assert book.circuits(THEM, ()) == tuple(circuit_address(relay, THEM) for relay in RELAYS)
    third = circuit_address(Multiaddr(f"/ip4/203.0.113.3/tcp/1/p2p/{peer_of('three')}"), THEM)
    theirs = circuit_address(Multiaddr(f"/ip4/203.0.113.9/tcp/1/p2p/{TWO}"), THEM)
    assert book.circuits(THEM, [third, theirs, third]) == (third, theirs, circuit_address(RELAYS[0], THEM))
    assert book.circuits(ONE, ()) == (circuit_address(RELAYS[1], ONE),), "nobody is reached through itself"


def test_bytes_go_early_to_every_relay_until_one_loses_them(monkeypatch):
    book = RelayBook()
    book.configure(RELAYS)
    assert book.takes_early(ONE)
    book.lost_early(ONE)
    assert not book.takes_early(ONE)
    assert book.takes_early(TWO)
    monkeypatch.setattr(relays_module, "MAX_REMEMBERED", 2)
    for name in ("a", "b"):
        book.lost_early(peer_of(name))
    assert book.takes_early(ONE), "the memory is bounded"


# ---- what stays


class FakeLink:
    sent = received = streams = 0
    rtt = None


def connection(path, opened=0.0, *, outbound=True):
    way = Way(path, "tcp", ADDRESS, ADDRESS, ONE if path == "relayed" else None)
    made = Connection(f"{path} {opened}", THEM, outbound, way, opened, opened)
    made.link = FakeLink()
    return made


@pytest.mark.parametrize("gap", [0.0, SIMULTANEOUS + 1])
@pytest.mark.parametrize("outbound", [True, False])
@pytest.mark.parametrize("order", [("direct", "relayed"), ("relayed", "direct")])
def test_the_direct_connection_stays_whatever_came_first(order, outbound, gap):
    table = ConnectionTable(US)
    for number, path in enumerate(order):
        table.add(connection(path, number * gap, outbound=outbound), number * gap)
    assert table.best(THEM).path == "direct"
    assert [one.path for one in table.of(THEM)] == ["direct", "relayed"]
    assert [one.draining for one in table.of(THEM)] == [False, True]


def test_when_the_direct_connection_is_lost_the_relayed_one_is_used_again():
    table = ConnectionTable(US)
    direct, relayed = connection("direct"), connection("relayed")
    table.add(relayed, 0)
    table.add(direct, 1)
    table.remove(direct, LinkEnd("x", "x"))
    assert table.best(THEM) is relayed
    assert not relayed.draining


def test_a_peer_that_comes_back_through_a_relay_casts_doubt_on_its_direct_connection():
    table = ConnectionTable(US)
    doubted = []
    table.on_doubt = doubted.append
    direct, relayed = connection("direct"), connection("relayed", SIMULTANEOUS + 1, outbound=False)
    table.add(direct, 0)
    now = SIMULTANEOUS + 1
    table.add(relayed, now)
    assert doubted == [direct]
    assert table.drained(now + LINGER) == [], "it may be needed yet"
    assert table.drained(now + DOUBT + LINGER) == [relayed]


def test_two_connections_of_one_moment_are_no_reason_for_doubt():
    table = ConnectionTable(US)
    doubted = []
    table.on_doubt = doubted.append
    table.add(connection("direct"), 0)
    table.add(connection("relayed", 1.0, outbound=False), 1.0)
    table.add(connection("relayed", 20.0, outbound=True), 20.0)
    assert doubted == []


# ---- looking for a direct way


class Improving:
    def __init__(self, nursery, outcomes=()):
        self.table = ConnectionTable(US)
        self.dials = []
        self.outcomes = list(outcomes)
        self.improver = Improver(nursery, self.table, self._dial, random.Random(1))

    async def _dial(self, peer):
        self.dials.append(trio.current_time())
        await trio.sleep(0.1)
        if not self.outcomes:
            raise UnreachableError("no address answered")
        self.table.add(self.outcomes.pop(0), trio.current_time())

    def open(self, path):
        made = connection(path, trio.current_time())
        self.table.add(made, trio.current_time())
        self.improver.opened(made)
        return made


async def test_a_relayed_connection_looks_for_a_direct_one_with_growing_pauses(autojump_clock):
    async with trio.open_nursery() as nursery:
        world = Improving(nursery)
        relayed = world.open("relayed")
        began = trio.current_time()
        await trio.sleep(3600)
        pauses = [late - early for early, late in zip([began, *world.dials], world.dials, strict=False)]
        assert 0.5 <= pauses[0] <= 2
        assert pauses[3] > 2 * pauses[0]
        assert 200 < pauses[-1] < 400
        assert world.improver.last_failure(THEM) == "no address answered"
        world.table.remove(relayed, LinkEnd("x", "x"))
        await trio.testing.wait_all_tasks_blocked()
        assert not nursery.child_tasks
        assert world.improver.last_failure(THEM) == ""


async def test_news_of_the_peer_end_the_pause(autojump_clock):
    async with trio.open_nursery() as nursery:
        world = Improving(nursery)
        relayed = world.open("relayed")
        await trio.sleep(1000)
        count = len(world.dials)
        world.improver.news(THEM)
        await trio.sleep(0.01)
        assert len(world.dials) == count + 1
        world.improver.news()
        await trio.sleep(0.2)
        world.improver.news(peer_of("another"))
        world.table.remove(relayed, LinkEnd("x", "x"))


async def test_a_peer_that_has_news_all_the_time_is_not_dialled_all_the_time(autojump_clock):
    async with trio.open_nursery() as nursery:
        world = Improving(nursery)
        relayed = world.open("relayed")
        for _ in range(6000):
            world.improver.news(THEM)
            await trio.sleep(0.01)
        assert 30 <= len(world.dials) <= 60
        world.table.remove(relayed, LinkEnd("x", "x"))


async def test_the_search_ends_with_a_direct_connection_and_begins_anew_when_that_is_lost(autojump_clock):
    async with trio.open_nursery() as nursery:
        direct = connection("direct")
        world = Improving(nursery, [direct])
        relayed = world.open("relayed")
        await trio.sleep(30)
        assert len(world.dials) == 1
        assert world.table.best(THEM) is direct
        assert not nursery.child_tasks
        world.improver.opened(direct)
        assert not nursery.child_tasks, "a direct one looks for nothing"
        world.table.remove(direct, LinkEnd("x", "x"))
        world.improver.ended(THEM)
        await trio.sleep(30)
        assert len(world.dials) > 1
        world.table.remove(relayed, LinkEnd("x", "x"))
