"""Messages that the runtime itself understands: every actor answers these without writing a line of code."""

from __future__ import annotations

import enum

from protocol.messages.codec import Data, Descriptor, Message, Request, message, record
from protocol.messages.confinement import Confinement, ConfinementRule


class Restart(enum.Enum):
    """When a supervisor starts a child again after it ended (the words of Erlang/OTP)."""

    PERMANENT = "permanent"  # always
    TRANSIENT = "transient"  # only when it ended by a failure
    TEMPORARY = "temporary"  # never


class Strategy(enum.Enum):
    """Which siblings a supervisor restarts together with a child that ended."""

    ONE_FOR_ONE = "one_for_one"
    REST_FOR_ONE = "rest_for_one"
    ONE_FOR_ALL = "one_for_all"


class Overflow(enum.Enum):
    """What happens to a message that reaches a full mailbox."""

    REFUSE = "refuse"  # the sender gets a refusal (an ask fails at once; a tell becomes a dead letter)
    DROP_OLDEST = "drop_oldest"
    DROP_NEWEST = "drop_newest"


@record
class ChildSpec:
    """What a supervisor needs to know to run a child.

    Attributes:
        name: the registered name, such as `gate` or `proxy/home/ssh`.
        factory: `module:Class` below `actors.` or `supervisor.` (nothing else can be started).
        arguments: keyword arguments for the class; plain data.
        restart: when to start it again.
        start_deadline: seconds until it must be ready, or it counts as failed.
        stop_deadline: seconds it gets between being asked to stop and SIGKILL.
        heartbeat: seconds between pings; one ping is outstanding at a time. 0 turns it off.
        heartbeat_deadline: seconds without an answer after which it is taken for hung and killed.
        stall_warning: seconds in which it may handle nothing though messages wait before the log says so; 0: for ever.
        stall_deadline: seconds after which it is killed then; 0: never.
        backoff_limit: the longest wait in seconds before a restart, where the supervisor's is too long for this child.
        confinement: what its process may do; None: whatever the user that runs the node may.
    """

    name: str
    factory: str
    arguments: dict[str, Data]
    restart: Restart = Restart.PERMANENT
    start_deadline: float = 10.0
    stop_deadline: float = 5.0
    heartbeat: float = 1.0
    heartbeat_deadline: float = 2.0
    stall_warning: float = 10.0
    stall_deadline: float = 60.0
    backoff_limit: float | None = None
    confinement: Confinement | None = None


@record
class SupervisorSpec:
    """A supervisor and its children; a child whose factory is the supervisor class has its own spec in `arguments`.

    Attributes:
        strategy: which siblings are restarted with a child.
        intensity: so many restarts within `window` seconds are borne; one more and the supervisor gives up.
        window: seconds, see `intensity`.
        backoff_initial, backoff_limit: seconds before the 2nd restart in a window and the longest wait, doubling
            between, with jitter. The first restart is immediate.
        children: started in this order, stopped in reverse.
        starters: names of the actors that may have further children started and stopped here.
        confinements: how those further children are confined, whatever the request says: the first rule that fits.
            Where there are rules, a child that none fits is refused.
    """

    strategy: Strategy
    intensity: int
    window: float
    backoff_initial: float
    backoff_limit: float
    children: tuple[ChildSpec, ...]
    starters: tuple[str, ...] = ()
    confinements: tuple[ConfinementRule, ...] = ()


@message("system.ok")
class Ok(Message):
    """The answer of a request that has nothing to tell but that it was done."""


@message("system.refusal")
class Refusal(Message):
    """The answer of a request that was not done. `code` is for programs, the rest for people."""

    code: str
    reason: str
    action: str = ""


@record
class Work:
    """What an actor has been busy with for longest.

    Attributes:
        kind: of the message being handled.
        age: seconds since its handling began.
        waits_for: the actor whose answer its handler awaits; empty if none.
        waiting: seconds since it asked.
    """

    kind: str
    age: float
    waits_for: str = ""
    waiting: float = 0.0


@message("system.pong")
class Pong(Message):
    """Alive: the actor's own event loop handled the ping. `work` is None when no message is being handled."""

    mailbox: int
    handled: int
    work: Work | None = None


@message("system.ping")
class Ping(Request[Pong]):
    """Heartbeat: answered by the actor's runtime from its event loop, ahead of the mailbox."""


