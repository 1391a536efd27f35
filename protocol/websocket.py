"""WebSocket frames (RFC 6455, section 5) as libp2p uses them: a stream of bytes in binary messages.

Theory of operation. Where a message begins and ends means nothing to libp2p, so a frame's payload is passed on as it
comes and no message is ever put together: whatever length a peer announces, what is kept is the beginning of one
header or control frame (at most 139 bytes). Incoming bytes are decoded in place: the caller receives into a buffer,
and :meth:`Frames.decode` moves the payloads in it together at its beginning.

    header -> payload (unmasked) ... -> header -> ...      data frames: binary, and their continuations
    header with its whole payload                          control frames: ping (answered), pong (ignored), close

Text messages and extensions are refused: nothing of either was offered. A client masks what it sends with a fresh key
for each frame (section 5.3); that protects proxies from payloads that an attacker chose, and hides nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from enum import IntEnum
from typing import ClassVar, Final

from protocol.errors import ProtocolError

try:
    from websockets.speedups import apply_mask
except ImportError:  # a platform for which that library has no compiled part
    from websockets.utils import apply_mask

__all__ = ["MAX_HELD", "CloseCode", "Closed", "Frames", "WebSocketError"]

_FIN: Final = 0x80
_RESERVED: Final = 0x70
_MASKED: Final = 0x80
_LENGTH: Final = 0x7F
_CONTROL: Final = 0x08
_LENGTH_16: Final = 126
_LENGTH_64: Final = 127
_MAX_CONTROL: Final = 125
_KEY: Final = 4

MAX_HELD: Final = 2 + _KEY + _MAX_CONTROL + 8
"""The most bytes that :attr:`Frames.held` can have."""


class Opcode(IntEnum):
    """What a frame is."""

    CONTINUATION = 0
    TEXT = 1
    BINARY = 2
    CLOSE = 8
    PING = 9
    PONG = 10


class CloseCode(IntEnum):
    """Why a side ends the connection (section 7.4.1)."""

    NORMAL = 1000
    GOING_AWAY = 1001
    PROTOCOL_ERROR = 1002
    UNSUPPORTED_DATA = 1003
    NO_STATUS = 1005  # never sent: what a close frame without a code means


class WebSocketError(ProtocolError):
    """The peer sent what is not a frame, or not one that we take.

    Attributes:
        close_code: what to tell it.
    """

    code: ClassVar[str] = "websocket-error"

    def __init__(self, text: str, close_code: CloseCode = CloseCode.PROTOCOL_ERROR) -> None:
        super().__init__(text)
        self.close_code = close_code


@dataclasses.dataclass(frozen=True, slots=True)
class Closed:
    """The peer's close frame. The code is any number from 1000 to 4999; the reason has at most 123 bytes."""

    code: int
    reason: str


