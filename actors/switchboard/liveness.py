"""Which connections live: the one judge of that in the node.

Theory of operation. TCP hears nothing when the way to a peer is interrupted: a cable is out, this machine or the peer
is in another network now, or asleep, or a NAT has forgotten. Nobody can tell such an interruption from an end while it
lasts. So two things are decided apart:

- *New streams* avoid a connection that gives no sign of life. It is doubted, after `DOUBT` seconds if the peer's
  kernel has not acknowledged what was sent, after `DOUBT_UNANSWERED` if nobody answers, and it drains; the peer is
  dialled anew beside it, and every view of the node says so. So is what runs over it through a relay.
- *Existing streams* stay where they are for as long as the configuration wants (`Patience.silence`, judged by the
  link) and the kernel's TCP has not heard that the connection is gone. When a doubted connection shows life it is
  trusted again, and used again unless something better has replaced it.

Signs of life are bytes of the peer's and, where there is a kernel at the other end, that it acknowledges more of what
was sent: an answer may have to wait behind a lot of data on a slow line. Once all of it is acknowledged nothing is in
the way of an answer any more, and only a word counts: the kernel of a process that hangs acknowledges for ever. A
connection through a relay has no kernel at its other end, so where it says something and hears nothing it is asked.

After a change of network each direct connection is asked at once, and doubted `SIGN_OF_LIFE` seconds later; likewise
one that its peer has left: who comes back over a new connection may have lost the old one. A connection whose own
address this machine no longer has is doubted without being asked, if the peer is reached from another one. Even that
address may come back, with the same lease when a cable is plugged in again; only where it stays away for `MOVED`
seconds, and the peer has another connection that lives, is the connection ended.

Time counts only while this process looks: a node that was stopped, or a machine that slept, has missed signs of life
which may still come.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import ipaddress
import socket
from collections.abc import Callable, Iterable
from typing import Final

import trio

from actors.switchboard.connections import Connection, ConnectionTable
from actors.switchboard.keeper import Keeper
from protocol.messages.network import WatchNetwork
from supervisor.actor import Context
from supervisor.errors import ActorRestartingError, AskError, NoSuchActorError

MONITOR: Final = "nat/monitor"
"""Who tells of changes."""

SIGN_OF_LIFE: Final = 3.0
"""Seconds after a change of network: a lost packet is sent again within one, and a person waits no longer."""

DOUBT: Final = 4.0
"""Seconds without an acknowledgement of what was sent. Even where one packet in three is lost, TCP needs more than this
only once in hundreds of times."""

DOUBT_UNANSWERED: Final = 10.0
"""Seconds without a word of a peer that was asked for one: nobody knows what waits before the answer, at a relay most
of all."""

MOVED: Final = 120.0
"""Seconds for which this machine must be without the address of a connection before that is ended."""

FROZEN: Final = 5.0
"""Seconds between two looks that show that this process did not run."""

SUBSCRIBE_DEADLINE: Final = 2.0
"""Seconds for the monitor to answer."""

ASK_AGAIN: Final = 5.0
"""Seconds after which a monitor that did not answer, though it is there, is asked again."""

CODE: Final = "address-lost"


@dataclasses.dataclass(frozen=True, slots=True)
class _Signs:
    """What a connection has shown so far: bytes sent, heard, acknowledged (-1: nobody knows), and what is awaited.

    Attributes:
        outstanding: an acknowledgement.
        asking: a word.
    """

    sent: int
    received: int
    acknowledged: int
    outstanding: bool
    asking: bool

    def shows_life_since(self, earlier: _Signs) -> bool:
        """Whether it has shown life since then.

        Where an acknowledgement is due only that counts: what is heard says nothing of the way to the peer.
        """
        if self.acknowledged > earlier.acknowledged:
            return True
        return self.received > earlier.received and not (self.outstanding and earlier.outstanding)


@dataclasses.dataclass(slots=True)
class _Watched:
    """One connection: the signs at the last look, and since when more are awaited; None if none are.

    Attributes:
        due: since when a word is awaited that nothing is in the way of; None if that is not so.
    """

    signs: _Signs
    since: float | None = None
    due: float | None = None
    deadline: float | None = None  # of a sign of life that was asked for
    why: str = ""
    word: bool = False  # only a word of the peer's counts until then


class Liveness:
    """See the module.

    Args:
        table: all live connections.
        judged: told of each connection that is doubted, or trusted again.
    """

    def __init__(
        self, context: Context, keeper: Keeper, table: ConnectionTable, judged: Callable[[Connection], None]
    ) -> None:
        self._context = context
        self._keeper = keeper
        self._table = table
        self._judged = judged
        self._watched: dict[Connection, _Watched] = {}
        self._moved: dict[Connection, float] = {}
        self._looked_at = context.now()
        # Somebody on the way may acknowledge, while the peer knows better and comes another way.
        table.on_doubt = lambda connection: self._expect(connection, "its peer came through a relay", word=True)

    async def follow(self) -> None:
        """Ask the monitor to tell of changes; when it is not there, ActorUp says when to call this again."""
        while True:
            try:
                await self._context.ask(MONITOR, WatchNetwork(), timeout=SUBSCRIBE_DEADLINE)
            except (NoSuchActorError, ActorRestartingError):
                return
            except AskError as error:
                self._context.log.warning("changes of the network are not told: {}", error)
                await trio.sleep(ASK_AGAIN)
            else:
                return

    def network_changed(self) -> None:
        """Find out about every connection anew, and dial who is missing."""
        for connection in self._table:
            # a circuit depends on this machine's networks only as far as the connection to its relay does
            if connection.relayed or connection.end is not None:
                continue
            verdict = path_of(connection)
            if verdict == "moved":
                self._moved.setdefault(connection, self._context.now())
                self._doubt(connection, "this machine no longer has the address that it was made from")
                continue
            self._moved.pop(connection, None)
            # where no way leads to the peer at all nothing can be said; when there is one, that is another change
            if verdict == "unknown":
                self._expect(connection, "after the network has changed")
        for peer in self._keeper.peers():
            self._keeper.retry(peer)

    def superseded(self, connections: Iterable[Connection]) -> None:
        """A new connection of a peer is there; these are all of its connections."""
        for connection in connections:
            watched = self._watched.get(connection)
            if connection.draining and not connection.parting and (watched is None or watched.deadline is None):
                self._expect(connection, "after the peer has made another connection")

    def tick(self) -> None:
        """Look at every connection; call it about once a second."""
        now = self._context.now()
        frozen, self._looked_at = now - self._looked_at >= FROZEN, now
        for gone in [connection for connection in self._watched if connection.end is not None]:
            del self._watched[gone]
        for connection in self._table:
            if connection.end is None:
                self._look(connection, now, frozen=frozen)
        for connection, since in list(self._moved.items()):
            if connection.end is not None:
                del self._moved[connection]
            elif now - since >= MOVED and self._table.best(connection.peer) is not None:
                del self._moved[connection]
                if path_of(connection) == "moved":
                    self._end(connection, f"this machine has been without its address for {MOVED:g} s")

    def _look(self, connection: Connection, now: float, *, frozen: bool) -> None:
        watched = self._watched.get(connection)
        if (
            watched is not None
            and watched.since is None
            and watched.deadline is None
            and connection.doubted_since is None
            and watched.signs.sent == connection.link.sent
        ):
            return  # nothing is awaited, and nothing has been sent since
        signs = _signs(connection)
        if watched is None:
            watched = self._watched[connection] = _Watched(signs)
        before, watched.signs = watched.signs, signs
        due = watched.due
        watched.due = _word_due(due, before, signs, now, frozen=frozen)
        silent = watched.word and watched.deadline is not None and signs.received == before.received
        if watched.due is not None and now - watched.due >= DOUBT_UNANSWERED and connection.doubted_since is None:
            self._doubt(connection, "all that is sent is acknowledged, but nobody answers")
        elif not silent and (due is None or watched.due is None) and signs.shows_life_since(before):
            watched.since = now if signs.outstanding or signs.asking else None
            watched.deadline = None
            self._trust(connection)
        elif connection.doubted_since is None:
            self._wait(connection, watched, before, now, frozen=frozen)

    def _wait(self, connection: Connection, watched: _Watched, before: _Signs, now: float, *, frozen: bool) -> None:
        signs = watched.signs
        if signs.acknowledged < 0 and signs.sent > before.sent:
            connection.link.ask()
        if not signs.outstanding and not connection.link.asking:
            watched.since = None
        elif watched.since is None or frozen or (signs.outstanding and not before.outstanding):
            watched.since = now
        if frozen and watched.deadline is not None:
            watched.deadline = now + _patience(connection)
        if watched.deadline is not None and now >= watched.deadline:
            self._doubt(connection, f"no sign of life {watched.why}")
        elif watched.since is not None and now - watched.since >= (DOUBT if signs.outstanding else DOUBT_UNANSWERED):
            what = "nothing that is sent is acknowledged" if signs.outstanding else "nobody answers"
            self._doubt(connection, what)

    def _expect(self, connection: Connection, why: str, *, word: bool = False) -> None:
        """Have it show that it lives, soon."""
        if connection.end is not None:
            return
        connection.link.ask()
        if connection.doubted_since is None:
            watched = self._watched[connection] = _Watched(_signs(connection))
            watched.deadline, watched.why = self._context.now() + _patience(connection), why
            watched.word = word

    def _doubt(self, connection: Connection, why: str) -> None:
        """Let new streams go another way; what runs goes on if the connection lives after all."""
        now = self._context.now()
        watched = self._watched.setdefault(connection, _Watched(_signs(connection)))
        watched.since = watched.deadline = None
        if not self._table.doubt(connection, now):
            return
        connection.link.ask()  # whatever answers shows that it lives
        self._context.log.info("the connection to {} is in doubt, and new streams avoid it: {}", connection.peer, why)
        self._judged(connection)
        for other in self._table:
            if connection.carries(other):
                self._doubt(other, f"its relay {connection.peer} is silent")
        self._keeper.retry(connection.peer)

    def _trust(self, connection: Connection) -> None:
        since = connection.doubted_since
        if since is None or not self._table.trust(connection, self._context.now()):
            return
        seconds = self._context.now() - since
        self._context.log.info("the connection to {} lives, after {:.0f} s in doubt", connection.peer, seconds)
        self._judged(connection)
        for other in self._table:
            if connection.carries(other) and other.doubted_since is not None:
                other.link.ask()

    def _end(self, connection: Connection, reason: str) -> None:
        self._context.log.info("connection to {} is dead: {}", connection.peer, reason)
        connection.link.abort(CODE, reason)
        self._keeper.retry(connection.peer)


def _word_due(due: float | None, before: _Signs, signs: _Signs, now: float, *, frozen: bool) -> float | None:
    """Since when a word is awaited though the peer's kernel has all that was sent, and what it waits for."""
    if not signs.asking or signs.acknowledged < 0 or signs.received > before.received:
        return None
    if due is None:
        return None if signs.outstanding else now
    return now if frozen else due


