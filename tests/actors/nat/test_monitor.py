"""The monitor of networks: with a pretended kernel under virtual time, and with the real one in a namespace."""

import loguru
import pytest
import trio

from actors.nat import rtnetlink
from actors.nat.kernel import RealKernel
from actors.nat.monitor import NetworkMonitor
from actors.nat.rtnetlink import NetlinkError, Networks
from protocol.messages.network import NetworkChanged, WatchNetwork
from protocol.messages.system import ActorDown, ActorUp, ChildSpec, Describe, Strategy, SupervisorSpec
from supervisor.actor import Actor, handles
from supervisor.simulation import Simulation

MONITOR = "nat/monitor"
HOME = frozenset({"address 192.168.1.2 on wlan0", "default route via 192.168.1.1 on wlan0", "carrier on wlan0"})
CAFE = frozenset({"address 10.7.0.2 on wlan0", "default route via 10.7.0.1 on wlan0", "carrier on wlan0"})


@pytest.fixture(autouse=True)
def quiet():
    loguru.logger.remove()


class PretendedKernel:
    """What outlives monitors."""

    def __init__(self):
        self.now = HOME
        self.asleep = 0.0
        self.facts = frozenset()
        self.broken = False
        self.reads = 0
        self._lost = set()
        self._news = trio.Event()

    def become(self, facts, *lost):
        self.now = facts
        self._lost.update(lost)
        self._news.set()

    def make(self):
        if self.broken:
            raise NetlinkError("not in this sandbox")
        return self

    async def news(self):
        await self._news.wait()
        self._news = trio.Event()
        lost, self._lost = frozenset(self._lost), set()
        return lost

    def read(self):
        self.reads += 1
        self.facts = self.now
        return self.facts

    def slept(self):
        return self.asleep


class Subscriber(Actor):
    def __init__(self):
        self.heard = []

    async def start(self, checkpoint):
        self.context.watch(MONITOR)
        await self.context.ask(MONITOR, WatchNetwork(), timeout=1)
        return {}

    @handles(NetworkChanged)
    async def changed(self, message):
        self.heard.append((self.context.now(), message.why))

    @handles(ActorUp)
    async def up(self, message):
        await self.context.ask(MONITOR, WatchNetwork(), timeout=1)

    @handles(ActorDown)
    async def down(self, message):
        pass


@pytest.fixture
async def kernel():
    return PretendedKernel()


def running(kernel):
    classes = {"monitor": lambda: NetworkMonitor(kernel.make), "subscriber": Subscriber}
    children = ChildSpec(MONITOR, "monitor", {}), ChildSpec("subscriber", "subscriber", {})
    return Simulation(1, classes=classes).run(SupervisorSpec(Strategy.ONE_FOR_ONE, 40, 60.0, 0.1, 5.0, children))


def heard(world):
    return world.actor("subscriber").heard


async def test_moving_is_told_once_in_words_soon_after_the_burst(kernel, autojump_clock):
    async with running(kernel) as world:
        await trio.sleep(10)
        assert heard(world) == []
        began = world.now()
        for facts in (HOME - {"default route via 192.168.1.1 on wlan0"}, frozenset(), CAFE):
            kernel.become(facts)
            await trio.sleep(0.1)
        await trio.sleep(5)
        [(when, why)] = heard(world)
        assert when - began < 0.7
        assert "address 192.168.1.2 on wlan0 is gone" in why
        assert "address 10.7.0.2 on wlan0 is new" in why
        assert not any("carrier" in reason for reason in why)
        told = (await world.ask(MONITOR, Describe())).state
        assert (told["changes"], told["facts"]) == (1, sorted(CAFE))


async def test_noise_that_changes_nothing_is_not_told(kernel, autojump_clock):
    async with running(kernel) as world:
        for _ in range(100):
            kernel.become(HOME)
            await trio.sleep(3)
        assert heard(world) == []


async def test_noise_without_end_does_not_hide_a_change(kernel, autojump_clock):
    async with running(kernel) as world:
        kernel.become(CAFE)
        for _ in range(100):
            kernel.become(CAFE)
            await trio.sleep(0.05)
        assert len(heard(world)) == 1
        assert kernel.reads < 10


