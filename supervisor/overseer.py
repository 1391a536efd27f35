"""A supervisor, but for its processes: the logic, its messages, its checkpoints.

Theory of operation. The overseer sits on a plain exchange and stands between three parties. Messages (requests of
others, news of the children) and the ends of processes become events of :class:`supervisor.strategy.SupervisorLogic`;
the commands that come back become messages again or calls of the :class:`Host`, which owns the processes. After
each event the registry is told of every name whose state has changed, before any command is carried out, so that
nobody is told of an actor that cannot be reached yet.

The real supervisor process and the simulated one both run this: they differ in their host alone. The host reports the
end of a process with :meth:`Overseer.child_exited`, after it has delivered all messages that the process had sent.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import os
import random
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Protocol

from protocol.messages import Data, Envelope, Message
from protocol.messages.codec import from_plain, to_plain
from protocol.messages.envelope import MAX_NAME
from protocol.messages.system import (
    ChildSpec,
    ChildStarted,
    ChildStatus,
    DropCheckpoint,
    Hang,
    InjectProcessFault,
    KeepCheckpoint,
    LastWords,
    Ok,
    Ping,
    Pong,
    ProcessFault,
    ReadEstate,
    ReadTree,
    Ready,
    SaveCheckpoint,
    SetFaults,
    SetTaps,
    StartChild,
    Stop,
    StopChild,
    SupervisorSpec,
    Tree,
    Work,
)
from supervisor.actor import Checkpoint
from supervisor.authority import Authority
from supervisor.confinement import for_child
from supervisor.errors import AskError, NoSuchActorError, RefusedError
from supervisor.estate import Estate, keep_message
from supervisor.exchange import Exchange
from supervisor.log_library import logger
from supervisor.port import NameState
from supervisor.strategy import (
    POISONED,
    AskToStop,
    Command,
    Finished,
    Forget,
    Kill,
    PingChild,
    RequestRefused,
    Start,
    StartAnswered,
    StopAnswered,
    SupervisorLogic,
    TreeReady,
    Warn,
)
from supervisor.timers import Timer

if TYPE_CHECKING:
    import loguru

FACTORY = "supervisor.supervisor:Supervisor"
"""What a child specification names in order to have a supervisor as a child."""

ESTATE_DEADLINE = 1.0
"""Seconds that the supervisor above gets to hand over what it keeps; without it everything starts afresh."""

UNCLAIMED = 60.0
"""Seconds after which a checkpoint that no child of that name was started for is thrown away."""

CYCLE_AGE = 1.0
"""Seconds that a request must have waited before it counts as part of a circle."""

CYCLE_PAUSE = 60.0
"""Seconds before the same circle is told of again."""

GAVE_UP = "gave-up"
"""The code in the last words of a supervisor that could not keep its children running."""

SUBTREE_DEADLINE = 1.0
"""Seconds that a supervisor below gets to report its children before the tree is shown without them."""


def supervisor_spec(child: ChildSpec) -> SupervisorSpec:
    """The supervisor specification inside the arguments of a child that is a supervisor.

    Raises:
        MessageError: the arguments are not one.
    """
    return from_plain(SupervisorSpec, child.arguments)


def supervisor_arguments(spec: SupervisorSpec) -> dict[str, Data]:
    """The inverse of :func:`supervisor_spec`: what goes into the child's `arguments`."""
    plain: dict[str, Data] = to_plain(spec)
    return plain


