"""Keeps needed peers connected: one task for each, which dials again with back-off for as long as somebody needs it.

Theory of operation. A peer is needed while at least one actor has said so. Its task goes round: wait while connected;
dial; after a failure wait the back-off time, or until something changes that makes an attempt worth while (new
addresses, somebody asks at once). A connection that ended within `STABLE` seconds counts as a failure too, else a peer
that accepts and hangs up would be dialled without pause.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Awaitable, Callable

import trio

from actors.switchboard.backoff import BackOff
from protocol.errors import PeerupError
from protocol.peer_id import PeerId

STABLE = 10.0
"""Seconds that a connection must live to make the next dial immediate."""


@dataclasses.dataclass
class _Need:
    actors: set[str]
    scope: trio.CancelScope
    back_off: BackOff
    wake: trio.Event
    next_dial: float | None = None
    last_failure: str = ""


class Keeper:
    """Knows who needs whom.

    Args:
        nursery: where the tasks run.
        connect: returns once the peer is connected; raises a :class:`PeerupError` if that fails.
        until_lost: returns once the peer is no longer connected.
        now, randomness: clock and jitter.
        returning: whether this peer is expected back in a moment, so that failures do not count.
    """

    def __init__(
        self,
        nursery: trio.Nursery,
        connect: Callable[[PeerId], Awaitable[object]],
        until_lost: Callable[[PeerId], Awaitable[None]],
        now: Callable[[], float],
        randomness: random.Random,
        *,
        returning: Callable[[PeerId], bool] = lambda _: False,
    ) -> None:
        self._nursery = nursery
        self._connect = connect
        self._until_lost = until_lost
        self._now = now
        self._random = randomness
        self._returning = returning
        self._needs: dict[PeerId, _Need] = {}

    def need(self, actor: str, peer: PeerId) -> None:
        """This actor needs this peer from now on."""
        known = self._needs.get(peer)
        if known is not None:
            known.actors.add(actor)
            return
        need = self._needs[peer] = _Need({actor}, trio.CancelScope(), BackOff(self._random), trio.Event())
        self._nursery.start_soon(self._keep, peer, need)

    def release(self, actor: str, peer: PeerId) -> None:
        """This actor no longer needs this peer."""
        need = self._needs.get(peer)
        if need is None:
            return
        need.actors.discard(actor)
        if not need.actors:
            del self._needs[peer]
            need.scope.cancel()

    def release_all(self, actor: str) -> None:
        """This actor is gone."""
        for peer in [peer for peer, need in self._needs.items() if actor in need.actors]:
            self.release(actor, peer)

    def retry(self, peer: PeerId) -> None:
        """Something changed: do not wait for the back-off of this peer."""
        need = self._needs.get(peer)
        if need is not None:
            need.back_off.reset()
            need.wake.set()

    def peers(self) -> tuple[PeerId, ...]:
        """All needed peers."""
        return tuple(self._needs)

    def needed_by(self, peer: PeerId) -> tuple[str, ...]:
        """Names of the actors that need it, sorted."""
        need = self._needs.get(peer)
        return tuple(sorted(need.actors)) if need else ()

    def next_dial(self, peer: PeerId) -> float | None:
        """Seconds until the next attempt, if one waits."""
        need = self._needs.get(peer)
        return None if need is None or need.next_dial is None else max(0.0, need.next_dial - self._now())

    def last_failure(self, peer: PeerId) -> str:
        """Why the last attempt failed; empty after a success."""
        need = self._needs.get(peer)
        return need.last_failure if need else ""

    async def _keep(self, peer: PeerId, need: _Need) -> None:
        with need.scope:
            while True:
                need.wake = trio.Event()  # a retry that is asked for while we dial or are connected counts, too
                try:
                    await self._connect(peer)
                except PeerupError as error:
                    need.last_failure = str(error)
                else:
                    need.last_failure = ""
                    began = self._now()
                    await self._until_lost(peer)
                    if self._now() - began >= STABLE:
                        need.back_off.reset()
                        continue
                wait = need.back_off.again() if self._returning(peer) else need.back_off.failed()
                need.next_dial = self._now() + wait
                with trio.move_on_after(wait):
                    await need.wake.wait()
                need.next_dial = None
