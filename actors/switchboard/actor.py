"""The switchboard: owns the sockets, connections and streams of the node, and hands streams to other actors.

This file only brings the rooms together: it answers messages, applies the policy, and counts. What happens in each room
is told in its own module: `transports`, `admission`, `reception`, `upgrade` and `admittance` for callers, `reach`,
`dialer` and `keeper` for dials, `connections`, `liveness`, `watching`, `protocols`, `identify`, `ourselves`, `ping`,
`publishers`, and, for the bytes, `handovers`, `link`, `attached` and `doors`.
"""

from __future__ import annotations

import dataclasses
import resource
from collections.abc import Sequence
from pathlib import Path

import trio

from actors.outbox import Outbox
from actors.reactor import Reactor
from actors.switchboard import delivery
from actors.switchboard.admission import Limits
from actors.switchboard.admittance import Admittance
from actors.switchboard.attached import AttachedStreams, socket_of
from actors.switchboard.connections import MAX_CONNECTIONS, Connection, ConnectionTable
from actors.switchboard.decisions import DecisionLog
from actors.switchboard.doors import Doors
from actors.switchboard.errors import ConnectionLostError, SwitchboardError, refusal
from actors.switchboard.handovers import Handovers
from actors.switchboard.identify import IdentifyRoom
from actors.switchboard.link import Channel, LinkEnd
from actors.switchboard.listeners import Listeners
from actors.switchboard.liveness import MONITOR, Liveness
from actors.switchboard.numbers import Numbers
from actors.switchboard.ourselves import KEYRING, KEYRING_DEADLINE, Ourselves, noise_key
from actors.switchboard.own_machine import OwnMachine
from actors.switchboard.paths import Paths
from actors.switchboard.ping import PingServer, ping
from actors.switchboard.pipes import Pipes, TlsFiles
from actors.switchboard.protocols import InboundStreams, ProtocolTable
from actors.switchboard.publishers import CONFIG, GATE, Publishers
from actors.switchboard.reach import Reach, why_lost
from actors.switchboard.recall import RecallServer, Retries
from actors.switchboard.reception import Reception
from actors.switchboard.relaying import Relaying
from actors.switchboard.stops import Stops
from actors.switchboard.turns import Turns
from actors.switchboard.upgrade import Upgrader
from actors.switchboard.watching import ConnectionWatchers
from protocol import yamux
from protocol.errors import InvalidValueError, PeerupError
from protocol.messages import Data
from protocol.messages.config import ConfigSnapshot
from protocol.messages.doors import LendListener, ServeAt
from protocol.messages.gate import PolicyPublished
from protocol.messages.keyring import ReadIdentity
from protocol.messages.network import NetworkChanged
from protocol.messages.paths import MeasurePaths, PathsMeasured, Traced, TracePath
from protocol.messages.reachability import AnnounceAddresses, WatchConnections, WatchedConnections
from protocol.messages.relay import DrainRelay, ReadRelay, RelayServiceStatus, ServeRelay, StopListening, WithdrawRelay
from protocol.messages.switchboard import (
    AdoptedStreams,
    AdoptStreams,
    AttachSocket,
    CloseStreams,
    Connect,
    Connected,
    Disconnect,
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
    StreamOpened,
    StreamsClosed,
    SwitchboardStatus,
    WithdrawProtocol,
)
from protocol.messages.system import ActorDown, ActorUp
from protocol.multiaddr import Multiaddr
from protocol.peer_id import PeerId
from protocol.policy import Decision
from protocol.protocol_ids import CIRCUIT_HOP, CIRCUIT_STOP, DELIVERY, IDENTIFY, IDENTIFY_PUSH, PING, PINGPONG, RECALL
from protocol.service import service_of_protocol
from protocol.stream_descriptor import ResetCode
from supervisor.actor import Actor, Checkpoint, handles
from supervisor.errors import RefusedError
from supervisor.timers import Timer

PROXIES = "proxy/"
"""What the names of the actors of proxies begin with."""
SERVICES = "service/"
"""What the names of the actors of services begin with."""
RELAY_SERVER = "relay/server"
"""The actor that says how this node serves as a relay."""

SAVED_WITHIN = 1.0
"""Seconds after which a successor would know of a source that has become known."""
SAVED_AT_LEAST = 3600.0
"""Seconds after which it would know of later authentications from sources that were known already."""

