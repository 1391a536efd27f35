"""A whole tree of actors inside one process, with virtual time and a seeded scheduler. (Skeleton: bodies follow.)

The same actor classes, cells, exchanges, overseers and supervision logic as the real runtime; only the port and
the processes are pretended. Two runs with the same seed give the same trace::

    async with Simulation(seed=7).run(root_spec) as world:      # inside trio with MockClock (or Simulation.main)
        answer = await world.ask("a", Question())
        world.kill("a")
        await world.wait_for("a", timeout=5)
    print(world.trace)
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

from protocol.messages import Message, Request
from protocol.messages.system import ChildStatus, FaultRule, SupervisorSpec, TapRule

R = TypeVar("R")
T = TypeVar("T")


class World:
    """A running simulation; it is itself a registered actor named `world`.

    Attributes:
        trace: one line for each thing that happened (sent, delivered, spawned, ended), with virtual times.
    """

    trace: list[str]

    async def ask(self, target: str, request: Request[R], *, timeout: float = 10.0) -> R:  # noqa: ASYNC109
        """As :meth:`supervisor.actor.Context.ask`."""
        raise NotImplementedError

    def tell(self, target: str, message: Message) -> None:
        """As :meth:`supervisor.actor.Context.tell`."""
        raise NotImplementedError

    def kill(self, name: str) -> None:
        """As SIGKILL: it ends at once, without `stop`."""
        raise NotImplementedError

    def freeze(self, name: str) -> None:
        """As SIGSTOP: messages reach it and nothing happens."""
        raise NotImplementedError

    async def wait_for(self, name: str, *, timeout: float = 10.0) -> None:  # noqa: ASYNC109
        """Return as soon as the name is ready."""
        raise NotImplementedError

    def set_faults(self, *faults: FaultRule) -> None:
        """Put these message faults in force in every actor."""
        raise NotImplementedError

    def set_taps(self, *taps: TapRule) -> None:
        """Put these taps in force in every actor."""
        raise NotImplementedError

    def tree(self) -> tuple[ChildStatus, ...]:
        """The whole tree at this moment, without sending a message."""
        raise NotImplementedError


class Simulation:
    """See the module.

    Arguments:
        seed: of latencies, scheduler, jitter and every actor's `random`.
        latency: bounds of a message's time on its way, in virtual seconds; the order of each (sender, target) pair is kept.
        start_time: bounds of the time that a process takes to come to life.
    """

    def __init__(
        self,
        seed: int,
        *,
        latency: tuple[float, float] = (0.000_02, 0.001),
        start_time: tuple[float, float] = (0.005, 0.05),
    ) -> None:
        raise NotImplementedError

    @contextlib.asynccontextmanager
    async def run(self, root: SupervisorSpec, *, name: str = "root") -> AsyncIterator[World]:
        """The tree, ready; shut down in order at the end."""
        raise NotImplementedError
        yield

    def main(self, root: SupervisorSpec, scenario: Callable[[World], Awaitable[T]]) -> T:
        """Run a scenario from synchronous code: makes its own trio run with an autojumping MockClock."""
        raise NotImplementedError
