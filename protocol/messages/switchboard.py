"""Messages of the switchboard: connections to peers, and streams handed over as descriptors."""

from __future__ import annotations

from protocol.messages.codec import Descriptor, Message, Request, message, record
from protocol.messages.system import Ok
from protocol.multiaddr import Multiaddr
from protocol.peer_id import PeerId


@record
class ConnectionInfo:
    """One live connection to a peer.

    Attributes:
        id: unique while the switchboard lives.
        direction: `inbound` or `outbound`.
        path: `direct` or `relayed`.
        transport: `tcp` (later `quic`, `websocket`).
        streams: open streams in both directions.
        rtt: seconds, smoothed; None until measured.
        sent, received: bytes on the wire.
        opened_at: seconds since the Unix epoch.
        agent: the peer's agent version from identify; empty until known.
        protocols: what the peer said in identify that it serves.
    """

    id: str
    peer: PeerId
    direction: str
    path: str
    transport: str
    local_address: Multiaddr
    remote_address: Multiaddr
    streams: int
    rtt: float | None
    sent: int
    received: int
    opened_at: float
    agent: str
    protocols: tuple[str, ...]


@message("switchboard.stream-opened")
class StreamOpened(Message):
    """An open stream: one end of the socket pair described in `protocol.stream_descriptor`."""

    protocol: str
    stream: Descriptor
    connection: ConnectionInfo


@message("switchboard.open-stream")
class OpenStream(Request[StreamOpened]):
    """Open a stream to this peer for the first of these protocols that it speaks, connecting if need be.

    Refused with `no-addresses`, `unreachable`, `unknown-peer`, `protocol-not-supported`, `wrong-peer`,
    `limit-exceeded`, each with the whole story in the reason.
    """

    peer: PeerId
    protocols: tuple[str, ...]


@message("switchboard.serve-protocol")
class ServeProtocol(Request[Ok]):
    """Send me (the sender) `InboundStream` for this protocol. Ends with the sender or the switchboard."""

    protocol: str


@message("switchboard.withdraw-protocol")
class WithdrawProtocol(Request[Ok]):
    """Undo `ServeProtocol`."""

    protocol: str


@message("switchboard.inbound-stream")
class InboundStream(Message):
    """A peer opened a stream for a protocol that you serve, and the policy allows it by `rule`."""

    peer: PeerId
    protocol: str
    stream: Descriptor
    connection: ConnectionInfo
    rule: str


@message("switchboard.connected")
class Connected(Message):
    """The connection that now exists to the peer. `elapsed` seconds were spent; `tried` tells each attempt."""

    connection: ConnectionInfo
    elapsed: float
    tried: tuple[str, ...]


@message("switchboard.connect")
class Connect(Request[Connected]):
    """Be connected to this peer."""

    peer: PeerId


@message("switchboard.disconnect")
class Disconnect(Request[Ok]):
    """Close all connections to this peer."""

    peer: PeerId


@message("switchboard.need-peer")
class NeedPeer(Message):
    """I (the sender) need this peer: keep it connected, reconnecting with back-off. Ends with the sender."""

    peer: PeerId


@message("switchboard.release-peer")
class ReleasePeer(Message):
    """Undo `NeedPeer`."""

    peer: PeerId


@record
class PeerStatus:
    """What the switchboard knows of a peer.

    Attributes:
        addresses: where it may be reached.
        needed_by: names of actors that need it.
        next_dial: seconds until the next attempt, if one is scheduled.
        last_failure: the last failed dial in words.
    """

    peer: PeerId
    addresses: tuple[Multiaddr, ...]
    connections: tuple[ConnectionInfo, ...]
    needed_by: tuple[str, ...]
    next_dial: float | None
    last_failure: str


@message("switchboard.status")
class SwitchboardStatus(Message):
    """The switchboard's whole view."""

    peer_id: PeerId
    listen_addresses: tuple[Multiaddr, ...]
    peers: tuple[PeerStatus, ...]
    protocols: tuple[str, ...]


@message("switchboard.read-status")
class ReadStatus(Request[SwitchboardStatus]):
    """Ask for the switchboard's whole view."""


@message("switchboard.pinged")
class Pinged(Message):
    """One libp2p ping: round trip in seconds. `connected_in` is not None when a connection had to be made first."""

    rtt: float
    protocol: str
    connection: ConnectionInfo
    connected_in: float | None


@message("switchboard.ping-peer")
class PingPeer(Request[Pinged]):
    """Measure one round trip with `/ipfs/ping/1.0.0`, or with peer-up's `/pingpong/1.0.0` where only that is spoken."""

    peer: PeerId
