"""Clients of a relay that send whatever frames come to their minds, in any order, on streams that mean something.

Nothing that they do may end more than their own connection: no error may reach the reactor, nothing may be left behind.
"""

from __future__ import annotations

import contextlib
import random
import select
import time

import pytest
import trio
import trio.lowlevel

from actors.switchboard.connections import Connection
from actors.switchboard.link import Link
from actors.switchboard.wire import SocketWire, Way
from protocol.circuit.messages import HopMessage, HopType, Peer, Status, StopMessage, StopType, encode_message
from protocol.multiaddr import Multiaddr
from protocol.multistream import HEADER
from protocol.multistream import encode_message as proposal
from protocol.noise_cipher import CipherState
from protocol.protocol_ids import CIRCUIT_HOP, CIRCUIT_STOP, IDENTIFY, PING
from protocol.yamux import ACK, DATA, FIN, GO_AWAY, RST, SYN, WINDOW_UPDATE, Role
from protocol.yamux import PING as PING_FRAME
from tests.abuse.attacker import frame
from tests.actors.dataplane import no_leaks, tcp_pair, until
from tests.actors.switchboard.relay_world import ANNOUNCED, RelayWorld, key_of, relaying, rules, scoped

NAMES = ("anna", "bert", "cleo")
STEPS = 60
LIMITED = rules(
    reservations=scoped(peer=1, total=5),
    circuits=scoped(peer=20, total=30),
    bytes_per_second=scoped(peer=1_000_000),
)


