"""Noise_XX_25519_ChaChaPoly_SHA256 as libp2p uses it (libp2p specs, noise/README.md; noiseprotocol.org revision 34).

Theory of operation. Three messages, each behind two bytes of length:

    -> e                       the initiator's ephemeral key, in clear, empty payload
    <- e, ee, s, es   payload  the responder's ephemeral and (encrypted) static key, then its payload
    -> s, se          payload  the initiator's (encrypted) static key, then its payload

A payload holds the peer's libp2p public key, that key's signature over the static key just proved, and extensions.
Of those only `stream_muxers` means something to us: the names of muxers in order of preference. When both sides send
it, the muxer is the first of the initiator's that the responder has too, and without one the handshake fails (libp2p
specs, connections/inlined-muxer-negotiation.md). When one side does not, multistream-select finds the muxer afterwards.

    initiator:  AWAIT_E_S -> DONE          responder:  AWAIT_E -> AWAIT_S -> DONE

Every failure is final. Afterwards each direction has a :class:`CipherState` that works in place.
"""

from __future__ import annotations

import enum
import hashlib
import hmac
import struct
from typing import Final, NamedTuple

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from google.protobuf.message import DecodeError

from protocol import keys
from protocol.errors import ProtocolError
from protocol.keys import KeyFormatError, PublicKey
from protocol.pb.noise_pb2 import NoiseHandshakePayload
from protocol.peer_id import PeerId

PROTOCOL_NAME: Final = b"Noise_XX_25519_ChaChaPoly_SHA256"
SIGNATURE_PREFIX: Final = b"noise-libp2p-static-key:"
KEY_LENGTH: Final = 32
TAG_LENGTH: Final = 16
LENGTH_PREFIX: Final = 2

MAX_MESSAGE: Final = 65_535
"""Bytes of a transport message as it travels, without its length prefix."""

MAX_PLAINTEXT: Final = MAX_MESSAGE - TAG_LENGTH

MAX_HANDSHAKE_MESSAGE: Final = 8_192
"""Room for an 8,192-bit RSA key with its signature and some extensions, and not more: these bytes are a stranger's."""

MAX_NONCE: Final = 2**64 - 2
"""The last nonce that a cipher state may use (Noise, section 5.1: 2^64-1 is reserved)."""

_MAX_MUXERS: Final = 16
_NONCE: Final = struct.Struct("<4xQ")
_LENGTH: Final = struct.Struct(">H")


class NoiseError(ProtocolError):
    """The peer's Noise handshake or transport messages are wrong. The connection must be closed."""

    code = "noise"


class BadSignatureError(NoiseError):
    """The peer's identity key did not sign its static key."""

    code = "noise-bad-signature"


class WrongPeerError(NoiseError):
    """The peer proved an identity, but not the one that was expected."""

    code = "wrong-peer"


class NoMuxerError(NoiseError):
    """Both sides named their muxers, and none is common."""

    code = "no-common-muxer"


class NonceExhaustedError(NoiseError):
    """2^64-1 messages went over one key; the connection must end."""

    code = "noise-nonce-exhausted"


class Identity(NamedTuple):
    """What proves who we are: made once per static key with the keyring's `SignNoiseStaticKey`.

    Attributes:
        public_key: the libp2p protobuf form.
        signature: over `noise-libp2p-static-key:` + the raw static public key.
    """

    public_key: bytes
    signature: bytes


