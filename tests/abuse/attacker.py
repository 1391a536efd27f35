"""A peer of our own that keeps no rule unless told to: TCP, multistream, Noise and yamux frames by hand.

It is built on `protocol/` alone, so it knows how to be right, and each step can be left out, cut, repeated or altered.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import AsyncIterator, Iterator

import trio
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from protocol import noise
from protocol.keys import PrivateKey
from protocol.multistream import HEADER, encode_message
from protocol.noise import NoiseHandshake, NoiseResult
from protocol.yamux import ACK, DATA, FIN, GO_AWAY, PING, RST, SYN, WINDOW_UPDATE

__all__ = ["ACK", "DATA", "FIN", "GO_AWAY", "PING", "RST", "SYN", "WINDOW_UPDATE", "Attacker", "ClosedError", "Frame"]

NOISE = encode_message("/noise")
YAMUX = encode_message("/yamux/1.0.0")
_YAMUX_HEADER = struct.Struct(">BBHII")


class ClosedError(Exception):
    """The node has closed the connection."""


class Frame:
    """One yamux frame that the node sent."""

    def __init__(self, kind: int, flags: int, stream: int, length: int, body: bytes) -> None:
        self.kind, self.flags, self.stream, self.length, self.body = kind, flags, stream, length, body

    def __repr__(self) -> str:
        return f"<{self.kind} flags={self.flags} stream={self.stream} length={self.length} {self.body[:40]!r}>"


def new_key() -> PrivateKey:
    """An identity that nobody has heard of."""
    return PrivateKey.from_seed(os.urandom(32))


def frame(kind: int, flags: int, stream: int, length: int = 0, body: bytes = b"", *, version: int = 0) -> bytes:
    """A yamux frame; the length is what you say, not what the body has."""
    return _YAMUX_HEADER.pack(version, kind, flags, stream, length) + body


def data(stream: int, body: bytes, flags: int = 0) -> bytes:
    """An honest data frame."""
    return frame(DATA, flags, stream, len(body), body)


class Attacker:
    """One TCP connection to a node. `key` is the identity that it will prove, if it comes to that."""

    def __init__(self, sock: trio.socket.SocketType, key: PrivateKey) -> None:
        self.key = key
        self.static = X25519PrivateKey.generate()
        self.socket = sock
        self.result: NoiseResult | None = None
        self._ciphertext = b""
        self._plain = b""

    @classmethod
    @contextlib.asynccontextmanager
    async def connect(
        cls, port: int, key: PrivateKey | None = None, *, source: str = "127.0.0.2"
    ) -> AsyncIterator[Attacker]:
        """Connected from this loopback address."""
        with trio.socket.socket() as sock:
            await sock.bind((source, 0))
            # A node that hangs up at once may have done so before connecting returns: then all that follows finds the
            # connection closed, as it does a moment later.
            with contextlib.suppress(ConnectionResetError):
                await sock.connect(("127.0.0.1", port))
            yield cls(sock, key or new_key())

    # ---- raw

    async def send(self, content: bytes) -> None:
        """Send all of it.

        Raises:
            ClosedError: the node has closed the connection.
        """
        view = memoryview(content)
        try:
            while view:
                view = view[await self.socket.send(view) :]
        except OSError as error:
            raise ClosedError from error

    async def receive(self) -> bytes:
        """What the node sends next; empty when it has closed."""
        try:
            return await self.socket.recv(65536)
        except OSError:
            return b""

    async def more(self) -> bytes:
        """What the node sends next.

        Raises:
            ClosedError: the node has closed the connection.
        """
        part = await self.receive()
        if not part:
            raise ClosedError
        return part

    async def until_closed(self, seconds: float) -> bytes:
        """All that the node still says before it closes; it must do so in time."""
        said = b""
        with trio.fail_after(seconds):
            while part := await self.receive():
                said += part
        return said

    # ---- the handshake

    def identity(self) -> noise.Identity:
        """The proof that this key stands behind this connection's Noise key."""
        static = self.static.public_key().public_bytes_raw()
        return noise.Identity(self.key.public_key.to_protobuf(), self.key.sign(noise.SIGNATURE_PREFIX + static))

    def handshake(self, *, identity: noise.Identity | None = None, early_muxer: bool = True) -> NoiseHandshake:
        """The state machine of an honest initiator, but for what is given."""
        return NoiseHandshake(
            initiator=True,
            static_key=self.static,
            identity=identity or self.identity(),
            muxers=("/yamux/1.0.0",) if early_muxer else (),
        )

    async def secure(self, *, identity: noise.Identity | None = None, early_muxer: bool = True) -> NoiseResult:
        """Go through the whole handshake; the last message has been sent then.

        Raises:
            ClosedError: the node has closed the connection.
        """
        handshake = self.handshake(identity=identity, early_muxer=early_muxer)
        await self.send(HEADER + NOISE + handshake.data_to_send())
        answer, received = HEADER + NOISE, b""
        while len(received) < len(answer):
            received += await self.more()
        assert received.startswith(answer)
        if rest := received[len(answer) :]:
            handshake.receive_data(rest)
        while handshake.result is None:
            handshake.receive_data(await self.more())
        await self.send(handshake.data_to_send())
        self.result = handshake.result
        self._ciphertext = handshake.result.unread
        return handshake.result

    async def secured_by_caller(self) -> NoiseResult:
        """The other role: somebody has called us, and gets our proof."""
        handshake = NoiseHandshake(
            initiator=False, static_key=self.static, identity=self.identity(), muxers=("/yamux/1.0.0",)
        )
        received = b""
        while len(received) < len(HEADER + NOISE):
            received += await self.more()
        assert received.startswith(HEADER + NOISE)
        await self.send(HEADER + NOISE)
        if rest := received[len(HEADER + NOISE) :]:
            handshake.receive_data(rest)
        while handshake.result is None:
            await self.send(handshake.data_to_send())
            handshake.receive_data(await self.more())
        self.result = handshake.result
        self._ciphertext = handshake.result.unread
        return handshake.result

    # ---- yamux

    def seal(self, plain: bytes) -> bytes:
        """Noise messages that carry these bytes."""
        assert self.result is not None
        sealed = [
            self.result.send.encrypt(plain[start : start + noise.MAX_PLAINTEXT])
            for start in range(0, len(plain), noise.MAX_PLAINTEXT)
        ]
        return b"".join(len(message).to_bytes(2, "big") + message for message in sealed)

    def seal_empty(self) -> bytes:
        """A Noise message that carries nothing."""
        assert self.result is not None
        sealed = self.result.send.encrypt(b"")
        return len(sealed).to_bytes(2, "big") + sealed

    async def say(self, *frames: bytes) -> None:
        """Send frames, sealed."""
        await self.send(self.seal(b"".join(frames)))

    async def hear(self) -> Frame:
        """The next frame from the node.

        Raises:
            ClosedError: the node has closed the connection.
        """
        header = await self._take(12)
        _, kind, flags, stream, length = _YAMUX_HEADER.unpack(header)
        body = await self._take(length) if kind == DATA else b""
        return Frame(kind, flags, stream, length, body)

    async def _take(self, length: int) -> bytes:
        assert self.result is not None
        while len(self._plain) < length:
            while len(self._ciphertext) < 2 or len(self._ciphertext) < 2 + int.from_bytes(self._ciphertext[:2], "big"):
                self._ciphertext += await self.more()
            end = 2 + int.from_bytes(self._ciphertext[:2], "big")
            self._plain += self.result.receive.decrypt(self._ciphertext[2:end])
            self._ciphertext = self._ciphertext[end:]
        taken, self._plain = self._plain[:length], self._plain[length:]
        return taken

    async def answer_keepalive(self, heard: Frame) -> None:
        """Answer the node's ping, if this frame is one."""
        if heard.kind == PING and heard.flags & SYN:
            await self.say(frame(PING, ACK, 0, heard.length))

    async def hear_on(self, stream: int) -> Frame:
        """The next frame of this stream that says something: data, an end or a reset. Pings are answered meanwhile."""
        while True:
            heard = await self.hear()
            await self.answer_keepalive(heard)
            if heard.stream == stream and (heard.body or heard.flags & (FIN | RST)):
                return heard

    async def until_gone_away(self, seconds: float) -> int | None:
        """Read until the node closes the connection; the code of its go-away, None if it said none."""
        code = None
        with trio.fail_after(seconds), contextlib.suppress(ClosedError):
            while True:
                heard = await self.hear()
                if heard.kind == GO_AWAY:
                    code = heard.length
        return code

    async def flood(self, portions: Iterator[bytes], seconds: float) -> int | None:
        """Send portions of frames, many in each message, until the node closes the connection.

        An empty portion makes messages with nothing in them. The code of the node's go-away; None if it said none.
        """
        codes: list[int | None] = []
        async with trio.open_nursery() as nursery:

            async def hear() -> None:
                codes.append(await self.until_gone_away(seconds))
                nursery.cancel_scope.cancel()

            nursery.start_soon(hear)
            with contextlib.suppress(ClosedError):
                while True:
                    await self.send(self._batch(portions))
                    await trio.lowlevel.checkpoint()
        return codes[0]

    def _batch(self, portions: Iterator[bytes]) -> bytes:
        batch = b""
        while len(batch) < noise.MAX_PLAINTEXT // 4:
            if not (portion := next(portions)):
                return b"".join(self.seal_empty() for _ in range(500))
            batch += portion
        return self.seal(batch)

    async def negotiate(self, stream: int, protocol: str) -> bytes:
        """Open a stream and propose; all that is answered up to `na` or the protocol. Ends with the first answer."""
        await self.say(data(stream, HEADER + encode_message(protocol), SYN))
        answer = b""
        while len(answer) <= len(HEADER):
            heard = await self.hear_on(stream)
            if heard.flags & RST:
                raise ClosedError
            answer += heard.body
        return answer[len(HEADER) :]
