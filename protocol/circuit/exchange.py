"""What the four ends of hop and stop streams share: one message this way, one answer that way, then raw bytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Final

from protocol.circuit.messages import (
    MAX_MESSAGE,
    CircuitMessageError,
    HopMessage,
    Limit,
    Refusal,
    Status,
    StopMessage,
    encode_message,
)
from protocol.delimited import DelimitedReader
from protocol.errors import InvalidValueError, LimitExceededError, PeerupError, ProtocolError

MAX_EARLY: Final = 16 * 1024
"""The most bytes that may wait behind a request until it is decided.

An initiator's first flight, which is all that can be sent before the other end has answered, takes about 100.
"""

REQUEST_TIMEOUT: Final = 10.0
"""Seconds in which a request must have come after its stream: two round trips to the far side of the world."""

HANDSHAKE_TIMEOUT: Final = 30.0
"""Seconds in which a request must be answered; rather long, because a target may wake from sleep for it."""


class Exchange:
    """One end of a stream. `state` moves along `TRANSITIONS` alone.

    Attributes:
        state: where the exchange is, see the table of the class.
        leftover: bytes of the circuit that arrived with the messages; more may be appended by `receive_data`.
        refusal: why the request was refused, by either side; None as long as it was not.
    """

    __slots__ = ("_out", "_reader", "leftover", "refusal", "state")

    TRANSITIONS: ClassVar[Mapping[tuple[str, str], str]] = {}

    def __init__(self, state: str) -> None:
        self.state = state
        self.leftover = b""
        self.refusal: Refusal | None = None
        self._out = b""
        self._reader = DelimitedReader(MAX_MESSAGE)

    def data_to_send(self) -> bytes:
        """The bytes that must be sent now, in full; empty for none. They are handed out once."""
        out, self._out = self._out, b""
        return out

    def _send(self, message: HopMessage | StopMessage) -> None:
        self._out += encode_message(message)

    def _step(self, event: str) -> None:
        after = self.TRANSITIONS.get((self.state, event))
        if after is None:
            raise InvalidValueError(f"a {type(self).__name__} in the state {self.state} cannot {event}")
        self.state = after


class Asker(Exchange):
    """The end that asks: `waiting` for the one answer to what was sent."""

    __slots__ = ("limit",)

    def __init__(self, request: HopMessage | StopMessage, early: bytes) -> None:
        super().__init__("waiting")
        if len(early) > MAX_EARLY:
            raise LimitExceededError(f"at most {MAX_EARLY} bytes may be sent behind a request, not {len(early)}")
        self.limit: Limit | None = None
        self._out = encode_message(request) + early

    def receive_data(self, data: bytes) -> None:
        """Take bytes from the peer, in any pieces.

        Raises:
            CircuitMessageError: what came is not an answer; `state` is `failed`. Reset the stream.
            LimitExceededError, VarintError: it is too long, or has no length; likewise.
            VoucherError, EnvelopeError, BadSignatureError: a reservation's voucher is not what it must be; likewise.
        """
        if self.state == "waiting":
            try:
                self._reader.receive_data(data)
                answer = self._reader.next_message()
                if answer is not None:
                    self._judge(answer)
            except PeerupError:
                self._step("bad")
                raise
        elif self.state == "open":
            self.leftover += data

    def finish(self) -> None:
        """The peer has closed its side.

        Raises:
            CircuitMessageError: before it had answered; `state` is `failed`.
        """
        if self.state == "waiting":
            self._step("end")
            raise CircuitMessageError("the peer closed the stream without an answer")

    def _judge(self, answer: bytes) -> None:
        raise NotImplementedError

    def _take_status(self, status: int | None, reason: str) -> bool:
        """Whether the status is OK; otherwise keep the refusal."""
        if status == Status.OK:
            return True
        self.refusal = Refusal(Status.UNUSED if status is None else status, reason)
        self._step("refused")
        return False


class Answerer(Exchange):
    """The end that is asked: it waits for the one `request`, then for its owner's decision."""

    __slots__ = ("finished",)

    def __init__(self) -> None:
        super().__init__("request")
        self.finished = False

    def receive_data(self, data: bytes) -> None:
        """Take bytes from the peer, in any pieces. A bad request is not raised but answered: see `refusal`."""
        if self.state == "request":
            self._reader.receive_data(data)
            self._read_request()
        elif self.state == "open":
            self.leftover += data
        elif (self.state, "flood") in self.TRANSITIONS:
            self._keep_early(data)

    def finish(self) -> None:
        """The peer has closed its side: after its request that says nothing, before it there will be none."""
        self.finished = True
        if (self.state, "end") in self.TRANSITIONS:
            self._step("end")

    def refuse(self, status: Status, reason: str = "", *, rule: str = "") -> None:
        """Refuse the request: send what there is to send, then close the stream.

        Raises:
            InvalidValueError: there is no request to decide, or the status is OK.
        """
        if status == Status.OK:
            raise InvalidValueError("a refusal has another status than OK")
        self._refuse("refuse", Refusal(status, reason, rule))

    def _refuse(self, event: str, refusal: Refusal) -> None:
        self._step(event)
        self.refusal = refusal
        self.leftover = b""
        self._send(self._status_message(refusal))

    def _status_message(self, refusal: Refusal) -> HopMessage | StopMessage:
        raise NotImplementedError

    def _keep_early(self, data: bytes) -> None:
        if len(self.leftover) + len(data) > MAX_EARLY:
            reason = f"more than {MAX_EARLY} bytes before the circuit is open"
            self._refuse("flood", Refusal(Status.RESOURCE_LIMIT_EXCEEDED, reason, "early-data"))
            return
        self.leftover += data

    def _read_request(self) -> None:
        try:
            data = self._reader.next_message()
            if data is None:
                return
            self._take_request(data)
        except ProtocolError as error:
            self._refuse("bad", Refusal(Status.MALFORMED_MESSAGE, str(error), "malformed"))
            return
        early = self._reader.take_rest()
        if (self.state, "flood") in self.TRANSITIONS:
            self._keep_early(early)

    def _take_request(self, data: bytes) -> None:
        raise NotImplementedError
