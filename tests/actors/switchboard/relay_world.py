"""A relay's room with real links around it: everything but the actor runtime and the handshakes."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import random
import socket
import time

import loguru
import trio

from actors.switchboard.connections import Connection, ConnectionTable
from actors.switchboard.link import Channel, Link
from actors.switchboard.protocols import InboundStreams, ProtocolTable
from actors.switchboard.relaying import Relaying
from actors.switchboard.wire import SocketWire, Way
from protocol import multistream, yamux
from protocol.circuit.hop_client import ConnectClient, ReserveClient
from protocol.circuit.messages import Status
from protocol.circuit.stop import StopResponder
from protocol.circuit.voucher import seal_voucher
from protocol.errors import PeerupError, ProtocolError
from protocol.keys import PrivateKey
from protocol.messages.keyring import SignedRelayVoucher, SignRelayVoucher
from protocol.messages.relay import CircuitLimit, RelayRules, ScopedLimit
from protocol.multiaddr import Multiaddr
from protocol.noise_cipher import CipherState
from protocol.policy import Decision
from protocol.protocol_ids import CIRCUIT_HOP, CIRCUIT_STOP
from protocol.stream_descriptor import ResetCode
from protocol.yamux import Role
from supervisor.errors import ActorRestartingError
from supervisor.metrics import Registry
from tests.actors.dataplane import running, tcp_pair, until

UNLIMITED = ScopedLimit(None, None, None, None)
FREE = RelayRules(
    UNLIMITED, UNLIMITED, UNLIMITED, UNLIMITED, 3600, CircuitLimit(None, None), CircuitLimit(120, 1 << 17)
)
ANNOUNCED = Multiaddr("/ip4/203.0.113.7/tcp/4001")


def key_of(name: str) -> PrivateKey:
    return PrivateKey.from_seed(hashlib.sha256(name.encode()).digest())


def rules(**changes) -> RelayRules:
    return dataclasses.replace(FREE, **changes)


def scoped(peer=None, ip=None, network=None, total=None) -> ScopedLimit:
    return ScopedLimit(peer, ip, network, total)


class PretendedContext:
    """What the room uses of an actor's context."""

    def __init__(self, nursery: trio.Nursery, key: PrivateKey) -> None:
        self.nursery = nursery
        self.log = loguru.logger
        self.metrics = Registry()
        self.keyring_is_there = True
        self.wall_ahead = 0.0
        self._key = key

    def now(self) -> float:
        return time.monotonic()

    def wall(self) -> float:
        return time.time() + self.wall_ahead

    async def ask(self, target, request, *, timeout):  # noqa: ASYNC109  # as the real one
        await trio.lowlevel.checkpoint()
        assert target == "keyring"
        assert isinstance(request, SignRelayVoucher)
        if not self.keyring_is_there:
            raise ActorRestartingError("the keyring is being restarted")
        return SignedRelayVoucher(seal_voucher(self._key, request.peer, request.expiration))

    def series(self) -> dict[str, float]:
        return {
            f"{one.name}{{{','.join(f'{k}={v}' for k, v in sorted(one.labels.items()))}}}": one.value
            for one in self.metrics.samples()
        }


