"""Circuits while they are being upgraded: dialled through a relay, or announced by one.

Theory of operation, of a dialled one. Everything that can be said ahead is said ahead. The first thing that the upgrade
sends (its proposal and the first handshake message) makes one piece with the proposal of the hop protocol, the CONNECT
message and itself behind it. So the whole way to an open circuit takes one round trip to the peer, if the relay passes
on what comes behind CONNECT. For one that may not (`ahead` False) the upgrade begins when the relay has answered, a
round trip later. What is sent early is lost if the circuit is refused, which harms nobody: it means nothing by itself.
"""

from __future__ import annotations

import trio

from actors.reactor import Reactor
from actors.switchboard.circuits import CircuitEnd
from actors.switchboard.connections import Connection
from actors.switchboard.errors import CircuitCutError, CircuitLostError, RelayRefusedError
from actors.switchboard.wire import Way, Wire
from protocol import multistream
from protocol.circuit.hop_client import ConnectClient
from protocol.circuit.messages import Limit, Refusal, Status
from protocol.errors import ProtocolError
from protocol.multiaddr import Component, Multiaddr, MultiaddrError
from protocol.peer_id import PeerId
from protocol.protocol_ids import CIRCUIT_HOP
from protocol.reservations import DRAINING
from protocol.stream_descriptor import ResetCode

CONNECT_DEADLINE = 5.0
"""Seconds for the relay to answer CONNECT: within the upgrade's first stage, so that the relay is named as cause."""

_CIRCUIT = Component("p2p-circuit", "", b"")

_REFUSALS = {
    Status.NO_RESERVATION: "the peer keeps no reservation there",
    Status.PERMISSION_DENIED: "it does not let this node reach the peer",
    Status.RESOURCE_LIMIT_EXCEEDED: "too many circuits",
    Status.CONNECTION_FAILED: "the peer did not take the circuit",
}


_ENDED_BY_RELAY = frozenset((ResetCode.SHUTDOWN, ResetCode.CONNECTION_LOST))


def _broken(error: CircuitCutError) -> OSError:
    """The error as one of a pipe; a way that was lost is not the peer's doing."""
    return (ConnectionAbortedError if isinstance(error, CircuitLostError) else ConnectionResetError)(str(error))


class CircuitPipe:
    """A circuit that is open: its upgrade's bytes go through it, and then a link's."""

    def __init__(self, connection: Connection, end: CircuitEnd, limit: Limit | None = None) -> None:
        self._connection = connection
        self._end: CircuitEnd | None = end
        self._limit = limit

    def __repr__(self) -> str:
        return f"<{type(self).__name__} through {self._connection.peer}>"

    @property
    def way(self) -> Way:
        """See `Pipe`."""
        return circuit_way(self._connection, self._limit)

    @property
    def readable(self) -> bool:
        """See `Pipe`."""
        return self._held().readable

    async def receive(self) -> bytes:
        """See `Pipe`."""
        try:
            return await self._held().receive()
        except CircuitCutError as error:
            raise _broken(error) from error

    async def send(self, data: bytes) -> None:
        """See `Pipe`."""
        await trio.lowlevel.checkpoint()
        try:
            self._held().push(data)
        except CircuitCutError as error:
            raise _broken(error) from error

    def detach(self, reactor: Reactor) -> Wire:
        """See `Pipe`."""
        end, self._end = self._held(), None
        return end

    def close(self) -> None:
        """See `Pipe`."""
        end, self._end = self._end, None
        if end is not None:
            end.close()

    def _held(self) -> CircuitEnd:
        if self._end is None:
            raise OSError("the circuit is closed")
        return self._end


