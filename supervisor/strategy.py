"""The supervision state machine: no processes, no sockets, no clock.

Events go in as method calls that carry `now`; each returns the list of commands to carry out, in order. The words are
those of Erlang/OTP: strategies, intensity, permanent, transient and temporary children.

Theory of operation. Each child has a state (below) and a goal: to be up, to be restarted (it is stopped first, because
a sibling failed), or to be down (somebody asked, or the supervisor ends). An event changes states and goals;
then `_advance` does whatever the goals now allow: first stops, last child first, then starts, first child first.

A child is started when its turn has come: under `rest_for_one` and `one_for_all` when every child before it is up;
under `one_for_one` that holds only until the whole tree was up once, because afterwards children are
independent of each other. Children added while running come after the static ones. Under `one_for_one` they
have no order among themselves and are stopped all at once, before the static ones.

The first restart of a child within the window is immediate; the n-th in a row waits `backoff_initial * 2**(n-2)`
seconds, at most `backoff_limit` (the child's own, if it has one), less up to a half by jitter. A child that ran for
`STEADY` seconds begins a new row, and an end that a person wished for counts for nothing. One restart more than
`intensity` within the window, of all children together, and the supervisor gives up: it stops its children and finishes
as failed, and its own supervisor decides. It gives up sooner when a child explains why it cannot start before the tree
was ever up (FIRST_START_ATTEMPTS).

A child that failed `POISONED` times in a row at or just after its start is started once without its checkpoint: what
its predecessor left may be what it fails by. If that does not help, it was not to blame and is given again.

A supervisor that was itself not running for a while (stopped, or starved) gives its children that time back
before it takes them for hung.

| from        | event                                | to          | commands           |
|-------------|--------------------------------------|-------------|--------------------|
| new         | added                                | waiting     |                    |
| waiting     | its turn has come                    | starting    | Start              |
| waiting     | stop requested                       | gone        | Forget             |
| waiting     | the supervisor ends                  | stopped     |                    |
| backing-off | the wait is over                     | waiting     |                    |
| backing-off | stop requested                       | gone        | Forget             |
| backing-off | the supervisor ends                  | stopped     |                    |
| starting    | ready                                | running     | StartAnswered      |
| starting    | start deadline                       | killing     | Kill               |
| starting    | to be stopped, and its turn          | stopping    | AskToStop          |
| starting    | ended, restart at once               | waiting     |                    |
| starting    | ended, restart later                 | backing-off |                    |
| starting    | ended, no restart                    | failed      |                    |
| starting    | ended, at its first requested start  | gone        | RequestRefused     |
| running     | to be stopped, and its turn          | stopping    | AskToStop          |
| running     | heartbeat not answered               | killing     | Kill               |
| running     | not at work for too long             | killing     | Kill               |
| running     | ended, restart at once               | waiting     |                    |
| running     | ended, restart later                 | backing-off |                    |
| running     | ended well, no restart               | stopped     |                    |
| running     | ended by a failure, no restart       | failed      |                    |
| running     | ended, dynamic, no restart           | gone        | Forget             |
| stopping    | stop deadline                        | killing     | Kill               |
| stopping    | ended, restart at once               | waiting     |                    |
| stopping    | ended, restart later                 | backing-off |                    |
| stopping    | ended, stop requested                | gone        | Forget             |
| stopping    | ended, the supervisor ends           | stopped     |                    |
| stopping    | ended, temporary, with its group     | stopped     |                    |
| killing     | ended, restart at once               | waiting     |                    |
| killing     | ended, restart later                 | backing-off |                    |
| killing     | ended, no restart                    | failed      |                    |
| killing     | ended, stop requested or dynamic     | gone        | Forget             |
| killing     | ended, the supervisor ends           | stopped     |                    |
| killing     | ended, temporary, with its group     | stopped     |                    |
| stopped     | stop requested, or started anew      | gone        | Forget             |
| failed      | stop requested, or started anew      | gone        | Forget             |

```mermaid
stateDiagram-v2
    new --> waiting
    waiting --> starting
    waiting --> gone
    waiting --> stopped
    backing-off --> waiting
    backing-off --> gone
    backing-off --> stopped
    starting --> running
    starting --> killing
    starting --> stopping
    starting --> waiting
    starting --> backing-off
    starting --> failed
    starting --> gone
    running --> stopping
    running --> killing
    running --> waiting
    running --> backing-off
    running --> stopped
    running --> failed
    running --> gone
    stopping --> killing
    stopping --> waiting
    stopping --> backing-off
    stopping --> gone
    stopping --> stopped
    killing --> waiting
    killing --> backing-off
    killing --> failed
    killing --> gone
    killing --> stopped
    stopped --> gone
    failed --> gone
```
"""

