"""Many clients of one relay in one process: reservations, then circuits on which questions are answered.

    python -m bench.relay_crowd ADDRESS RELAY_PEER_ID CLIENTS CIRCUITS SECONDS

The clients are real ones up to the circuit: TCP, Noise and yamux to the relay, hop and stop. Inside of a circuit raw
bytes go to and fro, so that the work is the relay's. Each stage ends with a line of JSON, and the next one begins with
a line on standard input: connected, reserved, opened, done.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

import trio
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from actors.reactor import Reactor
from actors.switchboard.channel import Channel
from actors.switchboard.link import Link
from actors.switchboard.upgrade import Upgrader
from actors.switchboard.wire import SocketPipe
from protocol import multistream
from protocol.circuit.hop_client import ConnectClient, ReserveClient
from protocol.circuit.stop import StopResponder
from protocol.errors import PeerupError
from protocol.keys import PrivateKey
from protocol.multiaddr import Multiaddr
from protocol.noise import SIGNATURE_PREFIX, Identity
from protocol.peer_id import PeerId
from protocol.protocol_ids import CIRCUIT_HOP, CIRCUIT_STOP

QUESTION = bytes(4096)
CONNECTING = 16
"""Handshakes at a time: a crowd that comes back after an outage, not an attack."""
SOURCES = 40
"""IP addresses that the clients come from."""


def client_key(number: int) -> PrivateKey:
    """The identity of one client, the same in each run."""
    return PrivateKey.from_seed(hashlib.sha256(f"relay crowd {number}".encode()).digest())


class Client:
    """One client: a connection to the relay, and what came of its reservation and circuits."""

    def __init__(self, number: int, relay: PeerId, reactor: Reactor) -> None:
        self.number = number
        self.key = client_key(number)
        self.id = self.key.peer_id
        self.reserved = False
        self.lost = ""
        self._relay = relay
        self._reactor = reactor

    async def connect(self, host: str, port: int) -> None:
        """TCP, Noise, yamux."""
        static = X25519PrivateKey.generate()
        proof = self.key.sign(SIGNATURE_PREFIX + static.public_key().public_bytes_raw())
        upgrader = Upgrader(static, Identity(self.key.public_key.to_protobuf(), proof))
        sock = socket.socket()
        sock.setblocking(False)
        sock.bind((f"127.0.1.{1 + self.number % SOURCES}", 0))
        asynchronous = trio.socket.from_stdlib_socket(sock)
        await asynchronous.connect((host, port))
        pipe = SocketPipe(socket.socket(fileno=asynchronous.detach()))
        upgraded = await upgrader.outbound(pipe, self._relay)
        self.link = Link(
            self._reactor,
            pipe.detach(self._reactor),
            role=upgraded.role,
            send_cipher=upgraded.send,
            receive_cipher=upgraded.receive,
            received=upgraded.received,
            plaintext=upgraded.plaintext,
            on_stream=self._offered,
            on_end=lambda end: setattr(self, "lost", end.reason),
        )

    def reserve(self, done: Callable[[], None]) -> None:
        """RESERVE; `done` is called whatever comes of it."""
        machine = ReserveClient(self._relay, self.id)

        def answered() -> None:
            self.reserved = machine.state == "granted"
            done()

        self._ask(machine, lambda _: answered(), answered)

    def open(self, target: Client, ready: Callable[[Channel | None], None]) -> None:
        """CONNECT; `ready` gets the circuit, or None."""
        self._ask(ConnectClient(target.id), ready, lambda: ready(None))

    def _ask(
        self,
        machine: ReserveClient | ConnectClient,
        answered: Callable[[Channel], None],
        failed: Callable[[], None],
    ) -> None:
        channel = self.link.open_stream()
        negotiation = multistream.Initiator((CIRCUIT_HOP,))

        def on_data(data: bytes) -> None:
            if negotiation.result is None:
                negotiation.receive_data(data)
                data = negotiation.leftover
            machine.receive_data(data)
            if machine.state in {"granted", "open"}:
                channel.on_data, channel.on_reset = _ignore, _ignore
                answered(channel)
            elif machine.state != "waiting":
                channel.on_reset = _ignore
                failed()

        channel.on_data = on_data
        channel.on_reset = lambda _: failed()
        channel.send(negotiation.data_to_send() + machine.data_to_send())

    def _offered(self, channel: Channel) -> None:
        negotiation, machine = multistream.Responder((CIRCUIT_STOP,)), StopResponder()

        def on_data(data: bytes) -> None:
            try:
                if negotiation.result is None:
                    negotiation.receive_data(data)
                    if reply := negotiation.data_to_send():
                        channel.send(reply)
                    data = negotiation.leftover
            except PeerupError:
                channel.reset(0)
                return
            machine.receive_data(data)
            if machine.state == "deciding":
                machine.accept()
                channel.send(machine.data_to_send())
                channel.on_data = channel.send  # the answer to a question is the same again

        channel.on_data = on_data


class Asking:
    """One circuit, on which the next question follows each answer.

    Attributes:
        rounds: questions answered.
        worst: seconds of the slowest answer.
        broken: the circuit ended.
    """

    def __init__(self, channel: Channel) -> None:
        self.rounds = 0
        self.worst = 0.0
        self.broken = False
        self.stopped = False
        self._channel = channel
        self._missing = 0
        self._asked = 0.0
        channel.on_data = self._on_data
        channel.on_reset = self._on_end
        channel.on_finish = lambda: self._on_end(0)

    def ask(self) -> None:
        """Send a question."""
        self._missing = len(QUESTION)
        self._asked = time.monotonic()
        self._channel.send(QUESTION)

    def _on_data(self, data: bytes) -> None:
        self._missing -= len(data)
        if not self._missing:
            self.rounds += 1
            self.worst = max(self.worst, time.monotonic() - self._asked)
            if not self.stopped:
                self.ask()

    def _on_end(self, code: int) -> None:
        self.broken = True


def _ignore(_: object) -> None:
    pass


async def run(address: Multiaddr, relay: PeerId, count: int, circuits: int, seconds: float) -> None:
    """All stages."""
    endpoint = address.endpoint
    assert endpoint is not None
    reactor = Reactor(time.monotonic)
    clients = [Client(number, relay, reactor) for number in range(count)]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(reactor.run)
        limit = trio.CapacityLimiter(CONNECTING)

        async def connect(client: Client) -> None:
            async with limit:
                await client.connect(endpoint.host, endpoint.port)

        async with trio.open_nursery() as connecting:
            for client in clients:
                connecting.start_soon(connect, client)
        await stage("connected", clients=count)
        await each(clients, lambda client, done: client.reserve(done))
        await stage("reserved", granted=sum(client.reserved for client in clients))
        opened: list[Channel | None] = []
        pairs = list(zip(clients[:circuits], clients[circuits:], strict=False))

        def open_one(pair: tuple[Client, Client], done: Callable[[], None]) -> None:
            def ready(channel: Channel | None) -> None:
                opened.append(channel)
                done()

            pair[0].open(pair[1], ready)

        await each(pairs, open_one)
        asking = [Asking(channel) for channel in opened if channel is not None]
        await stage("opened", circuits=len(asking))
        for one in asking:
            one.ask()
        began = time.monotonic()
        await trio.sleep(seconds)
        elapsed = time.monotonic() - began
        rounds = [one.rounds for one in asking]
        for one in asking:
            one.stopped = True
        await trio.sleep(0.5)
        broken = sum(one.broken for one in asking) + circuits - len(asking)
        lost = sum(bool(client.lost) for client in clients)
        await stage(
            "done", rounds=rounds, seconds=elapsed, broken=broken, lost=lost, worst=max(one.worst for one in asking)
        )
        nursery.cancel_scope.cancel()


async def each(items: list[Any], begin: Callable[[Any, Callable[[], None]], None]) -> None:
    """Begin something with each item; return when all is done, or after a minute."""
    left = len(items)
    over = trio.Event()

    def done() -> None:
        nonlocal left
        left -= 1
        if not left:
            over.set()

    for item in items:
        begin(item, done)
        await trio.lowlevel.checkpoint()
    with trio.move_on_after(60):
        await over.wait()


async def stage(name: str, **values: object) -> None:
    """Tell what was reached, and wait to be told to go on."""
    print(json.dumps({"stage": name, **values}), flush=True)
    await trio.to_thread.run_sync(sys.stdin.readline)


if __name__ == "__main__":
    if hasattr(os, "sched_setaffinity") and len(os.sched_getaffinity(0)) > 1:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[1:])  # the first one is the relay's
    trio.run(
        run,
        Multiaddr(sys.argv[1]),
        PeerId.from_text(sys.argv[2]),
        int(sys.argv[3]),
        int(sys.argv[4]),
        float(sys.argv[5]),
    )
