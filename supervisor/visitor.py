"""A process beside the tree that talks to it by messages: for tests, benchmarks and looking into a running node.

It registers a name of its own in the run directory, so it must be of the same user; it is nobody's child.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self, TypeVar

from protocol.messages import Message, Request
from supervisor.errors import AskError, DeadlineExceededError
from supervisor.exchange import Exchange
from supervisor.port import NameState
from supervisor.registry import Entry, RunDirectory
from supervisor.transport import Transport

R = TypeVar("R")


class Visitor:
    """A registered name with a blocking `ask`. Use it as a context manager."""

    def __init__(self, run_directory: str, name: str) -> None:
        self.directory = RunDirectory(run_directory)
        self.name = name
        self.transport = Transport(self.directory)
        self.transport.name = name
        self.directory.write(name, Entry(NameState.READY, 1, os.getpid(), name))
        self.exchange = Exchange(
            name,
            1,
            self.transport,
            now=time.monotonic,
            wall=time.time,
            random=random.Random(os.urandom(16)),  # noqa: S311 - documented as never for keys
        )
        self.exchange.refusals = self.transport.refusals
        self.transport.receiver = self.exchange

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leave: the name is free again."""
        self.exchange.close()
        self.transport.close()
        self.directory.remove(self.name)
        self.directory.close()

    def tell(self, target: str, message: Message) -> None:
        """Send and forget."""
        self.exchange.tell(target, message)

    def ask(self, target: str, request: Request[R], *, timeout: float = 10.0) -> R:
        """Send a request and wait for its answer.

        Raises:
            AskError: as :meth:`supervisor.actor.Context.ask`.
        """
        answers: list[Any] = []
        self.exchange.ask(target, request, timeout=timeout, answer=answers.append)
        self.run(lambda: bool(answers), timeout=timeout + 1)
        answer = answers[0]
        if isinstance(answer, AskError):
            raise answer
        found: R = answer
        return found

    def run(self, until: Callable[[], bool], *, timeout: float) -> None:
        """Handle messages until something holds.

        Raises:
            DeadlineExceededError: it does not hold within `timeout` seconds.
        """
        end = time.monotonic() + timeout
        while not until():
            now = time.monotonic()
            if now >= end:
                raise DeadlineExceededError(f"not within {timeout:g} s")
            due = self.exchange.next_timer()
            self.transport.wait(max(0.0, min(end, end if due is None else due) - now))
            self.exchange.handle_timers(time.monotonic())

    def wait_for(self, name: str, *, timeout: float = 10.0) -> None:
        """Return as soon as the name is ready.

        Raises:
            DeadlineExceededError: it was not within `timeout` seconds.
        """
        ready: list[bool] = []
        take_back = self.exchange.when_ready(name, lambda: ready.append(True))
        try:
            self.run(lambda: bool(ready), timeout=timeout)
        finally:
            take_back()
