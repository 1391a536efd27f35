"""What routes see of the running node: the tree, every actor in it, the names of peers."""

from __future__ import annotations

import dataclasses
import fnmatch
import os
import signal
from collections.abc import Iterable
from typing import TypeVar

import trio

from actors.api.watchers import Watchers
from protocol.messages import Message, Request
from protocol.messages.config import ConfigSnapshot, Resolve, Resolved
from protocol.messages.system import ChildStatus, ReadTree
from protocol.peer_id import PeerId
from supervisor.actor import Context
from supervisor.errors import (
    ActorNotReadyError,
    ActorRestartingError,
    AskError,
    DeadlineExceededError,
    NoSuchActorError,
)

R = TypeVar("R", bound=Message)

ROOT = "root"
"""The registered name of the supervisor on top of the tree."""

SERVICE = "main"
"""The registered name of the service that runs the root."""

ANSWER_DEADLINE = 3.0
"""Seconds that one actor gets to answer a question of ours: a healthy one needs less than a millisecond, a restart
well under a second; whoever waits at the command line should not wait longer for one that hangs."""

RESTART_PATIENCE = 2.0
"""Seconds that an actor which is being started or restarted gets to be ready: most need a tenth of that."""

ANSWERS_AT_ONCE = 64
"""So many actors are asked side by side; a node with thousands of proxies must not flood itself."""


@dataclasses.dataclass(frozen=True)
class Launch:
    """How the node was started, as the service told us.

    Attributes:
        home: its directory.
        service_pid: the process that ends the whole node on SIGTERM.
        main_pid: the process that was started, whose end a service manager waits for; `service_pid` except where a
            relay runs behind another process (docs/decisions/0021-restart-of-a-relay.md).
        started_at: seconds since the Unix epoch.
        allow_faults: whether faults may be injected.
    """

    home: str
    version: str
    service_pid: int
    main_pid: int
    started_at: float
    allow_faults: bool


class Node:
    """The running node as the routes see it."""

    def __init__(self, context: Context, launch: Launch, watchers: Watchers) -> None:
        self.context = context
        self.launch = launch
        self.watchers = watchers
        self.config: ConfigSnapshot | None = None

    async def ask(
        self,
        name: str,
        request: Request[R],
        *,
        timeout: float = ANSWER_DEADLINE,  # noqa: ASYNC109  # of the request, which the context wants
        repeatable: bool = True,
    ) -> R:
        """What the actor of this name answers, within `timeout` seconds in all.

        A node whose parts are just being started or restarted is no error to a person who asks: it gets a moment
        (`RESTART_PATIENCE`) and one more try. If the actor may have done what was asked for before it ended, only
        where that may be `repeatable`.

        Raises:
            AskError: no useful answer; ActorRestartingError where the moment was not enough.
        """
        context = self.context
        until = context.now() + timeout
        try:
            return await context.ask(name, request, timeout=timeout)
        except ActorRestartingError as error:
            left = min(RESTART_PATIENCE, until - context.now())
            if left <= 0 or not (repeatable or isinstance(error, ActorNotReadyError)):
                raise
            try:
                await context.wait_for(name, timeout=left)
            except DeadlineExceededError:
                raise error from None
        left = until - context.now()
        if left <= 0:
            raise DeadlineExceededError(f"{name} did not answer in time")
        return await context.ask(name, request, timeout=left)

    async def tree(self) -> tuple[ChildStatus, ...]:
        """Every supervisor and actor of the node."""
        return (await self.ask(ROOT, ReadTree())).children

    async def matching(self, pattern: str) -> list[str]:
        """The names of actors that this name or glob means.

        Raises:
            NoSuchActorError: it means none.
        """
        names = [child.name for child in await self.tree()]
        found = [name for name in names if name == pattern] or fnmatch.filter(names, pattern)
        if not found:
            near = [name for name in names if pattern in name]
            hint = f"; did you mean {' or '.join(near[:3])}?" if near else "; `peerup actors` lists them"
            raise NoSuchActorError(f"there is no actor {pattern!r}{hint}")
        return found

    async def ask_each(self, names: Iterable[str], request: Request[R]) -> tuple[dict[str, R], dict[str, str]]:
        """The answers by name, and for the actors without one the reason."""
        answers: dict[str, R] = {}
        silent: dict[str, str] = {}
        limit = trio.CapacityLimiter(ANSWERS_AT_ONCE)

        async def ask(name: str) -> None:
            async with limit:
                try:
                    answers[name] = await self.context.ask(name, request, timeout=ANSWER_DEADLINE)
                except AskError as error:
                    silent[name] = str(error) or error.code

        async with trio.open_nursery() as nursery:
            for name in names:
                nursery.start_soon(ask, name)
        return answers, silent

    async def resolve(self, name: str) -> Resolved:
        """The peer that a person means by this name or peer id."""
        return await self.ask("config", Resolve(name))

    def name_of(self, peer: PeerId) -> str:
        """The friendly name of this peer; empty if it has none."""
        if self.config is not None:
            for entry in self.config.names:
                if entry.peer == peer:
                    return entry.name
        return ""

    def wall_time(self, moment: float) -> float:
        """A moment of the node's clock as seconds since the Unix epoch."""
        return round(moment + self.context.wall() - self.context.now(), 6)

    async def end(self) -> None:
        """End the whole node, as SIGTERM does."""
        os.kill(self.launch.service_pid, signal.SIGTERM)