from __future__ import annotations

import collections
import dataclasses
import enum
import math
import random
from collections.abc import Callable

from protocol.messages.system import ChildSpec, ChildStatus, Restart, Strategy, SupervisorSpec, Work
from supervisor.port import NameState

LATENESS = 0.5
"""Seconds by which a tick may come late before it counts as not having run: far above scheduling noise, well
below any sensible heartbeat deadline."""

FIRST_START_ATTEMPTS = 3
"""A child that, before the tree was ever up, says so many times in words that it cannot start (a port in use, a missing
key) ends the supervisor at once: whoever started the tree waits for the explanation, and time does not help. Twice
it is tried again all the same, because what was in the way may have been the end of a predecessor."""

STEADY = 5.0
"""Seconds after which a child counts as running well: its next failure is the first of a new row."""

POISONED = 3
"""Failed starts in a row after which the next one goes without the checkpoint."""

QUICK = 1.0
"""Seconds after its start in which a failure that a child explains, or that is a defect, still counts as one of it."""

NO_WORDS = "start-failed"
"""The code of an end of which the child itself said nothing, as after a SIGKILL."""

UNFORESEEN = frozenset({"crash", NO_WORDS})
"""The codes of ends that the child did not explain: a kill, a defect. They count as any restart does."""


@dataclasses.dataclass(frozen=True)
class Start:
    """Start a process for this child. Report `child_ready`, or `child_exited` when it ends or cannot be made.

    `fresh`: do not give it its checkpoint, by which it may have failed so far.
    """

    spec: ChildSpec
    incarnation: int
    fresh: bool = False


@dataclasses.dataclass(frozen=True)
class AskToStop:
    """Tell the child to stop, with `Stop(reason)`; `Kill` follows at its stop deadline if it does not end."""

    name: str
    incarnation: int
    reason: str


@dataclasses.dataclass(frozen=True)
class Kill:
    """End the child's process at once (SIGKILL). Its `child_exited` is still awaited."""

    name: str
    incarnation: int
    reason: str


@dataclasses.dataclass(frozen=True)
class Warn:
    """Tell people that the child is not at work, though it lives."""

    name: str
    text: str


@dataclasses.dataclass(frozen=True)
class PingChild:
    """Send the child a `Ping`; report `heartbeat_answered`."""

    name: str
    incarnation: int


@dataclasses.dataclass(frozen=True)
class Forget:
    """The child is gone for good: its name is free and its checkpoint can be thrown away."""

    name: str


@dataclasses.dataclass(frozen=True)
class StartAnswered:
    """The start request with this token succeeded: the child is ready."""

    token: object
    name: str


@dataclasses.dataclass(frozen=True)
class StopAnswered:
    """The stop request with this token is done: the child has ended and is forgotten."""

    token: object
    name: str


@dataclasses.dataclass(frozen=True)
class RequestRefused:
    """The start or stop request with this token is refused."""

    token: object
    code: str
    reason: str


@dataclasses.dataclass(frozen=True)
class TreeReady:
    """Every static child is ready for the first time: the supervisor itself is ready."""


@dataclasses.dataclass(frozen=True)
class Finished:
    """All children have ended, and so must the supervisor. Comes once, last.

    `failed` is True when it gave up (too many restarts: escalation), False after `shutdown_requested`.
    """

    failed: bool
    reason: str


