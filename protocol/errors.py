"""The root of every error that peerup raises on purpose.

Each class below has a `code`: a stable, machine-readable word that crosses process boundaries, appears in
JSON output and can be tested for. The text is for a person: what happened, why, and what to do about it.
"""

from __future__ import annotations

from typing import ClassVar


class PeerupError(Exception):
    """Any failure that peerup foresees. Everything else is a defect and ends the actor it happens in."""

    code: ClassVar[str] = "error"


class ProtocolError(PeerupError):
    """A peer broke a wire protocol. The connection or stream it happened on is of no further use."""

    code: ClassVar[str] = "protocol-error"


class LimitExceededError(ProtocolError):
    """A peer asked for more (bytes, messages, streams, time) than is granted before or after authentication."""

    code: ClassVar[str] = "limit-exceeded"


class InvalidValueError(PeerupError, ValueError):
    """A value given by a person, a file or a peer does not have the form that it must have."""

    code: ClassVar[str] = "invalid-value"
