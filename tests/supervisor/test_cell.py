"""One actor under trio: its life, its dispatch, its context."""

from __future__ import annotations

import os
import random

import loguru
import pytest
import trio
import trio.testing

from protocol.messages import Descriptor, Message, Request, decode_body, encode_body, message
from protocol.messages.envelope import Envelope
from protocol.messages.system import ActorUp, LastWords, Ok, Ready, SaveCheckpoint, Stop
from supervisor.actor import Actor, Checkpoint, handles
from supervisor.cell import Cell, failure_text
from supervisor.errors import ActorRestartingError, DeadlineExceededError, NoSuchActorError, RefusedError
from supervisor.port import NameState, NotDeliveredError


@message("test-cell.done")
class Done(Message):
    text: str


@message("test-cell.do")
class Do(Request[Done]):
    """Run the script of this name."""

    script: str


@message("test-cell.do-beside")
class DoBeside(Request[Done]):
    """The same, concurrently."""

    script: str


@message("test-cell.note")
class Note(Message):
    text: str


class Wire:
    """A port for several cells in one trio run: what is sent arrives in the next scheduling round."""

    def __init__(self):
        self.receivers = {}
        self.states = {}
        self.log = []
        self.queue, self.out = trio.open_memory_channel(10_000)

    def port(self, name):
        return _Port(self, name)

    async def run(self):
        async for envelope, descriptors in self.out:
            receiver = self.receivers.get(envelope.target)
            if receiver is not None:
                receiver.deliver(envelope, descriptors)


class _Port:
    def __init__(self, wire, name):
        self.wire = wire

    def send(self, envelope, descriptors):
        if self.state(envelope.target) is not NameState.READY:
            raise NotDeliveredError("not there")
        self.wire.log.append(envelope)
        self.wire.queue.send_nowait((envelope, [one.duplicate() for one in descriptors]))

    def state(self, name):
        return self.wire.states.get(name, NameState.READY)

    def watch(self, name):
        pass


class Scripted(Actor):
    """Does what the test says, by name."""

    mailbox_limit = 4

    def __init__(self, **scripts):
        self.scripts = scripts
        self.events = []

    async def start(self, checkpoint):
        if "start" in self.scripts:
            return await self.scripts["start"](self, checkpoint)
        return {"ready": True}

    async def stop(self, reason):
        self.events.append(f"stop {reason}")
        if "stop" in self.scripts:
            await self.scripts["stop"](self)

    @handles(Do)
    async def do(self, request):
        return await self.scripts[request.script](self)

    @handles(DoBeside, concurrent=True)
    async def do_beside(self, request):
        return await self.scripts[request.script](self)

    @handles(Note)
    async def note(self, note):
        self.events.append(note.text)


class Stage:
    """Cells on one wire, and what became of them."""

    def __init__(self, nursery):
        self.wire = Wire()
        self.nursery = nursery
        self.ended = {}

    def open(self, name, actor, *, checkpoint=None):
        cell = Cell(
            actor,
            name,
            1,
            self.wire.port(name),
            supervisor="boss",
            now=trio.current_time,
            wall=trio.current_time,
            random=random.Random(1),
        )
        self.wire.receivers[name] = cell.exchange
        self.nursery.start_soon(self._run, name, cell, checkpoint)
        return cell

    async def _run(self, name, cell, checkpoint):
        try:
            await cell.run(checkpoint)
        except Exception as error:  # noqa: BLE001
            self.ended[name] = failure_text(error)
        else:
            self.ended[name] = None

    def said(self, *classes):
        """The decoded messages of these classes that were sent."""
        wanted = {cls.KIND for cls in classes}
        return [decode_body(one.kind, one.body) for one in self.wire.log if one.kind in wanted]


@pytest.fixture
async def stage(nursery):
    loguru.logger.remove()
    made = Stage(nursery)
    nursery.start_soon(made.wire.run)
    return made