class DialledCircuit(CircuitPipe):
    """A circuit to `peer` that the relay at the other end of `connection` is asked for with the first `send`.

    `receive` waits until it is open, and raises a RelayRefusedError if it is refused.

    Attributes:
        opened: the relay has said yes.
        answered: the peer has said anything.

    Raises:
        LinkClosedError, LimitExceededError: no stream to the relay.
    """

    def __init__(self, connection: Connection, peer: PeerId, *, ahead: bool) -> None:
        channel = connection.link.open_stream()
        channel.stream.exempt = True  # the link through the circuit charges the peer that sends them
        super().__init__(connection, CircuitEnd(channel, self._words))
        self.opened = False
        self.answered = False
        self._peer = peer
        self._ahead = ahead
        self._negotiation = multistream.Initiator((CIRCUIT_HOP,))
        self._client: ConnectClient | None = None
        self._leftover = b""
        self._silent = False

    @property
    def lost_early(self) -> bool:
        """Whether a failure looks as if the relay had not passed on, or not understood, what was sent early."""
        if self.opened:
            return not self.answered
        refusal = None if self._client is None else self._client.refusal
        if refusal is not None:
            return refusal.status in {Status.MALFORMED_MESSAGE, Status.UNEXPECTED_MESSAGE}
        return not self._silent

    async def receive(self) -> bytes:
        """See `Pipe`.

        Raises:
            RelayRefusedError: the relay refuses the circuit, or is none.
        """
        await self._until_open()
        data, self._leftover = self._leftover, b""
        if not data:
            data = await super().receive()
        self.answered = self.answered or bool(data)
        return data

    async def send(self, data: bytes) -> None:
        """See `Pipe`.

        Raises:
            RelayRefusedError: the relay refuses the circuit, or is none.
        """
        if self._client is None:
            self._client = ConnectClient(self._peer, early=data if self._ahead else b"")
            await super().send(self._negotiation.data_to_send() + self._client.data_to_send())
            if self._ahead:
                return
        if not self._ahead:
            await self._until_open()
        await super().send(data)

    async def _until_open(self) -> None:
        client = self._client
        assert client is not None, "the dialling side speaks first"
        if self.opened:
            return
        relay = self._connection.peer
        with trio.move_on_after(CONNECT_DEADLINE) as scope:
            try:
                while client.state == "waiting":
                    data = await super().receive()
                    if not data:
                        client.finish()
                    else:
                        self._hear(client, data)
            except multistream.ProtocolNotSupportedError as error:
                raise RelayRefusedError(f"{relay} is no relay for this node") from error
            except ProtocolError as error:
                raise RelayRefusedError(f"the relay {relay} answered CONNECT with nonsense: {error}") from error
            except OSError as error:
                raise RelayRefusedError(str(error)) from error
        if scope.cancelled_caught:
            self._silent = True
            raise RelayRefusedError(f"the relay {relay} did not answer within {CONNECT_DEADLINE:g} s")
        if client.refusal is not None:
            raise RelayRefusedError(f"the relay {relay} refuses the circuit: {refusal_words(client.refusal)}")
        self.opened = True
        self._limit = client.limit
        self._leftover = client.leftover

    def _hear(self, client: ConnectClient, data: bytes) -> None:
        if self._negotiation.result is None:
            self._negotiation.receive_data(data)
            data = self._negotiation.leftover
        if data:
            client.receive_data(data)

    def _words(self, code: int) -> str:
        return cut_words(self._connection, code, self._limit)


def refusal_words(refusal: Refusal) -> str:
    """What a relay's refusal means, with its status and what the relay itself said."""
    try:
        meaning = _REFUSALS.get(Status(refusal.status))
    except ValueError:
        meaning = None
    if refusal.reason == DRAINING:
        meaning = "it grants nothing any more"
    return f"{meaning} ({refusal})" if meaning else str(refusal)


def cut_words(connection: Connection, code: int, limit: Limit | None) -> str:
    """Why a circuit over this connection to a relay has ended whose stream was reset with this code."""
    relay = connection.peer
    end = connection.end
    if connection.leaving and (end is not None or code in _ENDED_BY_RELAY):
        return f"the relay {relay} is shutting down"
    if end is None and code == ResetCode.CONNECTION_LOST:
        return f"the connection to the relay {relay} ended"
    if end is not None:
        return f"the connection to the relay {relay} ended: {end.reason}"
    granted = "" if limit is None or limit.unlimited else f"; it grants a circuit {limit}"
    said = f" ({ResetCode.describe(code)})" if code else ""
    return f"the relay {relay}, or the peer behind it, cut the circuit{said}{granted}"


def circuit_way(connection: Connection, limit: Limit | None) -> Way:
    """The way of a circuit over this connection to a relay."""
    via = connection.via
    try:
        relay_address = via.remote_address.with_peer_id(connection.peer)
        remote = Multiaddr.from_components((*relay_address.components, _CIRCUIT))
    except MultiaddrError:  # too long with that
        remote = via.remote_address
    return Way("relayed", via.transport, via.local_address, remote, connection.peer, limit)
