"""Who may send what of the runtime's own messages: the table, its enforcement, and the bounds of what may be left."""

from __future__ import annotations

import inspect
import os
import random
import typing

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from protocol.messages import Descriptor, Message, Request, encode_body, message, system
from protocol.messages.envelope import Envelope
from protocol.messages.system import (
    ActorDown,
    ActorUp,
    ChildSpec,
    CollectMetrics,
    DropCheckpoint,
    KeepCheckpoint,
    ReadDeadLetters,
    SaveCheckpoint,
    Strategy,
    SupervisorSpec,
)
from supervisor import authority, estate
from supervisor.actor import Actor, Checkpoint, handles
from supervisor.authority import RULES, Authority, Role
from supervisor.errors import AskError, RefusedError
from supervisor.estate import Estate, keep_message
from supervisor.exchange import Exchange
from supervisor.overseer import FACTORY, Overseer, supervisor_arguments
from supervisor.port import NameState
from supervisor.simulation import Simulation
from tests.support.commands import commands

READ_ONLY = {
    "system.ok", "system.refusal", "system.ping", "system.pong", "system.describe", "system.description",
    "system.collect-metrics", "system.metrics", "system.tapped", "system.read-journal", "system.journal",
    "system.read-dead-letters", "system.dead-letters", "system.read-tree", "system.tree",
    "system.read-faults", "system.faults-in-force",
    "system.child-started",
}  # fmt: skip

BAD = commands("bad", victim="b", sibling="b", child=ChildSpec("new", "summer", {}))


def test_every_message_of_the_runtime_is_classified():
    """Whoever adds one decides who may send it, or that everybody may."""
    kinds = {cls.KIND for _, cls in inspect.getmembers(system, inspect.isclass) if cls.__module__ == system.__name__
             and issubclass(cls, Message)}  # fmt: skip
    assert RULES.keys() | READ_ONLY == kinds
    assert not RULES.keys() & READ_ONLY
    assert {message.KIND for message in BAD.values()} == RULES.keys()


names = st.sampled_from(["boss", "kid", "api", "config", "relay", "other", "", "me"])


@given(st.sampled_from(sorted(RULES)), names)
def test_a_sender_needs_a_role_that_the_table_names(kind, sender):
    roles = {
        "boss": Role.SUPERVISOR,
        "kid": Role.CHILD,
        "api": Role.OPERATOR,
        "config": Role.STARTER,
        "relay": Role.PREDECESSOR,
    }
    made = Authority(
        "boss", ("api",), starters=("config",), predecessors=("relay",), is_child=lambda name: name == "kid"
    )
    refusal = made.refusal("me", kind, sender)
    assert (refusal is None) == (roles.get(sender) in RULES[kind])
    if refusal is not None:
        assert refusal.code == authority.CODE
        assert kind in str(refusal)


@given(st.sampled_from(sorted(READ_ONLY)) | st.text(), names)
def test_what_only_reads_and_what_belongs_to_actors_is_for_everybody(kind, sender):
    assert kind in RULES or Authority("boss").refusal("me", kind, sender) is None


# ---- in a running tree


@message("test-authority.try")
class Try(Request[system.Ok]):
    """Send what `BAD` has under this name to the target."""

    what: str
    target: str


class Bad(Actor):
    """An actor whose process does what somebody else wants."""

    @handles(Try, concurrent=True)
    async def do(self, request):
        content = BAD[request.what]
        if isinstance(content, Request):
            await self.context.ask(request.target, content, timeout=2)
        else:
            self.context.tell(request.target, content)


class Victim(Actor):
    """Says what it was told."""

    async def start(self, checkpoint):
        self.told = []
        self.context.checkpoint({"mine": True})
        return {}

    @handles(ActorDown)
    async def down(self, notice):
        self.told.append(notice)

    @handles(ActorUp)
    async def up(self, notice):
        self.told.append(notice)


class Friend(Actor):
    """May have children started below `sub`."""

    @handles(Try, concurrent=True)
    async def do(self, request):
        await self.context.ask(request.target, typing.cast("typing.Any", BAD[request.what]), timeout=2)


def tree():
    def supervision(*children, starters=()):
        return SupervisorSpec(Strategy.ONE_FOR_ONE, 5, 10.0, 0.1, 5.0, children, starters)

    below = ChildSpec(
        "sub", FACTORY, supervisor_arguments(supervision(ChildSpec("c", "victim", {}), starters=("friend",)))
    )
    return supervision(
        ChildSpec("b", "victim", {}), ChildSpec("bad", "bad", {}), ChildSpec("friend", "friend", {}), below
    )


