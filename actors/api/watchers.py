"""Taps and message faults of the whole node: kept here, in force in every actor.

Theory of operation. Each actor applies the complete lists that it was last told (`SetTaps`, `SetFaults`), and
each rule ends by itself at its `until`. So this module has one duty: that every actor of the tree, also one that
was started or restarted meanwhile, holds the lists as they are now. It tells all actors when a list changes, and
while any rule is in force it looks at the tree once a second and tells whoever has a new pid; an actor that it
watches is told as soon as it is up again. With no rule in force nothing runs and nothing is sent.

When the API itself is restarted, taps are withdrawn (their readers went with the connections), while faults
stay: they are in the checkpoint, are listed as before, and actors are told again.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Awaitable, Callable

import trio

from protocol.messages import Data, Message
from protocol.messages.system import (
    ChildStatus,
    EdgeFilter,
    FaultAction,
    FaultRule,
    SetFaults,
    SetTaps,
    Tapped,
    TapRule,
)
from supervisor.actor import Context
from supervisor.errors import AskError, RefusedError

FOLLOW_INTERVAL = 1.0
"""Seconds between looks at the tree while rules are in force: a restart is mostly noticed by watching; this
finds actors that are new."""

MAX_TAPS = 8
"""Taps at once; each costs every actor a comparison per message."""

MAX_FAULTS = 32
"""Message faults at once."""

TAP_BUFFER = 1000
"""Copies that wait for a slow reader of a tap; more are counted and dropped."""

TAP_OVERLAP = 2.0
"""Seconds that a tap's rules outlive their reader's deadline in the actors, so that the last copies still come."""


@dataclasses.dataclass
class Tap:
    """One reader's tap. `lost` counts copies that the reader was too slow for."""

    rule: TapRule
    send: trio.MemorySendChannel[Tapped]
    receive: trio.MemoryReceiveChannel[Tapped]
    lost: int = 0


