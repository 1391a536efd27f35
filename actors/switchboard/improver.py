"""Looks for a direct way to each peer that is connected through a relay only.

Theory of operation. One task for each such peer. It waits, dials the direct addresses that are known of the peer, and
waits longer each time; news about the peer's addresses, or about the network, ends the wait, but not within
`LEAST_PAUSE` of the last attempt: the peer itself says where it is, and shall not have us knock at other people's doors
all the time. When there is a direct connection the table drains the relayed one, new streams take the direct one, and
the task ends, as it does when the peer is gone.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable

import trio

from actors.switchboard.backoff import BackOff
from actors.switchboard.connections import Connection, ConnectionTable
from protocol.errors import PeerupError
from protocol.peer_id import PeerId

FIRST_WAIT = 1.0
"""Seconds before the first attempt: identify has told where the peer says that it is."""
LEAST_PAUSE = 1.0
"""Seconds between two attempts, whatever news comes."""
LONGEST_WAIT = 300.0
"""Seconds between attempts in the end: a peer that moves tells, so that this is for what nobody notices."""


class Improver:
    """See the module.

    Args:
        dial: connects to this peer without a relay, or raises a PeerupError; does nothing where no address is known.
    """

    def __init__(
        self,
        nursery: trio.Nursery,
        table: ConnectionTable,
        dial: Callable[[PeerId], Awaitable[object]],
        randomness: random.Random,
    ) -> None:
        self._nursery = nursery
        self._table = table
        self._dial = dial
        self._random = randomness
        self._wake: dict[PeerId, trio.Event] = {}
        self._failures: dict[PeerId, str] = {}

    def opened(self, connection: Connection) -> None:
        """A connection has come up."""
        if connection.relayed and connection.peer not in self._wake:
            self._wake[connection.peer] = trio.Event()
            self._nursery.start_soon(self._improve, connection.peer)

    def ended(self, peer: PeerId) -> None:
        """A connection to this peer is gone; what is left may be relayed."""
        best = self._table.best(peer)
        if best is not None:
            self.opened(best)

    def news(self, peer: PeerId | None = None) -> None:
        """Something has changed that may let a direct dial succeed; of all peers, or of this one."""
        for waiting in self._wake if peer is None else (peer,):
            if (wake := self._wake.get(waiting)) is not None:
                wake.set()

    def last_failure(self, peer: PeerId) -> str:
        """Why there is no direct connection, in words; empty where none was tried."""
        return self._failures.get(peer, "")

    def _wanted(self, peer: PeerId) -> bool:
        best = self._table.best(peer)
        return best is not None and best.relayed

    async def _improve(self, peer: PeerId) -> None:
        back_off = BackOff(self._random, FIRST_WAIT, LONGEST_WAIT)
        earliest = trio.current_time()
        try:
            while self._wanted(peer):
                wake = self._wake[peer] = trio.Event()
                with trio.move_on_after(back_off.failed()):
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(self._until_lost, peer, nursery.cancel_scope)
                        await wake.wait()
                        await trio.sleep_until(earliest)
                        nursery.cancel_scope.cancel()
                if wake.is_set():
                    back_off.reset()
                if not self._wanted(peer):
                    return
                try:
                    await self._dial(peer)
                except PeerupError as error:
                    self._failures[peer] = str(error)
                earliest = trio.current_time() + LEAST_PAUSE
        finally:
            del self._wake[peer]
            self._failures.pop(peer, None)

    async def _until_lost(self, peer: PeerId, scope: trio.CancelScope) -> None:
        await self._table.until_lost(peer)
        scope.cancel()
