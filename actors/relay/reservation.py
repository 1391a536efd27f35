"""One relay: the machine of `protocol.keeper`, and what carries out its commands.

Theory of operation. The machine is told everything that happens, from whatever task it happens in, and says in the same
turn what to do. At most one attempt is under way, in a task of its own; when the machine has gone on to another attempt
the task is cancelled, so nothing late can disturb. One more task sleeps until the machine's next wake-up.

A reservation belongs to the connection that it was made over. When that ends while there is another one to the same
relay, the reservation is proved by renewing it over that; when it was the only one, the reservation is lost. Whether a
connection lives is for the switchboard to judge, and no connection is closed from here. While it is in doubt nobody may
rely on the reservation; the relay may hold it all the same, and circuits that run through it go on.

What a predecessor of this process held (`Inheritance`) is announced until the first attempt has ended, if the
connection is still there: the relay has not noticed that we were gone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import socket
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

import trio

from actors.relay.hop import exchange
from protocol import keeper as machine
from protocol.circuit.addresses import circuit_addresses
from protocol.circuit.hop_client import Grant, ReserveClient
from protocol.errors import PeerupError
from protocol.messages.reservations import RelayStatus
from protocol.messages.switchboard import ConnectionInfo, StreamOpened
from protocol.multiaddr import Multiaddr
from protocol.peer_id import PeerId

MAX_ADDRESSES = 8
"""Relayed addresses of one relay that are announced: every peer has to try them in turn."""


class Switchboard(Protocol):
    """What is needed of the switchboard. Each call raises a :class:`PeerupError` with the reason when it fails."""

    async def connect(self, relay: PeerId) -> ConnectionInfo:
        """Be connected."""
        ...

    async def open_hop(self, relay: PeerId) -> StreamOpened:
        """Open a hop stream."""
        ...

    async def ping(self, relay: PeerId) -> float:
        """Measure a round trip, in seconds."""
        ...


@dataclasses.dataclass(frozen=True)
class Inheritance:
    """What a predecessor held at a relay: over which connection, and where others reached us."""

    connection: str
    addresses: tuple[Multiaddr, ...]


class KeptReservation:
    """Keeps the reservation at one relay.

    Args:
        nursery: where its tasks run.
        us: whom the reservation is for.
        changed: called when :attr:`announced` may have changed.
        counted: called with `granted`, `refused` or `failed` at the end of each attempt, and with `lost` when the
            connection of a reservation has ended, or `leaving` when the relay shuts down.
        uniform, now, wall: randomness and the clocks.

    Attributes:
        peer: the relay.
        addresses: where it is, as configured.
        last_outcome: of the last attempt, as `counted` was told; empty before the first.
    """

    def __init__(
        self,
        nursery: trio.Nursery,
        switchboard: Switchboard,
        peer: PeerId,
        us: PeerId,
        *,
        changed: Callable[[], None],
        counted: Callable[[PeerId, str], None],
        uniform: machine.Uniform,
        now: Callable[[], float],
        wall: Callable[[], float],
        log: Callable[[str], None],
    ) -> None:
        self.peer = peer
        self.addresses: tuple[Multiaddr, ...] = ()
        self.last_outcome = ""
        self._nursery = nursery
        self._switchboard = switchboard
        self._us = us
        self._changed = changed
        self._counted = counted
        self._now = now
        self._wall = wall
        self._log = log
        self._machine = machine.Keeper(uniform)
        self._connections: dict[str, ConnectionInfo] = {}
        self._rtt: float | None = None
        self._used = ""  # the connection of the last hop stream
        self._hung_up = False  # the relay on us, when it knew who we are, at the last attempt that failed
        self._relayed: tuple[Multiaddr, ...] = ()  # while there is a reservation
        self._inherited: Inheritance | None = None
        self._seen = machine.Health()
        self._attempt = 0  # what `_scope` belongs to
        self._scope = trio.CancelScope()
        self._life = trio.CancelScope()
        self._news = trio.Event()

    # ---- what is told to others

    @property
    def held(self) -> bool:
        """Whether there is a reservation."""
        return self._machine.grant is not None

    @property
    def announced(self) -> tuple[Multiaddr, ...]:
        """Where others can reach us through this relay now."""
        if self._machine.grant is not None:
            return self._relayed
        inherited = self._inherited
        return inherited.addresses if inherited is not None and inherited.connection in self._connections else ()

    @property
    def connections(self) -> frozenset[str]:
        """The connections to the relay, by id."""
        return frozenset(self._connections)

    @property
    def rtt(self) -> float | None:
        """Seconds of one round trip to the relay, as last measured; None while nothing shows that it lives."""
        return self._rtt if any(not connection.in_doubt for connection in self._connections.values()) else None

    def legacy(self) -> Inheritance | None:
        """What a successor of this process may announce at once; None without a reservation."""
        return Inheritance(self._used, self._relayed) if self.held else None

    def status(self) -> RelayStatus:
        """All of it, for people."""
        now, health, grant = self._now(), self._machine.health, self._machine.grant
        due, expires = self._machine.due, self._machine.expires
        limit = grant.limit if grant is not None else None
        return RelayStatus(
            peer=self.peer,
            addresses=self.addresses,
            state=self._machine.state,
            relayed_addresses=self.announced,
            expires_in=None if expires is None else max(0.0, expires - now),
            held_for=None if health.held_since is None else now - health.held_since,
            next_attempt=None if due is None else max(0.0, due - now),
            limit_seconds=(limit.duration or None) if limit is not None else None,
            limit_bytes=(limit.data or None) if limit is not None else None,
            rtt=self.rtt,
            last_failure=health.last_error,
            granted=health.successes,
            failed=health.failures,
            warning=self._machine.warning,
        )

    # ---- what happens

    def start(self, inherited: Inheritance | None = None) -> None:
        """Begin to keep a reservation."""
        self._inherited = inherited
        self._seen = machine.Health()
        self._nursery.start_soon(self._run)
        self._do(self._machine.start(self._now(), self._wall()))

    def stop(self) -> None:
        """End it: no more attempts, nothing announced."""
        self._inherited = None
        self._do(self._machine.stop(self._now(), self._wall()))
        self._life.cancel()

    def retry(self) -> None:
        """Something has changed for which an attempt may succeed now: do not wait any longer, if it waits."""
        if self._machine.state == "waiting":
            self.network_changed()

    def network_changed(self) -> None:
        """Try at once, and prove what seems to be held."""
        self._do(self._machine.network_changed(self._now(), self._wall()))

    def connections_are(self, connections: Sequence[ConnectionInfo]) -> None:
        """These are the connections to the relay at this moment."""
        before = self._connections
        self._connections = {connection.id: connection for connection in connections}
        for connection in connections:
            self._measured(connection)
        for ident in before.keys() - self._connections.keys():
            self._connection_lost(ident)
        if self._inherited is not None and self._inherited.connection not in self._connections:
            self._inherited = None
        self._changed()

    def connection_opened(self, connection: ConnectionInfo) -> None:
        """A connection is there. A relay that could not be reached before can be now.

        That is no news of a relay that hangs up when it knows who we are: each dial is a connection for a moment.
        """
        new = connection.id not in self._connections
        self._connections[connection.id] = connection
        self._measured(connection)
        if not new:
            return
        if self._machine.state in ("held", "renewing") and connection.id != self._used:
            self.network_changed()  # the relay may take the older one for dead, or we do
        elif self.last_outcome in ("failed", "leaving") and not self._hung_up:
            self.retry()

    def connection_judged(self, connection: ConnectionInfo) -> None:
        """A connection gives no sign of life, or has given one again."""
        if connection.id not in self._connections:
            return
        self._connections[connection.id] = connection
        if connection.in_doubt:
            self._rtt = None
            if connection.id == self._used:
                self._do(self._machine.silent(self._now(), self._wall()), "lost")
        else:
            self.retry()
        self._changed()

    def connection_leaving(self, connection: ConnectionInfo) -> None:
        """The relay has said on a connection that it goes away."""
        if self._inherited is not None and self._inherited.connection == connection.id:
            self._inherited = None
            self._changed()
        if connection.id != self._used:
            return
        if len(self._connections) > 1:
            self.network_changed()  # it has meant that one only, if it grants a reservation over another
        else:
            self._do(self._machine.leaving(self._now(), self._wall()))

    def connection_closed(self, connection: ConnectionInfo) -> None:
        """A connection is gone."""
        if self._connections.pop(connection.id, None) is not None:
            self._connection_lost(connection.id)

    def all_connections_lost(self) -> None:
        """The switchboard is gone, and all connections with it."""
        self._connections.clear()
        self._inherited = None
        self._do(self._machine.disconnected(self._now(), self._wall()), "lost")
        self._changed()

    def _measured(self, connection: ConnectionInfo) -> None:
        if connection.rtt is not None:
            self._rtt = connection.rtt

    def _connection_lost(self, ident: str) -> None:
        if self._inherited is not None and self._inherited.connection == ident:
            self._inherited = None
            self._changed()
        if ident != self._used:
            return
        if self._connections:
            self.network_changed()
        else:
            self._do(self._machine.disconnected(self._now(), self._wall()), "lost")

    # ---- carrying out commands

    async def _run(self) -> None:
        with self._life:
            while True:
                self._news = trio.Event()
                wakeup = self._machine.next_wakeup
                with trio.move_on_after(math.inf if wakeup is None else max(0.0, wakeup - self._now())):
                    await self._news.wait()
                    continue
                self._do(self._machine.tick(self._now(), self._wall()))

    def _do(self, commands: Sequence[machine.Command], failure: str = "failed") -> None:
        """Follow the machine; `failure` is what a failure that it has counted is called."""
        self._look_at_outcome(failure)
        if self._machine.attempt != self._attempt:
            self._scope.cancel()
        for command in commands:
            match command:
                case machine.Connect(attempt):
                    self._begin(attempt, functools.partial(self._connect, attempt))
                case machine.Reserve(attempt):
                    self._begin(attempt, functools.partial(self._reserve, attempt))
                case machine.Publish(grant):
                    limit = f", {grant.limit} for each circuit" if grant.limit is not None else ""
                    self._log(f"reservation at the relay {self.peer}{limit}: {', '.join(map(str, self._relayed))}")
                case machine.Withdraw(reason):
                    self._log(f"no reservation at the relay {self.peer} any more: {reason}")
                    self._relayed = ()
        if commands:
            self._changed()
        self._news.set()

    def _look_at_outcome(self, failure: str) -> None:
        before, self._seen = self._seen, self._machine.health
        if self._seen.successes > before.successes:
            self.last_outcome = "granted"
        elif self._seen.failures > before.failures:
            self.last_outcome = failure
        elif self._seen.departures > before.departures:
            self.last_outcome = "leaving"
        else:
            return
        self._inherited = None
        self._counted(self.peer, self.last_outcome)
        self._changed()

    def _begin(self, attempt: int, work: Callable[[], Awaitable[None]]) -> None:
        self._attempt = attempt
        self._scope = trio.CancelScope()
        self._nursery.start_soon(self._try, attempt, self._scope, work)

    async def _try(self, attempt: int, scope: trio.CancelScope, work: Callable[[], Awaitable[None]]) -> None:
        with scope:
            try:
                await work()
            except PeerupError as error:
                reason = str(error)
                self._hung_up = error.code == "not-authorised"
                if self._hung_up:
                    reason = f"the relay does not authorise this node (there: peerup relay authorize {self._us})"
                self._do(self._machine.failed(attempt, reason, self._now(), self._wall()))

    async def _connect(self, attempt: int) -> None:
        self._measured(await self._switchboard.connect(self.peer))
        self._do(self._machine.connected(attempt, self._now(), self._wall()))

    async def _reserve(self, attempt: int) -> None:
        opened = await self._switchboard.open_hop(self.peer)
        connection = opened.connection
        stream = socket.socket(fileno=opened.stream.detach())
        self._used = connection.id
        self._connections[connection.id] = connection
        self._measured(connection)
        dialled = connection.remote_address if connection.direction == "outbound" else None
        client = ReserveClient(self.peer, self._us, dialled=dialled)
        await exchange(stream, client)
        if self._machine.attempt != attempt:
            return
        if client.refusal is not None:
            self._do(self._machine.refused(attempt, client.refusal, self._now(), self._wall()), "refused")
        elif client.grant is not None:
            self._relayed = usable_addresses(client.grant, self._us, dialled)
            self._do(self._machine.granted(attempt, client.grant, self._now(), self._wall()))
            if self._rtt is None:
                with contextlib.suppress(PeerupError):  # a relay need not answer pings
                    self._rtt = await self._switchboard.ping(self.peer)


def usable_addresses(grant: Grant, us: PeerId, dialled: Multiaddr | None) -> tuple[Multiaddr, ...]:
    """Of a reservation's addresses those that are worth to be announced, those that lead farthest first.

    A relay may tell addresses that mean something only where it is itself, such as those of its loopback interface. Who
    has reached it at an address that leads farther announces that one, too.
    """
    reach = 0 if dialled is None else _reach(dialled)
    found = [address for address in grant.addresses if _reach(address) >= min(reach, _PRIVATE)]
    if dialled is not None and all(_reach(address) < reach for address in found):
        found.extend(circuit_addresses([dialled], grant.relay, us))
    return tuple(sorted(dict.fromkeys(found), key=_reach, reverse=True))[:MAX_ADDRESSES]


_PRIVATE = 2


def _reach(address: Multiaddr) -> int:
    """How far an address leads: 0 this machine, 1 this link, 2 private networks, 3 the world."""
    host = address.ip
    if host is None:
        return 3
    if host.is_loopback or host.is_unspecified:
        return 0
    if host.is_link_local:
        return 1
    return 3 if host.is_global else _PRIVATE
