"""To be connected to a peer, and to have a stream to it: one way in for everybody who asks, dialling where needed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import trio

from actors.events import until_any
from actors.switchboard.addresses import AddressBook
from actors.switchboard.admittance import Admittance
from actors.switchboard.circuit_pipes import DialledCircuit
from actors.switchboard.connections import Connection, ConnectionTable
from actors.switchboard.departures import Departures
from actors.switchboard.dialer import Dialed, Dialer
from actors.switchboard.errors import (
    AddressError,
    ConnectionLostError,
    NotAuthorisedError,
    RelayRefusedError,
    RelayUnreachableError,
    SwitchboardError,
    UnreachableError,
)
from actors.switchboard.improver import Improver
from actors.switchboard.keeper import Keeper
from actors.switchboard.link import LinkClosedError
from actors.switchboard.numbers import Numbers
from actors.switchboard.own_machine import OwnMachine
from actors.switchboard.pipes import Pipes
from actors.switchboard.refusals import Rare
from actors.switchboard.relays import RelayBook
from actors.switchboard.resolver import Resolver
from actors.switchboard.streams import ChannelStream, open_negotiated
from actors.switchboard.upgrade import Upgraded, Upgrader, not_authorised
from actors.switchboard.wire import Pipe
from protocol.errors import PeerupError
from protocol.messages.config import AddressEntry
from protocol.multiaddr import Multiaddr
from protocol.peer_id import PeerId
from supervisor.actor import Context

PROOF_DEADLINE = 5.0
"""Seconds that `connect_proven` waits for the peer to show by a first byte that it accepts us."""


class Reach:
    """See the module.

    Attributes:
        book: where peers may be reached.
        relays: through whom.
        departures: which relays are leaving.
        improver: looks for direct ways to peers that are connected through a relay.
        dialer: dials under way.
        keeper: who needs whom.
        refusals: who does not let us in.

    Args:
        own: this node's peer id, which cannot be dialled.
        here: what is known of this machine's addresses, now.
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
        here: Callable[[], OwnMachine] = OwnMachine,
    ) -> None:
        self._context = context
        self._own = own
        self._pipes = pipes
        self._upgrader = upgrader
        self._table = table
        self._admittance = admittance
        self._numbers = numbers
        self.book = AddressBook()
        self.relays = RelayBook()
        self.departures = Departures(
            context.nursery,
            table,
            is_relay=lambda peer: peer in self.relays,
            now=context.now,
            randomness=context.random,
            log=lambda text: context.log.info("{}", text),
        )
        self.dialer: Dialer[tuple[Pipe, Upgraded], Connection] = Dialer(
            context.nursery,
            resolve=Resolver(self.book.may_lead_here, here).resolve,
            attempt=self._attempt,
            establish=lambda won: admittance.establish(*won, outbound=True),
            discard=lambda late: late[0].close(),
            now=context.now,
        )
        self.keeper = Keeper(
            context.nursery,
            self._keep_connected,
            table.until_lost,
            context.now,
            context.random,
            returning=self.departures.returning,
        )
        self.refusals = admittance.refusals
        self._here = here
        self._failures: Rare[PeerId] = Rare(context.now)
        self.improver = Improver(context.nursery, table, self._dial_direct, context.random)

    def configure(self, addresses: Iterable[AddressEntry], relays: Sequence[Multiaddr]) -> None:
        """Take the configuration's addresses and relays in place of the ones before."""
        self.refusals.clear()
        self.relays.configure(relays)
        for peer in self.book.configure(addresses, relays):
            self.keeper.retry(peer)
            self.improver.news(peer)

    def learn(self, connection: Connection) -> None:
        """A peer has said where it is, and what it is."""
        self._admittance.heard(connection.peer)
        self.book.learn(connection, self._here())
        self.improver.news(connection.peer)

    def addresses(self, peer: PeerId) -> tuple[Multiaddr, ...]:
        """Where the peer may be reached: directly first, then through relays."""
        known = self.book.addresses(peer)
        direct = tuple(address for address in known if not address.is_relayed)
        if peer in self.relays:
            return direct
        circuits = self.relays.circuits(peer, [address for address in known if address.is_relayed])
        usable = tuple(address for address in circuits if _relay_of(address) != self._own)
        staying = tuple(address for address in usable if _relay_of(address) not in self.departures)
        return direct + (staying or usable)  # a relay that is leaving serves at least to say why there is no way

    def opened(self, connection: Connection) -> None:
        """A connection is there. If it is one to a relay there may be a way now to those whom nobody could reach."""
        self.improver.opened(connection)
        self.departures.opened(connection)
        if connection.relayed or connection.peer not in self.relays:
            return
        for peer in self.keeper.peers():
            if peer != connection.peer and self._table.best(peer) is None:
                self.keeper.retry(peer)

    async def connect(self, peer: PeerId, *, anyway: bool = False) -> tuple[Connection, tuple[str, ...]]:
        """The connection to a peer, which is dialled if there is none, and each attempt in words.

        `anyway`: also where it has refused us just now.

        Raises:
            SwitchboardError: there is no way, and why.
        """
        connection = self._table.best(peer)
        if connection is not None:
            return connection, ()
        if peer == self._own:
            raise UnreachableError("that is this node itself")
        if not anyway:
            self.refusals.check(peer)
        dialed: Dialed[Connection] | None = None
        failure: SwitchboardError | None = None
        async with trio.open_nursery() as nursery:

            async def peer_came_to_us() -> None:
                await self._table.until_found(peer)
                nursery.cancel_scope.cancel()

            nursery.start_soon(peer_came_to_us)
            try:
                dialed = await self.dialer.dial(peer, self.addresses(peer))
            except SwitchboardError as error:
                failure = error
                if isinstance(error, NotAuthorisedError):
                    self.refusals.note(peer)
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
        connection, tried = await self.connect(peer, anyway=True)
        with trio.move_on_after(PROOF_DEADLINE):
            while not connection.identified.is_set() and connection.end is None:
                await until_any(connection.identified, connection.ended)
        if connection.end is not None:
            raise why_lost(connection, ConnectionLostError(connection.end.reason))
        return connection, tried

    async def _keep_connected(self, peer: PeerId) -> None:
        await self.departures.until_gone(peer)
        try:
            await self.connect_proven(peer)
        except PeerupError as error:
            more = self._failures.note(peer)
            if more is not None:
                self._context.log.warning("not connected to {}: {}{}", peer, error, more)
            raise
        self._failures.forget(peer)

    def may_speak(self, connection: Connection, protocols: Sequence[str]) -> bool:
        """Whether to propose this one protocol together with its first bytes before the peer says what it speaks.

        Over a relay a round trip is dear, and whoever asks for a service has mostly been told of it.
        """
        return connection.relayed and connection.identification is None and len(protocols) == 1

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
            return (connection, *await _open_on(connection, protocols))
        except (ConnectionLostError, LinkClosedError) as error:
            failure = why_lost(connection, ConnectionLostError(str(error)))
            if connection is not known and connection.end is not None:
                raise failure from error
        # The connection that was there turned out to be dying: one fresh one is worth a try.
        connection, _ = await self.connect(peer)
        try:
            return (connection, *await open_negotiated(connection, protocols))
        except (ConnectionLostError, LinkClosedError) as error:
            raise why_lost(connection, ConnectionLostError(str(error))) from error

    async def _attempt(self, peer: PeerId, address: Multiaddr) -> tuple[Pipe, Upgraded]:
        began = self._context.now()
        try:
            if address.is_relayed:
                won = await self._through_relay(peer, address)
            else:
                won = await self._upgrade(await self._pipes.connect(address), peer)
        except BaseException as error:
            self._numbers.dial(error.code if isinstance(error, PeerupError) else "cancelled")
            raise
        self._numbers.dial("connected", self._context.now() - began)
        return won

    async def _upgrade(self, pipe: Pipe, peer: PeerId) -> tuple[Pipe, Upgraded]:
        try:
            return pipe, await self._upgrader.outbound(pipe, peer)
        except BaseException:
            pipe.close()
            raise

    # ---- through relays

    async def _through_relay(self, peer: PeerId, address: Multiaddr) -> tuple[Pipe, Upgraded]:
        relay = _relay_of(address)
        if relay is None or relay in (peer, self._own):
            raise AddressError(f"{address} does not say which relay to use")
        connection = await self._connect_relay(relay, [address, *self.book.addresses(peer)])
        ahead = self.relays.takes_early(relay)
        circuit: DialledCircuit | None = None
        try:
            circuit = DialledCircuit(connection, peer, ahead=ahead)
            return await self._upgrade(circuit, peer)
        except (SwitchboardError, LinkClosedError) as error:
            if connection.leaving:
                raise _leaving(relay) from error
            gone = connection.link.end is not None
            if connection.refused_us:
                raise RelayRefusedError(
                    f"the relay {relay} hung up when it knew who we are; most likely it does not list this node"
                    " (there: peerup relay authorize, with the id that peerup whoami shows here)"
                ) from error
            if gone or not ahead or circuit is None or not circuit.lost_early:
                raise
            self._context.log.info("{} may not pass on early bytes: {}", relay, error)
        self.relays.lost_early(relay)
        return await self._upgrade(DialledCircuit(connection, peer, ahead=False), peer)

    async def _connect_relay(self, relay: PeerId, circuits: Iterable[Multiaddr]) -> Connection:
        """A direct connection to a relay, which may also be where these addresses say; others are passed over."""
        if relay in self.departures:
            raise _leaving(relay)
        for connection in self._table.of(relay):
            if not connection.relayed and not connection.draining:
                return connection
        known = [known for known in self.book.addresses(relay) if not known.is_relayed]
        hops = [hop.without_peer_id() for each in circuits if (hop := each.relay) is not None and hop.peer_id == relay]
        direct = tuple(dict.fromkeys([*known, *hops]))
        try:
            dialed = await self.dialer.dial(relay, direct)
            if dialed.connection.relayed:
                # It has joined a dial of somebody who may also come through another relay; circuits do not nest.
                dialed = await self.dialer.dial(relay, direct)
        except SwitchboardError as error:
            raise RelayUnreachableError(f"the relay {relay} cannot be reached: {error}") from error
        if dialed.connection.relayed:
            raise RelayUnreachableError(f"the relay {relay} cannot be reached directly, only through another relay")
        return dialed.connection

    async def _dial_direct(self, peer: PeerId) -> None:
        direct = [address for address in self.book.addresses(peer) if not address.is_relayed]
        if direct:
            await self.dialer.dial(peer, direct)


async def _open_on(connection: Connection, protocols: Sequence[str]) -> tuple[str, ChannelStream]:
    """As `open_negotiated`, but wait no longer when the connection is doubted: nothing but proposals was sent."""
    opened: tuple[str, ChannelStream] | None = None
    failure: PeerupError | None = None
    async with trio.open_nursery() as nursery:

        async def until_doubted() -> None:
            await connection.doubt.wait()
            nursery.cancel_scope.cancel()

        nursery.start_soon(until_doubted)
        try:
            opened = await open_negotiated(connection, protocols)
        except PeerupError as error:
            failure = error
        nursery.cancel_scope.cancel()
    if opened is not None:
        return opened
    raise failure or ConnectionLostError("the peer gives no sign of life")


def _relay_of(address: Multiaddr) -> PeerId | None:
    relay = address.relay
    return None if relay is None else relay.peer_id


def _leaving(relay: PeerId) -> RelayRefusedError:
    return RelayRefusedError(f"the relay {relay} is shutting down")


def why_lost(connection: Connection, error: SwitchboardError) -> SwitchboardError:
    """What the end of a connection means: a peer that hung up without a word does not let us in."""
    return not_authorised() if connection.refused_us else error
