"""The switchboard: owns the sockets, connections and streams of the node, and hands streams to other actors.

This file only brings the rooms together: it answers messages, applies the policy, and counts. What happens in each room
is told in its own module: `transports`, `admission`, `reception`, `upgrade`, `connections`, `dialer`, `keeper`,
`protocols`, `identify`, `ping`, and, for the bytes, `link`.

It follows two publishers, the gate (policy) and the config actor (names and addresses); the last good value of
each stays in force while it is away, and before the first policy everything is denied.
"""

from __future__ import annotations

import dataclasses
import resource
import socket
from collections.abc import Sequence

import trio
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from actors.reactor import Reactor
from actors.switchboard.addresses import AddressBook
from actors.switchboard.admission import Limits
from actors.switchboard.attached import AttachedStreams, NotATcpSocketError, check_socket, socket_of
from actors.switchboard.connections import MAX_CONNECTIONS, Connection, ConnectionTable
from actors.switchboard.decisions import DecisionLog
from actors.switchboard.dialer import Dialed, Dialer
from actors.switchboard.errors import (
    AddressError,
    ConnectionLostError,
    SwitchboardError,
    TooManyError,
    UnreachableError,
    refusal,
)
from actors.switchboard.identify import IdentifyRoom, OwnDescription
from actors.switchboard.interfaces import expand
from actors.switchboard.keeper import Keeper
from actors.switchboard.link import Channel, Link, LinkClosedError, LinkEnd
from actors.switchboard.listeners import Listeners
from actors.switchboard.numbers import Numbers
from actors.switchboard.ping import PingServer, ping
from actors.switchboard.protocols import Agreed, InboundStreams, ProtocolTable
from actors.switchboard.reception import Reception
from actors.switchboard.streams import ChannelStream, Negotiation, abandoning, open_ahead, open_negotiated
from actors.switchboard.transports import connect_tcp, local_multiaddr, remote_multiaddr, resolve
from actors.switchboard.upgrade import RefusedPeerError, Upgraded, Upgrader, not_authorised
from actors.switchboard.version import AGENT
from actors.switchboard.wire import SocketWire
from protocol import yamux
from protocol.errors import PeerupError
from protocol.messages import Data, Descriptor, Message
from protocol.messages.config import ConfigSnapshot, SubscribeConfig
from protocol.messages.gate import Decided, PolicyPublished, SubscribePolicy
from protocol.messages.keyring import ReadIdentity, SignNoiseStaticKey, SignPeerRecord
from protocol.messages.switchboard import (
    AdoptedStreams,
    AdoptStreams,
    AttachSocket,
    CloseStreams,
    Connect,
    Connected,
    Disconnect,
    InboundStream,
    NeedPeer,
    OpenAttached,
    OpenStream,
    PeerStatus,
    Pinged,
    PingPeer,
    ReadStatus,
    RejectStream,
    ReleasePeer,
    ServeProtocol,
    StreamAttached,
    StreamOffered,
    StreamOpened,
    StreamsClosed,
    SwitchboardStatus,
    WithdrawProtocol,
)
from protocol.messages.system import ActorDown, ActorUp
from protocol.multiaddr import Multiaddr
from protocol.noise import Identity as NoiseIdentity
from protocol.peer_id import PeerId
from protocol.policy import BASIC_PROTOCOLS, DENY_ALL, Decision, PolicyIndex
from protocol.protocol_ids import IDENTIFY, IDENTIFY_PUSH, PING, PINGPONG
from protocol.service import service_of_protocol
from protocol.stream_descriptor import ResetCode
from supervisor.actor import Actor, Checkpoint, handles
from supervisor.errors import (
    ActorRestartingError,
    AskError,
    DeadlineExceededError,
    NoSuchActorError,
    RefusedError,
)

KEYRING = "keyring"
GATE = "gate"
CONFIG = "config"

SERVICES = "service/"
"""What the names of the actors of services begin with."""