class Stream:
    """A peer's stream, with what came of it."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.data = bytearray()
        self.finished = False
        self.code: int | None = None
        channel.on_data = self.data.extend
        channel.on_finish = self._on_finish
        channel.on_reset = self._on_reset

    def _on_finish(self) -> None:
        self.finished = True

    def _on_reset(self, code: int) -> None:
        self.code = code

    @property
    def over(self) -> bool:
        return self.finished or self.code is not None

    def take(self) -> bytes:
        data = bytes(self.data)
        self.data.clear()
        return data


class RelayWorld:
    """The relay. `peers` are what it is connected with, by name."""

    def __init__(self, reactor, nursery: trio.Nursery) -> None:
        self.reactor = reactor
        self.key = key_of("relay")
        self.context = PretendedContext(nursery, self.key)
        self.table = ConnectionTable(self.key.peer_id, limit=5000)
        self.protocols = ProtocolTable()
        self.addresses = (ANNOUNCED,)
        self.denied: set[str] = set()
        self.guests: set[str] = set()
        self.refused: list[tuple[Connection, Decision]] = []
        self.room = Relaying(
            self.context,
            reactor,
            own=self.key.peer_id,
            table=self.table,
            protocols=self.protocols,
            addresses=lambda: self.addresses,
            acl=self.acl,
            refused=lambda connection, decision: self.refused.append((connection, decision)),
        )
        self.inbound = InboundStreams(
            self.protocols,
            reactor.call_later,
            lambda connection, _: self.acl(connection.peer, 0.0),
            lambda _: True,
            lambda *_: None,
        )
        self.peers: dict[str, Peer] = {}
        self._names = {}

    def acl(self, peer, now_wall) -> Decision:
        name = self._names.get(peer, "")
        if name in self.denied or not name:
            return Decision(allowed=False, rule="not-listed")
        return Decision(allowed=True, rule="gating-off" if name in self.guests else "authorized_keys:1")

    def connect(self, name: str, *, ip: str = "192.0.2.1", relayed: bool = False, **limits) -> Peer:
        """One more connection of this peer, which it dialled."""
        peer = self.peers.get(name) or Peer(self, name)
        self.peers[name] = peer
        self._names[peer.id] = name
        far, near = tcp_pair()
        ciphers = (
            [CipherState(bytes([number]) * 32) for number in (1, 2)],
            [CipherState(bytes([number]) * 32) for number in (2, 1)],
        )
        relay = key_of("another relay").peer_id if relayed else None
        via = Way("relayed" if relayed else "direct", "tcp", ANNOUNCED, Multiaddr(f"/ip4/{ip}/tcp/1234"), relay)
        connection = Connection(
            id=f"1-{len(self.table)}", peer=peer.id, outbound=False, via=via, opened=time.monotonic(), opened_at=0.0
        )

        def ended(end):
            self.table.remove(connection, end)
            self.room.connection_ended(connection)

        connection.link = Link(
            self.reactor,
            SocketWire(self.reactor, near),
            role=Role.SERVER,
            send_cipher=ciphers[1][0],
            receive_cipher=ciphers[1][1],
            received=b"",
            on_stream=lambda channel: self.inbound.accept(connection, channel),
            on_end=ended,
        )
        self.table.add(connection, time.monotonic())
        link = Link(
            self.reactor,
            SocketWire(self.reactor, far),
            role=Role.CLIENT,
            send_cipher=ciphers[0][0],
            receive_cipher=ciphers[0][1],
            received=b"",
            on_stream=peer.stream_opened,
            on_end=lambda _: None,
            limits=dataclasses.replace(yamux.DEFAULT_LIMITS, **limits),
        )
        peer.sockets.append(far)
        peer.links.append(link)
        peer.connections.append(connection)
        return peer

    async def close(self) -> None:
        for peer in self.peers.values():
            for link in peer.links:
                link.close()
        await until(lambda: not len(self.table), "the end of all connections")

    @property
    def exchanges(self) -> int:
        return self.room.describe()["exchanges"]


class Peer:
    """A client of the relay. `accept` says what it does with circuits to it."""

    def __init__(self, world: RelayWorld, name: str) -> None:
        self.world = world
        self.name = name
        self.id = key_of(name).peer_id
        self.sockets: list[socket.socket] = []
        self.links: list[Link] = []
        self.connections: list[Connection] = []
        self.accept = True
        self.silent = False
        self.speaks_stop = True
        self.offered: list[Offered] = []

    def open(self) -> Stream:
        return Stream(self.links[-1].open_stream())

    def hop(self, data: bytes = b"") -> Stream:
        """A stream for hop, without waiting for the agreement, with these bytes behind it."""
        stream = self.open()
        stream.channel.send(multistream.Initiator((CIRCUIT_HOP,)).data_to_send() + data)
        return stream

    async def agreed(self, stream: Stream) -> bool:
        """Wait for the agreement on hop; whether it came. What came behind stays in the stream."""
        expected = multistream.HEADER + multistream.encode_message(CIRCUIT_HOP)
        refused = multistream.HEADER + multistream.NOT_AVAILABLE
        await until(lambda: len(stream.data) >= len(expected) or stream.data == refused or stream.over, "the agreement")
        if not stream.data.startswith(expected):
            return False
        del stream.data[: len(expected)]
        return True

    async def reserve(self) -> ReserveClient:
        machine = ReserveClient(self.world.key.peer_id, self.id)
        stream = self.hop(machine.data_to_send())
        assert await self.agreed(stream)
        await until(lambda: stream.over, "the end of the answer")
        machine.receive_data(stream.take())
        stream.channel.finish()
        return machine

    async def ask(self, destination: Peer, early: bytes = b"") -> tuple[ConnectClient, Stream]:
        """CONNECT, up to its answer. An open circuit's bytes go on collecting in the stream."""
        machine = ConnectClient(destination.id, early=early)
        stream = self.hop(machine.data_to_send())
        assert await self.agreed(stream)

        def answered() -> bool:
            machine.receive_data(stream.take())
            return machine.state != "waiting" or stream.code is not None

        await until(answered, "the answer to CONNECT")
        stream.data[:0] = machine.leftover
        if machine.state == "refused":
            await until(lambda: stream.over, "the end of the refusal")
            stream.channel.finish()
        return machine, stream

    async def circuit(self, destination: Peer, early: bytes = b"") -> tuple[Stream, Stream]:
        """Both ends of a circuit that opens."""
        before = len(destination.offered)
        machine, near = await self.ask(destination, early)
        assert machine.state == "open", machine.refusal
        return near, destination.offered[before].stream

    def stream_opened(self, channel: Channel) -> None:
        self.offered.append(Offered(self, channel))


