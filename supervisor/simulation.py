"""A whole tree of actors inside one process, with virtual time and a seeded scheduler.

The same actor classes, cells, exchanges, overseers and supervision logic as the real runtime; only the port and the
processes are pretended. Two runs with the same seed give the same trace::

    async with Simulation(seed=7, classes={"a": A}).run(spec) as world:      # inside trio with MockClock
        answer = await world.ask("a", Question(), timeout=5)
        world.kill("a")
        await world.wait_for("a", timeout=5)
    print(world.trace)

or from synchronous code, clock included: `Simulation(seed=7, ...).main(spec, scenario)`.

Theory of operation. Everything that happens between actors is an event in one heap of virtual time: an envelope
arrives, a watcher hears of an end, a supervisor hears of an exit. Latencies are drawn from the seed; the order between
one sender and one target is kept, between different pairs it is not. trio's own scheduler, which shuffles tasks that
are ready together, is seeded too, so interleavings inside and between actors vary with the seed and with nothing else.

What differs from processes: a killed actor's tasks are cancelled, so its `finally` blocks run, but nothing that they
send leaves it; a stopped or hung actor's messages stay with it in both directions, while its own timers still run
unseen; actors share the interpreter, so they must not share global state.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import math
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar, cast

import trio
import trio.testing
from trio._core import _run as trio_run

from protocol.messages import Descriptor, Envelope, Message, Request
from protocol.messages.system import (
    ChildSpec,
    ChildStatus,
    FaultRule,
    LastWords,
    Ready,
    SetFaults,
    SetTaps,
    Stop,
    SupervisorSpec,
    TapRule,
)
from supervisor.actor import Actor, Checkpoint
from supervisor.cell import Cell, TimeKeeper, failure_text
from supervisor.errors import AskError, DeadlineExceededError
from supervisor.exchange import Exchange
from supervisor.log_library import logger
from supervisor.overseer import FACTORY, GAVE_UP, Overseer, supervisor_arguments, supervisor_spec
from supervisor.port import NameState, NotDeliveredError, Receiver
from supervisor.timers import Timers

if TYPE_CHECKING:
    import loguru

R = TypeVar("R")
T = TypeVar("T")

WORLD = "world"
"""The name under which the scenario itself sends and receives; it is the root supervisor's supervisor."""

QUEUE_LIMIT = 2000
"""Envelopes under way between one sender and one target, as in the real transport."""

EPOCH = 1_750_000_000.0
"""What the wall clock shows at the start."""

SHUTDOWN_DEADLINE = 600.0
"""Virtual seconds for the tree to end in order."""


class SimulatedProcess:
    """What stands for one process: one incarnation of one name. It is the port of what runs in it."""

    def __init__(self, world: World, name: str, incarnation: int, supervisor: str, pid: int) -> None:
        self.name = name
        self.incarnation = incarnation
        self.supervisor = supervisor
        self.pid = pid
        self.alive = True
        self.frozen = False
        self.scope = trio.CancelScope()
        self.killed_by = ""
        self.random = random.Random(f"{world.seed}/{name}/{incarnation}")  # noqa: S311  # repeatable on purpose
        self.actor: Actor | None = None
        self.overseer: Overseer | None = None
        self._world = world
        self._receiver: Receiver | None = None
        self._held: list[Callable[[Receiver], None]] = []
        self._unsent: list[tuple[Envelope, list[Descriptor]]] = []
        self._thawed = trio.Event()
        self._correspondents: dict[str, None] = {}

    # Port

    def send(self, envelope: Envelope, descriptors: Sequence[Descriptor]) -> None:
        """Port: put the envelope on its way. What a dead process sends goes nowhere."""
        if not self.alive:
            return
        if self.frozen:
            self._unsent.append((envelope, [descriptor.duplicate() for descriptor in descriptors]))
            return
        self._correspondents[envelope.target] = None
        self._world.carry(self, envelope, descriptors)

    def state(self, name: str) -> NameState:
        """Port: what the registry says."""
        return self._world.state(name)

    def watch(self, name: str) -> None:
        """Port: hear of the ends and beginnings of this name."""
        self._correspondents[name] = None

    # For the world

    def attach(self, receiver: Receiver) -> None:
        """The program in the process listens now."""
        self._receiver = receiver
        self._release()

    def give(self, call: Callable[[Receiver], None]) -> None:
        """Something arrives for this process; it is kept while nobody listens."""
        if not self.alive:
            return
        if self._receiver is None or self.frozen:
            self._held.append(call)
        else:
            call(self._receiver)

    def knows(self, name: str) -> bool:
        """Whether it watches the name or has sent to it."""
        return name in self._correspondents

    def thaw(self) -> None:
        """As SIGCONT."""
        self.frozen = False
        self._thawed.set()
        self._thawed = trio.Event()
        unsent, self._unsent = self._unsent, []
        for envelope, descriptors in unsent:
            try:
                self.send(envelope, descriptors)
            except NotDeliveredError as error:
                if self._receiver is not None:
                    self._receiver.undelivered(envelope, str(error))
        self._release()

    async def while_frozen(self) -> None:
        """Return as soon as it is not frozen."""
        while self.frozen:
            await self._thawed.wait()

    def _release(self) -> None:
        held, self._held = self._held, []
        for call in held:
            self.give(call)


