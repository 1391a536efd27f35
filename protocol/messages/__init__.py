"""What actors say to each other: typed, immutable messages and the envelope that carries them."""

from protocol.messages.codec import (
    Data,
    Descriptor,
    Message,
    MessageError,
    Request,
    decode_body,
    encode_body,
    message,
    record,
)
from protocol.messages.envelope import Envelope, MessageId

__all__ = [
    "Data",
    "Descriptor",
    "Envelope",
    "Message",
    "MessageError",
    "MessageId",
    "Request",
    "decode_body",
    "encode_body",
    "message",
    "record",
]
