"""The actor `relay/keeper`: keeps a reservation at each relay of the configuration, so that peers can reach this node.

Theory of operation. Each relay has a :class:`~actors.relay.reservation.KeptReservation`, which decides by itself. This
file is what they share: it follows the configuration (relays come and go while the node runs), the switchboard
(connections to relays that open and end) and the monitor of networks (a reason to try at once), and has the
switchboard announce the relayed addresses of all relays together. The announcement is made anew whenever it changes,
and when the switchboard, which forgets it, has come up again.

A checkpoint holds the addresses that are announced. While this process is being replaced the switchboard withdraws
them; the successor announces them again at once and proves the reservations by renewing them.
"""

from __future__ import annotations

import itertools
from typing import Any

import trio

from actors.relay.reservation import Inheritance, KeptReservation
from protocol.keeper import CONNECT_TIMEOUT, MAX_RELAYS, RESERVE_TIMEOUT
from protocol.messages import Data
from protocol.messages.config import ConfigSnapshot, SubscribeConfig
from protocol.messages.keyring import ReadIdentity
from protocol.messages.network import NetworkChanged, WatchNetwork
from protocol.messages.reachability import (
    AnnounceAddresses,
    ConnectionClosed,
    ConnectionJudged,
    ConnectionLeaving,
    ConnectionOpened,
    WatchConnections,
)
from protocol.messages.reservations import ReadRelays, Relays, RelayStatus
from protocol.messages.switchboard import (
    Connect,
    ConnectionInfo,
    NeedPeer,
    OpenStream,
    PingPeer,
    ReleasePeer,
    StreamOpened,
)
from protocol.messages.system import ActorDown, ActorUp
from protocol.multiaddr import Multiaddr
from protocol.peer_id import PeerId
from protocol.protocol_ids import CIRCUIT_HOP
from supervisor.actor import Actor, Checkpoint, Context, handles
from supervisor.errors import ActorRestartingError, AskError, NoSuchActorError, RefusedError

SWITCHBOARD = "switchboard"
CONFIG = "config"
KEYRING = "keyring"
MONITOR = "nat/monitor"

ANSWER_DEADLINE = 3.0
"""Seconds for an answer from memory."""
SLACK = 1.0
"""Seconds by which requests may outlive the machine's own deadlines, so that those decide."""
PING_DEADLINE = 12.0
"""Seconds for a ping; the switchboard's own deadline is shorter."""
ASK_AGAIN = 1.0
"""Seconds after which an actor that did not answer, though it is there, is asked again."""
MAX_ANNOUNCED = 24
"""Relayed addresses in all: what a node says of itself must fit into one message that every peer accepts."""


