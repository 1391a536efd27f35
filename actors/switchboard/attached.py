"""Streams that are joined with sockets: whose they are, what they carried, how they ended.

Theory of operation. Each stream has an owner, the registered name of a proxy actor, who gave or will give the socket::

    offered --AttachSocket--> attached --> ended --the owner was told--> forgotten
       |---------------- deadline, reset by the peer, owner gone ------^
       |--RejectStream--> forgotten
    opened with a socket --> attached

Most are opened and connected without a word from their owner (`actors.switchboard.doors`).

An owner is told by reports, one at a time and each answered: what bytes its streams have carried since the last one,
and which have ended. What was not answered is told again, and while the owner is away nothing is sent. So its
successor counts what it missed, and a stream's end is in the audit log even if its owner was killed before. Streams
whose owner stays away for good are reset: nobody could close them any more.

That a stream has finished is told when the peer is known to have received all of it (`Link.confirm`). If the connection
ends before, it has not finished but was lost: what went into a buffer may never have arrived.
"""

from __future__ import annotations

import dataclasses
import os
import resource
import socket
from collections import Counter
from collections.abc import Callable

import trio

from actors.pump import Outcome
from actors.switchboard.connections import Connection
from actors.switchboard.errors import SwitchboardError, TooManyError
from actors.switchboard.link import Channel
from actors.switchboard.protocols import CancellableTimer
from actors.switchboard.socket_end import SocketEnd
from actors.switchboard.streams import Negotiation
from protocol.messages import Descriptor
from protocol.messages.switchboard import AttachedStream, EndedStream, StreamReport, StreamTraffic
from protocol.peer_id import PeerId
from protocol.shares import share
from protocol.stream_descriptor import ResetCode
from supervisor.actor import Context
from supervisor.errors import AskError

OFFER_DEADLINE = 30.0
"""Seconds for an actor to give a socket to a stream that was offered: it may try several addresses of its service."""
MAX_OFFERED = 1024
"""Streams that may wait for a socket."""
MAX_OFFERED_PER_PEER = 512
"""So that one peer cannot take all the room."""
RESERVED_DESCRIPTORS = 256
"""Descriptors of the process that are not for streams: listeners, connections to peers, links to other actors."""
MAX_OFFERED_BYTES = 32 * 1024 * 1024
"""Bytes that may wait together with them."""
REPORT_DELAY = 0.1
"""Seconds between the end of a stream and its report: those that end in the meantime share it."""
TRAFFIC_INTERVAL = 2.0
"""Seconds between reports of bytes while they flow."""
REPORT_DEADLINE = 5.0
"""Seconds for an owner to note a report; else it is told again."""
LAST_REPORT_DEADLINE = 0.5
"""Seconds for all owners together when the switchboard stops."""
OWNER_PATIENCE = 60.0
"""Seconds that the streams of an owner go on without it."""
FINISHING = 3.0
"""Seconds that streams which have finished get when their owner stops: several round trips, and less than it waits."""
MAX_REPORTED = 512
"""Ended streams in one report; of running ones an owner has no more than it accepts."""
MAX_UNTOLD = 4096
"""Ended streams that are kept for an owner; the oldest go first, and before others those of a peer that has more of
them than its share."""
TRIMMED = 256
"""So many are dropped at a time."""


class NotATcpSocketError(SwitchboardError):
    """A descriptor that was given to be attached is not a connected TCP socket."""

    code = "not-a-tcp-socket"


@dataclasses.dataclass(eq=False)
class _Stream:
    id: str
    owner: _Owner
    connection: Connection
    protocol: str
    since: float
    channel: Channel | None = None
    end: SocketEnd | None = None
    deadline: CancellableTimer | None = None
    told_sent: int = 0
    told_received: int = 0
    watchers: list[Callable[[int], None]] = dataclasses.field(default_factory=list)

    def traffic(self) -> tuple[int, int]:
        return (self.end.sent, self.end.received) if self.end is not None else (0, 0)

    def info(self, sent: int, received: int) -> AttachedStream:
        return AttachedStream(
            self.id, self.connection.peer, self.protocol, self.connection.way, self.since, sent, received
        )