@message("system.ready")
class Ready(Message):
    """From a child to its supervisor: `start` has returned this. `confinement`: see :class:`ChildStatus`."""

    incarnation: int
    state: dict[str, Data]
    confinement: str = ""


@message("system.last-words")
class LastWords(Message):
    """From a child to its supervisor: why it is about to end by a failure. The exit status alone does not tell."""

    incarnation: int
    code: str
    reason: str


@message("system.stop")
class Stop(Message):
    """Finish: leave nothing half done, then end. Sent by the supervisor; SIGKILL follows at the deadline."""

    reason: str


@message("system.successor-may-start")
class SuccessorMayStart(Message):
    """To the service, from an actor that takes long to stop: ports and files that a successor of this node needs are
    free, and what is left needs none of them.
    """


@message("system.description")
class Description(Message):
    """What an actor says of itself. Secrets never appear."""

    state: dict[str, Data]


@message("system.describe")
class Describe(Request[Description]):
    """Ask an actor for its own description (`peerup actors get NAME`)."""


@record
class Sample:
    """One time series of one actor: a counter or a gauge, or a histogram when `buckets` is not empty.

    `buckets` are cumulative `(upper bound, count)` pairs without +Inf; `value` is then the sum, `count` the count.
    """

    name: str
    kind: str
    labels: dict[str, str]
    value: float
    count: int = 0
    buckets: tuple[tuple[float, int], ...] = ()


@message("system.metrics")
class MetricsSnapshot(Message):
    """All series of one actor at one moment."""

    samples: tuple[Sample, ...]


@message("system.collect-metrics")
class CollectMetrics(Request[MetricsSnapshot]):
    """Ask an actor for its counters."""


@message("system.set-log-level")
class SetLogLevel(Request[Ok]):
    """Change an actor's log level; after `seconds` (if not None) the level of the configuration returns."""

    level: str
    seconds: float | None


@record
class EdgeFilter:
    """Selects messages by who sends, who receives and what kind; None matches all, `*` globs within names."""

    sender: str | None = None
    target: str | None = None
    kind: str | None = None


@record
class TapRule:
    """Copies of matching messages go to `sink` as `Tapped`, until `until` (CLOCK_MONOTONIC seconds).

    At most `rate` copies a second leave one actor; what is over is counted in the next copy's `skipped`.
    """

    id: str
    match: EdgeFilter
    sink: str
    until: float
    rate: float


@message("system.set-taps")
class SetTaps(Message):
    """The complete list of taps now in force. Sent to every actor whenever it changes."""

    taps: tuple[TapRule, ...]


@message("system.tapped")
class Tapped(Message):
    """A copy of an envelope that passed (bodies above 4 KiB are cut off and marked)."""

    tap: str
    at: float
    envelope: bytes
    cut: bool
    skipped: int


class FaultAction(enum.Enum):
    """What a message fault does to a message that it hits."""

    DROP = "drop"
    DELAY = "delay"
    DUPLICATE = "duplicate"
    REORDER = "reorder"  # it swaps places with the next matching message
    CORRUPT = "corrupt"  # one random bit of the body flips
    CRASH = "crash"  # the receiver ends itself by SIGKILL on receipt


@record
class FaultRule:
    """A message fault, in force until `until` (CLOCK_MONOTONIC seconds).

    It hits a matching message with `probability` (drawn from `seed`), or exactly the `nth` one if that is not None.
    """

    id: str
    match: EdgeFilter
    action: FaultAction
    probability: float
    nth: int | None
    seed: int
    until: float
    delay: float = 0.1


@message("system.set-faults")
class SetFaults(Message):
    """The complete list of message faults now in force. Refused by nodes not started with `--allow-faults`."""

    faults: tuple[FaultRule, ...]


@message("system.faults-in-force")
class FaultsInForce(Message):
    """The message faults that an actor applies now."""

    faults: tuple[FaultRule, ...]


@message("system.read-faults")
class ReadFaults(Request[FaultsInForce]):
    """Ask an actor which message faults it applies."""


@message("system.hang")
class Hang(Message):
    """Stop turning the event loop for ever (only with `--allow-faults`): the heartbeat must find it."""


@record
class JournalEntry:
    """The head of one message that an actor sent or received, without its body."""

    id: str
    cause: str | None
    reply_to: str | None
    sender: str
    target: str
    kind: str
    at: float


