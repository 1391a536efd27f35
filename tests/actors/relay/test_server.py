"""The actor `relay/server` among pretended neighbours."""

import dataclasses

import trio

from actors.config.relay_service import RelayServiceConfig
from actors.relay.server import RelayServer
from protocol.keys import PrivateKey
from protocol.messages.config import ConfigSnapshot, RelayService, SubscribeConfig
from protocol.messages.gate import PolicyPublished, SubscribePolicy
from protocol.messages.reachability import (
    AnnounceAddresses,
    ConnectionClosed,
    ConnectionOpened,
    WatchConnections,
    WatchedConnections,
)
from protocol.messages.relay import (
    DrainRelay,
    ReadRelay,
    RelayServiceStatus,
    ScopedLimit,
    ServeRelay,
    StopListening,
    WithdrawRelay,
)
from protocol.messages.switchboard import ConnectionInfo, ReadStatus, SwitchboardStatus
from protocol.messages.system import SuccessorMayStart
from protocol.multiaddr import Multiaddr
from protocol.policy import PeerRule, Policy
from supervisor.actor import Actor, handles
from supervisor.boot import SERVICE
from supervisor.errors import RefusedError
from tests.support.stage import Stage

US, A, B, STRANGER = (PrivateKey.from_seed(bytes((number,)) * 32).peer_id for number in (1, 2, 3, 4))
LISTENING = (Multiaddr("/ip4/10.0.0.5/tcp/4001"),)
RULES = RelayServiceConfig().rules
FEWER = dataclasses.replace(RULES, circuits=ScopedLimit(1, 1, 1, 1))


class FakeConfig(Actor):
    def __init__(self, *, announce=()):
        self.service = RelayService(tuple(Multiaddr(text) for text in announce), RULES)
        self.subscribers = set()

    def snapshot(self):
        return ConfigSnapshot(1, True, (), (), (), (), self.service)

    def publish(self, service):
        self.service = service
        for subscriber in self.subscribers:
            self.context.tell(subscriber, self.snapshot())

    @handles(SubscribeConfig)
    async def subscribe(self, request):
        self.subscribers.add(self.context.current_sender)
        return self.snapshot()


class FakeGate(Actor):
    @handles(SubscribePolicy)
    async def subscribe(self, request):
        return PolicyPublished(Policy(1, gating=False, peers=tuple(_rule(peer) for peer in (A, B)), services=()))


def _rule(peer):
    return PeerRule(peer, 1, None, "")


class FakeSwitchboard(Actor):
    """Remembers what it was told; a drain is done when the test says so."""

    def __init__(self):
        self.told = []
        self.circuits = 0
        self.drained = trio.Event()
        self.refuses = False

    def last(self, kind):
        return next((message for message in reversed(self.told) if isinstance(message, kind)), None)

    @handles(ServeRelay)
    async def serve(self, request):
        if self.refuses:
            raise RefusedError("invalid-value", "nobody could keep that")
        self.told.append(request)

    @handles(AnnounceAddresses)
    async def announce(self, request):
        self.told.append(request)

    @handles(WithdrawRelay)
    async def withdraw(self, request):
        self.told.append(request)

    @handles(StopListening)
    async def stop_listening(self, request):
        self.told.append(request)

    @handles(DrainRelay, concurrent=True)
    async def drain(self, request):
        self.told.append(request)
        await self.drained.wait()

    @handles(ReadRelay)
    async def read(self, request):
        return RelayServiceStatus(
            serving=True,
            draining=False,
            addresses=(),
            reservations=3,
            circuits=self.circuits,
            held=(),
            open=(),
            requests={"reserve granted": 3},
            to_destination=10,
            to_source=20,
        )

    @handles(ReadStatus)
    async def status(self, request):
        return SwitchboardStatus(peer_id=US, listen_addresses=LISTENING, peers=(), protocols=())

    @handles(WatchConnections)
    async def watch(self, request):
        return WatchedConnections(())


