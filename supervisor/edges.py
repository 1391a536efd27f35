"""Observation and fault injection on the edges between actors: what `peerup tap` and `peerup fault` put in force.

An edge is (sender, target, kind). An exchange holds one :class:`Edges` while any tap or message fault is in
force and `None` otherwise, so that an untapped message costs one comparison.

Taps and all faults but `crash` work where a message is sent, `crash` works where it is received. Rules are tried
in their order and the first that hits decides. A fault counts the messages that it matches, in each
process on its own, and draws from its seed and the actor's name, so that a run can be repeated.
"""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Callable, Sequence

from protocol.messages import Descriptor, Envelope
from protocol.messages.system import (
    EdgeFilter,
    FaultAction,
    FaultRule,
    FaultsInForce,
    ReadFaults,
    ReadTree,
    SetFaults,
    SetTaps,
    Tapped,
    TapRule,
    Tree,
)
from supervisor.timers import Timer, Timers

EXEMPT = frozenset(
    (SetFaults.KIND, SetTaps.KIND, Tapped.KIND, ReadTree.KIND, Tree.KIND, ReadFaults.KIND, FaultsInForce.KIND)
)
"""Kinds that no fault touches: those by which faults are listed and ended, so that none can prevent its own end."""

UNTAPPED = frozenset((SetFaults.KIND, SetTaps.KIND, Tapped.KIND))
"""Kinds that no tap copies, so that none watches itself."""

BODY_LIMIT = 4096
"""Bytes of a body that a tap copies; tapping is for looking, not for carrying."""


@dataclasses.dataclass(slots=True)
class _Held:
    """A message that a reorder fault keeps until the next one has gone."""

    envelope: Envelope
    descriptors: list[Descriptor]
    timer: Timer


@dataclasses.dataclass(slots=True)
class _Fault:
    rule: FaultRule
    matches: Callable[[Envelope], bool]
    random: random.Random
    seen: int = 0
    held: _Held | None = None

    def hits(self, envelope: Envelope) -> bool:
        """Whether this matching message is one to hit; counts it."""
        self.seen += 1
        if self.rule.nth is not None:
            return self.seen == self.rule.nth
        return self.random.random() < self.rule.probability


@dataclasses.dataclass(slots=True)
class _Tap:
    rule: TapRule
    matches: Callable[[Envelope], bool]
    tokens: float
    refilled: float
    skipped: int = 0

    def take(self, now: float) -> bool:
        """Whether one more copy is within the rate; a burst of one second's worth is."""
        burst = max(1.0, self.rule.rate)
        self.tokens = min(burst, self.tokens + (now - self.refilled) * self.rule.rate)
        self.refilled = now
        if self.tokens < 1.0:
            self.skipped += 1
            return False
        self.tokens -= 1.0
        return True


