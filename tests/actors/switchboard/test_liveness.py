"""Which connections are in doubt, and which live again."""

import dataclasses
import random
import types

import loguru
import pytest
import trio

from actors.switchboard import liveness as module
from actors.switchboard.connections import Connection, ConnectionTable
from actors.switchboard.errors import StreamRefusedError
from actors.switchboard.keeper import Keeper
from actors.switchboard.link import LinkEnd
from actors.switchboard.liveness import DOUBT, DOUBT_UNANSWERED, MOVED, SIGN_OF_LIFE, Liveness, path_of
from actors.switchboard.wire import Acknowledgement, Way
from protocol.multiaddr import Multiaddr
from tests.actors.switchboard.support import peer_of

FAR = Multiaddr("/ip4/127.0.0.1/tcp/4001")  # loopback: what this machine's addresses say counts for nothing


class FakeLink:
    """What is used of a link. Its peer answers after `answers` seconds, or not at all."""

    def __init__(self, nursery):
        self.nursery = nursery
        self.answers = None
        self.kernel = True  # whether anybody knows of acknowledgements
        self.acknowledged = 0
        self.outstanding = False
        self.sent = self.received = 1000
        self.streams = 1
        self.rtt = None
        self.asking = False
        self.asked = 0
        self.end = None
        self.session = types.SimpleNamespace(local_gone=False)

    def acknowledgement(self):
        return Acknowledgement(0.0, self.outstanding, self.acknowledged) if self.kernel else None

    def ask(self):
        if not self.asking:
            self.asking = True
            self.asked += 1
            self.send()
            if self.answers is not None:
                self.nursery.start_soon(self._answer)

    async def _answer(self):
        await trio.sleep(self.answers)
        self.hear()

    def send(self):
        self.sent += 28
        self.outstanding = True

    def acknowledge(self):
        self.acknowledged, self.outstanding = self.sent, False

    def hear(self):
        self.acknowledge()
        self.received += 28
        self.asking = False

    def abort(self, code, reason):
        self.end = LinkEnd(code, reason)


class World:
    """A table of connections, and its judge."""

    def __init__(self, nursery):
        self.nursery = nursery
        context = types.SimpleNamespace(nursery=nursery, log=loguru.logger, now=trio.current_time)
        self.table = ConnectionTable(peer_of("us"))
        self.dials = []
        self.judged = []
        self.keeper = Keeper(nursery, self._dial, self.table.until_lost, trio.current_time, random.Random(1))
        self.liveness = Liveness(context, self.keeper, self.table, self._judge)

    def _judge(self, connection):
        self.judged.append((connection.id, connection.doubted_since is not None))

    async def _dial(self, peer):
        self.dials.append((trio.current_time(), peer))
        await trio.lowlevel.checkpoint()
        if self.table.best(peer) is None:
            raise StreamRefusedError("nobody there")

    def add(self, name, *, peer=None, answers=None, relay=None, local=FAR):
        via = Way("direct", "tcp", local, FAR)
        if relay is not None:
            via = dataclasses.replace(relay.via, path="relayed", relay=relay.peer)
        now = trio.current_time()
        made = Connection(name, peer_of(peer or name), True, via, now, 1_000_000.0 + now)
        made.link = FakeLink(self.nursery)
        made.link.answers = answers
        made.link.kernel = relay is None
        self.table.add(made, now)
        return made

    async def pass_time(self, seconds, meanwhile=lambda: None):
        for _ in range(round(seconds)):
            await trio.sleep(1)
            meanwhile()
            self.liveness.tick()


@pytest.fixture
async def world(nursery):
    made = World(nursery)
    await made.pass_time(1)
    return made


async def test_after_a_change_of_network_only_what_gives_no_sign_of_life_is_in_doubt_and_nothing_ends(
    world, autojump_clock
):
    well, silent, slow = world.add("well", answers=0.5), world.add("silent"), world.add("slow")
    world.liveness.network_changed()
    await world.pass_time(2)
    slow.link.acknowledge()  # its answer waits behind a lot of data
    slow.link.send()
    await world.pass_time(SIGN_OF_LIFE - 1, slow.link.acknowledge)
    assert [one.doubted_since is not None for one in (well, silent, slow)] == [False, True, False]
    slow.link.hear()
    assert world.judged == [("silent", True)]
    assert world.table.best(silent.peer) is None
    await world.pass_time(3600)
    assert [one.link.end for one in (well, silent, slow)] == [None] * 3
    assert world.table.drained(trio.current_time()) == []


