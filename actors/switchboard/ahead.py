"""Streams that are used before the peer has agreed to them, until it has said a word.

Theory of operation. What a client says travels together with the proposal of a protocol, so nobody waits for a round
trip. Until the peer answers, all that was sent is kept (one window at most, since it takes an answer to send more). So
when the connection is doubted or ends before, the stream can begin anew on another one::

    opened --a word of the peer's--> answered (forgotten here)
       |----deadline--------------> reset
       |--connection doubted------> asked about, and goes on --recalled--> moved to another connection
       |                                                   |--has arrived--> waits there, as streams that run do
       |--connection ended--------> held; the same, or it ends as the connection did

`actors.switchboard.recall` does the asking and moving.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from actors.switchboard.channel import Channel
from actors.switchboard.connections import Connection
from protocol import multistream
from protocol.stream_descriptor import ResetCode

NEGOTIATION_DEADLINE = 10.0
"""Seconds for a peer to answer a proposal."""
RECALL_DEADLINE = 20.0
"""Seconds from the doubt about a connection until its unanswered streams are on another one: to dial the peer at all
its addresses, and through a relay, takes no longer."""


class Timer(Protocol):
    """A call that will be made unless it is cancelled."""

    def cancel(self) -> None:
        """Do not make the call."""
        ...


class Ahead:
    """One such stream.

    Attributes:
        connection, channel: where it is now.
        recalled: the peer has promised to refuse it where it is now.
        on_lost: asked when its connection has ended; whether it is to be held.

    Args:
        call_later: the reactor's timer.
    """

    def __init__(
        self,
        connection: Connection,
        channel: Channel,
        protocol: str,
        call_later: Callable[[float, Callable[[], None]], Timer],
    ) -> None:
        self.connection = connection
        self.channel = channel
        self.recalled = False
        self.held = False
        self._initiator = multistream.Initiator((protocol,))
        self._call_later = call_later
        self.proposal = self._initiator.data_to_send()
        channel.keep_sent()

    def begin(self) -> None:
        """The stream is in use: wait for the answer."""
        self._timer = self._call_later(NEGOTIATION_DEADLINE, self._expired)
        self._note()
        self.channel.on_closed = self._forget

    @property
    def silent(self) -> bool:
        """Whether nothing but the proposal was sent."""
        sent = self.channel.sent_ahead
        return sent is not None and sent <= len(self.proposal)

    @property
    def movable(self) -> bool:
        """Whether all that was sent is known, and somebody still wants the stream."""
        return self.channel.sent_ahead is not None and self.connection.unanswered.get(self.channel) is self

    def hear(self, data: bytes) -> bytes | None:
        """See `streams.Negotiation`."""
        initiator = self._initiator
        initiator.receive_data(data)
        if initiator.result is None:
            return None
        self._forget()
        stream = self.channel.stream
        stream.greeting = stream.received - len(initiator.leftover)
        return initiator.leftover

    def be_patient(self) -> None:
        """Its connection is doubted: give it the time to be moved."""
        self._timer.cancel()
        self._timer = self._call_later(RECALL_DEADLINE, self._expired)

    def has_arrived(self) -> None:
        """It has reached the peer, whose answer is on the way: it lasts as long as the connection does."""
        if self.held:
            self.abandon()
        else:
            self._timer.cancel()

    def move(self, connection: Connection) -> None:
        """Go on on this connection; only if `recalled`, or if nothing was said that must not be said twice.

        Raises:
            LinkClosedError, LimitExceededError: it has no room; nothing has happened.
        """
        channel = connection.link.open_stream(own=False)
        old = self.channel
        try:
            old.move_to(channel)
        except BaseException:
            channel.reset(ResetCode.NEGOTIATION_FAILED)
            raise
        self._forget()
        self.connection, self.channel = connection, channel
        self.recalled = self.held = False
        self._timer = self._call_later(NEGOTIATION_DEADLINE, self._expired)
        self._note()

    def abandon(self) -> None:
        """There is no other way: end as the connection has, if it has."""
        if self.held:
            self.held = False
            self.channel.abandon()

    def _note(self) -> None:
        self.connection.unanswered[self.channel] = self
        self.channel.on_lost = self._lost

    def _lost(self) -> bool:
        connection = self.connection
        self.held = connection.link.end is not None and connection.on_unanswered(connection)
        if self.held:
            self.be_patient()
        return self.held

    def _expired(self) -> None:
        if self._initiator.result is not None:
            return
        if self.held:
            self.abandon()
        else:
            self.channel.reset(ResetCode.NEGOTIATION_FAILED)

    def _forget(self) -> None:
        self._timer.cancel()
        self.connection.unanswered.pop(self.channel, None)
