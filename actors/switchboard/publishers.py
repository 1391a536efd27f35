"""Whom the switchboard follows: the gate, for the policy, and the config actor, for names, addresses and relays.

The last good value of each stays in force while its publisher is away. One that is down is asked again when it is up;
one that was only slow, at the next tick.
"""

from __future__ import annotations

from collections.abc import Callable

from protocol.messages.config import ConfigSnapshot, SubscribeConfig
from protocol.messages.gate import PolicyPublished, SubscribePolicy
from protocol.policy import DENY_ALL, PolicyIndex
from supervisor.actor import Context
from supervisor.errors import (
    ActorRestartingError,
    AskError,
    DeadlineExceededError,
    NoSuchActorError,
    RefusedError,
)

GATE = "gate"
CONFIG = "config"

SUBSCRIBE_DEADLINE = 2.0
"""Seconds for a publisher to answer; if it does not, it is asked again at the next tick."""
ASK_AGAIN = 30.0
"""Seconds after which the gate is asked for the policy although it would tell: news can be lost in a full mailbox."""


class Publishers:
    """See the module.

    Attributes:
        policy: what is in force.

    Args:
        policy_changed, config_changed: called with each new value.
    """

    def __init__(
        self,
        context: Context,
        policy_changed: Callable[[], None],
        config_changed: Callable[[ConfigSnapshot], None],
    ) -> None:
        self.policy = DENY_ALL
        self._context = context
        self._policy_changed = policy_changed
        self._config_changed = config_changed
        self._missing: set[str] = set()  # did not answer, though they are there
        self._ask_again = context.now() + ASK_AGAIN

    async def follow(self) -> None:
        """Begin to follow both."""
        for publisher in (GATE, CONFIG):
            self._context.watch(publisher)
            await self.subscribe(publisher)

    async def subscribe(self, publisher: str) -> None:
        """Subscribe (again) to one of them; any other name is ignored."""
        self._missing.discard(publisher)
        try:
            if publisher == GATE:
                await self._subscribe_policy()
            elif publisher == CONFIG:
                self._config_changed(await self._context.ask(CONFIG, SubscribeConfig(), timeout=SUBSCRIBE_DEADLINE))
        except AskError as error:
            if isinstance(error, DeadlineExceededError | RefusedError):
                self._missing.add(publisher)
            level = "DEBUG" if isinstance(error, ActorRestartingError | NoSuchActorError) else "WARNING"
            self._context.log.log(level, "{} does not answer, what it said last stays in force: {}", publisher, error)

    async def _subscribe_policy(self) -> None:
        before = self.policy
        published = await self._context.ask(GATE, SubscribePolicy(), timeout=SUBSCRIBE_DEADLINE)
        now = self.policy
        if published.policy != now.policy and (
            now is before or now.policy is None or published.policy.version >= now.policy.version
        ):
            self._apply(PolicyIndex(published.policy))

    def policy_published(self, message: PolicyPublished) -> None:
        """The gate has told a policy."""
        known = self.policy.policy
        # One that was on its way while we subscribed may be older than the answer to that.
        if known is None or message.policy.version >= known.version:
            self._apply(PolicyIndex(message.policy))

    def tick(self) -> None:
        """Ask those again that did not answer, and the gate now and then anyway."""
        now = self._context.now()
        if now >= self._ask_again:
            self._ask_again = now + ASK_AGAIN
            self._missing.add(GATE)
        for publisher in sorted(self._missing):
            self._context.nursery.start_soon(self.subscribe, publisher)
        self._missing.clear()

    def _apply(self, policy: PolicyIndex) -> None:
        self.policy = policy
        self._policy_changed()