class CipherState:
    """One direction's key and nonce (Noise, section 5.1).

    Attributes:
        nonce: of the next message.
    """

    __slots__ = ("_cipher", "nonce")
    nonce: int

    def __init__(self, key: bytes) -> None:
        self._cipher = ChaCha20Poly1305(key)
        self.nonce = 0

    def seal(self, buffer: memoryview, length: int) -> int:
        """Encrypt the first `length` bytes of `buffer` in place; the tag follows them. Returns `length` + 16.

        `buffer` must have room for that. Longer than :data:`MAX_PLAINTEXT` is the caller's mistake.

        Raises:
            NonceExhaustedError: the key is used up.
        """
        return self.seal_into(buffer[:length], buffer)

    def seal_into(self, data: memoryview, out: memoryview) -> int:
        """Encrypt `data` into the beginning of `out`; the tag follows. Returns how many bytes that is.

        `data` may be the beginning of `out` itself; they must not overlap in another way.

        Raises:
            NonceExhaustedError: the key is used up.
        """
        nonce = self.nonce
        if nonce > MAX_NONCE:
            raise NonceExhaustedError("no nonce is left for this connection")
        self.nonce = nonce + 1
        sealed = len(data) + 16
        self._cipher.encrypt_into(_NONCE.pack(nonce), data, None, out[:sealed])
        return sealed

    def open(self, buffer: memoryview) -> int:
        """Verify and decrypt the message that fills `buffer`, in place. Returns the length of the plaintext.

        Raises:
            NoiseError: it is not the peer's next message, unchanged; or the key is used up.
        """
        nonce = self.nonce
        if nonce > MAX_NONCE:
            raise NonceExhaustedError("no nonce is left for this connection")
        plain = len(buffer) - 16
        if plain < 0:
            raise NoiseError("a Noise message shorter than its tag")
        try:
            self._cipher.decrypt_into(_NONCE.pack(nonce), buffer, None, buffer[:plain])
        except InvalidTag:
            raise NoiseError("a Noise message was altered, or is not the next one") from None
        self.nonce = nonce + 1
        return plain

    def encrypt(self, plaintext: bytes, associated: bytes = b"") -> bytes:
        """A sealed copy of a small message."""
        if self.nonce > MAX_NONCE:
            raise NonceExhaustedError("no nonce is left for this connection")
        sealed = self._cipher.encrypt(_NONCE.pack(self.nonce), plaintext, associated)
        self.nonce += 1
        return sealed

    def decrypt(self, sealed: bytes, associated: bytes = b"") -> bytes:
        """The plaintext of a small sealed message.

        Raises:
            NoiseError: as :meth:`open`.
        """
        if self.nonce > MAX_NONCE:
            raise NonceExhaustedError("no nonce is left for this connection")
        try:
            plaintext = self._cipher.decrypt(_NONCE.pack(self.nonce), sealed, associated)
        except InvalidTag:
            raise NoiseError("a Noise message was altered, or is not the next one") from None
        self.nonce += 1
        return plaintext


def _derive(chaining_key: bytes, material: bytes) -> tuple[bytes, bytes]:
    """HKDF with two outputs (Noise, section 4.3)."""
    secret = hmac.digest(chaining_key, material, "sha256")
    first = hmac.digest(secret, b"\x01", "sha256")
    return first, hmac.digest(secret, first + b"\x02", "sha256")


class SymmetricState:
    """The running hash and key of a handshake (Noise, section 5.2).

    Attributes:
        handshake_hash: binds everything said so far; unique to the connection.
    """

    __slots__ = ("_chaining_key", "_cipher", "handshake_hash")
    handshake_hash: bytes

    def __init__(self, protocol_name: bytes = PROTOCOL_NAME, prologue: bytes = b"") -> None:
        # 32 bytes or fewer are padded, not hashed; the name has exactly 32
        self.handshake_hash = (
            protocol_name.ljust(32, b"\0") if len(protocol_name) <= 32 else hashlib.sha256(protocol_name).digest()
        )
        self._chaining_key = self.handshake_hash
        self._cipher: CipherState | None = None
        self.mix_hash(prologue)

    def mix_hash(self, data: bytes) -> None:
        """Bind `data` into the handshake."""
        self.handshake_hash = hashlib.sha256(self.handshake_hash + data).digest()

    def mix_key(self, material: bytes) -> None:
        """Derive the next key from a Diffie-Hellman result."""
        self._chaining_key, key = _derive(self._chaining_key, material)
        self._cipher = CipherState(key)

    def encrypt_and_hash(self, plaintext: bytes) -> bytes:
        """Encrypt if there is a key already; bind the result."""
        sealed = plaintext if self._cipher is None else self._cipher.encrypt(plaintext, self.handshake_hash)
        self.mix_hash(sealed)
        return sealed

    def decrypt_and_hash(self, sealed: bytes) -> bytes:
        """The counterpart of :meth:`encrypt_and_hash`.

        Raises:
            NoiseError: altered, or from another handshake.
        """
        plaintext = sealed if self._cipher is None else self._cipher.decrypt(sealed, self.handshake_hash)
        self.mix_hash(sealed)
        return plaintext

    def split(self) -> tuple[CipherState, CipherState]:
        """The two transport ciphers: initiator to responder, responder to initiator."""
        first, second = _derive(self._chaining_key, b"")
        return CipherState(first), CipherState(second)


