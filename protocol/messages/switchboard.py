"""Messages of the switchboard: connections to peers, and streams, handed over as descriptors or joined with a socket.

An actor gets a stream in one of two ways. `OpenStream` and `InboundStream` give it one end of a stream descriptor, and
it does with the bytes what it likes. `OpenAttached`, or `AttachSocket` for a stream that was offered, gives the
switchboard a connected TCP socket instead: the switchboard carries the bytes itself, the actor *owns* the stream by
name, and is told in `StreamReport` what it carried and how it ended. An attached stream outlives its owner's process;
the successor asks for it with `AdoptStreams`.
"""

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
        transport: `tcp`, `websocket`, or `wss` for WebSocket in TLS.
        streams: open streams in both directions.
        rtt: seconds, smoothed; None until measured.
        sent, received: bytes on the wire.
        opened_at: seconds since the Unix epoch.
        agent: the peer's agent version from identify; empty until known.
        protocols: what the peer said in identify that it serves.
        relay: through whom, if relayed.
        limit_seconds, limit_bytes: what the relay grants to this circuit, each way; None without limit.
        in_doubt: it gives no sign of life at the moment, and new streams look for another way.
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
    relay: PeerId | None = None
    limit_seconds: int | None = None
    limit_bytes: int | None = None
    in_doubt: bool = False


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

    With `confirm` a stream whose directions have both finished is followed by R with the code of what came of it at the
    far end, `NONE` if all has arrived there (see `protocol.stream_descriptor`).
    """

    peer: PeerId
    protocols: tuple[str, ...]
    confirm: bool = False


@message("switchboard.stream-attached")
class StreamAttached(Message):
    """The socket given is joined with this stream; close your copy of it, or nobody will see the end of it.

    `path` is how the peer is connected, in words.
    """

    stream_id: str
    protocol: str
    path: str


@message("switchboard.open-attached")
class OpenAttached(Request[StreamAttached]):
    """As `OpenStream`, and join this connected TCP socket with the stream; the sender becomes the stream's owner.

    The socket must be set to close with a reset (SO_LINGER 1, 0): the switchboard takes that back when both directions
    have finished, and the kernel resets the client should the switchboard be killed before.
    Refused as `OpenStream` is, and with `not-a-tcp-socket` and `socket-lost` (its client hung up meanwhile).
    """

    peer: PeerId
    protocols: tuple[str, ...]
    socket: Descriptor


@message("switchboard.serve-protocol")
class ServeProtocol(Request[Ok]):
    """Send me (the sender) `InboundStream` for this protocol, or, with `attach`, `StreamOffered`.

    Ends with the sender or the switchboard.
    """

    protocol: str
    attach: bool = False


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


@message("switchboard.stream-offered")
class StreamOffered(Message):
    """As `InboundStream`, but the stream waits in the switchboard, a bounded time, for `AttachSocket`.

    `path` is how the peer is connected, in words.
    """

    stream_id: str
    peer: PeerId
    protocol: str
    path: str
    rule: str


@message("switchboard.attach-socket")
class AttachSocket(Message):
    """Join a stream that was offered with this connected TCP socket, of which the sender keeps no copy.

    A socket for a stream that is over (`StreamReport` tells or has told) is closed. Set it up as for `OpenAttached`.
    """

    stream_id: str
    socket: Descriptor


@message("switchboard.reject-stream")
class RejectStream(Message):
    """Reset a stream that was offered with this code. It appears in no report."""

    stream_id: str
    code: int


@record
class AttachedStream:
    """A stream that is joined with a socket, or waits to be.

    Attributes:
        stream_id: unique in the life of the node.
        path: how the peer is connected, in words.
        since: when it was opened; seconds of CLOCK_MONOTONIC.
        sent, received: bytes of the application that its owners have been told of, seen from this node.
    """

    stream_id: str
    peer: PeerId
    protocol: str
    path: str
    since: float
    sent: int
    received: int


@record
class StreamTraffic:
    """Bytes that a stream has carried from its beginning, seen from this node."""

    stream_id: str
    sent: int
    received: int


@record
class EndedStream:
    """An attached stream is over; `stream` tells all that it carried.

    Attributes:
        duration: seconds.
        outcome: `finished`, `stream-reset`, `local-reset` or `aborted`.
        code: the reset code sent or received; 0 when finished.
        reason: why the connection ended, if the stream ended with it.
    """

    stream: AttachedStream
    duration: float
    outcome: str
    code: int
    reason: str = ""


@message("switchboard.stream-report")
class StreamReport(Request[Ok]):
    """To the owner of attached streams: those that have carried bytes or ended since the last report.

    Sent soon after a stream has ended, and every few seconds while bytes flow. What is not answered is told again, so
    that an owner that is being replaced misses nothing; one that has seen the end of a stream ignores a second one.

    Streams that the switchboard has opened for the owner by itself (`protocol.messages.doors`) appear in `opened`, or,
    if they were over before they were told of, only in `ended`. `turned_away` counts callers beyond the limit,
    `peer_full` those beyond what the peer takes at a time.
    """

    moved: tuple[StreamTraffic, ...]
    ended: tuple[EndedStream, ...]
    opened: tuple[AttachedStream, ...] = ()
    turned_away: int = 0
    peer_full: int = 0


@message("switchboard.adopted-streams")
class AdoptedStreams(Message):
    """The attached streams whose end their owner has not yet been told of."""

    streams: tuple[AttachedStream, ...]


@message("switchboard.adopt-streams")
class AdoptStreams(Request[AdoptedStreams]):
    """I (the sender) have just started: which attached streams of my name's are there?

    Streams that were offered to my predecessor and wait for a socket are reset.
    """


@message("switchboard.streams-closed")
class StreamsClosed(Message):
    """The last report: nothing of the asker's is left."""

    ended: tuple[EndedStream, ...]


@message("switchboard.close-streams")
class CloseStreams(Request[StreamsClosed]):
    """Reset all attached streams of mine (the sender's)."""


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
