"""What the measurements of the actor runtime are made with: an actor that answers, asks and counts; and its service."""

from __future__ import annotations

import importlib
import os
import sys
import time

from protocol.messages import Message, Request, message
from protocol.messages.system import ChildSpec, Strategy, SupervisorSpec
from supervisor.actor import Actor, handles
from supervisor.boot import LogSettings
from supervisor.service import Service

FACTORY = "bench.runtime_actors:Subject"
NAMES = ("first", "second", "third")


@message("bench.echoed")
class Echoed(Message):
    """The answer of an echo, and who gave it."""

    text: bytes
    pid: int


@message("bench.echo")
class Echo(Request[Echoed]):
    """Say it back."""

    text: bytes


@message("bench.told")
class Told(Message):
    """One of many that are not answered."""

    number: int


@message("bench.counted")
class Counted(Message):
    """How many have been told."""

    count: int


@message("bench.count")
class Count(Request[Counted]):
    """Ask how many have been told."""


@message("bench.timed")
class Timed(Message):
    """How long each took, in seconds."""

    seconds: tuple[float, ...]


@message("bench.time-echo")
class TimeEcho(Request[Timed]):
    """Make round trips to the target one after the other."""

    target: str
    rounds: int
    size: int


@message("bench.time-tell")
class TimeTell(Request[Timed]):
    """Tell the target so many messages as fast as it takes them; the time until it has handled the last."""

    target: str
    count: int


class Subject(Actor):
    """Understands all of the above."""

    mailbox_limit = 4096

    def __init__(self) -> None:
        self._count = 0

    @handles(Echo)
    async def echo(self, request: Echo) -> Echoed:
        """Say it back."""
        return Echoed(request.text, os.getpid())

    @handles(Told)
    async def told(self, _: Told) -> None:
        """Count."""
        self._count += 1

    @handles(Count)
    async def count(self, _: Count) -> Counted:
        """Tell the count."""
        return Counted(self._count)

    @handles(TimeEcho, concurrent=True)
    async def time_echo(self, request: TimeEcho) -> Timed:
        """Measure round trips."""
        echo = Echo(bytes(request.size))
        seconds = []
        for _ in range(request.rounds):
            before = time.perf_counter()
            await self.context.ask(request.target, echo, timeout=10)
            seconds.append(time.perf_counter() - before)
        return Timed(tuple(seconds))

    @handles(TimeTell, concurrent=True)
    async def time_tell(self, request: TimeTell) -> Timed:
        """Measure one way; a question now and then keeps the mailbox from overflowing."""
        before = time.perf_counter()
        start = (await self.context.ask(request.target, Count(), timeout=30)).count
        for number in range(request.count):
            self.context.tell(request.target, Told(number))
            if number % 1000 == 999:
                await self.context.ask(request.target, Count(), timeout=30)
        counted = await self.context.ask(request.target, Count(), timeout=30)
        assert counted.count - start == request.count
        return Timed((time.perf_counter() - before,))


def main() -> None:
    """Run three of them in the given run directory with the given strategy; says `ready`."""
    path, strategy = sys.argv[1:]
    children = tuple(ChildSpec(name, FACTORY, {}, heartbeat=0) for name in NAMES)
    Service(
        path,
        SupervisorSpec(Strategy(strategy), 1_000_000, 1.0, 0.0, 0.0, children, starters=("bench",)),
        preload=("trio", "bench.runtime_actors"),
        log=LogSettings(level="critical"),
        factories=("bench.", "supervisor."),
        on_ready=lambda: print("ready", flush=True),
    ).run()


if __name__ == "__main__":
    # As an imported module, so that the messages here are the ones that the actors know.
    importlib.import_module("bench.runtime_actors").main()