class World:
    """A running simulation; the scenario itself is registered in it as the actor `world`.

    Attributes:
        trace: one line for each thing that happened, with its virtual time.
        root_failure: why the root supervisor gave up; None while it has not.
    """

    def __init__(self, simulation: Simulation, nursery: trio.Nursery) -> None:
        self.seed = simulation.seed
        self.trace: list[str] = []
        self.root_failure: str | None = None
        self._simulation = simulation
        self._nursery = nursery
        self._began = trio.current_time()
        self._random = random.Random(f"{self.seed}/world")  # noqa: S311  # repeatable on purpose
        self._pids = 1000
        self._entries: dict[str, tuple[NameState, int]] = {}
        self._owners: dict[str, str] = {}
        self._incarnations: dict[str, int] = {}
        self._processes: dict[str, SimulatedProcess] = {}
        self._arrivals: dict[tuple[str, str], float] = {}
        self._under_way: dict[tuple[str, str], int] = {}
        self._changed = trio.Event()
        self._events = Timers(lambda _: self._changed.set())
        self._root_ready = trio.Event()
        self._root_ended = trio.Event()
        self._root = ""
        self._me = self._make_process(WORLD, 1, "")
        self._keeper = TimeKeeper(self.now)
        self.exchange = self._plain_exchange(self._me, self._keeper)
        self.exchange.on(Ready, lambda *_: self._root_ready.set())
        self.exchange.on(LastWords, self._on_last_words)
        self._me.attach(self.exchange)
        self._entries[WORLD] = (NameState.READY, 1)

    # For scenarios

    def now(self) -> float:
        """Virtual seconds: trio's own, so that no rounding ever separates a deadline from its moment."""
        return trio.current_time()

    def wall(self) -> float:
        """Virtual seconds since the epoch."""
        return EPOCH + self.now() - self._began

    def tell(self, target: str, message: Message) -> None:
        """As :meth:`supervisor.actor.Context.tell`."""
        self.exchange.tell(target, message)

    async def ask(self, target: str, request: Request[R], *, timeout: float = 10.0) -> R:  # noqa: ASYNC109  # Context's
        """As :meth:`supervisor.actor.Context.ask`."""
        done = trio.Event()
        outcomes: list[Message | AskError] = []

        def answered(outcome: Message | AskError) -> None:
            outcomes.append(outcome)
            done.set()

        ident = self.exchange.ask(target, request, timeout=timeout, answer=answered)
        try:
            await done.wait()
        finally:
            self.exchange.forget(ident)
        if isinstance(outcomes[0], AskError):
            raise outcomes[0]
        return cast("R", outcomes[0])

    async def wait_for(self, name: str, *, timeout: float = 10.0, incarnation: int = 1) -> None:  # noqa: ASYNC109
        """Return as soon as the name is ready, with at least this incarnation."""
        with trio.move_on_after(timeout):
            while not self._is_ready(name, incarnation):
                ready = trio.Event()
                if self.state(name) is NameState.READY:  # a former incarnation that is about to go
                    await trio.sleep(0.001)
                    continue
                take_back = self.exchange.when_ready(name, ready.set)
                try:
                    await ready.wait()
                finally:
                    take_back()
            return
        raise DeadlineExceededError(f"{name} was not ready within {timeout:g} s")

    async def whole(self, *, timeout: float = 60.0) -> None:  # noqa: ASYNC109  # virtual
        """Return as soon as every child of every supervisor runs (or is over by its own rules)."""
        with trio.move_on_after(timeout):
            while True:
                if self._is_whole():
                    return
                await trio.sleep(0.001)
        raise DeadlineExceededError(f"the tree was not whole within {timeout:g} s")

    def kill(self, name: str) -> None:
        """As SIGKILL: it ends at once, without `stop`; what is below a supervisor ends with it."""
        process = self._processes.get(name)
        if process is not None:
            self.end(process, "killed by SIGKILL")

    def freeze(self, name: str) -> None:
        """As SIGSTOP: messages reach it and nothing happens."""
        process = self._processes.get(name)
        if process is not None:
            self.note(f"freeze {name}")
            process.frozen = True

    def thaw(self, name: str) -> None:
        """As SIGCONT: what has reached it is handled now."""
        process = self._processes.get(name)
        if process is not None:
            self.note(f"thaw {name}")
            process.thaw()

    def set_faults(self, *faults: FaultRule) -> None:
        """Put these message faults in force in every actor, in place of those before."""
        for name in self._processes:
            self.exchange.tell(name, SetFaults(faults))

    def set_taps(self, *taps: TapRule) -> None:
        """Put these taps in force in every actor, in place of those before."""
        for name in self._processes:
            self.exchange.tell(name, SetTaps(taps))

    def actor(self, name: str) -> Actor:
        """The live actor object, to look into it."""
        process = self._processes.get(name)
        if process is None or process.actor is None:
            raise LookupError(f"no actor {name} is alive")
        return process.actor

    def tree(self) -> tuple[ChildStatus, ...]:
        """The whole tree at this moment, without sending a message, depth first."""
        return tuple(self._subtree(self._root))

    def incarnation(self, name: str) -> int:
        """The highest incarnation that the name has had; 0 for none."""
        return self._incarnations.get(name, 0)

    def state(self, name: str) -> NameState:
        """What the registry says of this name now; one that has just died is not READY."""
        state = self._entries.get(name, (NameState.UNKNOWN, 0))[0]
        if state is NameState.READY and not self._alive(name):
            return NameState.STARTING
        return state

    def note(self, text: str) -> None:
        """Add a line to the trace."""
        if self._simulation.tracing:
            self.trace.append(f"{self.now() - self._began:.6f} {text}")

    # For the simulation

    async def begin(self, root: SupervisorSpec, name: str) -> None:
        """Start the root supervisor and return when its tree is ready."""
        self._nursery.start_soon(self._run_events)
        self._nursery.start_soon(self._keeper.run, self.exchange)
        self._root = name
        self.publish(name, NameState.STARTING, 1, owner=WORLD)
        self.spawn(ChildSpec(name, FACTORY, supervisor_arguments(root)), 1, WORLD, None, self._root_exited)
        async with trio.open_nursery() as nursery:
            for event in (self._root_ready, self._root_ended):
                nursery.start_soon(_cancel_after, event, nursery.cancel_scope)
        self.publish(name, NameState.READY, 1, owner=WORLD)

    async def end_in_order(self) -> None:
        """Stop the tree as the service does, and wait for it."""
        if not self._root_ended.is_set():
            self.exchange.tell(self._root, Stop("the simulation ends"))
            with trio.fail_after(SHUTDOWN_DEADLINE):
                await self._root_ended.wait()

    def publish(self, name: str, state: NameState, incarnation: int, *, owner: str) -> None:
        """The registry's entry of a name changes; `owner` is the supervisor that says so."""
        self.note(f"name {name} {state.value} {incarnation}")
        if state is NameState.UNKNOWN:
            self._entries.pop(name, None)
            self._owners.pop(name, None)
            return
        self._entries[name] = (state, incarnation)
        self._owners[name] = owner
        if state is NameState.READY:
            for other in self._processes.values():
                if other.knows(name):
                    call = functools.partial(_name_up, name, incarnation)
                    self._at(self._arrival(name, other.name), functools.partial(other.give, call))

    def spawn(
        self,
        spec: ChildSpec,
        incarnation: int,
        supervisor: str,
        checkpoint: Checkpoint | None,
        exited: Callable[[SimulatedProcess, bool, str], None],
    ) -> int:
        """Make a process for this child; `exited(process, failed, reason)` is called when it has ended."""
        process = self._make_process(spec.name, incarnation, supervisor)
        self.note(f"spawn {spec.name} {incarnation}")
        copy = None
        if checkpoint is not None:
            copies = tuple(one.duplicate() for one in checkpoint.descriptors)
            copy = Checkpoint(checkpoint.state, copies, checkpoint.version)
        self._nursery.start_soon(self._run_process, process, spec, copy, exited)
        return process.pid

    def end(self, process: SimulatedProcess, reason: str) -> None:
        """End a process at once, and all that is below it."""
        if not process.alive:
            return
        process.alive = False
        process.killed_by = reason
        process.scope.cancel()
        if process.overseer is not None:
            for child in [one for one in self._processes.values() if one.supervisor == process.name]:
                self.end(child, reason)

    def carry(self, sender: SimulatedProcess, envelope: Envelope, descriptors: Sequence[Descriptor]) -> None:
        """Put an envelope on its way.

        Raises:
            NotDeliveredError: as Port.send.
        """
        name = envelope.target
        state = self.state(name)
        target = self._processes.get(name)
        if state is NameState.UNKNOWN:
            raise NotDeliveredError(f"there is no actor {name}")
        if target is None or not target.alive:
            raise NotDeliveredError(f"{name} is being restarted")
        early = envelope.reply_to is not None or sender.name == target.supervisor or sender.supervisor == name
        if state is NameState.STARTING and not early:
            raise NotDeliveredError(f"{name} is being restarted")
        channel = (sender.name, name)
        if self._under_way.get(channel, 0) >= QUEUE_LIMIT:
            raise NotDeliveredError(f"the queue from {sender.name} to {name} is full")
        self._under_way[channel] = self._under_way.get(channel, 0) + 1
        self.note(f"send {envelope.id} {envelope.kind} to {name}")
        copies = [descriptor.duplicate() for descriptor in descriptors]
        self._at(self._arrival(*channel), functools.partial(self._arrive, channel, target, envelope, copies))

    # Inside

    def _make_process(self, name: str, incarnation: int, supervisor: str) -> SimulatedProcess:
        self._pids += 1
        process = SimulatedProcess(self, name, incarnation, supervisor, self._pids)
        self._processes[name] = process
        self._incarnations[name] = incarnation
        return process

    def _plain_exchange(self, process: SimulatedProcess, keeper: TimeKeeper) -> Exchange:
        return Exchange(
            process.name,
            process.incarnation,
            process,
            supervisor=process.supervisor,
            now=self.now,
            wall=self.wall,
            random=process.random,
            on_stop=lambda reason: None if process.overseer is None else process.overseer.shut_down(reason),
            crash=functools.partial(self.end, process, "crashed by a fault"),
            hang=functools.partial(self.freeze, process.name),
            allow_faults=True,
            timer_changed=keeper.changed,
        )

    async def _run_process(
        self,
        process: SimulatedProcess,
        spec: ChildSpec,
        checkpoint: Checkpoint | None,
        exited: Callable[[SimulatedProcess, bool, str], None],
    ) -> None:
        failed, reason = False, "exit status 0"
        with process.scope:
            try:
                await trio.sleep(self._random.uniform(*self._simulation.start_time))
                if spec.factory == FACTORY:
                    failed, reason = await self._run_supervisor(process, spec)
                else:
                    await self._run_actor(process, spec, checkpoint)
            except Exception as error:  # noqa: BLE001  # any failure ends this pretended process, not the simulation
                failed, reason = True, failure_text(error)[1]
        if process.killed_by:
            failed, reason = True, process.killed_by
        process.alive = False
        if self._processes.get(process.name) is process:
            del self._processes[process.name]
        self.note(f"exit {process.name} {process.incarnation} {reason}")
        for other in self._processes.values():
            if other.knows(process.name):
                call = functools.partial(_name_down, process.name, reason)
                self._at(self._arrival(process.name, other.name), functools.partial(other.give, call))
        self._at(self._arrival(process.name, process.supervisor), functools.partial(exited, process, failed, reason))

    async def _run_actor(self, process: SimulatedProcess, spec: ChildSpec, checkpoint: Checkpoint | None) -> None:
        actor = process.actor = self._simulation.make_actor(spec)
        cell = Cell(
            actor,
            process.name,
            process.incarnation,
            process,
            supervisor=process.supervisor,
            now=self.now,
            wall=self.wall,
            random=process.random,
            log=self._simulation.log.bind(actor=process.name),
            crash=functools.partial(self.end, process, "crashed by a fault"),
            hang=functools.partial(self.freeze, process.name),
            allow_faults=True,
            operators=self._simulation.operators,
        )
        process.attach(cell.exchange)
        await cell.run(checkpoint)

    async def _run_supervisor(self, process: SimulatedProcess, spec: ChildSpec) -> tuple[bool, str]:
        keeper = TimeKeeper(self.now)
        exchange = self._plain_exchange(process, keeper)
        host = _Host(self, process, exchange)
        overseer = process.overseer = Overseer(
            process.name,
            supervisor_spec(spec),
            exchange,
            host,
            process.random,
            allow_faults=True,
            pid=process.pid,
            log=self._simulation.log.bind(actor=process.name),
            last_incarnation=self.incarnation,
            operators=self._simulation.operators,
        )
        process.attach(exchange)
        self._take_over(process.name, supervisor_spec(spec))
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(keeper.run, exchange, process.while_frozen)
                overseer.begin()
                await host.done.wait()
                nursery.cancel_scope.cancel()
        finally:
            overseer.close()
            exchange.close()
        return host.failed, host.reason

    def _take_over(self, supervisor: str, spec: SupervisorSpec) -> None:
        """Free the names of children that only a predecessor of this supervisor knew."""
        static = {child.name for child in spec.children}
        for name in [name for name, owner in self._owners.items() if owner == supervisor and name not in static]:
            self.publish(name, NameState.UNKNOWN, 0, owner=supervisor)

    async def _run_events(self) -> None:
        while True:
            self._changed = trio.Event()
            due = self._events.next()
            with trio.move_on_at(math.inf if due is None else due):
                await self._changed.wait()
            self._events.run(self.now())

    def _at(self, when: float, function: Callable[[], None]) -> None:
        self._events.call_at(when, function)

    def _arrival(self, sender: str, target: str) -> float:
        """When what leaves now arrives: later than all that left before from here to there."""
        when = self.now() + self._random.uniform(*self._simulation.latency)
        when = max(when, self._arrivals.get((sender, target), 0.0))
        self._arrivals[sender, target] = when
        return when

    def _arrive(
        self, channel: tuple[str, str], target: SimulatedProcess, envelope: Envelope, descriptors: list[Descriptor]
    ) -> None:
        self._under_way[channel] -= 1
        if not target.alive:
            self.note(f"lost {envelope.id} {envelope.kind} to {envelope.target}")
            return
        self.note(f"deliver {envelope.id} {envelope.kind} to {envelope.target}")
        target.give(functools.partial(_deliver, envelope, descriptors))

    def _subtree(self, name: str) -> Iterator[ChildStatus]:
        process = self._processes.get(name)
        if process is None or process.overseer is None:
            return
        own, *children = process.overseer.statuses()
        if name == self._root:
            yield own
        for child in children:
            yield child
            yield from self._subtree(child.name)

    def _alive(self, name: str) -> bool:
        process = self._processes.get(name)
        return process is not None and process.alive

    def _is_whole(self) -> bool:
        return self._alive(self._root) and all(
            status.state in ("stopped", "failed") or (status.state == "running" and self._alive(status.name))
            for status in self.tree()
        )

    def _is_ready(self, name: str, incarnation: int) -> bool:
        return self.state(name) is NameState.READY and self._entries[name][1] >= incarnation

    def _on_last_words(self, message: LastWords, _: Envelope) -> None:
        self.root_failure = message.reason

    def _root_exited(self, _: SimulatedProcess, failed: bool, reason: str) -> None:  # noqa: FBT001  # a callback
        if failed and self.root_failure is None:
            self.root_failure = reason
        self._root_ended.set()


