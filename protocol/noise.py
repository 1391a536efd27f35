"""Noise_XX_25519_ChaChaPoly_SHA256 as libp2p uses it (libp2p specs, noise/README.md; noiseprotocol.org revision 34).

Theory of operation. Three messages, each behind two bytes of length:

    -> e                       the initiator's ephemeral key, in clear, empty payload
    <- e, ee, s, es   payload  the responder's ephemeral and (encrypted) static key, then its payload
    -> s, se          payload  the initiator's (encrypted) static key, then its payload

A payload holds the peer's libp2p public key, that key's signature over the static key just proved, and extensions.
Three of those mean something to us, the first two names in order of preference:

`stream_muxers`      When both sides send it, the muxer is the first of the initiator's that the responder has too, and
                     without one the handshake fails (libp2p specs, connections/inlined-muxer-negotiation.md). When one
                     side does not, multistream-select finds the muxer afterwards.
`transport_ciphers`  What each side would rather use than ChaChaPoly once the handshake is done (code point 1280, one
                     of those that the spec leaves free; docs/decisions/0014). The first of the initiator's that the
                     responder names too is used, with keys that are derived for it alone. Without one, or with a peer
                     that knows nothing of this, it stays ChaChaPoly.
`inbound_streams`    How many streams of the peer's are accepted at a time, a number (code point 1281), for whoever
                     would rather not open more than that.

    initiator:  AWAIT_E_S -> DONE          responder:  AWAIT_E -> AWAIT_S -> DONE

Every failure is final. Afterwards each direction has a :class:`CipherState`.
"""

from __future__ import annotations

import enum
import hashlib
import hmac
import struct
from collections.abc import Sequence
from typing import Final, NamedTuple

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from google.protobuf.message import DecodeError

from protocol import keys
from protocol.keys import KeyFormatError, PublicKey
from protocol.noise_cipher import TAG_LENGTH, Cipher, CipherState, NoiseError
from protocol.pb.noise_pb2 import NoiseHandshakePayload
from protocol.peer_id import PeerId

SIGNATURE_PREFIX: Final = b"noise-libp2p-static-key:"
KEY_LENGTH: Final = 32
LENGTH_PREFIX: Final = 2

MAX_MESSAGE: Final = 65_535
"""Bytes of a transport message as it travels, without its length prefix."""

MAX_PLAINTEXT: Final = MAX_MESSAGE - TAG_LENGTH

MAX_HANDSHAKE_MESSAGE: Final = 8_192
"""Room for an 8,192-bit RSA key with its signature and some extensions, and not more: these bytes are a stranger's."""

_MAX_NAMES: Final = 16  # of one extension
_TRANSPORT_KEYS: Final = b"noise-transport-cipher:"  # and the cipher's name
_LENGTH: Final = struct.Struct(">H")


class BadSignatureError(NoiseError):
    """The peer's identity key did not sign its static key."""

    code = "noise-bad-signature"


class WrongPeerError(NoiseError):
    """The peer proved an identity, but not the one that was expected."""

    code = "wrong-peer"


class NoMuxerError(NoiseError):
    """Both sides named their muxers, and none is common."""

    code = "no-common-muxer"


class Identity(NamedTuple):
    """What proves who we are: made once per static key with the keyring's `SignNoiseStaticKey`.

    Attributes:
        public_key: the libp2p protobuf form.
        signature: over `noise-libp2p-static-key:` + the raw static public key.
    """

    public_key: bytes
    signature: bytes


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

    __slots__ = ("_chaining_key", "_cipher", "_state", "handshake_hash")
    handshake_hash: bytes

    def __init__(self, cipher: Cipher = Cipher.CHACHA_POLY, prologue: bytes = b"") -> None:
        # 32 bytes or fewer are padded, not hashed; no name is longer
        self.handshake_hash = f"Noise_XX_25519_{cipher.value}_SHA256".encode().ljust(32, b"\0")
        self._chaining_key = self.handshake_hash
        self._cipher = cipher
        self._state: CipherState | None = None
        self.mix_hash(prologue)

    def mix_hash(self, data: bytes) -> None:
        """Bind `data` into the handshake."""
        self.handshake_hash = hashlib.sha256(self.handshake_hash + data).digest()

    def mix_key(self, material: bytes) -> None:
        """Derive the next key from a Diffie-Hellman result."""
        self._chaining_key, key = _derive(self._chaining_key, material)
        self._state = CipherState(key, self._cipher)

    def encrypt_and_hash(self, plaintext: bytes) -> bytes:
        """Encrypt if there is a key already; bind the result."""
        sealed = plaintext if self._state is None else self._state.encrypt(plaintext, self.handshake_hash)
        self.mix_hash(sealed)
        return sealed

    def decrypt_and_hash(self, sealed: bytes) -> bytes:
        """The counterpart of :meth:`encrypt_and_hash`.

        Raises:
            NoiseError: altered, or from another handshake.
        """
        plaintext = sealed if self._state is None else self._state.decrypt(sealed, self.handshake_hash)
        self.mix_hash(sealed)
        return plaintext

    def split(self, cipher: Cipher | None = None) -> tuple[CipherState, CipherState]:
        """The two transport ciphers: initiator to responder, responder to initiator.

        Another `cipher` than the handshake's gets keys of its own: those of Noise's Split serve one cipher only.
        """
        if cipher is None or cipher is self._cipher:
            first, second = _derive(self._chaining_key, b"")
        else:
            first, second = _derive(self._chaining_key, _TRANSPORT_KEYS + cipher.value.encode())
        return CipherState(first, cipher or self._cipher), CipherState(second, cipher or self._cipher)


