"""The control API and actors that are just being restarted, in a simulated tree under virtual time."""

from __future__ import annotations

import pytest
import trio

from actors.api.node import RESTART_PATIENCE, Node
from protocol.messages import Request, message, system
from protocol.messages.system import ChildSpec, Strategy, SupervisorSpec
from supervisor.actor import Actor, handles
from supervisor.errors import (
    ActorNotReadyError,
    ActorRestartingError,
    DeadlineExceededError,
    NoSuchActorError,
    RefusedError,
)
from supervisor.simulation import Simulation


@message("test-patience.work")
class Work(Request[system.Ok]):
    """Do something for so many seconds; end instead of answering when told to."""

    seconds: float = 0.0
    die: bool = False


class Slow(Actor):
    """Takes some time to start."""

    start_seconds = 0.5

    async def start(self, checkpoint):
        await trio.sleep(self.start_seconds if self.context.incarnation > 1 else 0)
        return {}

    @handles(Work, concurrent=True)
    async def work(self, request):
        Slow.worked += 1
        await trio.sleep(request.seconds)
        if request.die:
            raise ValueError("as asked")


class Api(Actor):
    """Asks as a route does."""

    async def start(self, checkpoint):
        self.node = Node(self.context, None, None)
        return {}


@pytest.fixture
def tree(autojump_clock):
    Slow.worked = 0
    Slow.start_seconds = 0.5
    # A long start is no hang here, and restarts are at once.
    children = (ChildSpec("slow", "slow", {}, heartbeat=60.0), ChildSpec("api", "api", {}, heartbeat=60.0))
    spec = SupervisorSpec(Strategy.ONE_FOR_ONE, 40, 60.0, 0.0, 0.0, children)
    return Simulation(1, classes={"slow": Slow, "api": Api}, tracing=False).run(spec)


async def restarting(world):
    """Have it killed, and wait until everybody knows."""
    world.kill("slow")
    await trio.sleep(0.1)
    return world.actor("api").node


async def test_an_actor_that_is_being_restarted_is_waited_for(tree):
    async with tree as world:
        node = await restarting(world)
        with pytest.raises(ActorNotReadyError):
            await node.context.ask("slow", Work(), timeout=3)
        began = world.now()
        await node.ask("slow", Work(), repeatable=False)
        assert 0.2 < world.now() - began < 0.7
        assert Slow.worked == 1


async def test_it_is_not_waited_for_any_longer_than_a_moment(tree):
    Slow.start_seconds = 8.0
    async with tree as world:
        node = await restarting(world)
        began = world.now()
        with pytest.raises(ActorRestartingError, match="slow is being restarted"):
            await node.ask("slow", Work(), timeout=5)
        assert world.now() - began == pytest.approx(RESTART_PATIENCE, abs=0.2)
        began = world.now()
        with pytest.raises(ActorRestartingError):
            await node.ask("slow", Work(), timeout=0.5)
        assert world.now() - began == pytest.approx(0.5, abs=0.2)


async def test_what_may_have_been_done_is_only_repeated_where_that_does_no_harm(tree):
    async with tree as world:
        node = world.actor("api").node
        for repeatable, worked in ((False, 1), (True, 3)):
            with pytest.raises(ActorRestartingError):
                await node.ask("slow", Work(die=True), repeatable=repeatable)
            assert Slow.worked == worked, "a request that is deadly is not made for ever"
            await world.wait_for("slow", incarnation=1 + worked)


async def test_a_kill_in_the_middle_of_an_answer_is_not_noticed(tree):
    async with tree as world, trio.open_nursery() as nursery:
        nursery.start_soon(world.actor("api").node.ask, "slow", Work(0.5))
        await trio.sleep(0.25)
        world.kill("slow")
    assert Slow.worked == 2


async def test_all_together_takes_no_longer_than_was_asked_for(tree):
    async with tree as world:
        node = await restarting(world)
        began = world.now()
        with pytest.raises(DeadlineExceededError):
            await node.ask("slow", Work(60), timeout=2)
        assert world.now() - began == pytest.approx(2, abs=0.2)


async def test_other_errors_are_told_at_once(tree):
    async with tree as world:
        node = world.actor("api").node
        began = world.now()
        with pytest.raises(NoSuchActorError):
            await node.ask("nobody", Work())
        with pytest.raises(RefusedError):
            await node.ask("slow", system.StopChild("x"))
        assert world.now() - began < 0.1
