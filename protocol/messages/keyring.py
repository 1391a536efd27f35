"""Messages of the keyring: the only process that holds the identity key.

The keyring never signs bytes that somebody else composed: each request names one purpose of a libp2p
specification, and the keyring builds what is signed for it itself.
"""

from __future__ import annotations

from protocol.messages.codec import Message, Request, message
from protocol.multiaddr import Multiaddr
from protocol.peer_id import PeerId


@message("keyring.identity")
class Identity(Message):
    """Who this node is. `public_key` is the libp2p protobuf form of the Ed25519 public key."""

    peer_id: PeerId
    public_key: bytes


@message("keyring.read-identity")
class ReadIdentity(Request[Identity]):
    """Ask who this node is."""


@message("keyring.signature")
class Signature(Message):
    """A signature (64 bytes, Ed25519) and the public key (libp2p protobuf form) that verifies it."""

    public_key: bytes
    signature: bytes


@message("keyring.sign-noise-static-key")
class SignNoiseStaticKey(Request[Signature]):
    """Sign `noise-libp2p-static-key:` + the 32-byte X25519 public key (libp2p noise spec, "The libp2p signature")."""

    static_key: bytes


@message("keyring.signed-peer-record")
class SignedPeerRecord(Message):
    """A signed envelope (RFC 0002) that holds this node's peer record (RFC 0003)."""

    envelope: bytes


@message("keyring.sign-peer-record")
class SignPeerRecord(Request[SignedPeerRecord]):
    """Make and sign this node's peer record with these addresses. `seq` must grow with each change."""

    addresses: tuple[Multiaddr, ...]
    seq: int


@message("keyring.signed-relay-voucher")
class SignedRelayVoucher(Message):
    """A signed envelope (RFC 0002) that holds a reservation voucher (libp2p specs, relay/circuit-v2.md)."""

    envelope: bytes


@message("keyring.sign-relay-voucher")
class SignRelayVoucher(Request[SignedRelayVoucher]):
    """Make and sign a voucher: this node relays for `peer` until `expiration`, in seconds since the Unix epoch."""

    peer: PeerId
    expiration: int