class Wild:
    """A client that sends frames as it likes, and reads what comes only to know of the streams opened to it."""

    def __init__(self, world: RelayWorld, name: str, randomness: random.Random) -> None:
        self.random = randomness
        self.id = key_of(name).peer_id
        world._names[self.id] = name
        self.socket, near = tcp_pair()
        self._send, self._receive = CipherState(bytes([1]) * 32), CipherState(bytes([2]) * 32)
        self._ciphertext = self._plain = b""
        self.offered: list[int] = []
        self.own: list[int] = []
        self._next = 1
        via = Way("direct", "tcp", ANNOUNCED, Multiaddr("/ip4/192.0.2.1/tcp/1234"))
        connection = self.connection = Connection(
            id=name, peer=self.id, outbound=False, via=via, opened=time.monotonic(), opened_at=0.0
        )

        def ended(end: object) -> None:
            world.table.remove(connection, end)
            world.room.connection_ended(connection)

        connection.link = Link(
            world.reactor,
            SocketWire(world.reactor, near),
            role=Role.SERVER,
            send_cipher=CipherState(bytes([2]) * 32),
            receive_cipher=CipherState(bytes([1]) * 32),
            received=b"",
            on_stream=lambda channel: world.inbound.accept(connection, channel),
            on_end=ended,
        )
        world.table.add(connection, time.monotonic())

    def close(self) -> None:
        self.socket.close()

    def say(self, *frames: bytes) -> None:
        """Send frames, in one Noise message; what the relay does not take is lost, and the connection with it."""
        sealed = self._send.encrypt(b"".join(frames)[:60_000])
        with contextlib.suppress(OSError):
            self.socket.send(len(sealed).to_bytes(2, "big") + sealed)

    def hear(self) -> None:
        """Take in what has come."""
        while select.select([self.socket], [], [], 0)[0]:
            try:
                came = self.socket.recv(1 << 16)
            except OSError:
                return
            if not came:
                return
            self._ciphertext += came
        while len(self._ciphertext) >= 2:
            end = 2 + int.from_bytes(self._ciphertext[:2], "big")
            if len(self._ciphertext) < end:
                break
            self._plain += self._receive.decrypt(self._ciphertext[2:end])
            self._ciphertext = self._ciphertext[end:]
        while len(self._plain) >= 12:
            kind, flags = self._plain[1], int.from_bytes(self._plain[2:4], "big")
            stream, length = int.from_bytes(self._plain[4:8], "big"), int.from_bytes(self._plain[8:12], "big")
            size = 12 + (length if kind == DATA else 0)
            if len(self._plain) < size:
                break
            self._plain = self._plain[size:]
            if stream and flags & SYN:
                self.offered.append(stream)

    # ---- what it may do

    def reserve(self) -> None:
        """What an honest client does first."""
        self.say(
            self._data(self._next, HEADER + proposal(CIRCUIT_HOP) + encode_message(HopMessage(HopType.RESERVE)), SYN)
        )
        self._next += 2

    def step(self, others: list[Wild]) -> None:
        """One thing more or less at random."""
        choose = self.random
        acts = [self._open, self._open, self._answer, self._answer, self._go_on, self._end, self._oddity]
        self.say(*(piece for _ in range(choose.randrange(1, 4)) for piece in choose.choice(acts)(others)))

    def _content(self, others: list[Wild]) -> bytes:
        choose = self.random
        peer = Peer(choose.choice(others).id)
        content = choose.choice(
            [
                encode_message(HopMessage(HopType.RESERVE)),
                encode_message(HopMessage(HopType.CONNECT, peer=peer)),
                encode_message(HopMessage(HopType.CONNECT, peer=peer))
                + choose.randbytes(choose.choice([1, 200, 17_000])),
                encode_message(HopMessage(HopType.STATUS, status=Status.OK)),
                encode_message(StopMessage(StopType.CONNECT, peer=peer)),
                choose.randbytes(40),
                b"",
            ]
        )
        cut = choose.randrange(len(content) + 1)
        return content if choose.random() < 0.8 else content[:cut]

    def _data(self, stream: int, content: bytes, flags: int = 0) -> bytes:
        return frame(DATA, flags, stream, len(content), content)

    def _open(self, others: list[Wild]) -> list[bytes]:
        stream, self._next = self._next, self._next + 2
        self.own.append(stream)
        protocol = self.random.choice([CIRCUIT_HOP] * 6 + [IDENTIFY, PING, CIRCUIT_STOP])
        flags = SYN | (RST if self.random.random() < 0.03 else 0)
        content = HEADER + proposal(protocol) + self._content(others)
        if self.random.random() < 0.5:
            return [self._data(stream, content, flags)]
        cut = self.random.randrange(len(content))
        return [self._data(stream, content[:cut], flags), self._data(stream, content[cut:])]

    def _answer(self, others: list[Wild]) -> list[bytes]:
        """Say to a stream of the relay's what a target says, or something like it."""
        self.hear()
        if not self.offered:
            return []
        stream = self.random.choice(self.offered[-3:])
        status = self.random.choice([Status.OK] * 9 + [Status.PERMISSION_DENIED])
        content = HEADER + proposal(CIRCUIT_STOP) + encode_message(StopMessage(StopType.STATUS, status=status))
        content += self.random.randbytes(self.random.choice([0, 0, 10, 3000]))
        if self.random.random() < 0.1:
            content = content[: self.random.randrange(len(content))]
        if self.random.random() < 0.1:
            self._forget(stream)
            return [self._data(stream, content, ACK | FIN)]
        flags = ACK if self.random.random() < 0.8 else 0
        return [self._data(stream, content, flags)]

    def _any_stream(self) -> int:
        known = self.own[-6:] + self.offered[-6:]
        return self.random.choice(known) if known and self.random.random() < 0.998 else self.random.randrange(1 << 32)

    def _go_on(self, others: list[Wild]) -> list[bytes]:
        stream = self._any_stream()
        if self.random.random() < 0.5:
            return [self._data(stream, self.random.randbytes(self.random.choice([0, 1, 500, 20_000])))]
        return [frame(WINDOW_UPDATE, 0, stream, self.random.choice([0, 1, 70_000]))]

    def _end(self, others: list[Wild]) -> list[bytes]:
        kind, stream = self.random.choice([DATA, WINDOW_UPDATE]), self._any_stream()
        self._forget(stream)
        return [frame(kind, self.random.choice([FIN, FIN, RST, FIN | RST]), stream, 0)]

    def _forget(self, stream: int) -> None:
        """Say nothing more on a stream, for that would end the connection; mostly."""
        for known in (self.own, self.offered):
            if stream in known and self.random.random() < 0.98:
                known.remove(stream)

    def _oddity(self, others: list[Wild]) -> list[bytes]:
        choose = self.random
        odd = [
            frame(PING_FRAME, SYN, 0, choose.randrange(1 << 32)),
            frame(PING_FRAME, ACK, 0, choose.randrange(1 << 32)),
            frame(WINDOW_UPDATE, ACK, self._any_stream(), 0),
        ]
        rare = [
            frame(GO_AWAY, 0, 0, choose.choice([0, 1, 2, 77])),
            frame(WINDOW_UPDATE, 0, self._any_stream(), (1 << 32) - 1),
            frame(DATA, SYN, self._any_stream(), 0),
            frame(DATA, 0xFFFF, self._any_stream(), 0),
            choose.randbytes(12),
        ]
        return [choose.choice(rare if choose.random() < 0.05 else odd)]