settle = trio.testing.wait_all_tasks_blocked


async def test_start_is_reported_with_what_it_returned(stage):
    stage.open("a", Scripted())
    await settle()
    assert stage.said(Ready) == [Ready(1, {"ready": True})]


async def test_start_gets_the_checkpoint(stage):
    async def start(_, checkpoint):
        return checkpoint.state

    stage.open("a", Scripted(start=start), checkpoint=Checkpoint({"n": 3}, ()))
    await settle()
    assert stage.said(Ready) == [Ready(1, {"n": 3})]


async def test_a_request_is_answered_by_what_the_handler_returns_and_none_is_ok(stage):
    async def talk(_):
        return Done("said")

    async def silent(_):
        return None

    stage.open("a", Scripted(talk=talk, silent=silent))
    asker = stage.open("b", Scripted())
    await settle()
    assert await asker.actor.context.ask("a", Do("talk"), timeout=1) == Done("said")
    with pytest.raises(RefusedError) as refused:
        await asker.actor.context.ask("a", Do("silent"), timeout=1)
    assert refused.value.code == "bad-answer"
    assert stage.said(Ok) == [Ok()]


async def test_a_refusal_reaches_the_asker_as_it_was_raised(stage):
    async def refuse(_):
        raise RefusedError("busy", "too much", "wait")

    stage.open("a", Scripted(refuse=refuse))
    asker = stage.open("b", Scripted())
    await settle()
    with pytest.raises(RefusedError) as refused:
        await asker.actor.context.ask("a", Do("refuse"), timeout=1)
    assert (refused.value.code, refused.value.reason, refused.value.action) == ("busy", "too much", "wait")
    assert stage.ended == {}, "a refusal is no failure"


async def test_sequential_handlers_keep_order_concurrent_ones_do_not_hold_it_up(stage, autojump_clock):
    async def slow(actor):
        await trio.sleep(1)
        actor.events.append("slow")
        return Done("")

    async def slower(actor):
        await trio.sleep(1.5)
        actor.events.append("slower")
        return Done("")

    actor = Scripted(slow=slow, slower=slower)
    stage.open("a", actor)
    context = stage.open("b", Scripted()).actor.context
    await settle()
    context.tell("a", DoBeside("slower"))
    context.tell("a", Note("after beside"))
    context.tell("a", Do("slow"))
    context.tell("a", Note("after slow"))
    await trio.sleep(5)
    assert actor.events == ["after beside", "slow", "after slow", "slower"]


async def test_concurrent_handlers_are_bounded_by_the_mailbox_limit(stage, autojump_clock):
    running = []

    async def slow(_):
        running.append(1)
        await trio.sleep(1)
        running.pop()
        return Done("")

    stage.open("a", Scripted(slow=slow))
    context = stage.open("b", Scripted()).actor.context
    await settle()
    outcomes = []

    async def ask():
        try:
            outcomes.append(await context.ask("a", DoBeside("slow"), timeout=10))
        except RefusedError as refusal:
            outcomes.append(refusal.code)

    async with trio.open_nursery() as nursery:
        for _ in range(10):
            nursery.start_soon(ask)
        await settle()
        assert len(running) == 4
    assert outcomes.count("mailbox-full") == 2, "four run, four wait"
    assert outcomes.count(Done("")) == 8


async def test_an_unhandled_exception_ends_the_actor_and_is_told(stage):
    async def fail(_):
        raise ValueError("oh\nno \x1b[31m")

    stage.open("a", Scripted(fail=fail))
    context = stage.open("b", Scripted()).actor.context
    await settle()
    context.tell("a", Do("fail"))
    await settle()
    code, reason = stage.ended["a"]
    assert code == "crash"
    assert reason.startswith("ValueError: oh no ?[31m (test_cell.py:")
    assert stage.said(LastWords) == [LastWords(1, code, reason)]