class _Host:
    """The host of a simulated supervisor. Implements :class:`supervisor.overseer.Host`."""

    def __init__(self, world: World, process: SimulatedProcess, exchange: Exchange) -> None:
        self.done = trio.Event()
        self.failed = False
        self.reason = ""
        self._world = world
        self._process = process
        self._exchange = exchange
        self._children: dict[str, SimulatedProcess] = {}

    def spawn(self, spec: ChildSpec, incarnation: int, checkpoint: Checkpoint | None) -> int:
        pid = self._world.spawn(spec, incarnation, self._process.name, checkpoint, self._exited)
        self._children[spec.name] = self._world._processes[spec.name]  # noqa: SLF001  # one module, one idea
        return pid

    def kill(self, name: str, incarnation: int) -> None:
        child = self._children.get(name)
        if child is not None and child.incarnation == incarnation:
            self._world.end(child, "killed by SIGKILL")

    def freeze(self, name: str, incarnation: int) -> None:
        child = self._children.get(name)
        if child is not None and child.incarnation == incarnation:
            self._world.freeze(name)

    def publish(self, name: str, state: NameState, incarnation: int) -> None:
        self._world.publish(name, state, incarnation, owner=self._process.name)

    def ready(self) -> None:
        self._exchange.tell(self._process.supervisor, Ready(self._process.incarnation, {}))

    def finished(self, reason: str, *, failed: bool) -> None:
        self.failed, self.reason = failed, reason
        if failed:
            words = LastWords(self._process.incarnation, GAVE_UP, reason)
            self._exchange.tell(self._process.supervisor, words)
        self.done.set()

    def _exited(self, child: SimulatedProcess, failed: bool, reason: str) -> None:  # noqa: FBT001  # a callback
        if self._children.get(child.name) is child:
            del self._children[child.name]
        overseer = self._process.overseer
        if overseer is not None and self._process.alive:
            overseer.child_exited(child.name, child.incarnation, failed=failed, reason=reason)


