"""A relay that is to stop: tells its clients, and cuts the circuits that nobody uses.

Theory of operation. Clients are told by yamux's go away on their connections. By the specification what runs goes on
then; peerup nodes do so, ask for nothing more here, and close what runs through this relay as soon as it carries
nothing (`actors.switchboard.departures`). Other implementations end the whole connection (go-libp2p, rust-libp2p) or
reset all of its streams (js-libp2p). So a peer that is no peerup node, or has not said yet what it is, is told only
when no stream is open on its connection any more. Until then it hears it when it asks for something. A peerup node is
known by a protocol that nothing else serves (`PROOF`), and not by its agent version, which anybody may choose: the
agents of other programs begin with `peerup/`, too.

Who was connected when it began is told; who comes later is told when it asks. Else a client that dials again
whenever it is told would be told again and again.

A circuit between two peers that were not told may carry nothing for as long as both of them like, but keepalives. It is
cut when no more than `TRICKLE` bytes have gone over it in `IDLE` seconds of the farewell. Whether a silent circuit of
peerup nodes is in use they know themselves: a stream may be open in it that waits for an answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

from actors.switchboard.connections import Connection, ConnectionTable
from actors.switchboard.protocols import CancellableTimer
from protocol.peer_id import PeerId
from protocol.protocol_ids import DELIVERY
from protocol.reservations import Circuit

LOOK: Final = 0.25
"""Seconds between looks at connections and circuits."""

IDLE: Final = 10.0
"""Seconds in which next to nothing goes on: TCP that lost several packets in a row stands still for less, and it is a
fraction of the time that circuits get."""

TRICKLE: Final = 2048
"""Bytes, both ways together, that keepalives may take in this time: js-libp2p pings every ten seconds, with a stream
for each, which is some hundred bytes."""

PROOF: Final = DELIVERY
"""A protocol that every peerup node serves to every peer, and no other program. Those of our nodes that are too old to
serve it are treated like others, which does no harm."""


class Farewell:
    """See the module; it begins at once.

    Args:
        circuits: the open ones.
        cut: ends one that is idle.
        now, call_later: clock and timer.
    """

    def __init__(
        self,
        connections: ConnectionTable,
        *,
        circuits: Callable[[], Iterable[Circuit]],
        cut: Callable[[Circuit], None],
        now: Callable[[], float],
        call_later: Callable[[float, Callable[[], None]], CancellableTimer],
    ) -> None:
        self._connections = connections
        self._circuits = circuits
        self._cut = cut
        self._now = now
        self._call_later = call_later
        self._untold = [connection for connection in connections if not connection.relayed]
        self._seen: dict[int, tuple[int, float]] = {}  # by circuit: how many bytes, and since when hardly more
        self._timer: CancellableTimer | None = None
        self._stopped = False
        self._look()

    def stop(self) -> None:
        """Leave it at that."""
        self._stopped = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        self._timer = None
        self._tell()
        self._look_at_circuits()
        if not self._stopped:  # by what came of a cut
            self._timer = self._call_later(LOOK, self._look)

    def _tell(self) -> None:
        untold, self._untold = self._untold, []
        for connection in untold:
            if connection.link.end is not None:
                continue
            if _stays(connection) or not connection.link.streams:
                connection.say_go_away()
            else:
                self._untold.append(connection)

    def _look_at_circuits(self) -> None:
        now, seen, self._seen = self._now(), self._seen, {}
        for circuit in list(self._circuits()):
            if self._knows(circuit.source) or self._knows(circuit.destination):
                continue
            carried = sum(circuit.forwarded)
            before, since = seen.get(circuit.number, (carried, now))
            if carried - before > TRICKLE:
                before, since = carried, now
            if now - since >= IDLE:
                self._cut(circuit)
            else:
                self._seen[circuit.number] = before, since

    def _knows(self, peer: PeerId) -> bool:
        """Whether the peer was told, and sees to its circuits."""
        return any(_stays(connection) and connection.parting for connection in self._connections.of(peer))


def _stays(connection: Connection) -> bool:
    """Whether a go away ends nothing that runs on this connection."""
    told = connection.identification
    return told is not None and PROOF in told.protocols