async def test_a_failing_task_of_the_nursery_ends_the_actor(stage):
    async def start(actor, _):
        async def task():
            raise RefusedError("port-in-use", "taken")

        actor.context.nursery.start_soon(task)
        return {}

    stage.open("a", Scripted(start=start))
    await settle()
    assert stage.ended["a"] == ("port-in-use", "taken")


async def test_stop_runs_stop_and_cancels_the_rest(stage, autojump_clock):
    async def start(actor, _):
        async def task():
            try:
                await trio.sleep_forever()
            finally:
                actor.events.append("task gone")

        actor.context.nursery.start_soon(task)
        return {}

    async def stop(actor):
        assert await actor.context.ask("b", Do("help"), timeout=1) == Done("helped")
        actor.events.append("asked")

    async def help_out(_):
        return Done("helped")

    actor = Scripted(start=start, stop=stop)
    stage.open("a", actor)
    stage.open("b", Scripted(help=help_out))
    boss = stage.open("boss", Scripted())
    await settle()
    boss.exchange.tell("a", Stop("bedtime"))
    boss.exchange.tell("a", Note("too late"))
    await settle()
    assert actor.events == ["stop bedtime", "asked", "task gone"]
    assert stage.ended["a"] is None


async def test_stop_before_it_is_ready_ends_it_without_stop(stage):
    async def start(actor, _):
        await trio.sleep_forever()

    actor = Scripted(start=start)
    cell = stage.open("a", actor)
    await settle()
    cell.request_stop("never mind")
    cell.request_stop("again")
    await settle()
    assert stage.ended["a"] is None
    assert actor.events == []
    assert stage.said(Ready) == []


async def test_an_actor_may_end_itself(stage):
    async def finish(actor):
        actor.context.nursery.cancel_scope.cancel()
        return Done("bye")

    stage.open("a", Scripted(finish=finish))
    asker = stage.open("b", Scripted())
    await settle()
    assert await asker.actor.context.ask("a", Do("finish"), timeout=1) == Done("bye")
    await settle()
    assert stage.ended["a"] is None


async def test_causes_follow_tasks(stage, autojump_clock):
    async def spread(actor):
        async def later():
            await trio.sleep(1)
            actor.context.tell("b", Note("later"))

        actor.context.tell("b", Note("now"))
        actor.context.nursery.start_soon(later)
        assert actor.context.current_sender == "b"
        return Done(actor.context.current_message)

    a = stage.open("a", Scripted(spread=spread))
    b = stage.open("b", Scripted())
    await settle()
    answer = await b.actor.context.ask("a", Do("spread"), timeout=1)
    await trio.sleep(2)
    causes = [one.cause for one in stage.wire.log if one.kind == Note.KIND]
    assert causes == [answer.text, answer.text]
    assert a.actor.context.current_message is None
    assert a.actor.context.current_sender == ""


async def test_asks_fail_in_their_four_ways(stage, autojump_clock):
    async def sleep(_):
        await trio.sleep(100)

    stage.open("a", Scripted(sleep=sleep))
    cell = stage.open("b", Scripted())
    await settle()
    ask = cell.actor.context.ask
    with pytest.raises(DeadlineExceededError):
        await ask("a", Do("sleep"), timeout=2)
    assert trio.current_time() == pytest.approx(2)
    for state, error in ((NameState.UNKNOWN, NoSuchActorError), (NameState.STARTING, ActorRestartingError)):
        stage.wire.states["x"] = state
        with pytest.raises(error):
            await ask("x", Do("sleep"), timeout=2)
    async with trio.open_nursery() as nursery:

        async def lose():
            with pytest.raises(ActorRestartingError):
                await ask("a", Do("sleep"), timeout=2)

        nursery.start_soon(lose)
        await settle()
        cell.exchange.name_down("a", "SIGKILL")