async def storm(seed: int) -> None:
    """One run of three such clients at one relay."""
    randomness = random.Random(seed)
    async with relaying(randomness.choice([LIMITED, rules()])) as world:
        wild = [Wild(world, name, randomness) for name in NAMES]
        for one in wild:
            one.reserve()
        await until(lambda: world.room.status().reservations == len(wild), "their reservations")
        for _ in range(STEPS):
            randomness.choice(wild).step(wild)
            if randomness.random() < 0.3:
                await trio.lowlevel.checkpoint()
            if randomness.random() < 0.05:
                await trio.sleep(0.002)
            if randomness.random() < 0.02:
                world.denied ^= {randomness.choice(NAMES)}
                world.room.policy_changed()
        await trio.sleep(0.01)
        witness = world.connect("witness", ip="203.0.113.77")
        assert (await witness.reserve()).state == "granted", "nobody else is harmed"
        for one in wild:
            one.close()
        await until(lambda: len(world.table) == 1, "the end of their connections")
        await until(lambda: world.exchanges == 0, "the end of all exchanges")
        told = world.room.status()
        assert (told.circuits, told.reservations, told.open) == (0, 1, ())
        assert world.room.describe()["windows_grown_by"] == 0
        assert world.inbound.negotiating == 0


@pytest.mark.parametrize("seed", range(12))
async def test_no_storm_of_frames_harms_anybody_else(seed: int) -> None:
    async with no_leaks():
        for number in range(4):
            await storm(1000 * seed + number)


LAST_WORDS = {
    "go away": frame(GO_AWAY, 0, 0, 1),
    "nonsense": frame(7, 0, 0, 0),
    "a ping": frame(PING_FRAME, SYN, 0, 1),
}
AFTERWARDS = {
    "a stream taken back": frame(DATA, SYN | RST, 1, 0),
    "a stream taken back by a window": frame(WINDOW_UPDATE, SYN | RST, 1, 7),
    "a stream with data": frame(DATA, SYN, 1, 5, b"hello"),
    "a finished stream with data": frame(DATA, SYN | FIN, 1, 5, b"hello"),
    "a stream with a window": frame(WINDOW_UPDATE, SYN, 1, 1000),
    "a stream, then its end": frame(DATA, SYN, 1, 0) + frame(DATA, RST, 1, 0),
    "a stream, then its window": frame(DATA, SYN, 1, 0) + frame(WINDOW_UPDATE, 0, 1, 9),
}


@pytest.mark.parametrize("after", AFTERWARDS)
@pytest.mark.parametrize("last", LAST_WORDS)
async def test_what_follows_the_last_word_in_the_same_message_is_not_heard(last: str, after: str) -> None:
    async with no_leaks(), relaying() as world:
        one = Wild(world, "anna", random.Random(1))
        one.say(LAST_WORDS[last], AFTERWARDS[after])
        witness = world.connect("witness", ip="203.0.113.77")
        assert (await witness.reserve()).state == "granted"
        one.close()
        await until(lambda: len(world.table) == 1, "the end of the connection")
