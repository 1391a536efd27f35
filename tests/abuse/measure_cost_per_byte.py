"""What each kind of frame or message from an authorised peer costs: `python -m tests.abuse.measure_cost_per_byte`.

With `--relay` a relay is measured instead of a node, and what is sent are requests of the circuit protocol.

For each kind a new insider sends as much of it as the node takes within some seconds, or at the rate given. It tells
the CPU seconds of the whole node for each megabyte that was sent, and of its switchboard alone; the round trips of
another peer's stream meanwhile; and whether and when the node ended the connection. A kind that is dear and is not
ended is a way to do harm: see docs/performance.md.

It needs nothing but this checkout, and runs against older ones when copied beside them.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, Self

import trio

from protocol.circuit.messages import HopMessage, HopType
from protocol.circuit.messages import Peer as Destination
from protocol.circuit.messages import encode_message as encode_circuit_message
from protocol.keys import PrivateKey
from protocol.multistream import HEADER, encode_message
from protocol.noise import MAX_PLAINTEXT
from protocol.peer_id import PeerId
from protocol.protocol_ids import CIRCUIT_HOP, CIRCUIT_STOP, IDENTIFY, IDENTIFY_PUSH
from protocol.protocol_ids import PING as PING_PROTOCOL
from protocol.varint import encode_varint
from tests.abuse.attacker import (
    ACK,
    DATA,
    FIN,
    PING,
    RST,
    SYN,
    WINDOW_UPDATE,
    Attacker,
    ClosedError,
    data,
    frame,
    new_key,
)
from tests.abuse.relay_world import RelayWorld
from tests.abuse.world import World
from tests.support.nodes import Node

ECHO = "/peerup/echo/1.0.0"
SINK = "/peerup/sink/1.0.0"
DOWN = "/peerup/down/1.0.0"
CHUNK = 16 * 1024
TICK = 1 / os.sysconf("SC_CLK_TCK")


class Result(NamedTuple):
    """One kind, measured.

    Attributes:
        sent: bytes on the wire; frames: of yamux; seconds: that it took until all was taken, or the end.
        node, switchboard: CPU seconds.
        trips: seconds for each round trip of another peer meanwhile.
        ended: seconds after which the node ended the connection; None if it did not.
        code: the code of its go-away.
    """

    kind: str
    sent: int
    frames: int
    seconds: float
    node: float
    switchboard: float
    trips: list[float]
    ended: float | None
    code: int | None

    def line(self) -> str:
        """As a line of the table."""
        megabytes = self.sent / 1e6
        trips = sorted(self.trips) or [float("nan")]
        ended = "no" if self.ended is None else f"{self.ended:.1f} s, code 0x{self.code or 0:x}"
        return (
            f"| {self.kind} | {self.sent / 1e3:.0f} kB in {self.seconds:.1f} s | {self.node / megabytes:.2f} |"
            f" {self.switchboard / megabytes:.2f} | {self.switchboard / max(1, self.frames) * 1e6:.0f} |"
            f" {trips[len(trips) // 2] * 1e3:.1f} / {trips[-1] * 1e3:.0f} | {ended} |"
        )


TITLE = (
    "| kind | sent | CPU s/MB, node | CPU s/MB, switchboard | µs/frame | others' round trip, p50 / max, ms | ended |\n"
    "| --- | --- | --- | --- | --- | --- | --- |"
)

Kind = Callable[[], Iterator[bytes]]
"""Gives one portion after another, each whole frames; what must come once comes first."""


def streams(make: Callable[[int], bytes]) -> Kind:
    """A portion for each new stream."""

    def portions() -> Iterator[bytes]:
        number = 1
        while True:
            yield make(number)
            number += 2

    return portions


def on_one(first: bytes, portion: bytes) -> Kind:
    """The same again and again, after a beginning."""

    def portions() -> Iterator[bytes]:
        yield first
        while True:
            yield portion

    return portions


def proposal(protocol: str) -> bytes:
    """Header and proposal."""
    return HEADER + encode_message(protocol)


def opening(stream: int, protocol: str, behind: bytes = b"", flags: int = 0) -> bytes:
    """A new stream with header, proposal and what follows."""
    return data(stream, proposal(protocol) + behind, SYN | flags)


def reset(stream: int) -> bytes:
    """The stream is taken back."""
    return frame(WINDOW_UPDATE, RST, stream)


def unknown_protocols(stream: int) -> bytes:
    """32 proposals that nobody speaks, of 160 bytes each."""
    proposals = [data(stream, encode_message(f"/{number:02}/" + "x" * 153)) for number in range(32)]
    return data(stream, HEADER, SYN) + b"".join(proposals) + reset(stream)


def byte_by_byte(stream: int) -> bytes:
    """A negotiation in frames of one byte."""
    text = proposal("/nobody/speaks/this")
    pieces = [data(stream, text[at : at + 1], SYN if not at else 0) for at in range(len(text))]
    return b"".join(pieces) + reset(stream)


def push(stream: int, key: PrivateKey) -> bytes:
    """A push of identify with some addresses and protocols."""
    message = b"\x0a" + bytes([len(key.public_key.to_protobuf())]) + key.public_key.to_protobuf()
    for number in range(40):
        address = b"\x04\x0a\x00\x00" + bytes([number]) + b"\x06\x10\x00"
        message += b"\x12" + bytes([len(address)]) + address
        name = f"/p/{number}".encode()
        message += b"\x1a" + bytes([len(name)]) + name
    return opening(stream, IDENTIFY_PUSH, encode_varint(len(message)) + message, FIN)


def kinds(key: PrivateKey) -> dict[str, Kind]:
    """All kinds, by name; the first is honest bulk, to compare with."""
    return {
        "bulk to a service": on_one(opening(1, SINK), data(1, bytes(CHUNK))),
        "frames of 1,400 bytes to a service": on_one(opening(1, SINK), data(1, bytes(1400))),
        "frames of 100 bytes to a service": on_one(opening(1, SINK), data(1, bytes(100))),
        "frames of 1 byte to a service": on_one(opening(1, SINK), data(1, b"x")),
        "frames of 1 byte, echoed": on_one(opening(1, ECHO), data(1, b"x")),
        "32 unknown protocols a stream": streams(unknown_protocols),
        "32 short unknown protocols a stream": streams(
            lambda n: data(n, HEADER + b"".join(encode_message(f"/{at % 10}") for at in range(32)), SYN | FIN)
        ),
        "1 unknown protocol a stream, finished": streams(lambda n: opening(n, "/unknown", flags=FIN)),
        "32 times ls a stream": streams(
            lambda n: data(n, HEADER + encode_message("ls") * 32, SYN) + reset(n),
        ),
        "negotiation byte by byte": streams(byte_by_byte),
        "garbage for a negotiation": streams(lambda n: data(n, b"GET / HTTP/1.1\r\n\r\n", SYN)),
        "stream opened and reset": streams(lambda n: frame(WINDOW_UPDATE, SYN, n) + reset(n)),
        "stream opened and finished": streams(lambda n: frame(WINDOW_UPDATE, SYN | FIN, n)),
        "stream opened": streams(lambda n: frame(WINDOW_UPDATE, SYN, n)),
        "stream for a relay (not served)": streams(lambda n: opening(n, CIRCUIT_HOP) + reset(n)),
        "stream from a relay (not one)": streams(lambda n: opening(n, CIRCUIT_STOP) + reset(n)),
        "service opened and reset": streams(lambda n: opening(n, ECHO) + reset(n)),
        "service opened and finished": streams(lambda n: opening(n, ECHO, flags=FIN)),
        "service opened, used, finished": streams(lambda n: opening(n, ECHO, b"x" * 500, FIN)),
        "service that is down": streams(lambda n: opening(n, DOWN)),
        "identify asked": streams(lambda n: opening(n, IDENTIFY, flags=FIN)),
        "identify pushed": streams(lambda n: push(n, key)),
        "ping stream, used once": streams(lambda n: opening(n, PING_PROTOCOL, bytes(32), FIN)),
        "pings of 32 bytes": on_one(opening(1, PING_PROTOCOL), data(1, bytes(32))),
        "yamux ping": on_one(b"", frame(PING, SYN, 0, 7)),
        "yamux pong": on_one(b"", frame(PING, ACK, 0, 7)),
        "empty data": on_one(opening(1, SINK), frame(DATA, 0, 1)),
        "window update of 1": on_one(opening(1, SINK), frame(WINDOW_UPDATE, 0, 1, 1)),
        "window update of 512": on_one(opening(1, SINK), frame(WINDOW_UPDATE, 0, 1, 512)),
        "window update for a stream of the past": on_one(opening(1, SINK) + reset(1), frame(WINDOW_UPDATE, 0, 1, 512)),
        "1 byte for a stream of the past": on_one(opening(1, SINK) + reset(1), data(1, b"x")),
        "1 byte for a stream that never was": on_one(b"", data(9, b"x")),
        "unknown flags": on_one(opening(1, SINK), frame(DATA, 0x100, 1, 1, b"x")),
        "1 byte a Noise message": on_one(opening(1, SINK), data(1, b"x")),
        "empty Noise messages": on_one(opening(1, SINK), b""),
        "1 byte a TCP segment": on_one(opening(1, SINK), data(1, b"x")),
        "1 byte a TCP segment, long messages": on_one(opening(1, SINK), data(1, bytes(60_000))),
    }


RESERVE = encode_circuit_message(HopMessage(HopType.RESERVE))


def connect(peer: PeerId) -> bytes:
    """A request for a circuit to this peer."""
    return encode_circuit_message(HopMessage(HopType.CONNECT, peer=Destination(peer)))


def piecemeal(stream: int, message: bytes) -> bytes:
    """A request in frames of one byte."""
    pieces = [data(stream, message[at : at + 1]) for at in range(len(message))]
    return opening(stream, CIRCUIT_HOP) + b"".join(pieces)


def relay_kinds(served: PeerId) -> dict[str, Kind]:
    """What may be asked of a relay; `served` has a reservation there and does not want to be called by the attacker."""
    nobody = new_key().peer_id
    return {
        "reservation asked": streams(lambda n: opening(n, CIRCUIT_HOP, RESERVE, FIN)),
        "reservation asked, stream kept": streams(lambda n: opening(n, CIRCUIT_HOP, RESERVE)),
        "reservation asked and taken back": streams(lambda n: opening(n, CIRCUIT_HOP, RESERVE) + reset(n)),
        "circuit to nobody": streams(lambda n: opening(n, CIRCUIT_HOP, connect(nobody), FIN)),
        "circuit to a peer": streams(lambda n: opening(n, CIRCUIT_HOP, connect(served))),
        "circuit to a peer, taken back": streams(lambda n: opening(n, CIRCUIT_HOP, connect(served)) + reset(n)),
        "circuit to nobody, byte by byte": streams(lambda n: piecemeal(n, connect(nobody))),
        "no request": streams(lambda n: opening(n, CIRCUIT_HOP)),
        "garbage for a request": streams(lambda n: opening(n, CIRCUIT_HOP, b"GET / HTTP/1.1\r\n\r\n", FIN)),
        "oversized request": streams(lambda n: opening(n, CIRCUIT_HOP, encode_varint(1 << 20) + bytes(400), FIN)),
    }


OWN_MESSAGE = {"1 byte a Noise message"}
SEGMENTS = {"1 byte a TCP segment", "1 byte a TCP segment, long messages"}
EMPTY = {"empty Noise messages"}


def cpu(pids: list[int]) -> float:
    """CPU seconds that these processes have used."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            total += int(fields[11]) + int(fields[12])
    return total * TICK


