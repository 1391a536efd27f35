"""What the keeper of reservations tells about the relays that it keeps them at."""

from __future__ import annotations

from protocol.messages.codec import Message, Request, message, record
from protocol.multiaddr import Multiaddr
from protocol.peer_id import PeerId


@record
class RelayStatus:
    """One configured relay, and how the reservation there is.

    Attributes:
        addresses: where the relay is, as configured.
        state: of `protocol.keeper`: `connecting`, `reserving`, `waiting`, `held` or `renewing`.
        relayed_addresses: where others reach this node through it; empty without a reservation.
        expires_in: seconds until the reservation ends if it is not renewed; None without one.
        held_for: seconds since when there has been a reservation without a gap; None without one.
        next_attempt: seconds until the relay is asked again, to renew or after a failure; None while it is being asked.
        limit_seconds, limit_bytes: what the relay grants to each circuit; None without limit or reservation.
        rtt: seconds of one round trip to the relay; None until measured.
        last_failure: why the last attempt failed, in words; empty when it succeeded.
        granted, failed: attempts by their outcome since the keeper was started; renewals count.
        warning: why the reservation may not be relied upon, in words; empty when nothing is wrong with it.
    """

    peer: PeerId
    addresses: tuple[Multiaddr, ...]
    state: str
    relayed_addresses: tuple[Multiaddr, ...]
    expires_in: float | None
    held_for: float | None
    next_attempt: float | None
    limit_seconds: int | None
    limit_bytes: int | None
    rtt: float | None
    last_failure: str
    granted: int
    failed: int
    warning: str = ""


@message("keeper.relays")
class Relays(Message):
    """All configured relays, in the order of the configuration."""

    relays: tuple[RelayStatus, ...]


@message("keeper.read-relays")
class ReadRelays(Request[Relays]):
    """Ask for the relays and their health."""
