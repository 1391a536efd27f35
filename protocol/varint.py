"""Unsigned variable-length integers (multiformats unsigned-varint spec).

Seven bits a byte, the least significant group first, the high bit set on all bytes but the last. At most nine
bytes (values below 2**63), and the shortest form is the only form.
"""

from __future__ import annotations

from typing import ClassVar, Final

from protocol.errors import InvalidValueError, ProtocolError

MAX_VALUE: Final = (1 << 63) - 1
"""The largest value that nine bytes hold; the spec allows no more."""

MAX_LENGTH: Final = 9
"""The longest encoding in bytes."""


class VarintError(ProtocolError):
    """Bytes are not an unsigned varint: cut short, too long, or not in the shortest form."""

    code: ClassVar[str] = "bad-varint"


_ONE_BYTE: Final = tuple(bytes((value,)) for value in range(128))


def encode_varint(value: int) -> bytes:
    """The shortest encoding of a value from 0 to `MAX_VALUE`.

    Raises:
        InvalidValueError: the value is outside that range.
    """
    if 0 <= value < 128:
        return _ONE_BYTE[value]
    if not 0 <= value <= MAX_VALUE:
        raise InvalidValueError(f"{value} does not fit an unsigned varint")
    out = bytearray()
    while value >= 128:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def read_varint(data: bytes | bytearray | memoryview, offset: int = 0) -> tuple[int, int] | None:
    """The value that starts at this offset, and the offset after it; None while bytes are missing.

    Raises:
        VarintError: more than nine bytes, or not the shortest form.
    """
    value = 0
    end = min(len(data), offset + MAX_LENGTH)
    for position in range(offset, end):
        byte = data[position]
        value |= (byte & 127) << 7 * (position - offset)
        if byte < 128:
            if byte == 0 and position > offset:
                raise VarintError("an unsigned varint is not in its shortest form")
            return value, position + 1
    if len(data) - offset >= MAX_LENGTH:
        raise VarintError(f"an unsigned varint is longer than {MAX_LENGTH} bytes")
    return None


def decode_varint(data: bytes | bytearray | memoryview, offset: int = 0) -> tuple[int, int]:
    """The value that starts at this offset, and the offset after it.

    Raises:
        VarintError: cut short, more than nine bytes, or not the shortest form.
    """
    found = read_varint(data, offset)
    if found is None:
        raise VarintError("an unsigned varint is cut short")
    return found
