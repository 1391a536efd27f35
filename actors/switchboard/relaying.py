"""The relay (circuit relay v2, the hop side): reservations, circuits, and the policy that both ends of them must pass.

Theory of operation. The actor `relay/server` asks for it (`serve`) and gives the rules; what follows from them is
decided here, synchronously, because a reservation lives and dies with a connection and the bytes of a circuit must not
cross a further process. `RelayTable` decides, `HopExchange` talks with clients and targets, `Splice` carries the bytes,
`Pacer` says when they may go on. This room holds them together::

    a stream for hop  -> HopExchange -> RelayTable.reserve / connect -> voucher by the keyring / stop stream
    both have agreed  -> Splice of both streams, until one is reset, both have ended, or the table says that time is up
    a new policy      -> RelayTable.set_acl: what it does not allow ends now
    the last direct connection of a peer ends -> so does its reservation
    the relay is to stop -> `Farewell` tells its clients, and cuts what nobody uses

Nothing waits without a bound: exchanges are limited for each connection and in all, each has its deadlines, what a
circuit keeps is bounded by windows, and the growth of all windows together has a limit.
"""

from __future__ import annotations

import ipaddress
import math
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Final

from actors.reactor import Reactor
from actors.switchboard.channel import Channel
from actors.switchboard.connections import Connection, ConnectionTable
from actors.switchboard.errors import UnreachableError
from actors.switchboard.farewell import Farewell
from actors.switchboard.hop_streams import HopExchange
from actors.switchboard.pacing import Pacer
from actors.switchboard.protocols import CancellableTimer, ProtocolTable
from actors.switchboard.refusals import Rare
from actors.switchboard.splice import Growth, Splice
from protocol.circuit.addresses import announced_addresses
from protocol.circuit.messages import Refusal, Reservation, Status
from protocol.messages import Data
from protocol.messages.keyring import SignRelayVoucher
from protocol.messages.relay import RelayCircuit, RelayReservation, RelayRules, RelayServiceStatus
from protocol.multiaddr import Multiaddr
from protocol.peer_id import PeerId
from protocol.policy import Decision
from protocol.protocol_ids import CIRCUIT_HOP
from protocol.reservations import Acl, Circuit, Direction, Ended, HeldReservation, RelayTable
from protocol.stream_descriptor import ResetCode
from supervisor.actor import Context
from supervisor.errors import AskError

KEYRING = "keyring"
KEYRING_DEADLINE = 3.0
"""Seconds for the keyring to sign a voucher; then the client gets its reservation without."""

MAX_EXCHANGES: Final = 1024
"""Hop streams that may be in their exchange: some KiB each."""
MAX_EXCHANGES_PER_CONNECTION: Final = 64
"""So that one client cannot take all the room."""

WINDOW_GROWTH: Final = 64 * 1024 * 1024
"""Bytes by which the windows of all circuits together may grow: some long fat paths at full speed."""

MAX_TOLD: Final = 256
"""Reservations, and circuits, that are told one by one."""

_NO_ADDRESS: Final = ipaddress.IPv6Address(0)


class _Served:
    """All that there is while this node serves as a relay.

    Attributes:
        open: circuits with a splice, by number, with the time since when.
        opening: exchanges of circuits that are being opened, by number.
    """

    def __init__(self, table: RelayTable, pacer: Pacer) -> None:
        self.table = table
        self.pacer = pacer
        self.open: dict[int, tuple[Splice, float]] = {}
        self.opening: dict[int, tuple[HopExchange, float]] = {}
        self.farewell: Farewell | None = None  # while it drains


