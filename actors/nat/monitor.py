"""The actor `nat/monitor`: notices that this machine is in another network, or has slept, and tells who wants to know.

Theory of operation. The kernel tells of every change of addresses, routes and links. Such changes come in bursts, and
many mean nothing. So a burst is let pass, then what there is now is read and compared with what was there before it:
subscribers hear of differences, and of what went and came back, in words. A machine that has slept shows by a clock
that counts sleep and one that does not; its connections may be long dead though its addresses are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import trio

from actors.nat.kernel import RealKernel
from actors.nat.rtnetlink import NetlinkError
from protocol.messages import Data
from protocol.messages.network import NetworkChanged, WatchNetwork
from protocol.messages.system import ActorDown, ActorUp
from supervisor.actor import Actor, Checkpoint, handles

QUIET = 0.3
"""Seconds without news after which a burst is over: an address, its routes and a resolver come within less."""
LONGEST_BURST = 1.5
"""Seconds after which a burst is looked at though it goes on."""
SLEEP_CHECK = 5.0
"""Seconds between looks at the clocks; waking up costs an idle machine something."""
SLEPT = 2.0
"""Seconds of sleep that are worth mentioning."""
MAX_REASONS = 16
"""Reasons in one message."""
MAX_SAVED = 100
"""Facts in a checkpoint, which must stay small. With more, what changes while nobody looks goes unnoticed."""
LATE = 10.0
"""Seconds in which subscribers have come back after this process was replaced, and are told what it found then."""


class Kernel(Protocol):
    """What the monitor asks of the kernel. Each call may raise :class:`NetlinkError`."""

    @property
    def facts(self) -> frozenset[str]:
        """What there was when it was last read."""
        ...

    async def news(self) -> frozenset[str]:
        """Wait for news; the facts that they put an end to, as far as that is known."""
        ...

    def read(self) -> frozenset[str]:
        """What there is now."""
        ...

    def slept(self) -> float:
        """Seconds that this machine has slept since it was started."""
        ...


class NetworkMonitor(Actor):
    """See the module.

    Arguments:
        kernel: makes what is asked; the real one by default.
    """

    def __init__(self, kernel: Callable[[], Kernel] = RealKernel) -> None:
        self._make_kernel = kernel
        self._kernel: Kernel | None = None
        self._subscribers: set[str] = set()
        self._slept = 0.0
        self._changes = 0
        self._last: tuple[str, ...] = ()
        self._last_at: float | None = None
        self._problem = ""
        self._missed: tuple[str, ...] = ()  # what changed while nobody looked
        self._started_at = 0.0

    async def start(self, checkpoint: Checkpoint | None) -> dict[str, Data]:
        """See what there is, and watch it."""
        context = self.context
        self._started_at = context.now()
        try:
            kernel = self._make_kernel()
            facts = kernel.read()
        except NetlinkError as error:
            # A node in a sandbox that forbids this works all the same; dead connections are noticed later.
            self._problem = str(error)
            context.log.warning("{}; a change of network is noticed only when connections end", error)
            return {"facts": [], "problem": self._problem}
        self._kernel = kernel
        self._slept = kernel.slept()
        if checkpoint is not None:
            self._slept = checkpoint.state["slept"]
            if checkpoint.state["facts"] is not None:
                self._missed = _differences(frozenset(checkpoint.state["facts"]), facts)[:MAX_REASONS]
                self._note(self._missed)
        self._save()
        context.nursery.start_soon(self._watch, kernel)
        context.nursery.start_soon(self._watch_clocks, kernel)
        return {"facts": sorted(facts), "problem": ""}

    def describe(self) -> dict[str, Data]:
        """What is there, what changed last and when, who is told."""
        return {
            "facts": sorted(self._kernel.facts) if self._kernel is not None else [],
            "problem": self._problem,
            "changes": self._changes,
            "last_change": list(self._last),
            "last_change_ago": None if self._last_at is None else self.context.now() - self._last_at,
            "slept": self._slept,
            "subscribers": sorted(self._subscribers),
        }

    @handles(WatchNetwork)
    async def watch(self, request: WatchNetwork) -> None:
        """Tell the sender of changes."""
        sender = self.context.current_sender
        self._subscribers.add(sender)
        self.context.watch(sender)
        if self._missed and self.context.now() - self._started_at < LATE:
            self.context.tell(sender, NetworkChanged(self._missed))

    @handles(ActorDown)
    async def actor_down(self, message: ActorDown) -> None:
        """Forget a subscriber; its successor asks again."""
        self._subscribers.discard(message.name)

    @handles(ActorUp)
    async def actor_up(self, message: ActorUp) -> None:
        """It asks by itself."""

    async def _watch(self, kernel: Kernel) -> None:
        while True:
            before = kernel.facts
            lost = set(await kernel.news())
            with trio.move_on_after(LONGEST_BURST):
                quiet = False
                while not quiet:
                    with trio.move_on_after(QUIET) as silence:
                        lost |= await kernel.news()
                    quiet = silence.cancelled_caught
            try:
                after = kernel.read()
            except NetlinkError as error:
                self._problem = str(error)
                self.context.log.warning("{}", error)
                continue
            self._problem = ""
            self._note((*_differences(before, after), *(f"{fact} went and came back" for fact in sorted(lost & after))))

    async def _watch_clocks(self, kernel: Kernel) -> None:
        while True:
            await trio.sleep(SLEEP_CHECK)
            before, self._slept = self._slept, kernel.slept()
            if self._slept - before >= SLEPT:
                self._note((f"slept for {self._slept - before:.0f} s",))

    def _note(self, why: tuple[str, ...]) -> None:
        if not why:
            return
        self._changes += 1
        self._last, self._last_at = why[:MAX_REASONS], self.context.now()
        self.context.metrics.counter("peerup_network_changes_total").inc()
        self.context.log.info("the network has changed: {}", "; ".join(self._last))
        self._save()
        for name in sorted(self._subscribers):
            self.context.tell(name, NetworkChanged(self._last))

    def _save(self) -> None:
        if self._kernel is not None:
            facts = sorted(self._kernel.facts)
            self.context.checkpoint({"facts": facts if len(facts) <= MAX_SAVED else None, "slept": self._slept})


def _differences(before: frozenset[str], after: frozenset[str]) -> tuple[str, ...]:
    return (
        *(f"{fact} is gone" for fact in sorted(before - after)),
        *(f"{fact} is new" for fact in sorted(after - before)),
    )