class HandshakeXX:
    """The three messages of XX with any payloads; knows nothing of libp2p.

    `write_message` and `read_message` are called in turn, the initiator writing first. `ephemeral` is for test vectors.
    """

    __slots__ = ("_ephemeral", "_initiator", "_remote_ephemeral", "_static", "_step", "remote_static", "symmetric")
    remote_static: X25519PublicKey | None

    def __init__(
        self,
        *,
        initiator: bool,
        static_key: X25519PrivateKey,
        prologue: bytes = b"",
        ephemeral: X25519PrivateKey | None = None,
    ) -> None:
        self.symmetric = SymmetricState(prologue=prologue)
        self.remote_static = None
        self._initiator = initiator
        self._static = static_key
        self._ephemeral = ephemeral or X25519PrivateKey.generate()
        self._remote_ephemeral: X25519PublicKey | None = None
        self._step = 0

    def write_message(self, payload: bytes) -> bytes:
        """The next message of ours."""
        assert (self._step % 2 == 0) == self._initiator, "it is the peer's turn"
        symmetric = self.symmetric
        out = b""
        if self._step < 2:
            public = self._ephemeral.public_key().public_bytes_raw()
            symmetric.mix_hash(public)
            out = public
        if self._step == 1:
            self._mix(self._ephemeral, self._remote_ephemeral)  # ee
            out += symmetric.encrypt_and_hash(self._static.public_key().public_bytes_raw())
            self._mix(self._static, self._remote_ephemeral)  # es
        elif self._step == 2:
            out += symmetric.encrypt_and_hash(self._static.public_key().public_bytes_raw())
            self._mix(self._static, self._remote_ephemeral)  # se
        self._step += 1
        return out + symmetric.encrypt_and_hash(payload)

    def read_message(self, message: bytes) -> bytes:
        """The payload of the peer's next message.

        Raises:
            NoiseError: too short, altered, or with a key that no honest peer has.
        """
        assert (self._step % 2 == 1) == self._initiator, "it is our turn"
        symmetric = self.symmetric
        if self._step < 2:
            public, message = self._take(message, KEY_LENGTH)
            symmetric.mix_hash(public)
            self._remote_ephemeral = X25519PublicKey.from_public_bytes(public)
        if self._step == 1:
            self._mix(self._ephemeral, self._remote_ephemeral)  # ee
        if self._step > 0:
            sealed, message = self._take(message, KEY_LENGTH + TAG_LENGTH)
            self.remote_static = X25519PublicKey.from_public_bytes(symmetric.decrypt_and_hash(sealed))
            self._mix(self._ephemeral, self.remote_static)  # es, or se
        self._step += 1
        return symmetric.decrypt_and_hash(message)

    def _mix(self, private: X25519PrivateKey, public: X25519PublicKey | None) -> None:
        assert public is not None
        try:
            self.symmetric.mix_key(private.exchange(public))
        except ValueError:  # an all-zero result: the peer's key is of small order
            raise NoiseError("the peer's Noise key is degenerate") from None

    @staticmethod
    def _take(message: bytes, length: int) -> tuple[bytes, bytes]:
        if len(message) < length:
            raise NoiseError("a Noise handshake message is too short")
        return message[:length], message[length:]


class NoiseResult(NamedTuple):
    """What a completed handshake gives.

    Attributes:
        peer_id: who the peer is, proved.
        public_key: the peer's, libp2p protobuf form.
        muxer: agreed early; None means negotiate it with multistream-select on the secured connection.
        send, receive: the transport ciphers.
        unread: ciphertext that came after the last handshake message.
    """

    peer_id: PeerId
    public_key: bytes
    muxer: str | None
    send: CipherState
    receive: CipherState
    unread: bytes


class _State(enum.Enum):
    AWAIT_E = enum.auto()
    AWAIT_E_S = enum.auto()
    AWAIT_S = enum.auto()
    DONE = enum.auto()
    FAILED = enum.auto()


