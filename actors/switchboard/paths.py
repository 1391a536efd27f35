"""How peers are connected, for a person who asks: every path measured, and the hops of one."""

from __future__ import annotations

import trio

from actors.switchboard.connections import Connection, ConnectionTable
from actors.switchboard.ping import ping
from actors.switchboard.reach import Reach
from protocol.errors import PeerupError
from protocol.messages.paths import Hop, MeasuredPath, PathsMeasured, Traced
from protocol.peer_id import PeerId
from supervisor.actor import Context

MEASURE_DEADLINE = 5.0
"""Seconds for one round trip: whoever asks would take a path that is slower for dead."""
AT_ONCE = 32
"""Paths measured side by side."""


class Paths:
    """See the module.

    Args:
        own: this node's peer id.
    """

    def __init__(self, context: Context, own: PeerId, table: ConnectionTable, reach: Reach) -> None:
        self._context = context
        self._own = own
        self._table = table
        self._reach = reach

    async def measure(self, peer: PeerId | None) -> PathsMeasured:
        """Each connection to this peer, or to all, with a round trip."""
        peers = sorted(self._table.peers()) if peer is None else [peer]
        found = [connection for each in peers for connection in self._table.of(each)]
        measured: dict[Connection, MeasuredPath] = {}
        room = trio.CapacityLimiter(AT_ONCE)

        async def one(connection: Connection) -> None:
            async with room:
                rtt, failure = await self._ping(connection)
            no_direct = self._reach.improver.last_failure(connection.peer) if connection.relayed else ""
            measured[connection] = MeasuredPath(connection.info(), not connection.draining, rtt, failure, no_direct)

        async with trio.open_nursery() as nursery:
            for connection in found:
                nursery.start_soon(one, connection)
        return PathsMeasured(tuple(measured[connection] for connection in found))

    async def trace(self, peer: PeerId) -> Traced:
        """The hops to this peer.

        Raises:
            SwitchboardError: it cannot be connected.
        """
        began = self._context.now()
        fresh = self._table.best(peer) is None
        connection, _ = await self._reach.connect(peer, anyway=True)
        connected_in = self._context.now() - began if fresh else None
        hops = [Hop("node", self._own, None, "", 0.0, "")]
        relay = connection.via.relay
        if relay is not None:
            hops.append(await self._relay_hop(relay, connection))
        rtt, failure = await self._ping(connection)
        hops.append(Hop("peer", peer, connection.remote_address, connection.via.transport, rtt, failure))
        return Traced(tuple(hops), connection.way, connected_in)

    async def _relay_hop(self, relay: PeerId, connection: Connection) -> Hop:
        for carrier in self._table.of(relay):
            if not carrier.relayed:
                rtt, failure = await self._ping(carrier)
                return Hop("relay", relay, carrier.remote_address, carrier.via.transport, rtt, failure)
        return Hop("relay", relay, connection.remote_address.relay, connection.via.transport, None, "not connected")

    async def _ping(self, connection: Connection) -> tuple[float | None, str]:
        with trio.move_on_after(MEASURE_DEADLINE):
            try:
                rtt, _ = await ping(connection, self._context.now, self._context.random)
            except PeerupError as error:
                return None, str(error)
            return rtt, ""
        connection.link.ask()  # whoever asked sees that it is silent: have it judged now, and not when it is idle
        return None, f"no answer within {MEASURE_DEADLINE:g} s"
