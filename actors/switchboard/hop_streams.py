"""The relay's exchanges: a hop stream from its request to the answer, or to the circuit that it becomes.

Theory of operation. One object for each hop stream, driven by the channel's callbacks::

    opened --RESERVE--> decided --granted--> voucher signed --> answered
       |        |---------'-refused--------------------------> answered
       |--CONNECT--> decided --refused----------------------> answered
       |                 |--> stop stream opened, CONNECT sent
       |                         |--its answer is OK--> circuit (a `Splice` of both streams)
       |                         |--anything else------> answered: CONNECTION_FAILED
       |--nothing, or no end of it, within REQUEST_TIMEOUT--> reset
    answered --the client closes, or LINGER passes--> gone

What the client sends behind its CONNECT travels on behind ours, in the same message of the stop stream as the proposal
of its protocol; what the target sends behind its OK travels on behind our OK. So a circuit costs the two peers a round
trip between them and nothing else.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Final, Protocol

from actors.switchboard.channel import Channel
from actors.switchboard.connections import Connection
from actors.switchboard.protocols import CancellableTimer
from actors.switchboard.splice import Splice
from protocol.circuit.exchange import REQUEST_TIMEOUT
from protocol.circuit.hop_server import HopServer
from protocol.circuit.messages import Refusal, Reservation, Status
from protocol.circuit.stop import StopInitiator
from protocol.errors import PeerupError, ProtocolError
from protocol.multistream import Initiator
from protocol.peer_id import PeerId
from protocol.protocol_ids import CIRCUIT_STOP
from protocol.reservations import Circuit, HeldReservation
from protocol.stream_descriptor import ResetCode

LINGER: Final = 10.0
"""Seconds for a client to close a stream whose request was answered."""


class Relay(Protocol):
    """What an exchange needs of the relay that it is part of."""

    def call_later(self, delay: float, function: Callable[[], None]) -> CancellableTimer:
        """The reactor's timer."""
        ...

    def reserve(self, exchange: HopExchange) -> HeldReservation | Refusal:
        """Decide a RESERVE. If it is granted, `HopExchange.grant` is called in due course."""
        ...

    def connect(self, exchange: HopExchange, destination: PeerId) -> Circuit | Refusal:
        """Decide a CONNECT."""
        ...

    def open_stop(self, circuit: Circuit) -> Channel:
        """A stream to the destination.

        Raises:
            PeerupError: there is none to be had.
        """
        ...

    def opened(self, exchange: HopExchange, source: Channel, destination: Channel, early: int) -> Splice:
        """Both ends have agreed, and `early` bytes of the circuit went ahead. Join the streams.

        Raises:
            LinkClosedError: one of them is gone.
            InvalidValueError: the circuit is over already.
        """
        ...

    def answered(self, exchange: HopExchange, refusal: Refusal | None) -> None:
        """A request has been answered, or, with a refusal of the status UNUSED, will never be."""

    def gone(self, exchange: HopExchange) -> None:
        """The stream is closed, or a circuit."""


_UNANSWERED: Final = Refusal(Status.UNUSED, "the client hung up", "hung-up")
_SILENT: Final = Refusal(Status.UNUSED, "no request in time", "request-timeout")
_DISPLACED: Final = Refusal(Status.UNUSED, "others need the place", "displaced")