class Host(Protocol):
    """What carries out a supervisor's commands. All calls return at once and never raise for a foreseeable failure."""

    def spawn(self, spec: ChildSpec, incarnation: int, checkpoint: Checkpoint | None) -> int | None:
        """Make the process; its pid, or None (then report `child_exited` later, not from inside this call).

        The checkpoint and its descriptors stay with the overseer: pass them on as copies.
        """
        ...

    def kill(self, name: str, incarnation: int) -> None:
        """SIGKILL the child's process (and what is below it, if it is a supervisor)."""
        ...

    def freeze(self, name: str, incarnation: int) -> None:
        """SIGSTOP the child's process."""
        ...

    def publish(self, name: str, state: NameState, incarnation: int) -> None:
        """Tell the registry what this name is from now on. UNKNOWN frees it."""
        ...

    def ready(self) -> None:
        """Every static child is ready for the first time: report to the supervisor's own supervisor."""
        ...

    def finished(self, reason: str, *, failed: bool) -> None:
        """All children have ended; end this process (with a failure if `failed`)."""
        ...


class Overseer:
    """See the module.

    Arguments:
        name: the supervisor's own name.
        spec: its strategy and static children.
        exchange: its own exchange (made without mailbox); `Stop` must be wired to :meth:`shut_down`.
        host: carries out the commands.
        random: for the jitter of back-off.
        allow_faults: whether InjectProcessFault is obeyed.
        pid: what the tree shows as this supervisor's process; None: the present one.
        log: the process's logger.
        last_incarnation: the highest incarnation that a name has had so far, see SupervisorLogic.
        operators: names of those who may look into it and disturb it, see :mod:`supervisor.authority`.
        confinement: what the kernel enforces on the supervisor's own process.
    """

    def __init__(
        self,
        name: str,
        spec: SupervisorSpec,
        exchange: Exchange,
        host: Host,
        random: random.Random,
        *,
        allow_faults: bool = False,
        pid: int | None = None,
        log: loguru.Logger | None = None,
        last_incarnation: Callable[[str], int] = lambda _: 0,
        operators: Collection[str] = (),
        confinement: str = "",
    ) -> None:
        self.name = name
        self.logic = SupervisorLogic(name, spec, random, last_incarnation)
        self._exchange = exchange
        self._host = host
        self._allow_faults = allow_faults
        self._pid = os.getpid() if pid is None else pid
        self._log = log if log is not None else logger.bind(actor=name)
        self._began = exchange.now()
        self._confinement = confinement
        self._confinements: dict[str, str] = {}
        self._published: dict[str, tuple[NameState, int]] = {}
        self._specs: dict[str, ChildSpec] = {}
        self._pids: dict[str, int | None] = {}
        self._ready: dict[str, dict[str, Data]] = {}
        self._estate = Estate()
        self._doubted: dict[str, Checkpoint] = {}
        self._waits: dict[str, str] = {}  # who awaits whose answer, as the heartbeats told
        self._told_cycles: dict[frozenset[str], float] = {}
        self._last_words: dict[tuple[str, int], LastWords] = {}
        self._timer: Timer | None = None
        exchange.authority = Authority(
            exchange.supervisor, operators, starters=spec.starters, is_child=self._published.__contains__
        )
        exchange.on(Ready, self._on_ready)
        exchange.on(LastWords, self._on_last_words)
        exchange.on(SaveCheckpoint, self._on_save_checkpoint)
        exchange.on(KeepCheckpoint, self._on_keep_checkpoint)
        exchange.on(DropCheckpoint, self._on_drop_checkpoint)
        exchange.on(ReadEstate, self._on_read_estate)
        exchange.on(StartChild, self._on_start_child)
        exchange.on(StopChild, self._on_stop_child)
        exchange.on(ReadTree, self._on_read_tree)
        exchange.on(InjectProcessFault, self._on_inject)

    # For the host

    def begin(self) -> None:
        """Start the static children, with what predecessors of them left and the supervisor above has kept."""
        try:
            self._exchange.ask(
                self._exchange.supervisor, ReadEstate(), timeout=ESTATE_DEADLINE, answer=self._begin_with_estate
            )
        except AskError as error:
            self._begin_with_estate(error)

    def _begin_with_estate(self, outcome: Message | AskError) -> None:
        if isinstance(outcome, AskError):
            self._log.debug("starting without an estate: {}", outcome)
        elif self._estate.names():
            self._exchange.call_at(self._exchange.now() + UNCLAIMED, self._drop_unclaimed)
        self._do(self.logic.begin(self._exchange.now()))

    def child_exited(self, name: str, incarnation: int, *, failed: bool, reason: str) -> None:
        """A child's process has ended; `reason` in words ("killed by SIGKILL", "exit status 1").

        What the child itself said in `LastWords` is preferred to `reason`.
        """
        said = self._last_words.pop((name, incarnation), None)
        if said is not None and said.code == GAVE_UP:
            # What its children left may be what made them fail again and again.
            self._drop_checkpoints(self._estate.names_below(name))
        code = "start-failed"
        if said is not None and failed:
            code, reason = said.code, said.reason
        self._pids.pop(name, None)
        self._waits.pop(name, None)
        self._doubted.pop(name, None)
        self._confinements.pop(name, None)
        if failed:
            self._log.warning("{} ended: {}", name, reason)
        else:
            self._log.debug("{} ended", name)
        now = self._exchange.now()
        self._do(self.logic.child_exited(name, incarnation, now, failed=failed, reason=reason, code=code))

    def shut_down(self, reason: str) -> None:
        """Stop all children in reverse order, then `host.finished`."""
        self._do(self.logic.shutdown_requested(reason, self._exchange.now()))

    def close(self) -> None:
        """Close the descriptors in checkpoints."""
        self._estate.close()

    # Messages

    def _on_ready(self, message: Ready, envelope: Envelope) -> None:
        name = envelope.sender
        self._ready[name] = message.state
        doubted = self._doubted.pop(name, None)
        if doubted is not None and self._estate.get(name) is doubted:
            self._drop_checkpoints([name])  # without it all is well
        self._confinements[name] = message.confinement
        self._do(self.logic.child_ready(name, message.incarnation, self._exchange.now()))
        if self._published.get(name) == (NameState.READY, message.incarnation):
            if self._exchange.taps:
                self._exchange.tell(name, SetTaps(self._exchange.taps))
            if self._exchange.faults:
                self._exchange.tell(name, SetFaults(self._exchange.faults))

    def _on_last_words(self, message: LastWords, envelope: Envelope) -> None:
        if self._published.get(envelope.sender, (None, 0))[1] == message.incarnation:
            self._last_words[envelope.sender, message.incarnation] = message

    def _on_save_checkpoint(self, message: SaveCheckpoint, envelope: Envelope) -> None:
        self._keep(envelope.sender, (), Checkpoint(message.state, message.descriptors, message.version), envelope)

    def _on_keep_checkpoint(self, message: KeepCheckpoint, envelope: Envelope) -> None:
        checkpoint = Checkpoint(message.state, message.descriptors, message.version)
        if envelope.sender == self._exchange.supervisor and message.path[:1] == (self.name,):
            self._keep_handed_down(message, checkpoint, len(envelope.body))
        elif message.path[:1] == (envelope.sender,):
            self._keep(message.name, message.path, checkpoint, envelope)

    def _keep_handed_down(self, message: KeepCheckpoint, checkpoint: Checkpoint, size: int) -> None:
        """What a predecessor of this supervisor had kept. Whatever it is, it must not end this one, too."""
        try:
            self._estate.keep(message.name, message.path[1:], checkpoint, size, handed_down=True)
        except RefusedError as refusal:
            self._log.warning("{} starts without what it left: {}", message.name, refusal)
            self._exchange.metrics.counter("peerup_checkpoints_refused_total", reason=refusal.code).inc()

    def _on_drop_checkpoint(self, message: DropCheckpoint, envelope: Envelope) -> None:
        if message.name in self._estate.names_below(envelope.sender):
            self._drop_checkpoints([message.name])

    def _on_read_estate(self, _: ReadEstate, envelope: Envelope) -> None:
        for message in self._estate.messages_below(envelope.sender):
            self._exchange.tell(envelope.sender, message, cause=envelope.id)
        self._exchange.answer(envelope, Ok())

    def _keep(self, name: str, path: tuple[str, ...], checkpoint: Checkpoint, envelope: Envelope) -> None:
        try:
            self._estate.keep(name, path, checkpoint, len(envelope.body), own=name in self._published)
        except RefusedError as refusal:
            self._log.warning("a checkpoint of {} was not kept: {}", name, refusal)
            self._exchange.metrics.counter("peerup_checkpoints_refused_total", reason=refusal.code).inc()
            self._exchange.refuse(envelope, refusal)
            return
        self._exchange.tell(self._exchange.supervisor, keep_message(name, (self.name, *path), checkpoint))

    def _drop_unclaimed(self) -> None:
        self._drop_checkpoints([name for name in self._estate.names_of_children() if name not in self._published])

    def _on_start_child(self, message: StartChild, envelope: Envelope) -> None:
        spec = message.spec
        if not spec.name or len(spec.name) > MAX_NAME or not spec.name.isprintable():
            reason = f"the name of an actor has 1 to {MAX_NAME} printable characters"
            self._exchange.refuse(envelope, RefusedError("invalid-name", reason))
        elif spec.name not in self._published and self._exchange.state(spec.name) is not NameState.UNKNOWN:
            reason = f"{spec.name} is an actor of another supervisor"
            self._exchange.refuse(envelope, RefusedError("already-started", reason))
        else:
            try:
                spec = self._confined(spec)
            except RefusedError as refusal:
                self._exchange.refuse(envelope, refusal)
                return
            self._do(self.logic.start_requested(spec, envelope, self._exchange.now()))

    def _confined(self, spec: ChildSpec) -> ChildSpec:
        """The child as this supervisor's own specification confines it, whatever the request says."""
        rules = self.logic.spec.confinements
        for rule in rules:
            if fnmatch.fnmatchcase(spec.name, rule.pattern):
                return dataclasses.replace(spec, confinement=for_child(rule, spec.arguments))
        if rules:
            reason = f"{self.name} has no rule for what an actor called {spec.name} may do"
            raise RefusedError("not-allowed", reason)
        return spec

    def _on_stop_child(self, message: StopChild, envelope: Envelope) -> None:
        if any(child.name == message.name for child in self.logic.spec.children):
            reason = f"{message.name} belongs to {self.name} and runs for as long as that does"
            self._exchange.refuse(envelope, RefusedError("not-allowed", reason))
        else:
            self._do(self.logic.stop_requested(message.name, envelope, self._exchange.now()))

    def _on_read_tree(self, _: ReadTree, envelope: Envelope) -> None:
        _TreeReport(self, envelope)

    def _on_inject(self, message: InjectProcessFault, envelope: Envelope) -> None:
        exchange = self._exchange
        if not self._allow_faults:
            action = "start the node with --allow-faults"
            exchange.refuse(envelope, RefusedError("faults-not-allowed", "this node does not take faults", action))
        elif message.name in self._published:
            self._inflict(message, envelope)
        else:
            _Search(exchange, self.supervisors(), message, envelope)

    def _inflict(self, message: InjectProcessFault, envelope: Envelope) -> None:
        name = message.name
        if self._pids.get(name) is None:
            self._exchange.refuse(envelope, RefusedError("not-running", f"{name} has no process now"))
            return
        incarnation = self._published[name][1]
        self.logic.end_wished(name)
        self._log.warning("{} is hit by the fault {}", name, message.fault.value)
        match message.fault:
            case ProcessFault.KILL:
                self._host.kill(name, incarnation)
            case ProcessFault.STOP:
                self._host.freeze(name, incarnation)
            case ProcessFault.HANG:
                self._exchange.tell(name, Hang(), cause=envelope.id)
        self._exchange.answer(envelope, Ok())

    # The tree

    def statuses(self) -> tuple[ChildStatus, ...]:
        """This supervisor itself, then its own children in order."""
        now = self._exchange.now()
        state = "stopping" if self.logic.ending else "running"
        own = ChildStatus(
            self.name, FACTORY, self._exchange.supervisor, self._pid, state, now - self._began, 0, 0, 0,
            self._exchange.handled, "", confinement=self._confinement,
        )  # fmt: skip
        return (own, *(self._completed(status) for status in self.logic.status(now)))

    def _completed(self, status: ChildStatus) -> ChildStatus:
        pid, confined = self._pids.get(status.name), self._confinements.get(status.name, "")
        return dataclasses.replace(status, pid=pid, confinement=confined)

    def supervisors(self) -> list[str]:
        """The names of children that are ready supervisors."""
        return [
            name
            for name, (state, _) in self._published.items()
            if state is NameState.READY and self._specs[name].factory == FACTORY
        ]

    # Commands

    def _do(self, commands: list[Command]) -> None:
        self._publish_names()
        for command in commands:
            self._carry_out(command)
        self._schedule()

    def _carry_out(self, command: Command) -> None:
        exchange = self._exchange
        match command:
            case Start(spec, incarnation, fresh):
                self._start(spec, incarnation, fresh=fresh)
            case AskToStop(name, _, reason):
                exchange.tell(name, Stop(reason))
            case Kill(name, incarnation, reason):
                self._log.warning("killing {}: {}", name, reason)
                self._host.kill(name, incarnation)
            case Warn(name, text):
                self._log.warning("{} is not at work: {}", name, text)
                exchange.metrics.counter("peerup_stalls_total", actor=name).inc()
            case PingChild(name, incarnation):
                self._ping(name, incarnation)
            case Forget(name):
                self._drop_checkpoints([name, *self._estate.names_below(name)])
                self._specs.pop(name, None)
                self._ready.pop(name, None)
            case StartAnswered(Envelope() as request, name):
                pid = self._pids.get(name)
                exchange.answer(request, ChildStarted(name, pid or 0, self._ready.get(name, {})))
            case StopAnswered(Envelope() as request, _):
                exchange.answer(request, Ok())
            case RequestRefused(Envelope() as request, code, reason):
                exchange.refuse(request, RefusedError(code, reason))
            case TreeReady():
                self._host.ready()
            case Finished(failed, reason):
                self.close()
                self._host.finished(reason, failed=failed)
            case _:
                raise AssertionError(f"{command} carries a token that is not a request")

    def _start(self, spec: ChildSpec, incarnation: int, *, fresh: bool) -> None:
        if spec.name in self._specs:
            self._exchange.metrics.counter("peerup_restarts_total", actor=spec.name).inc()
        self._specs[spec.name] = spec
        checkpoint = self._estate.get(spec.name)
        if fresh and checkpoint is not None:
            self._log.error("{} is started without its checkpoint, with which it failed {} times", spec.name, POISONED)
            self._exchange.metrics.counter("peerup_checkpoints_doubted_total", actor=spec.name).inc()
            self._doubted[spec.name] = checkpoint
            checkpoint = None
        self._pids[spec.name] = self._host.spawn(spec, incarnation, checkpoint)

    def _ping(self, name: str, incarnation: int) -> None:
        def answered(outcome: Message | AskError) -> None:
            if isinstance(outcome, Pong):
                now = self._exchange.now()
                self._do(
                    self.logic.heartbeat_answered(
                        name, incarnation, now, mailbox=outcome.mailbox, handled=outcome.handled, work=outcome.work
                    )
                )
                self._look_for_cycle(name, outcome.work)

        try:
            self._exchange.ask(name, Ping(), timeout=self._specs[name].heartbeat_deadline, answer=answered)
        except AskError as error:
            self._log.debug("no heartbeat to {}: {}", name, error)  # the missing answer says so to the logic

    def _look_for_cycle(self, name: str, work: Work | None) -> None:
        """Tell of children that wait for each other in a circle; the first whose time is up will break it."""
        if work is None or not work.waits_for or work.waiting < CYCLE_AGE:
            self._waits.pop(name, None)
            return
        self._waits[name] = work.waits_for
        circle = [name]
        while (following := self._waits.get(circle[-1])) is not None and following not in circle:
            circle.append(following)
        if following != name:
            return
        members = frozenset(circle)
        if self._exchange.now() < self._told_cycles.get(members, 0.0):
            return
        self._told_cycles[members] = self._exchange.now() + CYCLE_PAUSE
        self._log.warning("requests go in a circle, and none is answered: {}", " waits for ".join([*circle, name]))
        self._exchange.metrics.counter("peerup_request_cycles_total").inc()

    def _publish_names(self) -> None:
        names = self.logic.names()
        for name in [name for name in self._published if name not in names]:
            del self._published[name]
            self._host.publish(name, NameState.UNKNOWN, 0)
        for name, entry in names.items():
            if self._published.get(name) != entry:
                self._published[name] = entry
                self._host.publish(name, *entry)

    def _schedule(self) -> None:
        due = self.logic.next_wakeup()
        if self._timer is not None:
            if self._timer.when == due and self._timer.pending:
                return
            self._timer.cancel()
        self._timer = None if due is None else self._exchange.call_at(due, self._tick)

    def _tick(self) -> None:
        self._do(self.logic.tick(self._exchange.now()))

    def _drop_checkpoints(self, names: list[str]) -> None:
        for name in names:
            if self._estate.drop(name):
                self._exchange.tell(self._exchange.supervisor, DropCheckpoint(name))

    @property
    def exchange(self) -> Exchange:
        """The supervisor's exchange."""
        return self._exchange


