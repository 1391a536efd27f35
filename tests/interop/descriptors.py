"""A stream descriptor as a test uses it: what is received as events, what is sent in messages of any size."""

from __future__ import annotations

from collections.abc import Iterable

import trio

from protocol.messages import Descriptor
from protocol.stream_descriptor import DATA, FINISH_MESSAGE, MAX_DATA, MAX_MESSAGE, RESET, parse_reset, reset_message


class ResetError(Exception):
    """The stream was reset by the other side, with `code`."""

    def __init__(self, code: int) -> None:
        super().__init__(f"the stream was reset with code 0x{code:x}")
        self.code = code


class DescriptorStream:
    """One end of a stream. Closing it is not an end of the stream: `finish` or `reset` is."""

    def __init__(self, descriptor: Descriptor) -> None:
        self._socket = trio.socket.socket(fileno=descriptor.detach())

    async def send(self, data: bytes | memoryview) -> None:
        """Send data, waiting while the other side does not take it.

        Raises:
            ResetError: the stream is over.
        """
        view = memoryview(data)
        for at in range(0, len(view), MAX_DATA):
            await self._send(b"D" + view[at : at + MAX_DATA])

    async def finish(self) -> None:
        """Half-close."""
        await self._send(FINISH_MESSAGE)

    async def reset(self, code: int) -> None:
        """End both directions."""
        await self._send(reset_message(code))

    async def _send(self, message: bytes) -> None:
        try:
            await self._socket.send(message)
        except (BrokenPipeError, ConnectionResetError):
            raise await self._why_broken() from None

    async def _why_broken(self) -> ResetError:
        """The reset that came before the other side closed the descriptor."""
        try:
            while await self.receive() is not None:
                pass
        except ResetError as error:
            return error
        return ResetError(0)

    async def receive(self) -> bytes | None:
        """Data; None when the other side has finished.

        Raises:
            ResetError: the other side reset the stream, or is gone.
        """
        try:
            message = await self._socket.recv(MAX_MESSAGE)
        except ConnectionResetError:
            message = b""
        if not message:
            raise ResetError(0)
        if message[0] == RESET:
            raise ResetError(parse_reset(message))
        return message[1:] if message[0] == DATA else None

    async def send_blocks(self, blocks: Iterable[memoryview]) -> None:
        """Send them one after the other."""
        for block in blocks:
            await self.send(block)

    def close(self) -> None:
        """Let go of the descriptor."""
        self._socket.close()
