"""Who is connected: one connection for each peer, shared by all; limits; life and death.

Theory of operation. All streams to a peer use its `best` connection. A second connection to the same peer can come up,
most of all when both sides dial at the same moment; then both sides must keep the same one without asking each other:

- connections that came up within `SIMULTANEOUS` seconds of each other and were dialled from different sides: the one
  dialled by the smaller peer id stays;
- otherwise the newer one stays: nobody dials a peer that they are connected to, so the older one is
  dead on the other side and we just have not noticed;
- but a direct one always stays before a relayed one. If the peer comes through a relay while there is a direct
  connection to it, the direct one is doubted: whoever `on_doubt` tells has it answer, or ends it.

The one that goes is *drained*: it takes no new streams of ours, still accepts the peer's (which may not know yet), and
is closed when it has had no stream for `LINGER` seconds. So nothing that runs is cut by the decision. The same happens
to a connection on which the peer says that it takes no more streams; who needs the peer then dials it anew. The last
bytes of streams that have ended may still be under way then: the link closes in good order, see
`actors.switchboard.closing`.

A connection that gives no sign of life is *doubted* (`actors.switchboard.liveness` judges, and nobody else): it drains
as well, so that new streams go another way, but what runs on it goes on if it lives after all. If nothing has replaced
it by then it is used again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Protocol

import trio

from actors.switchboard.errors import TooManyError
from actors.switchboard.link import Channel, LinkEnd
from actors.switchboard.wire import Acknowledgement, Way
from protocol import yamux
from protocol.identify import Identification
from protocol.messages import Data
from protocol.messages.switchboard import ConnectionInfo
from protocol.multiaddr import Multiaddr
from protocol.peer_id import PeerId
from protocol.reservations import guest_share

if TYPE_CHECKING:
    from actors.switchboard.ahead import Ahead  # which knows connections

SIMULTANEOUS = 5.0
"""Seconds within which two connections count as one accident. Longer than any dial takes to notice the other's."""
HUNG_UP = frozenset(("remote-close", "remote-go-away", "connection-lost", "circuit-cut"))
"""How a connection that we made looks when the peer ended it."""
LINGER = 1.0
"""Seconds without a stream before a drained connection is closed: more than a round trip, for streams on their way."""
DOUBT = 5.0
"""Seconds for which a relayed connection of a peer's is kept, though there is a direct one: that may turn out to be
dead."""
MAX_CONNECTIONS = 1024
MAX_CONNECTIONS_PER_PEER = 4
"""A relayed one and a direct one, each of which both sides may have dialled at the same moment."""


class Muxed(Protocol):
    """What a connection needs of :class:`actors.switchboard.link.Link`."""

    sent: int
    received: int
    rtt: float | None
    end: LinkEnd | None
    closed: bool
    on_closed: Callable[[], None]

    @property
    def session(self) -> yamux.Session:
        """Its muxer, which says go away."""
        ...

    @property
    def streams(self) -> int:
        """Open streams, both directions."""
        ...

    def open_stream(self, *, own: bool = True) -> Channel:
        """Open a stream."""
        ...

    def acknowledgement(self) -> Acknowledgement | None:
        """How the peer's machine acknowledges what is sent; None where nobody knows."""
        ...

    def charge(self, cost: float, what: str) -> None:
        """Charge the peer for work that it has made this node do."""

    def confirm(self, told: Callable[[bool], None]) -> None:
        """Learn whether the peer has received what was sent on streams that have ended."""

    def end_if_in_debt(self) -> None:
        """End it if the peer has used up its allowance."""

    def plan_flush(self) -> None:
        """Send what the muxer has to say."""

    def close(self, code: str = ..., reason: str = ...) -> None:
        """Close in good order."""
        ...

    def abort(self, code: str = ..., reason: str = ..., *, at_once: bool = ...) -> None:
        """Close now; `at_once`: with nothing that came before passed on any more."""
        ...

    @property
    def asking(self) -> bool:
        """Whether a word of the peer's is waited for."""
        ...

    def ask(self) -> None:
        """Have the peer say a word."""


def _nobody(_: Connection) -> bool:
    return False