Command = (
    Start
    | AskToStop
    | Kill
    | Warn
    | PingChild
    | Forget
    | StartAnswered
    | StopAnswered
    | RequestRefused
    | TreeReady
    | Finished
)


class ChildState(enum.Enum):
    """See the table in the module's docstring."""

    NEW = "new"
    WAITING = "waiting"
    BACKING_OFF = "backing-off"
    STARTING = "starting"
    RUNNING = "running"
    STOPPING = "stopping"
    KILLING = "killing"
    STOPPED = "stopped"
    FAILED = "failed"
    GONE = "gone"


_S = ChildState
TRANSITIONS: dict[ChildState, frozenset[ChildState]] = {
    _S.NEW: frozenset((_S.WAITING,)),
    _S.WAITING: frozenset((_S.STARTING, _S.GONE, _S.STOPPED)),
    _S.BACKING_OFF: frozenset((_S.WAITING, _S.GONE, _S.STOPPED)),
    _S.STARTING: frozenset(
        (_S.RUNNING, _S.KILLING, _S.STOPPING, _S.WAITING, _S.BACKING_OFF, _S.FAILED, _S.GONE),
    ),
    _S.RUNNING: frozenset(
        (_S.STOPPING, _S.KILLING, _S.WAITING, _S.BACKING_OFF, _S.STOPPED, _S.FAILED, _S.GONE),
    ),
    _S.STOPPING: frozenset((_S.KILLING, _S.WAITING, _S.BACKING_OFF, _S.GONE, _S.STOPPED)),
    _S.KILLING: frozenset((_S.WAITING, _S.BACKING_OFF, _S.FAILED, _S.GONE, _S.STOPPED)),
    _S.STOPPED: frozenset((_S.GONE,)),
    _S.FAILED: frozenset((_S.GONE,)),
    _S.GONE: frozenset(),
}
"""What the table allows; every change of state is checked against it."""

_ALIVE = frozenset((_S.STARTING, _S.RUNNING, _S.STOPPING, _S.KILLING))
_PENDING = frozenset((_S.WAITING, _S.BACKING_OFF))
_SETTLED = frozenset((_S.RUNNING, _S.STOPPED, _S.FAILED))
_SHOWN = {_S.WAITING: "starting", _S.KILLING: "stopping"}


class _Goal(enum.Enum):
    UP = "up"
    RESTART = "restart"
    DOWN = "down"


@dataclasses.dataclass(slots=True, eq=False)
class _Child:
    """One child. `due` is when its state needs attention next (deadline, end of back-off, next ping)."""

    spec: ChildSpec
    dynamic: bool
    incarnation: int
    state: ChildState = ChildState.NEW
    goal: _Goal = _Goal.UP
    due: float = math.inf
    not_before: float = -math.inf
    pinged: bool = False
    ready: bool = False
    ready_at: float = 0.0
    restarts: collections.deque[float] = dataclasses.field(default_factory=collections.deque)
    restarts_total: int = 0
    row: int = 0
    failed_starts: int = 0
    wished: bool = False
    mailbox: int = 0
    handled: int = 0
    work: Work | None = None
    idle_since: float = math.inf  # since when it has handled nothing though messages wait
    warned: bool = False
    last_failure: str = ""
    stop_reason: str = ""
    kill_reason: str = ""
    start_token: object = None
    stop_tokens: list[object] = dataclasses.field(default_factory=list)

    @property
    def alive(self) -> bool:
        return self.state in _ALIVE

    def enter(self, state: ChildState, due: float = math.inf) -> None:
        if state not in TRANSITIONS[self.state]:
            raise AssertionError(f"{self.spec.name} cannot go from {self.state.value} to {state.value}")
        self.state = state
        self.due = due
        self.pinged = False


