"""Ping, in libp2p's form and in peer-up's. Time is measured by the caller, who sends and receives the bytes.

- `/ipfs/ping/1.0.0` (libp2p specs, ping/): the initiator sends 32 random bytes, the responder echoes them, again
  and again until the initiator closes its side.
- `/pingpong/1.0.0` (peer-up): the initiator sends `ping` and a newline, the responder answers `pong` and a newline
  and closes; to any other line it answers `unknown`. One line a stream.
"""

from __future__ import annotations

import hmac
from typing import ClassVar, Final

from protocol.errors import InvalidValueError, LimitExceededError, ProtocolError

PING_SIZE: Final = 32
"""Bytes of each libp2p ping."""

MAX_STREAMS_PER_PEER: Final = 2
"""A responder serves at most so many libp2p ping streams of one peer (the spec's SHOULD)."""

MAX_LINE: Final = 64
"""The longest line of peer-up's ping in bytes, with its newline."""


class PingError(ProtocolError):
    """A peer's answer to a ping is not the right one, or a ping is cut short."""

    code: ClassVar[str] = "bad-ping"


class PingResponder:
    """Echoes pings on one `/ipfs/ping/1.0.0` stream."""

    __slots__ = ("_buffer", "_out", "count")

    def __init__(self) -> None:
        self._buffer = b""
        self._out = b""
        self.count = 0

    def receive_data(self, data: bytes) -> None:
        """Take bytes from the peer, in any pieces."""
        data = self._buffer + data
        whole = len(data) - len(data) % PING_SIZE
        self._out += data[:whole]
        self._buffer = data[whole:]
        self.count += whole // PING_SIZE

    def data_to_send(self) -> bytes:
        """What must be sent now; it is handed out once. Send it before receiving more, and memory is bounded."""
        out, self._out = self._out, b""
        return out

    def finish(self) -> None:
        """The initiator has closed its side: send what is left to send and close ours.

        Raises:
            PingError: it closed in the middle of a ping.
        """
        if self._buffer:
            raise PingError(f"the peer closed the ping stream {len(self._buffer)} bytes into a ping")


class PingInitiator:
    """Sends pings on one `/ipfs/ping/1.0.0` stream, one after another."""

    __slots__ = ("_awaited", "_buffer")

    def __init__(self) -> None:
        self._awaited: bytes | None = None
        self._buffer = b""

    def start(self, payload: bytes) -> bytes:
        """The bytes of the next ping. `payload` is 32 random bytes; take the time when they are sent.

        Raises:
            InvalidValueError: not 32 bytes, or the last ping is not answered yet.
        """
        if len(payload) != PING_SIZE:
            raise InvalidValueError(f"a ping has {PING_SIZE} bytes, not {len(payload)}")
        if self._awaited is not None:
            raise InvalidValueError("the last ping is not answered yet")
        self._awaited = payload
        return payload

    def receive_data(self, data: bytes) -> bool:
        """Take bytes from the peer; True when they complete the right answer.

        Raises:
            PingError: the answer is wrong, or nothing was asked.
        """
        self._buffer += data
        if self._awaited is None or len(self._buffer) > PING_SIZE:
            raise PingError("the peer sent more than the answer to a ping")
        if len(self._buffer) < PING_SIZE:
            return False
        if not hmac.compare_digest(self._buffer, self._awaited):
            raise PingError("the peer did not echo the ping")
        self._awaited = None
        self._buffer = b""
        return True


def _take_line(buffer: bytes) -> bytes | None:
    """The line that the buffer begins with; None while its newline is missing.

    Raises:
        LimitExceededError: no newline within `MAX_LINE` bytes.
    """
    end = buffer.find(b"\n", 0, MAX_LINE)
    if end < 0 and len(buffer) >= MAX_LINE:
        raise LimitExceededError(f"a line of more than {MAX_LINE} bytes")
    return None if end < 0 else buffer[: end + 1]


class PingPongResponder:
    """Answers the one line of a `/pingpong/1.0.0` stream. Close the stream when `done`."""

    __slots__ = ("_buffer", "done")

    def __init__(self) -> None:
        self._buffer = b""
        self.done = False

    def receive_data(self, data: bytes) -> bytes:
        """Take bytes from the peer; what to answer (empty while the line is not complete).

        Raises:
            LimitExceededError: the line is longer than `MAX_LINE`.
        """
        if self.done:
            return b""
        self._buffer += data
        line = _take_line(self._buffer)
        if line is None:
            return b""
        self.done = True
        self._buffer = b""
        return b"pong\n" if line.strip() == b"ping" else b"unknown\n"


class PingPongInitiator:
    """Asks on a `/pingpong/1.0.0` stream."""

    __slots__ = ("_buffer",)

    REQUEST: ClassVar[bytes] = b"ping\n"
    """What to send, once; take the time when it is sent."""

    def __init__(self) -> None:
        self._buffer = b""

    def receive_data(self, data: bytes) -> bool:
        """Take bytes from the peer; True when they complete the right answer.

        Raises:
            PingError: the answer is another.
            LimitExceededError: the answer is longer than `MAX_LINE`.
        """
        self._buffer += data
        line = _take_line(self._buffer)
        if line is None:
            return False
        if line.strip() != b"pong":
            raise PingError(f"the peer answered {line[:20]!r} to ping")
        return True
