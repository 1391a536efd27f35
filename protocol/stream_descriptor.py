"""What crosses the socket pair between the switchboard and the actor that a stream was handed to.

Theory of operation. A stream is handed over as one end of a `SOCK_SEQPACKET` socket pair, so each `send` is one
message and arrives as one. The first byte of a message is its type:

    D  data: 1 to 65,507 bytes follow. That is the most that fits into one yamux frame in one Noise message, so a
       message crosses the switchboard without being cut or copied.
    F  finish: the sender will send no more data (half-close of this direction). Nothing follows.
    R  reset: both directions are over at once. A code follows, four bytes, big-endian.

Each direction is a sequence `D* (F | R)`; an `R` also ends the other direction. A socket that ends without `F` or `R`
means that the process at the other end is gone: the same as `R` with :attr:`ResetCode.LOST`. A direction is never
ended by closing the socket: a bare close cannot tell a clean end from a crash.

Where it was asked for when the stream was opened, an `R` follows the `F` of both directions and tells what came of the
bytes at the far end: :attr:`ResetCode.NONE` if all of them arrived.

Back-pressure is the kernel's: who does not read stops the sender when the socket's buffer is full.
Nothing here is ever sent to another machine; the codes are, as yamux reset codes.
"""

from __future__ import annotations

import enum
from typing import Final

from protocol.errors import ProtocolError

MAX_DATA: Final = 65_507
"""Bytes of data in one message: a Noise message (65,535) less its tag (16) less a yamux header (12)."""

MAX_MESSAGE: Final = 1 + MAX_DATA

DATA: Final = 0x44
FINISH: Final = 0x46
RESET: Final = 0x52

FINISH_MESSAGE: Final = b"F"


class ResetCode(enum.IntEnum):
    """Why a stream was reset. 0 and the 0x10xx values are those of go-libp2p; they travel in yamux RST frames.

    The 0x50xx values are ours; a peer that does not know them sees a reset like any other.
    """

    NONE = 0
    NEGOTIATION_FAILED = 0x1001
    LIMIT_EXCEEDED = 0x1002
    RATE_LIMITED = 0x1003
    PROTOCOL_VIOLATION = 0x1004
    SUPPLANTED = 0x1005
    GARBAGE_COLLECTED = 0x1006
    SHUTDOWN = 0x1007
    GATED = 0x1008
    CODE_OUT_OF_RANGE = 0x1009
    LOST = 0x5001
    """The process that held the other end of the descriptor is gone."""
    CONNECTION_LOST = 0x5002
    """The connection to the peer ended under the stream."""
    LOCAL_RESET = 0x5003
    """The TCP connection that was tunnelled was reset by its own end."""
    SERVICE_UNREACHABLE = 0x5004
    """The exposed service did not accept a connection."""
    SERVICE_UNAVAILABLE = 0x5005
    """The actor that serves the protocol is not running."""

    @staticmethod
    def describe(code: int) -> str:
        """The name of a code for people, such as `limit-exceeded` or `code 0x4711`."""
        try:
            return ResetCode(code).name.lower().replace("_", "-")
        except ValueError:
            return f"code 0x{code:x}"


class StreamDescriptorError(ProtocolError):
    """The process at the other end of a stream descriptor sent something that is not a message."""

    code = "stream-descriptor"


def reset_message(code: int) -> bytes:
    """An `R` message. `code` is cut to 32 bits."""
    return b"R" + (code & 0xFFFF_FFFF).to_bytes(4, "big")


def parse_reset(message: bytes | bytearray | memoryview) -> int:
    """The code of an `R` message (type byte included).

    Raises:
        StreamDescriptorError: it is not five bytes that start with `R`.
    """
    if len(message) != 5 or message[0] != RESET:
        raise StreamDescriptorError("a reset on a stream descriptor is R and four bytes")
    return int.from_bytes(message[1:], "big")


def check_message(kind: int, length: int) -> None:
    """Refuse what is neither data, finish nor reset, by type byte and whole length.

    Raises:
        StreamDescriptorError: unknown type, or a length that the type does not have.
    """
    if kind == DATA and 2 <= length <= MAX_MESSAGE:
        return
    if (kind == FINISH and length == 1) or (kind == RESET and length == 5):
        return
    raise StreamDescriptorError(f"message type 0x{kind:02x} with {length} bytes on a stream descriptor")
