"""Multiaddrs: self-describing network addresses (github.com/multiformats/multiaddr; libp2p specs, addressing/).

A multiaddr is a sequence of components, each a protocol and, for most protocols, a value::

    /ip4/192.0.2.1/tcp/4001/p2p/12D3KooW…
    /dns4/relay.example.org/udp/4001/quic-v1/p2p/12D3KooW…/p2p-circuit/p2p/12D3KooX…

It has a text form and a byte form. Both are taken from strangers, so both are bounded, every value is checked
by its protocol, an unknown protocol is an error, and equal addresses have one text and one byte form.
"""

from __future__ import annotations

import dataclasses
import functools
import ipaddress
from collections.abc import Iterable
from typing import Any, Final, Self

from protocol.errors import InvalidValueError
from protocol.multiaddr_values import PROTOCOLS_BY_CODE, PROTOCOLS_BY_NAME, MultiaddrError, Protocol
from protocol.peer_id import PeerId
from protocol.varint import VarintError, decode_varint, encode_varint

__all__ = ["MAX_BYTES", "MAX_COMPONENTS", "MAX_TEXT", "Component", "Endpoint", "Multiaddr", "MultiaddrError"]

MAX_BYTES: Final = 1024
"""The longest byte form. A relayed QUIC address with two peer ids takes about 120 bytes."""

MAX_TEXT: Final = 4096
"""The longest text form."""

MAX_COMPONENTS: Final = 32
"""The most components; the longest addresses in use have about ten."""

_HOSTS: Final = frozenset({"ip4", "ip6", "dns", "dns4", "dns6", "dnsaddr"})


@dataclasses.dataclass(frozen=True, slots=True)
class Component:
    """One step of a multiaddr: the protocol's name, its value as text (empty for none), and its value as bytes."""

    name: str
    value: str
    raw: bytes

    def __str__(self) -> str:
        protocol = PROTOCOLS_BY_NAME[self.name]
        if protocol.is_path:
            return f"/{self.name}{self.value}"
        return f"/{self.name}/{self.value}" if protocol.size != 0 else f"/{self.name}"

    def to_bytes(self) -> bytes:
        """The byte form: code, length where the protocol's values vary in length, value."""
        protocol = PROTOCOLS_BY_NAME[self.name]
        if protocol.size is None:
            return protocol.prefix + encode_varint(len(self.raw)) + self.raw
        return protocol.prefix + self.raw


@dataclasses.dataclass(frozen=True, slots=True)
class Endpoint:
    """What a socket call needs.

    Attributes:
        kind: how to understand the host: `ip4`, `ip6`, `dns`, `dns4`, `dns6` or `dnsaddr`.
        host: the IP address or the name; an IPv6 address carries its zone as `fe80::1%eth0`.
        transport: `tcp` or `udp`.
        port: 0 to 65535.
    """

    kind: str
    host: str
    transport: str
    port: int