@message("system.journal")
class Journal(Message):
    """What an actor remembers of messages that it sent or received."""

    entries: tuple[JournalEntry, ...]


@message("system.read-journal")
class ReadJournal(Request[Journal]):
    """Ask an actor for the journal entries of these message ids; all that it has if `ids` is empty."""

    ids: tuple[str, ...]


@record
class DeadLetter:
    """A message that reached nobody."""

    entry: JournalEntry
    reason: str


@message("system.dead-letters")
class DeadLetters(Message):
    """The last dead letters of one actor; `dropped` older ones are no longer kept.

    `refused` counts, by reason, what its transport refused before anybody knew what it was.
    """

    letters: tuple[DeadLetter, ...]
    dropped: int
    refused: dict[str, int]


@message("system.read-dead-letters")
class ReadDeadLetters(Request[DeadLetters]):
    """Ask an actor for the messages of its own that could not be delivered."""


@record
class ChildStatus:
    """A supervisor's view of one child.

    Attributes:
        state: `starting`, `running`, `stopping`, `backing-off`, `stopped` or `failed`.
        uptime: seconds since it became ready.
        restarts: restarts within the supervisor's window.
        restarts_total: restarts since the supervisor started.
        mailbox, handled, work: from the last answered heartbeat.
        last_failure: how it last ended, in words; empty if it never did.
        confinement: what the kernel enforces on its process, in a word of :mod:`supervisor.confinement`; empty if that
            was not asked for, or the process is not ready.
    """

    name: str
    factory: str
    supervisor: str
    pid: int | None
    state: str
    uptime: float
    restarts: int
    restarts_total: int
    mailbox: int
    handled: int
    last_failure: str
    work: Work | None = None
    confinement: str = ""


@message("system.tree")
class Tree(Message):
    """A supervisor and everything below it, itself first, depth first."""

    children: tuple[ChildStatus, ...]


@message("system.read-tree")
class ReadTree(Request[Tree]):
    """Ask a supervisor for its tree."""


@message("system.child-started")
class ChildStarted(Message):
    """The child is ready. `ready` is what its `start` method returned."""

    name: str
    pid: int
    ready: dict[str, Data]


@message("system.start-child")
class StartChild(Request[ChildStarted]):
    """Ask a supervisor to start a child. Refused with code `already-started` when the name is taken.

    Only those may ask that the supervisor's specification names as `starters`.
    """

    spec: ChildSpec


@message("system.stop-child")
class StopChild(Request[Ok]):
    """Ask a supervisor to stop a child that it was asked to start, and forget it. Others are `not-allowed`."""

    name: str


class ProcessFault(enum.Enum):
    """What can be done to an actor's process from outside."""

    KILL = "kill"
    STOP = "stop"
    HANG = "hang"


@message("system.inject-process-fault")
class InjectProcessFault(Request[Ok]):
    """Ask a supervisor to do this to the named child (searched in its whole subtree)."""

    name: str
    fault: ProcessFault


@message("system.checkpoint")
class SaveCheckpoint(Message):
    """From a child to its supervisor: what its successor will be given. Replaces the one before.

    `version` is that of the form of `state`.
    """

    state: dict[str, Data]
    descriptors: tuple[Descriptor, ...]
    version: int = 1


@message("system.keep-checkpoint")
class KeepCheckpoint(Message):
    """Between supervisors: a checkpoint that the actor of this name left. Up: keep it too. Down: it is yours to use.

    `path` names the supervisors from the lower of the two down to the actor's own.
    """

    name: str
    path: tuple[str, ...]
    state: dict[str, Data]
    descriptors: tuple[Descriptor, ...]
    version: int = 1


@message("system.drop-checkpoint")
class DropCheckpoint(Message):
    """From a supervisor to the one above: the actor of this name is gone for good, and so is its checkpoint."""

    name: str


@message("system.read-estate")
class ReadEstate(Request[Ok]):
    """From a supervisor that starts to the one above: tell me by `KeepCheckpoint` what you keep on my behalf.

    The answer follows the last of them.
    """


@message("system.actor-down")
class ActorDown(Message):
    """To a watcher: the actor of this name ended. It may come back under the same name."""

    name: str
    reason: str


@message("system.actor-up")
class ActorUp(Message):
    """To a watcher: an actor of this name is ready (again)."""

    name: str
    incarnation: int
