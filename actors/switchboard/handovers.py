"""Streams for other actors: those that they want to peers, and those that peers want to them.

Theory of operation. A stream to a peer is opened in the first of these ways that is possible:

    ahead   the peer is known to speak the protocol: bytes may go before it has answered; within one callback
    early   it is connected, and may speak the protocol: bytes may go, too, but the actor is told when it has agreed
    slowly  it is connected first, each protocol proposed in turn

An actor gets its stream as a descriptor, or has it joined with a socket of its own (`actors.switchboard.attached`). A
peer's stream is joined with a connection to its service where that is possible at once (`actors.switchboard.doors`);
otherwise the actor that serves the protocol is told of it.
"""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable

from actors.switchboard.attached import AttachedStreams, NotATcpSocketError, check_socket, socket_of
from actors.switchboard.connections import Connection
from actors.switchboard.doors import Doors
from actors.switchboard.errors import ConnectionLostError, TooManyError, refusal
from actors.switchboard.link import Channel, LinkClosedError
from actors.switchboard.numbers import Numbers
from actors.switchboard.protocols import Agreed, CancellableTimer, ProtocolTable
from actors.switchboard.reach import Reach, why_lost
from actors.switchboard.streams import Negotiation, abandoning, open_ahead, open_early
from protocol.errors import PeerupError
from protocol.messages import Descriptor, Message
from protocol.messages.switchboard import (
    InboundStream,
    OpenAttached,
    OpenStream,
    StreamAttached,
    StreamOffered,
    StreamOpened,
)
from protocol.stream_descriptor import ResetCode
from supervisor.errors import RefusedError


