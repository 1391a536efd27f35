"""To be connected to a peer, and to have a stream to it: one way in for everybody who asks, dialling where needed."""

from __future__ import annotations

from collections.abc import Sequence

import trio

from actors.switchboard.addresses import AddressBook
from actors.switchboard.admittance import Admittance
from actors.switchboard.connections import Connection, ConnectionTable
from actors.switchboard.dialer import Dialed, Dialer
from actors.switchboard.errors import ConnectionLostError, SwitchboardError, UnreachableError
from actors.switchboard.keeper import Keeper
from actors.switchboard.link import LinkClosedError
from actors.switchboard.numbers import Numbers
from actors.switchboard.pipes import Pipes
from actors.switchboard.streams import ChannelStream, open_negotiated
from actors.switchboard.transports import resolve
from actors.switchboard.upgrade import Upgraded, Upgrader, not_authorised
from actors.switchboard.wire import Pipe
from protocol.errors import PeerupError
from protocol.multiaddr import Multiaddr
from protocol.peer_id import PeerId
from supervisor.actor import Context

PROOF_DEADLINE = 5.0
"""Seconds that `connect_proven` waits for the peer to show by a first byte that it accepts us."""


class Reach:
    """See the module.

    Attributes:
        book: where peers may be reached.
        dialer: dials under way.
        keeper: who needs whom.

    Args:
        own: this node's peer id, which cannot be dialled.
    """

    def __init__(
        self,
        context: Context,
        own: PeerId,
        *,
        pipes: Pipes,
        upgrader: Upgrader,
        table: ConnectionTable,
        admittance: Admittance,
        numbers: Numbers,
    ) -> None:
        self._context = context
        self._own = own
        self._pipes = pipes
        self._upgrader = upgrader
        self._table = table
        self._numbers = numbers
        self.book = AddressBook()
        self.dialer: Dialer[tuple[Pipe, Upgraded], Connection] = Dialer(
            context.nursery,
            resolve=resolve,
            attempt=self._attempt,
            establish=lambda won: admittance.establish(*won, outbound=True),
            discard=lambda late: late[0].close(),
            now=context.now,
        )
        self.keeper = Keeper(context.nursery, self.connect_proven, table.until_lost, context.now, context.random)

    async def connect(self, peer: PeerId) -> tuple[Connection, tuple[str, ...]]:
        """The connection to a peer, which is dialled if there is none, and each attempt in words.

        Raises:
            SwitchboardError: there is no way, and why.
        """
        connection = self._table.best(peer)
        if connection is not None:
            return connection, ()
        if peer == self._own:
            raise UnreachableError("that is this node itself")
        dialed: Dialed[Connection] | None = None
        failure: SwitchboardError | None = None
        async with trio.open_nursery() as nursery:

            async def peer_came_to_us() -> None:
                await self._table.until_found(peer)
                nursery.cancel_scope.cancel()

            nursery.start_soon(peer_came_to_us)
            try:
                dialed = await self.dialer.dial(peer, self.book.addresses(peer))
            except SwitchboardError as error:
                failure = error
            nursery.cancel_scope.cancel()
        connection = self._table.best(peer)
        if connection is not None:
            return connection, dialed.tried if dialed is not None else ()
        if dialed is not None:
            raise why_lost(dialed.connection, ConnectionLostError("the connection ended at once"))
        assert failure is not None
        raise failure

    async def connect_proven(self, peer: PeerId) -> tuple[Connection, tuple[str, ...]]:
        """As `connect`, and the peer has shown that it accepts us.

        Raises:
            SwitchboardError: as there; NotAuthorisedError where the peer hung up when it knew who we are.
        """
        connection, tried = await self.connect(peer)
        with trio.move_on_after(PROOF_DEADLINE):
            while not connection.identified.is_set() and connection.end is None:
                async with trio.open_nursery() as nursery:

                    async def wait_for(event: trio.Event) -> None:
                        await event.wait()
                        nursery.cancel_scope.cancel()

                    nursery.start_soon(wait_for, connection.identified)
                    nursery.start_soon(wait_for, connection.ended)
        if connection.end is not None:
            raise why_lost(connection, ConnectionLostError(connection.end.reason))
        return connection, tried

    def known_to_speak(self, peer: PeerId, protocols: Sequence[str]) -> Connection | None:
        """The connection to a peer that has said that it speaks this one protocol."""
        connection = self._table.best(peer)
        if connection is None or connection.identification is None or len(protocols) != 1:
            return None
        return connection if protocols[0] in connection.identification.protocols else None

    async def open(self, peer: PeerId, protocols: Sequence[str]) -> tuple[Connection, str, ChannelStream]:
        """A stream to a peer for the first of these protocols that it speaks, connecting first where needed.

        Raises:
            PeerupError: no stream, and why.
        """
        known = self._table.best(peer)
        connection, _ = await self.connect(peer)
        try:
            return (connection, *await open_negotiated(connection, protocols))
        except (ConnectionLostError, LinkClosedError) as error:
            failure = why_lost(connection, ConnectionLostError(str(error)))
            if connection is not known:
                raise failure from error
        # The connection that was there turned out to be dying: one fresh one is worth a try.
        connection, _ = await self.connect(peer)
        try:
            return (connection, *await open_negotiated(connection, protocols))
        except (ConnectionLostError, LinkClosedError) as error:
            raise why_lost(connection, ConnectionLostError(str(error))) from error

    async def _attempt(self, peer: PeerId, address: Multiaddr) -> tuple[Pipe, Upgraded]:
        began = self._context.now()
        pipe: Pipe | None = None
        try:
            pipe = await self._pipes.connect(address)
            upgraded = await self._upgrader.outbound(pipe, peer)
        except BaseException as error:
            if pipe is not None:
                pipe.close()
            self._numbers.dial(error.code if isinstance(error, PeerupError) else "cancelled")
            raise
        self._numbers.dial("connected", self._context.now() - began)
        return pipe, upgraded


def why_lost(connection: Connection, error: SwitchboardError) -> SwitchboardError:
    """What the end of a connection means: a peer that never said a word does not let us in."""
    return not_authorised() if connection.outbound and not connection.heard else error
