"""Peer ids: the multihash of a peer's public key (libp2p specs, peer-ids/peer-ids.md)."""

from __future__ import annotations

from typing import Any, Self

from protocol.errors import InvalidValueError


class PeerId:
    """A peer's identity. Immutable, hashable, ordered by its bytes.

    Attributes:
        multihash: the raw multihash, 34 to 44 bytes for the keys in use.
    """

    __slots__ = ("multihash",)
    multihash: bytes

    def __init__(self, multihash: bytes) -> None:
        object.__setattr__(self, "multihash", multihash)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"PeerId is immutable; cannot set {name}")

    @classmethod
    def from_wire(cls, value: Any) -> Self:
        """The peer id with this multihash.

        Raises:
            InvalidValueError: not the bytes of a multihash.
        """
        if not isinstance(value, bytes):
            raise InvalidValueError("a peer id is bytes")
        return cls(value)

    def to_wire(self) -> bytes:
        """The multihash."""
        return self.multihash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PeerId) and other.multihash == self.multihash

    def __lt__(self, other: PeerId) -> bool:
        return self.multihash < other.multihash

    def __hash__(self) -> int:
        return hash(self.multihash)