class World:
    def __init__(self, stage):
        self.stage = stage
        self.config = FakeConfig()
        self.switchboard = FakeSwitchboard()

    async def start(self, drain=30.0):
        await self.stage.start("config", self.config)
        await self.stage.start("gate", FakeGate())
        await self.stage.start("switchboard", self.switchboard)
        await self.stage.start("relay/server", RelayServer(drain=drain))

    async def restart(self, name, actor):
        await self.stage.kill(name)
        await self.stage.start(name, actor)

    def opened(self, number, peer, where, observed, *, direction="outbound", path="direct"):
        remote = Multiaddr(f"/ip4/{where}/tcp/999")
        info = ConnectionInfo(
            f"1-{number}", peer, direction, path, "tcp", LISTENING[0], remote, 0, None, 0, 0, 0.0, "", ()
        )
        self.switchboard.context.tell("relay/server", ConnectionOpened(info, True, Multiaddr(observed)))
        return info

    async def until(self, condition):
        with trio.fail_after(60):
            while not (value := condition()):  # noqa: ASYNC110  # any condition; the clock is virtual
                await trio.sleep(0.1)
        return value

    def announced(self):
        told = self.switchboard.last(AnnounceAddresses)
        return [] if told is None else [str(address) for address in told.addresses]


def staged(test):
    """The test, with a world on a stage that lasts as long as it."""

    async def on_a_stage(autojump_clock):
        async with Stage() as stage:
            world = World(stage)
            await test(world)
            world.switchboard.drained.set()  # else the stage would wait for the drain at its end

    on_a_stage.__doc__ = test.__doc__
    return on_a_stage


@staged
async def test_it_has_the_switchboard_serve_by_the_rules_of_the_configuration_and_by_new_ones(world):
    await world.start()
    assert world.switchboard.last(ServeRelay).rules == RULES
    assert not world.switchboard.last(AnnounceAddresses).instead
    world.config.publish(RelayService((), FEWER))
    await world.until(lambda: world.switchboard.last(ServeRelay).rules == FEWER)
    # that it shall be no relay any more takes effect with the next start
    world.config.publish(None)
    await trio.sleep(20)
    assert world.switchboard.last(ServeRelay).rules == FEWER
    assert world.switchboard.last(WithdrawRelay) is None
    described = world.stage.describe("relay/server")
    assert described["serving"]
    assert described["limits"]["circuits"]["per_peer"] == 1
    assert (described["reservations"], described["requests"]) == (3, {"reserve granted": 3})


@staged
async def test_a_restarted_switchboard_is_told_again_and_a_restarted_config_followed_again(world):
    world.config = FakeConfig(announce=["/ip4/5.6.7.8/tcp/443"])
    await world.start()
    world.switchboard = FakeSwitchboard()
    await world.restart("switchboard", world.switchboard)
    await world.until(lambda: world.switchboard.last(ServeRelay))
    await world.until(lambda: world.announced() == ["/ip4/5.6.7.8/tcp/443"])
    world.config = FakeConfig()
    await world.restart("config", world.config)
    await world.until(lambda: world.switchboard.last(AnnounceAddresses).instead is False)


@staged
async def test_announced_addresses_of_the_configuration_replace_what_is_found_out(world):
    world.config = FakeConfig(announce=[f"/ip4/5.6.7.8/tcp/443/p2p/{US}"])
    await world.start()
    assert world.announced() == ["/ip4/5.6.7.8/tcp/443"]
    assert world.switchboard.last(AnnounceAddresses).instead
    world.opened(1, A, "51.15.1.1", "/ip4/9.9.9.9/tcp/1")
    world.opened(2, B, "8.8.4.4", "/ip4/9.9.9.9/tcp/1")
    await trio.sleep(10)
    assert world.announced() == ["/ip4/5.6.7.8/tcp/443"]


