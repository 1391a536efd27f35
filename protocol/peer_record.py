"""Peer records: a peer's own word on where it can be reached, signed (libp2p specs, RFC 0003).

The RFC's text names another domain and payload type; go-, js- and rust-libp2p all use the ones below.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable
from typing import ClassVar, Final

from google.protobuf.message import DecodeError

from protocol.errors import ProtocolError
from protocol.keys import PrivateKey
from protocol.multiaddr import Multiaddr, MultiaddrError
from protocol.pb import peer_record_pb2
from protocol.peer_id import PeerId, PeerIdError
from protocol.signed_envelope import open_envelope, seal_envelope

DOMAIN: Final = "libp2p-peer-record"
"""The domain that peer records are signed for."""

PAYLOAD_TYPE: Final = b"\x03\x01"
"""The payload type: the multicodec `libp2p-peer-record` (0x0301), as two plain bytes and not as a varint."""

MAX_ADDRESSES: Final = 128
"""The most addresses that are taken from a record; further ones are left out."""

LOOKED_AT: Final = 4
"""Of so many addresses one may be taken: a peer with all transports there are has about as many that are unknown."""

MAX_SEQ: Final = (1 << 64) - 1
"""The largest sequence number."""


class PeerRecordError(ProtocolError):
    """A signed envelope holds no peer record of its signer."""

    code: ClassVar[str] = "bad-peer-record"


@dataclasses.dataclass(frozen=True, slots=True)
class PeerRecord:
    """Where a peer says that it can be reached.

    Attributes:
        peer_id: whose record.
        seq: 0 to 2**64-1; grows with every change and means nothing else.
        addresses: in the peer's order. When parsed: without those that are unknown here, at most `MAX_ADDRESSES`.
    """

    peer_id: PeerId
    seq: int
    addresses: tuple[Multiaddr, ...]

    def to_bytes(self) -> bytes:
        """The protobuf form, which is the payload of the envelope."""
        return peer_record_pb2.PeerRecord(
            peer_id=self.peer_id.multihash,
            seq=self.seq,
            addresses=[
                peer_record_pb2.PeerRecord.AddressInfo(multiaddr=address.to_bytes()) for address in self.addresses
            ],
        ).SerializeToString()

    def replaces(self, previous: PeerRecord | None) -> bool:
        """Whether this record is to be kept in place of the previous one: same peer, and a greater `seq`."""
        return previous is None or (previous.peer_id == self.peer_id and self.seq > previous.seq)


def seal_peer_record(key: PrivateKey, addresses: Iterable[Multiaddr], seq: int) -> bytes:
    """A signed envelope with the record of the peer that has this key. The keyring calls it.

    Raises:
        PeerRecordError: `seq` is not a 64-bit number.
    """
    if not 0 <= seq <= MAX_SEQ:
        raise PeerRecordError(f"a peer record's seq is a number of 64 bits, not {seq}")
    record = PeerRecord(key.peer_id, seq, tuple(addresses))
    return seal_envelope(key, DOMAIN, PAYLOAD_TYPE, record.to_bytes()).to_bytes()


def open_peer_record(envelope: bytes) -> PeerRecord:
    """Verify a signed envelope and parse the peer record in it, which must be the signer's own.

    Raises:
        EnvelopeError, LimitExceededError: see `protocol.signed_envelope.open_envelope`.
        BadSignatureError: the signature is wrong; the payload was not looked at.
        PeerRecordError: the payload is not a peer record, or the record of another peer than the signer.
    """
    opened = open_envelope(envelope, DOMAIN, PAYLOAD_TYPE)
    message = peer_record_pb2.PeerRecord()
    try:
        message.ParseFromString(opened.payload)
        peer = PeerId(message.peer_id)
    except (DecodeError, PeerIdError):
        raise PeerRecordError("a signed envelope holds no peer record") from None
    signer = opened.public_key.peer_id
    if peer != signer:
        raise PeerRecordError(f"{signer} signed a record of {peer}")
    return PeerRecord(peer, message.seq, parse_addresses(info.multiaddr for info in message.addresses))


def parse_addresses(raw: Iterable[bytes], limit: int = MAX_ADDRESSES) -> tuple[Multiaddr, ...]:
    """The addresses among these byte forms, in order and once each, at most so many.

    A peer may know transports that we do not, so an address that cannot be parsed is left out, not refused. To look at
    one costs more than to send it, so no more are looked at than `LOOKED_AT` times as many as are taken.
    """
    found: dict[Multiaddr, None] = {}
    for data in itertools.islice(raw, limit * LOOKED_AT):
        if len(found) == limit:
            break
        try:
            found[Multiaddr.from_bytes(data)] = None
        except MultiaddrError:
            continue
    return tuple(found)