class SupervisorLogic:
    """See the module.

    Arguments:
        name: the supervisor's own name.
        spec: strategy, limits and static children.
        random: for jitter alone.
        last_incarnation: the highest incarnation that a name has had so far (0: none); a supervisor that was
            itself restarted goes on counting where its predecessor ended.
    """

    def __init__(
        self,
        name: str,
        spec: SupervisorSpec,
        random: random.Random,
        last_incarnation: Callable[[str], int] = lambda _: 0,
    ) -> None:
        self.name = name
        self.spec = spec
        self._random = random
        self._last_incarnation = last_incarnation
        self._children: dict[str, _Child] = {}
        self._past: dict[str, int] = {}  # the last incarnation of each forgotten name
        self._restarts: collections.deque[float] = collections.deque()
        self._began = False
        self._tree_ready = False
        self._ending: Finished | None = None
        self._finished = False
        self._commands: list[Command] = []

    # Events

    def begin(self, now: float) -> list[Command]:
        """The supervisor runs: start the static children in order."""
        for spec in self.spec.children:
            if spec.name in self._children:
                raise ValueError(f"{self.name} has two children called {spec.name}")
            self._add(spec, dynamic=False)
        self._began = True
        return self._advance(now)

    def child_ready(self, name: str, incarnation: int, now: float) -> list[Command]:
        """The child's `start` has returned."""
        child = self._find(name, incarnation)
        if child is None or child.state is not _S.STARTING:
            return []  # it ended, or was told to stop, while the news was on its way
        child.enter(_S.RUNNING, self._next_ping(child, now))
        child.ready = True
        child.ready_at = now
        if child.start_token is not None:
            self._commands.append(StartAnswered(child.start_token, name))
            child.start_token = None
        return self._advance(now)

    def child_exited(
        self, name: str, incarnation: int, now: float, *, failed: bool, reason: str, code: str = NO_WORDS
    ) -> list[Command]:
        """The child's process has ended. `code` is for the answer of a start request that fails by it."""
        child = self._find(name, incarnation)
        if child is None or not child.alive:
            return []
        if child.state is _S.KILLING:
            failed, reason = True, child.kill_reason
        if child.state is _S.STARTING:
            failed = True
        if child.goal is _Goal.UP:
            if failed:
                child.last_failure = reason
            self._ended_by_itself(child, now, failed=failed, reason=reason, code=code)
        elif child.goal is _Goal.RESTART:
            child.goal = _Goal.UP
            if child.spec.restart is not Restart.TEMPORARY:
                self._wait(child, now)
            elif child.dynamic:
                self._forget(child)
            else:
                child.enter(_S.STOPPED if child.state is not _S.STARTING else _S.FAILED)
        elif child.stop_tokens:
            self._forget(child)
        else:
            child.enter(_S.STOPPED if child.state is not _S.STARTING else _S.FAILED)
        return self._advance(now)

    def heartbeat_answered(
        self, name: str, incarnation: int, now: float, *, mailbox: int, handled: int, work: Work | None = None
    ) -> list[Command]:
        """The child's `Pong` came. A child that answers and yet does nothing is warned of, and killed in the end."""
        child = self._find(name, incarnation)
        if child is None or child.state is not _S.RUNNING:
            return []
        if not mailbox or handled != child.handled:
            child.idle_since, child.warned = (now if mailbox else math.inf), False
        elif child.idle_since == math.inf:
            child.idle_since = now
        child.mailbox, child.handled, child.work = mailbox, handled, work
        child.pinged = False
        child.due = self._next_ping(child, now)
        self._judge_work(child, now)
        return self._advance(now)

    def _judge_work(self, child: _Child, now: float) -> None:
        idle, spec = now - child.idle_since, child.spec
        if 0 < spec.stall_deadline <= idle:
            self._kill(child, self._stalled(child, idle))
        elif 0 < spec.stall_warning <= idle and not child.warned:
            child.warned = True
            self._commands.append(Warn(spec.name, self._stalled(child, idle)))

    @staticmethod
    def _stalled(child: _Child, idle: float) -> str:
        text = f"it has handled nothing for {idle:.0f} s, though messages wait for it: {child.mailbox}"
        if child.work is None:
            return text
        text += f"; it has been handling {child.work.kind} for {child.work.age:.0f} s"
        return f"{text}, waiting for {child.work.waits_for}" if child.work.waits_for else text

    def end_wished(self, name: str) -> None:
        """Somebody makes this child fail on purpose, once: its next end is not held against it."""
        child = self._children.get(name)
        if child is not None and child.alive:
            child.wished = True

    def start_requested(self, spec: ChildSpec, token: object, now: float) -> list[Command]:
        """Somebody wants a dynamic child. Answered when it is ready; refused when its first start fails."""
        existing = self._children.get(spec.name)
        if self._ending is not None:
            return [RequestRefused(token, "shutting-down", f"{self.name} is shutting down")]
        if existing is not None:
            if existing.state not in (_S.STOPPED, _S.FAILED):
                going = "is still stopping" if existing.goal is _Goal.DOWN else "is already there"
                return [RequestRefused(token, "already-started", f"{spec.name} {going}")]
            self._forget(existing)
        child = self._add(spec, dynamic=True)
        child.start_token = token
        return self._advance(now)

    def stop_requested(self, name: str, token: object, now: float) -> list[Command]:
        """Somebody wants a child stopped and forgotten."""
        child = self._children.get(name)
        if child is None:
            return [RequestRefused(token, "no-such-child", f"{self.name} has no child {name}")]
        child.stop_tokens.append(token)
        if not child.alive:
            self._refuse_start(child, "stopped", f"{name} was stopped before it was ready")
            self._forget(child)
        else:
            child.goal = _Goal.DOWN
            child.stop_reason = "stop requested"
            self._ask_to_stop(child, now)
        return self._advance(now)

    def shutdown_requested(self, reason: str, now: float) -> list[Command]:
        """Stop all children in reverse order, then `Finished`."""
        if self._ending is None:
            self._end(Finished(False, reason))
        return self._advance(now)

    def tick(self, now: float) -> list[Command]:
        """Time passed: whatever is due. Call it at `next_wakeup` (earlier or later does no harm)."""
        due = self.next_wakeup()
        if due is None or due > now:
            return []
        lateness = now - due
        for child in list(self._children.values()):
            if child.due > now:
                continue
            if lateness > LATENESS and (child.pinged or child.state is _S.STARTING):
                child.due = now + (child.spec.heartbeat_deadline if child.pinged else child.spec.start_deadline)
                continue
            match child.state:
                case _S.BACKING_OFF:
                    child.enter(_S.WAITING)
                case _S.STARTING:
                    self._kill(child, f"it was not ready within {child.spec.start_deadline:g} s")
                case _S.STOPPING:
                    self._kill(child, f"it did not stop within {child.spec.stop_deadline:g} s")
                case _S.RUNNING if child.pinged:
                    self._kill(child, f"it did not answer a heartbeat for {child.spec.heartbeat_deadline:g} s")
                case _S.RUNNING:
                    child.pinged = True
                    child.due = now + child.spec.heartbeat_deadline
                    self._commands.append(PingChild(child.spec.name, child.incarnation))
                case _:
                    raise AssertionError(f"nothing can be due for a child that is {child.state.value}")
        return self._advance(now)

    def next_wakeup(self) -> float | None:
        """The moment at which `tick` must be called next, or None."""
        earliest = min((child.due for child in self._children.values()), default=math.inf)
        return None if earliest == math.inf else earliest

    # Looking in

    def status(self, now: float) -> tuple[ChildStatus, ...]:
        """The children in order; `pid` is None here (processes are not this module's)."""
        return tuple(self._status(child, now) for child in self._children.values())

    def names(self) -> dict[str, tuple[NameState, int]]:
        """What the registry must say of each child, and the incarnation of its present or next process."""
        return {name: (self._name_state(child), child.incarnation) for name, child in self._children.items()}

    @property
    def ending(self) -> bool:
        """Whether the supervisor stops its children in order to end."""
        return self._ending is not None

    # Inside

    def _status(self, child: _Child, now: float) -> ChildStatus:
        self._trim(child.restarts, now)
        return ChildStatus(
            name=child.spec.name,
            factory=child.spec.factory,
            supervisor=self.name,
            pid=None,
            state=_SHOWN.get(child.state, child.state.value),
            uptime=now - child.ready_at if child.state is _S.RUNNING else 0.0,
            restarts=len(child.restarts),
            restarts_total=child.restarts_total,
            mailbox=child.mailbox if child.state is _S.RUNNING else 0,
            handled=child.handled,
            last_failure=child.last_failure,
            work=child.work if child.state is _S.RUNNING else None,
        )

    def _name_state(self, child: _Child) -> NameState:
        if child.alive and child.ready:
            return NameState.READY
        if child.state in (_S.STOPPED, _S.FAILED):
            comes_back = self._ending is not None and self._ending.failed and not child.dynamic
            return NameState.STARTING if comes_back else NameState.UNKNOWN
        return NameState.STARTING

    def _add(self, spec: ChildSpec, *, dynamic: bool) -> _Child:
        past = max(self._last_incarnation(spec.name), self._past.get(spec.name, 0))
        child = _Child(spec, dynamic, past)
        child.enter(_S.WAITING)
        self._children[spec.name] = child
        return child

    def _find(self, name: str, incarnation: int) -> _Child | None:
        child = self._children.get(name)
        return child if child is not None and child.incarnation == incarnation else None

    def _next_ping(self, child: _Child, now: float) -> float:
        """The next multiple of the period: all children of all supervisors are pinged in one wake-up."""
        period = child.spec.heartbeat
        return math.inf if period <= 0 else (math.floor(now / period) + 1) * period

    def _ended_by_itself(self, child: _Child, now: float, *, failed: bool, reason: str, code: str) -> None:
        name = child.spec.name
        if child.start_token is not None:
            self._refuse_start(child, code, reason)
            self._forget(child)
            return
        restart = child.spec.restart
        if restart is Restart.TEMPORARY or (restart is Restart.TRANSIENT and not failed):
            if child.dynamic:
                self._forget(child)
            else:
                child.enter(_S.FAILED if failed else _S.STOPPED)
            return
        wished, child.wished = child.wished, False
        ran = now - child.ready_at if child.ready else 0.0
        if not wished:
            child.row = 1 if ran >= STEADY else child.row + 1
            at_start = not child.ready or (ran < QUICK and code != NO_WORDS)
            child.failed_starts = child.failed_starts + 1 if at_start else 0
            self._trim(self._restarts, now)
            self._restarts.append(now)
        if len(self._restarts) > self.spec.intensity:
            child.enter(_S.FAILED)
            times = f"{len(self._restarts)} failures within {self.spec.window:g} s"
            self._end(Finished(True, f"{times}, the last of {name}: {reason}"))
            return
        self._trim(child.restarts, now)
        child.restarts.append(now)
        child.restarts_total += 1
        if not self._tree_ready and code not in UNFORESEEN and child.restarts_total >= FIRST_START_ATTEMPTS:
            child.enter(_S.FAILED)
            self._end(Finished(True, f"{name} does not start: {reason}"))
            return
        again = now if wished else now + self._backoff(child)
        child.not_before = again
        self._wait(child, now)
        for sibling in self._group(child):
            if sibling.alive and sibling.goal is not _Goal.DOWN:
                sibling.goal = _Goal.RESTART  # a temporary one is only stopped, in its turn
                sibling.stop_reason = f"{name} is restarted"
                sibling.not_before = again
            # siblings that are not alive are behind this one and wait for their turn anyway

    def _group(self, child: _Child) -> list[_Child]:
        """The siblings that are restarted together with this child."""
        if self.spec.strategy is Strategy.ONE_FOR_ONE:
            return []
        children = list(self._children.values())
        if self.spec.strategy is Strategy.REST_FOR_ONE:
            children = children[children.index(child) :]
        return [sibling for sibling in children if sibling is not child]

    def _backoff(self, child: _Child) -> float:
        nth = min(child.row, len(child.restarts))
        if nth < 2:
            return 0.0
        own = child.spec.backoff_limit
        limit = self.spec.backoff_limit if own is None else min(own, self.spec.backoff_limit)
        full = min(limit, self.spec.backoff_initial * 2.0 ** min(nth - 2, 60))
        return full * (1.0 - self._random.random() / 2)

    def _wait(self, child: _Child, now: float) -> None:
        if child.not_before > now:
            child.enter(_S.BACKING_OFF, child.not_before)
        else:
            child.enter(_S.WAITING)

    def _kill(self, child: _Child, reason: str) -> None:
        child.kill_reason = reason
        child.enter(_S.KILLING)
        self._commands.append(Kill(child.spec.name, child.incarnation, reason))

    def _ask_to_stop(self, child: _Child, now: float) -> None:
        if child.state in (_S.STARTING, _S.RUNNING):
            self._commands.append(AskToStop(child.spec.name, child.incarnation, child.stop_reason))
            child.enter(_S.STOPPING, now + child.spec.stop_deadline)

    def _refuse_start(self, child: _Child, code: str, reason: str) -> None:
        if child.start_token is not None:
            self._commands.append(RequestRefused(child.start_token, code, reason))
            child.start_token = None

    def _forget(self, child: _Child) -> None:
        name = child.spec.name
        self._refuse_start(child, "stopped", f"{name} was stopped before it was ready")
        child.enter(_S.GONE)
        del self._children[name]
        self._past[name] = child.incarnation
        self._commands.append(Forget(name))
        self._commands += [StopAnswered(token, name) for token in child.stop_tokens]

    def _end(self, how: Finished) -> None:
        self._ending = how
        for child in self._children.values():
            self._refuse_start(child, "shutting-down", f"{self.name} is shutting down")
            if child.alive:
                child.goal = _Goal.DOWN
                child.stop_reason = child.stop_reason or how.reason
            elif child.state in _PENDING:
                child.enter(_S.STOPPED)

    def _advance(self, now: float) -> list[Command]:
        """Do what the goals allow now, and hand out the commands gathered so far."""
        self._advance_stops(now)
        if self._ending is None:
            self._advance_starts(now)
            if (
                self._began
                and not self._tree_ready
                and all(child.state in _SETTLED for child in self._children.values() if not child.dynamic)
            ):
                self._tree_ready = True
                self._commands.append(TreeReady())
                self._advance_starts(now)
        elif not self._finished and not any(child.alive for child in self._children.values()):
            self._finished = True
            self._commands.append(self._ending)
        commands, self._commands = self._commands, []
        return commands

    def _advance_stops(self, now: float) -> None:
        """Ask the last child that must stop; under one_for_one first all dynamic ones, which have no order."""
        stopping = [child for child in reversed(self._children.values()) if child.alive and child.goal is not _Goal.UP]
        independent = self.spec.strategy is Strategy.ONE_FOR_ONE
        unordered = [child for child in stopping if child.dynamic and independent]
        for child in unordered or stopping[:1]:
            self._ask_to_stop(child, now)

    def _advance_starts(self, now: float) -> None:
        if any(child.alive and child.goal is _Goal.RESTART for child in self._children.values()):
            return
        ordered = self.spec.strategy is not Strategy.ONE_FOR_ONE or not self._tree_ready
        for child in self._children.values():
            if child.state is _S.WAITING and child.not_before <= now:
                child.incarnation += 1
                child.ready = child.warned = False
                child.idle_since, child.work = math.inf, None
                child.enter(_S.STARTING, now + child.spec.start_deadline)
                fresh = child.failed_starts > 0 and child.failed_starts % POISONED == 0
                self._commands.append(Start(child.spec, child.incarnation, fresh))
            if ordered and child.state not in _SETTLED and child.goal is not _Goal.DOWN:
                return

    def _trim(self, times: collections.deque[float], now: float) -> None:
        while times and times[0] <= now - self.spec.window:
            times.popleft()
