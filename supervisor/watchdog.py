"""Feeds the watchdog of whoever runs the service, such as systemd, as long as the whole tree answers.

Theory of operation. Supervisors replace what has died or hangs below them, and the service replaces the root. What
nobody inside could replace is left: a tree that is there and does nothing. So in each round everybody who matters is
asked for a sign of life, by the way that every message takes, and the watchdog is fed if all of them gave one::

    service ─QueryExists→ admin         Thespian's own question, over its own frames
    service ─Ping→ root                 a plain supervisor
    service ─Ping→ switchboard, api, …  actors: through the registry, answered by their event loops

A round that somebody missed feeds nothing, and the next one asks again: an actor that is just being replaced costs one
of the `ROUNDS` that fit into the period. Nothing here depends on the world outside, such as connections or relays: no
restart repairs that.

While the service stops, which has a deadline of its own, the watchdog is fed in each round.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection

from protocol.messages import Message
from protocol.messages.system import Ping, Pong
from supervisor.errors import AskError
from supervisor.exchange import Exchange
from supervisor.timers import Timer

ROUNDS = 4
"""Rounds within the watchdog's period. Its readers recommend two; with four, one may fail without harm."""

ADMIN = "admin"
"""What stands for Thespian's admin among those who have not answered yet; it is no name of the registry."""


class Watchdog:
    """See the module.

    Arguments:
        period: seconds without a sign of life after which the reader acts.
        names: who must answer.
        exchange: the service's own.
        ask_admin: asks the admin; its answer is to be passed on by :meth:`admin_answered`.
        feed: called when all have answered.
    """

    def __init__(
        self,
        period: float,
        names: Collection[str],
        exchange: Exchange,
        ask_admin: Callable[[], None],
        feed: Callable[[], None],
    ) -> None:
        self.interval = period / ROUNDS
        self._names = tuple(names)
        self._exchange = exchange
        self._ask_admin = ask_admin
        self._feed = feed
        self._round = 0
        self._silent: set[str] = set()
        self._admin_asked = False
        self._stopping = False
        self._timer: Timer | None = None

    @property
    def silent(self) -> frozenset[str]:
        """Who has not answered in the present round."""
        return frozenset(self._silent)

    def begin(self) -> None:
        """Start a round, and one in each interval from now on. The exchange's `close` ends that."""
        self._timer = self._exchange.call_at(self._exchange.now() + self.interval, self.begin)
        if self._stopping:
            self._feed()
            return
        self._round += 1
        self._silent = {ADMIN, *self._names}
        if not self._admin_asked:  # questions to one who is hung must not pile up
            self._admin_asked = True
            self._ask_admin()
        for name in self._names:
            answered = functools.partial(self._answered, self._round, name)
            try:
                self._exchange.ask(name, Ping(), timeout=self.interval, answer=answered)
            except AskError as error:
                answered(error)

    def admin_answered(self) -> None:
        """The admin has given a sign of life."""
        self._admin_asked = False
        self._heard(ADMIN)

    def stopping(self) -> None:
        """The service is about to stop its tree: from now on each round feeds."""
        self._stopping = True

    def _answered(self, number: int, name: str, answer: Message | AskError) -> None:
        if number == self._round and isinstance(answer, Pong):
            self._heard(name)

    def _heard(self, name: str) -> None:
        if name in self._silent:
            self._silent.discard(name)
            if not self._silent and not self._stopping:
                self._feed()
