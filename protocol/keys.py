"""Identity keys: their libp2p protobuf forms, signing and verifying (libp2p specs, peer-ids/peer-ids.md).

Peers may have Ed25519, secp256k1, ECDSA or RSA keys, and all four are verified. Private keys stand here as
values with pure functions; the keyring is the only process that ever makes one.
"""

from __future__ import annotations

import enum
import hmac
from typing import Any, ClassVar, Final, Self

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from google.protobuf.message import DecodeError

from protocol.errors import InvalidValueError, ProtocolError
from protocol.pb import crypto_pb2
from protocol.peer_id import PeerId

MAX_PUBLIC_KEY: Final = 2048
"""The longest public key (protobuf form) in bytes that is looked at; RSA with 8192 bits takes about 1,070."""

MAX_PRIVATE_KEY: Final = 8192
"""The longest private key (protobuf form) in bytes that is looked at; RSA with 8192 bits takes about 4,660."""

_MAX_SIGNATURE: Final = 1024
_RSA_BITS: Final = range(2048, 8192 + 1)  # what go-libp2p takes: less is weak, more costs the verifier too much
_RSA_MAX_EXPONENT: Final = (1 << 31) - 1  # likewise; a verification with a long exponent takes 20 ms instead of 0.1
_ED25519_KEY: Final = 32
_ECDSA_CURVES: Final = (ec.SECP256R1, ec.SECP384R1, ec.SECP521R1)
_SECP256K1_ORDER: Final = 0xFFFFFFFF_FFFFFFFF_FFFFFFFF_FFFFFFFE_BAAEDCE6_AF48A03B_BFD25E8C_D0364141


class KeyFormatError(InvalidValueError):
    """Bytes are not a key in the form that libp2p writes, or a key of a kind that is not taken."""

    code: ClassVar[str] = "bad-key"


class BadSignatureError(ProtocolError):
    """A signature does not belong to this message and key."""

    code: ClassVar[str] = "bad-signature"


class KeyType(enum.IntEnum):
    """The kinds of keys, with their numbers on the wire."""

    RSA = 0
    ED25519 = 1
    SECP256K1 = 2
    ECDSA = 3


_Public = ed25519.Ed25519PublicKey | ec.EllipticCurvePublicKey | rsa.RSAPublicKey
_Private = ed25519.Ed25519PrivateKey | ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey


class PublicKey:
    """A peer's public key. Immutable; equal when kind and bytes are.

    Attributes:
        key_type: what kind of key.
        data: the key as its kind is written: 32 bytes (Ed25519), 33 bytes compressed (secp256k1), DER (ECDSA, RSA).
    """

    __slots__ = ("_key", "data", "key_type")
    key_type: KeyType
    data: bytes
    _key: _Public

    def __init__(self, key_type: KeyType, data: bytes) -> None:
        """Check and keep a key.

        Raises:
            KeyFormatError: the bytes are not a key of this kind, or one too weak or too large to be taken.
        """
        object.__setattr__(self, "key_type", key_type)
        object.__setattr__(self, "data", bytes(data))
        object.__setattr__(self, "_key", _load_public(key_type, self.data))

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"PublicKey is immutable; cannot set {name}")

    @classmethod
    def from_protobuf(cls, data: bytes) -> Self:
        """Parse the protobuf form, of which a key has exactly one: the peer id is the hash of these bytes.

        Raises:
            KeyFormatError: not a `PublicKey` message in its deterministic form, or not a key that is taken.
        """
        key = cls(*_parse(crypto_pb2.PublicKey(), data, MAX_PUBLIC_KEY, "public key"))
        if key.to_protobuf() != data:
            raise KeyFormatError("a public key is not in its deterministic protobuf form")
        return key

    def to_protobuf(self) -> bytes:
        """The protobuf form: fields in order, varints in their shortest form, nothing else."""
        return crypto_pb2.PublicKey(Type=_PB_TYPES[self.key_type], Data=self.data).SerializeToString()

    @property
    def peer_id(self) -> PeerId:
        """The peer that has this key."""
        return PeerId.from_public_key(self.to_protobuf())

    def verify(self, message: bytes, signature: bytes) -> None:
        """Return if the signature over this message was made with the private half of this key.

        Raises:
            BadSignatureError: it was not.
        """
        key = self._key
        if len(signature) > _MAX_SIGNATURE:
            raise BadSignatureError(f"a signature of {len(signature)} bytes")
        try:
            if isinstance(key, ed25519.Ed25519PublicKey):
                key.verify(signature, message)
            elif isinstance(key, rsa.RSAPublicKey):
                key.verify(signature, message, padding.PKCS1v15(), hashes.SHA256())
            else:
                key.verify(signature, message, ec.ECDSA(hashes.SHA256()))
        except InvalidSignature:
            raise BadSignatureError(f"the signature of {self.peer_id} is wrong") from None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PublicKey) and other.key_type == self.key_type and other.data == self.data

    def __hash__(self) -> int:
        return hash((self.key_type, self.data))

    def __repr__(self) -> str:
        return f"PublicKey({self.key_type.name}, {self.peer_id})"


