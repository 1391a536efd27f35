"""The messages of circuit relay v2 (libp2p specs, relay/circuit-v2.md), each at most 4 KiB behind its length.

A field that does not belong to a message's type is not looked at, as in the other implementations. A message
without a type is malformed: the spec asks senders to always set it, and all do.
"""

from __future__ import annotations

import dataclasses
import enum
from typing import ClassVar, Final, Self, TypeAlias

from google.protobuf.message import DecodeError

from protocol.delimited import encode_delimited
from protocol.errors import InvalidValueError, ProtocolError
from protocol.identify import printable
from protocol.multiaddr import Multiaddr
from protocol.pb import circuit_pb2
from protocol.peer_id import PeerId, PeerIdError
from protocol.peer_record import parse_addresses

MAX_MESSAGE: Final = 4096
"""The longest message in bytes without its length, as in go-, js- and rust-libp2p."""

MAX_ADDRESSES: Final = 16
"""The most addresses that are taken from a message; further ones are left out."""

MAX_REASON: Final = 200
"""The longest reason in characters; it is cut to this when it is sent and when it is received."""

MAX_DURATION: Final = (1 << 32) - 1
"""The longest limit in seconds that the wire form holds."""

MAX_DATA: Final = (1 << 64) - 1
"""The largest limit in bytes, and the latest expiry, that the wire form holds."""


class CircuitMessageError(ProtocolError):
    """Bytes are not a message of circuit relay v2, or one without a field that its type needs."""

    code: ClassVar[str] = "bad-circuit-message"


class HopType(enum.IntEnum):
    """What a `HopMessage` is."""

    RESERVE = 0
    CONNECT = 1
    STATUS = 2


class StopType(enum.IntEnum):
    """What a `StopMessage` is."""

    CONNECT = 0
    STATUS = 1


class Status(enum.IntEnum):
    """The status codes of the spec."""

    UNUSED = 0
    OK = 100
    RESERVATION_REFUSED = 200
    RESOURCE_LIMIT_EXCEEDED = 201
    PERMISSION_DENIED = 202
    CONNECTION_FAILED = 203
    NO_RESERVATION = 204
    MALFORMED_MESSAGE = 400
    UNEXPECTED_MESSAGE = 401


def status_name(status: int) -> str:
    """The spec's name of a status, or the number of one that we do not know."""
    try:
        return Status(status).name
    except ValueError:
        return f"status {status}"


