"""A stream that the switchboard uses itself: channel callbacks made into something that a task can await."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import trio

from actors.switchboard.ahead import NEGOTIATION_DEADLINE, Ahead
from actors.switchboard.connections import Connection
from actors.switchboard.errors import (
    ConnectionLostError,
    ProtocolNotSupportedError,
    StreamRefusedError,
    SwitchboardError,
)
from actors.switchboard.link import Channel
from actors.switchboard.protocols import CancellableTimer
from protocol import multistream
from protocol.errors import ProtocolError
from protocol.service import service_of_protocol
from protocol.stream_descriptor import ResetCode

T = TypeVar("T")

MAX_BUFFERED = 64 * 1024
"""Bytes that may wait for a task to read them; whoever sends more is reset."""


class ChannelStream:
    """One reading task at a time. Sending never waits (the channel bounds what it queues)."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self._buffer = bytearray()
        self._finished = False
        self._reset: int | None = None
        self._news = trio.Event()
        channel.on_data = self._on_data
        channel.on_finish = self._on_finish
        channel.on_reset = self._on_reset

    def put_back(self, data: bytes) -> None:
        """Have these bytes read (again) before any other."""
        self._buffer[:0] = data

    async def receive(self) -> bytes:
        """What has arrived, at least one byte; empty when the peer has finished.

        Raises:
            ConnectionLostError: the connection ended under the stream.
            StreamRefusedError: the peer reset the stream.
        """
        while not self._buffer:
            if self._reset is not None:
                raise reset_error(self._reset)
            if self._finished:
                return b""
            self._news = trio.Event()
            await self._news.wait()
        data = bytes(self._buffer)
        self._buffer.clear()
        return data

    def take_unread(self) -> bytes:
        """What has arrived and was not read."""
        data = bytes(self._buffer)
        self._buffer.clear()
        return data

    def _on_data(self, data: bytes) -> None:
        self._buffer += data
        if len(self._buffer) > MAX_BUFFERED:
            self._reset = ResetCode.LIMIT_EXCEEDED
            self._buffer.clear()
            self.channel.reset(ResetCode.LIMIT_EXCEEDED)
        self._news.set()

    def _on_finish(self) -> None:
        self._finished = True
        self._news.set()

    def _on_reset(self, code: int) -> None:
        self._reset = code
        self._news.set()


def reset_error(code: int) -> SwitchboardError:
    """What a reset with this code means to somebody who waits for the stream."""
    if code == ResetCode.CONNECTION_LOST:
        return ConnectionLostError("the connection to the peer ended")
    if code == ResetCode.GATED:
        return StreamRefusedError("the peer's policy refuses this node")
    return StreamRefusedError(f"the peer reset the stream ({ResetCode.describe(code)})")


@contextlib.contextmanager
def abandoning(channel: Channel) -> Iterator[None]:
    """Reset the stream if what is done with it within fails."""
    done = False
    try:
        yield
        done = True
    finally:
        if not done:
            channel.reset(ResetCode.NEGOTIATION_FAILED)


Negotiation = Callable[[bytes], bytes | None]
"""Hears the peer until a protocol is agreed; see `Channel.hand_over`."""


def open_ahead(
    connection: Connection,
    protocol: str,
    call_later: Callable[[float, Callable[[], None]], CancellableTimer],
    take: Callable[[Channel, Negotiation], T],
) -> T:
    """Open a stream for a protocol that the peer is known to speak, which can be used at once. What `take` returns.

    What is sent follows the proposal without a round trip. If the peer refuses the proposal after all, or does not
    answer in time, the stream ends in a reset with NEGOTIATION_FAILED. `take` hands the channel over. If the connection
    dies before the peer has answered, the stream may go on on another channel (`actors.switchboard.ahead`).

    Raises:
        LinkClosedError, LimitExceededError, OSError: no stream.
    """
    return _open_ahead(connection, protocol, call_later, take)[0]