@dataclasses.dataclass(eq=False)
class _Owner:
    name: str
    streams: dict[str, _Stream] = dataclasses.field(default_factory=dict)
    ended: list[tuple[_Stream, EndedStream]] = dataclasses.field(default_factory=list)
    unknown: dict[_Stream, None] = dataclasses.field(default_factory=dict)  # running, and not told of yet
    finished: dict[_Stream, EndedStream] = dataclasses.field(default_factory=dict)  # and not known to have arrived
    turned_away: int = 0
    peer_full: int = 0
    away_since: float | None = None
    deaf_since: float | None = None  # since when no report was answered
    reporting: bool = False
    planned: bool = False
    told_at: float = 0.0
    news: trio.Event = dataclasses.field(default_factory=trio.Event)  # of an end


class AttachedStreams:
    """All of them.

    Args:
        context: of the switchboard; its incarnation makes ids that no other one has used.
        call_later: the reactor's timer.
    """

    def __init__(self, context: Context, call_later: Callable[[float, Callable[[], None]], CancellableTimer]) -> None:
        self._context = context
        self._now = context.now
        self._call_later = call_later
        self._owners: dict[str, _Owner] = {}
        self._streams: dict[str, _Stream] = {}
        self._of_channel: dict[Channel, _Stream] = {}
        self._by_peer: Counter[PeerId | tuple[str, PeerId]] = Counter()
        self._most = max(1, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - RESERVED_DESCRIPTORS)
        self._down: set[str] = set()  # names of actors that are away
        self._count = 0
        self._offered_by: Counter[PeerId] = Counter()
        self._offered_bytes = 0
        self._offered_bytes_of: Counter[PeerId] = Counter()
        self.offered = 0

    def __len__(self) -> int:
        return len(self._streams)

    # ---- streams come

    def open(
        self,
        owner: str,
        connection: Connection,
        protocol: str,
        channel: Channel,
        sock: socket.socket,
        *,
        unread: bytes = b"",
        negotiation: Negotiation | None = None,
        known: bool = True,
        prepared: bool = False,
    ) -> str:
        """Join a channel with a socket, which is taken over if this succeeds. The stream's id.

        `known`: the owner learns of it otherwise; else it is in the next report. `prepared`: see `SocketEnd.attach`.

        Raises:
            LinkClosedError, OSError: the stream, or the socket, is over.
        """
        stream = self._join(owner, connection, protocol, channel, unread=unread, negotiation=negotiation)
        assert stream.end is not None
        try:
            stream.end.attach(sock, prepared=prepared)
        except OSError:
            self._forget(stream)
            raise
        if not known and stream.end is not None:
            stream.owner.unknown[stream] = None
            self._plan(stream.owner)
        return stream.id

    def moved(self, old: Channel, new: Channel, connection: Connection) -> None:
        """What was on a channel is on another one, of another connection to the same peer, now."""
        stream = self._of_channel.pop(old, None)
        if stream is not None:
            self._of_channel[new] = stream
            stream.channel, stream.connection = new, connection

    def watch(self, connection: Connection, number: int, ended: Callable[[int], None]) -> bool:
        """Tell how the stream of this yamux id, which the peer has opened, ends: 0 if all has arrived.

        Whether there is one that is, or will be, joined with a socket.
        """
        for channel in connection.inbound_streams:
            if channel.id == number:
                stream = self._of_channel.get(channel)
                if stream is None or stream.end is None:
                    return False
                stream.end.confirm()
                stream.watchers.append(ended)
                return True
        return False

    def disown(self, stream_id: str) -> None:
        """The owner of this stream, which is over, was told so otherwise, and does not know it by its id."""
        for owner in self._owners.values():
            owner.ended = [each for each in owner.ended if each[0].id != stream_id]
            for stream in [each for each in owner.finished if each.id == stream_id]:
                del owner.finished[stream]

    def has_share(self, owner: str, peer: PeerId, limit: int) -> bool:
        """Whether this peer has fewer of the `limit` streams of an owner than its share, and of all descriptors too."""
        mine = self._by_peer.get((owner, peer), 0)
        return mine < share(limit) and self._by_peer.get(peer, 0) < share(self._most)

    def has_room(self, owner: str, limit: int) -> bool:
        """Whether fewer than `limit` streams of this owner run or wait for a socket."""
        known = self._owners.get(owner)
        return known is None or len(known.streams) < limit

    def turn_away(self, owner: str, *, peer_full: bool = False) -> None:
        """A caller of this owner's was reset because it had no room, or because its peer takes no more streams."""
        known = self._owner(owner)
        if peer_full:
            known.peer_full += 1
        else:
            known.turned_away += 1
        self._plan(known)

    def offer(self, owner: str, connection: Connection, protocol: str, channel: Channel, unread: bytes) -> str:
        """Let a channel wait for a socket. The stream's id.

        Raises:
            LinkClosedError: the stream is over.
            TooManyError: so many wait already.
        """
        if self.offered >= MAX_OFFERED or self._offered_by[connection.peer] >= MAX_OFFERED_PER_PEER:
            raise TooManyError("too many streams wait for a socket")
        stream = self._join(owner, connection, protocol, channel, unread=unread, negotiation=None)
        self.offered += 1
        self._offered_by[connection.peer] += 1
        stream.deadline = self._call_later(OFFER_DEADLINE, lambda: self._abort(stream, ResetCode.SERVICE_UNREACHABLE))
        return stream.id

    def attach(self, owner: str, stream_id: str, sock: socket.socket) -> None:
        """Give a stream that was offered its socket. If it is over, or not theirs, the socket is closed."""
        stream = self._offered_to(owner, stream_id)
        if stream is None or stream.end is None:
            sock.close()
            return
        self._no_longer_offered(stream)
        try:
            check_socket(sock)
            stream.end.attach(sock)
        except (OSError, NotATcpSocketError):
            sock.close()
            self._abort(stream, ResetCode.LOCAL_RESET)

    def reject(self, owner: str, stream_id: str, code: int) -> None:
        """Reset a stream that was offered; its owner knows, and is not told of it."""
        stream = self._offered_to(owner, stream_id)
        if stream is not None:
            self._forget(stream)
            self._abort(stream, code)

    # ---- owners come and go

    def owner_down(self, owner: str) -> None:
        """Its streams go on, but those that wait for a socket would wait in vain."""
        self._down.add(owner)
        known = self._owners.get(owner)
        if known is not None:
            known.away_since = self._now()
            self._abort_offered(known)

    def owner_up(self, owner: str) -> None:
        """It is back: tell it what it missed."""
        self._down.discard(owner)
        known = self._owners.get(owner)
        if known is not None and known.away_since is not None:
            known.away_since = None
            self._plan(known)

    def adopt(self, owner: str) -> tuple[AttachedStream, ...]:
        """The streams whose end the owner, which has just started, was not told of."""
        self.owner_up(owner)
        known = self._owners.get(owner)
        if known is None:
            return ()
        self._abort_offered(known)
        streams = [*known.streams.values(), *known.finished, *(stream for stream, _ in known.ended)]
        known.unknown.clear()
        return tuple(stream.info(stream.told_sent, stream.told_received) for stream in streams)

    def close(self, owner: str) -> tuple[EndedStream, ...]:
        """Reset all streams of an owner. All ends that it was not told of."""
        known = self._owners.pop(owner, None)
        if known is None:
            return ()
        for stream in list(known.streams.values()):
            self._abort(stream, ResetCode.SHUTDOWN)
        for stream in list(known.finished):
            self._was_received(stream, received=False, reason="nobody waited for the peer to confirm the end of it")
        return tuple(ended for _, ended in known.ended)

    async def close_soon(self, owner: str) -> tuple[EndedStream, ...]:
        """The same, but give those that have finished a moment: for what a socket must take, and to be confirmed."""
        known = self._owners.get(owner)
        if known is not None:
            for stream in list(known.streams.values()):
                if stream.end is None or not stream.end.finishing:
                    self._abort(stream, ResetCode.SHUTDOWN)
            with trio.move_on_after(FINISHING):
                while known.streams or known.finished:
                    known.news = trio.Event()
                    await known.news.wait()
        return self.close(owner)

    async def say_goodbye(self) -> None:
        """Tell owners that are there what they were not told; the switchboard is stopping."""
        with trio.move_on_after(LAST_REPORT_DEADLINE):
            async with trio.open_nursery() as nursery:
                for owner in self._owners.values():
                    if owner.ended and owner.away_since is None:
                        report = StreamReport((), tuple(ended for _, ended in owner.ended))
                        nursery.start_soon(self._was_told, owner, report)

    def tick(self) -> None:
        """Report traffic that is due; close what nobody owns any more. To be called every second or so."""
        now = self._now()
        for owner in list(self._owners.values()):
            missed_since = owner.away_since or owner.deaf_since
            if missed_since is not None and now - missed_since >= OWNER_PATIENCE:
                self._context.log.warning("closed the streams of {}, which did not come back", owner.name)
                self.close(owner.name)
            elif owner.away_since is None and now - owner.told_at >= TRAFFIC_INTERVAL:
                self._report(owner)
            busy = owner.streams or owner.finished or owner.ended or owner.turned_away or owner.peer_full
            if not busy and not owner.reporting:
                self._owners.pop(owner.name, None)

    # ---- streams go

    def _join(
        self,
        owner: str,
        connection: Connection,
        protocol: str,
        channel: Channel,
        *,
        unread: bytes,
        negotiation: Negotiation | None,
    ) -> _Stream:
        known = self._owner(owner)
        self._count += 1
        stream = _Stream(f"{self._context.incarnation}-{self._count}", known, connection, protocol, self._now())
        stream.end = SocketEnd(
            channel,
            lambda outcome, code: self._ended(stream, outcome, code),
            unread=unread,
            negotiation=negotiation,
            admit=lambda length: self._admit(connection.peer, length),
        )
        self._streams[stream.id] = known.streams[stream.id] = self._of_channel[channel] = stream
        stream.channel = channel
        for key in (connection.peer, (owner, connection.peer)):
            self._by_peer[key] += 1
        return stream

    def _owner(self, name: str) -> _Owner:
        known = self._owners.get(name)
        if known is None:
            away_since = self._now() if name in self._down else None
            known = self._owners[name] = _Owner(name, told_at=self._now(), away_since=away_since)
        return known

    def _ended(self, stream: _Stream, outcome: Outcome, code: int) -> None:
        if self._streams.get(stream.id) is not stream:
            return
        self._forget(stream)
        owner = stream.owner
        sent, received = stream.traffic()
        stream.end = None
        for told in stream.watchers:
            told(0 if outcome is Outcome.FINISHED else int(code) or int(ResetCode.LOST))
        end = stream.connection.link.end if code == ResetCode.CONNECTION_LOST else None
        duration, reason = self._now() - stream.since, "" if end is None else end.reason
        ended = EndedStream(stream.info(sent, received), duration, outcome.value, int(code), reason)
        if outcome is Outcome.FINISHED:
            owner.finished[stream] = ended
            stream.connection.link.confirm(lambda received: self._was_received(stream, received=received))
        else:
            self._note_end(stream, ended)

    def _was_received(self, stream: _Stream, *, received: bool, reason: str = "") -> None:
        """The peer has received all of a stream that has finished, or nobody knows."""
        ended = stream.owner.finished.pop(stream, None)
        if ended is None:
            return
        if not received:
            if not reason:
                end = stream.connection.link.end
                if end is None:
                    reason = "the peer has not confirmed the end of the stream"
                else:
                    reason = f"the connection ended before the peer had confirmed the end of the stream: {end.reason}"
            ended = dataclasses.replace(
                ended, outcome=Outcome.STREAM_RESET.value, code=int(ResetCode.CONNECTION_LOST), reason=reason
            )
        self._note_end(stream, ended)

    def _note_end(self, stream: _Stream, ended: EndedStream) -> None:
        owner = stream.owner
        owner.ended.append((stream, ended))
        if len(owner.ended) >= MAX_UNTOLD + TRIMMED:
            owner.ended = _most_recent(owner.ended)
        owner.news.set()
        self._plan(owner)

    def _admit(self, peer: PeerId, length: int) -> bool:
        of_peer = self._offered_bytes_of[peer] + length
        if length > 0 and (self._offered_bytes + length > MAX_OFFERED_BYTES or of_peer > share(MAX_OFFERED_BYTES)):
            return False
        self._offered_bytes += length
        self._offered_bytes_of[peer] = of_peer
        if not of_peer:
            del self._offered_bytes_of[peer]
        return True

    def _abort(self, stream: _Stream, code: int) -> None:
        if stream.end is not None:
            stream.end.abort(code)

    def _abort_offered(self, owner: _Owner) -> None:
        for stream in list(owner.streams.values()):
            if stream.deadline is not None:
                self._abort(stream, ResetCode.SERVICE_UNAVAILABLE)

    def _offered_to(self, owner: str, stream_id: str) -> _Stream | None:
        stream = self._streams.get(stream_id)
        return stream if stream is not None and stream.deadline is not None and stream.owner.name == owner else None

    def _no_longer_offered(self, stream: _Stream) -> None:
        if stream.deadline is not None:
            stream.deadline.cancel()
            stream.deadline = None
            self.offered -= 1
            self._offered_by[stream.connection.peer] -= 1
            if not self._offered_by[stream.connection.peer]:
                del self._offered_by[stream.connection.peer]

    def _forget(self, stream: _Stream) -> None:
        self._no_longer_offered(stream)
        self._streams.pop(stream.id, None)
        if stream.channel is not None:
            self._of_channel.pop(stream.channel, None)
            stream.channel = None
            for key in (stream.connection.peer, (stream.owner.name, stream.connection.peer)):
                self._by_peer[key] -= 1
                if not self._by_peer[key]:
                    del self._by_peer[key]
        stream.owner.streams.pop(stream.id, None)
        stream.owner.unknown.pop(stream, None)

    # ---- reports

    def _plan(self, owner: _Owner) -> None:
        if not owner.planned and owner.away_since is None:
            owner.planned = True
            self._call_later(REPORT_DELAY, lambda: self._planned(owner))

    def _planned(self, owner: _Owner) -> None:
        owner.planned = False
        self._report(owner)

    def _report(self, owner: _Owner) -> None:
        if owner.reporting or owner.away_since is not None or self._owners.get(owner.name) is not owner:
            return
        owner.told_at = self._now()
        moved = []
        for stream in owner.streams.values():
            sent, received = stream.traffic()
            if (sent, received) != (stream.told_sent, stream.told_received):
                moved.append((stream, StreamTraffic(stream.id, sent, received)))
        ended = owner.ended[:MAX_REPORTED]
        opened = list(owner.unknown)
        if not moved and not ended and not opened and not owner.turned_away and not owner.peer_full:
            return

        owner.reporting = True
        self._context.nursery.start_soon(self._send, owner, moved, ended, opened)

    async def _send(
        self,
        owner: _Owner,
        moved: list[tuple[_Stream, StreamTraffic]],
        ended: list[tuple[_Stream, EndedStream]],
        opened: list[_Stream],
    ) -> None:
        report = StreamReport(
            tuple(traffic for _, traffic in moved),
            tuple(each for _, each in ended),
            tuple(stream.info(stream.told_sent, stream.told_received) for stream in opened),
            owner.turned_away,
            owner.peer_full,
        )
        answered = await self._was_told(owner, report)
        owner.reporting = False
        if not answered:
            owner.deaf_since = owner.deaf_since or self._now()
            return
        owner.deaf_since = None
        owner.turned_away -= report.turned_away
        owner.peer_full -= report.peer_full
        for stream in opened:
            owner.unknown.pop(stream, None)
        for stream, traffic in moved:
            stream.told_sent, stream.told_received = traffic.sent, traffic.received
        gone = {stream for stream, _ in ended}
        owner.ended = [each for each in owner.ended if each[0] not in gone]
        if owner.ended or owner.unknown or owner.turned_away or owner.peer_full:
            self._plan(owner)

    async def _was_told(self, owner: _Owner, report: StreamReport) -> bool:
        try:
            await self._context.ask(owner.name, report, timeout=REPORT_DEADLINE)
        except AskError:
            return False
        return True