async def test_what_was_in_doubt_is_used_again_when_it_lives(world, autojump_clock):
    connection = world.add("far")
    connection.link.streams = 0
    world.liveness.network_changed()
    await world.pass_time(60)
    assert world.table.best(connection.peer) is None
    connection.link.hear()
    await world.pass_time(1)
    assert world.table.best(connection.peer) is connection
    assert world.judged == [("far", True), ("far", False)]
    assert world.table.drained(trio.current_time() + 60) == []


async def test_what_was_replaced_meanwhile_keeps_its_streams_and_takes_no_new_ones(world, autojump_clock):
    old = world.add("old", peer="far")
    world.liveness.network_changed()
    await world.pass_time(10)
    new = world.add("new", peer="far")
    world.liveness.superseded(world.table.of(new.peer))
    await world.pass_time(300)
    assert old.link.end is None
    old.link.hear()
    await world.pass_time(300)
    assert (old.doubted_since, old.link.end) == (None, None)
    assert world.table.best(new.peer) is new
    old.link.streams = 0
    assert old in world.table.drained(trio.current_time() + 60)


async def test_what_is_relayed_shares_the_fate_of_the_connection_to_its_relay(world, autojump_clock):
    relay, other = world.add("relay"), world.add("relay too", local=Multiaddr("/ip4/127.0.0.1/tcp/4002"))
    far, near = world.add("far", relay=relay), world.add("near", relay=other)
    relay.link.send()
    await world.pass_time(DOUBT + 2)
    assert [one.doubted_since is not None for one in (relay, far, other, near)] == [True, True, False, False]
    assert far.link.asking
    relay.link.hear()
    far.link.hear()
    await world.pass_time(3)
    assert [one.doubted_since is not None for one in (relay, far)] == [False, False]
    assert world.table.best(far.peer) is far


async def test_a_peer_behind_a_relay_that_does_not_answer_is_in_doubt_though_the_relay_lives(world, autojump_clock):
    relay = world.add("relay")
    far, idle = world.add("far", relay=relay), world.add("idle", relay=relay)
    await world.pass_time(1)
    far.link.send()
    await world.pass_time(2)
    assert far.link.asked == 1
    await world.pass_time(DOUBT_UNANSWERED)
    assert [one.doubted_since is not None for one in (relay, far, idle)] == [False, True, False]
    assert idle.link.asked == 0


async def test_new_streams_go_another_way_where_nothing_is_acknowledged(world, autojump_clock):
    silent, well, idle = world.add("silent"), world.add("well"), world.add("idle")
    await world.pass_time(100)
    for each in (silent, well):
        each.link.send()

    def goes_on():  # there is always something outstanding, but it goes on
        well.link.acknowledged += 1

    await world.pass_time(DOUBT, goes_on)
    assert silent.doubted_since is None
    await world.pass_time(2, goes_on)
    assert silent.doubted_since is not None
    well.link.acknowledge()
    await world.pass_time(60)
    assert [one.doubted_since for one in (well, idle)] == [None, None]


async def test_words_of_the_peers_do_not_show_that_ours_arrive(world, autojump_clock):
    connection = world.add("half")
    connection.link.send()

    def says_something():
        connection.link.received += 100

    await world.pass_time(DOUBT + 2, says_something)
    assert connection.doubted_since is not None
    await world.pass_time(60, says_something)
    assert connection.doubted_since is not None


async def test_a_kernel_that_acknowledges_for_a_process_that_hangs_shows_no_life(world, autojump_clock):
    connection = world.add("far")
    link = connection.link
    link.ask()

    def acknowledged():
        link.acknowledge()
        link.send()
        link.acknowledge()

    await world.pass_time(DOUBT_UNANSWERED, acknowledged)
    assert connection.doubted_since is None
    await world.pass_time(2, acknowledged)
    assert connection.doubted_since is not None
    await world.pass_time(60, acknowledged)
    assert world.judged == [("far", True)]
    link.hear()
    await world.pass_time(1)
    assert world.judged == [("far", True), ("far", False)]


async def test_an_answer_may_wait_behind_what_is_not_acknowledged_yet(world, autojump_clock):
    connection = world.add("far")
    link = connection.link
    link.ask()

    def some():
        link.acknowledged += 14
        link.sent += 14
        link.outstanding = True

    await world.pass_time(10 * DOUBT_UNANSWERED, some)
    assert connection.doubted_since is None


