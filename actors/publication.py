"""What an actor publishes to others, each of which must have the newest value: the policy, the configuration.

Theory of operation. A message that is told is lost where the receiver's mailbox is full, and nobody notices. So a
publication asks, and each subscriber's answer says that it goes by the new value. Until then:

- a value that was refused for want of room, or because the subscriber is being restarted, is sent again after `PAUSE`;
- one that is not answered is sent again after `RESEND`, then after twice that, and so on: it may have been lost. What
  was sent before still counts if it is answered later;
- a newer value takes the place of the older one at once, and is sent after it, so that values arrive in their order.

A subscriber that has ended is forgotten. Its successor subscribes anew, and gets the newest value as the answer.
"""

from __future__ import annotations

import functools

import trio

from protocol.messages import Request
from protocol.messages.system import Ok
from supervisor.actor import Context
from supervisor.errors import AskError, DeadlineExceededError, RefusedError

PAUSE = 0.25
"""Seconds until a value is sent again for which there was no room: short for whoever waits for a policy to be narrowed,
and long for a subscriber that has fallen behind."""

RESEND, LAST_RESEND = 1.0, 16.0
"""Seconds until a value is sent again that was not answered, at first and at most."""

VALID = 30.0
"""Seconds that one sending may wait in a mailbox; then it is not read any more."""

_PASSING = frozenset(("mailbox-full", "not-delivered"))
"""Refusals for want of room, which comes again."""


class Publication:
    """See the module. Each value is a request that is answered when the subscriber goes by it."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._value: Request[Ok] | None = None
        self._subscribers: set[str] = set()
        self._behind: set[str] = set()  # who has not said that it has the newest value
        self._sending: dict[str, trio.CancelScope] = {}

    @property
    def subscribers(self) -> list[str]:
        """Who is told, sorted."""
        return sorted(self._subscribers)

    @property
    def behind(self) -> list[str]:
        """Which of them have not said that they have the newest value, sorted."""
        return sorted(self._behind)

    def subscribe(self, name: str) -> None:
        """Tell this actor each later value; the present one is the answer that it gets from the caller."""
        self._subscribers.add(name)
        self._settle(name)
        self._context.watch(name)

    def forget(self, name: str) -> None:
        """This actor has ended."""
        self._subscribers.discard(name)
        self._settle(name)

    def publish(self, value: Request[Ok]) -> None:
        """Have every subscriber go by this value."""
        self._value = value
        for name in self.subscribers:
            self._begin(name, value)

    def hurry(self) -> None:
        """Somebody waits for the newest value to be in force: send it now to who has not said that it has it."""
        for name in self.behind:
            if self._value is not None:
                self._begin(name, self._value)

    def _begin(self, name: str, value: Request[Ok]) -> None:
        self._settle(name)
        self._behind.add(name)
        scope = self._sending[name] = trio.CancelScope()
        self._context.nursery.start_soon(self._send, name, value, scope)

    def _settle(self, name: str) -> None:
        self._behind.discard(name)
        if (scope := self._sending.pop(name, None)) is not None:
            scope.cancel()

    async def _send(self, name: str, value: Request[Ok], scope: trio.CancelScope) -> None:
        resend = RESEND
        with scope:
            async with trio.open_nursery() as nursery:
                while True:
                    refused = trio.Event()
                    nursery.start_soon(functools.partial(self._ask, name, value, scope, refused=refused))
                    with trio.move_on_after(resend):
                        await refused.wait()
                    if refused.is_set():
                        await trio.sleep(PAUSE)
                    else:
                        resend = min(2 * resend, LAST_RESEND)

    async def _ask(self, name: str, value: Request[Ok], scope: trio.CancelScope, *, refused: trio.Event) -> None:
        try:
            await self._context.ask(name, value, timeout=VALID)
        except DeadlineExceededError:
            return
        except RefusedError as error:
            if error.code in _PASSING:
                refused.set()
                return
            self._context.log.warning("{} does not take {}: {}", name, value.KIND, error)
            scope.cancel()  # it stays behind
        except AskError as error:
            self._context.log.debug("{} waits for {}: {}", value.KIND, name, error)
            refused.set()
        else:
            if self._value is value:
                self._behind.discard(name)
            scope.cancel()
