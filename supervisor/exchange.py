"""The synchronous message logic that every process of the node has, supervisors included.

Theory of operation. An exchange stands between a :class:`~supervisor.port.Port`, which carries envelopes, and whoever
acts on messages: a :class:`~supervisor.cell.Cell` (an actor under trio) or an
:class:`~supervisor.overseer.Overseer` (a supervisor, plain). It never waits and never does I/O of its own; time
enters through `now`, and whatever must happen later is a timer that the process's loop drives::

    exchange = Exchange("gate", 1, port, supervisor="root", now=..., wall=..., random=..., ...)
    port.receiver = exchange          # the port calls deliver, name_down, name_up, undelivered
    exchange.on(ReadTree, handle)     # synchronous handlers, run at delivery (plain supervisors use only these)
    loop: wait for the port's descriptor at most until exchange.next_timer(); exchange.handle_timers(now())

A delivered envelope goes one of these ways, in this order:

1. it carries `reply_to`: it resolves the pending request, if the one who was asked sent it;
2. its sender may not send that kind: it is refused with code `sender-not-allowed` (:mod:`supervisor.authority`);
3. its kind has an `on` handler: that runs at once, ahead of the mailbox (pings, metrics, journal, taps, ... are such);
4. the actor understands its kind: it waits in the mailbox, whose overflow policy says what happens when it is full;
5. otherwise it is refused with code `not-understood`.

Delivery is at most once. A request ends in exactly one of: its answer, a refusal, `actor-restarting` (the target's
process ended), `no-such-actor`, `deadline-exceeded`, or the asker forgot it. What could not be delivered is kept as a
dead letter of its sender; a refusal of a message that was told, not asked, makes one too.
"""

from __future__ import annotations

import collections
import functools
import itertools
import random
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar

from protocol.messages import (
    Data,
    Descriptor,
    Envelope,
    Message,
    MessageError,
    MessageId,
    Request,
    decode_body,
    encode_body,
)
from protocol.messages.codec import is_kind, kinds
from protocol.messages.system import (
    ActorDown,
    ActorUp,
    CollectMetrics,
    DeadLetter,
    DeadLetters,
    Describe,
    Description,
    FaultAction,
    FaultRule,
    FaultsInForce,
    Hang,
    Journal,
    JournalEntry,
    MetricsSnapshot,
    Ok,
    Overflow,
    Ping,
    Pong,
    ReadDeadLetters,
    ReadFaults,
    ReadJournal,
    Refusal,
    Sample,
    SetFaults,
    SetLogLevel,
    SetTaps,
    Stop,
    Tapped,
    TapRule,
    Work,
)
from supervisor import authority
from supervisor.authority import Authority
from supervisor.edges import Edges
from supervisor.errors import (
    ActorNotReadyError,
    ActorRestartingError,
    AskError,
    DeadlineExceededError,
    NoSuchActorError,
    RefusedError,
)
from supervisor.mailbox import Incoming, Mailbox
from supervisor.metrics import Registry
from supervisor.port import NameState, NotDeliveredError, Port
from supervisor.timers import Timer, Timers

M = TypeVar("M", bound=Message)

Answer = Callable[[Message | AskError], None]
"""Called once with the answer of a request, or with the reason why there is none."""

JOURNAL_LIMIT = 1024
"""Entries kept: minutes of a busy control plane, in about a quarter of a megabyte."""

DEAD_LETTER_LIMIT = 256
"""Dead letters kept; older ones are only counted."""

ABANDONED = 64
"""Requests that nobody waits for any more and whose late refusals are known to be that, and no dead letters."""

UNRECORDED = frozenset((Ping.KIND, Pong.KIND, Tapped.KIND, ReadJournal.KIND, Journal.KIND))
"""Kinds that stay out of the journal, because they would push out everything else."""

_UNDELIVERABLE = frozenset(("mailbox-full", "not-understood", authority.CODE))
"""Codes of refusals that mean: nobody has read the message."""

_Head = tuple[str, str | None, str | None, str, str, str, float]