def actors_of(node: Node) -> list[int]:
    """All processes of a node's tree."""
    return sorted({actor["pid"] for actor in node.actors() if actor["pid"]})


class Prober:
    """Round trips of one byte on one connection through the tunnel, all the time, in a thread."""

    def __init__(self, port: int) -> None:
        self.trips: list[float] = []
        self._stopping = threading.Event()
        self._socket = socket.create_connection(("127.0.0.1", port), 10)
        self._socket.settimeout(30)
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join(40)
        self._socket.close()

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            while not self._stopping.wait(0.02):
                began = time.monotonic()
                self._socket.sendall(b"?")
                if not self._socket.recv(1):
                    return
                self.trips.append(time.monotonic() - began)


class Sender:
    """Sends one kind over one connection, and reads what comes back."""

    def __init__(self, kind: str, attacker: Attacker, *, seconds: float, rate: float) -> None:
        self.kind = kind
        self.sent = self.frames = 0
        self.ended: float | None = None
        self.code: int | None = None
        self._attacker = attacker
        self._seconds = seconds
        self._rate = rate
        self._granted = 0
        self._window = 256 * 1024
        self._answered = trio.Event()
        self._whole = trio.Lock()  # a message is not cut by another task's

    async def run(self, portions: Iterator[bytes]) -> None:
        """Send for so many seconds, or until the node ends it; then wait until it has taken all."""
        async with trio.open_nursery() as nursery:
            began = trio.current_time()
            nursery.start_soon(self._read, began, nursery.cancel_scope)
            with contextlib.suppress(ClosedError):
                await self._send(portions, began)
                await self._say(frame(PING, SYN, 0, 0xABCD))
                with trio.move_on_after(30):
                    await self._answered.wait()
            if not self._answered.is_set():
                await trio.sleep(5)  # for the reader to see the end, which cancels this
            nursery.cancel_scope.cancel()

    async def _send(self, portions: Iterator[bytes], began: float) -> None:
        attacker = self._attacker
        while (now := trio.current_time()) - began < self._seconds:
            if self._rate and self.sent > self._rate * (now - began):
                await trio.sleep(0.005)
                continue
            async with self._whole:
                for wire in self._batch(portions):
                    await attacker.send(wire)
                    self.sent += len(wire)
            if self._granted - self._window > 0:
                await trio.sleep(0.002)
            await trio.lowlevel.checkpoint()

    async def _say(self, answer: bytes) -> None:
        async with self._whole:
            await self._attacker.say(answer)

    def _batch(self, portions: Iterator[bytes]) -> Iterator[bytes]:
        """About a full message, or as many small ones as the kind asks for."""
        attacker = self._attacker
        if self.kind in EMPTY:
            first = next(portions)
            yield attacker.seal(first) if first else b"".join(attacker.seal_empty() for _ in range(500))
            self.frames += 500
            return
        if self.kind in SEGMENTS:
            wire = attacker.seal(next(portions))
            self.frames += 1
            for at in range(len(wire)):
                yield wire[at : at + 1]
            return
        if self.kind in OWN_MESSAGE:
            self.frames += 500
            yield b"".join(attacker.seal(next(portions)) for _ in range(500))
            return
        batch = b""
        while len(batch) < (CHUNK if self._rate else MAX_PLAINTEXT) - 6000:
            piece = next(portions)
            self._count(piece)
            batch += piece
        yield attacker.seal(batch)

    def _count(self, piece: bytes) -> None:
        at = 0
        while at < len(piece):
            self.frames += 1
            length = int.from_bytes(piece[at + 8 : at + 12], "big") if piece[at + 1] == DATA else 0
            if int.from_bytes(piece[at + 4 : at + 8], "big") == 1 and piece[at + 1] == DATA:
                self._granted += length
            at += 12 + length

    async def _read(self, began: float, scope: trio.CancelScope) -> None:
        attacker = self._attacker
        try:
            while True:
                heard = await attacker.hear()
                if heard.kind == PING and heard.flags & ACK and heard.length == 0xABCD:
                    self._answered.set()
                elif heard.kind == PING and heard.flags & SYN:
                    await self._say(frame(PING, ACK, 0, heard.length))
                elif heard.kind == WINDOW_UPDATE and heard.stream == 1:
                    self._window += heard.length
                elif heard.kind == DATA and heard.stream == 1 and heard.length:
                    await self._say(frame(WINDOW_UPDATE, 0, 1, heard.length))
                elif heard.kind == 3:
                    self.code = heard.length
        except ClosedError:
            self.ended = trio.current_time() - began
            scope.cancel()


