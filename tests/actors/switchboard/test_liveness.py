"""Which connections are ended when the network has changed."""

import dataclasses
import random
import types

import loguru
import pytest
import trio

from actors.switchboard.errors import StreamRefusedError
from actors.switchboard.keeper import Keeper
from actors.switchboard.link import LinkEnd
from actors.switchboard.liveness import DOUBT, SIGN_OF_LIFE, Liveness, path_of
from actors.switchboard.wire import Acknowledgement, Way
from protocol.multiaddr import Multiaddr
from tests.actors.switchboard.support import peer_of

FAR = Multiaddr("/ip4/127.0.0.1/tcp/4001")  # loopback: what this machine's addresses say counts for nothing


class FakeLink:
    """What a check uses of a link."""

    def __init__(self, connection):
        self.received = 1000
        self.connection = connection
        self.aborted = None
        self.acknowledged = None
        self.outstanding = False
        self.sent = 1000

    def acknowledgement(self):
        if self.acknowledged is None:
            return None
        return Acknowledgement(trio.current_time() - self.acknowledged, outstanding=self.outstanding)

    def abort(self, code, reason):
        self.aborted = code, reason
        self.connection.end = LinkEnd(code, reason)
        self.connection.ended.set()


class FakeConnection:
    """What a check uses of a connection."""

    path = "direct"
    relayed = False
    draining = gone_away = parting = False
    via = Way("direct", "tcp", FAR, FAR)

    def __init__(self, name, local=FAR, remote=FAR):
        self.id = name
        self.peer = peer_of(name)
        self.local_address = local
        self.remote_address = remote
        self.end = None
        self.ended = trio.Event()
        self.link = FakeLink(self)


class FakeTable(list):
    """What is used of a table of connections."""

    def gone_away(self, connection, now):
        connection.gone_away = True


class World:
    """Connections, and how pings to them go: an awaitable function by the connection's id."""

    def __init__(self, nursery):
        context = types.SimpleNamespace(nursery=nursery, log=loguru.logger, now=trio.current_time)
        self.connections = FakeTable()
        self.pings = {}
        self.dials = []
        keeper = Keeper(nursery, self._dial, self._until_lost, trio.current_time, random.Random(1))
        self.keeper = keeper
        self.liveness = Liveness(context, keeper, self.connections, self._ping)

    async def _dial(self, peer):
        self.dials.append((trio.current_time(), peer))
        await trio.lowlevel.checkpoint()
        if not any(connection.peer == peer for connection in self.connections):
            raise StreamRefusedError("nobody there")

    async def _until_lost(self, peer):
        for connection in self.connections:
            if connection.peer == peer:
                await connection.ended.wait()

    async def _ping(self, connection):
        await self.pings.get(connection.id, trio.sleep_forever)()

    def add(self, name, ping=None):
        connection = FakeConnection(name)
        self.connections.append(connection)
        if ping is not None:
            self.pings[name] = ping
        return connection


@pytest.fixture
async def world(nursery):
    return World(nursery)


async def answers():
    await trio.sleep(0.5)


async def refuses():
    await trio.sleep(0.5)
    raise StreamRefusedError("pings are not for you")


async def test_only_what_gives_no_sign_of_life_is_ended(world, autojump_clock):
    well = world.add("well", answers)
    silent = world.add("silent")
    busy = world.add("busy")  # its ping waits behind a lot of data
    refusing = world.add("refusing")

    async def answered_by_refusal():
        await trio.sleep(0.5)
        refusing.link.received += 30
        raise StreamRefusedError("pings are not for you")

    world.pings["refusing"] = answered_by_refusal
    world.liveness.network_changed()
    await trio.sleep(1)
    busy.link.received += 1
    await trio.sleep(SIGN_OF_LIFE - 1.01)
    assert silent.link.aborted is None
    await trio.sleep(0.02)
    assert silent.link.aborted[0] == "no-sign-of-life"
    assert "no sign of life" in silent.link.aborted[1]
    await trio.sleep(60)
    assert [each.link.aborted for each in (well, busy, refusing)] == [None] * 3


async def test_a_ping_that_cannot_be_sent_proves_nothing_by_itself(world, autojump_clock):
    async def fails():
        raise StreamRefusedError("too many streams")

    silent, busy = world.add("silent", fails), world.add("busy", fails)
    world.liveness.network_changed()
    await trio.sleep(1)
    busy.link.received += 1
    await trio.sleep(10)
    assert silent.link.aborted is not None
    assert busy.link.aborted is None


async def test_a_peer_whose_kernel_acknowledges_is_alive_however_long_its_answer_waits(world, autojump_clock):
    slow, dead = world.add("slow"), world.add("dead")
    dead.link.acknowledged = trio.current_time() - 0.1  # just before the change
    world.liveness.network_changed()
    await trio.sleep(1)
    slow.link.acknowledged = trio.current_time()
    await trio.sleep(60)
    assert slow.link.aborted is None
    assert dead.link.aborted is not None


