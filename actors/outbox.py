"""What must reach another actor although that may just be restarting: sent again until it says that it has it.

Theory of operation. A message that is told is lost with the process that it was told to. An outbox asks instead, one
message after another in the order in which they came, and lets go of each when it was answered. While the other is
gone, or does not answer, they wait here, `limit` of them at most; what comes beyond displaces the oldest and is
counted. Where messages are about peers, those about one peer that has more than its share go first. The other may get a
message twice, if it was killed between its work and its answer; it never misses one of those that waited, unless this
process itself is killed.
"""

from __future__ import annotations

import collections

import trio

from protocol.messages import Request
from protocol.messages.system import Ok
from protocol.peer_id import PeerId
from protocol.shares import share
from supervisor.actor import Context
from supervisor.errors import AskError, DeadlineExceededError, RefusedError

LIMIT = 4096
"""Messages that wait: at the rate of a flood, which is folded to some dozens a second, more than a minute's worth."""

ANSWER_DEADLINE = 5.0
"""Seconds for an answer: longer than the other takes to be found hung and replaced."""

PAUSE = 0.1
"""Seconds before a message is sent again; a restart takes less."""

PATIENCE = 60.0
"""Seconds to wait for the other to be there before it is tried all the same."""

_PASSING = frozenset(("mailbox-full", "not-delivered"))
"""Refusals for want of room, which comes again. Any other is an answer like each that was to be expected."""


class Outbox:
    """Messages of one actor to one other.

    Args:
        context: whose they are.
        target: for whom they are.
        limit: how many may wait.
    """

    def __init__(self, context: Context, target: str, limit: int = LIMIT) -> None:
        self._context = context
        self._target = target
        self._limit = limit
        self._held: collections.Counter[PeerId | None] = collections.Counter()
        self._waiting: collections.deque[Request[Ok]] = collections.deque()
        self._sending = False
        self._asking: Request[Ok] | None = None

    def __len__(self) -> int:
        """How many wait, the one under way included."""
        return len(self._waiting)

    def send(self, message: Request[Ok]) -> None:
        """Send this after all that was given before."""
        if len(self._waiting) >= self._limit:
            self._displace()
        self._waiting.append(message)
        self._held[_peer_of(message)] += 1
        if not self._sending:
            self._sending = True
            self._context.nursery.start_soon(self._send_all)

    def close(self) -> None:
        """The actor is stopping, and waits no longer: tell what is left, for whoever is there to hear it."""
        while self._waiting:
            message = self._take(0)
            if message is not self._asking:
                self._context.tell(self._target, message)

    def _displace(self) -> None:
        """Drop the oldest message, that of whoever has more than its share if somebody else has any."""
        who, count = self._held.most_common(1)[0]
        oldest = 0
        if len(self._held) > 1 and count >= share(self._limit):
            oldest = next(at for at, message in enumerate(self._waiting) if _peer_of(message) == who)
        self._take(oldest)
        self._lost()

    def _take(self, at: int) -> Request[Ok]:
        message = self._waiting[at]
        del self._waiting[at]
        who = _peer_of(message)
        self._held[who] -= 1
        if not self._held[who]:
            del self._held[who]
        return message

    async def _send_all(self) -> None:
        try:
            while self._waiting:
                message = self._waiting[0]
                if await self._arrived(message) and self._waiting and self._waiting[0] is message:
                    self._take(0)
        finally:
            self._sending = False

    async def _arrived(self, message: Request[Ok]) -> bool:
        self._asking = message
        try:
            await self._context.ask(self._target, message, timeout=ANSWER_DEADLINE)
        except RefusedError as refusal:
            if refusal.code not in _PASSING:
                self._context.log.warning("{} does not take {}: {}", self._target, message.KIND, refusal)
                self._lost()
                return True
            self._asking = None
            await trio.sleep(PAUSE)
            return False
        except AskError as error:
            self._asking = None
            self._context.log.debug("{} waits for {}: {}", message.KIND, self._target, error)
            await trio.sleep(PAUSE)
            try:
                await self._context.wait_for(self._target, timeout=PATIENCE)
            except DeadlineExceededError:
                self._context.log.warning("{} messages wait for {}, which is not there", len(self), self._target)
            return False
        return True

    def _lost(self) -> None:
        self._context.metrics.counter("peerup_reports_lost_total", target=self._target).inc()


def _peer_of(message: Request[Ok]) -> PeerId | None:
    """Whose share of the places the message counts for."""
    peer = getattr(message, "peer", None)
    return peer if isinstance(peer, PeerId) else None
