"""A pretended world for the keeper of reservations: relays, and a switchboard, config, keyring and monitor around it.

Messages, streams and state machines are real; only the network is missing. Nothing here waits for real time.
"""

import contextlib
import dataclasses
import hashlib
import socket
import unittest.mock

import trio

from protocol.circuit.hop_server import HopServer
from protocol.circuit.messages import Limit, Reservation, Status
from protocol.circuit.voucher import seal_voucher
from protocol.keys import PrivateKey
from protocol.messages import Descriptor
from protocol.messages.config import ConfigSnapshot, SubscribeConfig
from protocol.messages.keyring import Identity, ReadIdentity
from protocol.messages.network import NetworkChanged, WatchNetwork
from protocol.messages.reachability import (
    AnnounceAddresses,
    ConnectionClosed,
    ConnectionJudged,
    ConnectionLeaving,
    ConnectionOpened,
    WatchConnections,
    WatchedConnections,
)
from protocol.messages.switchboard import (
    Connect,
    Connected,
    ConnectionInfo,
    Disconnect,
    NeedPeer,
    OpenStream,
    Pinged,
    PingPeer,
    ReleasePeer,
    StreamOpened,
)
from protocol.messages.system import ActorDown, ChildSpec, Strategy, SupervisorSpec
from protocol.multiaddr import Multiaddr
from protocol.protocol_ids import CIRCUIT_HOP
from protocol.reservations import DRAINING
from protocol.stream_descriptor import ResetCode, reset_message
from supervisor.actor import Actor, handles
from supervisor.errors import RefusedError
from supervisor.simulation import Simulation, World

ROUND_TRIP = 0.04
DIAL_DEADLINE = 15.0


def key_of(name):
    return PrivateKey.from_seed(hashlib.sha256(name.encode()).digest())


US = key_of("us").peer_id


class Relay:
    """One relay. `mode`: `fine`, `full`, `denied`, `down` (refuses connections), `hole` (swallows
    packets), `stranger` (does not authorise us)."""

    def __init__(self, world, name, *, lifetime=3600, limit=Limit(120, 131072)):  # noqa: B008 - frozen
        self.world = world
        self.key = key_of(name)
        self.peer = self.key.peer_id
        self.address = Multiaddr(f"/ip4/198.51.100.{len(world.relays) + 1}/tcp/4001/p2p/{self.peer}")
        self.told = (self.address,)
        self.lifetime = lifetime
        self.limit = limit
        self.clock_error = 0
        self.mode = "fine"
        self.asked = []  # times of RESERVE
        self.dialled = []
        self.granted = 0
        world.relays[self.peer] = self

    @property
    def relayed(self):
        return Multiaddr(f"{self.address}/p2p-circuit/p2p/{US}")

    def answer(self, server):
        self.asked.append(self.world.now())
        if self.mode == "full":
            server.refuse(Status.RESERVATION_REFUSED, "all 2 places are taken")
        elif self.mode == "leaving":
            server.refuse(Status.RESERVATION_REFUSED, DRAINING)
        elif self.mode == "denied":
            server.refuse(Status.PERMISSION_DENIED, "you are not on the list")
        else:
            self.granted += 1
            expire = int(self.world.wall() + self.lifetime + self.clock_error)
            server.grant(Reservation(expire, self.told, seal_voucher(self.key, US, expire)), self.limit)