class Multiaddr:
    """A composable network address such as `/ip4/192.0.2.1/tcp/4001/p2p/12D3Koo…`. Immutable and hashable."""

    __slots__ = ("_text", "components")
    _text: str
    components: tuple[Component, ...]

    def __init__(self, text: str) -> None:
        """Parse and normalise a text: `/ipfs/` becomes `/p2p/`, `/wss` becomes `/tls/ws`, IPv6 addresses are
        compressed, a last `/` is dropped.

        Raises:
            MultiaddrError: not a multiaddr, an unknown protocol, or too long.
        """
        _fill(self, _parse_text(text))

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"Multiaddr is immutable; cannot set {name}")

    @classmethod
    def from_components(cls, components: Iterable[Component]) -> Self:
        """The multiaddr of these components.

        Raises:
            MultiaddrError: none, or too many.
        """
        made = cls.__new__(cls)
        _fill(made, tuple(components))
        return made

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Parse the byte form.

        Raises:
            MultiaddrError: cut short, an unknown protocol, a value that its protocol does not allow, or too long.
        """
        if len(data) > MAX_BYTES:
            raise MultiaddrError(f"a multiaddr has at most {MAX_BYTES} bytes, not {len(data)}")
        components: list[Component] = []
        offset = 0
        try:
            while offset < len(data):
                if len(components) == MAX_COMPONENTS:
                    raise MultiaddrError(f"a multiaddr has at most {MAX_COMPONENTS} components")
                code, offset = decode_varint(data, offset)
                protocol = PROTOCOLS_BY_CODE.get(code)
                if protocol is None:
                    raise MultiaddrError(f"unknown multiaddr protocol code {code}")
                size = protocol.size
                if size is None:
                    size, offset = decode_varint(data, offset)
                raw = bytes(data[offset : offset + size])
                if len(raw) != size:
                    raise MultiaddrError(f"the value of /{protocol.name} is cut short")
                offset += size
                components.append(Component(protocol.name, protocol.to_text(raw), raw))
        except VarintError as error:
            raise MultiaddrError(f"not a multiaddr: {error}") from None
        return cls.from_components(components)

    @classmethod
    def from_endpoint(cls, host: str, port: int, transport: str = "tcp") -> Self:
        """The multiaddr of a socket's address: an IPv4 or IPv6 host (with or without zone), a port, `tcp` or `udp`.

        Raises:
            MultiaddrError: the host is not an IP address, or the port is out of range.
        """
        bare, _, zone = host.partition("%")
        if ":" not in bare:
            return cls(f"/ip4/{bare}/{transport}/{port}")
        mapped = _ipv6(bare).ipv4_mapped
        if mapped is not None:
            return cls(f"/ip4/{mapped}/{transport}/{port}")
        return cls((f"/ip6zone/{zone}" if zone else "") + f"/ip6/{bare}/{transport}/{port}")

    @classmethod
    def from_wire(cls, value: Any) -> Multiaddr:
        """The multiaddr in this text form.

        Raises:
            InvalidValueError: not a multiaddr.
        """
        if not isinstance(value, str):
            raise InvalidValueError("a multiaddr between actors is its text form")
        return _from_own_text(value)

    def to_wire(self) -> str:
        """The text form."""
        return self._text

    def to_bytes(self) -> bytes:
        """The byte form, as it stands in protobuf messages."""
        return b"".join([component.to_bytes() for component in self.components])

    def value(self, name: str) -> str | None:
        """The value of the first component of this protocol (empty where it has none); None if there is none."""
        for component in self.components:
            if component.name == name:
                return component.value
        return None

    @property
    def peer_id(self) -> PeerId | None:
        """The peer at the end of this address: the last component's, if that is `/p2p/…`; otherwise None."""
        last = self.components[-1]
        return PeerId(last.raw) if last.name == "p2p" else None

    def with_peer_id(self, peer: PeerId) -> Self:
        """This address ending in `/p2p/` and this peer.

        Raises:
            MultiaddrError: it ends in another peer already.
        """
        present = self.peer_id
        if present is None:
            return self.from_components((*self.components, Component("p2p", str(peer), peer.multihash)))
        if present != peer:
            raise MultiaddrError(f"{self} belongs to another peer than {peer}")
        return self

    def without_peer_id(self) -> Self:
        """This address without a last `/p2p/…`.

        Raises:
            MultiaddrError: nothing would be left.
        """
        return self if self.peer_id is None else self.from_components(self.components[:-1])

    @property
    def is_relayed(self) -> bool:
        """Whether the way leads through a relay (`/p2p-circuit`)."""
        return self.value("p2p-circuit") is not None

    @property
    def relay(self) -> Self | None:
        """The relay's own address, which is what stands before `/p2p-circuit`; None for a direct address."""
        for position, component in enumerate(self.components):
            if component.name == "p2p-circuit":
                return self.from_components(self.components[:position]) if position else None
        return None

    @property
    def endpoint(self) -> Endpoint | None:
        """Host and port of the first hop: IP address or name, then `/tcp` or `/udp`; None for any other beginning."""
        components = self.components
        zone = ""
        if components[0].name == "ip6zone" and len(components) > 1 and components[1].name == "ip6":
            zone = "%" + components[0].value
            components = components[1:]
        if len(components) < 2 or components[0].name not in _HOSTS or components[1].name not in {"tcp", "udp"}:
            return None
        host, port = components[0], components[1]
        return Endpoint(host.name, host.value + zone, port.name, int(port.value))

    @property
    def transport(self) -> str | None:
        """How the first hop is reached: `tcp`, `quic-v1`, `websocket`, `webtransport`; None where we know no way.

        Only addresses whose components mean exactly that transport count: `/ip4/…/tcp/…/http` is none of these,
        nor is `/ip4/…/tcp/…/tls`, which says that TLS begins at once, without multistream-select.
        """
        if self.endpoint is None:
            return None
        names = [component.name for component in self.components]
        start = 3 if names[0] == "ip6zone" else 2
        stop = names.index("p2p-circuit") if "p2p-circuit" in names else len(names)
        stack = [name for name in names[start:stop] if name not in {"p2p", "certhash", "sni"}]
        return _TRANSPORTS.get((names[start - 1], *stack))

    @property
    def ip(self) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
        """The IP address of the first hop; None if it is a name or no address at all."""
        for component in self.components[:2]:
            if component.name in {"ip4", "ip6"}:
                return ipaddress.ip_address(component.value)
        return None

    def __str__(self) -> str:
        return self._text

    def __repr__(self) -> str:
        return f"Multiaddr({self._text!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Multiaddr) and other._text == self._text

    def __hash__(self) -> int:
        return hash(self._text)

    def __reduce__(self) -> tuple[type[Multiaddr], tuple[str]]:
        return type(self), (self._text,)


