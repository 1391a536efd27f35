"""Messages that explain how peers are connected: each path measured, and the hops of the one in use."""

from __future__ import annotations

from protocol.messages.codec import Message, Request, message, record
from protocol.messages.switchboard import ConnectionInfo
from protocol.multiaddr import Multiaddr
from protocol.peer_id import PeerId


@record
class MeasuredPath:
    """One live connection, and a round trip over it.

    Attributes:
        in_use: new streams use it; another one of the same peer is closed as soon as it has no stream.
        rtt: seconds, measured just now; None without an answer.
        failure: why there was none.
        no_direct: of a relayed connection, why there is no direct one, as far as it was tried.
    """

    connection: ConnectionInfo
    in_use: bool
    rtt: float | None
    failure: str
    no_direct: str


@message("paths.measured")
class PathsMeasured(Message):
    """The connections, those in use first for each peer."""

    paths: tuple[MeasuredPath, ...]


@message("paths.measure")
class MeasurePaths(Request[PathsMeasured]):
    """Measure the connections to this peer, or to all; nobody is dialled."""

    peer: PeerId | None


@record
class Hop:
    """One step on the way to a peer.

    Attributes:
        role: `node` (this one), `relay` or `peer`.
        address: where the hop was reached; of the last one through a relay, the relayed address. None for this node.
        rtt: seconds to this hop and back; None without an answer. 0 for this node.
        failure: why there was none.
    """

    role: str
    peer: PeerId
    address: Multiaddr | None
    transport: str
    rtt: float | None
    failure: str


@message("paths.traced")
class Traced(Message):
    """The hops, from this node to the peer, and how the peer is connected in words."""

    hops: tuple[Hop, ...]
    path: str
    connected_in: float | None


@message("paths.trace")
class TracePath(Request[Traced]):
    """Find the hops to this peer and measure each, connecting first where needed. Refused as `Connect` is."""

    peer: PeerId
