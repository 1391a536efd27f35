"""The synchronous message logic that every process of the node has, supervisors included.

(Skeleton: signatures are settled, bodies follow.)

How a process uses it::

    exchange = Exchange("gate", 1, port, supervisor="root", now=..., wall=..., random=..., mailbox=..., ...)
    port.receiver = exchange          # the port calls deliver, name_down, name_up, undelivered
    exchange.on(ReadTree, handle)     # synchronous handlers, run at delivery (plain supervisors use only these)
    loop: wait for the port's descriptor at most until exchange.next_timer(); exchange.handle_timers(now())

Whatever has neither an `on` handler nor is answered by the exchange itself goes to the mailbox, if there is one
(`wake` is called when it was empty before), and is refused with code `not-understood` otherwise.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection
from typing import Any, TypeVar

from protocol.messages import Data, Descriptor, Envelope, Message, MessageId, Request
from protocol.messages.system import DeadLetter, JournalEntry, Sample
from supervisor.errors import AskError, RefusedError
from supervisor.mailbox import Incoming, Mailbox
from supervisor.metrics import Registry
from supervisor.port import Port

M = TypeVar("M", bound=Message)
R = TypeVar("R")

Answer = Callable[[Message | AskError], None]
"""Called once with the answer of a request, or with the reason why there is none."""


class Timer:
    """A callback that is due at `when`; `cancel` makes it never happen."""

    when: float

    def cancel(self) -> None:
        """Do not call back. Harmless when it was called already."""
        raise NotImplementedError


class Exchange:
    """See the module. Implements :class:`supervisor.port.Receiver`.

    Arguments:
        name, incarnation: who this is; message ids are `<name>:<incarnation>:<n>`.
        port: carries the envelopes.
        supervisor: the only one whose `Stop` is obeyed ("" = anybody's).
        now, wall: the clocks (CLOCK_MONOTONIC seconds; seconds since the epoch).
        random: seeded; used for nothing secret.
        mailbox: where messages for the actor wait; None: everything must have an `on` handler.
        understands: the kinds that the actor has handlers for; None: all.
        wake: called after the mailbox got an item.
        describe: what `Describe` is answered with.
        on_stop: called with the reason when `Stop` arrives.
        set_log_level: called with (level, seconds or None); may raise RefusedError.
        crash: what a crash fault does (real: SIGKILL to oneself). hang: what `Hang` does (real: never return).
        allow_faults: whether `SetFaults` and `Hang` are obeyed.
        timer_changed: called with the new earliest moment whenever `next_timer()` became earlier.
    """

    metrics: Registry
    handled: int
    """Messages that the actor has finished handling (kept by whoever dispatches; reported in `Pong`)."""

    def __init__(
        self,
        name: str,
        incarnation: int,
        port: Port,
        *,
        now: Callable[[], float],
        wall: Callable[[], float],
        random: random.Random,
        supervisor: str = "",
        mailbox: Mailbox[Incoming] | None = None,
        understands: Collection[str] | None = None,
        wake: Callable[[], None] | None = None,
        describe: Callable[[], dict[str, Data]] | None = None,
        on_stop: Callable[[str], None] | None = None,
        set_log_level: Callable[[str, float | None], None] | None = None,
        crash: Callable[[], None] | None = None,
        hang: Callable[[], None] | None = None,
        allow_faults: bool = False,
        timer_changed: Callable[[float], None] | None = None,
        metrics: Registry | None = None,
    ) -> None:
        raise NotImplementedError

    # Sending

    def tell(self, target: str, message: Message, *, cause: MessageId | None = None) -> MessageId:
        """Send and forget; what cannot be delivered becomes a dead letter. Closes the message's descriptors."""
        raise NotImplementedError

    def ask(
        self, target: str, request: Request[Any], *, timeout: float, answer: Answer, cause: MessageId | None = None
    ) -> MessageId:
        """Send a request; `answer` is called exactly once, never before this returns, unless `forget` comes first.

        Raises:
            AskError: it is known at once that there will be no answer (NoSuchActor, ActorRestarting, Refused).
        """
        raise NotImplementedError

    def forget(self, request: MessageId) -> None:
        """The asker no longer wants the answer."""
        raise NotImplementedError

    def answer(self, request: Envelope, message: Message) -> None:
        """Answer a request that arrived."""
        raise NotImplementedError

    def refuse(self, request: Envelope, refusal: RefusedError) -> None:
        """Refuse a request that arrived."""
        raise NotImplementedError

    # Receiving

    def on(self, message: type[M], function: Callable[[M, Envelope], None]) -> None:
        """Handle this class at delivery, ahead of the mailbox. The function answers requests itself, now or later."""
        raise NotImplementedError

    def watch(self, name: str) -> None:
        """Get ActorDown and ActorUp for this name (by `on` handler or mailbox)."""
        raise NotImplementedError

    def when_ready(self, name: str, function: Callable[[], None]) -> None:
        """Call once as soon as the name is ready (at once if it is)."""
        raise NotImplementedError

    def deliver(self, envelope: Envelope, descriptors: list[Descriptor]) -> None:
        """Receiver: an envelope arrived."""
        raise NotImplementedError

    def name_down(self, name: str, reason: str) -> None:
        """Receiver: pending requests to this name fail with ActorRestartingError; watchers get ActorDown."""
        raise NotImplementedError

    def name_up(self, name: str, incarnation: int) -> None:
        """Receiver: watchers get ActorUp."""
        raise NotImplementedError

    def undelivered(self, envelope: Envelope, reason: str) -> None:
        """Receiver: a queued envelope became a dead letter; its pending request fails."""
        raise NotImplementedError

    # Timers

    def call_at(self, when: float, function: Callable[[], None]) -> Timer:
        """Call back at this moment of `now`, from `handle_timers`."""
        raise NotImplementedError

    def next_timer(self) -> float | None:
        """The moment at which `handle_timers` must be called next, or None."""
        raise NotImplementedError

    def handle_timers(self, now: float) -> None:
        """Run everything that is due."""
        raise NotImplementedError

    # Looking in

    def journal(self, ids: Collection[str] = ()) -> tuple[JournalEntry, ...]:
        """The heads of messages sent or received lately, oldest first; only those with these ids, if any are given."""
        raise NotImplementedError

    def dead_letters(self) -> tuple[DeadLetter, ...]:
        """The last messages of this actor that reached nobody."""
        raise NotImplementedError

    def samples(self) -> tuple[Sample, ...]:
        """All metrics of this actor, the exchange's own included."""
        raise NotImplementedError

    def close(self) -> None:
        """Forget pending requests and timers; close descriptors that wait in the mailbox."""
        raise NotImplementedError
