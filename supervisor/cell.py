"""Hosts one actor under trio: its context, its dispatch loop, its life.

Theory of operation. A cell has three tasks whatever the actor does: one runs the actor's life (`start`, then dispatch),
one keeps the exchange's timers, one waits for the wish to stop. A message costs one wake-up: whoever reads the port
calls `Exchange.deliver`, which wakes the dispatching task if the message is for the actor; the handler runs in
that very task. An answer wakes the task that asks, directly, without passing through the dispatching task. Only
`concurrent` handlers get tasks of their own, at most `mailbox_limit` of them at a time.

The message being handled is held by a context variable, which trio hands on to every task started by a handler; so
what a handler's tasks send later still names its cause.
"""

from __future__ import annotations

import contextvars
import math
import os
import random
import traceback
from collections.abc import Awaitable, Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

import trio

from protocol.errors import PeerupError
from protocol.messages import Data, Descriptor, Envelope, Message, MessageId, Request
from protocol.messages.system import LastWords, Ok, Ready, SaveCheckpoint
from supervisor.actor import Actor, Checkpoint, HandlerEntry
from supervisor.authority import Authority
from supervisor.errors import AskError, DeadlineExceededError, RefusedError
from supervisor.exchange import Exchange
from supervisor.log_library import logger
from supervisor.mailbox import Incoming, Mailbox
from supervisor.metrics import Registry
from supervisor.port import Port

if TYPE_CHECKING:
    import loguru

    from supervisor.actor import Context

R = TypeVar("R")

_current: contextvars.ContextVar[Incoming | None] = contextvars.ContextVar("current message", default=None)

_FAIRNESS = 64
"""Messages handled in a row before other tasks get a turn, for handlers that never wait."""

_FAILURE_LENGTH = 600
"""Characters of a failure's text that reach the supervisor."""