class Relaying:
    """See the module.

    Args:
        own: this node, which signs the vouchers.
        addresses: where this node can be reached.
        acl: the present policy's decision on a peer.
        refused: told of each refusal by the policy, for the audit log.
    """

    def __init__(
        self,
        context: Context,
        reactor: Reactor,
        *,
        own: PeerId,
        table: ConnectionTable,
        protocols: ProtocolTable,
        addresses: Callable[[], tuple[Multiaddr, ...]],
        acl: Acl,
        refused: Callable[[Connection, Decision], None],
    ) -> None:
        self._context = context
        self._reactor = reactor
        self._own = own
        self._connections = table
        self._protocols = protocols
        self._addresses = addresses
        self._acl = acl
        self._note_refusal = refused
        self._served: _Served | None = None
        self._exchanges: dict[Connection, dict[HopExchange, None]] = defaultdict(dict)  # of each, the oldest first
        self._exchange_count = 0
        self._growth = Growth(WINDOW_GROWTH)
        self._requests: Counter[str] = Counter()
        self._without_voucher: Rare[str] = Rare(context.now)
        self._carried = [0, 0]  # in all, by direction; the pacer's part since `_told` is missing
        self._told = [0, 0]
        self._timer: CancellableTimer | None = None
        self._timer_due = math.inf
        self._on_drained: list[Callable[[], None]] = []

    @property
    def serving(self) -> bool:
        """Whether this node serves as a relay."""
        return self._served is not None

    # ---- what relay/server wants

    def serve(self, rules: RelayRules) -> None:
        """Serve by these rules from now on; see `ServeRelay`.

        Raises:
            InvalidValueError: rules that nobody could keep.
        """
        limits, now = rules.limits(), self._context.now()
        if self._served is None:
            table = RelayTable(limits, self._acl)
            pacer = Pacer(table, self._reactor.clock, self._reactor.call_soon, self._reactor.call_later)
            self._served = _Served(table, pacer)
            self._protocols.serve_here(CIRCUIT_HOP, self.accept)
        else:
            self._served.table.draining = False
            self._stop_farewell(self._served)
            self._served.table.set_limits(limits, now)
            self._served.pacer.go_through_soon()

    def drain(self, on_drained: Callable[[], None]) -> None:
        """Grant nothing new, tell the clients; call back, perhaps at once, when no circuit is left."""
        served = self._served
        if served is not None:
            served.table.drain()
            if served.farewell is None:
                served.farewell = Farewell(
                    self._connections,
                    circuits=lambda: [circuit for circuit in served.table.circuits if circuit.is_open],
                    cut=lambda circuit: self._cut_idle(served, circuit),
                    now=self._context.now,
                    call_later=self._reactor.call_later,
                )
        self._on_drained.append(on_drained)
        self._look_for_drained()

    def withdraw(self) -> None:
        """Serve no more; open circuits are reset."""
        served = self._served
        if served is None:
            return
        self._served = None
        self._stop_farewell(served)
        self._protocols.withdraw_here(CIRCUIT_HOP)
        self._count_carried(served)
        for splice, _ in list(served.open.values()):
            splice.reset(ResetCode.SHUTDOWN)
        for exchanges in list(self._exchanges.values()):
            for exchange in list(exchanges):
                exchange.abort(ResetCode.SHUTDOWN)
        self._show(served)
        self._look_for_drained()

    def status(self) -> RelayServiceStatus:
        """What it does; see `RelayServiceStatus`."""
        served = self._served
        if served is None:
            return RelayServiceStatus(
                serving=False,
                draining=False,
                addresses=(),
                reservations=0,
                circuits=0,
                held=(),
                open=(),
                requests=dict(self._requests),
                to_destination=self._carried[Direction.TO_DESTINATION],
                to_source=self._carried[Direction.TO_SOURCE],
            )
        self._count_carried(served)
        table, now = served.table, self._context.now()
        since = {number: began for began_by in (served.open, served.opening) for number, (_, began) in began_by.items()}
        return RelayServiceStatus(
            serving=True,
            draining=table.draining,
            addresses=self._own_addresses(),
            reservations=len(table.reservations),
            circuits=len(table.circuits),
            held=tuple(
                RelayReservation(held.peer, held.expire_wall, held.renewed)
                for held, _ in zip(table.reservations, range(MAX_TOLD), strict=False)
            ),
            open=tuple(
                RelayCircuit(
                    circuit.source,
                    circuit.destination,
                    circuit.is_open,
                    now - since.get(circuit.number, now),
                    circuit.forwarded[Direction.TO_DESTINATION],
                    circuit.forwarded[Direction.TO_SOURCE],
                )
                for circuit, _ in zip(table.circuits, range(MAX_TOLD), strict=False)
            ),
            requests=dict(self._requests),
            to_destination=self._carried[Direction.TO_DESTINATION],
            to_source=self._carried[Direction.TO_SOURCE],
        )

    def describe(self) -> dict[str, Data]:
        """For people: in short."""
        served = self._served
        if served is None:
            return {"serving": False}
        return {
            "serving": True,
            "draining": served.table.draining,
            "reservations": len(served.table.reservations),
            "circuits": len(served.table.circuits),
            "exchanges": self._exchange_count,
            "waiting_for_rate": served.pacer.waiting,
            "windows_grown_by": self._growth.grown,
        }

    # ---- what happens elsewhere in the switchboard

    def accept(self, connection: Connection, channel: Channel, first: bytes) -> None:
        """Take over a stream for `CIRCUIT_HOP`."""
        if self._served is None:
            channel.reset(ResetCode.SERVICE_UNAVAILABLE)
            return
        known = self._exchanges.get(connection, ())
        full = self._exchange_count >= MAX_EXCHANGES
        if len(known) >= MAX_EXCHANGES_PER_CONNECTION or (full and not self._make_room(len(known))):
            self._count("unknown", "too-many-exchanges")
            channel.reset(ResetCode.LIMIT_EXCEEDED)
            return
        exchange = HopExchange(self, connection, channel)
        self._exchanges[connection][exchange] = None
        self._exchange_count += 1
        exchange.begin(first)

    def _make_room(self, present: int) -> bool:
        """End an exchange for one more of a client that has so many; whether there is one that should.

        Of the client that has most, if that has more; else of the one who has had time to speak for longest. Honest
        clients ask at once. Without this a few that say nothing could keep all others from asking.
        """
        most = max(self._exchanges.values(), key=len)
        candidates = [most] if len(most) > present + 1 else self._exchanges.values()
        waiting = next((exchange for exchanges in candidates for exchange in exchanges if exchange.idle), None)
        if waiting is None and len(most) > present + 1:
            waiting = next(iter(most))
        if waiting is not None:
            waiting.make_room()
        return waiting is not None

    def policy_changed(self) -> None:
        """There is another policy, or somebody's time in it has passed: what it does not allow ends."""
        if self._served is not None:
            self._end(self._served, self._served.table.revalidate(self._context.now(), self._context.wall()))

    def connection_ended(self, connection: Connection) -> None:
        """A connection is gone. Its streams are, too; a reservation is if it was the last direct one."""
        served = self._served
        if served is not None and self._direct(connection.peer) is None:
            held = served.table.disconnected(connection.peer)
            if held is not None:
                self._count("reservation", "disconnected")

    def tick(self) -> None:
        """Bring the metrics up to date; to be called every second or so."""
        if self._served is not None:
            self._show(self._served)

    # ---- for exchanges

    def call_later(self, delay: float, function: Callable[[], None]) -> CancellableTimer:
        """See `Relay`."""
        return self._reactor.call_later(delay, function)

    def reserve(self, exchange: HopExchange) -> HeldReservation | Refusal:
        """See `Relay`."""
        served = self._served
        if served is None:
            return _CLOSED
        client = exchange.connection
        now, wall = self._context.now(), self._context.wall()
        decision = served.table.reserve(client.peer, _ip(client), now, wall)
        if isinstance(decision, HeldReservation):
            self._context.nursery.start_soon(self._sign_and_grant, exchange, decision)
        else:
            self._note(client, decision)
        self._arm(served)
        return decision

    def connect(self, exchange: HopExchange, destination: PeerId) -> Circuit | Refusal:
        """See `Relay`."""
        served = self._served
        if served is None:
            return _CLOSED
        client = exchange.connection
        now, wall = self._context.now(), self._context.wall()
        decision = served.table.connect(client.peer, _ip(client), destination, now, wall)
        if isinstance(decision, Circuit):
            served.opening[decision.number] = exchange, now
        else:
            self._note(client, decision)
        self._arm(served)
        return decision

    def open_stop(self, circuit: Circuit) -> Channel:
        """See `Relay`."""
        connection = self._direct(circuit.destination)
        if connection is None:
            raise UnreachableError("it is not connected")
        if connection.doubted_since is not None:
            raise UnreachableError("it gives no sign of life at the moment")
        return connection.link.open_stream()

    def opened(self, exchange: HopExchange, source: Channel, destination: Channel, early: int) -> Splice:
        """See `Relay`."""
        served, circuit = self._served, exchange.circuit
        assert served is not None
        assert circuit is not None
        assert exchange.stop is not None
        now = self._context.now()
        served.table.opened(circuit, now)
        splice = Splice(
            circuit,
            source,
            destination,
            meter=served.pacer,
            growth=self._growth,
            on_over=lambda code: self._circuit_over(served, circuit, code),
            to_source=exchange.stop.leftover,
            to_destination=exchange.hop.leftover,
        )
        served.opening.pop(circuit.number, None)
        served.open[circuit.number] = splice, now
        if early:
            served.pacer.went_ahead(splice.destination, early)
        self._arm(served)
        return splice

    def answered(self, exchange: HopExchange, refusal: Refusal | None) -> None:
        """See `Relay`."""
        self._count(exchange.kind, "granted" if refusal is None else refusal.rule.partition(":")[0])
        circuit, served = exchange.circuit, self._served
        if refusal is not None and circuit is not None and served is not None:
            served.opening.pop(circuit.number, None)
            served.table.close(circuit, self._context.now())
            self._look_for_drained()

    def gone(self, exchange: HopExchange) -> None:
        """See `Relay`."""
        known = self._exchanges.get(exchange.connection)
        if known is not None and exchange in known:
            del known[exchange]
            self._exchange_count -= 1
            if not known:
                del self._exchanges[exchange.connection]

    # ---- inside

    async def _sign_and_grant(self, exchange: HopExchange, held: HeldReservation) -> None:
        voucher = None
        try:
            signed = await self._context.ask(
                KEYRING, SignRelayVoucher(held.peer, held.expire_wall), timeout=KEYRING_DEADLINE
            )
            voucher = signed.envelope
        except AskError as error:
            # The spec leaves it to the relay, and no client needs it to use the reservation.
            more = self._without_voucher.note("")
            if more is not None:
                self._context.log.warning("a reservation of {} goes without a voucher: {}{}", held.peer, error, more)
            self._context.metrics.counter("peerup_relay_vouchers_missing_total").inc()
        if self._served is None or self._served.table.reservation_of(held.peer, self._context.now()) is None:
            exchange.refuse_late(_NOT_ANY_MORE)  # the policy, or this relay's service, has changed meanwhile
            return
        addresses = _of_use_to(_ip(exchange.connection), self._own_addresses())
        exchange.grant(Reservation(held.expire_wall, addresses, voucher), held)

    def _own_addresses(self) -> tuple[Multiaddr, ...]:
        return announced_addresses(self._addresses(), self._own)

    def _direct(self, peer: PeerId) -> Connection | None:
        """The connection over which circuits to a peer go: not a relayed one, and if possible not one that drains."""
        return next((connection for connection in self._connections.of(peer) if not connection.relayed), None)

    def _end(self, served: _Served, ended: Ended) -> None:
        """Close what the table has closed already."""
        for held, refusal in ended.reservations:
            self._context.log.debug("the reservation of {} has ended: {}", held.peer, refusal.reason)
            self._count("reservation", refusal.rule.partition(":")[0])
        for circuit, refusal in ended.circuits:
            denied = refusal.status == Status.PERMISSION_DENIED
            if (opening := served.opening.pop(circuit.number, None)) is not None:
                opening[0].refuse_late(refusal)
            elif (spliced := served.open.get(circuit.number)) is not None:
                self._count("circuit", refusal.rule.partition(":")[0])
                spliced[0].reset(ResetCode.GATED if denied else ResetCode.LIMIT_EXCEEDED)
        self._look_for_drained()
        self._arm(served)

    def _cut_idle(self, served: _Served, circuit: Circuit) -> None:
        """Nobody uses this circuit, and the relay is to stop."""
        spliced = served.open.get(circuit.number)
        if spliced is not None:
            self._count("circuit", "idle")
            spliced[0].reset(ResetCode.SHUTDOWN)

    def _stop_farewell(self, served: _Served) -> None:
        farewell, served.farewell = served.farewell, None
        if farewell is not None:
            farewell.stop()

    def _circuit_over(self, served: _Served, circuit: Circuit, code: int) -> None:
        served.open.pop(circuit.number, None)
        served.table.close(circuit, self._context.now())
        self._count("circuit", "finished" if code == ResetCode.NONE else "reset")
        self._look_for_drained()

    def _look_for_drained(self) -> None:
        if self._on_drained and (self._served is None or not self._served.table.circuits):
            callbacks, self._on_drained = self._on_drained, []
            for callback in callbacks:
                callback()

    def _note(self, client: Connection, refusal: Refusal) -> None:
        if refusal.status == Status.PERMISSION_DENIED:
            self._note_refusal(client, Decision(allowed=False, rule=refusal.rule))

    # ---- time

    def _arm(self, served: _Served) -> None:
        """Have `_expire` called when something in the table is due."""
        due = served.table.next_deadline()
        if due is None or due >= self._timer_due:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer_due = due
        self._timer = self._reactor.call_later(max(0.0, due - self._context.now()), self._expire)

    def _expire(self) -> None:
        self._timer, self._timer_due = None, math.inf
        served = self._served
        if served is not None:
            self._end(served, served.table.expire(self._context.now()))

    # ---- numbers

    def _count(self, kind: str, outcome: str) -> None:
        self._requests[f"{kind} {outcome}"] += 1
        self._context.metrics.counter("peerup_relay_events_total", kind=kind, outcome=outcome).inc()

    def _count_carried(self, served: _Served) -> None:
        for direction in Direction:
            fresh = served.pacer.carried[direction] - self._told[direction]
            self._told[direction] += fresh
            self._carried[direction] += fresh
            if fresh:
                name = direction.name.lower().replace("_", "-")
                self._context.metrics.counter("peerup_relay_bytes_total", direction=name).inc(fresh)

    def _show(self, served: _Served) -> None:
        self._count_carried(served)
        gone = served is not self._served
        self._context.metrics.gauge("peerup_relay_reservations").set(0 if gone else len(served.table.reservations))
        self._context.metrics.gauge("peerup_relay_circuits").set(0 if gone else len(served.table.circuits))
        if gone:
            self._told = [0, 0]  # a new pacer begins anew


_NOT_ANY_MORE: Final = Refusal(Status.PERMISSION_DENIED, "no longer served", "changed-meanwhile")
_CLOSED: Final = Refusal(Status.PERMISSION_DENIED, "this node does not serve as a relay", "not-serving")


def _of_use_to(
    client: ipaddress.IPv4Address | ipaddress.IPv6Address, addresses: tuple[Multiaddr, ...]
) -> tuple[Multiaddr, ...]:
    """What a client can tell others of. One out in the internet has nothing from this machine's private network.

    If nothing is left, it takes the address that it has dialled itself, which works: so it is with a machine behind a
    1:1 NAT that does not know its public address yet.
    """
    if not client.is_global:
        return addresses
    return tuple(address for address in addresses if address.ip is None or address.ip.is_global)


def _ip(connection: Connection) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """What a client's limits by address count."""
    return connection.remote_address.ip or _NO_ADDRESS