class Offered:
    """A stop stream, from the target's side."""

    def __init__(self, peer: Peer, channel: Channel) -> None:
        self.peer = peer
        self.stream = Stream(channel)
        self.machine = StopResponder()
        self.first = b""
        self._responder = multistream.Responder((CIRCUIT_STOP,) if peer.speaks_stop else ())
        channel.on_data = self._on_data

    def _on_data(self, data: bytes) -> None:
        channel = self.stream.channel
        self.first += data
        if self._responder.result is None:
            try:
                self._responder.receive_data(data)
            except ProtocolError:  # what came behind a proposal that was refused
                channel.reset(ResetCode.NEGOTIATION_FAILED)
                return
            if reply := self._responder.data_to_send():
                channel.send(reply)
            data = self._responder.leftover
        self.machine.receive_data(data)
        if self.machine.state != "deciding" or self.peer.silent:
            return
        if self.peer.accept:
            self.machine.accept()
            self.stream.data += self.machine.leftover
            channel.on_data = self.stream.data.extend
        else:
            self.machine.refuse(Status.PERMISSION_DENIED, "not you")
        channel.send(self.machine.data_to_send())


@contextlib.asynccontextmanager
async def relaying(served: RelayRules | None = FREE, *, direct: bool = True):
    """A relay that serves by these rules."""
    async with running(direct=direct) as reactor, trio.open_nursery() as nursery:
        world = RelayWorld(reactor, nursery)
        if served is not None:
            world.room.serve(served)
        yield world
        await world.close()
        nursery.cancel_scope.cancel()


def sends(stream: Stream, data: bytes) -> None:
    """Send more than a channel takes at once: from the reactor, as the peer admits it."""
    view = memoryview(data)

    def go_on() -> None:
        nonlocal view
        if stream.channel.closed:
            return
        while view:
            try:
                stream.channel.send(bytes(view[: 1 << 19]))
            except PeerupError:
                stream.channel.reactor.call_later(0.001, go_on)
                return
            view = view[1 << 19 :]
        stream.channel.finish()

    go_on()


def content(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)
