"""What a relay that is to stop tells to whom, and which circuits it cuts."""

import types

from actors.switchboard.farewell import IDLE, LOOK, PROOF, TRICKLE, Farewell
from protocol.identify import Identification
from protocol.stream_descriptor import ResetCode
from tests.actors.dataplane import until
from tests.actors.switchboard.relay_world import relaying, rules
from tests.actors.switchboard.support import peer_of

OURS, FOREIGN = (PROOF, "/ipfs/ping/1.0.0"), ("/ipfs/ping/1.0.0",)
"""What identify tells of a peerup node, and of another program, whose agent may well begin with `peerup/`."""


def told(protocols):
    return Identification(agent_version="peerup/1.0", protocols=protocols)


class World:
    """Connections and circuits that are pretended, and a clock."""

    def __init__(self):
        self.now = 0.0
        self.connections = []
        self.circuits = []
        self.cut = []
        self.timers = []

    def connection(self, name, protocols, *, relayed=False):
        made = types.SimpleNamespace(
            peer=peer_of(name),
            relayed=relayed,
            identification=None if protocols is None else told(protocols),
            link=types.SimpleNamespace(streams=0, end=None),
            parting=False,
        )
        made.say_go_away = lambda: setattr(made, "parting", True)
        self.connections.append(made)
        return made

    def circuit(self, source, destination):
        made = types.SimpleNamespace(
            number=len(self.circuits), source=source.peer, destination=destination.peer, forwarded=[1, 2]
        )
        self.circuits.append(made)
        return made

    def of(self, peer):
        return tuple(one for one in self.connections if one.peer == peer)

    def __iter__(self):
        return iter(list(self.connections))

    def begin(self):
        return Farewell(
            self,
            circuits=lambda: self.circuits,
            cut=self._cut,
            now=lambda: self.now,
            call_later=self._call_later,
        )

    def _cut(self, circuit):
        self.cut.append((circuit, self.now))
        self.circuits.remove(circuit)

    def _call_later(self, delay, function):
        timer = types.SimpleNamespace(due=self.now + delay, function=function)
        timer.cancel = lambda: self.timers.remove(timer)
        self.timers.append(timer)
        return timer

    def sleep(self, seconds):
        until = self.now + seconds
        while self.timers and self.timers[0].due <= until:
            timer = self.timers.pop(0)
            self.now = timer.due
            timer.function()
        self.now = until


def test_our_nodes_are_told_at_once_and_others_when_nothing_would_break():
    world = World()
    ours, foreign, silent = (
        world.connection(name, protocols) for name, protocols in (("a", OURS), ("b", FOREIGN), ("c", None))
    )
    elsewhere = world.connection("d", OURS, relayed=True)
    for each in (ours, foreign, silent):
        each.link.streams = 1
    world.begin()
    assert ours.parting
    assert not foreign.parting
    assert not silent.parting
    silent.identification = told(OURS)  # it was only slow
    foreign.link.streams = 0
    world.sleep(LOOK)
    assert silent.parting
    assert foreign.parting
    assert not elsewhere.parting


def test_who_comes_later_is_not_told_and_who_has_gone_is_forgotten():
    world = World()
    gone = world.connection("gone", FOREIGN)
    gone.link.streams = 1
    world.begin()
    gone.link.end, gone.link.streams = "lost", 0
    late = world.connection("late", OURS)
    world.sleep(10 * LOOK)
    assert not gone.parting
    assert not late.parting


