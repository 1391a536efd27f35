"""A circuit opened message by message, so that a test decides what is sent when."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Literal

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from protocol.circuit.hop_client import ConnectClient, Grant, ReserveClient
from protocol.circuit.messages import Refusal
from protocol.multiaddr import Multiaddr
from protocol.multistream import Initiator
from protocol.noise import SIGNATURE_PREFIX, Identity, NoiseHandshake, NoiseResult
from protocol.peer_id import PeerId
from protocol.protocol_ids import CIRCUIT_HOP
from tests.interop.descriptors import DescriptorStream
from tests.interop.ours import OurPeer

Timing = Literal["late", "behind", "together"]
"""When the circuit's first bytes are sent: after the relay's answer, straight behind CONNECT, in one piece with it."""
TIMINGS: tuple[Timing, ...] = ("late", "behind", "together")


class RefusedError(Exception):
    """The relay refused the circuit."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(str(refusal))
        self.refusal = refusal


async def reserve(ours: OurPeer, relay: str) -> Grant:
    """Ask a relay that we are connected to for a reservation.

    Raises:
        PeerupError: what the relay said is not what the specification wants.
    """
    peer = PeerId.from_text(relay.rpartition("/p2p/")[2])
    stream = await ours.open(str(peer), CIRCUIT_HOP)
    client = ReserveClient(peer, ours.key.peer_id, dialled=Multiaddr(relay))
    await stream.send(client.data_to_send())
    while client.state == "waiting":
        client.receive_data(await _receive(stream))
    stream.close()
    assert client.grant is not None, client.refusal
    return client.grant


@contextlib.asynccontextmanager
async def connect(
    ours: OurPeer, relay: str, listener: str, timing: Timing
) -> AsyncIterator[tuple[ConnectClient, NoiseResult]]:
    """Open a circuit, and a Noise connection on it as its initiator; what came of both, while the context lasts.

    Raises:
        RefusedError: the relay gives no circuit.
        ResetError: the relay or the listener reset the stream.
        PeerupError: what one of them said is not what the specifications want.
    """
    target = PeerId.from_text(listener)
    static = X25519PrivateKey.generate()
    signature = ours.key.sign(SIGNATURE_PREFIX + static.public_key().public_bytes_raw())
    identity = Identity(ours.key.public_key.to_protobuf(), signature)
    handshake = NoiseHandshake(
        initiator=True, static_key=static, identity=identity, muxers=("/yamux/1.0.0",), expected_peer=target
    )
    security = Initiator(("/noise",))
    flight = security.data_to_send() + handshake.data_to_send()

    stream = await ours.open(relay, CIRCUIT_HOP)
    client = ConnectClient(target, early=flight if timing == "together" else b"")
    await stream.send(client.data_to_send())
    if timing == "behind":
        await stream.send(flight)
    while client.state == "waiting":
        client.receive_data(await _receive(stream))
    if client.refusal is not None:
        stream.close()
        raise RefusedError(client.refusal)
    if timing == "late":
        await stream.send(flight)

    arrived = client.leftover
    while security.result is None:
        security.receive_data(arrived or await _receive(stream))
        arrived = security.leftover
    while handshake.result is None:
        handshake.receive_data(arrived or await _receive(stream))
        arrived = b""
    await stream.send(handshake.data_to_send())
    yield client, handshake.result
    stream.close()


async def _receive(stream: DescriptorStream) -> bytes:
    data = await stream.receive()
    assert data is not None, "the other side finished before it had answered"
    return data