class HopExchange:
    """One hop stream; see the module. It takes the channel over, on which the protocol has just been agreed.

    Attributes:
        connection: the client's.
        kind: `reserve`, `connect`, or `unknown` until it is known.
        circuit: the circuit of a CONNECT that was not refused at once.
        stop, hop: the machines; `stop` is None before there is a stop stream.
    """

    def __init__(self, relay: Relay, connection: Connection, channel: Channel) -> None:
        self.connection = connection
        self.kind = "unknown"
        self.circuit: Circuit | None = None
        self.hop = HopServer(relayed=connection.relayed)
        self.stop: StopInitiator | None = None
        self._relay = relay
        self._channel = channel
        self._target: Channel | None = None
        self._initiator = Initiator((CIRCUIT_STOP,))
        self._early = 0
        self._over = False
        self._answered = False
        channel.on_data = self._on_data
        channel.on_finish = self._on_finish
        channel.on_reset = self._on_reset
        self._timer: CancellableTimer | None = relay.call_later(REQUEST_TIMEOUT, self._expired)

    # ---- the client

    def begin(self, first: bytes) -> None:
        """Take what came behind the negotiation; to be called once, when the relay knows of this exchange."""
        if first:
            self._on_data(first)

    def _on_data(self, data: bytes) -> None:
        if self._answered:
            return
        before = self.hop.state
        self.hop.receive_data(data)
        self._look(before)

    def _on_finish(self) -> None:
        if self._answered:
            self._channel.finish()
            return
        self.hop.finish()
        if self.hop.state == "failed":
            self._abandon(_UNANSWERED, ResetCode.PROTOCOL_VIOLATION)

    def _on_reset(self, code: int) -> None:
        self._abandon(_UNANSWERED, code)

    def _expired(self) -> None:
        self._timer = None
        self._abandon(_SILENT, ResetCode.NEGOTIATION_FAILED)

    def _look(self, before: str) -> None:
        """The client has said something."""
        state = self.hop.state
        if state == before:
            return
        self._cancel_timer()
        if state == "reserving":
            self.kind = "reserve"
            decision = self._relay.reserve(self)
            if isinstance(decision, Refusal):
                self._refuse(decision)
        elif state == "connecting":
            self.kind = "connect"
            assert self.hop.destination is not None
            circuit = self._relay.connect(self, self.hop.destination)
            if isinstance(circuit, Refusal):
                self._refuse(circuit)
            else:
                self.circuit = circuit
                self._ask_target(circuit)
        elif state == "refused":
            self._drop_target(ResetCode.LIMIT_EXCEEDED)
            self._answer(self.hop.refusal)

    def grant(self, reservation: Reservation, held: HeldReservation) -> None:
        """The reservation is made: tell the client, unless it has hung up meanwhile."""
        if self._over or self.hop.state != "reserving":
            return
        self.hop.grant(reservation, held.limit)
        self._answer(None)

    def refuse_late(self, refusal: Refusal) -> None:
        """What was granted, but not answered yet, may not be any more."""
        if not self._over and self.hop.state in {"connecting", "reserving"}:
            self._drop_target(ResetCode.LIMIT_EXCEEDED)
            self._refuse(refusal)

    @property
    def idle(self) -> bool:
        """Whether nothing is done here until the client says something."""
        return self._answered or self.hop.state == "request"

    def make_room(self) -> None:
        """Reset everything: others have a better right to this place."""
        self._abandon(_DISPLACED, ResetCode.LIMIT_EXCEEDED)

    def abort(self, code: int) -> None:
        """Reset everything: this relay serves no more."""
        self._abandon(_UNANSWERED, code)

    def _refuse(self, refusal: Refusal) -> None:
        self.hop.refuse(Status(refusal.status), refusal.reason, rule=refusal.rule)
        self._answer(refusal)

    def _answer(self, refusal: Refusal | None) -> None:
        """Send what the machine says, close our side, and wait a while for the client to close its own."""
        self._answered = True
        with contextlib.suppress(PeerupError):  # it is gone, or reads nothing; then nobody misses the answer
            self._channel.send(self.hop.data_to_send())
        self._relay.answered(self, refusal)
        self._channel.on_closed = self._gone
        self._channel.finish()
        if self._channel.closed:
            self._gone()
        else:
            self._timer = self._relay.call_later(LINGER, self._not_closed)

    def _not_closed(self) -> None:
        self._timer = None
        self._channel.reset(ResetCode.GARBAGE_COLLECTED)

    # ---- the target

    def _ask_target(self, circuit: Circuit) -> None:
        early, self.hop.leftover = self.hop.leftover, b""
        self._early = len(early)
        self.stop = StopInitiator(circuit.source, circuit.limit, early=early)
        try:
            self._target = target = self._relay.open_stop(circuit)
            target.send(self._initiator.data_to_send() + self.stop.data_to_send())
        except PeerupError as error:
            self._failed(f"no stream to the peer: {error}", "no-stream")
            return
        target.on_data = self._on_target_data
        target.on_finish = self._on_target_finish
        target.on_reset = self._on_target_reset

    def _on_target_data(self, data: bytes) -> None:
        stop, initiator = self.stop, self._initiator
        assert stop is not None
        try:
            if initiator.result is None:
                initiator.receive_data(data)
                data = initiator.leftover  # nothing before they have agreed
            stop.receive_data(data)
        except ProtocolError as error:
            self._failed(f"the peer does not take the circuit: {error}", "stop-failed")
            return
        if stop.state == "open":
            self._open()
        elif stop.state == "refused":
            self._failed(f"the peer refused: {stop.refusal}", "stop-refused")

    def _on_target_finish(self) -> None:
        stop = self.stop
        if stop is not None and stop.state == "waiting":
            self._failed("the peer closed the stream without an answer", "stop-failed")

    def _on_target_reset(self, code: int) -> None:
        self._failed(f"the peer reset the stream ({ResetCode.describe(code)})", "stop-reset")

    def _failed(self, reason: str, rule: str) -> None:
        if self._over or self._answered:
            return
        self._drop_target(ResetCode.NEGOTIATION_FAILED)
        self._refuse(Refusal(Status.CONNECTION_FAILED, reason, rule))

    def _open(self) -> None:
        source, target, stop = self._channel, self._target, self.stop
        assert target is not None
        assert stop is not None
        self._answered = self._over = True
        self.hop.open(self.circuit.limit if self.circuit is not None else None)
        try:
            source.send(self.hop.data_to_send())
            self._relay.opened(self, source, target, self._early)
        except PeerupError:  # a stream is gone, or the circuit's time has just passed, of which we are about to hear
            source.reset(ResetCode.CONNECTION_LOST)
            target.reset(ResetCode.CONNECTION_LOST)
            self._relay.answered(self, _UNANSWERED)
        else:
            self._relay.answered(self, None)
        self._relay.gone(self)

    # ---- ends

    def _drop_target(self, code: int) -> None:
        target, self._target = self._target, None
        if target is not None:
            target.on_data, target.on_finish, target.on_reset = _ignore_data, _nothing, _ignore_code
            target.reset(code)

    def _abandon(self, why: Refusal, code: int) -> None:
        """There will be no answer."""
        if self._over:
            return
        self._drop_target(code)
        if not self._answered:
            self._answered = True
            self._relay.answered(self, why)
        self._channel.reset(code)
        self._gone()

    def _gone(self) -> None:
        self._cancel_timer()
        if not self._over:
            self._over = True
            self._relay.gone(self)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _nothing() -> None:
    pass


def _ignore_data(_: bytes) -> None:
    pass


def _ignore_code(_: int) -> None:
    pass