class _Pending:
    """A request that waits for its answer."""

    __slots__ = ("answer", "asked_at", "cause", "expected", "target", "timer")

    def __init__(
        self,
        target: str,
        answer: Answer,
        expected: type[Message],
        timer: Timer,
        *,
        cause: MessageId | None,
        asked_at: float,
    ) -> None:
        self.target = target
        self.cause = cause
        self.asked_at = asked_at
        self.answer = answer
        self.expected = expected
        self.timer = timer


class Exchange:
    """See the module. Implements :class:`supervisor.port.Receiver`.

    Arguments:
        name, incarnation: who this is; message ids are `<name>:<incarnation>-<epoch>:<n>`. The epoch is drawn anew by
            each exchange, so that no id is ever used twice, whoever forgot which incarnation was the last.
        port: carries the envelopes.
        supervisor: the name of its supervisor; "" for a process beside the tree.
        authority: who may send what; None: only the supervisor may do what not everybody may.
        now, wall: the clocks (CLOCK_MONOTONIC seconds; seconds since the epoch).
        random: seeded; used for nothing secret.
        mailbox: where messages for the actor wait; None: everything must have an `on` handler.
        understands: the kinds that the actor has handlers for; None: all.
        wake: called after the mailbox got an item.
        busy: the message that has been handled for longest, and since when; None if none is.
        describe: what `Describe` is answered with.
        on_stop: called with the reason when `Stop` arrives.
        set_log_level: called with a level, or with None for the configuration's; may raise RefusedError.
        crash: what a crash fault does (real: SIGKILL to oneself). hang: what `Hang` does (real: never return).
        allow_faults: whether `SetFaults` and `Hang` are obeyed.
        timer_changed: called with the new earliest moment whenever `next_timer()` became earlier.
        metrics: the actor's own series, which the exchange reports together with its own.

    Attributes:
        authority: who may send what; whoever makes the exchange may replace it before the first message.
        handled: messages that the actor has finished handling; kept by whoever dispatches, reported in `Pong`.
        refusals: what the transport refused, by reason; set by whoever made the transport.
    """

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
        authority: Authority | None = None,
        mailbox: Mailbox[Incoming] | None = None,
        understands: Collection[str] | None = None,
        wake: Callable[[], None] | None = None,
        busy: Callable[[], tuple[Envelope, float] | None] | None = None,
        describe: Callable[[], dict[str, Data]] | None = None,
        on_stop: Callable[[str], None] | None = None,
        set_log_level: Callable[[str | None], None] | None = None,
        crash: Callable[[], None] | None = None,
        hang: Callable[[], None] | None = None,
        allow_faults: bool = False,
        timer_changed: Callable[[float], None] | None = None,
        metrics: Registry | None = None,
    ) -> None:
        self.name = name
        self.incarnation = incarnation
        self.supervisor = supervisor
        self.now = now
        self.wall = wall
        self.random = random
        self.allow_faults = allow_faults
        self.authority = authority if authority is not None else Authority(supervisor)
        self.metrics = metrics if metrics is not None else Registry()
        self.handled = 0
        self.refusals: Mapping[str, int] = {}
        self._port = port
        self._mailbox = mailbox
        self._understands = None if understands is None else frozenset(understands)
        self._wake = wake
        self._busy = busy
        self._describe = describe
        self._on_stop = on_stop
        self._set_log_level = set_log_level
        self._crash = crash
        self._hang = hang
        self._prefix = f"{name}:{incarnation}-{_epoch(random)}:"
        self._numbers = itertools.count(1)
        self._timers = Timers(timer_changed)
        self._pending: dict[MessageId, _Pending] = {}
        self._abandoned: collections.deque[MessageId] = collections.deque(maxlen=ABANDONED)
        self._control: dict[str, Callable[[Any, Envelope], None]] = {}
        self._journal: collections.deque[_Head] = collections.deque(maxlen=JOURNAL_LIMIT)
        self._dead: collections.deque[DeadLetter] = collections.deque(maxlen=DEAD_LETTER_LIMIT)
        self._dead_count = 0
        self._sent: dict[str, int] = {}
        self._received: dict[str, int] = {}
        self._watched: set[str] = set()
        self._ready_waiters: dict[str, list[Callable[[], None]]] = {}
        self._edges: Edges | None = None
        self._edges_idle: Edges | None = None  # kept for its counts when no rule is left
        self._prune_timer: Timer | None = None
        self._log_timer: Timer | None = None
        self._register_system_messages()

    # Sending

    def tell(self, target: str, message: Message, *, cause: MessageId | None = None) -> MessageId:
        """Send and forget; what cannot be delivered becomes a dead letter. Closes the message's descriptors.

        Raises:
            MessageError: the message cannot be encoded: a defect of the caller.
        """
        body, descriptors = encode_body(message)
        envelope = Envelope(self._next_id(), cause, None, self.name, target, message.KIND, None, body)
        failure = self._post(envelope, descriptors)
        if failure is not None:
            self._bury(_head(envelope, self.now()), str(failure))
        return envelope.id

    def ask(
        self, target: str, request: Request[Any], *, timeout: float, answer: Answer, cause: MessageId | None = None
    ) -> MessageId:
        """Send a request; `answer` is called exactly once, never before this returns, unless `forget` comes first.

        Raises:
            AskError: it is known at once that there will be no answer (NoSuchActor, ActorRestarting, Refused).
            MessageError: the request cannot be encoded: a defect of the caller.
        """
        body, descriptors = encode_body(request)
        ident = self._next_id()
        now = self.now()
        deadline = now + timeout
        envelope = Envelope(ident, cause, None, self.name, target, request.KIND, deadline, body)
        timer = self._timers.call_at(deadline, functools.partial(self._expired, ident))
        self._pending[ident] = _Pending(target, answer, _answer_class(type(request)), timer, cause=cause, asked_at=now)
        failure = self._post(envelope, descriptors)
        if failure is not None:
            self.forget(ident)
            self._bury(_head(envelope, self.now()), str(failure))
            raise self._not_delivered(target, str(failure)) from failure
        return ident

    def forget(self, request: MessageId) -> None:
        """The asker no longer wants the answer. Harmless when it has come."""
        pending = self._pending.pop(request, None)
        if pending is not None:
            pending.timer.cancel()
            self._abandoned.append(request)

    def answer(self, request: Envelope, message: Message) -> None:
        """Answer a request that arrived. An answer that cannot be delivered is a dead letter of this actor."""
        body, descriptors = encode_body(message)
        envelope = Envelope(
            self._next_id(), request.id, request.id, self.name, request.sender, message.KIND, None, body
        )
        failure = self._post(envelope, descriptors)
        if failure is not None:
            self._bury(_head(envelope, self.now()), str(failure))

    def refuse(self, request: Envelope, refusal: RefusedError) -> None:
        """Refuse a request that arrived."""
        self.answer(request, Refusal(refusal.code, refusal.reason, refusal.action))

    # Receiving

    def on(self, message: type[M], function: Callable[[M, Envelope], None]) -> None:
        """Handle this class at delivery, ahead of the mailbox. The function answers requests itself, now or later.

        The last function given for a class is the one in force.
        """
        self._control[message.KIND] = function

    def take(self) -> Incoming | None:
        """The next message for the actor, or None. Requests whose asker has stopped waiting are passed over."""
        mailbox = self._mailbox
        if mailbox is None:
            return None
        while (item := mailbox.take()) is not None:
            deadline = item.envelope.deadline
            if deadline is None or deadline > self.now():
                return item
        return None

    def watch(self, name: str) -> None:
        """Get ActorDown and ActorUp for this name from now on (by `on` handler or mailbox)."""
        if name not in self._watched:
            self._watched.add(name)
            self._port.watch(name)

    def when_ready(self, name: str, function: Callable[[], None]) -> Callable[[], None]:
        """Call once as soon as the name is ready (at once if it is). The result takes the wish back."""
        self._port.watch(name)
        if self._port.state(name) is NameState.READY:
            function()
            return lambda: None
        waiters = self._ready_waiters.setdefault(name, [])
        waiters.append(function)

        def take_back() -> None:
            if function in waiters:
                waiters.remove(function)

        return take_back

    def state(self, name: str) -> NameState:
        """What the registry says of this name now."""
        return self._port.state(name)

    def deliver(self, envelope: Envelope, descriptors: list[Descriptor]) -> None:
        """Receiver: an envelope arrived."""
        kind = envelope.kind
        counted = kind if is_kind(kind) else "unknown"  # a sender gone wrong must not make up series
        self._received[counted] = self._received.get(counted, 0) + 1
        if kind not in UNRECORDED:
            self._journal.append(_head(envelope, self.now()))
        if self._edges is not None and self._edges.crashes(envelope):
            if self._crash is None:
                raise RuntimeError(f"a fault rule makes {self.name} crash on {envelope.id}")
            self._crash()
            return
        if envelope.reply_to is not None:
            self._answered(envelope, descriptors)
            return
        not_allowed = self.authority.refusal(self.name, kind, envelope.sender)
        if not_allowed is not None:
            self.metrics.counter("peerup_messages_not_allowed_total", kind=kind).inc()
            self.refuse(envelope, not_allowed)
            return
        control = self._control.get(kind)
        if control is None and (
            self._mailbox is None or (self._understands is not None and kind not in self._understands)
        ):
            self.refuse(envelope, RefusedError("not-understood", f"{self.name} does not understand {kind}"))
            return
        try:
            message = decode_body(kind, envelope.body, descriptors)
        except MessageError as error:
            self.refuse(envelope, RefusedError(error.code, str(error)))
            return
        if control is not None:
            control(message, envelope)
            return
        self._enqueue(Incoming(message, envelope))

    def name_down(self, name: str, reason: str) -> None:
        """Receiver: pending requests to this name fail with ActorRestartingError; who watches it gets ActorDown."""
        for ident in [ident for ident, pending in self._pending.items() if pending.target == name]:
            self._resolve(ident, ActorRestartingError(f"{name} ended before it answered: {reason}"))
        if name in self._watched:
            self._notice(name, ActorDown(name, reason))

    def link_lost(self, name: str, reason: str) -> None:
        """Receiver: pending requests to this name fail; whether they were carried out is not known."""
        for ident in [ident for ident, pending in self._pending.items() if pending.target == name]:
            self._resolve(ident, RefusedError("not-delivered", f"{name} did not answer: {reason}", "try again"))

    def descriptors_lost(self, envelope: Envelope) -> None:
        """Receiver: the message is a dead letter, and who sent it or waits for it hears so at once."""
        reason = f"{self.name} has no descriptor left to take what comes with a message"
        self._bury(_head(envelope, self.now()), reason)
        refusal = RefusedError("no-descriptors", reason, "close what is not needed, or raise the limit (ulimit -n)")
        if envelope.reply_to is None:
            self.refuse(envelope, refusal)
        elif (pending := self._pending.get(envelope.reply_to)) is not None and pending.target == envelope.sender:
            self._resolve(envelope.reply_to, refusal)

    def name_up(self, name: str, incarnation: int) -> None:
        """Receiver: who watches this name gets ActorUp, who waits for it goes on."""
        for function in self._ready_waiters.pop(name, ()):
            function()
        if name in self._watched:
            self._notice(name, ActorUp(name, incarnation))

    def undelivered(self, envelope: Envelope, reason: str) -> None:
        """Receiver: a queued envelope became a dead letter; its pending request fails."""
        self._bury(_head(envelope, self.now()), reason)
        self._resolve(envelope.id, self._not_delivered(envelope.target, reason))

    # Timers

    def call_at(self, when: float, function: Callable[[], None]) -> Timer:
        """Call back at this moment of `now`, from `handle_timers`."""
        return self._timers.call_at(when, function)

    def call_later(self, seconds: float, function: Callable[[], None]) -> Timer:
        """Call back so many seconds from now, from `handle_timers`."""
        return self._timers.call_at(self.now() + seconds, function)

    def next_timer(self) -> float | None:
        """The moment at which `handle_timers` must be called next, or None."""
        return self._timers.next()

    def handle_timers(self, now: float) -> None:
        """Run everything that is due."""
        self._timers.run(now)

    # Looking in

    @property
    def taps(self) -> tuple[TapRule, ...]:
        """The taps now in force."""
        return () if self._edges is None else self._edges.taps

    @property
    def faults(self) -> tuple[FaultRule, ...]:
        """The message faults now in force."""
        return () if self._edges is None else self._edges.faults

    def journal(self, ids: Collection[str] = ()) -> tuple[JournalEntry, ...]:
        """The heads of messages sent or received lately, oldest first; only those with these ids, if any are given."""
        wanted = frozenset(ids)
        return tuple(JournalEntry(*head) for head in self._journal if not wanted or head[0] in wanted)

    def dead_letters(self) -> DeadLetters:
        """The last messages of this actor that reached nobody, oldest first."""
        return DeadLetters(tuple(self._dead), self._dead_count - len(self._dead), dict(self.refusals))

    def samples(self) -> tuple[Sample, ...]:
        """All metrics of this actor, the exchange's own included."""
        own = [
            Sample("peerup_messages_sent_total", "counter", {"kind": kind}, float(count))
            for kind, count in sorted(self._sent.items())
        ]
        own += [
            Sample("peerup_messages_received_total", "counter", {"kind": kind}, float(count))
            for kind, count in sorted(self._received.items())
        ]
        own.append(Sample("peerup_dead_letters_total", "counter", {}, float(self._dead_count)))
        own += [
            Sample("peerup_transport_refusals_total", "counter", {"reason": reason}, float(count))
            for reason, count in sorted(self.refusals.items())
        ]
        if self._mailbox is not None:
            own.append(Sample("peerup_mailbox_depth", "gauge", {}, float(len(self._mailbox))))
            own.append(Sample("peerup_mailbox_dropped_total", "counter", {}, float(self._mailbox.dropped)))
        own.append(Sample("peerup_faults_active", "gauge", {}, float(len(self.faults))))
        edges = self._edges or self._edges_idle
        for action in FaultAction:
            hits = 0 if edges is None else edges.hit.get(action, 0)
            if hits:
                own.append(Sample("peerup_faults_hit_total", "counter", {"action": action.value}, float(hits)))
        return (*own, *self.metrics.samples())

    def close(self) -> None:
        """Forget pending requests and timers, and let go of the descriptors in waiting messages."""
        self._pending.clear()
        self._ready_waiters.clear()
        self._timers.clear()
        if self._mailbox is not None:
            self._mailbox.clear()

    # Inside

    def _next_id(self) -> MessageId:
        return MessageId(f"{self._prefix}{next(self._numbers)}")

    def _post(self, envelope: Envelope, descriptors: list[Descriptor]) -> NotDeliveredError | None:
        """Count, record and send. What the port refuses at once is returned; the descriptors are closed in any case."""
        kind = envelope.kind
        self._sent[kind] = self._sent.get(kind, 0) + 1
        if kind not in UNRECORDED:
            self._journal.append(_head(envelope, self.now()))
        if self._edges is not None and self._edges.sending(envelope, descriptors):
            return None
        try:
            self._port.send(envelope, descriptors)
        except NotDeliveredError as error:
            return error
        finally:
            for descriptor in descriptors:
                descriptor.close()
        return None

    def _transmit(self, envelope: Envelope, descriptors: list[Descriptor]) -> None:
        """Send what a fault has held up."""
        try:
            self._port.send(envelope, descriptors)
        except NotDeliveredError as error:
            # Later: whoever asks is told nothing before `ask` has returned.
            self.call_at(self.now(), functools.partial(self.undelivered, envelope, str(error)))
        finally:
            for descriptor in descriptors:
                descriptor.close()

    def _copy_to_tap(self, sink: str, copy: Tapped) -> None:
        body, _ = encode_body(copy)
        envelope = Envelope(self._next_id(), None, None, self.name, sink, copy.KIND, None, body)
        try:
            self._port.send(envelope, ())
        except NotDeliveredError:
            return  # whoever looked has gone; the tap ends by itself

    def _answered(self, envelope: Envelope, descriptors: Sequence[Descriptor]) -> None:
        request = typing.cast("MessageId", envelope.reply_to)
        pending = self._pending.get(request)
        if pending is not None and pending.target != envelope.sender:
            return  # nobody answers for another
        outcome: Message | AskError
        try:
            message = decode_body(envelope.kind, envelope.body, descriptors)
        except MessageError as error:
            outcome = RefusedError(error.code, f"the answer of {envelope.sender} cannot be read: {error}")
        else:
            if isinstance(message, Refusal):
                outcome = RefusedError(message.code, message.reason, message.action)
                if message.code in _UNDELIVERABLE or (pending is None and request not in self._abandoned):
                    self._bury_sent(request, message.reason)
            elif pending is not None and not isinstance(message, pending.expected):
                reason = f"{envelope.sender} answered with {envelope.kind} instead of {pending.expected.KIND}"
                outcome = RefusedError("bad-answer", reason)
            else:
                outcome = message
        self._resolve(request, outcome)

    def _resolve(self, request: MessageId, outcome: Message | AskError) -> None:
        pending = self._pending.pop(request, None)
        if pending is not None:
            pending.timer.cancel()
            pending.answer(outcome)

    def _expired(self, request: MessageId) -> None:
        pending = self._pending.pop(request, None)
        if pending is not None:
            self._abandoned.append(request)
            pending.answer(DeadlineExceededError(f"{pending.target} did not answer in time"))

    def _not_delivered(self, target: str, reason: str) -> AskError:
        match self._port.state(target):
            case NameState.UNKNOWN:
                return NoSuchActorError(f"there is no actor {target}")
            case NameState.STARTING:
                return ActorNotReadyError(f"{target} is being restarted")
            case NameState.READY:
                return RefusedError("not-delivered", f"{target} cannot take more messages now: {reason}")

    def _enqueue(self, item: Incoming) -> None:
        mailbox = typing.cast("Mailbox[Incoming]", self._mailbox)  # deliver has refused the message otherwise
        displaced = mailbox.put(item)
        if displaced is not None and (mailbox.overflow is Overflow.REFUSE or isinstance(displaced.message, Request)):
            reason = f"the mailbox of {self.name} is full ({mailbox.limit} messages)"
            self.refuse(displaced.envelope, RefusedError("mailbox-full", reason, "try again later"))
        if displaced is not item and self._wake is not None:
            self._wake()

    def _notice(self, about: str, message: Message) -> None:
        """Put a notice of the runtime itself before the actor; it does not count against the mailbox's limit."""
        body, _ = encode_body(message)
        envelope = Envelope(self._next_id(), None, None, about, self.name, message.KIND, None, body)
        control = self._control.get(message.KIND)
        if control is not None:
            control(message, envelope)
        elif self._mailbox is not None and (self._understands is None or message.KIND in self._understands):
            self._mailbox.force(Incoming(message, envelope))
            if self._wake is not None:
                self._wake()

    def _bury(self, head: _Head, reason: str) -> None:
        self._dead_count += 1
        self._dead.append(DeadLetter(JournalEntry(*head), reason))

    def _bury_sent(self, ident: MessageId, reason: str) -> None:
        """Make a dead letter of a message sent before, if the journal still has it."""
        for head in reversed(self._journal):
            if head[0] == ident and head[3] == self.name:
                self._bury(head, reason)
                return

    # Messages that every process answers

    def _register_system_messages(self) -> None:
        self.on(Ping, self._on_ping)
        self.on(Stop, self._on_stop_message)
        self.on(Describe, self._on_describe)
        self.on(CollectMetrics, lambda _, envelope: self.answer(envelope, MetricsSnapshot(self.samples())))
        self.on(ReadJournal, lambda request, envelope: self.answer(envelope, Journal(self.journal(request.ids))))
        self.on(ReadDeadLetters, lambda _, envelope: self.answer(envelope, self.dead_letters()))
        self.on(SetLogLevel, self._on_set_log_level)
        self.on(SetTaps, self._on_set_taps)
        self.on(SetFaults, self._on_set_faults)
        self.on(ReadFaults, lambda _, envelope: self.answer(envelope, FaultsInForce(self.faults)))
        self.on(Hang, self._on_hang)

    def _on_ping(self, _: Ping, envelope: Envelope) -> None:
        waiting = 0 if self._mailbox is None else len(self._mailbox)
        self.answer(envelope, Pong(waiting, self.handled, self._work()))

    def _work(self) -> Work | None:
        """What has been handled for longest, and whose answer that waits for."""
        oldest = None if self._busy is None else self._busy()
        if oldest is None:
            return None
        envelope, since = oldest
        now = self.now()
        for pending in self._pending.values():
            if pending.cause == envelope.id:
                return Work(envelope.kind, now - since, pending.target, now - pending.asked_at)
        return Work(envelope.kind, now - since)

    def _on_stop_message(self, message: Stop, _: Envelope) -> None:
        if self._on_stop is not None:
            self._on_stop(message.reason)

    def _on_describe(self, _: Describe, envelope: Envelope) -> None:
        self.answer(envelope, Description({} if self._describe is None else self._describe()))

    def _on_set_log_level(self, message: SetLogLevel, envelope: Envelope) -> None:
        if self._set_log_level is None:
            self.refuse(envelope, RefusedError("not-understood", f"{self.name} has no log of its own"))
            return
        restore = functools.partial(self._set_log_level, None)
        try:
            self._set_log_level(message.level)
        except RefusedError as refusal:
            self.refuse(envelope, refusal)
            return
        if self._log_timer is not None:
            self._log_timer.cancel()
            self._log_timer = None
        if message.seconds is not None:
            self._log_timer = self.call_at(self.now() + message.seconds, restore)
        self.answer(envelope, Ok())

    def _on_set_taps(self, message: SetTaps, _: Envelope) -> None:
        self._edges_in_force().set_taps(message.taps)
        self._prune_edges()

    def _on_set_faults(self, message: SetFaults, envelope: Envelope) -> None:
        if self._faults_allowed(envelope):
            self._edges_in_force().set_faults(message.faults)
            self._prune_edges()

    def _on_hang(self, _: Hang, envelope: Envelope) -> None:
        if self._faults_allowed(envelope) and self._hang is not None:
            self._hang()

    def _faults_allowed(self, envelope: Envelope) -> bool:
        if not self.allow_faults:
            action = "start the node with --allow-faults"
            self.refuse(envelope, RefusedError("faults-not-allowed", "this node does not take faults", action))
        return self.allow_faults

    def _edges_in_force(self) -> Edges:
        if self._edges is None:
            self._edges = self._edges_idle or Edges(
                self.name, self.now, self._timers, self._transmit, self._copy_to_tap
            )
            self._edges_idle = None
        return self._edges

    def _prune_edges(self) -> None:
        """Drop rules that have ended; come back when the next one ends; no rules, no cost."""
        if self._prune_timer is not None:
            self._prune_timer.cancel()
            self._prune_timer = None
        edges = self._edges
        if edges is None:
            return
        if edges.prune():
            self._edges, self._edges_idle = None, edges
            return
        ends = min([tap.until for tap in edges.taps] + [fault.until for fault in edges.faults])
        self._prune_timer = self.call_at(ends, self._prune_edges)


