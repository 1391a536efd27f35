"""Our side of the interop tests: a switchboard alone in this process, behind the same commands as the foreign peers."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import json
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import trio

from actors.switchboard.actor import CONFIG, GATE, Switchboard
from protocol.errors import PeerupError
from protocol.identify import IdentifyReader
from protocol.keys import PrivateKey
from protocol.messages import Descriptor, Message
from protocol.messages.config import AddressEntry, ConfigSnapshot, SubscribeConfig
from protocol.messages.gate import Decided, PolicyPublished, SubscribePolicy
from protocol.messages.keyring import (
    Identity,
    ReadIdentity,
    Signature,
    SignedPeerRecord,
    SignNoiseStaticKey,
    SignPeerRecord,
)
from protocol.messages.switchboard import (
    Connect,
    ConnectionInfo,
    Disconnect,
    InboundStream,
    OpenAttached,
    OpenStream,
    PingPeer,
    ReadStatus,
    ServeProtocol,
)
from protocol.messages.system import Ok
from protocol.multiaddr import Multiaddr
from protocol.noise import SIGNATURE_PREFIX
from protocol.peer_id import PeerId
from protocol.peer_record import open_peer_record, seal_peer_record
from protocol.policy import PeerRule, Policy, ServiceRule
from protocol.protocol_ids import IDENTIFY
from protocol.service import service_of_protocol
from supervisor.errors import AskError, NoSuchActorError
from tests.interop.content import blocks
from tests.interop.descriptors import DescriptorStream, ResetError
from tests.interop.lone_actor import LoneActor, lone_actor
from tests.interop.peers import COMMAND_TIMEOUT, GRACE, Answer, Pending, answered, waiting_for

LIBRARY = "peerup"


@dataclasses.dataclass
class Progress:
    """Bytes counted while they move; "release" sets the gate."""

    sent: int = 0
    received: int = 0
    gate: trio.Event = dataclasses.field(default_factory=trio.Event)


@dataclasses.dataclass
class Service:
    """A protocol that we serve, and what became of each stream so far."""

    behaviour: str
    bytes: int = 0
    code: int = 0
    opened: int = 0
    finished: list[Answer] = dataclasses.field(default_factory=list)
    gate: trio.Event = dataclasses.field(default_factory=trio.Event)


@dataclasses.dataclass
class Transfer:
    """One stream: counts and hashes of what was received."""

    stream: DescriptorStream
    sent: int = 0
    received: int = 0
    head: bytes = b""
    digest: Any = dataclasses.field(default_factory=hashlib.sha256)

    async def receive(self, *, limit: int = 0, on_data: Callable[[bytes], Awaitable[None]] | None = None) -> None:
        """Read to the end, or to `limit` bytes if that is not 0."""
        while not limit or self.received < limit:
            data = await self.stream.receive()
            if data is None:
                return
            part = data[: limit - self.received] if limit else data
            self.received += len(part)
            self.digest.update(part)
            self.head += part[: 1024 - len(self.head)]
            if on_data is not None:
                await on_data(part)


class OurPeer:
    """The switchboard as a peer of an interop test.

    Attributes:
        authorised: who may connect. `dial` adds the peer; whoever is to call must be added with `authorise`.
        on_stream: called when a stream is handed to a service, before anything else.
    """

    name = "peerup"
    library = LIBRARY
    last_words = ""

    def __init__(self, nursery: trio.Nursery, key: PrivateKey, listen: str, tls: dict[str, str] | None) -> None:
        self.key = key
        self.peer_id = str(key.peer_id)
        self.address = ""
        self.authorised: set[PeerId] = set()
        self.on_stream: Callable[[], None] = lambda: None
        self.actor = Switchboard([listen], tls=tls)
        self.stage: LoneActor
        self._nursery = nursery
        self._services: dict[str, Service] = {}
        self._running: dict[int, Progress] = {}
        self._addresses: dict[PeerId, Multiaddr] = {}
        self._version = 0
        self._next_id = 0

    # ---- the actors around the switchboard

    async def answer(self, target: str, request: Any) -> Message:
        """What the keyring, the gate and the config actor would say."""
        match request:
            case ReadIdentity():
                return Identity(self.key.peer_id, self.key.public_key.to_protobuf())
            case SignNoiseStaticKey():
                signature = self.key.sign(SIGNATURE_PREFIX + request.static_key)
                return Signature(self.key.public_key.to_protobuf(), signature)
            case SignPeerRecord():
                return SignedPeerRecord(seal_peer_record(self.key, request.addresses, request.seq))
            case SubscribePolicy():
                return self._policy()
            case SubscribeConfig():
                return self._config()
            case Decided():
                return Ok()
        if target in {CONFIG, GATE, "keyring"}:
            raise AssertionError(f"the switchboard asked {target} for {request}")
        raise NoSuchActorError(f"there is no {target} in this test")

    def audience(self, target: str, message: Message) -> bool:
        """Inbound streams go to the behaviour that serves them."""
        if isinstance(message, InboundStream):
            self.on_stream()
            self._nursery.start_soon(self._serve_stream, message)
            return True
        return False

    def _policy(self) -> PolicyPublished:
        self._version += 1
        peers = tuple(PeerRule(peer, line, None, "") for line, peer in enumerate(sorted(self.authorised), 1))
        names = {name for protocol in self._services if (name := service_of_protocol(protocol)) is not None}
        services = tuple(ServiceRule(name, None) for name in sorted(map(str, names)))
        return PolicyPublished(Policy(self._version, gating=True, peers=peers, services=services))

    def _config(self) -> ConfigSnapshot:
        self._version += 1
        entries = tuple(AddressEntry(peer, (address,)) for peer, address in self._addresses.items())
        return ConfigSnapshot(self._version, gating=True, services=(), names=(), addresses=entries)

    async def authorise(self, peer: str) -> None:
        """Let this peer connect."""
        self.authorised.add(PeerId.from_text(peer))
        await self._publish_policy()

    async def revoke(self, peer: str) -> None:
        """Let it connect no longer."""
        self.authorised.discard(PeerId.from_text(peer))
        await self._publish_policy()

    async def _publish_policy(self) -> None:
        with waiting_for("a policy to be taken in", self, GRACE):
            await self.stage.deliver(self._policy(), GATE)

    async def open(self, peer: str, protocol: str) -> DescriptorStream:
        """A stream of any protocol to a peer that we are connected to, for tests that speak it themselves."""
        opened = await self.stage.deliver(OpenStream(PeerId.from_text(peer), (protocol,)))
        return DescriptorStream(opened.stream)

    # ---- commands

    async def ask(self, do: str, **arguments: Any) -> Answer:
        """Carry out a command and give its answer."""
        return await self.answer_to(await self.send(do, **arguments))

    async def send(self, do: str, **arguments: Any) -> Pending:
        """Start a command without waiting for its end."""
        self._next_id += 1
        sender, receiver = trio.open_memory_channel[Answer](1)
        pending = Pending.to(self._next_id, do, arguments, receiver)
        self._nursery.start_soon(self._run, self._next_id, do, arguments, sender)
        return pending

    async def answer_to(self, pending: Pending) -> Answer:
        """The answer to a command started with `send`."""
        return await answered(pending, self)

    async def _run(self, number: int, do: str, arguments: Answer, sender: trio.MemorySendChannel[Answer]) -> None:
        timeout = arguments.pop("timeout", COMMAND_TIMEOUT)
        commands = {
            "dial": self._dial,
            "disconnect": self._disconnect,
            "wait-closed": self._wait_closed,
            "connections": self._connections,
            "identify": self._identify,
            "ping": self._ping,
            "progress": self._progress,
            "serve": self._serve,
            "served": self._served,
            "release": self._release,
        }
        try:
            with trio.fail_after(timeout):
                if do == "exchange":
                    result = await self._exchanges(number, **arguments)
                else:
                    result = await commands[do](**arguments) or {}
        except (PeerupError, AskError, ResetError, trio.TooSlowError, LookupError) as error:
            result = {"error": f"{type(error).__name__}: {error}", "error_code": getattr(error, "code", None)}
        sender.send_nowait({**result, "ok": "error" not in result})

    async def _dial(self, address: str) -> Answer:
        whole = Multiaddr(address)
        text, _, peer_text = address.rpartition("/p2p/")
        peer = PeerId.from_text(peer_text)
        assert whole.peer_id == peer
        self._addresses[peer] = Multiaddr(text)
        await self.authorise(peer_text)
        await self.stage.deliver(self._config(), CONFIG)
        connected = await self.stage.deliver(Connect(peer))
        return _describe(connected.connection)

    async def _disconnect(self, peer: str) -> None:
        await self.stage.deliver(Disconnect(PeerId.from_text(peer)))

    async def _all_connections(self) -> list[ConnectionInfo]:
        status = await self.stage.deliver(ReadStatus())
        return [connection for peer in status.peers for connection in peer.connections]

    async def _connections(self) -> Answer:
        return {"connections": [_describe(connection) for connection in await self._all_connections()]}

    async def _wait_closed(self, peer: str) -> None:
        while True:
            if all(str(connection.peer) != peer for connection in await self._all_connections()):
                return
            await trio.sleep(0.01)

    async def _ping(self, peer: str, count: int = 1) -> Answer:
        pings = [await self.stage.deliver(PingPeer(PeerId.from_text(peer))) for _ in range(count)]
        return {"seconds": [each.rtt for each in pings]}

    async def _identify(self, peer: str) -> Answer:
        """On a stream of its own, through our own parser: what the other says must be right for it."""
        who = PeerId.from_text(peer)
        stream = await self.open(peer, IDENTIFY)
        reader = IdentifyReader()
        try:
            while (data := await stream.receive()) is not None:
                reader.receive_data(data)
            await stream.finish()
        finally:
            stream.close()
        said = reader.finish(who)
        result: Answer = {
            "agent": said.agent_version,
            "protocol_version": said.protocol_version,
            "protocols": list(said.protocols),
            "addresses": [str(address) for address in said.listen_addresses],
            "observed": str(said.observed_address or ""),
            "record": "absent",
        }
        if said.signed_peer_record is not None:
            record = open_peer_record(said.signed_peer_record)
            assert record.peer_id == who
            result |= {
                "record": "verified",
                "record_addresses": [str(address) for address in record.addresses],
                "record_seq": record.seq,
            }
        return result

    # ---- exchanges: we are the client of a protocol

    async def _exchanges(self, number: int, *, count: int = 1, seed: int = 0, **options: Any) -> Answer:
        progress = self._running[number] = Progress()
        results: list[Answer] = [{} for _ in range(count)]

        async def one(index: int) -> None:
            results[index] = await self._exchange(progress, seed=seed + index, **options)

        async with trio.open_nursery() as nursery:
            for index in range(count):
                nursery.start_soon(one, index)
        if count == 1:
            return results[0]
        failed = [each["error"] for each in results if "error" in each]
        return {"exchanges": results, **({"error": failed[0]} if failed else {})}

    async def _exchange(
        self,
        progress: Progress,
        *,
        peer: str,
        protocol: str,
        seed: int,
        text: str = "",
        send: int = 0,
        after: int = 0,
        keep_open: bool = False,
        reset_after: bool = False,
        reset_code: int = 0,
        read_at_most: int = 0,
        hold: bool = False,
    ) -> Answer:
        try:
            opened = await self.stage.deliver(OpenStream(PeerId.from_text(peer), (protocol,)))
        except AskError as error:
            return {"opened": False, "error": str(error)}
        transfer = Transfer(DescriptorStream(opened.stream))
        sent_digest = hashlib.sha256()
        failures: list[ResetError] = []

        async def send_content(size: int) -> None:
            for block in blocks(size, seed):
                await transfer.stream.send(block)
                sent_digest.update(block)
                transfer.sent += len(block)
                progress.sent += len(block)

        async def sending() -> None:
            try:
                if text:
                    await transfer.stream.send(text.encode())
                await send_content(send)
                if reset_after:
                    await transfer.stream.reset(reset_code)
                elif not (keep_open or after):
                    await transfer.stream.finish()
            except ResetError as error:
                failures.append(error)

        async def count(data: bytes) -> None:
            progress.received += len(data)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(sending)
            try:
                if hold:
                    await progress.gate.wait()
                await transfer.receive(limit=read_at_most, on_data=count)
                if read_at_most:
                    await transfer.stream.reset(reset_code)
            except ResetError as error:
                failures.insert(0, error)
        if after and not failures:
            await send_content(after)
        if not failures and (keep_open or after):
            await transfer.stream.finish()
        transfer.stream.close()
        return {
            "opened": True,
            **_outcome(failures[0] if failures else None),
            "sent": transfer.sent,
            "sent_sha256": sent_digest.hexdigest(),
            "received": transfer.received,
            "received_sha256": transfer.digest.hexdigest(),
            "head": base64.b64encode(transfer.head).decode(),
        }

    async def attach(self, peer: str, protocol: str, *, sent: bytes) -> str:
        """Attach a client that has sent something already, as a proxy does; the code of the refusal, empty for none."""
        with socket.create_server(("127.0.0.1", 0)) as server:
            client = socket.create_connection(server.getsockname())
            accepted, _ = server.accept()
        with client:
            client.sendall(sent)
            accepted.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            try:
                await self.stage.deliver(
                    OpenAttached(PeerId.from_text(peer), (protocol,), Descriptor(accepted.detach()))
                )
            except AskError as error:
                return error.code
        return ""

    async def _progress(self, of: int) -> Answer:
        progress = self._running[of]
        return {"sent": progress.sent, "received": progress.received}

    async def _release(self, protocol: str = "", of: int = 0) -> None:
        (self._services[protocol] if protocol else self._running[of]).gate.set()

    # ---- services: we serve a protocol

    async def _serve(self, protocol: str, behaviour: str, bytes: int = 0, code: int = 0) -> None:  # noqa: A002 - the command's
        self._services[protocol] = Service(behaviour, bytes, code)
        await self._publish_policy()
        await self.stage.deliver(ServeProtocol(protocol), f"service{protocol}")

    async def _served(self, protocol: str) -> Answer:
        service = self._services[protocol]
        return {"opened": service.opened, "finished": list(service.finished)}

    async def _serve_stream(self, message: InboundStream) -> None:
        service = self._services[message.protocol]
        service.opened += 1
        transfer = Transfer(DescriptorStream(message.stream))
        behaviours = {
            "echo": self._echo,
            "sink": self._sink,
            "hold": self._hold,
            "source": self._source,
            "reset": self._reset,
            "silent": self._silent,
        }
        failure: ResetError | None = None
        try:
            await behaviours[service.behaviour](transfer, service)
        except ResetError as error:
            failure = error
        finally:
            transfer.stream.close()
        report = {"received": transfer.received, "sha256": transfer.digest.hexdigest(), "sent": transfer.sent}
        service.finished.append({**report, **_outcome(failure)})

    async def _echo(self, transfer: Transfer, _service: Service) -> None:
        await transfer.receive(on_data=transfer.stream.send)
        await transfer.stream.finish()

    async def _sink(self, transfer: Transfer, _service: Service) -> None:
        await transfer.receive()
        answer = {"received": transfer.received, "sha256": transfer.digest.hexdigest()}
        await transfer.stream.send(json.dumps(answer).encode())
        await transfer.stream.finish()

    async def _hold(self, transfer: Transfer, service: Service) -> None:
        await service.gate.wait()
        await self._sink(transfer, service)

    async def _source(self, transfer: Transfer, _service: Service) -> None:
        line = b""
        while b"\n" not in line:
            data = await transfer.stream.receive()
            if data is None:
                raise ResetError(0)
            line += data
        first, _, rest = line.partition(b"\n")
        size, seed = (int(word) for word in first.split())
        await transfer.stream.send_blocks(blocks(size, seed))
        await transfer.stream.finish()
        transfer.sent, transfer.received = size, len(rest)
        transfer.digest.update(rest)
        await transfer.receive()

    async def _reset(self, transfer: Transfer, service: Service) -> None:
        await transfer.receive(limit=service.bytes)
        await transfer.stream.reset(service.code)

    async def _silent(self, transfer: Transfer, service: Service) -> None:
        await transfer.receive()
        await service.gate.wait()


def _describe(connection: ConnectionInfo) -> Answer:
    return {
        "peer": str(connection.peer),
        "direction": connection.direction,
        "remote": str(connection.remote_address),
        "streams": connection.streams,
    }


def _outcome(error: ResetError | None) -> Answer:
    if error is None:
        return {"reset": False}
    return {"reset": True, "code": error.code, "error": str(error)}


@contextlib.asynccontextmanager
async def our_peer(
    key: PrivateKey, *, listen: str = "/ip4/127.0.0.1/tcp/0", tls: dict[str, str] | None = None
) -> AsyncIterator[OurPeer]:
    """Our peer while the context lasts; `tls` is what the switchboard takes."""
    async with trio.open_nursery() as nursery:
        peer = OurPeer(nursery, key, listen, tls)
        async with lone_actor(
            peer.actor, "switchboard", others=(CONFIG, GATE, "keyring"), answer=peer.answer, audience=peer.audience
        ) as stage:
            peer.stage = stage
            status = await stage.deliver(ReadStatus())
            peer.address = f"{status.listen_addresses[0]}/p2p/{peer.peer_id}"
            yield peer
        nursery.cancel_scope.cancel()
