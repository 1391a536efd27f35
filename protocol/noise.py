"""Noise_XX_25519_ChaChaPoly_SHA256 as libp2p uses it (libp2p specs, noise/README.md)."""

from __future__ import annotations

from typing import NamedTuple

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from protocol.errors import ProtocolError
from protocol.peer_id import PeerId


class NoiseError(ProtocolError):
    """The peer's Noise handshake or transport messages are wrong. The connection must be closed."""

    code = "noise"


class WrongPeerError(NoiseError):
    """The peer proved an identity, but not the one that was expected."""

    code = "wrong-peer"


class Identity(NamedTuple):
    """What proves who we are: made once per static key with the keyring's `SignNoiseStaticKey`."""

    public_key: bytes  # libp2p protobuf form
    signature: bytes  # over "noise-libp2p-static-key:" + the raw static public key


class CipherState:
    """One direction's key and nonce."""


class NoiseResult(NamedTuple):
    """What a completed handshake gives."""

    peer_id: PeerId
    public_key: bytes  # the peer's, libp2p protobuf form
    muxer: str | None  # agreed early; None: negotiate it with multistream-select on the secured connection
    send: CipherState
    receive: CipherState
    unread: bytes  # ciphertext that came after the last handshake message


class NoiseHandshake:
    """A handshake in progress. Feed what comes from the socket, send what `data_to_send` gives, until `result` is there."""

    result: NoiseResult | None

    def __init__(
        self,
        *,
        initiator: bool,
        static_key: X25519PrivateKey,
        identity: Identity,
        muxers: tuple[str, ...] = (),
        expected_peer: PeerId | None = None,
    ) -> None:
        raise NotImplementedError

    def receive_data(self, data: bytes) -> None:
        """Bytes from the peer, cut anywhere.

        Raises:
            NoiseError: refuse the connection.
        """
        raise NotImplementedError

    def data_to_send(self) -> bytes:
        """What must be sent now; empty when it is the peer's turn."""
        raise NotImplementedError
