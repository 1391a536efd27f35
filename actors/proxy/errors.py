"""What can go wrong at the ends of a tunnel."""

from __future__ import annotations

from typing import ClassVar

from protocol.errors import PeerupError


class ListenError(PeerupError):
    """The address of a proxy cannot be listened on."""

    code: ClassVar[str] = "cannot-listen"


class PortInUseError(ListenError):
    """Another program listens there."""

    code: ClassVar[str] = "port-in-use"


class ServiceUnreachableError(PeerupError):
    """The exposed service does not accept a connection."""

    code: ClassVar[str] = "service-unreachable"