class PrivateKey:
    """A private key. Its secret is in no text form; two are compared in constant time.

    Attributes:
        key_type: what kind of key.
        public_key: the public half.
    """

    __slots__ = ("_data", "_key", "key_type", "public_key")
    key_type: KeyType
    public_key: PublicKey
    _data: bytes
    _key: _Private

    def __init__(self, key_type: KeyType, data: bytes) -> None:
        """Check and keep a key whose bytes are written as its kind is.

        Raises:
            KeyFormatError: the bytes are not a private key of this kind. The text never holds any of them.
        """
        key, data = _load_private(key_type, data)
        object.__setattr__(self, "key_type", key_type)
        object.__setattr__(self, "_data", data)
        object.__setattr__(self, "_key", key)
        object.__setattr__(self, "public_key", PublicKey(key_type, _public_data(key_type, key)))

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"PrivateKey is immutable; cannot set {name}")

    @classmethod
    def from_seed(cls, seed: bytes) -> Self:
        """The Ed25519 key with this secret of 32 bytes, which the caller takes from the system's random source.

        Raises:
            KeyFormatError: not 32 bytes.
        """
        if len(seed) != _ED25519_KEY:
            raise KeyFormatError("an Ed25519 secret has 32 bytes")
        public = ed25519.Ed25519PrivateKey.from_private_bytes(seed).public_key().public_bytes_raw()
        return cls(KeyType.ED25519, seed + public)

    @classmethod
    def from_protobuf(cls, data: bytes) -> Self:
        """Parse the protobuf form, which is what a key file holds.

        Raises:
            KeyFormatError: not a `PrivateKey` message, or the key in it is broken.
        """
        return cls(*_parse(crypto_pb2.PrivateKey(), data, MAX_PRIVATE_KEY, "private key"))

    def to_protobuf(self) -> bytes:
        """The protobuf form for the key file: 68 bytes for Ed25519, whichever form it was read from."""
        return crypto_pb2.PrivateKey(Type=_PB_TYPES[self.key_type], Data=self._data).SerializeToString()

    @property
    def peer_id(self) -> PeerId:
        """The peer that this key makes us."""
        return self.public_key.peer_id

    def sign(self, message: bytes) -> bytes:
        """A signature over the message: 64 bytes for Ed25519, PKCS #1 v1.5 with SHA-256 for RSA, DER otherwise."""
        key = self._key
        if isinstance(key, ed25519.Ed25519PrivateKey):
            return key.sign(message)
        if isinstance(key, rsa.RSAPrivateKey):
            return key.sign(message, padding.PKCS1v15(), hashes.SHA256())
        signature = key.sign(message, ec.ECDSA(hashes.SHA256()))
        if self.key_type is KeyType.SECP256K1:
            # BIP 62: of the two signatures s and -s only the lower is taken by some verifiers.
            r, s = decode_dss_signature(signature)
            signature = encode_dss_signature(r, min(s, _SECP256K1_ORDER - s))
        return signature

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, PrivateKey)
            and other.key_type == self.key_type
            and hmac.compare_digest(other._data, self._data)
        )

    def __hash__(self) -> int:
        return hash(self.public_key)

    def __repr__(self) -> str:
        return f"PrivateKey({self.key_type.name}, {self.peer_id}, secret not shown)"

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError("a private key does not leave its process")


_PB_TYPES: Final = {
    KeyType.RSA: crypto_pb2.RSA,
    KeyType.ED25519: crypto_pb2.Ed25519,
    KeyType.SECP256K1: crypto_pb2.Secp256k1,
    KeyType.ECDSA: crypto_pb2.ECDSA,
}