class NoiseHandshake:
    """A libp2p Noise handshake in progress.

    Feed what comes from the socket to `receive_data`, send what `data_to_send` gives, until `result` is there
    (and send once more then: the initiator's last message is made together with its result).

    `muxers` are ours in order of preference; empty leaves early negotiation out. `expected_peer` is who was dialled.
    """

    result: NoiseResult | None

    def __init__(
        self,
        *,
        initiator: bool,
        static_key: X25519PrivateKey,
        identity: Identity,
        muxers: tuple[str, ...] = (),
        expected_peer: PeerId | None = None,
    ) -> None:
        self.result = None
        self._initiator = initiator
        self._handshake = HandshakeXX(initiator=initiator, static_key=static_key)
        self._identity = identity
        self._muxers = muxers
        self._expected_peer = expected_peer
        self._received = b""
        self._outgoing = b""
        self._state = _State.AWAIT_E
        if initiator:
            self._send(b"")
            self._state = _State.AWAIT_E_S

    def data_to_send(self) -> bytes:
        """What must be sent now; empty when it is the peer's turn."""
        data, self._outgoing = self._outgoing, b""
        return data

    def receive_data(self, data: bytes) -> None:
        """Bytes from the peer, cut anywhere.

        Raises:
            NoiseError: refuse the connection. Nothing may be sent or received any more.
        """
        if self._state in (_State.DONE, _State.FAILED):
            raise NoiseError("the Noise handshake is over")
        try:
            self._received += data
            while self.result is None and (message := self._next_message()) is not None:
                self._handle(message)
        except NoiseError:
            self._state = _State.FAILED
            self._outgoing = b""
            raise

    def receive_eof(self) -> None:
        """The peer closed the connection.

        Raises:
            NoiseError: unless the handshake is complete.
        """
        if self._state is not _State.DONE:
            self._state = _State.FAILED
            raise NoiseError("the peer closed the connection during the Noise handshake")

    def _next_message(self) -> bytes | None:
        if len(self._received) < LENGTH_PREFIX:
            return None
        (length,) = _LENGTH.unpack_from(self._received)
        if length > MAX_HANDSHAKE_MESSAGE:
            raise NoiseError(f"a Noise handshake message of {length} bytes (limit {MAX_HANDSHAKE_MESSAGE})")
        end = LENGTH_PREFIX + length
        if len(self._received) < end:
            return None
        message, self._received = self._received[LENGTH_PREFIX:end], self._received[end:]
        return message

    def _handle(self, message: bytes) -> None:
        payload = self._handshake.read_message(message)
        match self._state:
            case _State.AWAIT_E:
                if payload:
                    raise NoiseError("data in the first Noise message, which protects nothing")
                self._send(self._own_payload())
                self._state = _State.AWAIT_S
            case _State.AWAIT_E_S:
                peer_id, public_key, muxers = self._verify(payload)
                muxer = self._choose(self._muxers, muxers)
                self._send(self._own_payload())
                self._finish(peer_id, public_key, muxer)
            case _:
                peer_id, public_key, muxers = self._verify(payload)
                self._finish(peer_id, public_key, self._choose(muxers, self._muxers))

    def _finish(self, peer_id: PeerId, public_key: bytes, muxer: str | None) -> None:
        to_responder, to_initiator = self._handshake.symmetric.split()
        send, receive = (to_responder, to_initiator) if self._initiator else (to_initiator, to_responder)
        self.result = NoiseResult(peer_id, public_key, muxer, send, receive, self._received)
        self._received = b""
        self._state = _State.DONE

    def _send(self, payload: bytes) -> None:
        message = self._handshake.write_message(payload)
        self._outgoing += _LENGTH.pack(len(message)) + message

    def _own_payload(self) -> bytes:
        payload = NoiseHandshakePayload(identity_key=self._identity.public_key, identity_sig=self._identity.signature)
        if self._muxers:
            payload.extensions.stream_muxers.extend(self._muxers)
        return payload.SerializeToString()

    def _verify(self, data: bytes) -> tuple[PeerId, bytes, tuple[str, ...]]:
        payload = NoiseHandshakePayload()
        try:
            payload.ParseFromString(data)
        except DecodeError:
            raise NoiseError("the payload of a Noise handshake message is not a NoiseHandshakePayload") from None
        remote_static = self._handshake.remote_static
        assert remote_static is not None
        try:
            key = PublicKey.from_protobuf(payload.identity_key)
            key.verify(SIGNATURE_PREFIX + remote_static.public_bytes_raw(), payload.identity_sig)
        except KeyFormatError as error:
            raise NoiseError(f"the peer's identity key: {error}") from error
        except keys.BadSignatureError:
            raise BadSignatureError("the peer's identity key did not sign its Noise key") from None
        peer_id = key.peer_id
        if self._expected_peer is not None and peer_id != self._expected_peer:
            raise WrongPeerError(f"the peer is {peer_id}, not {self._expected_peer}")
        muxers = payload.extensions.stream_muxers
        if len(muxers) > _MAX_MUXERS:
            raise NoiseError(f"the peer offers {len(muxers)} muxers (limit {_MAX_MUXERS})")
        return peer_id, payload.identity_key, tuple(muxers)

    @staticmethod
    def _choose(initiators: tuple[str, ...], responders: tuple[str, ...]) -> str | None:
        if not initiators or not responders:
            return None
        muxer = next((name for name in initiators if name in responders), None)
        if muxer is None:
            raise NoMuxerError(f"no muxer in common: {', '.join(initiators)} and {', '.join(responders)}")
        return muxer
