"""Relays that are leaving: what is new goes another way at once, and what runs through them has time to end.

Theory of operation. A relay that is being stopped says go away on its connections (a yamux frame) and grants nothing
from then on, but lets open circuits run for a while. For its clients, which are told by that frame, this means::

    go away from a relay -> no circuits are asked for there any more; other relays are used
                         -> relayed connections through it take no new streams; without a stream for `QUIET` seconds
                            they are closed, so that the relay need not wait for what carries nothing
                         -> the connection to it stays, however idle: its end tells when the relay has ended
    meanwhile -> whoever needs the relay dials it again after a short pause, at random: a successor may have its port
                 while circuits run on in the one that leaves; for `RETURN` seconds it is dialled every half a second,
                 since a process takes a second or some to start, and a refusal costs nothing
    a new connection to it comes up -> the relay is there again; what was dialled before is seen off as above

That a relay leaves is no failure of it.

A peer that is no relay of ours says so for itself alone, and may be dialled anew at once.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Final

import trio

from actors.events import until_any
from actors.switchboard.connections import Connection, ConnectionTable
from protocol.peer_id import PeerId

PATIENCE: Final = 60.0
"""Seconds for which a relay that has said go away, and is still there, is believed to be leaving."""

QUIET: Final = 0.3
"""Seconds without a stream after which a relayed connection is closed; less than whoever stops a relay notices."""

LONGEST_QUIET: Final = 2.0
"""The same where a round trip takes long: the peer may have opened a stream that is still on its way."""

LOOK: Final = 0.1
"""Seconds between looks at the relayed connections, while there are such and their relay is leaving."""

PAUSE: Final = (0.25, 1.0)
"""Seconds between which the first dial of a relay that has ended is spread, so that its clients do not come at once."""

SUCCESSOR: Final = 0.5
"""Seconds more before a relay is dialled that is still there: so long its successor takes to start at least."""

RETURN: Final = 15.0
"""Seconds after its go away for which a relay is expected back. One that leaves again within them is not."""

CODE: Final = "relay-leaving"


class Departures:
    """See the module.

    Args:
        nursery: where relayed connections are seen off.
        is_relay: whether the configuration names this peer as a relay.
        now, randomness: clock and jitter.
        log: takes a line about a relay.
    """

    def __init__(
        self,
        nursery: trio.Nursery,
        table: ConnectionTable,
        *,
        is_relay: Callable[[PeerId], bool],
        now: Callable[[], float],
        randomness: random.Random,
        log: Callable[[str], None],
    ) -> None:
        self._nursery = nursery
        self._table = table
        self._is_relay = is_relay
        self._now = now
        self._random = randomness
        self._log = log
        self._leaving: dict[PeerId, Connection] = {}
        self._waited: set[PeerId] = set()  # those that are leaving and have been given time for that
        self._left: dict[PeerId, float] = {}
        self._late = trio.Event()  # a relayed connection has come up

    def __contains__(self, relay: PeerId | None) -> bool:
        """Whether this relay is leaving."""
        return relay in self._leaving

    def said(self, connection: Connection) -> None:
        """The peer of a connection has said go away."""
        if connection.gone_away:
            return
        connection.leaving = True
        relay = connection.peer
        if not self._matters(connection):
            self._table.gone_away(connection, self._now())
            return
        self._table.gone_away(connection, self._now(), PATIENCE)
        if relay not in self._leaving:
            self._leaving[relay] = connection
            self._waited.discard(relay)
            now = self._now()
            for returned in [each for each, since in self._left.items() if now - since >= RETURN]:
                del self._left[returned]
            self._left.setdefault(relay, now)
            self._log(f"the relay {relay} is shutting down; what is new goes another way")
            for each in self._through(relay):
                self._table.gone_away(each, self._now())
            self._nursery.start_soon(self._see_off, relay, connection)

    def opened(self, connection: Connection) -> None:
        """A connection has come up: perhaps through a relay that was not leaving when it was dialled."""
        left = self._leaving.get(connection.peer)
        if left is not None and not connection.relayed:
            del self._leaving[connection.peer]
            self._log(f"the relay {connection.peer} is there again")
        if connection.via.relay in self:
            self._late.set()
            self._late = trio.Event()

    def returning(self, peer: PeerId) -> bool:
        """Whether this is a relay that has left a moment ago and is probably being restarted."""
        since = self._left.get(peer)
        return since is not None and self._now() - since < RETURN

    async def until_gone(self, peer: PeerId) -> None:
        """Return when this peer is no relay that is leaving: at once, or a moment after it has ended.

        Whoever asks again dials because that moment was too short, and does not wait.
        """
        connection = self._leaving.get(peer)
        if connection is None or peer in self._waited:
            await trio.lowlevel.checkpoint()
            return
        with trio.move_on_after(SUCCESSOR):
            await connection.ended.wait()
        await trio.sleep(self._random.uniform(*PAUSE))
        if self._leaving.get(peer) is connection:
            self._waited.add(peer)

    def _matters(self, connection: Connection) -> bool:
        """Whether it is the connection over which a relay serves us."""
        if connection.relayed:
            return False
        for other in self._table.of(connection.peer):
            if other is not connection and not other.relayed and not other.draining:
                return False  # it only ends one that it has too many
        return self._is_relay(connection.peer) or bool(self._through(connection.peer))

    def _through(self, relay: PeerId) -> list[Connection]:
        return [connection for connection in self._table if connection.via.relay == relay]

    async def _see_off(self, relay: PeerId, connection: Connection) -> None:
        """Close what runs through a leaving relay as soon as it carries nothing."""
        quiet: dict[Connection, float] = {}
        known: set[Connection] = set()
        successor_at = self._now()
        with trio.move_on_after(PATIENCE):
            while connection.end is None:
                now = self._now()
                if self._leaving.get(relay) is connection:
                    successor_at = now
                for each in self._through(relay):
                    if each.opened > successor_at:
                        continue  # it goes through a successor
                    if each in known:
                        self._table.gone_away(each, now)
                    known.add(each)  # who has just dialled a late one is to have it for a first stream
                    if each.link.streams:
                        quiet.pop(each, None)
                    elif now - quiet.setdefault(each, now) >= _quiet(each) and each.link.end is None:
                        each.link.close(CODE, f"the relay {relay} is shutting down")
                await self._until_news(connection, LOOK if self._through(relay) else PATIENCE)
        if self._leaving.get(relay) is connection:
            del self._leaving[relay]

    async def _until_news(self, connection: Connection, seconds: float) -> None:
        """Return when so much time has passed, the connection has ended, or a relayed one has come up."""
        with trio.move_on_after(seconds):
            await until_any(connection.ended, self._late)


def _quiet(connection: Connection) -> float:
    """Seconds that this connection may carry no stream."""
    return min(LONGEST_QUIET, max(QUIET, 2 * (connection.link.rtt or 0.0)))
