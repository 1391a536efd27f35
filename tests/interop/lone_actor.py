"""One actor on a stage, on the real clock and network: whom it asks and tells is played by functions of the test."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from typing import Any

from protocol.messages import Message, Request
from supervisor.actor import Actor
from tests.support.stage import Stage

LONGEST = 3600.0
"""Seconds that an answer of the actor's may take: the commands of the test have deadlines of their own."""


class LoneActor:
    """The actor and its surroundings."""

    def __init__(
        self,
        stage: Stage,
        name: str,
        *,
        answer: Callable[[str, Any], Awaitable[Message]],
        audience: Callable[[str, Message], bool],
    ) -> None:
        """`answer` answers what the actor asks; `audience` is given what it tells, and says whether it took it."""
        self._stage = stage
        self._name = name
        self._answer = answer
        self._audience = audience

    def play(self, name: str) -> Any:
        """Somebody of this name is there from now on."""

        async def answer(request: Any) -> Message:
            return await self._answer(name, request)

        return self._stage.visitor(name, answer=answer, audience=lambda message: self._audience(name, message))

    async def deliver(self, message: Message, sender: str = "test") -> Any:
        """Have the actor handle a message; the answer of a request. A refusal is raised.

        What is only told is handled before everything that is delivered later.
        """
        visitor = self.play(sender)
        if isinstance(message, Request):
            return await visitor.ask(self._name, message, seconds=LONGEST)
        visitor.tell(self._name, message)
        return None


@contextlib.asynccontextmanager
async def lone_actor(
    actor: Actor,
    name: str,
    *,
    others: Collection[str],
    answer: Callable[[str, Any], Awaitable[Message]],
    audience: Callable[[str, Message], bool],
) -> AsyncIterator[LoneActor]:
    """Start the actor, and stop it at the end. `others` are there from the beginning; for the rest see `LoneActor`."""
    async with Stage(start_wall=time.time()) as stage:
        made = LoneActor(stage, name, answer=answer, audience=audience)
        for other in others:
            made.play(other)
        await stage.start(name, actor)
        yield made
