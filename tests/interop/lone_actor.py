"""One actor alone, in this process, on the real clock and network: what it asks for is answered by the test."""

from __future__ import annotations

import contextlib
import contextvars
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, TypeVar

import loguru
import trio

from protocol.messages import Data, Message, MessageId, Request
from protocol.messages.system import Ok
from supervisor.actor import Actor
from supervisor.metrics import Registry

R = TypeVar("R")


class LoneContext:
    """The `Context` of one actor.

    Attributes:
        told: what the actor told others, oldest first, where no `audience` took it.
        watched: the names that it watches.
        metrics: its counters.
    """

    def __init__(
        self,
        name: str,
        nursery: trio.Nursery,
        *,
        answer: Callable[[str, Any], Awaitable[Any]],
        audience: Callable[[str, Message], bool],
    ) -> None:
        """`answer` answers what the actor asks; `audience` is given what it tells, and says whether it took it."""
        self.name = name
        self.incarnation = 1
        self.supervisor = "test"
        self.nursery = nursery
        self.random = random.Random(name)
        self.log = loguru.logger
        self.metrics = Registry()
        self.told: list[tuple[str, Message]] = []
        self.watched: set[str] = set()
        self.current_message: MessageId | None = None
        self._answer = answer
        self._audience = audience
        self._sender = contextvars.ContextVar("sender", default="test")

    @property
    def current_sender(self) -> str:
        return self._sender.get()

    def now(self) -> float:
        return time.monotonic()

    def wall(self) -> float:
        return time.time()

    def tell(self, target: str, message: Message) -> None:
        if not self._audience(target, message):
            self.told.append((target, message))

    async def ask(self, target: str, request: Request[R], *, timeout: float) -> R:  # noqa: ASYNC109 - the contract's
        with trio.fail_after(timeout):
            answer: R = await self._answer(target, request)
            return answer

    def watch(self, name: str) -> None:
        self.watched.add(name)

    async def wait_for(self, name: str, *, timeout: float) -> None:  # noqa: ASYNC109 - the contract's
        await trio.lowlevel.checkpoint()

    def checkpoint(self, state: dict[str, Data], descriptors: Sequence[int] = ()) -> None:
        """Kept by nobody: there will be no successor."""

    async def deliver(self, actor: Actor, message: Message, sender: str = "test") -> Any:
        """Have the actor handle a message, and give its answer. A refusal is raised."""
        token = self._sender.set(sender)
        try:
            answer = await type(actor).handlers[message.KIND].function(actor, message)
        finally:
            self._sender.reset(token)
        return Ok() if answer is None else answer


@contextlib.asynccontextmanager
async def lone_actor(
    actor: Actor,
    name: str,
    *,
    answer: Callable[[str, Any], Awaitable[Any]],
    audience: Callable[[str, Message], bool],
) -> AsyncIterator[LoneContext]:
    """Start the actor, and stop it at the end. The arguments are those of `LoneContext`."""
    async with trio.open_nursery() as nursery:
        context = LoneContext(name, nursery, answer=answer, audience=audience)
        actor.context = context
        await actor.start(None)
        try:
            yield context
        finally:
            with trio.CancelScope(shield=True):
                await actor.stop("the test is over")
            nursery.cancel_scope.cancel()