async def test_time_in_which_this_process_did_not_run_counts_for_nothing(world, autojump_clock):
    connection = world.add("far")
    connection.link.send()
    await world.pass_time(2)
    await trio.sleep(3600)
    world.liveness.tick()
    assert connection.doubted_since is None
    await world.pass_time(DOUBT - 1)
    assert connection.doubted_since is None
    await world.pass_time(2)
    assert connection.doubted_since is not None


async def test_another_change_asks_anew(world, autojump_clock):
    connection = world.add("silent")
    world.liveness.network_changed()
    await world.pass_time(2)
    world.liveness.network_changed()
    await world.pass_time(1)
    assert connection.doubted_since is None
    await world.pass_time(2)
    assert connection.doubted_since is not None


async def test_a_direct_connection_whose_peer_comes_through_a_relay_is_doubted_and_not_ended(world, autojump_clock):
    direct = world.add("direct", peer="far")
    relay = world.add("relay", answers=0.1)
    await world.pass_time(10)
    relayed = world.add("relayed", peer="far", relay=relay)
    assert relayed.draining  # outbound: nothing is concluded from it
    came = dataclasses.replace(relayed.via)
    inbound = Connection("inbound", direct.peer, False, came, trio.current_time(), 0.0)
    inbound.link = FakeLink(world.nursery)
    inbound.link.answers, inbound.link.kernel = 0.1, False
    world.table.add(inbound, trio.current_time())
    await world.pass_time(SIGN_OF_LIFE + 1)
    assert direct.doubted_since is not None
    assert direct.link.end is None
    assert world.table.best(direct.peer) in (inbound, relayed)
    direct.link.hear()
    await world.pass_time(1)
    assert world.table.best(direct.peer) is direct


async def test_an_address_that_is_gone_ends_a_connection_only_if_it_stays_away(world, autojump_clock, monkeypatch):
    where = {"lost": "moved", "back": "moved", "alone": "moved"}
    monkeypatch.setattr(module, "path_of", lambda connection: where.get(connection.id, "unknown"))
    lost, back, alone = (world.add(name) for name in where)
    world.liveness.network_changed()
    assert all(one.doubted_since is not None for one in (lost, back, alone))
    for one in (lost, back):
        world.add(f"new {one.id}", peer=one.id, answers=0.1)
    await world.pass_time(60)
    where["back"] = "unknown"
    world.liveness.network_changed()
    back.link.hear()
    await world.pass_time(MOVED - 61)
    assert lost.link.end is None
    await world.pass_time(3)
    assert lost.link.end.code == "address-lost"
    await world.pass_time(600)
    assert (back.link.end, alone.link.end) == (None, None)
    assert back.doubted_since is None


async def test_needed_peers_are_dialled_at_once(world, autojump_clock):
    missing, dead = peer_of("missing"), world.add("dead")
    world.keeper.need("test", missing)
    world.keeper.need("test", dead.peer)
    await world.pass_time(3600)
    world.dials.clear()
    began = trio.current_time()
    world.liveness.network_changed()
    await trio.sleep(0.1)
    assert [(round(when - began, 1), peer) for when, peer in world.dials] == [(0.0, missing)]
    await world.pass_time(SIGN_OF_LIFE + 1)
    assert any(peer == dead.peer and when - began < SIGN_OF_LIFE + 1.1 for when, peer in world.dials)
    world.keeper.release_all("test")


async def test_silent_connections_of_a_peer_make_room_for_new_ones(world, autojump_clock):
    silent = [world.add(f"silent {n}", peer="far") for n in range(3)]
    world.liveness.network_changed()
    await world.pass_time(SIGN_OF_LIFE + 1)
    assert all(one.doubted_since is not None for one in silent)
    assert world.table.make_room(silent[0].peer) is None
    world.add("living", peer="far", answers=0.1)
    assert world.table.make_room(silent[0].peer) is silent[0]
    silent[0].link.abort("superseded", "")
    world.table.check_room(silent[0].peer)


def test_what_addresses_and_routes_tell(natlab):
    server = natlab.host("server")
    home, cafe = natlab.nat("home"), natlab.nat("cafe", lan="10.7.0.0/24")
    host = natlab.host("laptop", behind=home)
    old = host.address

    def path():
        via = Way("direct", "tcp", Multiaddr(f"/ip4/{old}/tcp/40000"), Multiaddr(f"/ip4/{server.address}/tcp/4001"))
        made_at_home = Connection("server", peer_of("server"), True, via, 0.0, 0.0)
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