def _patience(connection: Connection) -> float:
    """Seconds for a sign of life that was asked for."""
    return DOUBT_UNANSWERED if connection.relayed else SIGN_OF_LIFE


def _signs(connection: Connection) -> _Signs:
    link = connection.link
    told = None if connection.relayed else link.acknowledgement()
    if told is None:
        return _Signs(link.sent, link.received, -1, outstanding=False, asking=link.asking)
    return _Signs(link.sent, link.received, told.acknowledged, told.outstanding, link.asking)


def path_of(connection: Connection) -> str:
    """What this machine's addresses and routes say of a connection.

    `moved`: it was made from an address that is gone, and the peer is reached from another one now. `down`: no route
    leads to the peer. `unknown`: it may live.
    """
    local, remote = connection.local_address.ip, connection.remote_address.ip
    port = connection.remote_address.endpoint
    if connection.path != "direct" or local is None or remote is None or port is None:
        return "unknown"
    if local.is_link_local or remote.is_link_local or local.is_loopback:
        return "unknown"
    family = socket.AF_INET if local.version == 4 else socket.AF_INET6
    try:
        source = _source(family, str(remote), port.port)
    except OSError as error:
        return "down" if error.errno in (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EADDRNOTAVAIL) else "unknown"
    if source == local:
        return "unknown"
    return "unknown" if _is_ours(family, str(local)) else "moved"


def _source(family: int, host: str, port: int) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """The address that this machine would reach a host from. Nothing is sent."""
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.connect((host, port))
        return ipaddress.ip_address(sock.getsockname()[0])


def _is_ours(family: int, host: str) -> bool:
    with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.bind((host, 0))
        return True
    return False
