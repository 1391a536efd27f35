"""Actors that want to know when peers come and go."""

from __future__ import annotations

from collections.abc import Callable

from actors.switchboard.connections import Connection
from actors.switchboard.link import LinkEnd
from protocol.messages import Message
from protocol.messages.reachability import (
    ConnectionClosed,
    ConnectionJudged,
    ConnectionLeaving,
    ConnectionOpened,
)
from protocol.peer_id import PeerId


class ConnectionWatchers:
    """Who watches which peers.

    Args:
        tell: sends a message to an actor.
    """

    def __init__(self, tell: Callable[[str, Message], None]) -> None:
        self._tell = tell
        self._peers: dict[str, frozenset[PeerId]] = {}  # empty: all

    def watch(self, actor: str, peers: tuple[PeerId, ...]) -> None:
        """This actor watches these peers from now on; none means all."""
        self._peers[actor] = frozenset(peers)

    def forget(self, actor: str) -> None:
        """This actor is gone."""
        self._peers.pop(actor, None)

    def opened(self, connection: Connection) -> None:
        """A connection is there, or its peer has said who it is."""
        told = connection.identification
        observed = told.observed_address if told is not None else None
        self._tell_all(
            connection.peer, lambda: ConnectionOpened(connection.info(), connection.identified.is_set(), observed)
        )

    def judged(self, connection: Connection) -> None:
        """A connection gives no sign of life, or has given one again."""
        self._tell_all(connection.peer, lambda: ConnectionJudged(connection.info()))

    def leaving(self, connection: Connection) -> None:
        """The peer of a connection has said that it goes away."""
        self._tell_all(connection.peer, lambda: ConnectionLeaving(connection.info()))

    def closed(self, connection: Connection, end: LinkEnd) -> None:
        """A connection is gone."""
        self._tell_all(connection.peer, lambda: ConnectionClosed(connection.info(), end.code, end.reason))

    def _tell_all(self, peer: PeerId, make: Callable[[], Message]) -> None:
        message: Message | None = None
        for actor, peers in self._peers.items():
            if not peers or peer in peers:
                message = message or make()
                self._tell(actor, message)