KEYRING_DEADLINE = 5.0
"""Seconds for the keyring to sign."""
SUBSCRIBE_DEADLINE = 2.0
"""Seconds for a publisher to answer; if it does not, it is asked again at the next tick."""
ASK_AGAIN = 30.0
"""Seconds after which the gate is asked for the policy although it would tell: news can be lost in a full mailbox."""
TICK = 1.0
"""Seconds between looks at what only time changes: drained connections, expired peers, folded decisions, gauges."""
PROOF_DEADLINE = 5.0
"""Seconds that `Connect` waits for the peer to show by a first byte that it accepts us."""


class Switchboard(Actor):
    """See the module.

    Arguments:
        listen: multiaddrs to listen on; none: this node only dials.
        max_connections: how many there may be in all.
        max_streams: how many a peer may have open on one connection.
        admission: changes to the limits of handshakes, see `actors.switchboard.admission.Limits`.
    """

    mailbox_limit = 4096

    def __init__(
        self,
        listen: Sequence[str] = (),
        *,
        max_connections: int = MAX_CONNECTIONS,
        max_streams: int = yamux.DEFAULT_LIMITS.inbound_streams,
        admission: dict[str, float] | None = None,
    ) -> None:
        self._listen = tuple(Multiaddr(text) for text in listen)
        self._max_connections = max_connections
        self._session_limits = dataclasses.replace(yamux.DEFAULT_LIMITS, inbound_streams=max_streams)
        self._limits = Limits(**(admission or {}))  # type: ignore[arg-type]  # plain data; a wrong name is a TypeError
        self._listeners = Listeners()
        self._policy = DENY_ALL
        self._names: dict[PeerId, str] = {}
        self._book = AddressBook()
        self._protocols = ProtocolTable()
        self._watched: set[str] = set()
        self._connection_count = 0
        self._record: bytes | None = None
        self._record_seq = 0
        self._described: tuple[object, ...] = ()
        self._stopping = False
        self._missing: set[str] = set()  # publishers that did not answer, though they are there

    async def start(self, checkpoint: Checkpoint | None) -> dict[str, Data]:
        """Get the identity signed, learn the policy, listen."""
        context = self.context
        self._numbers = Numbers(context.metrics)
        identity = await context.ask(KEYRING, ReadIdentity(), timeout=KEYRING_DEADLINE)
        self._own = identity.peer_id
        self._public_key = identity.public_key
        upgrader = Upgrader(*await self._noise_key())
        self._reactor = Reactor(context.now)
        self._table = ConnectionTable(self._own, limit=self._max_connections)
        self._decisions = DecisionLog(self._tell_gate)
        self._upgrader = upgrader
        self._reception = Reception(
            context.nursery,
            upgrader,
            judge=self._judge_caller,
            welcome=self._welcome,
            refused=self._numbers.handshake_refused,
            now=context.now,
            call_later=self._reactor.call_later,
            limits=self._limits.within(resource.getrlimit(resource.RLIMIT_NOFILE)[0]),
        )
        self._dialer: Dialer[tuple[socket.socket, Upgraded], Connection] = Dialer(
            context.nursery,
            resolve=resolve,
            attempt=self._attempt,
            establish=lambda won: self._establish(*won, outbound=True),
            discard=lambda late: late[0].close(),
            now=context.now,
        )
        self._keeper = Keeper(
            context.nursery, self._connect_proven, self._table.until_lost, context.now, context.random
        )
        self._inbound = InboundStreams(
            self._protocols, self._reactor.call_later, self._judge_stream, self._may_connect, self._hand_out
        )
        self._attached = AttachedStreams(context, self._reactor.call_later)
        self._identify = IdentifyRoom(
            self._describe_ourselves, self._protocols_for, self._book.learn, self._reactor.call_later
        )
        self._serve_own_protocols()
        context.nursery.start_soon(self._reactor.run)
        context.watch(GATE)
        context.watch(CONFIG)
        await self._follow_gate()
        await self._follow_config()
        self._listeners.open(self._listen, checkpoint)
        context.checkpoint(*self._listeners.to_checkpoint())
        await self._describe_anew()
        for listener in self._listeners:
            context.nursery.start_soon(self._reception.listen, listener.socket)
        context.nursery.start_soon(self._tick)
        addresses = [str(listener.address) for listener in self._listeners]
        context.log.info("{} listens on {}", self._own, ", ".join(addresses) or "nothing")
        return {"peer_id": str(self._own), "listen": addresses}

    async def stop(self, reason: str) -> None:
        """Say goodbye to every peer."""
        self._stopping = True
        self._reception.close()
        for connection in self._table:
            connection.link.close("shutdown", "this node is stopping")
        await self._attached.say_goodbye()
        self._decisions.flush()
        self._listeners.close()

    def describe(self) -> dict[str, Data]:
        """Listeners, connections, who needs whom, who serves what."""
        now = self.context.now()
        return {
            "peer_id": str(self._own),
            "listen": [str(listener.address) for listener in self._listeners],
            "announced": [str(address) for address in self._announced()],
            "policy_version": None if self._policy.policy is None else self._policy.policy.version,
            "connections": [
                connection.describe(self._names.get(connection.peer, ""), now) for connection in self._table
            ],
            "needed": {
                str(peer): {
                    "by": list(self._keeper.needed_by(peer)),
                    "next_dial": self._keeper.next_dial(peer),
                    "last_failure": self._keeper.last_failure(peer),
                }
                for peer in self._keeper.peers()
            },
            "dialing": sorted(str(peer) for peer in self._dialer.dialing),
            "protocols": {
                protocol: handler if isinstance(handler := self._protocols.handler(protocol), str) else "switchboard"
                for protocol in self._protocols.names()
            },
            "callers_waiting": self._reception.waiting,
            "handshakes": self._reception.handshakes,
            "streams_negotiating": self._inbound.negotiating,
            "streams_attached": len(self._attached),
            "streams_offered": self._attached.offered,
        }

    # ---- connections and streams for other actors

    @handles(OpenStream, concurrent=True)
    async def open_stream(self, request: OpenStream) -> StreamOpened:
        """Open a stream to a peer, connecting first where needed."""
        connection = self._known_to_speak(request.peer, request.protocols)
        if connection is not None:
            try:
                sock = open_ahead(connection, request.protocols[0], self._reactor.call_later, _hand_over)
            except (PeerupError, OSError):
                pass  # the slow way finds the words for it
            else:
                self._numbers.stream("outbound", "opened")
                return StreamOpened(request.protocols[0], Descriptor(sock.detach()), connection.info())
        try:
            connection, protocol, stream = await self._open(request.peer, request.protocols)
            unread = stream.take_unread()
            with abandoning(stream.channel):
                descriptor = Descriptor(stream.channel.hand_over(unread).detach())
        except OSError as error:
            self._numbers.stream("outbound", "no-descriptor")
            raise RefusedError("no-descriptor", f"no descriptor for the stream: {error}") from error
        except PeerupError as error:
            self._numbers.stream("outbound", error.code)
            raise refusal(error) from error
        self._numbers.stream("outbound", "opened")
        return StreamOpened(protocol, descriptor, connection.info())

    @handles(OpenAttached, concurrent=True)
    async def open_attached(self, request: OpenAttached) -> StreamAttached:
        """Open a stream to a peer, connecting first where needed, and carry its bytes from and to a socket."""
        owner = self.context.current_sender
        self._watch(owner)
        sock = socket_of(request.socket)
        if sock is None:
            raise refusal(NotATcpSocketError("the descriptor is not a socket"))
        try:
            check_socket(sock)
            connection = self._known_to_speak(request.peer, request.protocols)
            if connection is not None and (opened := self._attach_ahead(owner, connection, request, sock)):
                return opened
            connection, protocol, stream = await self._open(request.peer, request.protocols)
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
        self._numbers.stream("outbound", "opened")
        return StreamAttached(stream_id, protocol, connection.way)

    @handles(AttachSocket)
    async def attach_socket(self, message: AttachSocket) -> None:
        """A socket for a stream that was offered."""
        sock = socket_of(message.socket)
        if sock is None:
            self._attached.reject(self.context.current_sender, message.stream_id, ResetCode.LOCAL_RESET)
        else:
            self._attached.attach(self.context.current_sender, message.stream_id, sock)

    @handles(RejectStream)
    async def reject_stream(self, message: RejectStream) -> None:
        """No socket for a stream that was offered."""
        self._attached.reject(self.context.current_sender, message.stream_id, message.code)

    @handles(AdoptStreams)
    async def adopt_streams(self, request: AdoptStreams) -> AdoptedStreams:
        """The sender is the successor of an owner of streams."""
        return AdoptedStreams(self._attached.adopt(self.context.current_sender))

    @handles(CloseStreams)
    async def close_streams(self, request: CloseStreams) -> StreamsClosed:
        """The sender is stopping."""
        return StreamsClosed(self._attached.close(self.context.current_sender))

    @handles(Connect, concurrent=True)
    async def connect(self, request: Connect) -> Connected:
        """Be connected to a peer that accepts us."""
        began = self.context.now()
        try:
            connection, tried = await self._connect_proven(request.peer)
        except PeerupError as error:
            raise refusal(error) from error
        return Connected(connection.info(), self.context.now() - began, tried)

    @handles(Disconnect)
    async def disconnect(self, request: Disconnect) -> None:
        """Close all connections to a peer."""
        for connection in self._table.of(request.peer):
            connection.link.close()

    @handles(NeedPeer)
    async def need_peer(self, message: NeedPeer) -> None:
        """Keep this peer connected for the sender."""
        self._watch(self.context.current_sender)
        if message.peer != self._own:
            self._keeper.need(self.context.current_sender, message.peer)

    @handles(ReleasePeer)
    async def release_peer(self, message: ReleasePeer) -> None:
        """The sender no longer needs this peer."""
        self._keeper.release(self.context.current_sender, message.peer)

    @handles(ServeProtocol)
    async def serve_protocol(self, request: ServeProtocol) -> None:
        """The sender serves this protocol. Those of services are for the actors of services."""
        sender = self.context.current_sender
        of_service = service_of_protocol(request.protocol) is not None
        if of_service and not sender.startswith(SERVICES) and self._protocols.handler(request.protocol) is None:
            raise RefusedError("not-allowed", f"{sender} is not the actor of a service")
        try:
            self._protocols.serve(request.protocol, self.context.current_sender, attach=request.attach)
        except SwitchboardError as error:
            raise refusal(error) from error
        self._watch(self.context.current_sender)
        await self._describe_anew()

    @handles(WithdrawProtocol)
    async def withdraw_protocol(self, request: WithdrawProtocol) -> None:
        """The sender no longer serves this protocol."""
        self._protocols.withdraw(request.protocol, self.context.current_sender)
        await self._describe_anew()

    @handles(ReadStatus)
    async def read_status(self, request: ReadStatus) -> SwitchboardStatus:
        """Everything at once."""
        peers = sorted({*self._table.peers(), *self._keeper.peers(), *self._book.peers()})
        return SwitchboardStatus(
            peer_id=self._own,
            listen_addresses=tuple(listener.address for listener in self._listeners),
            peers=tuple(
                PeerStatus(
                    peer=peer,
                    addresses=self._book.addresses(peer),
                    connections=tuple(connection.info() for connection in self._table.of(peer)),
                    needed_by=self._keeper.needed_by(peer),
                    next_dial=self._keeper.next_dial(peer),
                    last_failure=self._keeper.last_failure(peer),
                )
                for peer in peers
            ),
            protocols=self._protocols.names(),
        )

    @handles(PingPeer, concurrent=True)
    async def ping_peer(self, request: PingPeer) -> Pinged:
        """Measure one round trip."""
        began = self.context.now()
        fresh = self._table.best(request.peer) is None
        try:
            connection, _ = await self._connect(request.peer)
            connected_in = self.context.now() - began if fresh else None
            try:
                rtt, protocol = await ping(connection, self.context.now, self.context.random)
            except ConnectionLostError as error:
                raise self._why_lost(connection, error) from error
        except PeerupError as error:
            raise refusal(error) from error
        return Pinged(rtt, protocol, connection.info(), connected_in)

    # ---- what is published to us, and who comes and goes

    @handles(PolicyPublished)
    async def policy_published(self, message: PolicyPublished) -> None:
        """Apply a new policy at once, to what is open as well."""
        if self.context.current_sender != GATE:
            return
        known = self._policy.policy
        # One that was on its way while we subscribed may be older than the answer to that.
        if known is None or message.policy.version >= known.version:
            self._apply_policy(PolicyIndex(message.policy))

    @handles(ConfigSnapshot)
    async def config_changed(self, message: ConfigSnapshot) -> None:
        """Take over names and addresses."""
        if self.context.current_sender == CONFIG:
            self._apply_config(message)

    @handles(ActorUp)
    async def actor_up(self, message: ActorUp) -> None:
        """Subscribe again to a publisher that was restarted; tell the owner of streams what it missed."""
        self._attached.owner_up(message.name)
        if message.name == GATE:
            await self._follow_gate()
        elif message.name == CONFIG:
            await self._follow_config()

    @handles(ActorDown)
    async def actor_down(self, message: ActorDown) -> None:
        """Forget what an actor needed and served; it says so again when it is back."""
        self._keeper.release_all(message.name)
        self._attached.owner_down(message.name)
        if self._protocols.withdraw_all(message.name):
            await self._describe_anew()

    # ---- connecting

    async def _connect(self, peer: PeerId) -> tuple[Connection, tuple[str, ...]]:
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
                dialed = await self._dialer.dial(peer, self._book.addresses(peer))
            except SwitchboardError as error:
                failure = error
            nursery.cancel_scope.cancel()
        connection = self._table.best(peer)
        if connection is not None:
            return connection, dialed.tried if dialed is not None else ()
        if dialed is not None:
            lost = dialed.connection
            raise self._why_lost(lost, ConnectionLostError("the connection ended at once"))
        assert failure is not None
        raise failure

    async def _connect_proven(self, peer: PeerId) -> tuple[Connection, tuple[str, ...]]:
        """As `_connect`, and the peer has shown that it accepts us."""
        connection, tried = await self._connect(peer)
        with trio.move_on_after(PROOF_DEADLINE):
            while not connection.identified.is_set() and connection.end is None:
                async with trio.open_nursery() as nursery:

                    async def wait_for(event: trio.Event) -> None:
                        await event.wait()
                        nursery.cancel_scope.cancel()

                    nursery.start_soon(wait_for, connection.identified)
                    nursery.start_soon(wait_for, connection.ended)
        if connection.end is not None:
            raise self._why_lost(connection, ConnectionLostError(connection.end.reason))
        return connection, tried

    def _known_to_speak(self, peer: PeerId, protocols: Sequence[str]) -> Connection | None:
        """The connection to a peer that has said that it speaks this one protocol."""
        connection = self._table.best(peer)
        if connection is None or connection.identification is None or len(protocols) != 1:
            return None
        return connection if protocols[0] in connection.identification.protocols else None

    def _attach_ahead(
        self, owner: str, connection: Connection, request: OpenAttached, sock: socket.socket
    ) -> StreamAttached | None:
        protocol = request.protocols[0]

        def attach(channel: Channel, negotiation: Negotiation) -> str:
            return self._attached.open(owner, connection, protocol, channel, sock, negotiation=negotiation)

        try:
            stream_id = open_ahead(connection, protocol, self._reactor.call_later, attach)
        except PeerupError:
            return None  # the slow way finds the words for it
        self._numbers.stream("outbound", "opened")
        return StreamAttached(stream_id, protocol, connection.way)

    async def _open(self, peer: PeerId, protocols: Sequence[str]) -> tuple[Connection, str, ChannelStream]:
        known = self._table.best(peer)
        connection, _ = await self._connect(peer)
        try:
            return (connection, *await open_negotiated(connection, protocols))
        except (ConnectionLostError, LinkClosedError) as error:
            failure = self._why_lost(connection, ConnectionLostError(str(error)))
            if connection is not known:
                raise failure from error
        # The connection that was there turned out to be dying: one fresh one is worth a try.
        connection, _ = await self._connect(peer)
        try:
            return (connection, *await open_negotiated(connection, protocols))
        except (ConnectionLostError, LinkClosedError) as error:
            raise self._why_lost(connection, ConnectionLostError(str(error))) from error

    async def _attempt(self, peer: PeerId, address: Multiaddr) -> tuple[socket.socket, Upgraded]:
        began = self.context.now()
        sock = None
        try:
            sock = await connect_tcp(address)
            upgraded = await self._upgrader.outbound(sock, peer)
        except BaseException as error:
            if sock is not None:
                sock.close()
            self._numbers.dial(error.code if isinstance(error, PeerupError) else "cancelled")
            raise
        self._numbers.dial("connected", self.context.now() - began)
        return sock, upgraded

    def _why_lost(self, connection: Connection, error: SwitchboardError) -> SwitchboardError:
        """What the end of a connection means: a peer that never said a word does not let us in."""
        return not_authorised() if connection.outbound and not connection.heard else error

    # ---- life of a connection

    def _judge_caller(self, peer: PeerId, sock: socket.socket) -> bool:
        if peer == self._own:
            return False
        decision = self._policy.decide_connection(peer, self.context.wall())
        try:
            path = f"direct tcp {remote_multiaddr(sock)}"
        except OSError:
            return False  # it has hung up
        self._decisions.note(peer, "connection", decision, path, self.context.now())
        return decision.allowed

    def _welcome(self, sock: socket.socket, upgraded: Upgraded) -> None:
        # The muxer's negotiation may have taken the peer seconds, in which the policy may have changed.
        late = self._policy.decide_connection(upgraded.peer, self.context.wall())
        if not late.allowed and not self._judge_caller(upgraded.peer, sock):
            raise RefusedPeerError(upgraded.peer)
        self._establish(sock, upgraded, outbound=False)

    def _establish(self, sock: socket.socket, upgraded: Upgraded, *, outbound: bool) -> Connection:
        now = self.context.now()
        try:
            if self._stopping:
                raise ConnectionLostError("this node is stopping")
            self._table.check_room(upgraded.peer)
            local, remote = local_multiaddr(sock), remote_multiaddr(sock)
        except SwitchboardError:
            sock.close()
            raise
        except OSError as error:
            sock.close()
            raise AddressError("the peer hung up") from error
        self._connection_count += 1
        connection = Connection(
            id=f"{self.context.incarnation}-{self._connection_count}",
            peer=upgraded.peer,
            outbound=outbound,
            local_address=local,
            remote_address=remote,
            opened=now,
            opened_at=self.context.wall(),
            was_allowed=self._policy.decide_connection(upgraded.peer, self.context.wall()).allowed,
        )
        connection.link = Link(
            self._reactor,
            SocketWire(self._reactor, sock),
            role=upgraded.role,
            send_cipher=upgraded.send,
            receive_cipher=upgraded.receive,
            received=upgraded.received,
            plaintext=upgraded.plaintext,
            on_stream=lambda channel: self._inbound.accept(connection, channel),
            on_end=lambda end: self._connection_ended(connection, end),
            limits=self._session_limits,
        )
        self._table.add(connection, now)
        self._numbers.connection_opened(connection)
        self.context.log.info("connected to {} ({}, {})", upgraded.peer, connection.direction, connection.way)
        self.context.nursery.start_soon(self._identify.identify, connection)
        return connection

    def _connection_ended(self, connection: Connection, end: LinkEnd) -> None:
        self._table.remove(connection, end)
        self._numbers.connection_closed(connection, end.code)
        self.context.log.info("connection to {} ended: {}", connection.peer, end.reason)

    # ---- streams of peers

    def _judge_stream(self, connection: Connection, protocol: str) -> Decision:
        decision = self._policy.decide_stream(connection.peer, protocol, self.context.wall())
        if not decision.allowed or protocol not in BASIC_PROTOCOLS:
            self._decisions.note(connection.peer, protocol, decision, connection.way, self.context.now())
        return decision

    def _may_connect(self, connection: Connection) -> bool:
        return self._policy.decide_connection(connection.peer, self.context.wall()).allowed

    def _hand_out(self, connection: Connection, channel: Channel, agreed: Agreed) -> None:
        message: Message
        try:
            if self._protocols.attaches(agreed.protocol):
                stream_id = self._attached.offer(agreed.actor, connection, agreed.protocol, channel, agreed.unread)
                message = StreamOffered(stream_id, connection.peer, agreed.protocol, connection.way, agreed.rule)
            else:
                descriptor = Descriptor(channel.hand_over(agreed.unread).detach())
                message = InboundStream(connection.peer, agreed.protocol, descriptor, connection.info(), agreed.rule)
        except (OSError, LinkClosedError, TooManyError):
            channel.reset(ResetCode.LIMIT_EXCEEDED)
            self._numbers.stream("inbound", "no-descriptor")
            return
        connection.inbound_streams[channel] = agreed.protocol
        channel.on_closed = lambda: _forget(connection, channel)
        self._numbers.stream("inbound", "opened")
        self.context.tell(agreed.actor, message)

    def _serve_own_protocols(self) -> None:
        pings = PingServer()
        self._protocols.serve_here(IDENTIFY, self._identify.serve_identify)
        self._protocols.serve_here(IDENTIFY_PUSH, self._identify.serve_push)
        self._protocols.serve_here(PING, pings.serve_ping)
        self._protocols.serve_here(PINGPONG, pings.serve_pingpong)

    # ---- policy

    def _apply_policy(self, policy: PolicyIndex) -> None:
        self._policy = policy
        self._enforce()

    def _enforce(self) -> None:
        """Cut what the policy allowed before and does not allow now."""
        now = self.context.wall()
        for connection in self._table:
            allowed = self._policy.decide_connection(connection.peer, now)
            if allowed.allowed:
                connection.was_allowed = True
            elif connection.was_allowed or not connection.outbound:
                self._decisions.note(connection.peer, "connection", allowed, connection.way, self.context.now())
                self.context.log.info("cut off {}: {}", connection.peer, allowed.rule)
                connection.link.abort("not-authorised", f"the policy no longer allows it ({allowed.rule})")
                continue
            for channel, protocol in list(connection.inbound_streams.items()):
                decision = self._policy.decide_stream(connection.peer, protocol, now)
                if not decision.allowed:
                    self._decisions.note(connection.peer, protocol, decision, connection.way, self.context.now())
                    channel.reset(ResetCode.GATED)

    def _tell_gate(self, decided: Decided) -> None:
        self.context.tell(GATE, decided)

    async def _follow_gate(self) -> None:
        before = self._policy
        self._missing.discard(GATE)
        try:
            published = await self.context.ask(GATE, SubscribePolicy(), timeout=SUBSCRIBE_DEADLINE)
        except AskError as error:
            self._say_missing(GATE, error)
            return
        now = self._policy
        if published.policy != now.policy and (
            now is before or now.policy is None or published.policy.version >= now.policy.version
        ):
            self._apply_policy(PolicyIndex(published.policy))

    async def _follow_config(self) -> None:
        self._missing.discard(CONFIG)
        try:
            snapshot = await self.context.ask(CONFIG, SubscribeConfig(), timeout=SUBSCRIBE_DEADLINE)
        except AskError as error:
            self._say_missing(CONFIG, error)
        else:
            self._apply_config(snapshot)

    def _say_missing(self, publisher: str, error: AskError) -> None:
        # One that is down is asked again when it is up; one that was only slow, at the next tick.
        if isinstance(error, DeadlineExceededError | RefusedError):
            self._missing.add(publisher)
        level = "DEBUG" if isinstance(error, ActorRestartingError | NoSuchActorError) else "WARNING"
        self.context.log.log(level, "{} does not answer, what it said last stays in force: {}", publisher, error)

    def _apply_config(self, snapshot: ConfigSnapshot) -> None:
        self._names = {entry.peer: entry.name for entry in snapshot.names}
        for peer in self._book.configure(snapshot.addresses):
            self._keeper.retry(peer)

    # ---- what we say of ourselves

    def _announced(self) -> tuple[Multiaddr, ...]:
        addresses = [address for listener in self._listeners for address in expand(listener.address)]
        return tuple(dict.fromkeys(addresses))

    def _describe_ourselves(self) -> OwnDescription:
        return OwnDescription(self._public_key, AGENT, self._announced(), self._record)

    def _protocols_for(self, connection: Connection) -> tuple[str, ...]:
        served = self._protocols.names()
        may_use = set(self._policy.protocols_for(connection.peer, self.context.wall()))
        return tuple(protocol for protocol in served if protocol in may_use)

    async def _describe_anew(self) -> None:
        """If what we say of ourselves has changed: have the record signed, and tell the connected peers."""
        addresses = self._announced()
        described = (addresses, self._protocols.names())
        if described == self._described:
            return
        if not self._described or self._described[0] != addresses:
            self._record_seq = max(self._record_seq + 1, int(self.context.wall() * 1000))
            try:
                signed = await self.context.ask(
                    KEYRING, SignPeerRecord(addresses, self._record_seq), timeout=KEYRING_DEADLINE
                )
            except AskError as error:
                self.context.log.warning("the peer record is not signed: {}", error)
                self._record = None
            else:
                self._record = signed.envelope
        self._described = described
        for connection in self._table:
            if not connection.draining:
                self.context.nursery.start_soon(self._identify.push, connection)

    async def _noise_key(self) -> tuple[X25519PrivateKey, NoiseIdentity]:
        """A Noise key for the life of this process, signed by the node's identity."""
        static = X25519PrivateKey.generate()
        signature = await self.context.ask(
            KEYRING, SignNoiseStaticKey(static.public_key().public_bytes_raw()), timeout=KEYRING_DEADLINE
        )
        return static, NoiseIdentity(signature.public_key, signature.signature)

    # ---- time

    async def _tick(self) -> None:
        expiry_checked = self.context.wall()
        ask_again = self.context.now() + ASK_AGAIN
        while True:
            await trio.sleep(TICK)
            for connection in self._table.drained(self.context.now()):
                connection.link.close("superseded", "another connection to the peer is used")
            wall = self.context.wall()
            expiry = self._policy.next_expiry(expiry_checked)
            if expiry is not None and expiry <= wall:
                self._enforce()
            expiry_checked = wall
            if self._decisions.pending:
                self._decisions.flush()
            self._attached.tick()
            if self.context.now() >= ask_again:
                ask_again = self.context.now() + ASK_AGAIN
                self._missing.add(GATE)
            if GATE in self._missing:
                self.context.nursery.start_soon(self._follow_gate)
            if CONFIG in self._missing:
                self.context.nursery.start_soon(self._follow_config)
            self._numbers.measure(self._table, self._names)

    def _watch(self, actor: str) -> None:
        if actor not in self._watched:
            self._watched.add(actor)
            self.context.watch(actor)


def _hand_over(channel: Channel, negotiation: Negotiation) -> socket.socket:
    return channel.hand_over(negotiation=negotiation)


def _forget(connection: Connection, channel: Channel) -> None:
    connection.inbound_streams.pop(channel, None)
