"""The envelope around every message between actors.

On the wire it is one msgpack array (an array, not a map: its keys never vary, and it is packed for each
message): `[version, id, cause, reply_to, sender, target, kind, deadline, body]` with the body as packed bytes,
so that a tap or a fault rule can match an envelope without decoding what is in it.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NewType

import msgpack

from protocol.messages.codec import MessageError

MessageId = NewType("MessageId", str)
"""`<actor name>:<incarnation>:<sequence number>`: unique in a run of the node, and it tells who sent it."""

VERSION = 1
MAX_NAME = 200
"""The longest actor name and kind, in characters."""


@dataclasses.dataclass(frozen=True)
class Envelope:
    """Who says what to whom, because of what, and until when it matters.

    Attributes:
        id: this message's own id.
        cause: the message whose handling led to this one, if any: the chain that `peerup why` prints.
        reply_to: the id of the request that this message answers, if it is an answer.
        sender: the registered name of the sending actor.
        target: the registered name of the receiving actor.
        kind: the kind of the body, as registered with the codec.
        deadline: the moment after which the sender no longer waits, in seconds of CLOCK_MONOTONIC, or None.
        body: the message's fields, packed by :func:`protocol.messages.codec.encode_body`.
    """

    id: MessageId
    cause: MessageId | None
    reply_to: MessageId | None
    sender: str
    target: str
    kind: str
    deadline: float | None
    body: bytes

    def to_bytes(self) -> bytes:
        """This envelope as one msgpack array."""
        packed: bytes = msgpack.packb(
            (
                VERSION,
                self.id,
                self.cause,
                self.reply_to,
                self.sender,
                self.target,
                self.kind,
                self.deadline,
                self.body,
            ),
            use_bin_type=True,
        )
        return packed

    @classmethod
    def from_bytes(cls, packed: bytes | memoryview) -> Envelope:
        """The envelope in these bytes.

        Raises:
            MessageError: the bytes are not an envelope of this version.
        """
        try:
            value: Any = msgpack.unpackb(packed, raw=False, use_list=False)
        except (ValueError, msgpack.exceptions.UnpackException, UnicodeDecodeError, RecursionError) as error:
            raise MessageError(f"not an envelope: {error}") from error
        if not isinstance(value, tuple) or len(value) != 9 or value[0] != VERSION:
            raise MessageError("not an envelope of this version")
        _, ident, cause, reply_to, sender, target, kind, deadline, body = value
        for text in (ident, sender, target, kind):
            if type(text) is not str or len(text) > 2 * MAX_NAME:
                raise MessageError("an envelope's id, sender, target and kind are short strings")
        for text in (cause, reply_to):
            if text is not None and (type(text) is not str or len(text) > 2 * MAX_NAME):
                raise MessageError("an envelope's cause and reply_to are short strings or nothing")
        if deadline is not None and type(deadline) is not float:
            raise MessageError("an envelope's deadline is a float or nothing")
        if type(body) is not bytes:
            raise MessageError("an envelope's body is bytes")
        return cls(ident, cause, reply_to, sender, target, kind, deadline, body)
