"""Multiaddrs: self-describing network addresses (github.com/multiformats/multiaddr; libp2p specs, addressing/)."""

from __future__ import annotations

from typing import Any, Self

from protocol.errors import InvalidValueError


class Multiaddr:
    """A composable network address such as `/ip4/192.0.2.1/tcp/4001/p2p/12D3Koo…`. Immutable and hashable."""

    __slots__ = ("_text",)
    _text: str

    def __init__(self, text: str) -> None:
        object.__setattr__(self, "_text", text)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"Multiaddr is immutable; cannot set {name}")

    @classmethod
    def from_wire(cls, value: Any) -> Self:
        """The multiaddr in this text form.

        Raises:
            InvalidValueError: not a multiaddr.
        """
        if not isinstance(value, str):
            raise InvalidValueError("a multiaddr between actors is its text form")
        return cls(value)

    def to_wire(self) -> str:
        """The text form."""
        return self._text

    def __str__(self) -> str:
        return self._text

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Multiaddr) and other._text == self._text

    def __hash__(self) -> int:
        return hash(self._text)
