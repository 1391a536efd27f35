"""Texts for bytes: base58btc, and the multibase forms in which CIDs and certificate hashes are written.

Only the bases that libp2p texts use are known. Base 58 and 36 cost time that grows with the square of the
length, so the length of what is decoded is bounded.
"""

from __future__ import annotations

import base64
import binascii
from typing import ClassVar, Final

from protocol.errors import InvalidValueError

MAX_TEXT: Final = 512
"""The longest text that is decoded; hashes and CIDs take less than 200 characters in every base."""

BASE58_ALPHABET: Final = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
_BASE36_ALPHABET: Final = "0123456789abcdefghijklmnopqrstuvwxyz"


class MultibaseError(InvalidValueError):
    """A text is not what its base allows."""

    code: ClassVar[str] = "bad-multibase"


def _encode_digits(data: bytes, alphabet: str) -> str:
    base = len(alphabet)
    number = int.from_bytes(data, "big")
    digits: list[str] = []
    while number:
        number, digit = divmod(number, base)
        digits.append(alphabet[digit])
    zeros = len(data) - len(data.lstrip(b"\0"))
    return alphabet[0] * zeros + "".join(reversed(digits))


def _decode_digits(text: str, values: dict[str, int], base: int) -> bytes:
    if len(text) > MAX_TEXT:
        raise MultibaseError(f"a base{base} text of {len(text)} characters is longer than {MAX_TEXT}")
    number = 0
    for character in text:
        digit = values.get(character)
        if digit is None:
            raise MultibaseError(f"{character!r} is not a base{base} character")
        number = number * base + digit
    zero = next(iter(values))
    zeros = len(text) - len(text.lstrip(zero))
    return bytes(zeros) + number.to_bytes((number.bit_length() + 7) // 8, "big")


_BASE58_VALUES: Final = {character: value for value, character in enumerate(BASE58_ALPHABET)}
_BASE36_VALUES: Final = {character: value for value, character in enumerate(_BASE36_ALPHABET)}


def encode_base58(data: bytes) -> str:
    """Bytes as base58btc, without a multibase prefix."""
    return _encode_digits(data, BASE58_ALPHABET)


def decode_base58(text: str) -> bytes:
    """The bytes of a base58btc text without a multibase prefix.

    Raises:
        MultibaseError: a character is not in the alphabet, or the text is longer than `MAX_TEXT`.
    """
    return _decode_digits(text, _BASE58_VALUES, 58)


def _decode_base32(text: str) -> bytes:
    try:
        return base64.b32decode(text + "=" * (-len(text) % 8))
    except binascii.Error:
        raise MultibaseError("not a base32 text") from None


def _decode_base64url(text: str) -> bytes:
    if not text.isascii() or "+" in text or "/" in text:
        raise MultibaseError("not a base64url text")
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except binascii.Error:
        raise MultibaseError("not a base64url text") from None


def encode_multibase_base32(data: bytes) -> str:
    """Bytes as multibase base32 (RFC 4648 in lower case, no padding, prefix `b`)."""
    return "b" + base64.b32encode(data).decode("ascii").rstrip("=").lower()


def encode_multibase_base36(data: bytes) -> str:
    """Bytes as multibase base36 (lower case, prefix `k`)."""
    return "k" + _encode_digits(data, _BASE36_ALPHABET)


def encode_multibase_base64url(data: bytes) -> str:
    """Bytes as multibase base64url (no padding, prefix `u`)."""
    return "u" + base64.urlsafe_b64encode(data).decode("ascii").rstrip("=")


def decode_multibase(text: str) -> bytes:
    """The bytes of a multibase text in base 58 (`z`), 36 (`k`, `K`), 32 (`b`, `B`) or 64url (`u`).

    Only the canonical text of the bytes is taken: bits that do not belong to a byte must be zero.

    Raises:
        MultibaseError: another base, a character that its base does not have, or longer than `MAX_TEXT`.
    """
    if not 1 <= len(text) <= MAX_TEXT:
        raise MultibaseError(f"a multibase text has 1 to {MAX_TEXT} characters, not {len(text)}")
    prefix, rest = text[0], text[1:]
    match prefix:
        case "z":
            return decode_base58(rest)
        case "k" | "K":
            if rest != (rest.lower() if prefix == "k" else rest.upper()):
                raise MultibaseError("a base36 text mixes upper and lower case")
            return _decode_digits(rest.lower(), _BASE36_VALUES, 36)
        case "b" | "B":
            if not rest.isascii() or rest != (rest.lower() if prefix == "b" else rest.upper()) or "=" in rest:
                raise MultibaseError("not a base32 text")
            data = _decode_base32(rest.upper())
            if encode_multibase_base32(data)[1:] != rest.lower():
                raise MultibaseError("a base32 text has spare bits that are not zero")
            return data
        case "u":
            data = _decode_base64url(rest)
            if encode_multibase_base64url(data)[1:] != rest:
                raise MultibaseError("a base64url text has spare bits that are not zero")
            return data
        case _:
            raise MultibaseError(f"{prefix!r} is not the prefix of a known base")
