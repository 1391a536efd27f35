"""Circuits that relays announce: what is refused, and how much is at once."""

import contextlib
import types

import pytest
import trio

from actors.switchboard import stops
from actors.switchboard.circuits import CircuitEnd
from actors.switchboard.stops import Stops
from actors.switchboard.wire import Way
from protocol.circuit.messages import Limit, Status
from protocol.circuit.stop import StopInitiator
from protocol.multiaddr import Multiaddr
from protocol.multistream import Initiator
from protocol.noise import NoiseHandshake
from protocol.stream_descriptor import ResetCode
from tests.actors.dataplane import Ends, running, until

from .support import key_of, noise_identity, peer_of, upgrader_of

ADDRESS = Multiaddr("/ip4/192.0.2.1/tcp/4001")
RELAY = peer_of("relay")


class Asked:
    """A stop stream, seen from the relay."""

    def __init__(self, channel, machine):
        self.channel, self.machine, self.code, self.finished = channel, machine, None, False
        channel.on_data = machine.receive_data
        channel.on_finish = self._finish
        channel.on_reset = self._reset
        channel.send(machine.data_to_send())

    def _finish(self):
        self.finished = True

    def _reset(self, code):
        self.code = code


class World:
    def __init__(self, nursery, reactor, *, relays, relayed, allowed, **limits):
        self.reactor = reactor
        self.ends = Ends(reactor)
        self.judged, self.welcomed, self.refused = [], [], []
        way = Way("relayed" if relayed else "direct", "tcp", ADDRESS, ADDRESS, peer_of("other") if relayed else None)
        self.connection = types.SimpleNamespace(
            peer=RELAY, relayed=relayed, via=way, end=None, leaving=False, link=self.ends.server, remote_address=ADDRESS
        )
        self.stops = Stops(
            nursery,
            upgrader_of("bob"),
            may_relay=lambda peer: peer in relays,
            judge=self._judge,
            welcome=lambda pipe, upgraded: self.welcomed.append((pipe, upgraded)),
            refused=self.refused.append,
            now=reactor.clock,
            call_later=reactor.call_later,
            **limits,
        )
        self.allowed = allowed
        self.ends.on_stream = lambda channel: self.stops.serve_stop(self.connection, channel, b"")

    def _judge(self, peer, pipe):
        self.judged.append((peer, str(pipe.way)))
        return peer in self.allowed

    def ask(self, source="alice", limit=None, early=b""):
        return Asked(self.ends.client.open_stream(), StopInitiator(peer_of(source), limit, early=early))


@contextlib.asynccontextmanager
async def world(*, relays=(RELAY,), relayed=False, allowed=("alice",), **limits):
    async with running() as reactor, trio.open_nursery() as nursery:
        made = World(
            nursery, reactor, relays=relays, relayed=relayed, allowed=[peer_of(one) for one in allowed], **limits
        )
        with trio.fail_after(30):
            try:
                yield made
            finally:
                await made.ends.close()
        nursery.cancel_scope.cancel()


async def call(made, who="alice", claimed="alice", limit=None):
    """Do the whole handshake as the source; what the upgrade gave, or what it raised."""
    asked = made.ask(claimed, limit)
    await until(lambda: asked.machine.state != "waiting" or asked.code is not None, "the answer")
    assert asked.machine.state == "open"
    end = CircuitEnd(asked.channel, str, unread=asked.machine.leftover)
    pipe = types.SimpleNamespace(receive=end.receive, send=None)

    async def send(data):
        await trio.lowlevel.checkpoint()
        end.push(data)

    pipe.send = send
    return asked, end, await upgrader_of(who).outbound(pipe, peer_of("bob"))


async def test_a_circuit_of_a_configured_relay_becomes_a_connection():
    async with world() as made:
        _, _, upgraded = await call(made, limit=Limit(120, 1000))
        assert upgraded.peer == peer_of("bob")
        await until(lambda: made.welcomed, "the welcome")
        ((pipe, welcomed),) = made.welcomed
        assert welcomed.peer == peer_of("alice")
        assert pipe.way.relay == RELAY
        assert pipe.way.limit == Limit(120, 1000)
        assert str(pipe.way) == f"relayed via {RELAY} tcp {ADDRESS}/p2p/{RELAY}/p2p-circuit"
        assert made.judged == [(peer_of("alice"), str(pipe.way))]
        await until(lambda: made.stops.handshakes == 0)
        assert made.refused == []


async def test_everything_of_the_first_flight_is_answered_together():
    """Request, proposal and handshake in one piece; so come the answers, before anything else is sent."""
    static, identity = noise_identity(key_of("alice"))
    hello = NoiseHandshake(initiator=True, static_key=static, identity=identity, muxers=("/yamux/1.0.0",))
    async with world() as made:
        security = Initiator(("/noise",))
        asked = made.ask(early=security.data_to_send() + hello.data_to_send())
        await until(lambda: asked.machine.state == "open", "the answer")

        def answered():
            data, asked.machine.leftover = asked.machine.leftover, b""
            if data and security.result is None:
                security.receive_data(data)
                data = security.leftover
            if data:
                hello.receive_data(data)
            return hello.result is not None

        await until(answered, "the handshake's answer")
        assert hello.result.peer_id == peer_of("bob")


