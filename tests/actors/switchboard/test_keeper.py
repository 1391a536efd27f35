import random

import trio

from actors.switchboard.backoff import BackOff
from actors.switchboard.errors import UnreachableError
from actors.switchboard.keeper import Keeper
from protocol.peer_id import PeerId

PEER = PeerId(b"\x12\x20" + b"\x01" * 32)


class Network:
    """Connects after `failures` failed dials; a connection lives until `lose`."""

    def __init__(self, failures=0):
        self.failures = failures
        self.dials = []
        self.lost = trio.Event()

    async def connect(self, peer):
        self.dials.append(trio.current_time())
        await trio.sleep(0.001)
        if self.failures:
            self.failures -= 1
            raise UnreachableError("no address answered")
        self.lost = trio.Event()

    async def until_lost(self, peer):
        await self.lost.wait()

    def keeper(self, nursery):
        return Keeper(nursery, self.connect, self.until_lost, trio.current_time, random.Random(1))


def test_back_off_doubles_up_to_its_limit_within_its_jitter():
    back_off = BackOff(random.Random(1), initial=1, limit=8)
    for expected in (1, 2, 4, 8, 8, 8):
        assert expected * 0.75 <= back_off.failed() <= expected * 1.25
    for _ in range(2000):
        back_off.failed()
    back_off.reset()
    assert back_off.failed() <= 1.25


async def test_a_needed_peer_is_dialled_until_it_answers(autojump_clock):
    network = Network(failures=3)
    async with trio.open_nursery() as nursery:
        keeper = network.keeper(nursery)
        keeper.need("proxy/a/b", PEER)
        await trio.sleep(0.1)
        assert "no address answered" in keeper.last_failure(PEER)
        assert keeper.next_dial(PEER) > 0
        await trio.sleep(30)
        assert len(network.dials) == 4
        waits = [later - earlier for earlier, later in zip(network.dials, network.dials[1:], strict=False)]
        assert waits == sorted(waits)
        assert keeper.last_failure(PEER) == ""
        keeper.release("proxy/a/b", PEER)
    assert keeper.peers() == ()


async def test_a_stable_connection_that_is_lost_is_dialled_at_once(autojump_clock):
    network = Network()
    async with trio.open_nursery() as nursery:
        keeper = network.keeper(nursery)
        keeper.need("a", PEER)
        await trio.sleep(60)
        network.lost.set()
        await trio.sleep(0.01)
        assert len(network.dials) == 2
        keeper.release("a", PEER)


async def test_a_peer_that_hangs_up_at_once_is_not_dialled_without_pause(autojump_clock):
    network = Network()
    async with trio.open_nursery() as nursery:
        keeper = network.keeper(nursery)
        keeper.need("a", PEER)
        for _ in range(600):
            await trio.sleep(0.1)
            network.lost.set()
        assert len(network.dials) <= 9
        keeper.release("a", PEER)


async def test_a_peer_that_is_expected_back_is_dialled_often_for_a_while(autojump_clock):
    network = Network(failures=1000)
    async with trio.open_nursery() as nursery:
        began = trio.current_time()
        keeper = Keeper(
            nursery,
            network.connect,
            network.until_lost,
            trio.current_time,
            random.Random(1),
            returning=lambda peer: peer == PEER and trio.current_time() - began < 15,
        )
        keeper.need("a", PEER)
        await trio.sleep(15)
        waits = [later - earlier for earlier, later in zip(network.dials, network.dials[1:], strict=False)]
        assert max(waits) < 0.7
        assert min(waits) > 0.3
        await trio.sleep(300)
        assert network.dials[-1] - network.dials[-2] > 30
        keeper.release("a", PEER)


async def test_new_addresses_end_the_wait(autojump_clock):
    network = Network(failures=6)
    async with trio.open_nursery() as nursery:
        keeper = network.keeper(nursery)
        keeper.need("a", PEER)
        await trio.sleep(10)
        before = len(network.dials)
        keeper.retry(PEER)
        await trio.sleep(0.01)
        assert len(network.dials) == before + 1
        keeper.release("a", PEER)


async def test_the_need_ends_with_the_last_actor(autojump_clock):
    network = Network()
    async with trio.open_nursery() as nursery:
        keeper = network.keeper(nursery)
        keeper.need("a", PEER)
        keeper.need("b", PEER)
        keeper.need("b", PEER)
        assert keeper.needed_by(PEER) == ("a", "b")
        keeper.release_all("b")
        assert keeper.needed_by(PEER) == ("a",)
        keeper.release_all("a")
        assert keeper.needed_by(PEER) == ()
    assert keeper.peers() == ()