@dataclasses.dataclass(eq=False)
class Connection:
    """One live, authenticated connection to a peer.

    Attributes:
        via: how the bytes go.
        opened: on the monotonic clock; `opened_at` is the same moment on the wall clock.
        written_about: its coming was written to the log, and so is its end.
        was_allowed: the policy has at some time allowed the peer; when it no longer does, the connection goes.
        identification: what the peer said of itself; None until then. `identify_failure` says why it did not.
        inbound_streams: streams of the peer that were handed out or are used here, with their protocol.
        gone_away: the peer takes no more streams on it, so it never becomes the best again.
        leaving: the peer has said so itself, because it is about to end.
        drained_since: since when it has been without a stream while draining; None when it is not draining.
        doubted_since: since when it has given no sign of life; None while it lives.
        doubt: set while it is doubted.
        binding: what only this connection has, known at both ends.
        unanswered: streams of ours that the peer has not said a word on, see `actors.switchboard.ahead`.
        on_unanswered: asked, when it has ended with such a stream, whether somebody tries for those.
    """

    id: str
    peer: PeerId
    outbound: bool
    via: Way
    opened: float
    opened_at: float
    binding: bytes = b""
    was_allowed: bool = False
    written_about: bool = True
    identification: Identification | None = None
    identify_failure: str = ""
    draining: bool = False
    gone_away: bool = False
    leaving: bool = False
    drained_since: float | None = None
    doubted_since: float | None = None
    end: LinkEnd | None = None
    inbound_streams: dict[Channel, str] = dataclasses.field(default_factory=dict)
    unanswered: dict[Channel, Ahead] = dataclasses.field(default_factory=dict)
    doubt: trio.Event = dataclasses.field(default_factory=trio.Event)
    identified: trio.Event = dataclasses.field(default_factory=trio.Event)
    ended: trio.Event = dataclasses.field(default_factory=trio.Event)
    link: Muxed = dataclasses.field(init=False)
    on_unanswered: Callable[[Connection], bool] = dataclasses.field(default=_nobody, init=False)

    @property
    def way(self) -> str:
        """How the peer is connected, in words for the audit log."""
        return str(self.via)

    @property
    def path(self) -> str:
        """`direct` or `relayed`."""
        return self.via.path

    @property
    def relayed(self) -> bool:
        """Whether a relay carries it."""
        return self.via.relay is not None

    @property
    def local_address(self) -> Multiaddr:
        """Our end of it, or of the way to its relay."""
        return self.via.local_address

    @property
    def remote_address(self) -> Multiaddr:
        """Where the peer is, or its relay."""
        return self.via.remote_address

    @property
    def heard(self) -> bool:
        """Whether the peer has said anything after the handshake, and so has accepted us."""
        return self.link.received > 0

    @property
    def refused_us(self) -> bool:
        """Whether the peer hung up as soon as it knew who we are; silence says nothing of that."""
        end = self.link.end
        return self.outbound and not self.heard and end is not None and end.code in HUNG_UP

    def carries(self, other: Connection) -> bool:
        """Whether the other one is a circuit over this connection to a relay."""
        return (
            other.via.relay == self.peer
            and not self.relayed
            and other.via.local_address == self.via.local_address
            and other is not self
        )

    @property
    def direction(self) -> str:
        """`outbound` if we dialled."""
        return "outbound" if self.outbound else "inbound"

    @property
    def parting(self) -> bool:
        """Whether one side has said that it goes away."""
        return self.leaving or self.link.session.local_gone

    def say_go_away(self) -> None:
        """Take no more streams of the peer, and open none; what runs goes on. Twice is once."""
        session = self.link.session
        if self.link.end is None and not session.local_gone:
            session.go_away()
            self.link.plan_flush()

    def info(self) -> ConnectionInfo:
        """What other actors are told."""
        told = self.identification
        limit = self.via.limit
        return ConnectionInfo(
            id=self.id,
            peer=self.peer,
            direction=self.direction,
            path=self.via.path,
            transport=self.via.transport,
            local_address=self.via.local_address,
            remote_address=self.via.remote_address,
            streams=self.link.streams,
            rtt=self.link.rtt if self.doubted_since is None else None,
            sent=self.link.sent,
            received=self.link.received,
            opened_at=self.opened_at,
            agent=(told.agent_version or "") if told else "",
            protocols=told.protocols if told else (),
            relay=self.via.relay,
            limit_seconds=limit.duration or None if limit is not None else None,
            limit_bytes=limit.data or None if limit is not None else None,
            in_doubt=self.doubted_since is not None,
        )

    def describe(self, name: str, now: float) -> dict[str, Data]:
        """For people; `name` is what this node calls the peer."""
        told = self.identification
        return {
            "id": self.id,
            "peer": str(self.peer),
            "name": name,
            "direction": self.direction,
            "way": self.way,
            "age": now - self.opened,
            "streams": self.link.streams,
            "rtt": self.link.rtt,
            "sent": self.link.sent,
            "received": self.link.received,
            "agent": (told.agent_version or "") if told else "",
            "observed_address": str(told.observed_address) if told and told.observed_address else None,
            "identify_failure": self.identify_failure,
            "draining": self.draining,
            "silent_for": None if self.doubted_since is None else now - self.doubted_since,
        }


