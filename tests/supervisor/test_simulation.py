"""The in-process runtime: the same actors, virtual time, seeded interleavings, faults, restarts."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time

import loguru
import pytest
import trio

from protocol.messages import Descriptor, Envelope, Message, Request, message
from protocol.messages.system import (
    ActorDown,
    ActorUp,
    ChildSpec,
    CollectMetrics,
    EdgeFilter,
    FaultAction,
    FaultRule,
    Hang,
    InjectProcessFault,
    Ok,
    ProcessFault,
    ReadDeadLetters,
    ReadJournal,
    ReadTree,
    Restart,
    StartChild,
    StopChild,
    Strategy,
    SupervisorSpec,
    Tapped,
    TapRule,
)
from supervisor.actor import Actor, handles
from supervisor.errors import ActorRestartingError, AskError, DeadlineExceededError, NoSuchActorError, RefusedError
from supervisor.overseer import FACTORY, supervisor_arguments
from supervisor.simulation import Simulation


@message("test-sim.number")
class Number(Message):
    value: int


@message("test-sim.add")
class Add(Request[Number]):
    value: int


@message("test-sim.total")
class Total(Request[Number]):
    """The present sum."""


@message("test-sim.crash")
class Crash(Request[Ok]):
    """Fail while handling."""


@message("test-sim.relay")
class Relay(Request[Number]):
    """Ask `target` to add."""

    target: str
    value: int


@message("test-sim.listen")
class Listen(Request[Number]):
    """How many bytes wait in the checkpointed socket."""


class Summer(Actor):
    """Keeps a sum, and leaves it for its successor."""

    async def start(self, checkpoint):
        self.total = checkpoint.state["total"] if checkpoint else 0
        return {"total": self.total}

    @handles(Add)
    async def add(self, request):
        self.total += request.value
        self.context.checkpoint({"total": self.total})
        return Number(self.total)

    @handles(Total)
    async def tell_total(self, request):
        return Number(self.total)

    @handles(Crash)
    async def crash(self, request):
        raise ValueError("as asked")

    def describe(self):
        return {"total": self.total}


class Relayer(Actor):
    """Passes requests on, and keeps an eye on `a`."""

    async def start(self, checkpoint):
        self.seen = []
        self.context.watch("a")
        return {}

    @handles(Relay, concurrent=True)
    async def relay(self, request):
        return await self.context.ask(request.target, Add(request.value), timeout=2)

    @handles(ActorDown)
    async def down(self, notice):
        self.seen.append(f"down {notice.name}")

    @handles(ActorUp)
    async def up(self, notice):
        self.seen.append(f"up {notice.name} {notice.incarnation}")


class Unlucky(Actor):
    """Never gets up."""

    async def start(self, checkpoint):
        raise RefusedError("port-in-use", "the port is taken")


class Flaky(Actor):
    """Dies by itself after a random while."""

    async def start(self, checkpoint):
        self.context.nursery.start_soon(self.doom)
        return {}

    async def doom(self):
        await trio.sleep(self.context.random.uniform(1, 400))
        raise OSError("the end")


class Watcher(Actor):
    """Collects what a tap sends."""

    async def start(self, checkpoint):
        self.copies = []
        return {}

    @handles(Tapped)
    async def tapped(self, copy):
        self.copies.append(copy)


class Listener(Actor):
    """Leaves a socket to its successor."""

    async def start(self, checkpoint):
        if checkpoint is None:
            self.read, self.write = os.pipe()
            self.context.checkpoint({}, [self.read])
        else:
            self.read, self.write = checkpoint.descriptors[0].detach(), -1
        return {}

    @handles(Listen)
    async def listen(self, request):
        os.set_blocking(self.read, False)
        return Number(len(os.read(self.read, 100)))


class Serial(Actor):
    """Passes requests on one after the other."""

    @handles(Relay)
    async def relay(self, request):
        path = request.target.split(",", 1)
        message = Relay(path[1], request.value) if len(path) > 1 else Add(request.value)
        return await self.context.ask(path[0], message, timeout=300)

    @handles(Add)
    async def add(self, request):
        return Number(request.value)


class Poisoned(Actor):
    """Cannot read what it once left."""

    async def start(self, checkpoint):
        if checkpoint is not None:
            raise ValueError("a checkpoint that nobody can read")
        return {}

    @handles(Add)
    async def add(self, request):
        self.context.checkpoint({"total": request.value})
        return Number(request.value)


CLASSES = {
    "poisoned": Poisoned,
    "serial": Serial,
    "summer": Summer,
    "relayer": Relayer,
    "unlucky": Unlucky,
    "flaky": Flaky,
    "watcher": Watcher,
    "listener": Listener,
}


def child(name, factory="summer", **more):
    return ChildSpec(name=name, factory=factory, arguments={}, **more)


def tree(*children, strategy=Strategy.ONE_FOR_ONE, intensity=5, window=10.0):
    return SupervisorSpec(strategy, intensity, window, 0.1, 5.0, children, starters=("world",))


def below(name, spec):
    return ChildSpec(name=name, factory=FACTORY, arguments=supervisor_arguments(spec))


def simulation(seed=1, **more):
    return Simulation(seed, classes=CLASSES, **more)


@pytest.fixture(autouse=True)
def quiet():
    loguru.logger.remove()


async def test_actors_start_in_order_answer_and_stop(autojump_clock):
    async with simulation().run(tree(child("a"), child("b"))) as world:
        assert (await world.ask("a", Add(2))).value == 2
        assert (await world.ask("a", Add(3))).value == 5
    spawned = [line.split()[2] for line in world.trace if " spawn " in line]
    exits = [line.split()[2] for line in world.trace if " exit " in line]
    assert spawned == ["root", "a", "b"]
    assert exits == ["b", "a", "root"]


async def test_a_killed_actor_is_back_with_its_checkpoint(autojump_clock):
    async with simulation().run(tree(child("a"))) as world:
        await world.ask("a", Add(7))
        await trio.sleep(0.1)
        before = world.now()
        world.kill("a")
        with pytest.raises(ActorRestartingError):
            await world.ask("a", Total())
        await world.wait_for("a", timeout=1)
        assert world.now() - before < 0.2
        assert (await world.ask("a", Total())).value == 7
        [_, status] = world.tree()
        assert (status.state, status.restarts, status.last_failure) == ("running", 1, "killed by SIGKILL")


async def test_an_actor_that_lives_and_does_not_work_is_told_of_and_restarted(autojump_clock):
    lines = []
    loguru.logger.add(lines.append, level="WARNING", format="{message}")
    actors = (child("a", "serial"), child("b", heartbeat=0.0))
    async with simulation().run(tree(*actors)) as world, trio.open_nursery() as nursery:

        async def ask(request):
            with pytest.raises(ActorRestartingError):
                await world.ask("a", request, timeout=200)
            assert 55 < world.now() - began < 65

        began = world.now()
        world.freeze("b")  # so that `a` waits for it, and nobody finds out why
        nursery.start_soon(ask, Relay("b", 1))
        await trio.sleep(0.1)
        nursery.start_soon(ask, Add(1))
    assert "a is not at work: it has handled nothing for 10 s, though messages wait for it: 1" in lines[0]
    assert f"it has been handling {Relay.KIND} for" in lines[0]
    assert "waiting for b" in lines[0]
    assert "killing a: it has handled nothing for 60 s" in lines[1]


async def test_requests_in_a_circle_are_told_of(autojump_clock):
    lines = []
    loguru.logger.add(lines.append, level="WARNING", format="{message}")
    actors = (child("a", "serial"), child("b", "serial"), child("c", "serial"))
    async with simulation().run(tree(*actors)) as world:
        with pytest.raises(AskError):
            await world.ask("a", Relay("b,c,a", 1), timeout=20)
        work = {status.name: status.work for status in world.tree()}
        assert (work["a"].waits_for, work["b"].waits_for, work["c"].waits_for) == ("b", "c", "a")
        assert work["a"].kind == Relay.KIND
        assert 10 < work["a"].age < 25
    [told] = [line for line in lines if "circle" in line]
    assert told.strip().endswith(
        (
            "a waits for b waits for c waits for a",
            "b waits for c waits for a waits for b",
            "c waits for a waits for b waits for c",
        )
    )


async def test_a_checkpoint_that_an_actor_fails_by_is_left_out_and_then_dropped(autojump_clock):
    lines = []
    loguru.logger.add(lines.append, level="ERROR", format="{message}")
    async with simulation().run(tree(child("a", "poisoned"), intensity=20)) as world:
        await world.ask("a", Add(7))
        await trio.sleep(0.1)
        for _ in range(2):
            world.kill("a")
            await world.wait_for("a", timeout=10)
            await world.ask("a", Add(7))
            await trio.sleep(0.1)
    assert sum("without its checkpoint" in line for line in lines) == 2


async def test_a_checkpoint_of_another_version_is_not_given(autojump_clock, monkeypatch):
    async with simulation().run(tree(child("a"))) as world:
        await world.ask("a", Add(7))
        await trio.sleep(0.1)
        monkeypatch.setattr(Summer, "checkpoint_version", 2)
        world.kill("a")
        await world.wait_for("a", timeout=1)
        assert (await world.ask("a", Total())).value == 0
        await world.ask("a", Add(2))
        await trio.sleep(0.1)
        world.kill("a")
        await world.wait_for("a", timeout=1)
        assert (await world.ask("a", Total())).value == 2


async def test_a_request_pending_when_the_actor_dies_fails_as_restarting(autojump_clock):
    async with simulation(latency=(0.01, 0.01)).run(tree(child("a"))) as world, trio.open_nursery() as nursery:

        async def ask():
            with pytest.raises(ActorRestartingError):
                await world.ask("a", Add(1))

        nursery.start_soon(ask)
        await trio.sleep(0.005)
        world.kill("a")


async def test_an_unhandled_exception_ends_the_actor_with_its_words(autojump_clock):
    async with simulation().run(tree(child("a"))) as world:
        with pytest.raises(ActorRestartingError):
            await world.ask("a", Crash())
        await world.wait_for("a", incarnation=2)
        assert world.tree()[1].last_failure.startswith("ValueError: as asked (test_simulation.py:")


async def test_frozen_and_hung_actors_are_found_by_their_heartbeat(autojump_clock):
    async with simulation().run(tree(child("a"), child("b"))) as world:
        world.freeze("a")
        world.tell("b", Hang())
        with pytest.raises(DeadlineExceededError):
            await world.ask("a", Total(), timeout=0.5)
        await world.wait_for("a", incarnation=2, timeout=4)
        await world.wait_for("b", incarnation=2, timeout=4)
        assert "heartbeat" in world.tree()[1].last_failure


async def test_a_frozen_actor_that_is_continued_in_time_goes_on(autojump_clock):
    async with simulation().run(tree(child("a"))) as world:
        world.freeze("a")
        world.tell("a", Add(4))
        await trio.sleep(1)
        world.thaw("a")
        assert (await world.ask("a", Total())).value == 4
        assert world.incarnation("a") == 1


async def test_watchers_hear_of_ends_and_beginnings(autojump_clock):
    async with simulation().run(tree(child("a"), child("r", "relayer"))) as world:
        world.kill("a")
        await world.wait_for("a")
        await trio.sleep(0.01)
        assert world.actor("r").seen == ["down a", "up a 2"]


async def test_causes_can_be_followed_from_journal_to_journal(autojump_clock):
    async with simulation().run(tree(child("a"), child("r", "relayer"))) as world:
        await world.ask("r", Relay("a", 1))
        journal = await world.ask("a", ReadJournal(()))
        [added] = [entry for entry in journal.entries if entry.kind == "test-sim.add"]
        assert added.sender == "r"
        journal = await world.ask("r", ReadJournal((added.cause,)))
        assert [(entry.sender, entry.kind) for entry in journal.entries] == [("world", "test-sim.relay")]


async def test_an_unknown_name_is_told_at_once_and_ends_an_actor_that_does_not_expect_it(autojump_clock):
    async with simulation().run(tree(child("a"), child("r", "relayer"))) as world:
        with pytest.raises(NoSuchActorError):
            await world.ask("nobody", Total())
        with pytest.raises(ActorRestartingError, match="there is no actor nobody"):
            await world.ask("r", Relay("nobody", 1))
        await world.wait_for("r", incarnation=2)


async def test_dead_letters_of_an_actor_can_be_read(autojump_clock):
    async with simulation().run(tree(child("a"))) as world:
        world.tell("nobody", Total())
        world.tell("a", Relay("x", 1))
        await trio.sleep(0.1)
        letters = world.exchange.dead_letters().letters
        assert [(letter.entry.target, letter.entry.kind) for letter in letters] == [
            ("nobody", "test-sim.total"),
            ("a", "test-sim.relay"),
        ]
        assert (await world.ask("a", ReadDeadLetters())).letters == ()


async def test_dynamic_children(autojump_clock):
    async with simulation().run(tree(child("a"))) as world:
        started = await world.ask("root", StartChild(child("d")))
        assert started.ready == {"total": 0}
        with pytest.raises(RefusedError) as refused:
            await world.ask("root", StartChild(child("d")))
        assert refused.value.code == "already-started"
        with pytest.raises(RefusedError) as refused:
            await world.ask("root", StartChild(child("u", "unlucky")))
        assert (refused.value.code, refused.value.reason) == ("port-in-use", "the port is taken")
        await world.ask("d", Add(1))
        await world.ask("root", StopChild("d"))
        with pytest.raises(NoSuchActorError):
            await world.ask("d", Total())
        started = await world.ask("root", StartChild(child("d")))
        assert started.ready == {"total": 0}, "a stopped child leaves nothing behind"
        assert world.incarnation("d") == 2


async def test_nobody_can_have_a_static_child_stopped(autojump_clock):
    async with simulation().run(tree(child("a"))) as world:
        with pytest.raises(RefusedError) as refused:
            await world.ask("root", StopChild("a"))
        assert refused.value.code == "not-allowed"
        assert await world.ask("a", Total()) is not None


async def test_a_name_belongs_to_one_supervisor(autojump_clock):
    spec = tree(child("a"), below("sub", tree(child("x"))))
    async with simulation().run(spec) as world:
        with pytest.raises(RefusedError) as refused:
            await world.ask("sub", StartChild(child("a")))
        assert refused.value.code == "already-started"


async def test_a_tree_of_supervisors_reports_itself_and_escalates(autojump_clock):
    spec = tree(child("a"), below("sub", tree(child("x"), child("y"), intensity=1)))
    async with simulation().run(spec) as world:
        report = await world.ask("root", ReadTree())
        assert [status.name for status in report.children] == ["root", "a", "sub", "x", "y"]
        assert [status.supervisor for status in report.children] == ["world", "root", "root", "sub", "sub"]
        assert report.children == tuple(
            type(line)(**{**vars(line), "uptime": seen.uptime, "mailbox": seen.mailbox, "handled": seen.handled})
            for line, seen in zip(world.tree(), report.children, strict=True)
        )
        world.kill("x")
        await world.wait_for("x", incarnation=2)
        assert world.incarnation("sub") == 1
        world.kill("x")
        await world.wait_for("sub", incarnation=2)
        await world.whole()
        assert world.incarnation("x") == 3
        assert "2 failures within 10 s" in world.tree()[2].last_failure


async def test_killing_a_supervisor_takes_its_children_and_brings_all_back(autojump_clock):
    spec = tree(child("a"), below("sub", tree(child("x"), child("y"))))
    async with simulation().run(spec) as world:
        world.kill("sub")
        await world.whole()
        assert [world.incarnation(name) for name in ("a", "sub", "x", "y")] == [1, 2, 2, 2]


async def test_the_root_that_gives_up_is_reported(autojump_clock):
    async with simulation().run(tree(child("u", "unlucky"), intensity=2)) as world:
        assert world.root_failure == "3 failures within 10 s, the last of u: the port is taken"


async def test_descriptors_survive_in_the_checkpoint(autojump_clock):
    async with simulation().run(tree(child("l", "listener"))) as world:
        await trio.sleep(0.1)
        os.write(world.actor("l").write, b"12345")
        os.close(world.actor("l").write)
        os.close(world.actor("l").read)
        world.kill("l")
        await world.wait_for("l")
        assert (await world.ask("l", Listen())).value == 5
        os.close(world.actor("l").read)


def fault(action, *, probability=1.0, nth=None, until=1e9, **match):
    return FaultRule("f1", EdgeFilter(**match), action, probability, nth, 3, until, 0.2)


async def test_faults_lose_delay_and_crash(autojump_clock):
    async with simulation().run(tree(child("a"), child("r", "relayer"))) as world:
        world.set_faults(fault(FaultAction.DROP, sender="r", kind="test-sim.add", nth=2))
        await trio.sleep(0.01)
        assert (await world.ask("r", Relay("a", 1))).value == 1
        with pytest.raises(ActorRestartingError, match="a did not answer in time"):
            await world.ask("r", Relay("a", 1))  # the relayer does not expect a deadline to pass: it crashes
        await world.wait_for("r", incarnation=2)

        world.set_faults(fault(FaultAction.DELAY, sender="world", target="a", kind="test-sim.*"))
        await trio.sleep(0.01)
        world.set_faults(fault(FaultAction.CRASH, target="a", kind="test-sim.crash"))
        await trio.sleep(0.01)
        with pytest.raises(ActorRestartingError):
            await world.ask("a", Crash())
        await world.wait_for("a", incarnation=2)
        assert world.tree()[1].last_failure == "crashed by a fault"
        await trio.sleep(0.01)
        samples = {sample.name: sample.value for sample in (await world.ask("a", CollectMetrics())).samples}
        assert samples["peerup_faults_active"] == 1, "a restarted actor gets the faults in force"


async def test_process_faults_by_message_reach_any_depth(autojump_clock):
    spec = tree(child("a"), below("sub", tree(child("x"))))
    async with simulation().run(spec) as world:
        await world.ask("root", InjectProcessFault("x", ProcessFault.KILL))
        await world.wait_for("x", incarnation=2)
        await world.ask("root", InjectProcessFault("a", ProcessFault.HANG))
        await world.wait_for("a", incarnation=2)
        await world.ask("root", InjectProcessFault("sub", ProcessFault.STOP))
        await world.wait_for("sub", incarnation=2)
        await world.whole()
        with pytest.raises(RefusedError) as refused:
            await world.ask("root", InjectProcessFault("nobody", ProcessFault.KILL))
        assert refused.value.code == "no-such-actor"


async def test_taps_show_what_passes(autojump_clock):
    async with simulation().run(tree(child("a"), child("r", "relayer"), child("w", "watcher"))) as world:
        world.set_taps(TapRule("t1", EdgeFilter(kind="test-sim.*"), "w", world.now() + 5, 100.0))
        await trio.sleep(0.01)
        await world.ask("r", Relay("a", 1))
        await trio.sleep(0.01)
        kinds = sorted(Envelope.from_bytes(copy.envelope).kind for copy in world.actor("w").copies)
        assert kinds == ["test-sim.add", "test-sim.number", "test-sim.number", "test-sim.relay"]
        await trio.sleep(6)
        await world.ask("r", Relay("a", 1))
        await trio.sleep(0.01)
        assert len(world.actor("w").copies) == 4, "a tap ends by itself"


async def test_a_descriptor_crosses(autojump_clock):
    async with simulation().run(tree(child("a"))) as world:
        read, write = os.pipe()
        world.tell("nobody", TakeIt(Descriptor(read)))
        with pytest.raises(OSError, match="Bad file"):
            os.read(read, 1)
        os.close(write)


@message("test-sim.take")
class TakeIt(Message):
    it: Descriptor


def scenario_trace(seed):
    """Kill, freeze and ask for a while; what happened, line by line."""

    async def scenario(world):
        for _ in range(30):
            victim = world.exchange.random.choice(["a", "b", "r", "x", "sub"])
            await trio.sleep(world.exchange.random.uniform(0.0, 0.3))
            world.exchange.random.choice([world.kill, world.kill, world.freeze])(victim)
            for name in ("a", "b"):
                try:
                    await world.ask("r", Relay(name, 1), timeout=1)
                except (ActorRestartingError, DeadlineExceededError, RefusedError):
                    continue
        await world.whole()
        return world.trace

    spec = tree(
        child("a"),
        child("b"),
        child("r", "relayer"),
        below("sub", tree(child("x"), child("y"), strategy=Strategy.ONE_FOR_ALL, intensity=100)),
        intensity=1000,
        strategy=Strategy.REST_FOR_ONE,
    )
    return simulation(seed).main(spec, scenario)


def test_the_same_seed_gives_the_same_trace():
    first, second, other = scenario_trace(11), scenario_trace(11), scenario_trace(12)
    assert len(first) > 500
    assert first == second
    assert first != other


def test_the_trace_does_not_depend_on_the_hash_seed_of_the_interpreter():
    digests = set()
    for hash_seed in ("1", "2"):
        program = (
            "import sys; sys.path.insert(0, 'tests/supervisor'); import loguru; loguru.logger.remove();"
            "import test_simulation as t, hashlib;"
            "print(hashlib.sha256('\\n'.join(t.scenario_trace(5)).encode()).hexdigest())"
        )
        done = subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        )
        digests.add(done.stdout.strip())
    assert digests == {hashlib.sha256("\n".join(scenario_trace(5)).encode()).hexdigest()}


def test_hours_pass_in_seconds():
    async def scenario(world):
        for _ in range(2 * 60):
            await trio.sleep(60)
            await world.whole()
        return [world.incarnation(name) for name in ("f", "g")]

    spec = tree(child("a"), child("f", "flaky"), child("g", "flaky"), intensity=5, window=10.0)
    began = time.monotonic()
    incarnations = simulation(3, tracing=False).main(spec, scenario)
    assert min(incarnations) > 10
    assert time.monotonic() - began < 60


@pytest.mark.parametrize("seed", range(8))
def test_whatever_is_killed_when_the_tree_becomes_whole_again(seed):
    async def scenario(world):
        names = ["a", "b", "sub", "x", "y", "t"]
        for _ in range(40):
            for name in world.exchange.random.sample(names, world.exchange.random.randint(1, 2)):
                world.exchange.random.choice([world.kill, world.kill, world.freeze])(name)
            await trio.sleep(world.exchange.random.choice([0, 0.001, 0.01, 0.05, 0.5, 5]))
        await world.whole()
        alive = {status.name for status in world.tree() if status.state == "running"}
        assert alive >= {"root", "a", "b", "sub", "x", "y"}

    spec = tree(
        child("a"),
        child("b"),
        below("sub", tree(child("x"), child("y"), strategy=list(Strategy)[seed % 3], intensity=3, window=5.0)),
        child("t", restart=Restart.TEMPORARY),
        strategy=list(Strategy)[seed // 3],
        intensity=1000,
    )
    simulation(seed).main(spec, scenario)
