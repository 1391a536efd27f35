"""A relay that means harm: it speaks the protocols by hand, and what it does with circuits is up to the test.

Nodes that have it in their configuration dial it. It proves its own identity, as it must; everything else is a lie if
`Malice` says so. It grants no yamux window anew, so let no stream carry more than 256 KiB each way.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import AsyncIterator, Callable

import trio

from protocol.circuit.messages import (
    HopMessage,
    HopType,
    Peer,
    Reservation,
    Status,
    StopMessage,
    StopType,
    encode_message,
)
from protocol.delimited import DelimitedReader
from protocol.identify import encode_identification
from protocol.keys import PrivateKey
from protocol.multiaddr import Multiaddr
from protocol.multistream import HEADER, NOT_AVAILABLE, Initiator
from protocol.multistream import encode_message as proposal
from protocol.peer_id import PeerId
from protocol.protocol_ids import CIRCUIT_HOP, CIRCUIT_STOP, IDENTIFY
from tests.abuse.attacker import DATA, FIN, PING, RST, SYN, Attacker, ClosedError, data, frame

OK = encode_message(HopMessage(HopType.STATUS, status=Status.OK))
FAR_FUTURE = 4_000_000_000

Pass = Callable[[bytes], list[bytes]]
"""What becomes of a piece of a circuit on its way."""


@dataclasses.dataclass
class Malice:
    """What the relay does other than it should.

    Attributes:
        answer: bytes in place of the OK to CONNECT, which are all that happens; None to open the circuit.
        target: whom a circuit leads to, whoever was asked for.
        source: from whom it says that a circuit comes.
        mirror: connect who asks with itself.
        to_target, to_source: what becomes of the bytes.
        deaf: take no notice of the end of a circuit.
    """

    answer: bytes | None = None
    target: PeerId | None = None
    source: PeerId | None = None
    mirror: bool = False
    to_target: Pass = lambda piece: [piece]
    to_source: Pass = lambda piece: [piece]
    deaf: bool = False


class _Stream:
    """A stream, and what is done with each piece of it and with its end."""

    def __init__(self, client: Client, number: int) -> None:
        self.client = client
        self.number = number
        self.heard = b""
        self.take: Callable[[bytes], None] = lambda _: None
        self.ended: Callable[[int], None] = lambda _: None
        self.finished = False
        self.resets: list[int] = []

    def send(self, content: bytes, flags: int = 0) -> None:
        for start in range(0, len(content), 60_000) or (0,):
            last = start + 60_000 >= len(content)
            self.client.outbox.send_nowait(data(self.number, content[start : start + 60_000], flags if last else 0))


class Client:
    """A node that has connected to the relay."""

    def __init__(self, relay: EvilRelay, line: Attacker, peer: PeerId) -> None:
        self.relay = relay
        self.line = line
        self.peer = peer
        self.streams: dict[int, _Stream] = {}
        self.outbox, self._sending = trio.open_memory_channel[bytes](10_000)
        self._next = 2

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._send)
            with contextlib.suppress(ClosedError):
                while True:
                    await self._hear()
            nursery.cancel_scope.cancel()

    async def _send(self) -> None:
        with contextlib.suppress(ClosedError):
            async for one in self._sending:
                await self.line.say(one)

    async def _hear(self) -> None:
        heard = await self.line.hear()
        if heard.kind == PING and heard.flags & SYN:
            self.outbox.send_nowait(frame(PING, 2, 0, heard.length))
        if not heard.stream:
            return
        stream = self.streams.get(heard.stream)
        if stream is None and heard.flags & SYN:
            stream = self.streams[heard.stream] = _Stream(self, heard.stream)
            stream.take = lambda piece: self._negotiate(stream, piece)
        if stream is None:
            return
        if heard.kind == DATA and heard.body:
            stream.take(heard.body)
        if heard.flags & RST:
            stream.resets.append(heard.length)
        stream.finished = stream.finished or bool(heard.flags & FIN)
        if heard.flags & (FIN | RST):
            stream.ended(heard.flags & (FIN | RST))

    # ---- what the node asks for

    def _negotiate(self, stream: _Stream, piece: bytes) -> None:
        stream.heard += piece
        for protocol in (IDENTIFY, CIRCUIT_HOP):
            opening = HEADER + proposal(protocol)
            if stream.heard.startswith(opening):
                stream.heard = stream.heard[len(opening) :]
                if protocol == IDENTIFY:
                    stream.send(opening + self.relay.identification(), FIN)
                else:
                    stream.send(opening)
                    self._serve_hop(stream)
                return
        if len(stream.heard) > len(HEADER) + 2 and stream.heard.endswith(b"\n"):
            stream.send(HEADER + NOT_AVAILABLE, FIN)

    def _serve_hop(self, stream: _Stream) -> None:
        reader = DelimitedReader(4096)
        stream.take = lambda more: self._hop(stream, reader, more)
        rest, stream.heard = stream.heard, b""
        stream.take(rest)

    def _hop(self, stream: _Stream, reader: DelimitedReader, piece: bytes) -> None:
        reader.receive_data(piece)
        request = reader.next_message()
        if request is None:
            return
        message = HopMessage.from_bytes(request)
        if message.peer is None:
            stream.send(self.relay.granted, FIN)
            return
        self.relay.asked.append(message.peer.peer_id)
        malice, early = self.relay.malice, reader.take_rest()
        if malice.answer is not None:
            stream.take = lambda _: None
            stream.send(malice.answer)
        elif malice.mirror:
            stream.take = stream.send
            stream.send(OK + early)
        else:
            target = self.relay.clients[malice.target or message.peer.peer_id]
            target.offer(malice.source or self.peer, early, stream)

    # ---- what is offered to the node

    def offer(self, source: PeerId, early: bytes = b"", origin: _Stream | None = None) -> _Stream:
        """Announce a circuit; `origin` is the other end of it, which is told when it is open."""
        malice = self.relay.malice
        stream = self.streams[self._next] = _Stream(self, self._next)
        self._next += 2
        initiator, reader = Initiator((CIRCUIT_STOP,)), DelimitedReader(4096)
        connect = encode_message(StopMessage(StopType.CONNECT, peer=Peer(source)))
        opening = initiator.data_to_send() + connect + b"".join(malice.to_target(early) if early else ())

        def from_target(piece: bytes) -> None:
            if initiator.result is None:
                initiator.receive_data(piece)
                piece = initiator.leftover
            reader.receive_data(piece)
            answer = reader.next_message()
            if answer is None:
                return
            stream.heard = answer
            if origin is None or StopMessage.from_bytes(answer).status != Status.OK:
                return
            self._join(origin, stream, malice)
            origin.send(OK)
            if rest := reader.take_rest():
                stream.take(rest)

        stream.take = from_target
        if origin is not None:
            origin.take = lambda piece: stream.send(b"".join(malice.to_target(piece)))
        self.outbox.send_nowait(data(stream.number, opening, SYN))
        return stream

    def _join(self, near: _Stream, far: _Stream, malice: Malice) -> None:
        self.relay.circuits.append((near, far))

        def passing(to: _Stream, what: Pass) -> Callable[[bytes], None]:
            def take(piece: bytes) -> None:
                for one in what(piece):
                    to.send(one)

            return take

        def ending(to: _Stream) -> Callable[[int], None]:
            return lambda flags: None if malice.deaf else to.send(b"", flags)

        near.take, far.take = passing(far, malice.to_target), passing(near, malice.to_source)
        near.ended, far.ended = ending(far), ending(near)


class EvilRelay:
    """See the module.

    Attributes:
        address: where it listens.
        peer: its peer id.
        clients: who is connected.
        asked: whom CONNECTs asked for.
        circuits: those that were opened, by their two streams.
        granted: the answer to RESERVE.
    """

    def __init__(self, key: PrivateKey, address: str) -> None:
        self.key = key
        self.peer = key.peer_id
        self.address = address
        self.malice = Malice()
        self.clients: dict[PeerId, Client] = {}
        self.asked: list[PeerId] = []
        self.circuits: list[tuple[_Stream, _Stream]] = []
        self.granted = encode_message(
            HopMessage(HopType.STATUS, status=Status.OK, reservation=Reservation(FAR_FUTURE, (Multiaddr(address),)))
        )

    def identification(self) -> bytes:
        """What it says of itself."""
        return encode_identification(
            public_key=self.key.public_key.to_protobuf(),
            agent_version="relay",
            protocol_version="ipfs/0.1.0",
            protocols=[CIRCUIT_HOP, IDENTIFY],
            listen_addresses=[Multiaddr(self.address)],
        )

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, key: PrivateKey) -> AsyncIterator[EvilRelay]:
        """Listening on loopback."""
        async with trio.open_nursery() as nursery:
            (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
            relay = cls(key, f"/ip4/127.0.0.1/tcp/{listener.socket.getsockname()[1]}")

            async def serve(stream: trio.SocketStream) -> None:
                line = Attacker(stream.socket, key)
                with contextlib.suppress(ClosedError):
                    result = await line.secured_by_caller()
                    client = relay.clients[result.peer_id] = Client(relay, line, result.peer_id)
                    await client.run()

            nursery.start_soon(trio.serve_listeners, serve, [listener])
            yield relay
            nursery.cancel_scope.cancel()
