"""The relay's end of a hop stream (libp2p specs, relay/circuit-v2.md, "Hop Protocol").

Theory of operation
-------------------

One request comes, the relay decides, one answer goes. After OK to a CONNECT the stream is the circuit, and what
the client sent behind its request is the circuit's beginning. To a bad request the answer is MALFORMED_MESSAGE, to
one of another type UNEXPECTED_MESSAGE, to any over a connection that is itself relayed PERMISSION_DENIED; the machine
gives these by itself. A client may close its side right behind RESERVE, as rust-libp2p does, and gets its answer::

    stateDiagram-v2
        [*] --> request
        request --> reserving: reserve
        request --> connecting: connect
        request --> refused: bad
        request --> failed: end
        reserving --> granted: grant
        reserving --> refused: refuse
        reserving --> reserving: end
        connecting --> open: open
        connecting --> refused: refuse
        connecting --> refused: flood
        connecting --> connecting: end
"""

from __future__ import annotations

from typing import Final

from protocol.circuit.exchange import Answerer
from protocol.circuit.messages import HopMessage, HopType, Limit, Refusal, Reservation, Status
from protocol.peer_id import PeerId

TRANSITIONS: Final = {
    ("request", "reserve"): "reserving",
    ("request", "connect"): "connecting",
    ("request", "bad"): "refused",
    ("request", "end"): "failed",
    ("reserving", "grant"): "granted",
    ("reserving", "refuse"): "refused",
    ("reserving", "end"): "reserving",
    ("connecting", "open"): "open",
    ("connecting", "refuse"): "refused",
    ("connecting", "flood"): "refused",
    ("connecting", "end"): "connecting",
}
"""The machine: (state, event) to the next state."""


class HopServer(Answerer):
    """Answers one request.

    Attributes:
        state: `request`; `reserving` or `connecting`, which ask for a decision; `granted`, `open`, `refused`, `failed`.
        destination: to whom a CONNECT is to lead.
        finished: whether the client has closed its side.
    """

    __slots__ = ("_relayed", "destination")

    TRANSITIONS = TRANSITIONS

    def __init__(self, *, relayed: bool = False) -> None:
        """Wait for the request; `relayed` says that the client's connection leads through a relay itself."""
        super().__init__()
        self._relayed = relayed
        self.destination: PeerId | None = None

    def grant(self, reservation: Reservation, limit: Limit | None = None) -> None:
        """Grant the reservation: send what there is to send, then close the stream.

        Raises:
            InvalidValueError: no RESERVE is to be decided.
        """
        self._step("grant")
        self._send(HopMessage(HopType.STATUS, reservation=reservation, limit=limit, status=Status.OK))

    def open(self, limit: Limit | None = None) -> None:
        """The circuit is open: send what there is to send, forward `leftover`, and then everything else.

        Raises:
            InvalidValueError: no CONNECT is to be decided.
        """
        self._step("open")
        self._send(HopMessage(HopType.STATUS, limit=limit, status=Status.OK))

    def _take_request(self, data: bytes) -> None:
        message = HopMessage.from_bytes(data)
        if message.type not in {HopType.RESERVE, HopType.CONNECT}:
            reason = f"a relay takes RESERVE and CONNECT, not a message of the type {message.type}"
            self._refuse("bad", Refusal(Status.UNEXPECTED_MESSAGE, reason, "unexpected"))
        elif self._relayed:
            reason = "not over a connection that is itself relayed"
            self._refuse("bad", Refusal(Status.PERMISSION_DENIED, reason, "relayed"))
        elif message.peer is not None:
            self.destination = message.peer.peer_id
            self._step("connect")
        else:
            self._step("reserve")

    def _status_message(self, refusal: Refusal) -> HopMessage:
        return HopMessage(HopType.STATUS, status=refusal.status, reason=refusal.reason)
