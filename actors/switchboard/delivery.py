"""Whether all that went into a stream came out at its far end: asked by one peerup node and answered by another.

Theory of operation. A stream whose directions have both finished is gone for yamux, while its last bytes may still wait
for the service at the far end, which may also break off then. Whoever must know (`peerup proxy --stdio` ends with a
status) has the far node watch the stream, by another stream of the same connection, protocol `DELIVERY`:

    asker  --> 4 bytes, big-endian: the yamux id of a stream that it has opened
    server --> 1: it watches it; or 0: it does not, and that is all
    server --> 4 bytes, big-endian: how it ended; 0 when the kernel at the service's end has confirmed every byte

The asker finishes the watched stream only when the first answer is there, so it is never over before that. A node
that does not speak the protocol is pinged behind the end of the stream: its answer proves that it has read all of it.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Final

import trio

from actors.switchboard.attached import AttachedStreams
from actors.switchboard.connections import Connection
from actors.switchboard.errors import ConnectionLostError, ProtocolNotSupportedError
from actors.switchboard.link import Channel
from actors.switchboard.streams import ChannelStream, abandoning, open_negotiated
from protocol.errors import PeerupError
from protocol.peer_id import PeerId
from protocol.protocol_ids import DELIVERY
from protocol.stream_descriptor import ResetCode

MAX_WATCHED: Final = 256
"""Streams of one peer that are watched at a time; for others it is told that they are not."""

_NUMBER: Final = 4
_WATCHED: Final = b"\x01"
_NOT_WATCHED: Final = b"\x00"


class DeliveryServer:
    """Watches streams for who has opened them."""

    def __init__(self, attached: AttachedStreams) -> None:
        self._attached = attached
        self._watched: Counter[PeerId] = Counter()

    def serve(self, connection: Connection, channel: Channel, first: bytes) -> None:
        """Take over a stream of `DELIVERY`."""
        asked = bytearray()
        watching = False

        def on_data(data: bytes) -> None:
            nonlocal watching
            if len(asked) >= _NUMBER:
                channel.reset(ResetCode.PROTOCOL_VIOLATION)
                return
            asked.extend(data[: _NUMBER - len(asked)])
            if len(asked) < _NUMBER:
                return
            if self._watched[connection.peer] < MAX_WATCHED and self._attached.watch(
                connection, int.from_bytes(asked, "big"), ended
            ):
                watching = True
                self._watched[connection.peer] += 1
                channel.send(_WATCHED)
            else:
                channel.send(_NOT_WATCHED)
                channel.finish()

        def ended(code: int) -> None:
            if not channel.closed:
                channel.send((code & 0xFFFF_FFFF).to_bytes(_NUMBER, "big"))
                channel.finish()

        def closed() -> None:
            if watching:
                self._watched[connection.peer] -= 1
                if not self._watched[connection.peer]:
                    del self._watched[connection.peer]

        channel.on_data, channel.on_finish, channel.on_closed = on_data, _wait, closed
        if first:
            on_data(first)


def _wait() -> None:
    """The asker has said all that it will; it waits."""


async def ask(connection: Connection, channel: Channel, ping: Callable[[Connection], Awaitable[object]]) -> int:
    """How a stream of ours, whose finish is held, came out at the far end; 0 if well. Waits as long as it takes.

    `ping` makes one round trip. Lets the finish go as soon as it may.
    """
    finished = trio.Event()
    channel.on_both_finished = finished.set
    try:
        code = await _ask(connection, channel)
        if code is None:
            channel.let_finish()
            await finished.wait()
            with contextlib.suppress(ProtocolNotSupportedError):  # that it says so is an answer as good
                await ping(connection)
            code = int(ResetCode.NONE)
    except PeerupError:
        return int(ResetCode.CONNECTION_LOST)
    finally:
        channel.let_finish()
    return code


async def _ask(connection: Connection, channel: Channel) -> int | None:
    """What the far node says; None if it says nothing of such things."""
    try:
        _, stream = await open_negotiated(connection, (DELIVERY,))
    except ConnectionLostError:
        raise
    except PeerupError:
        return None
    with abandoning(stream.channel):
        stream.channel.send(channel.id.to_bytes(_NUMBER, "big"))
        if await _receive(stream, 1) != _WATCHED:
            return None
        channel.let_finish()
        code = int.from_bytes(await _receive(stream, _NUMBER), "big")
        stream.channel.finish()
    return code


async def _receive(stream: ChannelStream, length: int) -> bytes:
    data = b""
    while len(data) < length:
        part = await stream.receive()
        if not part:
            raise ConnectionLostError("the peer does not say what came of the stream")
        data += part
    stream.put_back(data[length:])
    return data[:length]