_TRANSPORTS: Final[dict[tuple[str, ...], str]] = {
    ("tcp",): "tcp",
    ("tcp", "ws"): "websocket",
    ("tcp", "tls", "ws"): "websocket",
    ("udp", "quic-v1"): "quic-v1",
    ("udp", "quic-v1", "webtransport"): "webtransport",
}


def _fill(address: Multiaddr, components: tuple[Component, ...]) -> None:
    if any(component.name == "wss" for component in components):
        components = _without_wss(components)
    if not components:
        raise MultiaddrError("a multiaddr has at least one component")
    if len(components) > MAX_COMPONENTS:
        raise MultiaddrError(f"a multiaddr has at most {MAX_COMPONENTS} components")
    object.__setattr__(address, "components", components)
    object.__setattr__(address, "_text", "".join(map(str, components)))
    if len(address.to_bytes()) > MAX_BYTES:
        raise MultiaddrError(f"a multiaddr has at most {MAX_BYTES} bytes")


def _without_wss(components: tuple[Component, ...]) -> tuple[Component, ...]:
    """The same with `/tls/ws` for `/wss`, before which `/tls` may stand already (libp2p specs, websockets/)."""
    made: list[Component] = []
    for component in components:
        if component.name == "wss":
            if not any(before.name == "tls" for before in made[-2:]):
                made.append(Component("tls", "", b""))
            made.append(Component("ws", "", b""))
        else:
            made.append(component)
    return tuple(made)


def _ipv6(text: str) -> ipaddress.IPv6Address:
    try:
        return ipaddress.IPv6Address(text)
    except ValueError:
        raise MultiaddrError(f"{text!r} is not an IPv6 address") from None


def _parse_text(text: str) -> tuple[Component, ...]:
    if len(text) > MAX_TEXT:
        raise MultiaddrError(f"a multiaddr has at most {MAX_TEXT} characters, not {len(text)}")
    if not text.startswith("/"):
        raise MultiaddrError(
            f"a multiaddr looks like /ip4/192.0.2.7/tcp/4001 and begins with '/', not as {text[:40]!r} does"
        )
    parts = text.rstrip("/").split("/")[1:]
    components: list[Component] = []
    position = 0
    while position < len(parts):
        name = parts[position]
        position += 1
        protocol: Protocol | None = PROTOCOLS_BY_NAME.get(name)
        if protocol is None:
            raise MultiaddrError(f"unknown multiaddr protocol {name[:40]!r} in {text[:200]!r}")
        value = ""
        if protocol.is_path:
            value = "/" + "/".join(parts[position:])
            position = len(parts)
        elif protocol.size != 0:
            if position == len(parts):
                raise MultiaddrError(f"/{name} needs a value in {text[:200]!r}")
            value = parts[position]
            position += 1
        raw = protocol.to_bytes(value)
        components.append(Component(protocol.name, protocol.to_text(raw), raw))
        if len(components) > MAX_COMPONENTS:
            break  # `from_components` says so
    return tuple(components)


@functools.lru_cache(maxsize=1024)
def _from_own_text(text: str) -> Multiaddr:
    # Actors tell each other the same few addresses again and again, with every new stream.
    return Multiaddr(text)