async def test_a_cancelled_ask_is_forgotten(stage, autojump_clock):
    async def slow(_):
        await trio.sleep(2)
        return Done("too late")

    stage.open("a", Scripted(slow=slow))
    cell = stage.open("b", Scripted())
    await settle()
    with trio.move_on_after(1) as scope:
        await cell.actor.context.ask("a", Do("slow"), timeout=10)
    assert scope.cancelled_caught
    await trio.sleep(5)
    assert cell.exchange.next_timer() is None


async def test_an_actor_may_ask_while_it_handles_and_be_asked_meanwhile(stage):
    async def outer(actor):
        return await actor.context.ask("b", Do("inner"), timeout=1)

    async def inner(actor):
        return Done("inner")

    stage.open("a", Scripted(outer=outer))
    b = stage.open("b", Scripted(inner=inner))
    await settle()
    assert await b.actor.context.ask("a", Do("outer"), timeout=1) == Done("inner")


async def test_wait_for(stage, autojump_clock):
    cell = stage.open("a", Scripted())
    await settle()
    await cell.actor.context.wait_for("b", timeout=0)
    stage.wire.states["b"] = NameState.STARTING
    with pytest.raises(DeadlineExceededError):
        await cell.actor.context.wait_for("b", timeout=3)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: cell.actor.context.wait_for("b", timeout=3))
        await settle()
        cell.exchange.name_up("b", 1)


async def test_a_checkpoint_carries_copies_of_descriptors(stage):
    cell = stage.open("a", Scripted())
    received = []

    class Boss:
        def deliver(self, envelope, descriptors):
            received.append((envelope, descriptors))

    stage.wire.receivers["boss"] = Boss()
    await settle()
    read, write = os.pipe()
    os.write(write, b"x")
    cell.actor.context.checkpoint({"port": 80}, [read])
    os.close(read)
    os.close(write)
    await settle()
    [(envelope, descriptors)] = [one for one in received if one[0].kind == SaveCheckpoint.KIND]
    saved = decode_body(envelope.kind, envelope.body, descriptors)
    assert saved.state == {"port": 80}
    assert os.read(saved.descriptors[0].fileno(), 1) == b"x"


async def test_notices_without_a_handler_disturb_nobody(stage):
    cell = stage.open("a", Scripted())
    await settle()
    cell.actor.context.watch("b")
    cell.exchange.name_up("b", 1)
    await settle()
    assert stage.ended == {}
    assert ActorUp.KIND not in Scripted.handlers


async def test_a_handler_that_never_waits_does_not_starve_the_others(stage):
    turns = []

    class Greedy(Scripted):
        mailbox_limit = 1000

        @handles(Note)
        async def note(self, note):
            turns.append("message")

    cell = stage.open("a", Greedy())
    await settle()

    async def other():
        for _ in range(3):
            await trio.lowlevel.checkpoint()
            turns.append("other")

    body = Note("x")

    for number in range(500):
        cell.exchange.deliver(
            Envelope(f"b:1:{number}", None, None, "b", "a", Note.KIND, None, encode_body(body)[0]), []
        )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
    assert turns.index("other") < 500
    await settle()
    assert turns.count("message") == 500
    assert cell.exchange.handled == 500


async def test_a_descriptor_that_nobody_takes_is_closed(stage):
    read, write = os.pipe()
    os.close(write)
    stage.open("a", Scripted())
    await settle()
    stage.wire.states["nobody"] = NameState.UNKNOWN
    stage.wire.receivers["a"].tell("nobody", SaveCheckpoint({}, (Descriptor(read),)))
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(read)


def test_failures_in_words():
    group = ExceptionGroup("outer", [ExceptionGroup("inner", [RefusedError("x-code", "no", "do")]), ValueError("b")])
    assert failure_text(group) == ("x-code", "no; do")
    assert failure_text(KeyError("k")) == ("crash", "KeyError: 'k'")
    assert len(failure_text(ValueError("x" * 10_000))[1]) < 700