def check_socket(sock: socket.socket) -> None:
    """Raise unless it is a connected TCP socket.

    Raises:
        NotATcpSocketError: it is none.
        OSError: it is not connected any more.
    """
    if sock.family not in (socket.AF_INET, socket.AF_INET6) or sock.type != socket.SOCK_STREAM:
        raise NotATcpSocketError("the descriptor is not a TCP socket")
    sock.getpeername()


def socket_of(descriptor: Descriptor) -> socket.socket | None:
    """The socket behind a descriptor that another actor sent; None (and closed) if it is none."""
    fd = descriptor.detach()
    try:
        return socket.socket(fileno=fd)
    except OSError:
        os.close(fd)
        return None


def _most_recent(ended: list[tuple[_Stream, EndedStream]]) -> list[tuple[_Stream, EndedStream]]:
    """The `MAX_UNTOLD` that are kept of these, in the same order."""
    excess = len(ended) - MAX_UNTOLD
    by_peer = Counter(stream.connection.peer for stream, _ in ended)
    kept: list[tuple[_Stream, EndedStream]] = []
    for each in ended:
        peer = each[0].connection.peer
        if excess and by_peer[peer] > share(MAX_UNTOLD):
            by_peer[peer] -= 1
            excess -= 1
        else:
            kept.append(each)
    return kept[excess:]