@dataclasses.dataclass(frozen=True, slots=True)
class Peer:
    """A peer, and addresses of it. Nobody uses the addresses, for relays do not dial; so they are not read either."""

    peer_id: PeerId
    addresses: tuple[Multiaddr, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Limit:
    """What a relay grants to one circuit.

    Attributes:
        duration: seconds from its beginning; 0 without limit.
        data: bytes in each direction; 0 without limit.
    """

    duration: int = 0
    data: int = 0

    def __post_init__(self) -> None:
        """Refuse what the wire form cannot hold."""
        if not 0 <= self.duration <= MAX_DURATION or not 0 <= self.data <= MAX_DATA:
            raise InvalidValueError(f"a circuit cannot be limited to {self.duration} seconds and {self.data} bytes")

    @property
    def unlimited(self) -> bool:
        """Whether it limits nothing; such a limit is not sent, because its presence alone tells of a limit."""
        return self.duration == 0 and self.data == 0

    def __str__(self) -> str:
        duration = f"{self.duration} seconds" if self.duration else "unlimited time"
        data = f"{self.data} bytes each way" if self.data else "unlimited data"
        return f"{duration}, {data}"


@dataclasses.dataclass(frozen=True, slots=True)
class Reservation:
    """A reservation as the relay tells of it.

    Attributes:
        expire: when it ends, in seconds since the Unix epoch by the relay's clock.
        addresses: where the relay can be reached, as sent; see `protocol.circuit.addresses`.
        voucher: a signed envelope, see `protocol.circuit.voucher`; None where the relay gives none (rust-libp2p).
    """

    expire: int
    addresses: tuple[Multiaddr, ...] = ()
    voucher: bytes | None = None

    def __post_init__(self) -> None:
        """Refuse what the wire form cannot hold."""
        if not 0 <= self.expire <= MAX_DATA:
            raise InvalidValueError(f"a reservation cannot expire at {self.expire}")


@dataclasses.dataclass(frozen=True, slots=True)
class HopMessage:
    """What a client and its relay say to each other.

    Attributes:
        type: a `HopType`, or the number of one that we do not know.
        peer: to whom, of a CONNECT.
        reservation, limit: of a STATUS.
        status: a `Status` or an unknown number, of a STATUS.
        reason: why the status is not OK, for a person; empty where the relay does not say. Our own field.
    """

    type: int
    peer: Peer | None = None
    reservation: Reservation | None = None
    limit: Limit | None = None
    status: int | None = None
    reason: str = ""

    def to_bytes(self) -> bytes:
        """The protobuf form."""
        message = circuit_pb2.HopMessage(type=int(self.type))
        if self.reservation is not None:
            message.reservation.expire = self.reservation.expire
            message.reservation.addrs.extend([address.to_bytes() for address in self.reservation.addresses])
            if self.reservation.voucher is not None:
                message.reservation.voucher = self.reservation.voucher
        return _write(message, self)

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Parse the protobuf form.

        Raises:
            CircuitMessageError: not such a message, or a field that its type needs is missing or bad.
        """
        message = circuit_pb2.HopMessage()
        _parse(message, data)
        match message.type:
            case HopType.CONNECT:
                return cls(HopType.CONNECT, peer=_read_peer(message))
            case HopType.STATUS:
                return cls(
                    HopType.STATUS,
                    reservation=_read_reservation(message),
                    limit=_read_limit(message),
                    status=_read_status(message),
                    reason=printable(message.reason, MAX_REASON),
                )
        return cls(HopType.RESERVE if message.type == HopType.RESERVE else message.type)


@dataclasses.dataclass(frozen=True, slots=True)
class StopMessage:
    """What a relay and the target of a circuit say to each other.

    Attributes:
        type: a `StopType`, or the number of one that we do not know.
        peer: from whom, of a CONNECT.
        limit: of a CONNECT.
        status: a `Status` or an unknown number, of a STATUS.
        reason: why the status is not OK, for a person; empty where the target does not say. Our own field.
    """

    type: int
    peer: Peer | None = None
    limit: Limit | None = None
    status: int | None = None
    reason: str = ""

    def to_bytes(self) -> bytes:
        """The protobuf form."""
        return _write(circuit_pb2.StopMessage(type=int(self.type)), self)

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Parse the protobuf form.

        Raises:
            CircuitMessageError: not such a message, or a field that its type needs is missing or bad.
        """
        message = circuit_pb2.StopMessage()
        _parse(message, data)
        match message.type:
            case StopType.CONNECT:
                return cls(StopType.CONNECT, peer=_read_peer(message), limit=_read_limit(message))
            case StopType.STATUS:
                return cls(StopType.STATUS, status=_read_status(message), reason=printable(message.reason, MAX_REASON))
        return cls(message.type)


def encode_message(message: HopMessage | StopMessage) -> bytes:
    """A message behind its length, as it goes over the wire. Addresses that do not fit any more are left out.

    Raises:
        InvalidValueError: it is longer than `MAX_MESSAGE` even without addresses.
    """
    data = message.to_bytes()
    while len(data) > MAX_MESSAGE:
        shorter = _without_last_address(message)
        if shorter is None:
            raise InvalidValueError(f"a message of {len(data)} bytes is longer than {MAX_MESSAGE}")
        message = shorter
        data = message.to_bytes()
    return encode_delimited(data)


def _without_last_address(message: HopMessage | StopMessage) -> HopMessage | StopMessage | None:
    if isinstance(message, HopMessage) and message.reservation is not None and message.reservation.addresses:
        fewer = dataclasses.replace(message.reservation, addresses=message.reservation.addresses[:-1])
        return dataclasses.replace(message, reservation=fewer)
    if message.peer is not None and message.peer.addresses:
        return dataclasses.replace(message, peer=Peer(message.peer.peer_id, message.peer.addresses[:-1]))
    return None


_Protobuf: TypeAlias = circuit_pb2.HopMessage | circuit_pb2.StopMessage


def _write(message: _Protobuf, source: HopMessage | StopMessage) -> bytes:
    """Fill in the fields that both messages have."""
    if source.peer is not None:
        message.peer.id = source.peer.peer_id.multihash
        message.peer.addrs.extend([address.to_bytes() for address in source.peer.addresses])
    if source.limit is not None and not source.limit.unlimited:
        message.limit.duration = source.limit.duration
        message.limit.data = source.limit.data
    if source.status is not None:
        message.status = int(source.status)
    if source.reason:
        message.reason = source.reason[:MAX_REASON].encode("utf-8", "replace")
    return message.SerializeToString()


def _parse(message: _Protobuf, data: bytes) -> None:
    if len(data) > MAX_MESSAGE:
        raise CircuitMessageError(f"a message of {len(data)} bytes is longer than {MAX_MESSAGE}")
    try:
        message.ParseFromString(data)
    except DecodeError:
        raise CircuitMessageError("not a message of circuit relay v2") from None
    if not message.HasField("type"):
        raise CircuitMessageError("a message of circuit relay v2 without a type")


def _read_peer(message: _Protobuf) -> Peer:
    if not message.HasField("peer"):
        raise CircuitMessageError("a CONNECT without a peer")
    try:
        return Peer(PeerId(message.peer.id))  # to parse addresses that nobody uses would be work for a stranger
    except PeerIdError as error:
        raise CircuitMessageError(f"a CONNECT without a usable peer id: {error}") from None


def _read_limit(message: _Protobuf) -> Limit | None:
    """The limit; a present one that limits nothing stays present, because it marks the circuit as limited in go."""
    return Limit(message.limit.duration, message.limit.data) if message.HasField("limit") else None


def _read_reservation(message: circuit_pb2.HopMessage) -> Reservation | None:
    if not message.HasField("reservation"):
        return None
    found = message.reservation
    if not found.HasField("expire"):
        raise CircuitMessageError("a reservation that does not say when it expires")
    voucher = found.voucher if found.HasField("voucher") else None
    return Reservation(found.expire, parse_addresses(found.addrs, MAX_ADDRESSES), voucher)


def _read_status(message: _Protobuf) -> int:
    if not message.HasField("status"):
        raise CircuitMessageError("a STATUS without a status")
    try:
        return Status(message.status)
    except ValueError:
        return message.status


@dataclasses.dataclass(frozen=True, slots=True)
class Refusal:
    """Why a reservation or a circuit was refused.

    Attributes:
        status: a `Status`, or an unknown number that a peer sent.
        reason: for a person; empty where a peer did not say.
        rule: our own decision's rule for logs and counters, such as `reservations-per-ip`; empty for a peer's refusal.
    """

    status: int
    reason: str = ""
    rule: str = ""

    def __str__(self) -> str:
        return f"{status_name(self.status)}: {self.reason}" if self.reason else status_name(self.status)