async def measure(
    world: World | RelayWorld, key: PrivateKey, kind: str, make: Kind, *, seconds: float, rate: float
) -> Result:
    """One kind, from a new connection."""
    attacked = world.relay if isinstance(world, RelayWorld) else world.home
    pids, switchboard = actors_of(attacked), world.switchboard()
    async with Attacker.connect(world.port, key, source="127.0.0.9") as attacker:
        await attacker.secure()
        attacker.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sender = Sender(kind, attacker, seconds=seconds, rate=rate)
        with Prober(world.tunnel) as prober:
            await trio.sleep(0.3)
            prober.trips.clear()
            before, before_here, began = cpu(pids), cpu([switchboard]), time.monotonic()
            await sender.run(make())
            took = time.monotonic() - began
            after, after_here = cpu(pids), cpu([switchboard])
    return Result(
        kind, max(1, sender.sent), sender.frames, took, after - before, after_here - before_here,
        prober.trips, sender.ended, sender.code,
    )  # fmt: skip


def sink(stack: contextlib.ExitStack) -> int:
    """A service that reads and answers nothing. Its port."""
    listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=128))

    def read(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            while connection.recv(65536):
                pass

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                threading.Thread(target=read, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    return int(listener.getsockname()[1])


def node(directory: Path, stack: contextlib.ExitStack) -> tuple[World, Callable[[PrivateKey], dict[str, Kind]]]:
    """A node with services, and what can be sent to it."""
    world = World(directory, stack, log_level="warning")
    down = socket.create_server(("127.0.0.1", 0))
    world.home.run("service", "add", "sink", f"127.0.0.1:{sink(stack)}")
    world.home.run("service", "add", "down", f"127.0.0.1:{down.getsockname()[1]}")
    down.close()
    return world, kinds


def relay(directory: Path, stack: contextlib.ExitStack) -> tuple[RelayWorld, Callable[[PrivateKey], dict[str, Kind]]]:
    """A relay, and what can be asked of it."""
    world = RelayWorld(directory, stack, log_level="warning")
    return world, lambda _: relay_kinds(PeerId.from_text(world.home.peer_id))


def main() -> None:
    parser = argparse.ArgumentParser(description="CPU for each byte of what an authorised peer may send")
    parser.add_argument("--seconds", type=float, default=4.0, help="seconds of each kind, at most")
    parser.add_argument("--rate", type=float, default=0.0, help="bytes a second; as many as are taken if not given")
    parser.add_argument("--relay", action="store_true", help="what may be asked of a relay")
    parser.add_argument("--json", type=Path, help="write the results to this file, too")
    parser.add_argument("kind", nargs="*", help="kinds whose names contain one of these; all if none is given")
    chosen = parser.parse_args()
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        world, make = relay(directory, stack) if chosen.relay else node(directory, stack)
        print(TITLE, flush=True)
        results = []
        for kind in make(new_key()):
            if chosen.kind and not any(part in kind for part in chosen.kind):
                continue
            key = world.another_insider()  # so that no debt of another kind's is left
            measured = functools.partial(measure, seconds=chosen.seconds, rate=chosen.rate)
            result = trio.run(measured, world, key, kind, make(key)[kind])
            results.append(result)
            print(result.line(), flush=True)
        if chosen.json:
            chosen.json.write_text(json.dumps([result._asdict() for result in results]))


if __name__ == "__main__":
    main()