class TimeKeeper:
    """The trio task that runs an exchange's timers. `changed` belongs into the exchange as `timer_changed`."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._scope: trio.CancelScope | None = None

    def changed(self, when: float) -> None:
        """An earlier timer was made."""
        if self._scope is not None:
            self._scope.deadline = self._trio_time(when)

    async def run(self, exchange: Exchange, before: Callable[[], Awaitable[None]] | None = None) -> None:
        """Run timers until cancelled; `before` is awaited each time before any of them."""
        while True:
            with trio.CancelScope() as scope:
                when = exchange.next_timer()
                scope.deadline = math.inf if when is None else self._trio_time(when)
                self._scope = scope
                await trio.sleep_forever()
            self._scope = None
            if before is not None:
                await before()
            exchange.handle_timers(self._now())

    def _trio_time(self, when: float) -> float:
        return trio.current_time() + (when - self._now())


class Cell:
    """Runs one actor over one port.

    It makes the exchange (attribute `exchange`; attach it to the port as receiver before `run`). `run` is the
    actor's whole life: `start`, then `on_ready` with what it returned, then dispatch until `request_stop` or `Stop`,
    then `stop`, then it cancels what is left and returns. An unhandled exception of the actor is told to the supervisor
    (`LastWords`) and leaves `run` as it is (in an ExceptionGroup when trio made one;
    :func:`failure_text` makes one line of it). An actor that cancels its own nursery ends normally.

    Whoever runs it keeps calling the port in the same trio run, from before `run` until after it; timers of the
    exchange are driven by the cell itself.

    Arguments:
        actor: its `context` is set here.
        operators: names of those who may look into it and disturb it, see :mod:`supervisor.authority`.
        name, incarnation, port, supervisor, now, wall, random, set_log_level, crash, hang, allow_faults: as for
            :class:`~supervisor.exchange.Exchange`.
        log: the process's logger, bound to the actor's name.
        on_ready: called with what `start` returned; None: tell the supervisor `Ready`.
        confinement: what the kernel enforces on the process, for the supervisor to know.
    """

    def __init__(
        self,
        actor: Actor,
        name: str,
        incarnation: int,
        port: Port,
        *,
        supervisor: str,
        now: Callable[[], float],
        wall: Callable[[], float],
        random: random.Random,
        log: loguru.Logger | None = None,
        set_log_level: Callable[[str | None], None] | None = None,
        crash: Callable[[], None] | None = None,
        hang: Callable[[], None] | None = None,
        allow_faults: bool = False,
        operators: Collection[str] = (),
        on_ready: Callable[[dict[str, Data]], None] | None = None,
        confinement: str = "",
    ) -> None:
        self.actor = actor
        self._confinement = confinement
        self.log = log if log is not None else logger.bind(actor=name)
        self._time = TimeKeeper(now)
        self.exchange = Exchange(
            name,
            incarnation,
            port,
            supervisor=supervisor,
            authority=Authority(supervisor, operators),
            now=now,
            wall=wall,
            random=random,
            mailbox=Mailbox(actor.mailbox_limit, actor.overflow),
            understands=actor.handlers.keys(),
            wake=self._wake,
            busy=self._oldest,
            describe=actor.describe,
            on_stop=self.request_stop,
            set_log_level=set_log_level,
            crash=crash,
            hang=hang,
            allow_faults=allow_faults,
            timer_changed=self._time.changed,
            metrics=Registry(),
        )
        self._on_ready = on_ready if on_ready is not None else self._tell_ready
        self._nursery: trio.Nursery | None = None
        self._stop = trio.Event()
        self._stop_reason = ""
        self._started = False
        self._dispatcher: trio.lowlevel.Task | None = None
        self._concurrent = 0
        self._running: dict[str, tuple[Envelope, float]] = {}  # in the order in which their handling began
        actor.context = cast("Context", CellContext(self))

    async def run(self, checkpoint: Checkpoint | None) -> None:
        """The actor's life, see the class."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                nursery.start_soon(self._time.run, self.exchange)
                nursery.start_soon(self._live, checkpoint)
                await self._stop.wait()
                if self._started:
                    await self.actor.stop(self._stop_reason)
                nursery.cancel_scope.cancel()
        except Exception as error:
            code, reason = failure_text(error)
            if self.exchange.supervisor:
                self.exchange.tell(self.exchange.supervisor, LastWords(self.exchange.incarnation, code, reason))
            raise
        finally:
            self.exchange.close()

    def request_stop(self, reason: str) -> None:
        """Stop as if the supervisor had said so (SIGTERM does this). Harmless when it is stopping already."""
        if not self._stop.is_set():
            self._stop_reason = reason
            self._stop.set()

    @property
    def nursery(self) -> trio.Nursery:
        """Lives as long as the actor."""
        if self._nursery is None:
            raise RuntimeError("the actor does not run yet")
        return self._nursery

    # The three tasks

    async def _live(self, checkpoint: Checkpoint | None) -> None:
        ready = await self.actor.start(self._usable(checkpoint))
        self._started = True
        self._on_ready(ready)
        self.log.debug("ready")
        await self._dispatch()

    def _usable(self, checkpoint: Checkpoint | None) -> Checkpoint | None:
        if checkpoint is None or checkpoint.version == self.actor.checkpoint_version:
            return checkpoint
        self.log.warning(
            "starting without the checkpoint: it is of version {}, this program reads version {}",
            checkpoint.version,
            self.actor.checkpoint_version,
        )
        for descriptor in checkpoint.descriptors:
            descriptor.close()
        return None

    async def _dispatch(self) -> None:
        exchange = self.exchange
        handlers = self.actor.handlers
        limit = self.actor.mailbox_limit
        in_a_row = 0
        while True:
            item = exchange.take() if self._concurrent < limit and not self._stop.is_set() else None
            if item is None:
                in_a_row = 0
                await self._park()
                continue
            entry = handlers[item.envelope.kind]
            if entry.concurrent:
                self._concurrent += 1
                self.nursery.start_soon(self._handle_concurrently, item, entry)
            else:
                await self._handle(item, entry)
            in_a_row += 1
            if in_a_row >= _FAIRNESS:
                in_a_row = 0
                await trio.lowlevel.checkpoint()

    # Handling

    async def _handle(self, item: Incoming, entry: HandlerEntry) -> None:
        _current.set(item)
        exchange = self.exchange
        self._running[item.envelope.id] = item.envelope, exchange.now()
        try:
            answer = await entry.function(self.actor, item.message)
        except RefusedError as refusal:
            exchange.refuse(item.envelope, refusal)
        else:
            if isinstance(item.message, Request):
                exchange.answer(item.envelope, Ok() if answer is None else answer)
        finally:
            self._running.pop(item.envelope.id, None)  # a fault may have brought it twice
        exchange.handled += 1

    async def _handle_concurrently(self, item: Incoming, entry: HandlerEntry) -> None:
        try:
            await self._handle(item, entry)
        finally:
            self._concurrent -= 1
            self._wake()

    def _oldest(self) -> tuple[Envelope, float] | None:
        return next(iter(self._running.values()), None)

    async def _park(self) -> None:
        self._dispatcher = trio.lowlevel.current_task()

        def abort(_: object) -> trio.lowlevel.Abort:
            self._dispatcher = None
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)

    def _wake(self) -> None:
        task, self._dispatcher = self._dispatcher, None
        if task is not None:
            trio.lowlevel.reschedule(task)

    def _tell_ready(self, state: dict[str, Data]) -> None:
        self.exchange.tell(self.exchange.supervisor, Ready(self.exchange.incarnation, state, self._confinement))