class RelayKeeper(Actor):
    """See the module."""

    def __init__(self) -> None:
        self._relays: dict[PeerId, KeptReservation] = {}
        self._inherited: dict[PeerId, Inheritance] = {}
        self._saved: dict[str, Data] = {}
        self._config_version = 0  # of the configuration that was taken over last
        self._in_force = 0  # of the one that the switchboard goes by as well
        self._ignored: tuple[str, ...] = ()
        self._switchboard_up = True
        self._announced: tuple[Multiaddr, ...] = ()  # as the present switchboard knows it
        self._watched: tuple[PeerId, ...] = ()  # likewise
        self._closed: set[str] = set()  # connections that ended while the switchboard was being asked for all
        self._watching = trio.Lock()
        self._changed = trio.Event()
        self._refused = ""

    async def start(self, checkpoint: Checkpoint | None) -> dict[str, Data]:
        """Learn who we are and which relays there are, and begin."""
        context = self.context
        if checkpoint is not None:
            self._saved = checkpoint.state
            self._inherited = _unpack(checkpoint.state)
        self._us = (await context.ask(KEYRING, ReadIdentity(), timeout=ANSWER_DEADLINE)).peer_id
        self._board = _Switchboard(context)
        for name in (SWITCHBOARD, CONFIG, MONITOR):
            context.watch(name)
        context.nursery.start_soon(self._follow_monitor)
        await self._follow_config()
        context.nursery.start_soon(self._attend)
        return {"relays": [str(peer) for peer in self._relays]}

    def describe(self) -> dict[str, Data]:
        """Each relay with its health, and what is announced."""
        return {
            "relays": [_describe(reservation.status()) for reservation in self._relays.values()],
            "announced": [str(address) for address in self._announced],
            "ignored": list(self._ignored),
            "config_version": self._in_force,
            "problem": self._refused,
        }

    @handles(ReadRelays, concurrent=True)
    async def read_relays(self, request: ReadRelays) -> Relays:
        """All relays, with round trips as the switchboard knows them now."""
        if self._relays and self._switchboard_up:
            try:
                await self._watch_connections()
            except AskError as error:
                self.context.log.debug("round trips are not up to date: {}", error)
        return Relays(tuple(reservation.status() for reservation in self._relays.values()))

    # ---- what others tell

    @handles(ConfigSnapshot)
    async def config_changed(self, message: ConfigSnapshot) -> None:
        """Relays may have come or gone."""
        if self.context.current_sender == CONFIG and message.version >= self._config_version:
            self._apply(message)

    @handles(ConnectionOpened)
    async def connection_opened(self, message: ConnectionOpened) -> None:
        """A connection to a relay is there."""
        reservation = self._relays.get(message.connection.peer)
        if reservation is not None and self.context.current_sender == SWITCHBOARD:
            reservation.connection_opened(message.connection)

    @handles(ConnectionJudged)
    async def connection_judged(self, message: ConnectionJudged) -> None:
        """A relay gives no sign of life, or has given one again."""
        reservation = self._relays.get(message.connection.peer)
        if reservation is not None and self.context.current_sender == SWITCHBOARD:
            reservation.connection_judged(message.connection)

    @handles(ConnectionLeaving)
    async def connection_leaving(self, message: ConnectionLeaving) -> None:
        """A relay is shutting down: what it has granted is announced no more."""
        reservation = self._relays.get(message.connection.peer)
        if reservation is not None and self.context.current_sender == SWITCHBOARD:
            reservation.connection_leaving(message.connection)

    @handles(ConnectionClosed)
    async def connection_closed(self, message: ConnectionClosed) -> None:
        """A connection to a relay is gone."""
        if self.context.current_sender != SWITCHBOARD:
            return
        if self._watching.locked():
            self._closed.add(message.connection.id)
        reservation = self._relays.get(message.connection.peer)
        if reservation is not None:
            reservation.connection_closed(message.connection)

    @handles(NetworkChanged)
    async def network_changed(self, message: NetworkChanged) -> None:
        """Try at once, and prove what seems to be held."""
        if self.context.current_sender == MONITOR:
            for reservation in self._relays.values():
                reservation.network_changed()

    @handles(ActorUp)
    async def actor_up(self, message: ActorUp) -> None:
        """Somebody whom we follow is back, and knows nothing of us."""
        if message.name == SWITCHBOARD:
            self._switchboard_up = True
            self._announced, self._watched = (), ()
            for reservation in self._relays.values():
                self.context.tell(SWITCHBOARD, NeedPeer(reservation.peer))
                reservation.retry()
            self._changed.set()
        elif message.name == CONFIG:
            self.context.nursery.start_soon(self._follow_config)
        elif message.name == MONITOR:
            self.context.nursery.start_soon(self._follow_monitor)

    @handles(ActorDown)
    async def actor_down(self, message: ActorDown) -> None:
        """With the switchboard all connections are gone."""
        if message.name == SWITCHBOARD:
            self._switchboard_up = False
            self._announced, self._watched = (), ()
            for reservation in self._relays.values():
                reservation.all_connections_lost()

    # ---- whom we follow

    async def _follow_config(self) -> None:
        while True:
            try:
                self._apply(await self.context.ask(CONFIG, SubscribeConfig(), timeout=ANSWER_DEADLINE))
            except (NoSuchActorError, ActorRestartingError):
                return  # ActorUp follows
            except AskError as error:
                self.context.log.warning("the configuration is not known: {}", error)
                await trio.sleep(ASK_AGAIN)
            else:
                return

    async def _follow_monitor(self) -> None:
        while True:
            try:
                await self.context.ask(MONITOR, WatchNetwork(), timeout=ANSWER_DEADLINE)
            except (NoSuchActorError, ActorRestartingError):
                return  # ActorUp follows
            except AskError as error:
                self.context.log.warning("changes of the network are not told: {}", error)
                await trio.sleep(ASK_AGAIN)
            else:
                return

    # ---- relays

    def _apply(self, snapshot: ConfigSnapshot) -> None:
        self._config_version = snapshot.version
        before = self._ignored
        wanted, self._ignored = _group(snapshot.relays, self._us)
        for line in self._ignored:
            if line not in before:
                self.context.log.warning("a relay of the configuration is not used: {}", line)
        for peer in [peer for peer in self._relays if peer not in wanted]:
            self._relays.pop(peer).stop()
            if self._switchboard_up:
                self.context.tell(SWITCHBOARD, ReleasePeer(peer))
        for peer, addresses in wanted.items():
            reservation = self._relays.get(peer)
            if reservation is None:
                self._add(peer, addresses)
            else:
                reservation.addresses = addresses
                reservation.retry()
        self._relays = {peer: self._relays[peer] for peer in wanted}  # in the order of the configuration
        self._inherited = {}
        self._changed.set()

    def _add(self, peer: PeerId, addresses: tuple[Multiaddr, ...]) -> None:
        context = self.context
        reservation = self._relays[peer] = KeptReservation(
            context.nursery,
            self._board,
            peer,
            self._us,
            changed=self._changed_event,
            counted=self._count,
            uniform=context.random.uniform,
            now=context.now,
            wall=context.wall,
            log=lambda text: context.log.info("{}", text),
        )
        reservation.addresses = addresses
        if self._switchboard_up:
            context.tell(SWITCHBOARD, NeedPeer(peer))
        reservation.start(self._inherited.get(peer))

    def _changed_event(self) -> None:
        self._changed.set()

    def _count(self, peer: PeerId, outcome: str) -> None:
        metrics = self.context.metrics
        metrics.counter("peerup_relay_attempts_total", outcome=outcome).inc()
        reservation = self._relays.get(peer)
        if reservation is not None and reservation.rtt is not None:
            metrics.gauge("peerup_relay_rtt_seconds", relay=str(peer)).set(reservation.rtt)

    # ---- what the switchboard must know

    async def _attend(self) -> None:
        """Have the switchboard know whom we watch and what we announce, whatever becomes of it or changes."""
        while True:
            await self._changed.wait()
            self._changed = trio.Event()
            self._measure()
            self._save()
            if not self._switchboard_up:
                continue  # ActorUp wakes us
            try:
                await self._tell_switchboard()
            except (NoSuchActorError, ActorRestartingError):
                continue  # likewise
            except RefusedError as error:
                if str(error) != self._refused:
                    self.context.log.warning("the relayed addresses are not announced: {}", error)
                self._refused = str(error)
            except AskError as error:
                self.context.log.warning("the switchboard does not answer: {}", error)
                self._changed.set()
                await trio.sleep(ASK_AGAIN)

    async def _tell_switchboard(self) -> None:
        version, peers = self._config_version, tuple(self._relays)
        if peers and peers != self._watched:
            await self._watch_connections()
        announced = self._wanted_announcement()
        if announced != self._announced:
            await self.context.ask(SWITCHBOARD, AnnounceAddresses(announced), timeout=ANSWER_DEADLINE)
            if self._switchboard_up:
                self._announced = announced
            self._refused = ""
        if self._switchboard_up:
            self._in_force = version

    async def _watch_connections(self) -> None:
        async with self._watching:
            self._closed.clear()
            peers = tuple(self._relays)
            answer = await self.context.ask(SWITCHBOARD, WatchConnections(peers), timeout=ANSWER_DEADLINE)
            if not self._switchboard_up:
                return
            self._watched = peers
            for peer in peers:
                reservation = self._relays.get(peer)
                if reservation is not None:
                    reservation.connections_are(
                        [one for one in answer.connections if one.peer == peer and one.id not in self._closed]
                    )

    def _wanted_announcement(self) -> tuple[Multiaddr, ...]:
        """The relayed addresses of all relays; if they are too many, the first ones of each."""
        columns = itertools.zip_longest(*(reservation.announced for reservation in self._relays.values()))
        ranked = [address for column in columns for address in column if address is not None]
        return tuple(dict.fromkeys(ranked))[:MAX_ANNOUNCED]

    def _measure(self) -> None:
        metrics = self.context.metrics
        metrics.gauge("peerup_relays_configured").set(len(self._relays))
        metrics.gauge("peerup_relay_reservations_held").set(sum(one.held for one in self._relays.values()))

    def _save(self) -> None:
        state = _pack({peer: legacy for peer, one in self._relays.items() if (legacy := one.legacy()) is not None})
        if state != self._saved:
            self._saved = state
            self.context.checkpoint(state)


