"""Messages about where this node and its peers can be reached, and over which connections they are."""

from __future__ import annotations

from protocol.messages.codec import Message, Request, message
from protocol.messages.switchboard import ConnectionInfo
from protocol.messages.system import Ok
from protocol.multiaddr import Multiaddr
from protocol.peer_id import PeerId


@message("switchboard.announce-addresses")
class AnnounceAddresses(Request[Ok]):
    """This node can be reached at these addresses, too; they replace those that the sender announced before.

    Peers are told by identify-push. Ends with the sender or the switchboard; none withdraws. With `instead` the
    addresses of the listening sockets are not told while this announcement stands.
    """

    addresses: tuple[Multiaddr, ...]
    instead: bool = False


@message("switchboard.connection-opened")
class ConnectionOpened(Message):
    """A peer is connected; `identified` tells whether `connection` holds what it said of itself.

    Told twice for each connection: when it is there, and when the peer has identified itself.
    """

    connection: ConnectionInfo
    identified: bool
    observed_address: Multiaddr | None


@message("switchboard.connection-closed")
class ConnectionClosed(Message):
    """A connection is gone: its last state, and why it ended, as a code and in words."""

    connection: ConnectionInfo
    code: str
    reason: str


@message("switchboard.connection-leaving")
class ConnectionLeaving(Message):
    """The peer of this connection is about to end: it has said that it takes no more streams. What runs goes on."""

    connection: ConnectionInfo


@message("switchboard.connection-judged")
class ConnectionJudged(Message):
    """This connection gives no sign of life (`in_doubt`), or has given one again. What runs on it goes on."""

    connection: ConnectionInfo


@message("switchboard.watched-connections")
class WatchedConnections(Message):
    """The connections at this moment, identified or not."""

    connections: tuple[ConnectionInfo, ...]


@message("switchboard.watch-connections")
class WatchConnections(Request[WatchedConnections]):
    """Tell me (the sender) `ConnectionOpened`, `ConnectionJudged`, `ConnectionLeaving` and `ConnectionClosed`, of these
    peers or of all.

    Asking again replaces the peers. Ends with the sender or the switchboard: ask again when it is up.
    """

    peers: tuple[PeerId, ...] = ()
