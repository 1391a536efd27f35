"""Length-prefixed messages: a varint length and so many bytes, as identify, circuit v2 and others frame theirs."""

from __future__ import annotations

from typing import ClassVar

from protocol.errors import LimitExceededError, ProtocolError
from protocol.varint import encode_varint, read_varint


class TruncatedMessageError(ProtocolError):
    """The stream ended in the middle of a message."""

    code: ClassVar[str] = "truncated-message"


def encode_delimited(message: bytes) -> bytes:
    """The message behind its length."""
    return encode_varint(len(message)) + message


class DelimitedReader:
    """Takes a stream's bytes in any pieces and gives out whole messages.

    Memory is bounded by `max_message` plus what one `receive_data` brings: a caller takes the messages out
    before it puts more in.
    """

    __slots__ = ("_buffer", "_max_message")

    def __init__(self, max_message: int) -> None:
        self._max_message = max_message
        self._buffer = bytearray()

    def receive_data(self, data: bytes) -> None:
        """Take bytes from the peer."""
        self._buffer += data

    def next_message(self) -> bytes | None:
        """The next whole message; None while bytes are missing.

        Raises:
            LimitExceededError: a message is announced that is longer than `max_message`.
            VarintError: a length is not an unsigned varint.
        """
        found = read_varint(self._buffer)
        if found is None:
            return None
        length, start = found
        if length > self._max_message:
            raise LimitExceededError(f"a message of {length} bytes is longer than {self._max_message}")
        end = start + length
        if len(self._buffer) < end:
            return None
        message = bytes(self._buffer[start:end])
        del self._buffer[:end]
        return message

    def finish(self) -> None:
        """Say that the stream has ended.

        Raises:
            TruncatedMessageError: in the middle of a message.
        """
        if self._buffer:
            raise TruncatedMessageError("the stream ended in the middle of a message")

    def take_rest(self) -> bytes:
        """What has arrived behind the last message taken; it is handed out once."""
        rest = bytes(self._buffer)
        self._buffer.clear()
        return rest