class Simulation:
    """See the module.

    Arguments:
        seed: of latencies, scheduler, jitter and every actor's `random`.
        classes: actor classes by the word that a child's `factory` names them with; others are imported.
        latency: bounds of a message's time on its way, in virtual seconds.
        start_time: bounds of the time that a process takes to come to life.
        tracing: whether the trace is written (hours of heartbeats fill memory).
        log: where actors log.
        operators: who may disturb others besides the scenario, see :mod:`supervisor.authority`.
    """

    def __init__(
        self,
        seed: int,
        *,
        classes: Mapping[str, type[Actor]] | None = None,
        latency: tuple[float, float] = (0.000_02, 0.001),
        start_time: tuple[float, float] = (0.005, 0.05),
        tracing: bool = True,
        log: loguru.Logger = logger,
        operators: Collection[str] = (),
    ) -> None:
        self.operators = (WORLD, *operators)
        self.seed = seed
        self.latency = latency
        self.start_time = start_time
        self.tracing = tracing
        self.log = log
        self._classes = dict(classes or {})

    @contextlib.asynccontextmanager
    async def run(self, root: SupervisorSpec, *, name: str = "root") -> AsyncIterator[World]:
        """The tree, ready (or given up, see `World.root_failure`); it is shut down in order at the end."""
        failure: Exception | None = None
        with _seeded_scheduler(self.seed):
            async with trio.open_nursery() as nursery:
                world = World(self, nursery)
                await world.begin(root, name)
                try:
                    yield world
                    await world.end_in_order()
                except Exception as error:  # noqa: BLE001  # raised again below, as it was and not inside a group
                    failure = error
                nursery.cancel_scope.cancel()
            world.exchange.close()
        if failure is not None:
            raise failure

    def main(self, root: SupervisorSpec, scenario: Callable[[World], Awaitable[T]]) -> T:
        """Run a scenario from synchronous code: makes its own trio run with a clock that jumps."""

        async def inside() -> T:
            async with self.run(root) as world:
                return await scenario(world)

        return trio.run(inside, clock=trio.testing.MockClock(autojump_threshold=0))

    def make_actor(self, spec: ChildSpec) -> Actor:
        """The actor that a child specification describes."""
        cls = self._classes.get(spec.factory)
        if cls is None:
            module, _, word = spec.factory.partition(":")
            cls = cast("type[Actor]", getattr(importlib.import_module(module), word))
        return cls(**spec.arguments)