class _Switchboard:
    """The switchboard as the reservations see it. Implements :class:`actors.relay.reservation.Switchboard`."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def connect(self, relay: PeerId) -> ConnectionInfo:
        answer = await self._context.ask(SWITCHBOARD, Connect(relay), timeout=CONNECT_TIMEOUT + SLACK)
        return answer.connection

    async def open_hop(self, relay: PeerId) -> StreamOpened:
        return await self._context.ask(SWITCHBOARD, OpenStream(relay, (CIRCUIT_HOP,)), timeout=RESERVE_TIMEOUT + SLACK)

    async def ping(self, relay: PeerId) -> float:
        return (await self._context.ask(SWITCHBOARD, PingPeer(relay), timeout=PING_DEADLINE)).rtt


def _group(addresses: tuple[Multiaddr, ...], us: PeerId) -> tuple[dict[PeerId, tuple[Multiaddr, ...]], tuple[str, ...]]:
    """The addresses by relay, and which are not used and why."""
    wanted: dict[PeerId, tuple[Multiaddr, ...]] = {}
    ignored = []
    for address in dict.fromkeys(addresses):
        peer = address.peer_id
        if peer is None:
            ignored.append(f"{address}: does not end with the relay's peer id")
        elif peer == us:
            ignored.append(f"{address}: that is this node itself")
        elif address.is_relayed:
            ignored.append(f"{address}: leads through a relay itself")
        elif peer not in wanted and len(wanted) >= MAX_RELAYS:
            ignored.append(f"{address}: more than {MAX_RELAYS} relays")
        else:
            wanted[peer] = (*wanted.get(peer, ()), address)
    return wanted, tuple(ignored)


def _describe(status: RelayStatus) -> dict[str, Data]:
    return {
        "relay": str(status.peer),
        "at": [str(address) for address in status.addresses],
        "state": status.state,
        "relayed_addresses": [str(address) for address in status.relayed_addresses],
        "expires_in": status.expires_in,
        "held_for": status.held_for,
        "next_attempt": status.next_attempt,
        "limit_seconds": status.limit_seconds,
        "limit_bytes": status.limit_bytes,
        "rtt": status.rtt,
        "last_failure": status.last_failure,
        "granted": status.granted,
        "failed": status.failed,
        "warning": status.warning,
    }


def _pack(held: dict[PeerId, Inheritance]) -> dict[str, Data]:
    return {
        str(peer): [legacy.connection, [str(address) for address in legacy.addresses]] for peer, legacy in held.items()
    }


def _unpack(state: dict[str, Any]) -> dict[PeerId, Inheritance]:
    return {
        PeerId.from_text(peer): Inheritance(connection, tuple(map(Multiaddr, addresses)))
        for peer, (connection, addresses) in state.items()
    }