class Surroundings:
    """What outlives actors: the relays, and what happened."""

    def __init__(self):
        self.relays = {}
        self.tracing = False
        self.configured = ()
        self.simulated = None
        self.wall_jump = 0.0
        self.announced = []  # (time, addresses)
        self.needed = set()
        self.disconnects = 0

    def now(self):
        return self.simulated.now()

    def wall(self):
        return self.simulated.wall()

    # ---- things that happen

    def configure(self, *relays):
        self.configured = tuple(one.address if isinstance(one, Relay) else one for one in relays)
        if self.simulated is not None:
            self.simulated.actor("config").publish()

    def network_changes(self):
        self.simulated.actor("nat/monitor").tell_all("it moved")

    def stop(self, relay, mode="down"):
        """The relay ends, or can no longer be heard."""
        relay.mode = mode
        if mode == "down":
            self.simulated.actor("switchboard").lose(relay.peer)

    def doubt(self, relay):
        """The switchboard notices that the connection to it gives no sign of life."""
        self.simulated.actor("switchboard").doubt(relay.peer)

    def trust(self, relay):
        """It has given one again."""
        self.simulated.actor("switchboard").trust(relay.peer)

    def leave(self, relay):
        """The relay is told to stop, and says so; its connections stay for the time being."""
        relay.mode = "leaving"
        self.simulated.actor("switchboard").leaving(relay.peer)

    @property
    def announces(self):
        return self.announced[-1][1] if self.announced else ()

    def simulation(self, seed):
        keyring, config, switchboard, monitor = self._classes()
        return Simulation(
            seed,
            tracing=self.tracing,
            classes={"keyring": keyring, "config": config, "switchboard": switchboard, "monitor": monitor},
        )

    def tree(self):
        children = [*OTHERS, ("relay/keeper", "actors.relay.keeper:RelayKeeper")]
        # Nothing hangs here, and hours of heartbeats take long.
        specs = [ChildSpec(name, factory, {}, heartbeat=600.0) for name, factory in children]
        return SupervisorSpec(Strategy.ONE_FOR_ONE, 40, 60.0, 0.1, 5.0, tuple(specs))

    @contextlib.asynccontextmanager
    async def run(self, *relays, seed=1):
        self.configured = tuple(relay.address for relay in relays)
        honest = World.wall
        # Cells take the clock when they start, so it must lie from the beginning.
        with unittest.mock.patch.object(World, "wall", lambda world: honest(world) + self.wall_jump):
            async with self.simulation(seed).run(self.tree()) as world:
                self.simulated = world
                yield world

    async def until(self, condition, within):
        """Return when it holds, after at most so many virtual seconds; the seconds that it took."""
        began = self.now()
        with trio.move_on_after(within):
            while not condition():  # noqa: ASYNC110  # many things may make it true
                await trio.sleep(0.01 if self.now() - began < 3 else 0.2)
            return self.now() - began
        raise AssertionError(f"not within {within} virtual seconds; announced {self.announced[-3:]}")

    # ---- the other actors

    def _classes(self):
        around = self

        class Keyring(Actor):
            @handles(ReadIdentity)
            async def read(self, request):
                return Identity(US, key_of("us").public_key.to_protobuf())

        class Config(Actor):
            def __init__(self):
                self.subscribers = set()
                self.version = 1

            def snapshot(self):
                return ConfigSnapshot(self.version, True, (), (), (), around.configured)

            def publish(self):
                self.version += 1
                for name in self.subscribers:
                    self.context.tell(name, self.snapshot())

            @handles(SubscribeConfig)
            async def subscribe(self, request):
                self.subscribers.add(self.context.current_sender)
                return self.snapshot()

        class Monitor(Actor):
            def __init__(self):
                self.watchers = set()

            def tell_all(self, why):
                for name in self.watchers:
                    self.context.tell(name, NetworkChanged((why,)))

            @handles(WatchNetwork)
            async def watch(self, request):
                self.watchers.add(self.context.current_sender)

        class Switchboard(Actor):
            def __init__(self):
                self.connections = {}  # peer to info
                self.doubted = {}  # likewise
                self.streams = {}  # peer to sockets of ours
                self.count = 0
                self.watchers = {}

            async def start(self, checkpoint):
                around.needed = set()
                around.announced.append((self.context.now(), ()))
                return {}

            def lose(self, peer, why="the peer closed the connection"):
                info = self.connections.pop(peer, None)
                for sock in self.streams.pop(peer, ()):
                    with sock, contextlib.suppress(OSError):
                        sock.send(reset_message(ResetCode.CONNECTION_LOST))
                        trio.lowlevel.notify_closing(sock)
                if info is not None:
                    self._tell(peer, ConnectionClosed(info, "remote-close", why))

            def leaving(self, peer):
                """The peer says go away."""
                if peer in self.connections:
                    self._tell(peer, ConnectionLeaving(self.connections[peer]))

            def doubt(self, peer):
                info = dataclasses.replace(self.connections.pop(peer), in_doubt=True, rtt=None)
                self.doubted[peer] = info
                self._tell(peer, ConnectionJudged(info))

            def trust(self, peer):
                info = dataclasses.replace(self.doubted.pop(peer), in_doubt=False)
                self.connections.setdefault(peer, info)
                self._tell(peer, ConnectionJudged(info))

            def replace(self, peer):
                """A second connection takes the place of the first, which ends."""
                old = self.connections.pop(peer)
                self._open(peer)
                self._tell(peer, ConnectionClosed(old, "superseded", "another connection is used"))

            def _tell(self, peer, message):
                for name, peers in self.watchers.items():
                    if not peers or peer in peers:
                        self.context.tell(name, message)

            async def _come_and_go(self, peer):
                await trio.sleep(ROUND_TRIP / 2)
                self._open(peer)
                self.lose(peer)

            def _open(self, peer):
                self.count += 1
                info = ConnectionInfo(
                    id=f"{self.context.incarnation}-{self.count}",
                    peer=peer,
                    direction="outbound",
                    path="direct",
                    transport="tcp",
                    local_address=Multiaddr("/ip4/192.168.1.2/tcp/40000"),
                    remote_address=around.relays[peer].address.without_peer_id(),
                    streams=0,
                    rtt=ROUND_TRIP,
                    sent=0,
                    received=0,
                    opened_at=self.context.wall(),
                    agent="",
                    protocols=(CIRCUIT_HOP,),
                )
                self.connections[peer] = info
                self._tell(peer, ConnectionOpened(info, True, None))
                return info

            async def _connected(self, peer):
                if peer not in self.connections:
                    relay = around.relays[peer]
                    relay.dialled.append(self.context.now())
                    with trio.move_on_after(DIAL_DEADLINE if relay.mode == "hole" else 3 * ROUND_TRIP):
                        while peer not in self.connections:  # noqa: ASYNC110  # whoever makes it
                            await trio.sleep(ROUND_TRIP)
                        return self.connections[peer]
                    if relay.mode in ("down", "hole"):
                        raise RefusedError("unreachable", f"{relay.address}: {relay.mode}")
                    if relay.mode == "stranger":
                        # A connection that is there until the relay has judged us; who watches hears of it late.
                        self.context.nursery.start_soon(self._come_and_go, peer)
                        raise RefusedError("not-authorised", "the peer closed the connection")
                if peer not in self.connections:
                    self._open(peer)
                return self.connections[peer]

            @handles(Connect, concurrent=True)
            async def connect(self, request):
                return Connected(await self._connected(request.peer), 0.1, ())

            @handles(Disconnect)
            async def disconnect(self, request):
                around.disconnects += 1
                self.lose(request.peer, "closed by this node")

            @handles(OpenStream, concurrent=True)
            async def open_stream(self, request):
                assert request.protocols == (CIRCUIT_HOP,)
                info = await self._connected(request.peer)
                ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                ours.setblocking(False)
                self.streams.setdefault(request.peer, []).append(ours)
                self.context.nursery.start_soon(self._serve, around.relays[request.peer], ours)
                return StreamOpened(CIRCUIT_HOP, Descriptor(theirs.detach()), info)

            async def _serve(self, relay, ours):
                server = HopServer()
                try:
                    while server.state == "request":
                        await trio.lowlevel.wait_readable(ours)
                        message = ours.recv(70000)
                        if not message:
                            return
                        if message[:1] == b"D":
                            server.receive_data(message[1:])
                    await trio.sleep(ROUND_TRIP)
                    if relay.mode == "hole":
                        await trio.sleep_forever()
                    relay.answer(server)
                    reply = server.data_to_send()
                    for piece in (b"D" + reply[:10], b"D" + reply[10:], b"F"):  # in pieces, as a stream may have it
                        ours.send(piece)
                except (OSError, trio.ClosedResourceError):
                    pass  # the connection was lost, or nobody wants to know any more
                finally:
                    trio.lowlevel.notify_closing(ours)
                    ours.close()
                    if ours in self.streams.get(relay.peer, ()):
                        self.streams[relay.peer].remove(ours)

            @handles(PingPeer, concurrent=True)
            async def ping(self, request):
                return Pinged(ROUND_TRIP, "", await self._connected(request.peer), None)

            @handles(NeedPeer)
            async def need(self, message):
                around.needed.add(message.peer)

            @handles(ReleasePeer)
            async def release(self, message):
                around.needed.discard(message.peer)

            @handles(WatchConnections)
            async def watch(self, request):
                sender = self.context.current_sender
                self.watchers[sender] = request.peers
                self.context.watch(sender)
                return WatchedConnections((*self.connections.values(), *self.doubted.values()))

            @handles(AnnounceAddresses)
            async def announce(self, request):
                self.context.watch(self.context.current_sender)
                around.announced.append((self.context.now(), request.addresses))

            @handles(ActorDown)
            async def down(self, message):
                if self.watchers.pop(message.name, None) is not None:
                    around.announced.append((self.context.now(), ()))

        return Keyring, Config, Switchboard, Monitor


OTHERS = (
    ("config", "config"),
    ("keyring", "keyring"),
    ("switchboard", "switchboard"),
    ("nat/monitor", "monitor"),
)