@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize("target", ["b", "c", "sub", "root"])
async def test_an_actor_gone_bad_cannot_command_the_runtime(what, target, autojump_clock):
    # What a child of the root may say to the root concerns the child alone.
    own = target == "root" and what in {"ready", "last words", "checkpoint", "foreign checkpoint", "drop", "estate"}
    classes = {"bad": Bad, "victim": Victim, "friend": Friend}
    async with Simulation(3, classes=classes, tracing=False).run(tree()) as world:
        before = {status.name: (status.pid, status.state) for status in world.tree()}
        checkpoint = world._processes["root"].overseer._estate.get("b").state
        refusal = None
        try:
            await world.ask("bad", Try(what, target))
        except RefusedError as error:
            refusal = error
        await trio.sleep(3)
        after = {status.name: (status.pid, status.state) for status in world.tree()}
        assert after == before
        assert world._processes["root"].overseer._estate.get("b").state == checkpoint == {"mine": True}
        for name in ("b", "c"):
            assert world.actor(name).told == []
        if own:
            return
        samples = (await world.ask(target, CollectMetrics())).samples
        counted = [one.value for one in samples if one.name == "peerup_messages_not_allowed_total"]
        assert counted == [1.0]
        if isinstance(BAD[what], Request):
            assert refusal is not None
            assert refusal.code == authority.CODE
        else:
            letters = (await world.ask("bad", ReadDeadLetters())).letters
            assert [(one.entry.kind, one.entry.target) for one in letters] == [(BAD[what].KIND, target)]
            assert "not from bad" in letters[0].reason or "no message that anybody sends" in letters[0].reason


async def test_a_starter_starts_where_it_may_and_nowhere_else(autojump_clock):
    classes = {"bad": Bad, "victim": Victim, "friend": Friend, "summer": Victim}
    async with Simulation(3, classes=classes, tracing=False).run(tree()) as world:
        await world.ask("friend", Try("start", "sub"))
        assert "new" in {status.name for status in world.tree()}
        with pytest.raises(AskError) as caught:
            await world.ask("friend", Try("start", "root"))
        assert caught.value.code == authority.CODE


# ---- checkpoints


class Nowhere:
    """A port that remembers what was sent."""

    def __init__(self):
        self.sent = []

    def send(self, envelope, descriptors):
        self.sent.append(envelope)

    def state(self, name):
        return NameState.READY

    def watch(self, name):
        pass


class Host:
    """Carries out nothing."""

    def spawn(self, spec, incarnation, checkpoint):
        return 1

    def kill(self, name, incarnation): ...
    def freeze(self, name, incarnation): ...
    def publish(self, name, state, incarnation): ...
    def ready(self): ...
    def finished(self, reason, *, failed): ...


@pytest.fixture
def overseer():
    spec = SupervisorSpec(
        Strategy.ONE_FOR_ONE, 5, 10.0, 0.1, 5.0, (ChildSpec("b", "x:Y", {}), ChildSpec("sub", FACTORY, {}))
    )
    exchange = Exchange(
        "root", 1, Nowhere(), now=lambda: 0.0, wall=lambda: 0.0, random=random.Random(0), supervisor="main"
    )
    made = Overseer("root", spec, exchange, Host(), random.Random(0), pid=1)
    made.logic.begin(0.0)
    made._publish_names()
    yield made
    made.close()


def arrive(overseer, sender, content, descriptors=()):
    body, _ = encode_body(content)
    ident = f"{sender}:1:{random.getrandbits(30)}"
    overseer.exchange.deliver(Envelope(ident, None, None, sender, "root", content.KIND, None, body), list(descriptors))


def pipe():
    read, write = os.pipe()
    os.close(write)
    return Descriptor(read)


def refusals(overseer):
    return {
        one.labels["reason"]: one.value
        for one in overseer.exchange.metrics.samples()
        if one.name == "peerup_checkpoints_refused_total"
    }


def test_a_checkpoint_over_the_bounds_is_refused_and_the_one_before_it_stays(overseer):
    arrive(overseer, "b", SaveCheckpoint({"good": 1}, ()))
    arrive(overseer, "b", SaveCheckpoint({"huge": bytes(estate.CHECKPOINT_BYTES)}, ()))
    assert overseer._estate.get("b").state == {"good": 1}
    assert refusals(overseer) == {estate.TOO_LARGE: 1.0}
    arrive(overseer, "b", SaveCheckpoint({"good": 2}, ()))
    assert overseer._estate.get("b").state == {"good": 2}


