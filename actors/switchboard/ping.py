"""libp2p's ping and peer-up's, served and asked."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable

import trio

from actors.switchboard.connections import Connection
from actors.switchboard.errors import StreamRefusedError
from actors.switchboard.link import Channel
from actors.switchboard.streams import abandoning, open_negotiated
from protocol.errors import ProtocolError
from protocol.peer_id import PeerId
from protocol.ping import (
    MAX_STREAMS_PER_PEER,
    PING_SIZE,
    PingInitiator,
    PingPongInitiator,
    PingPongResponder,
    PingResponder,
)
from protocol.protocol_ids import PING, PINGPONG
from protocol.stream_descriptor import ResetCode

PING_DEADLINE = 10.0
"""Seconds for one ping to come back."""


class PingServer:
    """Answers pings; of one peer at most so many streams at a time, the oldest gives way."""

    def __init__(self) -> None:
        self._streams: dict[PeerId, deque[Channel]] = {}

    def serve_ping(self, connection: Connection, channel: Channel, first: bytes) -> None:
        """Take over a stream of `/ipfs/ping/1.0.0`."""
        responder = PingResponder()
        streams = self._streams.setdefault(connection.peer, deque())
        if len(streams) >= MAX_STREAMS_PER_PEER:
            streams.popleft().reset(ResetCode.LIMIT_EXCEEDED)
        streams.append(channel)

        def on_data(data: bytes) -> None:
            responder.receive_data(data)
            if reply := responder.data_to_send():
                channel.send(reply)

        def on_finish() -> None:
            forget()
            try:
                responder.finish()
            except ProtocolError:
                channel.reset(ResetCode.PROTOCOL_VIOLATION)
            else:
                channel.finish()

        def on_reset(_: int) -> None:
            forget()

        def forget() -> None:
            if channel in streams:
                streams.remove(channel)
            if not streams and self._streams.get(connection.peer) is streams:
                del self._streams[connection.peer]

        channel.on_data, channel.on_finish, channel.on_reset = on_data, on_finish, on_reset
        if first:
            on_data(first)

    def serve_pingpong(self, connection: Connection, channel: Channel, first: bytes) -> None:
        """Take over a stream of `/pingpong/1.0.0`."""
        responder = PingPongResponder()

        def on_data(data: bytes) -> None:
            if responder.done:
                return
            try:
                reply = responder.receive_data(data)
            except ProtocolError:
                channel.reset(ResetCode.PROTOCOL_VIOLATION)
                return
            if reply:
                channel.send(reply)
                channel.finish()

        def on_finish() -> None:
            if not responder.done:
                channel.reset(ResetCode.PROTOCOL_VIOLATION)

        channel.on_data, channel.on_finish, channel.on_reset = on_data, on_finish, _ignore
        if first:
            on_data(first)


def _ignore(_: int) -> None:
    pass


async def ping(connection: Connection, now: Callable[[], float], randomness: random.Random) -> tuple[float, str]:
    """One round trip in seconds and the protocol that it was measured with; setting up the stream does not count.

    Raises:
        SwitchboardError, ProtocolError: no answer, or a wrong one.
    """
    protocol, stream = await open_negotiated(connection, (PING, PINGPONG))
    with abandoning(stream.channel):
        take: Callable[[bytes], bool]
        if protocol == PING:
            initiator = PingInitiator()
            request = initiator.start(randomness.randbytes(PING_SIZE))
            take = initiator.receive_data
        else:
            asking = PingPongInitiator()
            request = asking.REQUEST
            take = asking.receive_data
        with trio.move_on_after(PING_DEADLINE) as scope:
            began = now()
            stream.channel.send(request)
            while True:
                data = await stream.receive()
                if not data:
                    raise StreamRefusedError("the peer closed the ping stream without an answer")
                if take(data):
                    break
            elapsed = now() - began
            stream.channel.finish()
        if scope.cancelled_caught:
            raise StreamRefusedError(f"no answer to a ping within {PING_DEADLINE:g} s")
    return elapsed, protocol
