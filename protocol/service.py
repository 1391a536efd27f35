"""Services: their names, their protocol ids (`/peerup/<service>/1.0.0`), and the local addresses behind them."""

from __future__ import annotations

import dataclasses
import ipaddress
import re
from typing import Any, ClassVar, Final, Self

from protocol.errors import InvalidValueError

_NAME: Final = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", re.ASCII)
_HOST_LABEL: Final = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?", re.ASCII)
_PREFIX: Final = "/peerup/"
_SUFFIX: Final = "/1.0.0"
_MAX_PORT: Final = 65535

RESERVED_NAMES: Final = frozenset(
    {
        # Protocols of peer-up that stand in the same space, `/peerup/<word>/1.0.0`:
        "invite",
        "kad",
        "peer-notify",
        "ping",
        "relay-pair",
        "rtt-probe",
        # Words that this project keeps for protocols of its own in that space:
        "dht",
        "id",
        "identify",
        "pingpong",
        "rendezvous",
    }
)
"""Names that a service cannot have, because their protocol ids mean something else."""


class ServiceNameError(InvalidValueError):
    """A text cannot be the name of a service."""

    code: ClassVar[str] = "bad-service-name"


class ServiceAddressError(InvalidValueError):
    """A text is not `host:port`."""

    code: ClassVar[str] = "bad-service-address"


class ServiceName(str):
    """The name of a service: 1 to 63 lower-case letters, digits and inner hyphens, and not a reserved word."""

    __slots__ = ()

    def __new__(cls, name: str) -> Self:
        """Check a name.

        Raises:
            ServiceNameError: it breaks the rule, or is reserved.
        """
        if _NAME.fullmatch(name) is None:
            raise ServiceNameError(
                f"{name[:80]!r} cannot be the name of a service: a name has 1 to 63 lower-case letters, digits and "
                "hyphens, and neither begins nor ends with a hyphen"
            )
        if name in RESERVED_NAMES:
            raise ServiceNameError(
                f"{name!r} cannot be the name of a service: /peerup/{name}/1.0.0 is a protocol of peerup's own"
            )
        return super().__new__(cls, name)

    @classmethod
    def from_wire(cls, value: Any) -> Self:
        """The name in this text.

        Raises:
            ServiceNameError: not a text, or not a name.
        """
        if not isinstance(value, str):
            raise ServiceNameError("the name of a service is a text")
        return cls(value)

    def to_wire(self) -> str:
        """The name as a plain text."""
        return str.__str__(self)

    @property
    def protocol(self) -> str:
        """The protocol id of this service's streams."""
        return f"{_PREFIX}{self}{_SUFFIX}"


def service_protocol(name: str) -> str:
    """The protocol id of the service with this name.

    Raises:
        ServiceNameError: not the name of a service.
    """
    return ServiceName(name).protocol


def service_of_protocol(protocol: str) -> ServiceName | None:
    """The service whose streams have this protocol id; None if it is not the protocol of any service."""
    if not (protocol.startswith(_PREFIX) and protocol.endswith(_SUFFIX)):
        return None
    try:
        return ServiceName(protocol[len(_PREFIX) : -len(_SUFFIX)])
    except ServiceNameError:
        return None


@dataclasses.dataclass(frozen=True, slots=True)
class ServiceAddress:
    """Where a service is reached locally.

    Attributes:
        host: an IPv4 address, an IPv6 address without brackets (with a zone where it has one), or a host name.
        port: 1 to 65535.
    """

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse `host:port`, where an IPv6 address stands in brackets: `127.0.0.1:22`, `[::1]:22`, `nas.lan:22`.

        Raises:
            ServiceAddressError: not of that form; the text says what is wrong.
        """
        if text.startswith("["):
            host, bracket, rest = text[1:].partition("]")
            if not bracket or not rest.startswith(":"):
                raise ServiceAddressError(f"{text[:300]!r} is not an address: write [IPV6]:PORT")
            return cls(_check_ipv6(host), _check_port(rest[1:], text))
        host, colon, port = text.rpartition(":")
        if not colon:
            raise ServiceAddressError(f"{text[:300]!r} is not an address: write HOST:PORT")
        if ":" in host:
            raise ServiceAddressError(f"{text[:300]!r} is not an address: an IPv6 address stands in brackets, [::1]:22")
        return cls(_check_host(host), _check_port(port, text))

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def _check_port(port: str, text: str) -> int:
    if not (port.isascii() and port.isdigit() and len(port) <= 5 and 1 <= int(port) <= _MAX_PORT):
        raise ServiceAddressError(f"{text[:300]!r} is not an address: the port is a number from 1 to {_MAX_PORT}")
    return int(port)


def _check_ipv6(host: str) -> str:
    try:
        return str(ipaddress.IPv6Address(host))
    except ValueError:
        raise ServiceAddressError(f"{host[:80]!r} is not an IPv6 address") from None


def _check_host(host: str) -> str:
    labels = host.removesuffix(".").split(".")
    if len(host) > 253 or not all(_HOST_LABEL.fullmatch(label) for label in labels):
        raise ServiceAddressError(f"{host[:80]!r} is neither an IP address nor a host name")
    if labels[-1].isdigit():  # no top-level domain is a number, so this is meant as an IPv4 address
        try:
            return str(ipaddress.IPv4Address(host))
        except ValueError:
            raise ServiceAddressError(f"{host[:80]!r} is not an IPv4 address") from None
    return host