@contextlib.contextmanager
def _seeded_scheduler(seed: int) -> Iterator[None]:
    """Make the order in which trio runs ready tasks a function of the seed.

    trio has these two names for this purpose (its Hypothesis plugin uses them), but does not document them.
    """
    flag = trio_run._ALLOW_DETERMINISTIC_SCHEDULING  # noqa: SLF001  # see above
    state = trio_run._r.getstate()  # noqa: SLF001  # see above
    trio_run._ALLOW_DETERMINISTIC_SCHEDULING = True  # type: ignore[misc]  # noqa: SLF001  # Final only by declaration
    trio_run._r.seed(seed)  # noqa: SLF001  # see above
    try:
        yield
    finally:
        trio_run._ALLOW_DETERMINISTIC_SCHEDULING = flag  # type: ignore[misc]  # noqa: SLF001  # as above
        trio_run._r.setstate(state)  # noqa: SLF001  # see above


async def _cancel_after(event: trio.Event, scope: trio.CancelScope) -> None:
    await event.wait()
    scope.cancel()


def _deliver(envelope: Envelope, descriptors: list[Descriptor], receiver: Receiver) -> None:
    receiver.deliver(envelope, descriptors)


def _name_up(name: str, incarnation: int, receiver: Receiver) -> None:
    receiver.name_up(name, incarnation)


def _name_down(name: str, reason: str, receiver: Receiver) -> None:
    receiver.name_down(name, reason)
