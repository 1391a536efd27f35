"""The ciphers of Noise's transport messages (noiseprotocol.org revision 34, sections 4.2, 5.1, 11.3 and 12).

Theory of operation. A :class:`CipherState` is one direction's key and the number of the next message. Its cipher is one
of the two that Noise defines. They differ in how the number is laid out in the nonce, and in how long a key lasts:
ChaChaPoly's outlives any connection, AESGCM's advantage for an attacker grows with the square of what it has encrypted.
So an AESGCM key is replaced by Noise's REKEY after every :data:`REKEY_AFTER` messages; both ends count alike, so
nothing is said about it. What one key encrypts is then at most 2^32 blocks, which leaves an attacker no more than
2^-65 (RFC 9001, appendix B.1, has the formula).
"""

from __future__ import annotations

import enum
import struct
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

from protocol.errors import ProtocolError

TAG_LENGTH: Final = 16

MAX_NONCE: Final = 2**64 - 2
"""The last nonce that a cipher state may use (Noise, section 5.1: 2^64-1 is reserved)."""

REKEY_AFTER: Final = 2**20
"""Messages that are encrypted with one key of AESGCM."""


class NoiseError(ProtocolError):
    """The peer's Noise handshake or transport messages are wrong. The connection must be closed."""

    code = "noise"


class NonceExhaustedError(NoiseError):
    """2^64-1 messages went over one key; the connection must end."""

    code = "noise-nonce-exhausted"


class Cipher(enum.Enum):
    """By the names that they have in Noise (section 12)."""

    CHACHA_POLY = "ChaChaPoly"
    AES_GCM = "AESGCM"


_AEAD: Final[dict[Cipher, type[AESGCM | ChaCha20Poly1305]]] = {
    Cipher.CHACHA_POLY: ChaCha20Poly1305,
    Cipher.AES_GCM: AESGCM,
}
_NONCE: Final = {Cipher.CHACHA_POLY: struct.Struct("<4xQ").pack, Cipher.AES_GCM: struct.Struct(">4xQ").pack}


class CipherState:
    """One direction's key and nonce (Noise, section 5.1).

    Attributes:
        cipher: which one.
        nonce: of the next message.
    """

    __slots__ = ("_aead", "_last", "_pack", "cipher", "nonce")
    nonce: int

    def __init__(self, key: bytes, cipher: Cipher = Cipher.CHACHA_POLY) -> None:
        self.cipher = cipher
        self.nonce = 0
        self._aead: AESGCM | ChaCha20Poly1305 = _AEAD[cipher](key)
        self._pack = _NONCE[cipher]
        self._last = MAX_NONCE if cipher is Cipher.CHACHA_POLY else REKEY_AFTER - 1  # that this key may be used with

    def seal_into(self, data: memoryview, out: memoryview) -> int:
        """Encrypt `data`, at most `noise.MAX_PLAINTEXT` bytes, into the beginning of `out`; the tag follows.

        Returns how many bytes that is.

        `data` may be the beginning of `out` itself; they must not overlap in another way.

        Raises:
            NonceExhaustedError: the key is used up.
        """
        nonce = self.nonce
        if nonce > self._last:
            self._renew()
        self.nonce = nonce + 1
        sealed = len(data) + 16
        self._aead.encrypt_into(self._pack(nonce), data, None, out[:sealed])
        return sealed

    def open_into(self, sealed: memoryview, out: memoryview) -> int:
        """Verify the message that fills `sealed`, and decrypt it into the beginning of `out`. Returns the length.

        `out` may be `sealed` itself; they must not overlap in another way. It holds nothing of use after an error.

        Raises:
            NoiseError: it is not the peer's next message, unchanged; or the key is used up.
        """
        nonce = self.nonce
        if nonce > self._last:
            self._renew()
        plain = len(sealed) - 16
        if plain < 0:
            raise NoiseError("a Noise message shorter than its tag")
        try:
            self._aead.decrypt_into(self._pack(nonce), sealed, None, out[:plain])
        except InvalidTag:
            raise NoiseError("a Noise message was altered, or is not the next one") from None
        self.nonce = nonce + 1
        return plain

    def encrypt(self, plaintext: bytes, associated: bytes = b"") -> bytes:
        """A sealed copy of a small message."""
        if self.nonce > self._last:
            self._renew()
        sealed = self._aead.encrypt(self._pack(self.nonce), plaintext, associated)
        self.nonce += 1
        return sealed

    def decrypt(self, sealed: bytes, associated: bytes = b"") -> bytes:
        """The plaintext of a small sealed message.

        Raises:
            NoiseError: as :meth:`open_into`.
        """
        if self.nonce > self._last:
            self._renew()
        try:
            plaintext = self._aead.decrypt(self._pack(self.nonce), sealed, associated)
        except InvalidTag:
            raise NoiseError("a Noise message was altered, or is not the next one") from None
        self.nonce += 1
        return plaintext

    def _renew(self) -> None:
        """Replace the key by REKEY of it (Noise, section 4.2); the nonce counts on."""
        if self.nonce > MAX_NONCE:
            raise NonceExhaustedError("no nonce is left for this connection")
        key = self._aead.encrypt(self._pack(MAX_NONCE + 1), bytes(32), b"")[:32]
        self._aead = _AEAD[self.cipher](key)
        self._last = min(self.nonce + REKEY_AFTER - 1, MAX_NONCE)
