"""What an actor is, and all that it can do to the world: the contract between actors and the runtime.

An actor is one concern in one process. It subclasses :class:`Actor`, says with :func:`handles` which messages
it understands, and reaches everything else through its :class:`Context`: other actors by name, the clock,
randomness, the log, its counters. Nothing in an actor may import a clock or a random generator, so the same class runs
as a process of its own under the real runtime and, with others, inside one process under
:mod:`supervisor.simulation` with a virtual clock and a seeded scheduler.

Life: the supervisor starts the process; `start` runs and, when it returns, the actor is ready and messages flow;
an exception that nobody handled, in a handler or in a task of `context.nursery`, ends the process with
a non-zero status and the supervisor decides (let it crash); `Stop` or SIGTERM calls `stop` and cancels the nursery.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

import trio

from protocol.messages import Data, Descriptor, Message, MessageId, Request
from protocol.messages.system import Overflow

if TYPE_CHECKING:
    import loguru

M = TypeVar("M", bound=Message)
R = TypeVar("R")
A = TypeVar("A", bound="Actor")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What the predecessor of this actor left behind. Descriptors are open and belong to the receiver.

    `version` is the `checkpoint_version` of the actor that left it.
    """

    state: dict[str, Data]
    descriptors: tuple[Descriptor, ...]
    version: int = 1


class Counter(Protocol):
    """A value that only grows."""

    def inc(self, amount: float = 1, /) -> None:
        """Add `amount`, which is not negative."""


class Gauge(Protocol):
    """A value that goes up and down."""

    def set(self, value: float, /) -> None:
        """Make it `value`."""

    def inc(self, amount: float = 1, /) -> None:
        """Add `amount`, which may be negative."""


class Histogram(Protocol):
    """Counts of observations by size."""

    def observe(self, value: float, /) -> None:
        """Count one observation."""


class Metrics(Protocol):
    """An actor's own time series. Ask once, keep the result, update it for free.

    Names follow Prometheus: `peerup_<what>_<unit>[_total]`; labels are few and bounded.
    """

    def counter(self, name: str, **labels: str) -> Counter:
        """The counter with this name and these labels, made at the first call."""
        ...

    def gauge(self, name: str, **labels: str) -> Gauge:
        """The gauge with this name and these labels, made at the first call."""
        ...

    def histogram(self, name: str, buckets: Sequence[float], **labels: str) -> Histogram:
        """The histogram with this name and these labels, made at the first call. Bounds without +Inf."""
        ...


class Context(Protocol):
    """The world as an actor sees it.

    Attributes:
        name: the name that this actor is registered under.
        incarnation: 1 for the first process under this name, one more for each successor.
        supervisor: the name of its supervisor.
        nursery: lives as long as the actor; a task that fails in it ends the actor.
        random: seeded by the runtime; never for keys or nonces.
        log: a logger bound to the actor and to the message being handled.
        metrics: the actor's counters.
    """

    @property
    def name(self) -> str: ...
    @property
    def incarnation(self) -> int: ...
    @property
    def supervisor(self) -> str: ...
    @property
    def nursery(self) -> trio.Nursery: ...
    @property
    def random(self) -> random.Random: ...
    @property
    def log(self) -> loguru.Logger: ...
    @property
    def metrics(self) -> Metrics: ...

    def now(self) -> float:
        """Seconds of CLOCK_MONOTONIC: the same in every process of the node; virtual in simulation."""
        ...

    def wall(self) -> float:
        """Seconds since the Unix epoch; may jump."""
        ...

    def tell(self, target: str, message: Message) -> None:
        """Send and forget. Never blocks; what cannot be delivered becomes a dead letter with a reason."""
        ...

    async def ask(self, target: str, request: Request[R], *, timeout: float) -> R:  # noqa: ASYNC109
        """Send a request and wait for its answer, at most `timeout` seconds.

        Raises:
            RefusedError: the target refused.
            ActorRestartingError: the target ended before it answered; ActorNotReadyError: it is being restarted.
            NoSuchActorError: there is no such target.
            DeadlineExceededError: no answer in time.
        """
        ...

    def watch(self, name: str) -> None:
        """From now on get :class:`ActorDown` and :class:`ActorUp` for this name (handle both)."""
        ...

    async def wait_for(self, name: str, *, timeout: float) -> None:  # noqa: ASYNC109
        """Return as soon as an actor of this name is ready.

        Raises:
            DeadlineExceededError: it was not within `timeout` seconds.
        """
        ...

    def checkpoint(self, state: dict[str, Data], descriptors: Sequence[int] = ()) -> None:
        """Leave this with the supervisor for a successor, in place of the last one.

        Descriptors are duplicated into the message; the caller keeps its own. Keep the state small (< 16 KiB).
        """
        ...

    @property
    def current_message(self) -> MessageId | None:
        """The message whose handling this task belongs to; it becomes the `cause` of what the task sends."""
        ...

    @property
    def current_sender(self) -> str:
        """Who sent the message being handled. The transport has verified it."""
        ...


Handler = Callable[[Any, Any], Awaitable[Message | None]]


@dataclasses.dataclass(frozen=True)
class HandlerEntry:
    """One row of an actor's table of handlers. `concurrent` ones do not hold up the mailbox while they wait."""

    message: type[Message]
    function: Handler
    concurrent: bool


def handles(
    message: type[M], *, concurrent: bool = False
) -> Callable[[Callable[[A, M], Awaitable[Message | None]]], Callable[[A, M], Awaitable[Message | None]]]:
    """Mark a method `async def name(self, message)` as the handler of a message class.

    Handlers run one at a time in order of arrival, unless `concurrent`: those are started in order and then
    run side by side. What a request's handler returns is the answer (None answers `Ok`); a
    :class:`~supervisor.errors.RefusedError` raised by it is a refusal; any other exception ends the actor.
    """

    def mark(function: Callable[[A, M], Awaitable[Message | None]]) -> Callable[[A, M], Awaitable[Message | None]]:
        function.__dict__["_handles"] = HandlerEntry(message, function, concurrent)
        return function

    return mark


class Actor:
    """The base of every actor.

    Class attributes:
        mailbox_limit: messages that may wait; system messages do not count.
        overflow: what happens to one more.
        checkpoint_version: of the form of its checkpoints. One of another version is not given to `start`.
    """

    mailbox_limit: ClassVar[int] = 1024
    overflow: ClassVar[Overflow] = Overflow.REFUSE
    checkpoint_version: ClassVar[int] = 1
    handlers: ClassVar[dict[str, HandlerEntry]] = {}

    context: Context

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        table: dict[str, HandlerEntry] = {}
        for base in reversed(cls.__mro__):
            for attribute in vars(base).values():
                entry = getattr(attribute, "_handles", None)
                if isinstance(entry, HandlerEntry):
                    table[entry.message.KIND] = entry
        cls.handlers = table

    async def start(self, checkpoint: Checkpoint | None) -> dict[str, Data]:
        """Get ready; `self.context` is there. What is returned reaches whoever asked for the start.

        `checkpoint` is what a predecessor left, or None for the first of its name.
        """
        return {}

    async def stop(self, reason: str) -> None:
        """Finish cleanly. The nursery is cancelled afterwards. Bounded by the child's stop deadline."""

    def describe(self) -> dict[str, Data]:
        """The actor's own account of its state, for people. Never a secret."""
        return {}
