"""After a change of network: which connections are dead, though nobody has told them?

Theory of operation. TCP hears nothing when this machine is in another network now, or has slept: what it sends goes
nowhere, and silence is noticed by keepalives after half a minute. So when the monitor of networks tells of a change
each connection is asked for a sign of life, and one that gives none within `SIGN_OF_LIFE` seconds is ended, so that it
is dialled anew. Any byte of the peer's is a sign, and so is an acknowledgement by its kernel: an answer may have to
wait behind a lot of data on a slow line. Three things are known without asking:

- a connection whose own address this machine does not have any more is dead at once, if the peer can be reached from
  another one;
- where the peer cannot be reached at all (there is no network at the moment) nothing is ended: with the network the
  connection may come back, and that is another change;
- a connection through a relay depends on this machine's networks only as far as the one to the relay does.

Needed peers that are not connected are dialled at once, whatever their back-off says.

When it is the peer that has moved, nobody tells us; but it comes back over a new connection, and the old one, which
takes no new streams from then on, is asked for a sign of life as well. A relay so ends the circuits that lead nowhere.

Where nothing tells of a change at all (a NAT was restarted, a relay's line was cut), the kernel still knows whether
what is sent is acknowledged. A connection where that has not been so for `DOUBT` seconds takes no new streams, nor does
what runs over it through a relay: the peer is dialled anew, another way if need be. Nothing is ended by that; TCP's own
patience and keepalives decide.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import ipaddress
import socket
from collections.abc import Awaitable, Callable, Iterable
from typing import Final

import trio

from actors.switchboard.connections import Connection, ConnectionTable
from actors.switchboard.keeper import Keeper
from protocol.errors import PeerupError
from protocol.messages.network import WatchNetwork
from supervisor.actor import Context
from supervisor.errors import ActorRestartingError, AskError, NoSuchActorError

MONITOR: Final = "nat/monitor"
"""Who tells of changes."""

SIGN_OF_LIFE: Final = 3.0
"""Seconds: a lost packet is sent again within one, and a person waits no longer."""

SIGN_OF_LIFE_RELAYED: Final = 10.0
"""The same through a relay, where nobody knows what waits before an answer."""

AT_ONCE: Final = 256
"""Connections that are asked side by side."""

SUBSCRIBE_DEADLINE: Final = 2.0
"""Seconds for the monitor to answer."""

ASK_AGAIN: Final = 5.0
"""Seconds after which a monitor that did not answer, though it is there, is asked again."""

CODE: Final = "no-sign-of-life"


DOUBT: Final = 4.0
"""Seconds without an acknowledgement of what was sent, after which new streams go another way. Even where one packet in
three is lost, TCP needs more than this only once in hundreds of times."""

CLOCK_SLACK: Final = 0.01
"""Seconds by which the kernel's account of one and the same acknowledgement may differ between two looks."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Waiting:
    """What was seen of a connection at the last look.

    Attributes:
        sent: bytes.
        last: when the last acknowledgement had come.
        since: since when another one has been waited for; None if nothing waits.
    """

    sent: int
    last: float
    since: float | None


class Liveness:
    """See the module.

    Args:
        table: all live connections.
        ping: one round trip to the peer of a connection; raises a :class:`PeerupError` if there is none.
    """

    def __init__(
        self,
        context: Context,
        keeper: Keeper,
        table: ConnectionTable,
        ping: Callable[[Connection], Awaitable[object]],
    ) -> None:
        self._context = context
        self._keeper = keeper
        self._table = table
        self._waiting: dict[Connection, _Waiting] = {}
        self._ping = ping
        self._checks: dict[Connection, trio.CancelScope] = {}
        self._room = trio.CapacityLimiter(AT_ONCE)

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
            if connection.relayed:
                continue
            # What was asked before this change proves nothing now.
            if (earlier := self._checks.pop(connection, None)) is not None:
                earlier.cancel()
            self._begin(connection, "after the network has changed")
        for peer in self._keeper.peers():
            self._keeper.retry(peer)

    def superseded(self, connections: Iterable[Connection]) -> None:
        """A new connection of a peer is there; these are all of its connections."""
        for connection in connections:
            # one that either side is leaving takes no stream to ask over
            if connection.draining and not connection.parting and connection not in self._checks:
                self._begin(connection, "after the peer has made another connection")

    def tick(self) -> None:
        """Look at every connection; call it about once a second."""
        now = self._context.now()
        for gone in [connection for connection in self._waiting if connection.end is not None]:
            del self._waiting[gone]
        for connection in self._table:
            if connection.relayed or connection.gone_away:
                continue
            waiting = self._waiting.get(connection)
            if waiting is not None and waiting.since is None and waiting.sent == connection.link.sent:
                continue  # everything was acknowledged, and nothing has been sent since
            acknowledgement = connection.link.acknowledgement()
            if acknowledgement is None:
                continue
            last = now - acknowledgement.ago
            if not acknowledgement.outstanding:
                since = None
            elif waiting is None or waiting.since is None or last > waiting.last + CLOCK_SLACK:
                since = now
            else:
                since = waiting.since
            self._waiting[connection] = _Waiting(connection.link.sent, last, since)
            if since is not None and now - since >= DOUBT:
                self._doubt(connection, now)

    def _doubt(self, connection: Connection, now: float) -> None:
        """Let new streams go another way; what runs goes on if the connection lives after all."""
        del self._waiting[connection]
        self._context.log.info(
            "nothing that was sent to {} is acknowledged; streams go another way from now on", connection.peer
        )
        self._table.gone_away(connection, now)
        for other in self._table:
            if other.via.relay == connection.peer:
                self._table.gone_away(other, now)
                self._keeper.retry(other.peer)
        self._keeper.retry(connection.peer)

    def _begin(self, connection: Connection, when: str) -> None:
        scope = self._checks[connection] = trio.CancelScope()
        self._context.nursery.start_soon(self._check, connection, scope, when)

    async def _check(self, connection: Connection, scope: trio.CancelScope, when: str) -> None:
        with scope:
            async with self._room:
                verdict = path_of(connection)
                if verdict == "moved":
                    self._end(connection, "this machine no longer has the address that it was made from")
                elif verdict == "unknown" and not await self._alive(connection):
                    self._end(connection, f"no sign of life {when}")
        if self._checks.get(connection) is scope:
            del self._checks[connection]

    async def _alive(self, connection: Connection) -> bool:
        link = connection.link
        received = link.received
        began = self._context.now()
        patience = SIGN_OF_LIFE_RELAYED if connection.relayed else SIGN_OF_LIFE
        with trio.move_on_after(patience):
            try:
                await self._ping(connection)
            except PeerupError:
                # A refusal is a sign of life. What says nothing leaves the time for one, or the connection has ended.
                while connection.end is None and link.received == received:
                    with trio.move_on_after(SIGN_OF_LIFE / 10):
                        await connection.ended.wait()
            return True
        if connection.end is not None or link.received != received:
            return True
        acknowledgement = link.acknowledgement()
        return acknowledgement is not None and acknowledgement.ago < self._context.now() - began

    def _end(self, connection: Connection, reason: str) -> None:
        if connection.end is None:
            self._context.log.info("connection to {} is dead: {}", connection.peer, reason)
            connection.link.abort(CODE, reason)
            self._keeper.retry(connection.peer)


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
