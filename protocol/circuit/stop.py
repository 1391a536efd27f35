"""Both ends of a stop stream (libp2p specs, relay/circuit-v2.md, "Stop Protocol").

Theory of operation
-------------------

The relay opens a stream to the target of a circuit and says from whom it comes; the target accepts or refuses.
After its OK the stream is the circuit. Who the source really is, only the handshake inside the circuit proves.

The relay's end::

    stateDiagram-v2
        [*] --> waiting
        waiting --> open: opened
        waiting --> refused: refused
        waiting --> failed: bad
        waiting --> failed: end

The target's end. To a bad request the answer is MALFORMED_MESSAGE, to one of another type UNEXPECTED_MESSAGE::

    stateDiagram-v2
        [*] --> request
        request --> deciding: connect
        request --> refused: bad
        request --> failed: end
        deciding --> open: accept
        deciding --> refused: refuse
        deciding --> refused: flood
        deciding --> deciding: end

The relay may send what the source sent early straight behind its CONNECT, which saves a round trip to the target;
go-, js- and rust-libp2p targets keep it for the circuit.
"""

from __future__ import annotations

from typing import Final

from protocol.circuit.exchange import Answerer, Asker
from protocol.circuit.messages import CircuitMessageError, Limit, Peer, Refusal, Status, StopMessage, StopType
from protocol.peer_id import PeerId

INITIATOR_TRANSITIONS: Final = {
    ("waiting", "opened"): "open",
    ("waiting", "refused"): "refused",
    ("waiting", "bad"): "failed",
    ("waiting", "end"): "failed",
}
"""The relay's machine: (state, event) to the next state."""

RESPONDER_TRANSITIONS: Final = {
    ("request", "connect"): "deciding",
    ("request", "bad"): "refused",
    ("request", "end"): "failed",
    ("deciding", "accept"): "open",
    ("deciding", "refuse"): "refused",
    ("deciding", "flood"): "refused",
    ("deciding", "end"): "deciding",
}
"""The target's machine: (state, event) to the next state."""


class StopInitiator(Asker):
    """The relay's end: asks the target to take a circuit.

    Attributes:
        state: `waiting`, `open`, `refused` or `failed`.
    """

    __slots__ = ()

    TRANSITIONS = INITIATOR_TRANSITIONS

    def __init__(self, source: PeerId, limit: Limit | None = None, *, early: bytes = b"") -> None:
        """Begin: the request is ready to be sent, with what the source sent early behind it.

        Raises:
            LimitExceededError: more than `MAX_EARLY` bytes are to go early.
        """
        super().__init__(StopMessage(StopType.CONNECT, peer=Peer(source), limit=limit), early)

    def _judge(self, answer: bytes) -> None:
        message = StopMessage.from_bytes(answer)
        if message.type != StopType.STATUS:
            raise CircuitMessageError(f"the target answered CONNECT by a message of the type {message.type}")
        if self._take_status(message.status, message.reason):
            self.leftover = self._reader.take_rest()
            self._step("opened")


class StopResponder(Answerer):
    """The target's end: hears of one circuit.

    Attributes:
        state: `request`; `deciding`, which asks for a decision; `open`, `refused` or `failed`.
        source: from whom the circuit comes, by the relay's word.
        limit: what the circuit is granted; None without limit.
        finished: whether the relay has closed its side.
    """

    __slots__ = ("limit", "source")

    TRANSITIONS = RESPONDER_TRANSITIONS

    def __init__(self) -> None:
        super().__init__()
        self.source: PeerId | None = None
        self.limit: Limit | None = None

    def accept(self) -> None:
        """Take the circuit: send what there is to send; `leftover` and everything after it is the circuit.

        Raises:
            InvalidValueError: no CONNECT is to be decided.
        """
        self._step("accept")
        self._send(StopMessage(StopType.STATUS, status=Status.OK))

    def _take_request(self, data: bytes) -> None:
        message = StopMessage.from_bytes(data)
        if message.type != StopType.CONNECT or message.peer is None:
            reason = f"a target takes CONNECT, not a message of the type {message.type}"
            self._refuse("bad", Refusal(Status.UNEXPECTED_MESSAGE, reason, "unexpected"))
            return
        self.source = message.peer.peer_id
        self.limit = message.limit
        self._step("connect")

    def _status_message(self, refusal: Refusal) -> StopMessage:
        return StopMessage(StopType.STATUS, status=refusal.status, reason=refusal.reason)