def _parse(
    into: crypto_pb2.PublicKey | crypto_pb2.PrivateKey, data: bytes, longest: int, what: str
) -> tuple[KeyType, bytes]:
    if len(data) > longest:
        raise KeyFormatError(f"a {what} of {len(data)} bytes is longer than {longest}")
    try:
        into.ParseFromString(data)
    except DecodeError:
        raise KeyFormatError(f"not a {what} in its protobuf form") from None
    return KeyType(into.Type), into.Data


def _load_public(key_type: KeyType, data: bytes) -> _Public:
    # libp2p writes secp256k1 keys compressed; taking both forms would give a key two peer ids.
    if key_type is KeyType.SECP256K1 and len(data) != 33:
        raise KeyFormatError("a secp256k1 public key has 33 bytes")
    try:
        match key_type:
            case KeyType.ED25519:
                return ed25519.Ed25519PublicKey.from_public_bytes(data)
            case KeyType.SECP256K1:
                return ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256K1(), data)
            case KeyType.ECDSA | KeyType.RSA:
                key = serialization.load_der_public_key(data)
    except (ValueError, UnsupportedAlgorithm):
        raise KeyFormatError(f"not a public key of the kind {key_type.name}") from None
    if key_type is KeyType.RSA and isinstance(key, rsa.RSAPublicKey):
        if key.key_size not in _RSA_BITS:
            raise KeyFormatError(f"an RSA key has {_RSA_BITS[0]} to {_RSA_BITS[-1]} bits, not {key.key_size}")
        if key.public_numbers().e > _RSA_MAX_EXPONENT:
            raise KeyFormatError("an RSA key whose public exponent has more than 31 bits")
        return key
    if key_type is KeyType.ECDSA and isinstance(key, ec.EllipticCurvePublicKey):
        if not isinstance(key.curve, _ECDSA_CURVES):
            raise KeyFormatError(f"an ECDSA key on the curve {key.curve.name}")
        return key
    raise KeyFormatError(f"not a public key of the kind {key_type.name}")


def _load_private(key_type: KeyType, data: bytes) -> tuple[_Private, bytes]:
    if key_type is KeyType.ED25519:
        return _load_ed25519(data)
    if key_type is KeyType.SECP256K1 and len(data) != 32:
        raise KeyFormatError("a secp256k1 private key has 32 bytes")
    try:
        match key_type:
            case KeyType.SECP256K1:
                return ec.derive_private_key(int.from_bytes(data, "big"), ec.SECP256K1()), data
            case KeyType.ECDSA | KeyType.RSA:
                key = serialization.load_der_private_key(data, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        # `from None`: the text and the traceback of the cause could show parts of the secret.
        raise KeyFormatError(f"not a private key of the kind {key_type.name}") from None
    if key_type is KeyType.RSA and isinstance(key, rsa.RSAPrivateKey):
        return key, data
    if key_type is KeyType.ECDSA and isinstance(key, ec.EllipticCurvePrivateKey):
        return key, data
    raise KeyFormatError(f"not a private key of the kind {key_type.name}")


def _load_ed25519(data: bytes) -> tuple[ed25519.Ed25519PrivateKey, bytes]:
    """The key and its 64-byte form. Old libp2p wrote 96 bytes: secret, public key, public key once more."""
    if len(data) not in {64, 96}:
        raise KeyFormatError("an Ed25519 private key has 64 bytes (or 96 in its old form)")
    secret, public, again = data[:32], data[32:64], data[64:]
    if again not in {b"", public}:
        raise KeyFormatError("the two public halves in an old Ed25519 private key differ")
    key = ed25519.Ed25519PrivateKey.from_private_bytes(secret)
    if key.public_key().public_bytes_raw() != public:
        raise KeyFormatError("the public half in an Ed25519 private key does not belong to its secret half")
    return key, secret + public


def _public_data(key_type: KeyType, key: _Private) -> bytes:
    if isinstance(key, ed25519.Ed25519PrivateKey):
        return key.public_key().public_bytes_raw()
    public = key.public_key()
    if key_type is KeyType.SECP256K1:
        return public.public_bytes(serialization.Encoding.X962, serialization.PublicFormat.CompressedPoint)
    return public.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