class Handovers:
    """See the module.

    Args:
        reach: knows which peers are connected, and connects.
        attached: streams that are joined with sockets.
        doors: services that are connected to without asking.
        protocols: who serves which protocol.
        numbers: counts.
        call_later: the reactor's timer.
        tell: sends a message to an actor.
        ask_delivery: tells how a stream came out at the far end (`actors.switchboard.delivery.ask`).
        start_soon: runs a task.
    """

    def __init__(
        self,
        reach: Reach,
        attached: AttachedStreams,
        doors: Doors,
        *,
        protocols: ProtocolTable,
        numbers: Numbers,
        call_later: Callable[[float, Callable[[], None]], CancellableTimer],
        tell: Callable[[str, Message], None],
        ask_delivery: Callable[[Connection, Channel], Awaitable[int]],
        start_soon: Callable[..., None],
    ) -> None:
        self._reach = reach
        self._attached = attached
        self._doors = doors
        self._protocols = protocols
        self._numbers = numbers
        self._call_later = call_later
        self._tell = tell
        self._ask_delivery = ask_delivery
        self._start_soon = start_soon

    # ---- to peers

    async def open(self, request: OpenStream) -> StreamOpened:
        """A stream to a peer as a descriptor, connecting first where needed.

        Raises:
            RefusedError: it could not be had.
        """
        connection = self._reach.known_to_speak(request.peer, request.protocols)
        if connection is not None:
            try:
                channel, sock = open_ahead(connection, request.protocols[0], self._call_later, _hand_over)
            except (PeerupError, OSError):
                pass  # the slow way finds the words for it
            else:
                if request.confirm:
                    self._confirm(connection, channel)
                self._numbers.stream("outbound", "opened")
                return StreamOpened(request.protocols[0], Descriptor(sock.detach()), connection.info())
        try:
            connection, protocol, stream = await self._reach.open(request.peer, request.protocols)
            unread = stream.take_unread()
            with abandoning(stream.channel):
                descriptor = Descriptor(stream.channel.hand_over(unread).detach())
        except OSError as error:
            self._numbers.stream("outbound", "no-descriptor")
            raise RefusedError("no-descriptor", f"no descriptor for the stream: {error}") from error
        except PeerupError as error:
            self._numbers.stream("outbound", error.code)
            raise refusal(error) from error
        if request.confirm:
            self._confirm(connection, stream.channel)
        self._numbers.stream("outbound", "opened")
        return StreamOpened(protocol, descriptor, connection.info())

    def moved(self, new: Channel, connection: Connection) -> None:
        """A stream of ours is on another channel now, of another connection: follow it there."""
        if new.confirming:
            self._confirm(connection, new)

    def _confirm(self, connection: Connection, channel: Channel) -> None:
        async def follow() -> None:
            channel.delivered(await self._ask_delivery(connection, channel))

        channel.await_delivery()
        self._start_soon(follow)

    async def open_attached(self, owner: str, request: OpenAttached) -> StreamAttached:
        """A stream to a peer that is joined with the socket of the request, connecting first where needed.

        Raises:
            RefusedError: it could not be had; the socket is closed.
        """
        sock = socket_of(request.socket)
        if sock is None:
            raise refusal(NotATcpSocketError("the descriptor is not a socket"))
        try:
            check_socket(sock)
            connection = self._reach.known_to_speak(request.peer, request.protocols)
            if connection is not None and (opened := self._attach_ahead(owner, connection, request, sock)):
                return opened
            connection, _ = await self._reach.connect(request.peer)
            if self._reach.may_speak(connection, request.protocols):
                return await self._attach_early(owner, connection, request, sock)
            connection, protocol, stream = await self._reach.open(request.peer, request.protocols)
            unread = stream.take_unread()
            with abandoning(stream.channel):
                stream_id = self._attached.open(owner, connection, protocol, stream.channel, sock, unread=unread)
        except OSError as error:
            sock.close()
            self._numbers.stream("outbound", "socket-lost")
            raise RefusedError("socket-lost", f"the client hung up: {error}") from error
        except PeerupError as error:
            sock.close()
            self._numbers.stream("outbound", error.code)
            raise refusal(error) from error
        except BaseException:
            sock.close()
            raise
        return self._opened(stream_id, protocol, connection)

    def _attach_ahead(
        self, owner: str, connection: Connection, request: OpenAttached, sock: socket.socket
    ) -> StreamAttached | None:
        protocol = request.protocols[0]

        def attach(channel: Channel, negotiation: Negotiation) -> str:
            return self._attached.open(owner, connection, protocol, channel, sock, negotiation=negotiation)

        try:
            stream_id = open_ahead(connection, protocol, self._call_later, attach)
        except PeerupError:
            return None  # the slow way finds the words for it
        return self._opened(stream_id, protocol, connection)

    async def _attach_early(
        self, owner: str, connection: Connection, request: OpenAttached, sock: socket.socket
    ) -> StreamAttached:
        protocol = request.protocols[0]
        stream_id = ""

        def attach(channel: Channel, negotiation: Negotiation) -> None:
            nonlocal stream_id
            stream_id = self._attached.open(owner, connection, protocol, channel, sock, negotiation=negotiation)

        try:
            await open_early(connection, protocol, self._call_later, attach)
        except (ConnectionLostError, LinkClosedError) as error:
            self._attached.disown(stream_id)
            raise why_lost(connection, ConnectionLostError(str(error))) from error
        except PeerupError:
            self._attached.disown(stream_id)
            raise
        return self._opened(stream_id, protocol, connection)

    def _opened(self, stream_id: str, protocol: str, connection: Connection) -> StreamAttached:
        self._numbers.stream("outbound", "opened")
        return StreamAttached(stream_id, protocol, connection.way)

    # ---- from peers

    def hand_out(self, connection: Connection, channel: Channel, agreed: Agreed) -> None:
        """Bring a peer's stream, whose protocol is agreed and allowed, to who serves it; or reset it."""
        connection.inbound_streams[channel] = agreed.protocol
        channel.on_closed = lambda: _forget(connection, channel)
        try:
            if not self._doors.carry(connection, channel, agreed):
                self._tell_of_stream(connection, channel, agreed)
        except (OSError, LinkClosedError, TooManyError):
            channel.reset(ResetCode.LIMIT_EXCEEDED)
            self._numbers.stream("inbound", "no-descriptor")
        else:
            self._numbers.stream("inbound", "opened")

    def _tell_of_stream(self, connection: Connection, channel: Channel, agreed: Agreed) -> None:
        message: Message
        if self._protocols.attaches(agreed.protocol):
            stream_id = self._attached.offer(agreed.actor, connection, agreed.protocol, channel, agreed.unread)
            message = StreamOffered(stream_id, connection.peer, agreed.protocol, connection.way, agreed.rule)
        else:
            descriptor = Descriptor(channel.hand_over(agreed.unread).detach())
            message = InboundStream(connection.peer, agreed.protocol, descriptor, connection.info(), agreed.rule)
        self._tell(agreed.actor, message)


def _hand_over(channel: Channel, negotiation: Negotiation) -> tuple[Channel, socket.socket]:
    return channel, channel.hand_over(negotiation=negotiation)


def _forget(connection: Connection, channel: Channel) -> None:
    connection.inbound_streams.pop(channel, None)