async def test_what_is_relayed_depends_on_the_connection_to_the_relay_alone(world, autojump_clock):
    relayed = world.add("far")
    relayed.relayed, relayed.path = True, "relayed"
    world.liveness.network_changed()
    await trio.sleep(60)
    assert relayed.link.aborted is None
    relayed.draining = True
    world.liveness.superseded([relayed])
    await trio.sleep(9.9)
    assert relayed.link.aborted is None
    await trio.sleep(0.2)
    assert relayed.link.aborted is not None


async def ticks(world, seconds):
    for _ in range(seconds):
        await trio.sleep(1)
        world.liveness.tick()


async def test_new_streams_go_another_way_where_nothing_is_acknowledged(world, autojump_clock):
    relay, well, far = world.add("relay"), world.add("well"), world.add("far")
    far.relayed, far.path = True, "relayed"
    far.via = dataclasses.replace(far.via, path="relayed", relay=relay.peer)
    idle = world.add("idle")
    for each in (relay, well, idle):
        each.link.acknowledged = trio.current_time()
    await ticks(world, 100)  # long since nothing had to be acknowledged
    for each in (relay, well):
        each.link.sent += 1
        each.link.outstanding = True
    began = trio.current_time()
    while not relay.gone_away:
        well.link.acknowledged = trio.current_time()  # there is always something outstanding, but it goes on
        assert trio.current_time() - began < DOUBT + 2.1
        await ticks(world, 1)
    assert trio.current_time() - began >= DOUBT
    assert far.gone_away
    well.link.outstanding = False
    await ticks(world, 60)
    assert not well.gone_away
    assert not idle.gone_away
    assert [each.link.aborted for each in world.connections] == [None] * 4


async def test_an_acknowledgement_ends_the_doubt(world, autojump_clock):
    connection = world.add("slow")
    connection.link.acknowledged = trio.current_time()
    connection.link.sent += 1
    connection.link.outstanding = True
    for _ in range(20):
        await ticks(world, 3)
        connection.link.acknowledged = trio.current_time()
    assert not connection.gone_away


async def test_another_change_asks_anew(world, autojump_clock):
    connection = world.add("silent")
    world.liveness.network_changed()
    await trio.sleep(2)
    world.liveness.network_changed()
    await trio.sleep(2)
    assert connection.link.aborted is None
    await trio.sleep(1.01)
    assert connection.link.aborted is not None


async def test_only_connections_that_were_superseded_are_asked_when_another_one_comes(world, autojump_clock):
    new, old, well = world.add("new"), world.add("old"), world.add("well", answers)
    old.draining = well.draining = True
    world.liveness.superseded([new, old, well])
    await trio.sleep(2)
    world.liveness.superseded([new, old, well])  # does not begin anew
    await trio.sleep(SIGN_OF_LIFE - 1.99)
    assert old.link.aborted is not None
    assert "another connection" in old.link.aborted[1]
    await trio.sleep(60)
    assert new.link.aborted is None
    assert well.link.aborted is None


async def test_needed_peers_are_dialled_at_once(world, nursery, autojump_clock):
    missing, dead = peer_of("missing"), world.add("dead")
    world.keeper.need("test", missing)
    world.keeper.need("test", dead.peer)
    await trio.sleep(3600)
    world.dials.clear()
    began = trio.current_time()
    world.liveness.network_changed()
    await trio.sleep(0.1)
    assert [(round(when - began, 1), peer) for when, peer in world.dials] == [(0.0, missing)]
    await trio.sleep(SIGN_OF_LIFE)
    assert any(peer == dead.peer and when - began < SIGN_OF_LIFE + 0.1 for when, peer in world.dials)
    world.keeper.release_all("test")


async def test_a_dead_connection_is_dialled_anew_at_once_even_if_it_was_young(world, autojump_clock):
    dead = world.add("dead")
    world.keeper.need("test", dead.peer)
    await trio.sleep(1)
    world.dials.clear()
    world.liveness.network_changed()
    await trio.sleep(SIGN_OF_LIFE + 0.01)
    assert len(world.dials) >= 1
    world.keeper.release_all("test")


def test_what_addresses_and_routes_tell(natlab):
    server = natlab.host("server")
    home, cafe = natlab.nat("home"), natlab.nat("cafe", lan="10.7.0.0/24")
    host = natlab.host("laptop", behind=home)
    old = host.address

    def path():
        made_at_home = FakeConnection(
            "server", Multiaddr(f"/ip4/{old}/tcp/40000"), Multiaddr(f"/ip4/{server.address}/tcp/4001")
        )
        with host.enter():
            return path_of(made_at_home)

    assert path() == "unknown"
    host.uplink.down()
    assert path() == "down"
    host.uplink.up()
    assert path() == "unknown"
    # A second link that is preferred now does not end what runs over the first.
    other = host.add_uplink(cafe, metric=10)
    assert path() == "unknown"
    other.down()
    host.move(cafe)
    assert path() == "moved"
