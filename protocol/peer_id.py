"""Peer ids: the multihash of a peer's public key (libp2p specs, peer-ids/peer-ids.md)."""

from __future__ import annotations

import functools
import hashlib
from typing import Any, ClassVar, Final, Self

from protocol.errors import InvalidValueError
from protocol.multibase import MultibaseError, decode_base58, decode_multibase, encode_base58, encode_multibase_base32
from protocol.varint import VarintError, decode_varint, encode_varint

MAX_INLINE_KEY: Final = 42
"""Public keys (protobuf form) up to this many bytes stand in the peer id itself; longer ones are hashed."""

_IDENTITY: Final = 0x00
_SHA2_256: Final = 0x12
_CID_VERSION_1: Final = 0x01
_LIBP2P_KEY: Final = 0x72
_INLINE_KEYS: Final = {
    bytes.fromhex("0801 1220"): (32, "an Ed25519 key"),
    bytes.fromhex("0802 1221"): (33, "a secp256k1 key"),
}
"""How the protobuf form of each key that is short enough to stand in a peer id begins, and the bytes that follow."""
_SHORT_HEAD: Final = 8
_SHORT_TAIL: Final = 6


class PeerIdError(InvalidValueError):
    """Bytes or a text are not a peer id."""

    code: ClassVar[str] = "bad-peer-id"


class PeerId:
    """A peer's identity. Immutable, hashable, ordered by its bytes; its text is base58btc (`12D3Koo…`, `Qm…`).

    Attributes:
        multihash: the raw multihash, 34 to 44 bytes for the keys in use.
    """

    __slots__ = ("_hash", "_text", "multihash")
    multihash: bytes
    _hash: int
    _text: str | None

    def __init__(self, multihash: bytes) -> None:
        """Check and keep a multihash.

        Raises:
            PeerIdError: not a well-formed multihash, or neither `identity` of a public key nor `sha2-256`.
        """
        _check_multihash(multihash)
        multihash = bytes(multihash)
        object.__setattr__(self, "multihash", multihash)
        object.__setattr__(self, "_hash", hash(multihash))
        object.__setattr__(self, "_text", None)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"PeerId is immutable; cannot set {name}")

    @classmethod
    def from_public_key(cls, public_key: bytes) -> Self:
        """The peer id of a public key in its libp2p protobuf form (see `protocol.keys.PublicKey.to_protobuf`).

        What is too long to stand in the id is hashed as it is; whether that is a key is for `protocol.keys` to say.

        Raises:
            PeerIdError: the bytes are no more than 42, and no key of a type that is so short.
        """
        if len(public_key) <= MAX_INLINE_KEY:
            return cls(bytes((_IDENTITY, len(public_key))) + public_key)
        digest = hashlib.sha256(public_key).digest()
        return cls(bytes((_SHA2_256, len(digest))) + digest)

    @classmethod
    def from_text(cls, text: str) -> Self:
        """Parse either text form: bare base58btc (`12D3Koo…`, `Qm…`) or a CIDv1 in multibase (`bafz…`, `k51…`).

        Raises:
            PeerIdError: neither of these.
        """
        try:
            if text.startswith(("1", "Qm")):
                return cls(decode_base58(text))
            return cls(_multihash_of_cid(decode_multibase(text)))
        except (MultibaseError, VarintError) as error:
            raise PeerIdError(f"{_excerpt(text)} is not a peer id: {error}") from None
        except PeerIdError as error:
            raise PeerIdError(f"{_excerpt(text)} is not a peer id: {error}") from None

    @classmethod
    def from_wire(cls, value: Any) -> PeerId:
        """The peer id with this multihash.

        Raises:
            InvalidValueError: not the bytes of a multihash.
        """
        if not isinstance(value, bytes):
            raise PeerIdError("a peer id is bytes")
        return _from_own_multihash(value)

    def to_wire(self) -> bytes:
        """The multihash."""
        return self.multihash

    def to_cid(self) -> str:
        """The second text form: a CIDv1 with the codec `libp2p-key` in base32 (`bafz…`)."""
        return encode_multibase_base32(bytes((_CID_VERSION_1, _LIBP2P_KEY)) + self.multihash)

    @property
    def short(self) -> str:
        """A text for people and tables, such as `12D3KooW…J5xKbX`: not unique, never to be parsed."""
        text = str(self)
        return f"{text[:_SHORT_HEAD]}…{text[-_SHORT_TAIL:]}"

    @property
    def public_key(self) -> bytes | None:
        """The public key (libp2p protobuf form) where the id holds it, as for Ed25519; None where it is hashed."""
        return self.multihash[2:] if self.multihash[0] == _IDENTITY else None

    def __str__(self) -> str:
        text = self._text
        if text is None:
            text = encode_base58(self.multihash)
            object.__setattr__(self, "_text", text)
        return text

    def __repr__(self) -> str:
        return f"PeerId({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PeerId) and other.multihash == self.multihash

    def __lt__(self, other: PeerId) -> bool:
        return self.multihash < other.multihash

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple[type[PeerId], tuple[bytes]]:
        return type(self), (self.multihash,)


def _check_multihash(multihash: bytes) -> None:
    # Both codes and both lengths are below 128, hence single-byte varints; anything else is refused with them.
    if len(multihash) < 2:
        raise PeerIdError("a multihash has at least two bytes")
    code, length = multihash[0], multihash[1]
    if length != len(multihash) - 2:
        raise PeerIdError("the multihash's length does not match its digest")
    if code == _SHA2_256:
        if length != hashlib.sha256().digest_size:
            raise PeerIdError("a sha2-256 digest has 32 bytes")
    elif code == _IDENTITY:
        _check_inline_key(multihash[2:])
    else:
        raise PeerIdError(f"peer ids use the multihashes identity and sha2-256, not 0x{code:02x}")


def _check_inline_key(key: bytes) -> None:
    # Such an id is made by taking the key as it is, so one that holds no key belongs to nobody: a slip of the pen.
    if not 1 <= len(key) <= MAX_INLINE_KEY:
        raise PeerIdError(f"a key that stands in its peer id has 1 to {MAX_INLINE_KEY} bytes")
    expected = _INLINE_KEYS.get(key[:4])
    if expected is None:
        raise PeerIdError("it holds no public key; has a part of it been lost?")
    length, kind = expected
    if len(key) != 4 + length:
        raise PeerIdError(f"{kind} has {length} bytes, not {len(key) - 4}; has a part of it been lost?")


def _multihash_of_cid(cid: bytes) -> bytes:
    version, offset = decode_varint(cid)
    if version != _CID_VERSION_1:
        raise PeerIdError(f"a CID of version {version}")
    codec, offset = decode_varint(cid, offset)
    if codec != _LIBP2P_KEY:
        raise PeerIdError(f"a CID with the codec {encode_varint(codec).hex()} instead of libp2p-key")
    return cid[offset:]


def _excerpt(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:80] + "…")


@functools.lru_cache(maxsize=1024)
def _from_own_multihash(multihash: bytes) -> PeerId:
    # Actors tell each other the same few peers again and again, with every new stream.
    return PeerId(multihash)
