"""Values between actors as plain JSON for clients."""

from __future__ import annotations

import base64
import dataclasses
import enum
from typing import Any

import msgpack

from protocol.messages import Data, Descriptor, Envelope, MessageError, decode_body
from protocol.multiaddr import Multiaddr
from protocol.peer_id import PeerId

_ABSENT = Descriptor(0)
"""Stands for descriptors of a message that was only copied; it holds none."""
_ABSENT.detach()
_MAX_DESCRIPTORS = 16


def plain(value: Any) -> Data:
    """The value as JSON knows it: dataclasses as objects, ids and addresses as text, bytes as base64."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, PeerId | Multiaddr):
        return str(value)
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, bytes | bytearray | memoryview):
        return {"base64": base64.b64encode(value).decode()}
    if isinstance(value, Descriptor):
        return "descriptor"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    return str(value)


def body_of(envelope: Envelope) -> Data:
    """The fields of the envelope's message as JSON, as far as this process can read them."""
    try:
        return plain(decode_body(envelope.kind, envelope.body, [_ABSENT] * _MAX_DESCRIPTORS))
    except MessageError:
        pass  # an actor's own kind
    try:
        return plain(msgpack.unpackb(envelope.body, raw=False, strict_map_key=False))
    except (ValueError, msgpack.exceptions.UnpackException, UnicodeDecodeError, RecursionError):
        return plain(envelope.body)