async def test_what_went_and_came_back_is_told(kernel, autojump_clock):
    async with running(kernel) as world:
        kernel.become(HOME, "address 192.168.1.2 on wlan0")
        await trio.sleep(1)
        [(_, why)] = heard(world)
        assert why == ("address 192.168.1.2 on wlan0 went and came back",)


async def test_a_machine_that_has_slept_is_noticed(kernel, autojump_clock):
    async with running(kernel) as world:
        await trio.sleep(30)
        kernel.asleep += 0.5
        await trio.sleep(30)
        assert heard(world) == []
        kernel.asleep += 7200
        await trio.sleep(6)
        [(_, why)] = heard(world)
        assert why == ("slept for 7200 s",)


async def test_a_change_while_the_monitor_was_away_is_told_when_it_is_back(kernel, autojump_clock):
    async with running(kernel) as world:
        await trio.sleep(10)
        world.kill(MONITOR)
        kernel.now = CAFE
        await world.wait_for(MONITOR, incarnation=2)
        await trio.sleep(1)
        [(_, why)] = heard(world)
        assert "address 10.7.0.2 on wlan0 is new" in why
        await trio.sleep(60)
        world.kill("subscriber")
        await world.whole()
        await trio.sleep(1)
        assert heard(world) == []  # old news are no news
        kernel.become(HOME)
        await trio.sleep(1)
        assert len(heard(world)) == 1


async def test_a_sandbox_that_forbids_netlink_is_borne(kernel, autojump_clock):
    kernel.broken = True
    async with running(kernel) as world:
        assert "sandbox" in (await world.ask(MONITOR, Describe())).state["problem"]
        await trio.sleep(100)
        assert heard(world) == []


# ---- the real kernel


def test_the_real_kernel_tells_of_a_move(natlab):
    home, cafe = natlab.nat("home", ipv6=True), natlab.nat("cafe", lan="10.7.0.0/24")
    host = natlab.host("laptop", behind=home, ipv6=True)
    with host.enter():
        networks, events = Networks(), rtnetlink.open_events()
    with events:
        with host.enter():
            before = networks.read()
        device = next(iter(before)).rpartition(" ")[2]
        assert f"address {host.address} on {device}" in before
        assert f"address {host.address6} on {device}" in before
        assert {word for fact in before for word in fact.split()[:1]} == {"address", "default", "IPv6", "carrier"}
        with host.enter():
            assert networks.read() == before
        old = host.address
        host.move(cafe)
        events.setblocking(True)
        events.settimeout(5)
        lost = set()
        while f"address {old} on {device}" not in lost:
            lost.update(networks.lost(events.recv(65536)))
        with host.enter():
            after = networks.read()
        assert f"address {host.address} on {device}" in after
        assert not any(old in fact for fact in after)


def test_the_real_kernel_tells_of_a_carrier_that_went_and_came_back(natlab):
    host = natlab.host("laptop", behind=natlab.nat("home"))
    with host.enter():
        networks, events = Networks(), rtnetlink.open_events()
    with events:
        with host.enter():
            before = networks.read()
        host.uplink.unplug()
        host.uplink.plug_in()
        events.setblocking(True)
        events.settimeout(5)
        lost = set()
        while not any(fact.startswith("carrier") for fact in lost):
            lost.update(networks.lost(events.recv(65536)))
        with host.enter():
            assert networks.read() == before


async def test_the_real_kernel_is_asked_without_harm():
    kernel = RealKernel()
    assert kernel.read() == kernel.facts
    assert kernel.slept() >= 0
    with trio.move_on_after(0.01):
        await kernel.news()
    kernel._events.close()


@pytest.mark.parametrize("junk", [b"", b"\x01", b"\x00" * 16, b"\xff" * 200, b"\x14\x00\x00\x00" + b"\x15" * 40])
def test_junk_is_borne(junk):
    assert list(Networks().lost(junk)) == []
