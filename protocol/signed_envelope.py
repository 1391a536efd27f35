"""Signed envelopes: a payload, what kind it is, who signed it (libp2p specs, RFC 0002).

A signature counts for one domain only: the domain is signed along with the payload but not sent, so what was
signed for one purpose cannot be shown for another.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Final

from google.protobuf.message import DecodeError

from protocol.errors import LimitExceededError, ProtocolError
from protocol.keys import KeyFormatError, PrivateKey, PublicKey
from protocol.pb import envelope_pb2
from protocol.varint import encode_varint

MAX_ENVELOPE: Final = 16 * 1024
"""The longest envelope in bytes that is looked at; peers cap the messages that carry one at 8 KiB."""


class EnvelopeError(ProtocolError):
    """Bytes are not a signed envelope of the expected kind. Wrong signatures are `BadSignatureError`."""

    code: ClassVar[str] = "bad-envelope"


class EnvelopeTypeError(EnvelopeError):
    """A signed envelope, but of something else than was expected."""

    code: ClassVar[str] = "other-envelope"


@dataclasses.dataclass(frozen=True, slots=True)
class Envelope:
    """An envelope whose signature was verified (or just made)."""

    public_key: PublicKey
    payload_type: bytes
    payload: bytes
    signature: bytes

    def to_bytes(self) -> bytes:
        """The protobuf form."""
        return envelope_pb2.Envelope(
            public_key=self.public_key.to_protobuf(),
            payload_type=self.payload_type,
            payload=self.payload,
            signature=self.signature,
        ).SerializeToString()


def signing_buffer(domain: str, payload_type: bytes, payload: bytes) -> bytes:
    """What is signed (RFC 0002, "Signature Production / Verification"): each part behind its length as a varint."""
    return b"".join([encode_varint(len(part)) + part for part in (domain.encode("utf-8"), payload_type, payload)])


def seal_envelope(key: PrivateKey, domain: str, payload_type: bytes, payload: bytes) -> Envelope:
    """Sign a payload for this domain."""
    signature = key.sign(signing_buffer(domain, payload_type, payload))
    return Envelope(key.public_key, payload_type, payload, signature)


def open_envelope(data: bytes, domain: str, payload_type: bytes) -> Envelope:
    """Parse an envelope of this payload type and verify its signature for this domain.

    Raises:
        EnvelopeError: not an envelope, or with a key that is not taken.
        EnvelopeTypeError: of another payload type.
        BadSignatureError: the signature does not belong to the payload, domain and key.
        LimitExceededError: longer than `MAX_ENVELOPE`.
    """
    if len(data) > MAX_ENVELOPE:
        raise LimitExceededError(f"a signed envelope of {len(data)} bytes is longer than {MAX_ENVELOPE}")
    message = envelope_pb2.Envelope()
    try:
        message.ParseFromString(data)
        public_key = PublicKey.from_protobuf(message.public_key)
    except DecodeError:
        raise EnvelopeError("not a signed envelope") from None
    except KeyFormatError as error:
        raise EnvelopeError(f"a signed envelope without a usable key: {error}") from None
    if message.payload_type != payload_type:
        raise EnvelopeTypeError(
            f"a signed envelope of the type {message.payload_type[:16].hex()}, not {payload_type.hex()}"
        )
    public_key.verify(signing_buffer(domain, payload_type, message.payload), message.signature)
    return Envelope(public_key, payload_type, message.payload, message.signature)