class CellContext:
    """Implements :class:`supervisor.actor.Context` for the actor of a cell."""

    __slots__ = ("_cell", "_exchange")

    def __init__(self, cell: Cell) -> None:
        self._cell = cell
        self._exchange = cell.exchange

    @property
    def name(self) -> str:
        """The registered name."""
        return self._exchange.name

    @property
    def incarnation(self) -> int:
        """1 for the first process under this name."""
        return self._exchange.incarnation

    @property
    def supervisor(self) -> str:
        """The name of the supervisor."""
        return self._exchange.supervisor

    @property
    def nursery(self) -> trio.Nursery:
        """Lives as long as the actor."""
        return self._cell.nursery

    @property
    def random(self) -> random.Random:
        """Seeded by the runtime."""
        return self._exchange.random

    @property
    def log(self) -> loguru.Logger:
        """Bound to the actor and to the message being handled."""
        item = _current.get()
        return self._cell.log if item is None else self._cell.log.bind(message=item.envelope.id)

    @property
    def metrics(self) -> Registry:
        """The actor's counters."""
        return self._exchange.metrics

    def now(self) -> float:
        """Seconds of CLOCK_MONOTONIC."""
        return self._exchange.now()

    def wall(self) -> float:
        """Seconds since the Unix epoch."""
        return self._exchange.wall()

    def tell(self, target: str, message: Message) -> None:
        """Send and forget."""
        item = _current.get()
        self._exchange.tell(target, message, cause=None if item is None else item.envelope.id)

    async def ask(self, target: str, request: Request[R], *, timeout: float) -> R:  # noqa: ASYNC109  # the contract
        """Send a request and wait for its answer; cancelling forgets the request."""
        exchange = self._exchange
        task = trio.lowlevel.current_task()
        item = _current.get()
        outcome: Message | AskError | None = None

        def answered(message: Message | AskError) -> None:
            nonlocal outcome
            outcome = message
            trio.lowlevel.reschedule(task)

        try:
            ident = exchange.ask(
                target, request, timeout=timeout, answer=answered, cause=None if item is None else item.envelope.id
            )
        except AskError:
            await trio.lowlevel.checkpoint()  # a loop that tries again must let others run
            raise

        def abort(_: object) -> trio.lowlevel.Abort:
            exchange.forget(ident)
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)
        if isinstance(outcome, AskError):
            raise outcome
        return cast("R", outcome)

    def watch(self, name: str) -> None:
        """From now on get ActorDown and ActorUp for this name."""
        self._exchange.watch(name)

    async def wait_for(self, name: str, *, timeout: float) -> None:  # noqa: ASYNC109  # the contract
        """Return as soon as an actor of this name is ready."""
        ready = trio.Event()
        take_back = self._exchange.when_ready(name, ready.set)
        if ready.is_set():
            await trio.lowlevel.checkpoint()
            return
        try:
            with trio.fail_after(timeout):
                await ready.wait()
        except trio.TooSlowError:
            raise DeadlineExceededError(f"{name} was not ready within {timeout:g} s") from None
        finally:
            take_back()

    def checkpoint(self, state: dict[str, Data], descriptors: Sequence[int] = ()) -> None:
        """Leave this with the supervisor for a successor."""
        copies = tuple(Descriptor(os.dup(fd)) for fd in descriptors)
        self._exchange.tell(
            self._exchange.supervisor, SaveCheckpoint(state, copies, self._cell.actor.checkpoint_version)
        )

    @property
    def current_message(self) -> MessageId | None:
        """The message whose handling this task belongs to."""
        item = _current.get()
        return None if item is None else item.envelope.id

    @property
    def current_sender(self) -> str:
        """Who sent the message being handled; empty outside a handler."""
        item = _current.get()
        return "" if item is None else item.envelope.sender


UNFORESEEN = "crash"
"""The code of a failure that is no :class:`~protocol.errors.PeerupError`: a defect."""


def failure_text(error: BaseException) -> tuple[str, str]:
    """(code, one line for people) for an exception or group: the class, the text and where it was raised.

    Of a group the first foreseen or unforeseen failure counts, not the cancellations that it caused.
    """
    leaf = _leaf(error)
    code = leaf.code if isinstance(leaf, PeerupError) else UNFORESEEN
    frames = traceback.extract_tb(leaf.__traceback__)
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno} in {frames[-1].name})" if frames else ""
    said = "".join(char if char.isprintable() else "?" for char in " ".join(str(leaf).split()))
    if isinstance(leaf, PeerupError):
        return code, said[:_FAILURE_LENGTH] or type(leaf).__name__
    return code, f"{type(leaf).__name__}: {said[:_FAILURE_LENGTH]}{place}"


def _leaf(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        inner = [one for one in error.exceptions if not isinstance(one, trio.Cancelled)]
        error = (inner or list(error.exceptions))[0]
    return error