_EPOCH_DIGITS = "abcdefghijkmnpqrstuvwxyz23456789"
_EPOCH_LENGTH = 6


def _epoch(source: random.Random) -> str:
    """Thirty random bits, to be read and typed by people."""
    return "".join(source.choices(_EPOCH_DIGITS, k=_EPOCH_LENGTH))


def _head(envelope: Envelope, at: float) -> _Head:
    return (
        envelope.id,
        envelope.cause,
        envelope.reply_to,
        envelope.sender,
        envelope.target,
        envelope.kind,
        at,
    )


_ANSWERS: dict[type, type[Message]] = {}


def prepare() -> None:
    """Find what answers each request known to this process now, for all processes that it will fork."""
    for cls in kinds().values():
        if issubclass(cls, Request):
            _answer_class(cls)


def _answer_class(request: type[Message]) -> type[Message]:
    """The class that answers this class of requests, as its base `Request[...]` says; Message if it does not say."""
    found = _ANSWERS.get(request)
    if found is None:
        found = _ANSWERS[request] = _find_answer_class(request)
    return found


def _find_answer_class(request: type[Message]) -> type[Message]:
    for cls in request.__mro__:
        for base in getattr(cls, "__orig_bases__", ()):
            arguments = typing.get_args(base)
            if typing.get_origin(base) is Request and isinstance(arguments[0], type):
                return typing.cast("type[Message]", arguments[0])
    return Message
