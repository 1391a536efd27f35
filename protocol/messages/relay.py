"""Messages of the relay: what the actor `relay/server` has the switchboard do, and what the switchboard tells of it.

The decisions of the relay are made in the switchboard by these rules, as those of the gate are by its policy. The rules
stay in force while `relay/server` is away, until it says otherwise; only the end of the switchboard ends them.
"""

from __future__ import annotations

from protocol.circuit.messages import Limit
from protocol.messages.codec import Message, Request, message, record
from protocol.messages.system import Ok
from protocol.multiaddr import Multiaddr
from protocol.peer_id import PeerId
from protocol.reservations import RelayLimits
from protocol.token_bucket import Scoped


@record
class ScopedLimit:
    """So many for each peer, IP address, network, and in all; None is unlimited."""

    per_peer: int | None
    per_ip: int | None
    per_network: int | None
    total: int | None

    def scoped(self) -> Scoped:
        """The same for `protocol.reservations`."""
        return Scoped(self.per_peer, self.per_ip, self.per_network, self.total)


@record
class CircuitLimit:
    """What one circuit may take: seconds, and bytes each way; None is unlimited."""

    seconds: int | None
    data: int | None

    def limit(self) -> Limit:
        """The same for `protocol.reservations`."""
        return Limit(self.seconds or 0, self.data or 0)


@record
class RelayRules:
    """What a relay grants; see `protocol.reservations.RelayLimits`. `ttl` is in seconds, `requests` in a minute."""

    reservations: ScopedLimit
    circuits: ScopedLimit
    bytes_per_second: ScopedLimit
    requests: ScopedLimit
    ttl: int
    circuit: CircuitLimit
    guest_circuit: CircuitLimit

    def limits(self) -> RelayLimits:
        """The same for `protocol.reservations`.

        Raises:
            InvalidValueError: out of range.
        """
        return RelayLimits(
            self.reservations.scoped(),
            self.circuits.scoped(),
            self.bytes_per_second.scoped(),
            self.requests.scoped(),
            self.ttl,
            self.circuit.limit(),
            self.guest_circuit.limit(),
        )


@message("relay.serve")
class ServeRelay(Request[Ok]):
    """Serve as a relay by these rules, from now on or instead of those before. What was granted stays.

    Only `relay/server` may ask. It also ends a drain.
    """

    rules: RelayRules


@message("relay.stop-listening")
class StopListening(Request[Ok]):
    """Give the listening sockets up, for good: another process may have the ports. What is connected stays."""


@message("relay.drain")
class DrainRelay(Request[Ok]):
    """Grant nothing new. Answered when no circuit is left, or at once if this node does not serve as a relay."""


@message("relay.withdraw")
class WithdrawRelay(Request[Ok]):
    """Serve as a relay no more: open circuits are reset, reservations forgotten."""


@record
class RelayReservation:
    """A peer's reservation. `expires` is in seconds since the Unix epoch; `renewed`: it had one before."""

    peer: PeerId
    expires: int
    renewed: bool


@record
class RelayCircuit:
    """A circuit; while it is being opened, `opened` is False. `age` in seconds; bytes that went on each way so far."""

    source: PeerId
    destination: PeerId
    opened: bool
    age: float
    to_destination: int
    to_source: int


@message("relay.status")
class RelayServiceStatus(Message):
    """What the relay of this node does.

    Attributes:
        serving: it is a relay at all.
        draining: it grants nothing new.
        addresses: what its clients are told of where it is.
        reservations, circuits: how many there are.
        held, open: the same one by one, the first few hundred.
        requests: how many RESERVE and CONNECT (and others) came to what, such as `reserve granted` or
            `connect no-reservation`.
        to_destination, to_source: bytes of all circuits so far.
    """

    serving: bool
    draining: bool
    addresses: tuple[Multiaddr, ...]
    reservations: int
    circuits: int
    held: tuple[RelayReservation, ...]
    open: tuple[RelayCircuit, ...]
    requests: dict[str, int]
    to_destination: int
    to_source: int


@message("relay.read")
class ReadRelay(Request[RelayServiceStatus]):
    """Ask the switchboard what the relay of this node does."""
