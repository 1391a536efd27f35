"""Reservation vouchers: a relay's signed word that it serves a peer (libp2p specs, relay/circuit-v2.md)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Final

from google.protobuf.message import DecodeError

from protocol.errors import ProtocolError
from protocol.keys import PrivateKey
from protocol.pb import circuit_pb2
from protocol.peer_id import PeerId, PeerIdError
from protocol.signed_envelope import open_envelope, seal_envelope

DOMAIN: Final = "libp2p-relay-rsvp"
"""The domain that vouchers are signed for."""

PAYLOAD_TYPE: Final = b"\x03\x02"
"""The payload type: the multicodec 0x0302 as two plain bytes and not as a varint, as all implementations send it."""


class VoucherError(ProtocolError):
    """A signed envelope is not a voucher of this relay for this peer, or not any more."""

    code: ClassVar[str] = "bad-voucher"


class VoucherExpiredError(VoucherError):
    """A voucher was good, but its time has passed."""

    code: ClassVar[str] = "voucher-expired"


@dataclasses.dataclass(frozen=True, slots=True)
class Voucher:
    """What a relay testifies.

    Attributes:
        relay: who serves.
        peer: who is served.
        expiration: until when, in seconds since the Unix epoch by the relay's clock.
    """

    relay: PeerId
    peer: PeerId
    expiration: int

    def to_bytes(self) -> bytes:
        """The canonical protobuf form: every field, in the order of their numbers, and nothing else."""
        return circuit_pb2.Voucher(
            relay=self.relay.multihash, peer=self.peer.multihash, expiration=self.expiration
        ).SerializeToString(deterministic=True)

    def check_expiration(self, now_wall: float) -> None:
        """Refuse a voucher whose time has passed.

        Raises:
            VoucherExpiredError: `now_wall`, in seconds since the Unix epoch, is not before `expiration`.
        """
        if not now_wall < self.expiration:
            raise VoucherExpiredError(f"the voucher of {self.relay} for {self.peer} expired at {self.expiration}")


def seal_voucher(key: PrivateKey, peer: PeerId, expiration: int) -> bytes:
    """A signed envelope with a voucher of the relay that has this key. The keyring calls it."""
    voucher = Voucher(key.peer_id, peer, expiration)
    return seal_envelope(key, DOMAIN, PAYLOAD_TYPE, voucher.to_bytes()).to_bytes()


def open_voucher(envelope: bytes, *, relay: PeerId, peer: PeerId) -> Voucher:
    """Verify a voucher that this relay should have signed for this peer.

    Its expiration is left to `Voucher.check_expiration`: a client whose clock is wrong has its reservation still.

    Raises:
        EnvelopeError, LimitExceededError: see `protocol.signed_envelope.open_envelope`.
        BadSignatureError: the signature is wrong; the payload was not looked at.
        VoucherError: the payload is not a voucher, or one of another relay, for another peer, or of another's word.
    """
    opened = open_envelope(envelope, DOMAIN, PAYLOAD_TYPE)
    message = circuit_pb2.Voucher()
    try:
        message.ParseFromString(opened.payload)
        voucher = Voucher(PeerId(message.relay), PeerId(message.peer), message.expiration)
    except (DecodeError, PeerIdError):
        raise VoucherError("a signed envelope holds no reservation voucher") from None
    signer = opened.public_key.peer_id
    if signer != voucher.relay:
        raise VoucherError(f"{signer} signed a voucher of {voucher.relay}")
    if voucher.relay != relay:
        raise VoucherError(f"a voucher of {voucher.relay}, not of the relay {relay}")
    if voucher.peer != peer:
        raise VoucherError(f"a voucher for {voucher.peer}, not for {peer}")
    if not message.HasField("expiration"):
        raise VoucherError("a voucher that does not say when it expires")
    return voucher