class _TreeReport:
    """Gathers the trees of the supervisors below, and answers when all have reported or their time is up."""

    def __init__(self, overseer: Overseer, request: Envelope) -> None:
        self._overseer = overseer
        self._request = request
        self._trees: dict[str, tuple[ChildStatus, ...]] = {}
        self._open = set()
        for name in overseer.supervisors():
            try:
                overseer.exchange.ask(
                    name, ReadTree(), timeout=SUBTREE_DEADLINE, answer=functools.partial(self._reported, name)
                )
            except AskError:
                continue  # it is shown as the supervisor above sees it, without children
            self._open.add(name)
        self._finish()

    def _reported(self, name: str, outcome: Message | AskError) -> None:
        self._open.discard(name)
        if isinstance(outcome, Tree):
            self._trees[name] = outcome.children[1:]  # the first is itself, which its parent knows better
        self._finish()

    def _finish(self) -> None:
        if self._open:
            return
        lines: list[ChildStatus] = []
        for status in self._overseer.statuses():
            lines.append(status)
            lines += self._trees.get(status.name, ())
        self._overseer.exchange.answer(self._request, Tree(tuple(lines)))


class _Search:
    """Passes a request on to the supervisors below; the first that does it answers for all."""

    def __init__(
        self, exchange: Exchange, supervisors: list[str], message: InjectProcessFault, request: Envelope
    ) -> None:
        self._exchange = exchange
        self._request = request
        self._name = message.name
        self._refusal: RefusedError | None = None
        self._open = 1
        for name in supervisors:
            try:
                exchange.ask(name, message, timeout=SUBTREE_DEADLINE, answer=self._answered, cause=request.id)
            except AskError:
                continue  # a supervisor that is not there has no children that could be hit
            self._open += 1
        self._answered(NoSuchActorError(f"there is no actor {self._name}"))

    def _answered(self, outcome: Message | AskError) -> None:
        if self._open == 0:
            return
        self._open -= 1
        if isinstance(outcome, Ok):
            self._open = 0
            self._exchange.answer(self._request, outcome)
            return
        if isinstance(outcome, RefusedError) and outcome.code != NoSuchActorError.code:
            self._refusal = outcome
        if self._open == 0:
            missing = RefusedError(NoSuchActorError.code, f"there is no actor {self._name}")
            self._exchange.refuse(self._request, self._refusal or missing)