@staged
async def test_the_public_address_is_found_out_and_survives_a_restart(world):
    await world.start()
    assert world.announced() == []
    world.opened(1, A, "51.15.1.1", "/ip4/9.9.9.9/tcp/1")
    closed = world.opened(2, B, "8.8.4.4", "/ip4/9.9.9.9/tcp/2")
    await world.until(lambda: world.announced() == ["/ip4/9.9.9.9/tcp/4001"])
    assert not world.switchboard.last(AnnounceAddresses).instead
    world.switchboard.context.tell("relay/server", ConnectionClosed(closed, "lost", "it is gone"))
    await trio.sleep(10)
    world.switchboard.told.clear()
    await world.restart("relay/server", RelayServer())
    await world.until(lambda: world.announced() == ["/ip4/9.9.9.9/tcp/4001"])


@staged
async def test_guests_and_relayed_peers_have_no_say_about_the_address(world):
    await world.start()
    world.opened(1, A, "51.15.1.1", "/ip4/9.9.9.9/tcp/1")
    world.opened(2, STRANGER, "8.8.4.4", "/ip4/9.9.9.9/tcp/1")
    world.opened(3, B, "8.8.4.4", "/ip4/9.9.9.9/tcp/1", path="relayed")
    await trio.sleep(10)
    assert world.announced() == []
    assert len(world.stage.describe("relay/server")["observed"]) == 1


@staged
async def test_when_the_node_stops_circuits_get_their_time_and_no_more(world):
    await world.start(drain=30.0)
    world.switchboard.circuits = 2
    began = trio.current_time()
    await stop(world)
    assert 30 <= trio.current_time() - began < 31
    assert [type(message) for message in world.switchboard.told[-3:]] == [StopListening, DrainRelay, WithdrawRelay]


@staged
async def test_a_drain_ends_with_the_last_circuit(world):
    await world.start(drain=30.0)
    began = trio.current_time()

    async def end_circuits():
        await trio.sleep(4)
        world.switchboard.drained.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(end_circuits)
        await stop(world)
    assert 4 <= trio.current_time() - began < 5
    assert isinstance(world.switchboard.told[-1], WithdrawRelay)


@staged
async def test_a_successor_may_start_while_circuits_run_on(world):
    service = world.stage.visitor(SERVICE)
    await world.start(drain=30.0)
    world.switchboard.circuits = 1
    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stop, world)
        await service.wait_until(lambda inbox: any(isinstance(message, SuccessorMayStart) for message in inbox))
        assert trio.current_time() - began < 1
        assert world.switchboard.last(StopListening) is not None
        world.switchboard.drained.set()


@staged
async def test_a_relay_that_ends_soon_leaves_nothing_to_a_successor(world):
    service = world.stage.visitor(SERVICE)
    await world.start(drain=30.0)
    world.switchboard.circuits = 1
    world.switchboard.drained.set()
    await stop(world)
    assert not any(isinstance(message, SuccessorMayStart) for message in service.inbox)


@staged
async def test_a_relay_without_circuits_goes_on_listening_until_it_ends(world):
    service = world.stage.visitor(SERVICE)
    await world.start(drain=30.0)
    await stop(world)
    assert not any(isinstance(message, SuccessorMayStart) for message in service.inbox)
    assert world.switchboard.last(StopListening) is None


@staged
async def test_a_restart_of_a_sibling_drains_nothing(world):
    await world.start()
    await stop(world, "gate is restarted")
    assert world.switchboard.last(DrainRelay) is None


@staged
async def test_what_the_switchboard_refuses_is_told_and_tried_again(world):
    world.switchboard.refuses = True
    await world.start()
    assert "nobody could keep that" in world.stage.describe("relay/server")["problem"]
    world.switchboard.refuses = False
    await world.until(lambda: world.switchboard.last(ServeRelay))
    assert world.stage.describe("relay/server")["problem"] == ""


async def stop(world, reason="SIGTERM"):
    running = world.stage._running["relay/server"]
    running.cell.request_stop(reason)
    with trio.fail_after(100):
        await running.ended.wait()