def _open_ahead(
    connection: Connection,
    protocol: str,
    call_later: Callable[[float, Callable[[], None]], CancellableTimer],
    take: Callable[[Channel, Negotiation], T],
) -> tuple[T, Ahead]:
    channel = connection.link.open_stream(own=False)
    ahead = Ahead(connection, channel, protocol, call_later)
    with abandoning(channel):
        channel.send(ahead.proposal)
        taken = take(channel, ahead.hear)
    ahead.begin()
    return taken, ahead


async def open_early(
    connection: Connection,
    protocol: str,
    call_later: Callable[[float, Callable[[], None]], CancellableTimer],
    take: Callable[[Channel, Negotiation], T],
) -> T:
    """As `open_ahead`, for a protocol that the peer may not speak; return when it has agreed. What `take` returned.

    The bytes flow meanwhile. When this raises, the stream that `take` has been given is over.

    Raises:
        ProtocolNotSupportedError, StreamRefusedError, ConnectionLostError: the peer did not agree.
        LinkClosedError, LimitExceededError, OSError: no stream.
    """
    settled = trio.Event()
    agreed = False
    refusal: ProtocolError | None = None

    def observe(channel: Channel, negotiation: Negotiation) -> T:
        def answered(data: bytes) -> bytes | None:
            nonlocal agreed, refusal
            try:
                rest = negotiation(data)
            except ProtocolError as error:
                refusal = error
                raise
            if rest is not None:
                agreed = True
                settled.set()
            return rest

        return take(channel, answered)

    taken, ahead = _open_ahead(connection, protocol, call_later, observe)
    forget = ahead.channel.on_closed

    def closed() -> None:
        forget()
        settled.set()

    ahead.channel.on_closed = closed
    try:
        await settled.wait()
    except BaseException:
        ahead.channel.reset(ResetCode.NEGOTIATION_FAILED)
        raise
    channel = ahead.channel  # another one than at first if it was moved to another connection
    if agreed:
        return taken
    if isinstance(refusal, multistream.ProtocolNotSupportedError):
        raise not_offered((protocol,)) from refusal
    if refusal is not None:
        raise StreamRefusedError(str(refusal)) from refusal
    if channel.ended_by is not None and channel.ended_by != ResetCode.NEGOTIATION_FAILED:
        raise reset_error(channel.ended_by)
    raise StreamRefusedError("the peer did not answer the proposal")


def not_offered(protocols: Sequence[str]) -> ProtocolNotSupportedError:
    """What it means that a peer declines these protocols."""
    return ProtocolNotSupportedError(
        f"the peer does not offer {', '.join(protocols)} to this node: it has no such service, or its allowed_peers"
        " leave us out"
    )


async def open_negotiated(
    connection: Connection, protocols: Sequence[str], *, deadline: float = NEGOTIATION_DEADLINE
) -> tuple[str, ChannelStream]:
    """Open a stream for the first of these protocols that the peer speaks.

    Raises:
        ProtocolNotSupportedError: it speaks none of them, or none that it lets us use.
        StreamRefusedError, ConnectionLostError, LinkClosedError, LimitExceededError: no stream, or not for long.
    """
    own = not any(map(service_of_protocol, protocols))
    stream = ChannelStream(connection.link.open_stream(own=own))
    with abandoning(stream.channel):
        initiator = multistream.Initiator(protocols)
        stream.channel.send(initiator.data_to_send())
        with trio.move_on_after(deadline) as scope:
            try:
                while initiator.result is None:
                    data = await stream.receive()
                    if not data:
                        raise StreamRefusedError("the peer closed the stream instead of answering")
                    initiator.receive_data(data)
                    if reply := initiator.data_to_send():
                        stream.channel.send(reply)
            except multistream.ProtocolNotSupportedError as error:
                raise not_offered(protocols) from error
            except ProtocolError as error:
                raise StreamRefusedError(str(error)) from error
        if scope.cancelled_caught or initiator.result is None:
            raise StreamRefusedError(f"the peer did not answer the proposal within {deadline:g} s")
        if not own:
            stream.channel.stream.greeting = stream.channel.received - len(initiator.leftover)
        stream.put_back(initiator.leftover)
    return initiator.result, stream