def test_a_checkpoint_of_the_greatest_size_comes_back_to_a_supervisor_that_was_restarted(overseer):
    """On its way up and down it becomes a little longer each time."""
    longest = longest_checkpoint()
    above, kept = Estate(), keep_message("b", ("root",), longest)
    above.keep("b", kept.path, longest, len(encode_body(kept)[0]))
    (handed_down,) = above.messages_below("root")
    arrive(overseer, "main", handed_down)
    assert overseer._estate.get("b").state == longest.state
    assert refusals(overseer) == {}


def test_a_checkpoint_that_cannot_be_taken_back_costs_nothing_else(overseer):
    arrive(overseer, "main", KeepCheckpoint("b", ("root",), {"huge": bytes(2 * estate.CHECKPOINT_BYTES)}, ()))
    assert overseer._estate.get("b") is None
    assert refusals(overseer) == {estate.TOO_LARGE: 1.0}
    arrive(overseer, "main", KeepCheckpoint("b", ("root",), {"good": 1}, ()))
    assert overseer._estate.get("b").state == {"good": 1}


def longest_checkpoint():
    """One whose message from the actor itself is as long as may be."""
    around = len(encode_body(SaveCheckpoint({"x": bytes(70_000)}, ()))[0]) - 70_000
    checkpoint = Checkpoint({"x": bytes(estate.CHECKPOINT_BYTES - around)}, ())
    assert len(encode_body(SaveCheckpoint(checkpoint.state, ()))[0]) == estate.CHECKPOINT_BYTES
    return checkpoint


def test_nobody_leaves_a_checkpoint_for_another(overseer):
    arrive(overseer, "b", SaveCheckpoint({"good": 1}, ()))
    arrive(overseer, "sub", KeepCheckpoint("b", ("sub",), {"evil": 1}, ()))
    arrive(overseer, "sub", KeepCheckpoint("b", ("b",), {"evil": 1}, ()))
    arrive(overseer, "stranger", SaveCheckpoint({"evil": 1}, ()))
    assert overseer._estate.get("b").state == {"good": 1}
    assert overseer._estate.names() == ["b"]
    arrive(overseer, "sub", DropCheckpoint("b"))
    assert overseer._estate.names() == ["b"]
    # A child that has not left one yet is no more open to others.
    arrive(overseer, "b", KeepCheckpoint("sub", ("b",), {"evil": 1}, ()))
    assert overseer._estate.names() == ["b"]


def test_what_one_child_brings_is_bounded_in_all(monkeypatch):
    monkeypatch.setattr(estate, "BRANCH_BYTES", 1000)
    monkeypatch.setattr(estate, "BRANCH_DESCRIPTORS", 3)
    monkeypatch.setattr(estate, "BRANCH_NAMES", 4)
    kept = Estate()
    kept.keep("a", ("sub",), Checkpoint({}, ()), 600)
    with pytest.raises(RefusedError, match="sub"):
        kept.keep("b", ("sub",), Checkpoint({}, ()), 401)
    kept.keep("b", ("sub",), Checkpoint({}, ()), 400)
    kept.keep("c", ("other",), Checkpoint({}, ()), 1000)
    kept.keep("a", ("sub",), Checkpoint({}, ()), 100)  # in place of the 600
    kept.keep("d", ("sub",), Checkpoint({}, (pipe(), pipe())), 500)
    lost = pipe(), pipe()
    with pytest.raises(RefusedError):
        kept.keep("e", ("sub",), Checkpoint({}, lost), 0)
    assert [descriptor.fileno() for descriptor in lost] == [-1, -1], "closed"
    kept.keep("e", ("sub",), Checkpoint({}, ()), 0)
    with pytest.raises(RefusedError):
        kept.keep("f", ("sub",), Checkpoint({}, ()), 0)
    kept.drop("d")
    kept.keep("f", ("sub",), Checkpoint({}, (pipe(),)), 500)
    with pytest.raises(RefusedError, match="another way"):
        kept.keep("f", ("other",), Checkpoint({}, ()), 0)
    kept.close()
    assert kept._branches == {}


@given(st.lists(st.tuples(st.sampled_from("abcde"), st.sampled_from(["", "x", "y"]), st.integers(0, 2_000_000))))
def test_the_sums_are_those_of_what_is_kept(steps):
    kept = Estate()
    for name, branch, size in steps:
        path = (branch,) if branch else ()
        try:
            kept.keep(name, path, Checkpoint({}, ()), size)
        except RefusedError:
            if size % 2:
                kept.drop(name)
    for branch in ("x", "y"):
        inside = [one for one in kept._kept.values() if one.path == (branch,)]
        total = kept._branches.get(branch, estate._Total())
        assert (total.names, total.size) == (len(inside), sum(one.size for one in inside))