TICK = 1.0
"""Seconds between looks at what only time changes: drained connections, expired peers, folded decisions, gauges."""


class Switchboard(Actor):
    """See the module.

    Arguments:
        listen: multiaddrs to listen on; none: this node only dials.
        max_connections: how many there may be in all.
        max_streams: how many a peer may have open on one connection.
        admission: changes to the limits of handshakes, see `actors.switchboard.admission.Limits`.
        tls: the files of `actors.switchboard.pipes.TlsFiles`.
        pingpong: whether to answer peer-up's ping, besides libp2p's.
    """

    mailbox_limit = 4096

    def __init__(
        self,
        listen: Sequence[str] = (),
        *,
        max_connections: int = MAX_CONNECTIONS,
        max_streams: int = yamux.DEFAULT_LIMITS.inbound_streams,
        admission: dict[str, float] | None = None,
        tls: dict[str, str] | None = None,
        pingpong: bool = True,
    ) -> None:
        self._pingpong = pingpong
        self._tls = TlsFiles(**{name: Path(path) for name, path in (tls or {}).items()})
        self._listen = tuple(Multiaddr(text) for text in listen)
        self._max_connections = max_connections
        self._session_limits = dataclasses.replace(yamux.DEFAULT_LIMITS, inbound_streams=max_streams)
        self._limits = Limits(**(admission or {}))  # type: ignore[arg-type]  # plain data; a wrong name is a TypeError
        self._listeners = Listeners()
        self._saved_at = 0.0
        self._saving: Timer | None = None
        self._names: dict[PeerId, str] = {}
        self._protocols = ProtocolTable()
        self._watched: set[str] = set()

    async def start(self, checkpoint: Checkpoint | None) -> dict[str, Data]:
        """Get the identity signed, learn the policy, listen."""
        context = self.context
        self._numbers = Numbers(context.metrics)
        identity = await context.ask(KEYRING, ReadIdentity(), timeout=KEYRING_DEADLINE)
        self._own = identity.peer_id
        turns = Turns()
        upgrader = Upgrader(*await noise_key(context), streams=self._session_limits.inbound_streams, turns=turns)
        self._reactor = Reactor(context.now)
        self._table = ConnectionTable(self._own, limit=self._max_connections)
        self._config_version = 0
        self._publishers = Publishers(context, self._policy_changed, self._apply_config)
        self._watchers = ConnectionWatchers(context.tell)
        self._gate = Outbox(context, GATE)
        self._admittance = Admittance(
            context,
            self._reactor,
            own=self._own,
            publishers=self._publishers,
            table=self._table,
            decisions=DecisionLog(self._gate.send),
            numbers=self._numbers,
            on_stream=self._stream_opened,
            on_opened=self._connection_opened,
            on_ended=self._connection_ended,
            on_gone_away=self._connection_gone_away,
            is_relay=self._is_relay,
            limits=self._session_limits,
        )
        pipes = Pipes(self._tls, wall=context.wall, warn=context.log.warning, turns=turns)
        self._reception = Reception(
            context.nursery,
            self._reactor,
            pipes,
            upgrader,
            judge=self._admittance.judge_caller,
            welcome=self._admittance.welcome,
            refused=self._numbers.handshake_refused,
            listed=self._admittance.is_listed,
            remembered=self._source_remembered,
            broke=self._admittance.broke,
            limits=self._limits.within(resource.getrlimit(resource.RLIMIT_NOFILE)[0]),
        )
        self._reach = Reach(
            context,
            self._own,
            pipes=pipes,
            upgrader=upgrader,
            table=self._table,
            admittance=self._admittance,
            numbers=self._numbers,
            here=self._machine,
        )
        self._paths = Paths(context, self._own, self._table, self._reach)
        self._attached = AttachedStreams(context, self._reactor.call_later)
        self._doors = Doors(
            self._reactor,
            self._attached,
            speaking=lambda peer, protocol: self._reach.known_to_speak(peer, (protocol,)),
            opened=lambda: self._numbers.stream("outbound", "opened"),
            tell=context.tell,
            warn=context.log.warning,
        )
        self._handovers = Handovers(
            self._reach,
            self._attached,
            self._doors,
            protocols=self._protocols,
            numbers=self._numbers,
            call_later=self._reactor.call_later,
            tell=context.tell,
            ask_delivery=lambda connection, channel: delivery.ask(
                connection, channel, lambda each: ping(each, context.now, context.random)
            ),
            start_soon=context.nursery.start_soon,
        )
        self._inbound = InboundStreams(
            self._protocols,
            self._reactor.call_later,
            self._admittance.judge_stream,
            self._admittance.may_connect,
            self._handovers.hand_out,
            charge=lambda connection, cost, what: connection.link.charge(cost, what),
            charge_until_answered=_charge_until_answered,
        )
        self._ourselves = Ourselves(
            context,
            identity.public_key,
            listeners=self._listeners,
            protocols=self._protocols,
            table=self._table,
            protocols_for=self._admittance.protocols_for,
        )
        self._identify = IdentifyRoom(
            self._ourselves.describe, self._ourselves.protocols_for, self._reach.learn, self._reactor.call_later
        )
        self._relaying = Relaying(
            context,
            self._reactor,
            own=self._own,
            table=self._table,
            protocols=self._protocols,
            addresses=self._ourselves.announced,
            acl=self._may_be_relayed,
            refused=lambda connection, decision: self._admittance.note(connection, CIRCUIT_HOP, decision),
        )
        self._stops = Stops(
            context.nursery,
            upgrader,
            may_relay=self._is_relay,
            judge=self._admittance.judge_caller,
            welcome=self._admittance.welcome,
            refused=self._numbers.handshake_refused,
            broke=self._admittance.broke,
            now=context.now,
            call_later=self._reactor.call_later,
        )
        self._liveness = Liveness(context, self._reach.keeper, self._table, self._connection_judged)
        self._recalls = RecallServer(self._table.of)
        self._retries = Retries(
            context.nursery,
            connect=self._reach.connect,
            moved=self._stream_moved,
            log=lambda text: context.log.info("{}", text),
        )
        self._serve_own_protocols()
        context.nursery.start_soon(self._reactor.run)
        context.watch(MONITOR)
        context.nursery.start_soon(self._liveness.follow)
        await self._publishers.follow()
        self._listeners.open(self._listen, checkpoint, server_name=pipes.prepare(self._listen))
        if checkpoint is not None:
            self._recall_sources(checkpoint.state.get("known"))
        self._save()
        await self._tell_anew()
        for sock, transports in self._listeners.sockets():
            context.nursery.start_soon(self._reception.listen, sock, transports)
        context.nursery.start_soon(self._tick)
        addresses = [str(listener.address) for listener in self._listeners]
        context.log.info("{} listens on {}", self._own, ", ".join(addresses) or "nothing")
        return {"peer_id": str(self._own), "listen": addresses}

    async def stop(self, reason: str) -> None:
        """Say goodbye to every peer."""
        self._doors.close_all()
        self._admittance.close()
        self._reception.close()
        await self._admittance.close_all("shutdown", "this node is stopping")
        await self._attached.say_goodbye()
        self._admittance.flush()
        self._gate.close()
        if self._saving is not None:
            self._save()
        self._listeners.close()

    def describe(self) -> dict[str, Data]:
        """Listeners, connections, who needs whom, who serves what."""
        now = self.context.now()
        return {
            "peer_id": str(self._own),
            "listen": [str(listener.address) for listener in self._listeners],
            "announced": [str(address) for address in self._ourselves.announced()],
            "policy_version": None if (policy := self._publishers.policy.policy) is None else policy.version,
            "config_version": self._config_version,
            "connections": [
                connection.describe(self._names.get(connection.peer, ""), now) for connection in self._table
            ],
            "needed": {
                str(peer): {
                    "by": list(self._reach.keeper.needed_by(peer)),
                    "next_dial": self._reach.keeper.next_dial(peer),
                    "last_failure": self._reach.keeper.last_failure(peer),
                }
                for peer in self._reach.keeper.peers()
            },
            "dialing": sorted(str(peer) for peer in self._reach.dialer.dialing),
            "protocols": {
                protocol: handler if isinstance(handler := self._protocols.handler(protocol), str) else "switchboard"
                for protocol in self._protocols.names()
            },
            "callers_waiting": self._reception.waiting,
            "callers_silent": self._reception.silent,
            "circuit_handshakes": self._stops.handshakes,
            "handshakes": self._reception.handshakes,
            "streams_negotiating": self._inbound.negotiating,
            "relay": self._relaying.describe(),
            "streams_attached": len(self._attached),
            "streams_offered": self._attached.offered,
            "doors": self._doors.describe(),
        }

    # ---- connections and streams for other actors

    @handles(OpenStream, concurrent=True)
    async def open_stream(self, request: OpenStream) -> StreamOpened:
        """Open a stream to a peer, connecting first where needed."""
        return await self._handovers.open(request)

    @handles(OpenAttached, concurrent=True)
    async def open_attached(self, request: OpenAttached) -> StreamAttached:
        """Open a stream to a peer, connecting first where needed, and carry its bytes from and to a socket."""
        owner = self.context.current_sender
        self._watch(owner)
        return await self._handovers.open_attached(owner, request)

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

    @handles(CloseStreams, concurrent=True)
    async def close_streams(self, request: CloseStreams) -> StreamsClosed:
        """The sender is stopping."""
        sender = self.context.current_sender
        self._doors.close(sender)
        return StreamsClosed(await self._attached.close_soon(sender))

    @handles(LendListener)
    async def lend_listener(self, request: LendListener) -> None:
        """Accept for the sender, a proxy."""
        sender = self.context.current_sender
        if not sender.startswith(PROXIES):
            raise RefusedError("not-allowed", f"{sender} is not a proxy")
        self._watch(sender)
        try:
            self._doors.lend(sender, request)
        except SwitchboardError as error:
            raise refusal(error) from error

    @handles(ServeAt)
    async def serve_at(self, request: ServeAt) -> None:
        """Connect for the sender, the actor of a service."""
        sender, protocol = self.context.current_sender, request.protocol
        if self._protocols.handler(protocol) != sender or not self._protocols.attaches(protocol):
            raise RefusedError("not-serving", f"{sender} does not serve {protocol} with sockets")
        try:
            self._doors.serve_at(sender, protocol, request.addresses, request.limit)
        except SwitchboardError as error:
            raise refusal(error) from error

    @handles(Connect, concurrent=True)
    async def connect(self, request: Connect) -> Connected:
        """Be connected to a peer that accepts us."""
        began = self.context.now()
        try:
            connection, tried = await self._reach.connect_proven(request.peer)
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
            self._reach.keeper.need(self.context.current_sender, message.peer)

    @handles(ReleasePeer)
    async def release_peer(self, message: ReleasePeer) -> None:
        """The sender no longer needs this peer."""
        self._reach.keeper.release(self.context.current_sender, message.peer)

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
        self._doors.forget(request.protocol)
        self._watch(self.context.current_sender)
        await self._tell_anew()

    @handles(WithdrawProtocol)
    async def withdraw_protocol(self, request: WithdrawProtocol) -> None:
        """The sender no longer serves this protocol."""
        self._protocols.withdraw(request.protocol, self.context.current_sender)
        await self._tell_anew()

    @handles(ReadStatus)
    async def read_status(self, request: ReadStatus) -> SwitchboardStatus:
        """Everything at once."""
        peers = sorted({*self._table.peers(), *self._reach.keeper.peers(), *self._reach.book.peers()})
        return SwitchboardStatus(
            peer_id=self._own,
            listen_addresses=tuple(listener.address for listener in self._listeners),
            peers=tuple(
                PeerStatus(
                    peer=peer,
                    addresses=self._reach.book.addresses(peer),
                    connections=tuple(connection.info() for connection in self._table.of(peer)),
                    needed_by=self._reach.keeper.needed_by(peer),
                    next_dial=self._reach.keeper.next_dial(peer),
                    last_failure=self._reach.keeper.last_failure(peer),
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
            connection, _ = await self._reach.connect(request.peer, anyway=True)
            connected_in = self.context.now() - began if fresh else None
            try:
                rtt, protocol = await ping(connection, self.context.now, self.context.random)
            except ConnectionLostError as error:
                raise why_lost(connection, error) from error
        except PeerupError as error:
            raise refusal(error) from error
        return Pinged(rtt, protocol, connection.info(), connected_in)

    @handles(MeasurePaths, concurrent=True)
    async def measure_paths(self, request: MeasurePaths) -> PathsMeasured:
        """A round trip over each connection."""
        return await self._paths.measure(request.peer)

    @handles(TracePath, concurrent=True)
    async def trace_path(self, request: TracePath) -> Traced:
        """A round trip to each hop."""
        try:
            return await self._paths.trace(request.peer)
        except PeerupError as error:
            raise refusal(error) from error

    # ---- what is published to us, and who comes and goes

    @handles(PolicyPublished)
    async def policy_published(self, message: PolicyPublished) -> None:
        """Apply a new policy at once, to what is open as well."""
        if self.context.current_sender == GATE:
            self._publishers.policy_published(message)

    @handles(ConfigSnapshot)
    async def config_changed(self, message: ConfigSnapshot) -> None:
        """Take over names and addresses."""
        if self.context.current_sender == CONFIG and message.version >= self._config_version:
            self._apply_config(message)

    @handles(NetworkChanged)
    async def network_changed(self, message: NetworkChanged) -> None:
        """Connections may be dead without knowing it."""
        if self.context.current_sender == MONITOR:
            self._reach.dialer.begin_anew()
            self._liveness.network_changed()
            self._reach.improver.news()

    @handles(ActorUp)
    async def actor_up(self, message: ActorUp) -> None:
        """Subscribe again to a publisher that was restarted; tell the owner of streams what it missed."""
        self._attached.owner_up(message.name)
        if message.name in (GATE, CONFIG):
            await self._publishers.subscribe(message.name)
        elif message.name == MONITOR:
            self.context.nursery.start_soon(self._liveness.follow)

    @handles(ActorDown)
    async def actor_down(self, message: ActorDown) -> None:
        """Forget what an actor needed, served and announced; it says so again when it is back."""
        self._reach.keeper.release_all(message.name)
        self._attached.owner_down(message.name)
        self._watchers.forget(message.name)
        withdrawn = self._ourselves.withdraw(message.name)
        if self._protocols.withdraw_all(message.name) or withdrawn:
            await self._tell_anew()

    @handles(AnnounceAddresses)
    async def announce_addresses(self, request: AnnounceAddresses) -> None:
        """The node can be reached at these addresses, too."""
        sender = self.context.current_sender
        self._watch(sender)
        try:
            self._ourselves.announce(sender, request.addresses, instead=request.instead)
        except SwitchboardError as error:
            raise refusal(error) from error
        await self._tell_anew()

    @handles(WatchConnections)
    async def watch_connections(self, request: WatchConnections) -> WatchedConnections:
        """Tell the sender when peers come and go."""
        sender = self.context.current_sender
        self._watch(sender)
        self._watchers.watch(sender, request.peers)
        return WatchedConnections(
            tuple(each.info() for each in self._table if not request.peers or each.peer in request.peers)
        )

    # ---- the relay

    @handles(ServeRelay)
    async def serve_relay(self, request: ServeRelay) -> None:
        """Be a relay by these rules."""
        self._check_relay_server()
        try:
            self._relaying.serve(request.rules)
        except InvalidValueError as error:
            raise refusal(error) from error
        await self._tell_anew()

    def _save(self) -> None:
        """Leave to a successor what would be lost with this process: the sockets, and where peers have come from."""
        if self._saving is not None:
            self._saving.cancel()
            self._saving = None
        self._saved_at = self.context.now()
        state, descriptors = self._listeners.to_checkpoint()
        known: dict[str, Data] = {**self._reception.known_sources()}
        self.context.checkpoint({**state, "known": known}, descriptors)

    def _source_remembered(self, new: bool) -> None:  # noqa: FBT001  # what `Reception` calls
        if self._saving is None and (new or self.context.now() - self._saved_at >= SAVED_AT_LEAST):
            self._saving = self._reactor.call_later(SAVED_WITHIN, self._save)

    def _recall_sources(self, left: Data) -> None:
        if isinstance(left, dict):
            self._reception.recall({key: since for key, since in left.items() if isinstance(since, int)})

    @handles(StopListening)
    async def stop_listening(self, request: StopListening) -> None:
        """Let another process have the ports."""
        self._check_relay_server()
        self._reception.close()
        self._listeners.give_up()
        self._save()

    @handles(DrainRelay, concurrent=True)
    async def drain_relay(self, request: DrainRelay) -> None:
        """Grant nothing new, and answer when no circuit is left."""
        self._check_relay_server()
        drained = trio.Event()
        self._relaying.drain(drained.set)
        await drained.wait()

    @handles(WithdrawRelay)
    async def withdraw_relay(self, request: WithdrawRelay) -> None:
        """Be no relay any more."""
        self._check_relay_server()
        self._relaying.withdraw()
        await self._tell_anew()

    @handles(ReadRelay)
    async def read_relay(self, request: ReadRelay) -> RelayServiceStatus:
        """What the relay does."""
        return self._relaying.status()

    def _machine(self) -> OwnMachine:
        return self._ourselves.machine()

    def _is_relay(self, peer: PeerId) -> bool:
        return peer in self._reach.relays

    def _may_be_relayed(self, peer: PeerId, now_wall: float) -> Decision:
        return self._publishers.policy.decide_connection(peer, now_wall)

    def _check_relay_server(self) -> None:
        if self.context.current_sender != RELAY_SERVER:
            raise RefusedError("not-allowed", f"{self.context.current_sender} is not the relay's actor")

    # ---- connections and streams

    def _connection_ended(self, connection: Connection, end: LinkEnd) -> None:
        self._recalls.remember(connection)
        self._watchers.closed(connection, end)
        self._reach.improver.ended(connection.peer)
        self._relaying.connection_ended(connection)

    def _connection_judged(self, connection: Connection) -> None:
        self._watchers.judged(connection)
        if connection.doubted_since is not None:
            self._retries.doubted(connection)
        self._reach.improver.ended(connection.peer)

    def _connection_gone_away(self, connection: Connection) -> None:
        self._reach.departures.said(connection)
        self._watchers.leaving(connection)

    def _connection_opened(self, connection: Connection) -> None:
        self._retries.opened(connection)
        if not connection.relayed and connection.outbound and self._admittance.is_listed(connection.peer):
            where = connection.remote_address.endpoint
            if where is not None:
                self._reception.remember(where.host)
        self._watchers.opened(connection)
        self._reach.opened(connection)
        self._liveness.superseded(self._table.of(connection.peer))
        self.context.nursery.start_soon(self._get_identified, connection)

    def _stream_moved(self, old: Channel, new: Channel, connection: Connection) -> None:
        self._attached.moved(old, new, connection)
        self._handovers.moved(new, connection)

    def _stream_opened(self, connection: Connection, channel: Channel) -> None:
        self._inbound.accept(connection, channel)

    async def _get_identified(self, connection: Connection) -> None:
        await self._identify.identify(connection)
        if connection.end is None:
            self._watchers.opened(connection)
        self._reach.improver.opened(connection)

    def _serve_own_protocols(self) -> None:
        pings = PingServer()
        self._protocols.serve_here(IDENTIFY, self._identify.serve_identify)
        self._protocols.serve_here(IDENTIFY_PUSH, self._identify.serve_push)
        self._protocols.serve_here(CIRCUIT_STOP, self._stops.serve_stop)
        self._protocols.serve_here(PING, pings.serve_ping)
        if self._pingpong:
            self._protocols.serve_here(PINGPONG, pings.serve_pingpong)
        self._protocols.serve_here(DELIVERY, delivery.DeliveryServer(self._attached).serve)
        self._protocols.serve_here(RECALL, self._recalls.serve)

    # ---- what has changed

    def _policy_changed(self) -> None:
        self._admittance.refusals.clear()
        self._relaying.policy_changed()
        self._admittance.enforce()

    def _apply_config(self, snapshot: ConfigSnapshot) -> None:
        self._config_version = snapshot.version
        self._names = {entry.peer: entry.name for entry in snapshot.names}
        self._reach.configure(snapshot.addresses, snapshot.relays)
        self._admittance.patience.silence = snapshot.silence

    async def _tell_anew(self) -> None:
        """If what we say of ourselves has changed, tell it."""
        await self._ourselves.tell_anew(
            lambda connection: self.context.nursery.start_soon(self._identify.push, connection)
        )

    # ---- time

    async def _tick(self) -> None:
        while True:
            await trio.sleep(TICK)
            if self._admittance.tick():
                self._relaying.policy_changed()
            self._relaying.tick()
            self._attached.tick()
            self._liveness.tick()
            self._publishers.tick()
            self._numbers.measure(self._table, self._names)

    def _watch(self, actor: str) -> None:
        if actor not in self._watched:
            self._watched.add(actor)
            self.context.watch(actor)


def _charge_until_answered(connection: Connection, channel: Channel, cost: float) -> None:
    connection.link.session.charge_until_answered(channel.stream, cost, waiting=channel.unsent)