class Watchers:
    """The taps and faults in force, and the actors that know of them."""

    def __init__(
        self,
        context: Context,
        tree: Callable[[], Awaitable[tuple[ChildStatus, ...]]],
        descriptors: tuple[int, ...] = (),
    ) -> None:
        self._context = context
        self._tree = tree
        self._descriptors = descriptors
        self._taps: dict[str, Tap] = {}
        self._faults: dict[str, FaultRule] = {}
        self._sequence = 0
        self._told: dict[str, int | None] = {}
        self._watched: set[str] = set()
        self._following = False

    # Life

    def restore(self, state: dict[str, Data]) -> None:
        """Take over what a predecessor left, and tell every actor what is in force now."""
        self._sequence = int(state.get("sequence", 0))
        for values in state.get("faults", []):
            rule = _fault_from_state(values)
            if rule.until > self._context.now():
                self._faults[rule.id] = rule
        self._context.nursery.start_soon(self._publish_quietly)
        self._follow()

    def leave_checkpoint(self) -> None:
        """Leave the faults in force, and the descriptors given at the beginning, for a successor."""
        faults = [_fault_to_state(rule) for rule in self.faults()]
        self._context.checkpoint({"sequence": self._sequence, "faults": faults}, self._descriptors)

    def _next_id(self, prefix: str) -> str:
        self._sequence += 1
        return f"{prefix}{self._sequence}"

    # Taps

    async def open_tap(self, match: EdgeFilter, *, seconds: float, rate: float) -> Tap:
        """Begin to copy matching messages of all actors.

        Raises:
            RefusedError: too many taps are open.
        """
        if len(self._taps) >= MAX_TAPS:
            raise RefusedError("limit-exceeded", f"{MAX_TAPS} taps are open already", "end one of them first")
        until = self._context.now() + seconds
        rule = TapRule(self._next_id("tap"), match, self._context.name, until + TAP_OVERLAP, rate)
        send, receive = trio.open_memory_channel[Tapped](TAP_BUFFER)
        tap = self._taps[rule.id] = Tap(rule, send, receive)
        try:
            await self._publish()
        except BaseException:
            del self._taps[rule.id]
            raise
        self._follow()
        return tap

    def close_tap(self, tap: Tap) -> None:
        """End the tap and withdraw it from all actors."""
        if self._taps.pop(tap.rule.id, None) is not None:
            tap.send.close()
            tap.receive.close()
            self._tell_known(SetTaps(self.taps()))

    def taps(self) -> tuple[TapRule, ...]:
        """The rules of all open taps."""
        return tuple(tap.rule for tap in self._taps.values())

    def tapped(self, copy: Tapped) -> None:
        """Give a copy that arrived to the tap's reader."""
        tap = self._taps.get(copy.tap)
        if tap is None:
            return  # a straggler of a tap that has ended
        try:
            tap.send.send_nowait(copy)
        except trio.WouldBlock:
            tap.lost += 1 + copy.skipped

    # Faults

    async def add_fault(
        self,
        match: EdgeFilter,
        action: FaultAction,
        *,
        probability: float,
        nth: int | None,
        seed: int,
        seconds: float,
        delay: float,
    ) -> FaultRule:
        """Put a message fault in force in all actors.

        Raises:
            RefusedError: too many faults are in force.
        """
        if len(self.faults()) >= MAX_FAULTS:
            raise RefusedError("limit-exceeded", f"{MAX_FAULTS} faults are in force already", "`peerup fault clear`")
        until = self._context.now() + seconds
        rule = FaultRule(self._next_id("fault"), match, action, probability, nth, seed, until, delay)
        self._faults[rule.id] = rule
        self.leave_checkpoint()
        await self._publish()
        self._follow()
        return rule

    async def clear_faults(self, ident: str | None = None) -> tuple[str, ...]:
        """Tell all actors to end one fault, or all; the ids of those.

        When the actors have done so, :meth:`leave_checkpoint` lets a successor know as well: not before, because a
        fault may prevent it.

        Raises:
            RefusedError: none has this id.
        """
        current = {rule.id: rule for rule in self.faults()}
        if ident is not None and ident not in current:
            raise RefusedError("not-found", f"no fault {ident!r} is in force", "`peerup fault list` shows them")
        cleared = [ident] if ident is not None else list(current)
        for key in cleared:
            del self._faults[key]
        await self._publish()
        return tuple(cleared)

    def faults(self) -> tuple[FaultRule, ...]:
        """The faults in force."""
        now = self._context.now()
        self._faults = {key: rule for key, rule in self._faults.items() if rule.until > now}
        return tuple(self._faults.values())

    # Telling actors

    def actor_up(self, name: str) -> None:
        """An actor is ready again: it knows nothing yet."""
        if self._taps or self.faults():
            self._tell(name)

    async def _publish(self) -> None:
        """Tell every actor of the tree the present lists."""
        self._told = {}
        await self._tell_new()

    async def _publish_quietly(self) -> None:
        try:
            await self._publish()
        except AskError as error:
            self._context.log.warning("cannot tell actors which taps and faults are in force: {}", error)

    async def _tell_new(self) -> None:
        for child in await self._tree():
            if child.pid is None or self._told.get(child.name) == child.pid:
                continue
            self._told[child.name] = child.pid
            self._tell(child.name)
            if child.name not in self._watched and child.name != self._context.name:
                self._watched.add(child.name)
                self._context.watch(child.name)

    def _tell(self, name: str) -> None:
        self._context.tell(name, SetTaps(self.taps()))
        if self._faults or self._sequence:
            self._context.tell(name, SetFaults(self.faults()))

    def _tell_known(self, message: Message) -> None:
        for name in self._told:
            self._context.tell(name, message)

    def _follow(self) -> None:
        if not self._following and self._in_force_until() > self._context.now():
            self._following = True
            self._context.nursery.start_soon(self._follow_tree)

    def _in_force_until(self) -> float:
        ends = [rule.until for rule in self.taps()] + [rule.until for rule in self.faults()]
        return max(ends, default=-math.inf)

    async def _follow_tree(self) -> None:
        try:
            while self._in_force_until() > self._context.now():
                await trio.sleep(FOLLOW_INTERVAL)
                try:
                    await self._tell_new()
                except AskError as error:
                    self._context.log.debug("cannot read the tree: {}", error)
        finally:
            self._following = False


def _fault_to_state(rule: FaultRule) -> dict[str, Data]:
    return {
        "id": rule.id,
        "sender": rule.match.sender,
        "target": rule.match.target,
        "kind": rule.match.kind,
        "action": rule.action.value,
        "probability": rule.probability,
        "nth": rule.nth,
        "seed": rule.seed,
        "until": rule.until,
        "delay": rule.delay,
    }


def _fault_from_state(values: dict[str, Data]) -> FaultRule:
    match = EdgeFilter(values["sender"], values["target"], values["kind"])
    return FaultRule(
        values["id"],
        match,
        FaultAction(values["action"]),
        values["probability"],
        values["nth"],
        values["seed"],
        values["until"],
        values["delay"],
    )