class ConnectionTable:
    """All live connections.

    Args:
        own: our own peer id, which decides about simultaneous connections.
        limit, limit_per_peer: how many there may be.

    Attributes:
        on_doubt: called with a direct connection that may be dead.
    """

    def __init__(
        self, own: PeerId, *, limit: int = MAX_CONNECTIONS, limit_per_peer: int = MAX_CONNECTIONS_PER_PEER
    ) -> None:
        self._own = own
        self._limit = limit
        self._limit_per_peer = limit_per_peer
        self._by_peer: dict[PeerId, list[Connection]] = {}
        self._count = 0
        self._lost: dict[PeerId, trio.Event] = {}
        self._found: dict[PeerId, trio.Event] = {}
        self.on_doubt: Callable[[Connection], None] = _ignore

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Connection]:
        for connections in list(self._by_peer.values()):
            yield from list(connections)

    def peers(self) -> tuple[PeerId, ...]:
        """All connected peers."""
        return tuple(self._by_peer)

    def of(self, peer: PeerId) -> tuple[Connection, ...]:
        """All connections to a peer, the best one first."""
        known = self._by_peer.get(peer, ())
        return tuple(sorted(known, key=lambda connection: (connection.draining, connection.relayed)))

    def best(self, peer: PeerId) -> Connection | None:
        """The connection that new streams use."""
        for connection in self._by_peer.get(peer, ()):
            if not connection.draining:
                return connection
        return None

    def check_room(self, peer: PeerId, *, guest: bool = False) -> None:
        """Raise if one more connection to this peer, a `guest` or not, would be too many.

        Raises:
            TooManyError: it would.
        """
        limit = guest_share(self._limit) if guest else self._limit
        if self._count >= limit:
            raise TooManyError(f"{limit} connections are open, the limit")
        if self._living(peer) >= self._limit_per_peer:
            raise TooManyError(f"{self._limit_per_peer} connections to this peer are open, the limit")

    def make_room(self, peer: PeerId) -> Connection | None:
        """The connection to this peer that has to end so that there is room for another; None if none has to, or may.

        That is the one that has been silent for longest. A peer that moves from network to network leaves several.
        """
        doubted = [one for one in self._by_peer.get(peer, ()) if one.doubted_since is not None and one.link.end is None]
        if not doubted or self._living(peer) < self._limit_per_peer:
            return None
        return min(doubted, key=lambda one: one.doubted_since or 0.0)

    def _living(self, peer: PeerId) -> int:
        return sum(one.link.end is None for one in self._by_peer.get(peer, ()))

    def add(self, connection: Connection, now: float) -> None:
        """Count a connection in, and drain the one that goes if the peer now has two."""
        current = self.best(connection.peer)
        self._by_peer.setdefault(connection.peer, []).append(connection)
        self._count += 1
        if current is not None:
            loser = connection if self._stays(current, connection) else current
            loser.draining = True
            loser.drained_since = now
            if loser is connection and loser.relayed and not current.relayed and not loser.outbound:
                loser.drained_since = now + DOUBT
                if now - current.opened > SIMULTANEOUS:
                    self.on_doubt(current)
        self._tell_found(connection.peer)

    def remove(self, connection: Connection, end: LinkEnd) -> None:
        """Count a connection out; a drained one that is left takes over."""
        known = self._by_peer.get(connection.peer, [])
        if connection not in known:
            return
        known.remove(connection)
        self._count -= 1
        connection.end = end
        connection.ended.set()
        if not known:
            del self._by_peer[connection.peer]
            self._tell_lost(connection.peer)
        elif not any(not other.draining for other in known):
            self._inherit(known)

    def _inherit(self, known: list[Connection]) -> None:
        """None of these takes new streams: the best of those that the peer still serves does from now on."""
        heirs = [other for other in known if not other.gone_away and other.doubted_since is None]
        if not heirs:
            self._tell_lost(known[0].peer)
            return
        heir = max(heirs, key=lambda other: (not other.relayed, other.opened))
        heir.draining = False
        heir.drained_since = None

    def gone_away(self, connection: Connection, now: float, patience: float = 0.0) -> None:
        """The peer takes no more streams on this connection: drain it, and let another of the peer's take its place.

        It is not closed for so many seconds, however idle.
        """
        if connection.gone_away or connection.end is not None:
            return
        connection.gone_away = connection.draining = True
        connection.drained_since = now + patience
        known = self._by_peer.get(connection.peer, [])
        if connection in known and self.best(connection.peer) is None:
            self._inherit(known)

    def doubt(self, connection: Connection, now: float) -> bool:
        """It gives no sign of life: new streams go another way. Returns whether it was believed to live until now."""
        if connection.doubted_since is not None or connection.end is not None:
            return False
        connection.doubted_since = now
        connection.doubt.set()
        connection.draining = True
        known = self._by_peer.get(connection.peer, [])
        if connection in known and self.best(connection.peer) is None:
            self._inherit(known)
        return True

    def trust(self, connection: Connection, now: float) -> bool:
        """It has shown that it lives: if nothing better has replaced it, it is used again.

        Returns whether it was doubted.
        """
        if connection.doubted_since is None:
            return False
        connection.doubted_since = None
        connection.doubt = trio.Event()
        if connection.end is not None:
            return True
        connection.drained_since = now
        current = self.best(connection.peer)
        if connection.gone_away or (current is not None and (connection.relayed or not current.relayed)):
            return True
        connection.draining, connection.drained_since = False, None
        if current is not None:
            current.draining, current.drained_since = True, now
        self._tell_found(connection.peer)
        return True

    def _tell_found(self, peer: PeerId) -> None:
        if (found := self._found.pop(peer, None)) is not None:
            found.set()

    def _tell_lost(self, peer: PeerId) -> None:
        if (lost := self._lost.pop(peer, None)) is not None:
            lost.set()

    def drained(self, now: float) -> list[Connection]:
        """Draining connections that nobody has used for `LINGER` seconds: close these."""
        over = []
        for connection in self:
            if not connection.draining:
                continue
            if connection.doubted_since is not None and self.best(connection.peer) is None:
                continue  # nothing has replaced it: it may be used again
            if connection.drained_since is None:
                connection.drained_since = now
            if connection.link.streams:
                connection.drained_since = max(connection.drained_since, now)
            elif now - connection.drained_since >= LINGER:
                over.append(connection)
        return over

    async def until_lost(self, peer: PeerId) -> None:
        """Return when there is no connection to this peer that takes streams."""
        if self.best(peer) is not None:
            await self._lost.setdefault(peer, trio.Event()).wait()
        else:
            await trio.lowlevel.checkpoint()

    async def until_found(self, peer: PeerId) -> None:
        """Return when there is a connection to this peer that takes streams."""
        if self.best(peer) is not None:
            await trio.lowlevel.checkpoint()
            return
        found = self._found.setdefault(peer, trio.Event())
        try:
            await found.wait()
        finally:
            if not found.is_set() and not found.statistics().tasks_waiting:
                self._found.pop(peer, None)

    def _stays(self, current: Connection, newcomer: Connection) -> bool:
        """Whether the current connection is kept. Both sides come to the same answer."""
        if current.relayed != newcomer.relayed:
            return not current.relayed
        if newcomer.opened - current.opened > SIMULTANEOUS or newcomer.outbound == current.outbound:
            return False
        smaller_is_ours = self._own < current.peer
        return current.outbound == smaller_is_ours


def _ignore(_: Connection) -> None:
    pass