class Frames:
    """Both directions of one WebSocket, after its opening handshake.

    `client` says which role is ours; a client needs `random_key`, which gives four unpredictable bytes at each call.

    Attributes:
        held: bytes of what has been decoded that make no sense yet. They must stand before what is decoded next.
        closed: the peer's close frame, after which it sends nothing; None until then.
    """

    __slots__ = ("_fragmented", "_key", "_left", "_pong", "_random_key", "closed", "held")

    def __init__(self, *, client: bool, random_key: Callable[[], bytes] | None = None) -> None:
        if client and random_key is None:
            raise ValueError("a client masks what it sends, and needs keys for that")
        self._random_key = random_key if client else None
        self._left = 0  # of the payload of the data frame that is being received
        self._key = b""  # as it applies to the next byte of that
        self._fragmented = False
        self._pong: bytes | None = None
        self.held = b""
        self.closed: Closed | None = None

    # ---- what is sent

    def encode(self, data: bytes | memoryview) -> bytes:
        """The binary message with this content, in one frame."""
        return self._frame(Opcode.BINARY, data)

    def pong(self) -> bytes:
        """The answer to the last ping, if one came that was not answered; otherwise nothing."""
        payload, self._pong = self._pong, None
        return b"" if payload is None else self._frame(Opcode.PONG, payload)

    def close(self, code: CloseCode = CloseCode.NORMAL) -> bytes:
        """The frame after which nothing more is sent."""
        return self._frame(Opcode.CLOSE, code.to_bytes(2, "big"))

    def _frame(self, opcode: Opcode, data: bytes | memoryview) -> bytes:
        masked = 0 if self._random_key is None else _MASKED
        length = len(data)
        if length < _LENGTH_16:
            header = bytes((_FIN | opcode, masked | length))
        elif length < 1 << 16:
            header = bytes((_FIN | opcode, masked | _LENGTH_16)) + length.to_bytes(2, "big")
        else:
            header = bytes((_FIN | opcode, masked | _LENGTH_64)) + length.to_bytes(8, "big")
        if self._random_key is None:
            return b"".join((header, data))
        key = self._random_key()
        return b"".join((header, key, apply_mask(data, key)))

    # ---- what is received

    def decode(self, buffer: memoryview, end: int) -> int:
        """Take the bytes `buffer[:end]`, of which the first are `held`; leave the payloads at the buffer's beginning.

        Returns how many bytes they are. After `closed` is set, whatever follows is dropped.

        Raises:
            WebSocketError: the peer broke the protocol; the connection is of no further use.
        """
        position = payload = 0
        self.held = b""
        while position < end and self.closed is None:
            if not self._left:
                start = self._read_header(buffer, position, end)
                if not start:
                    self.held = bytes(buffer[position:end])
                    break
                position = start
                continue
            stop = min(end, position + self._left)
            length = stop - position
            if self._key:
                buffer[payload : payload + length] = apply_mask(buffer[position:stop], self._key)
                turn = length % _KEY
                self._key = self._key[turn:] + self._key[:turn]
            elif payload != position:
                buffer[payload : payload + length] = buffer[position:stop]
            self._left -= length
            payload += length
            position = stop
        return payload

    def _read_header(self, buffer: memoryview, position: int, end: int) -> int:
        """Where what follows this header, or this whole control frame, begins; 0 if there is not enough of it yet."""
        if end - position < 2:
            return 0
        first, second = buffer[position], buffer[position + 1]
        opcode = first & 0x0F
        if first & _RESERVED:
            raise WebSocketError("a frame uses an extension that was not agreed on")
        if bool(second & _MASKED) != (self._random_key is None):
            raise WebSocketError("a frame of a client is masked, one of a server is not; this is the other way round")
        length = second & _LENGTH
        start = position + 2
        if length >= _LENGTH_16:
            size = 2 if length == _LENGTH_16 else 8
            if opcode & _CONTROL:
                raise WebSocketError(f"a control frame is longer than {_MAX_CONTROL} bytes")
            if end - start < size:
                return 0
            length = int.from_bytes(buffer[start : start + size], "big")
            if length >> 63 or length < (_LENGTH_16 if size == 2 else 1 << 16):
                raise WebSocketError("the length of a frame is not in its shortest form")
            start += size
        key = b""
        if second & _MASKED:
            if end - start < _KEY:
                return 0
            key = bytes(buffer[start : start + _KEY])
            start += _KEY
        if not opcode & _CONTROL:
            self._begin_data(opcode, final=bool(first & _FIN))
            # A key of zeros changes nothing.
            self._left, self._key = length, key if any(key) else b""
            return start
        if not first & _FIN:
            raise WebSocketError("a control frame is fragmented")
        if end - start < length:
            return 0
        content = bytes(buffer[start : start + length])
        self._control(opcode, apply_mask(content, key) if key else content)
        return start + length

    def _begin_data(self, opcode: int, *, final: bool) -> None:
        if opcode == Opcode.TEXT:
            raise WebSocketError("text messages are not taken", CloseCode.UNSUPPORTED_DATA)
        if opcode not in {Opcode.BINARY, Opcode.CONTINUATION}:
            raise WebSocketError(f"there is no frame with opcode {opcode}")
        if (opcode == Opcode.CONTINUATION) != self._fragmented:
            raise WebSocketError("a message begins within another, or one goes on that never began")
        self._fragmented = not final

    def _control(self, opcode: int, content: bytes) -> None:
        if opcode == Opcode.PING:
            self._pong = content  # only the last one needs an answer (section 5.5.3)
        elif opcode == Opcode.CLOSE:
            self.closed = _closed(content)
        elif opcode != Opcode.PONG:
            raise WebSocketError(f"there is no frame with opcode {opcode}")


def _closed(content: bytes) -> Closed:
    if not content:
        return Closed(CloseCode.NO_STATUS, "")
    code = int.from_bytes(content[:2], "big")
    if len(content) < 2 or not 1000 <= code <= 4999:
        raise WebSocketError("a close frame has no code")
    try:
        return Closed(code, content[2:].decode())
    except UnicodeDecodeError:
        raise WebSocketError("the reason in a close frame is not text") from None