class HandshakeXX:
    """The three messages of XX with any payloads; knows nothing of libp2p.

    `write_message` and `read_message` are called in turn, the initiator writing first. `ephemeral` and `cipher` are for
    test vectors.
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
        cipher: Cipher = Cipher.CHACHA_POLY,
    ) -> None:
        self.symmetric = SymmetricState(cipher, prologue)
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
        streams: how many streams of ours the peer accepts at a time; None if it does not say.
        binding: the hash of the whole handshake, which both sides know and no other connection has (Noise, section
            11.2).
    """

    peer_id: PeerId
    public_key: bytes
    muxer: str | None
    send: CipherState
    receive: CipherState
    unread: bytes
    streams: int | None = None
    binding: bytes = b""


class _Extensions(NamedTuple):
    """What a peer's payload names, in its order of preference."""

    muxers: tuple[str, ...]
    ciphers: tuple[str, ...]
    streams: int | None


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

    `muxers` are ours in order of preference; empty leaves early negotiation out. `ciphers` are those that we
    would rather use than ChaChaPoly. `streams` is how many of the peer's we accept at a time. `expected_peer` is who
    was dialled.
    """

    result: NoiseResult | None

    def __init__(
        self,
        *,
        initiator: bool,
        static_key: X25519PrivateKey,
        identity: Identity,
        muxers: tuple[str, ...] = (),
        ciphers: tuple[Cipher, ...] = (),
        streams: int | None = None,
        expected_peer: PeerId | None = None,
    ) -> None:
        self.result = None
        self._initiator = initiator
        self._handshake = HandshakeXX(initiator=initiator, static_key=static_key)
        self._identity = identity
        self._muxers = muxers
        self._ciphers = tuple(cipher.value for cipher in ciphers)
        self._streams = streams
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
                peer_id, public_key, extensions = self._verify(payload)
                muxer = self._choose(self._muxers, extensions.muxers)
                cipher = _common(self._ciphers, extensions.ciphers)
                self._send(self._own_payload())
                self._finish(peer_id, public_key, muxer, cipher, extensions.streams)
            case _:
                peer_id, public_key, extensions = self._verify(payload)
                muxer = self._choose(extensions.muxers, self._muxers)
                cipher = _common(extensions.ciphers, self._ciphers)
                self._finish(peer_id, public_key, muxer, cipher, extensions.streams)

    def _finish(
        self, peer_id: PeerId, public_key: bytes, muxer: str | None, cipher: str | None, streams: int | None
    ) -> None:
        agreed = Cipher.CHACHA_POLY if cipher is None else Cipher(cipher)
        to_responder, to_initiator = self._handshake.symmetric.split(agreed)
        send, receive = (to_responder, to_initiator) if self._initiator else (to_initiator, to_responder)
        binding = self._handshake.symmetric.handshake_hash
        self.result = NoiseResult(peer_id, public_key, muxer, send, receive, self._received, streams, binding)
        self._received = b""
        self._state = _State.DONE

    def _send(self, payload: bytes) -> None:
        message = self._handshake.write_message(payload)
        self._outgoing += _LENGTH.pack(len(message)) + message

    def _own_payload(self) -> bytes:
        payload = NoiseHandshakePayload(identity_key=self._identity.public_key, identity_sig=self._identity.signature)
        if self._muxers:
            payload.extensions.stream_muxers.extend(name.encode() for name in self._muxers)
        if self._ciphers:
            payload.extensions.transport_ciphers.extend(name.encode() for name in self._ciphers)
        if self._streams is not None:
            payload.extensions.inbound_streams = self._streams
        return payload.SerializeToString()

    def _verify(self, data: bytes) -> tuple[PeerId, bytes, _Extensions]:
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
        extensions = payload.extensions
        muxers = _names("muxers", extensions.stream_muxers)
        ciphers = _names("ciphers", extensions.transport_ciphers)
        streams = extensions.inbound_streams if extensions.HasField("inbound_streams") else None
        return peer_id, payload.identity_key, _Extensions(muxers, ciphers, streams)

    @staticmethod
    def _choose(initiators: tuple[str, ...], responders: tuple[str, ...]) -> str | None:
        if not initiators or not responders:
            return None
        muxer = _common(initiators, responders)
        if muxer is None:
            raise NoMuxerError(f"no muxer in common: {initiators!r} and {responders!r}")
        return muxer


def _names(what: str, names: Sequence[bytes]) -> tuple[str, ...]:
    """A peer's words; what is not UTF-8 is nothing that we know."""
    if len(names) > _MAX_NAMES:
        raise NoiseError(f"the peer offers {len(names)} {what} (limit {_MAX_NAMES})")
    return tuple(name.decode(errors="replace") for name in names)


def _common(initiators: Sequence[str], responders: Sequence[str]) -> str | None:
    """The first of the initiator's that the responder has too."""
    return next((name for name in initiators if name in responders), None)