@pytest.mark.parametrize("options", [{"relays": ()}, {"relayed": True}])
async def test_nobody_else_may_announce_circuits(options):
    async with world(**options) as made:
        asked = made.ask()
        await until(lambda: asked.code is not None, "the reset")
        assert asked.code == ResetCode.GATED
        assert made.refused == ["circuit-not-configured"]


async def test_a_source_that_proves_to_be_another_is_refused_before_any_judgement():
    async with world(allowed=("alice", "mallory")) as made:
        _, end, _ = await call(made, who="mallory", claimed="alice")
        assert await end.receive() == b"", "the circuit was closed without a word"
        assert made.judged == []
        assert made.welcomed == []
        assert made.refused == ["circuit-wrong-source", "not-authorised"]


async def test_a_peer_that_may_not_connect_is_refused_on_its_proven_id():
    async with world(allowed=()) as made:
        _, end, _ = await call(made)
        assert await end.receive() == b""
        assert [peer for peer, _ in made.judged] == [peer_of("alice")]
        assert made.refused == ["not-authorised"]


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"\x03abc", Status.MALFORMED_MESSAGE),
        (b"\xff" * 10, Status.MALFORMED_MESSAGE),
        (b"\x04\x08\x01\x20\x64", Status.UNEXPECTED_MESSAGE),
    ],
)
async def test_bad_requests_are_answered_and_closed(request_bytes, status):
    async with world() as made:
        other = made.ends.client.open_stream()
        machine = StopInitiator(peer_of("alice"))
        heard, ends = [], []
        other.on_data, other.on_finish, other.on_reset = heard.append, lambda: ends.append("F"), ends.append
        other.send(request_bytes)
        other.finish()
        await until(lambda: ends, "the end")
        machine.receive_data(b"".join(heard))
        assert machine.state == "refused"
        assert machine.refusal.status == status
        assert made.refused == ["circuit-malformed"]


async def test_a_relay_that_asks_for_nothing_is_cut_off(monkeypatch):
    monkeypatch.setattr(stops, "REQUEST_TIMEOUT", 0.05)
    async with world() as made:
        channel = made.ends.client.open_stream()
        codes = []
        channel.on_reset = codes.append
        await until(lambda: codes, "the reset")
        assert made.refused == ["circuit-too-slow"]


async def test_places_are_bounded_and_those_who_dawdle_lose_theirs(monkeypatch):
    monkeypatch.setattr(stops, "PATIENCE", 1000.0)
    async with world(handshakes_per_relay=3) as made:
        slow = [made.ask() for _ in range(3)]
        await until(lambda: all(one.machine.state == "open" for one in slow))
        assert made.stops.handshakes == 3
        turned_away = made.ask()
        await until(lambda: turned_away.machine.state == "refused", "the refusal")
        assert turned_away.machine.refusal.status == Status.RESOURCE_LIMIT_EXCEEDED
        assert made.stops.handshakes == 3
        monkeypatch.setattr(stops, "PATIENCE", 0.0)
        await call(made)
        await until(lambda: made.welcomed, "the welcome")
        assert "too-slow" in made.refused
        await until(lambda: slow[0].finished or slow[0].code is not None, "the end of the oldest")
        assert made.stops.handshakes == 2


async def test_one_busy_relay_leaves_room_for_another():
    async with world(relays=(RELAY, peer_of("second")), handshakes=5, handshakes_per_relay=2) as made:
        for _ in range(2):
            made.ask()
        await until(lambda: made.stops.handshakes == 2)
        full = made.ask()
        await until(lambda: full.machine.state == "refused")
        made.connection = types.SimpleNamespace(**(vars(made.connection) | {"peer": peer_of("second")}))
        other = made.ask()
        await until(lambda: other.machine.state == "open", "the other relay's circuit")


async def test_strangers_through_a_relay_have_a_rate_and_who_may_connect_does_not_count():
    async with world(allowed=("alice",), rate=1e-6, burst=5) as made:
        for _ in range(8):
            await call(made)
        await until(lambda: len(made.welcomed) == 8, "all those who may connect")
        await until(lambda: made.stops.handshakes == 0)
        for number in range(5):
            await call(made, who="mallory", claimed="mallory")
            await until(lambda number=number: made.refused.count("not-authorised") == number + 1, "the refusal")
        turned_away = made.ask("mallory")
        await until(lambda: turned_away.machine.state == "refused", "the refusal for the rate")
        assert turned_away.machine.refusal.status == Status.RESOURCE_LIMIT_EXCEEDED
        assert made.refused[-1] == "circuit-queue-full"
        assert made.stops.handshakes == 0


async def test_a_defect_that_a_stranger_finds_costs_the_stranger_its_circuit_alone():
    broke = []
    async with world(broke=broke.append) as made:

        def defect(*_):
            raise AssertionError("what nobody foresaw")

        made.stops._judge = defect
        _, end, _ = await call(made)
        await until(lambda: broke, "the defect")
        assert isinstance(broke[0], AssertionError)
        assert made.refused == ["defect"]
        assert await end.receive() == b""
        made.stops._judge = lambda *_: True
        await call(made)
        await until(lambda: made.welcomed, "the next one")