class Edges:
    """The taps and message faults now in force in one process.

    Arguments:
        name: of the actor whose messages these are.
        now: the clock.
        timers: for delayed and held messages.
        transmit: sends an envelope on, and afterwards closes the descriptors.
        copy: sends a copy to a tap's sink.

    Attributes:
        hit: how often each action was done, for the metrics.
    """

    def __init__(
        self,
        name: str,
        now: Callable[[], float],
        timers: Timers,
        transmit: Callable[[Envelope, list[Descriptor]], None],
        copy: Callable[[str, Tapped], None],
    ) -> None:
        self.hit: dict[FaultAction, int] = {}
        self._name = name
        self._now = now
        self._timers = timers
        self._transmit = transmit
        self._copy = copy
        self._taps: list[_Tap] = []
        self._faults: list[_Fault] = []

    @property
    def taps(self) -> tuple[TapRule, ...]:
        """The taps that have not ended."""
        now = self._now()
        return tuple(tap.rule for tap in self._taps if tap.rule.until > now)

    @property
    def faults(self) -> tuple[FaultRule, ...]:
        """The faults that have not ended."""
        now = self._now()
        return tuple(fault.rule for fault in self._faults if fault.rule.until > now)

    def set_taps(self, rules: Sequence[TapRule]) -> None:
        """Replace all taps; one that stays keeps its count and rate."""
        now = self._now()
        kept = {tap.rule: tap for tap in self._taps}
        self._taps = [
            kept.get(rule) or _Tap(rule, compile_filter(rule.match), max(1.0, rule.rate), now) for rule in rules
        ]

    def set_faults(self, rules: Sequence[FaultRule]) -> None:
        """Replace all faults; one that stays keeps its count and its place in its random sequence."""
        kept = {fault.rule: fault for fault in self._faults}
        faults = []
        for rule in rules:
            draw = random.Random(f"{rule.seed}/{rule.id}/{self._name}")  # noqa: S311  # repeatable on purpose
            stays = kept.pop(rule) if rule in kept else None
            faults.append(stays or _Fault(rule, compile_filter(rule.match), draw))
        self._faults = faults
        for gone in kept.values():
            self._release(gone)

    def prune(self) -> bool:
        """Let go of what has ended; True if nothing is left."""
        self.set_taps(self.taps)
        self.set_faults(self.faults)
        return not self._taps and not self._faults

    def sending(self, envelope: Envelope, descriptors: list[Descriptor]) -> bool:
        """Copy to taps and apply faults. True: the message is taken care of, the caller must not send it."""
        if envelope.kind in UNTAPPED:
            return False
        now = self._now()
        for tap in self._taps:
            if tap.rule.until > now and tap.matches(envelope) and tap.take(now):
                self._tapped(tap, envelope, now)
        if envelope.kind in EXEMPT:
            return False
        for fault in self._faults:
            if fault.rule.action is FaultAction.CRASH or fault.rule.until <= now or not fault.matches(envelope):
                continue
            if fault.held is not None:
                fault.seen += 1
                self._transmit(envelope, descriptors)
                self._release(fault)
                return True
            if fault.hits(envelope):
                self.hit[fault.rule.action] = self.hit.get(fault.rule.action, 0) + 1
                self._inflict(fault, envelope, descriptors, now)
                return True
        return False

    def crashes(self, envelope: Envelope) -> bool:
        """Whether the receipt of this message must crash the receiver."""
        if envelope.kind in EXEMPT:
            return False
        now = self._now()
        for fault in self._faults:
            if fault.rule.action is not FaultAction.CRASH or fault.rule.until <= now or not fault.matches(envelope):
                continue
            if fault.hits(envelope):
                self.hit[FaultAction.CRASH] = self.hit.get(FaultAction.CRASH, 0) + 1
                return True
        return False

    def _inflict(self, fault: _Fault, envelope: Envelope, descriptors: list[Descriptor], now: float) -> None:
        match fault.rule.action:
            case FaultAction.DROP:
                for descriptor in descriptors:
                    descriptor.close()
            case FaultAction.DELAY:
                self._timers.call_at(now + fault.rule.delay, lambda: self._transmit(envelope, descriptors))
            case FaultAction.DUPLICATE:
                copies = [descriptor.duplicate() for descriptor in descriptors]
                self._transmit(envelope, copies)
                self._transmit(envelope, descriptors)
            case FaultAction.REORDER:
                timer = self._timers.call_at(now + fault.rule.delay, lambda: self._release(fault))
                fault.held = _Held(envelope, descriptors, timer)
            case FaultAction.CORRUPT:
                body = bytearray(envelope.body)
                if body:
                    bit = fault.random.randrange(8 * len(body))
                    body[bit // 8] ^= 1 << bit % 8
                self._transmit(dataclasses.replace(envelope, body=bytes(body)), descriptors)
            case FaultAction.CRASH:
                raise AssertionError("a crash is done where a message is received")

    def _release(self, fault: _Fault) -> None:
        held, fault.held = fault.held, None
        if held is not None:
            held.timer.cancel()
            self._transmit(held.envelope, held.descriptors)

    def _tapped(self, tap: _Tap, envelope: Envelope, now: float) -> None:
        cut = len(envelope.body) > BODY_LIMIT
        seen = dataclasses.replace(envelope, body=envelope.body[:BODY_LIMIT]) if cut else envelope
        skipped, tap.skipped = tap.skipped, 0
        self._copy(tap.rule.sink, Tapped(tap.rule.id, now, seen.to_bytes(), cut, skipped))


def compile_filter(match: EdgeFilter) -> Callable[[Envelope], bool]:
    """A predicate for this filter; `*` stands for any run of characters, `/` included."""
    sender, target, kind = (_pattern(text) for text in (match.sender, match.target, match.kind))

    def matches(envelope: Envelope) -> bool:
        return (
            (kind is None or kind(envelope.kind) is not None)
            and (target is None or target(envelope.target) is not None)
            and (sender is None or sender(envelope.sender) is not None)
        )

    return matches


def matches_text(pattern: str, text: str) -> bool:
    """Whether a part of a filter matches; `*` stands for any run of characters."""
    compiled = _pattern(pattern)
    return compiled is None or compiled(text) is not None


def _pattern(text: str | None) -> Callable[[str], re.Match[str] | None] | None:
    if text is None or text == "*":
        return None
    return re.compile(".*".join(re.escape(part) for part in text.split("*")), re.DOTALL).fullmatch
