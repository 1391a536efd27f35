"""The client's end of a hop stream (libp2p specs, relay/circuit-v2.md, "Hop Protocol").

Theory of operation
-------------------

A client opens a stream, sends one request and gets one answer. RESERVE and CONNECT each need a stream of their
own. The machines are sans-I/O: bytes that came go into `receive_data`, bytes to send come out of `data_to_send`.

A RESERVE::

    stateDiagram-v2
        [*] --> waiting
        waiting --> granted: granted
        waiting --> refused: refused
        waiting --> failed: bad
        waiting --> failed: end

A CONNECT, after which the stream is the circuit::

    stateDiagram-v2
        [*] --> waiting
        waiting --> open: opened
        waiting --> refused: refused
        waiting --> failed: bad
        waiting --> failed: end

The spec does not forbid to send the circuit's first bytes straight behind CONNECT; they are lost if the circuit
is refused, so only such bytes should go early that mean nothing by themselves: the proposal of a security protocol and
the first message of its handshake. That saves a round trip. go-, js- and rust-libp2p relays forward them.
"""

from __future__ import annotations

import dataclasses
from typing import Final

from protocol.circuit.addresses import circuit_addresses
from protocol.circuit.exchange import Asker
from protocol.circuit.messages import CircuitMessageError, HopMessage, HopType, Limit, Peer
from protocol.circuit.voucher import Voucher, open_voucher
from protocol.multiaddr import Multiaddr
from protocol.peer_id import PeerId

RESERVE_TRANSITIONS: Final = {
    ("waiting", "granted"): "granted",
    ("waiting", "refused"): "refused",
    ("waiting", "bad"): "failed",
    ("waiting", "end"): "failed",
}
"""The machine of a RESERVE: (state, event) to the next state."""

CONNECT_TRANSITIONS: Final = {
    ("waiting", "opened"): "open",
    ("waiting", "refused"): "refused",
    ("waiting", "bad"): "failed",
    ("waiting", "end"): "failed",
}
"""The machine of a CONNECT: (state, event) to the next state."""


@dataclasses.dataclass(frozen=True, slots=True)
class Grant:
    """A reservation that a relay has granted.

    Attributes:
        relay: who granted it.
        expire: when it ends, in seconds since the Unix epoch by the relay's clock, which may differ from ours.
        addresses: where others can dial us, each `RELAY/p2p-circuit/p2p/US`; empty if none is known.
        limit: what each circuit is granted; None without limit.
        voucher: verified; None where the relay gives none.
    """

    relay: PeerId
    expire: int
    addresses: tuple[Multiaddr, ...]
    limit: Limit | None
    voucher: Voucher | None


class ReserveClient(Asker):
    """Asks a relay for a reservation, or to renew one.

    Attributes:
        state: `waiting`, `granted`, `refused` or `failed`.
        grant: the reservation when granted.
    """

    __slots__ = ("_dialled", "_relay", "_us", "grant")

    TRANSITIONS = RESERVE_TRANSITIONS

    def __init__(self, relay: PeerId, us: PeerId, *, dialled: Multiaddr | None = None) -> None:
        """Begin: the request is ready to be sent.

        Args:
            relay: who is asked, and must have signed the voucher.
            us: who asks, and whom the voucher must be for.
            dialled: the address at which we have reached the relay; it stands in for the addresses of a relay that
                names none, as a go-libp2p relay without a public address does.
        """
        super().__init__(HopMessage(HopType.RESERVE), b"")
        self._relay = relay
        self._us = us
        self._dialled = dialled
        self.grant: Grant | None = None

    def _judge(self, answer: bytes) -> None:
        message = HopMessage.from_bytes(answer)
        if message.type != HopType.STATUS:
            raise CircuitMessageError(f"the relay answered RESERVE by a message of the type {message.type}")
        if not self._take_status(message.status, message.reason):
            return
        found = message.reservation
        if found is None:
            raise CircuitMessageError("the relay answered OK to RESERVE without a reservation")
        voucher = open_voucher(found.voucher, relay=self._relay, peer=self._us) if found.voucher else None
        addresses = circuit_addresses(found.addresses, self._relay, self._us)
        if not addresses and self._dialled is not None:
            addresses = circuit_addresses([self._dialled], self._relay, self._us)
        self.limit = message.limit
        self.grant = Grant(self._relay, found.expire, addresses, message.limit, voucher)
        self._step("granted")


class ConnectClient(Asker):
    """Asks a relay for a circuit to a peer.

    Attributes:
        state: `waiting`, `open`, `refused` or `failed`.
        limit: what the circuit is granted, when open; None without limit.
    """

    __slots__ = ()

    TRANSITIONS = CONNECT_TRANSITIONS

    def __init__(self, peer: PeerId, *, early: bytes = b"") -> None:
        """Begin: the request is ready to be sent, with the circuit's first bytes behind it.

        Raises:
            LimitExceededError: more than `MAX_EARLY` bytes are to go early.
        """
        super().__init__(HopMessage(HopType.CONNECT, peer=Peer(peer)), early)

    def _judge(self, answer: bytes) -> None:
        message = HopMessage.from_bytes(answer)
        if message.type != HopType.STATUS:
            raise CircuitMessageError(f"the relay answered CONNECT by a message of the type {message.type}")
        if self._take_status(message.status, message.reason):
            self.limit = message.limit
            self.leftover = self._reader.take_rest()
            self._step("opened")