def test_a_circuit_of_others_is_cut_when_it_has_been_silent_for_some_time():
    world = World()
    a, b = world.connection("a", FOREIGN), world.connection("b", FOREIGN)
    a.link.streams = b.link.streams = 2
    silent, pinging, busy, slow = (world.circuit(a, b) for _ in range(4))
    world.begin()
    while world.now < 3 * IDLE:
        pinging.forwarded[0] += TRICKLE // 4  # at the moment when the time is up, too
        pinging.forwarded[1] += TRICKLE // 4
        busy.forwarded[1] += 1_000_000
        slow.forwarded[0] += TRICKLE
        slow.forwarded[1] += 1
        world.sleep(IDLE)
        if world.now < IDLE:
            assert not world.cut
    assert [circuit for circuit, _ in world.cut] == [silent, pinging]
    assert all(IDLE <= when <= IDLE + 2 * LOOK for _, when in world.cut)
    assert world.circuits == [busy, slow]
    world.sleep(IDLE + 2 * LOOK)
    assert world.circuits == []


def test_a_circuit_of_our_nodes_is_theirs_to_close():
    world = World()
    ours, foreign = world.connection("a", OURS), world.connection("b", FOREIGN)
    ours.link.streams = foreign.link.streams = 1
    circuit = world.circuit(foreign, ours)
    world.begin()
    world.sleep(10 * IDLE)
    assert world.circuits == [circuit]


def test_it_can_be_ended_also_by_what_a_cut_leads_to():
    world = World()
    a, b = world.connection("a", None), world.connection("b", None)
    a.link.streams = b.link.streams = 1
    world.circuit(a, b)
    farewell = world.begin()
    before = world._cut

    def cut(circuit):
        before(circuit)
        farewell.stop()

    farewell._cut = cut
    world.sleep(2 * IDLE)
    assert len(world.cut) == 1
    assert not world.timers


# ---- with the relay's room and real links


def identify(peer, protocols):
    for connection in peer.connections:
        connection.identification = told(protocols)


async def test_a_drain_is_said_on_the_wire_and_open_circuits_go_on():
    async with relaying() as world:
        home, laptop = world.connect("home"), world.connect("laptop")
        assert (await home.reserve()).grant is not None
        near, far = await laptop.circuit(home)
        identify(home, OURS)
        identify(laptop, FOREIGN)
        drained = []
        world.room.drain(lambda: drained.append(True))
        await until(lambda: home.links[0].session.remote_gone, "go away")
        near.channel.send(b"still works")
        await until(lambda: far.data == b"still works", "bytes of an open circuit")
        assert not laptop.links[0].session.remote_gone, "it may reset all its streams when it is told"
        assert (await laptop.reserve()).refusal.reason == "the relay is shutting down"
        near.channel.finish()
        far.channel.finish()
        await until(lambda: drained, "the end of the drain")
        (client,) = laptop.connections
        await until(lambda: not client.link.streams, "the end of the last stream")
        await until(lambda: laptop.links[0].session.remote_gone, "go away, when nothing runs any more")


async def test_a_silent_circuit_of_others_is_cut_with_a_code(monkeypatch):
    monkeypatch.setattr("actors.switchboard.farewell.IDLE", 0.3)
    async with relaying() as world:
        home, laptop = world.connect("home"), world.connect("laptop")
        assert (await home.reserve()).grant is not None
        near, far = await laptop.circuit(home)
        drained = []
        world.room.drain(lambda: drained.append(True))
        await until(lambda: drained, "the end of the drain")
        await until(lambda: near.code is not None and far.code is not None, "the cut")
        assert near.code == far.code == ResetCode.SHUTDOWN
        assert world.room.status().requests["circuit idle"] == 1
        assert not world.refused


async def test_serving_again_ends_the_farewell(monkeypatch):
    monkeypatch.setattr("actors.switchboard.farewell.IDLE", 0.2)
    async with relaying() as world:
        home, laptop = world.connect("home"), world.connect("laptop")
        assert (await home.reserve()).grant is not None
        near, far = await laptop.circuit(home)
        world.room.drain(lambda: None)
        world.room.serve(rules())
        later = []
        world.reactor.call_later(1.0, lambda: later.append(True))
        await until(lambda: later, "more than the time after which it would be cut")
        near.channel.send(b"here")
        await until(lambda: far.data == b"here", "the circuit")
