"""Who is let in, and who is thrown out: the policy's decisions on connections and streams, and their consequences.

A connection begins here, once its upgrade has proven who the peer is, and its end is noted here. When the policy
changes or somebody's time is up, what the policy allowed before and does not allow now is cut at once.
"""

from __future__ import annotations

import dataclasses
import traceback
from collections.abc import Callable
from typing import Final

import trio

from actors.reactor import Reactor
from actors.switchboard.allowances import Allowances
from actors.switchboard.budget import Budgets
from actors.switchboard.closing import LOOK
from actors.switchboard.connections import (
    HUNG_UP,
    MAX_CONNECTIONS,
    MAX_CONNECTIONS_PER_PEER,
    Connection,
    ConnectionTable,
)
from actors.switchboard.decisions import DecisionLog
from actors.switchboard.errors import AddressError, ConnectionLostError, SwitchboardError
from actors.switchboard.link import Channel, Link, LinkEnd, Patience
from actors.switchboard.numbers import Numbers
from actors.switchboard.publishers import Publishers
from actors.switchboard.refusals import Rare, Refusals
from actors.switchboard.upgrade import RefusedPeerError, Upgraded
from actors.switchboard.wire import Pipe
from protocol import allowance as costs
from protocol import yamux
from protocol.peer_id import PeerId
from protocol.policy import BASIC_PROTOCOLS, Decision
from protocol.protocol_ids import CIRCUIT_STOP
from protocol.reservations import GUEST_RULE
from protocol.stream_descriptor import ResetCode
from protocol.token_bucket import TokenBucket
from supervisor.actor import Context

RELAY_PROTOCOLS = BASIC_PROTOCOLS | {CIRCUIT_STOP}
"""What a relay that the configuration names may use, whether the policy lists it or not."""

LINES_AT_ONCE = 256.0
"""Callers whose coming and going is written to the log at once;"""
LINES_PER_SECOND = 0.2
"""and so many in each second later: 17,000 a day. The audit log and the counters know of all."""

UNKNOWN_PEER = (400, 448)
"""Streams of ours, and of both sides together, on a connection to a peer that does not say how many it takes:
rust-libp2p ends a connection on which there are more than 512, and others reset what is beyond 1000."""

CLOSING: Final = 15.0
"""Seconds in which all connections are closed when the node stops: a megabyte that is under way at 0.5 Mbit/s."""

CONFIGURED_RELAY = Decision(allowed=True, rule="configured-relay")


class Admittance:
    """See the module.

    Attributes:
        refusals: who does not let us in.
        patience: of all links.

    Args:
        own: this node's peer id, which no peer may have.
        on_stream: takes each stream that a peer opens.
        on_opened, on_ended: told of each connection when it is there, and when it is gone.
        on_gone_away: told of a connection whose peer takes no more streams on it.
        is_relay: whether the configuration names this peer as a relay.
        limits: of each connection's streams.
    """

    def __init__(
        self,
        context: Context,
        reactor: Reactor,
        *,
        own: PeerId,
        publishers: Publishers,
        table: ConnectionTable,
        decisions: DecisionLog,
        numbers: Numbers,
        on_stream: Callable[[Connection, Channel], None],
        on_opened: Callable[[Connection], None],
        on_ended: Callable[[Connection, LinkEnd], None],
        on_gone_away: Callable[[Connection], None],
        is_relay: Callable[[PeerId], bool],
        limits: yamux.Limits,
    ) -> None:
        self._context = context
        self._reactor = reactor
        self._own = own
        self._publishers = publishers
        self._table = table
        self._decisions = decisions
        self._numbers = numbers
        self._on_stream = on_stream
        self._on_opened = on_opened
        self._on_ended = on_ended
        self._on_gone_away = on_gone_away
        self._is_relay = is_relay
        self._limits = limits
        self._budgets = Budgets()
        self._allowances = Allowances()
        self._closing: dict[Connection, None] = {}  # have ended, and are closed in good order; oldest first
        self._count = 0
        self._closed = False
        self.patience = Patience()
        self.refusals = Refusals(context.now)
        self._refused_lines: Rare[PeerId] = Rare(context.now)
        self._defects: Rare[str] = Rare(context.now)
        self._lines = TokenBucket(LINES_PER_SECOND, LINES_AT_ONCE, context.now())
        self._expiry_checked = context.wall()

    def close(self) -> None:
        """Let nobody in any more."""
        self._closed = True

    async def close_all(self, code: str, reason: str) -> None:
        """Close all connections in good order, within `CLOSING`: first those that go through others."""
        with trio.move_on_after(CLOSING):
            for relayed in (True, False):
                for connection in self._table:
                    if connection.relayed or not relayed:
                        connection.link.close(code, reason)
                await trio.lowlevel.checkpoint()  # their ends are told from the loop
                while any(each.relayed or not relayed for each in [*self._table, *self._closing]):  # noqa: ASYNC110
                    await trio.sleep(LOOK)
        for connection in [*self._table, *self._closing]:
            connection.link.close(code, reason)
            connection.link.abort(code, reason)

    # ---- judgement

    def judge_caller(self, peer: PeerId, pipe: Pipe) -> bool:
        """Whether the peer that has just proven its id over this pipe may connect; noted for the audit log."""
        try:
            path = str(pipe.way)
        except OSError:
            return False  # it has hung up
        return self.judge_peer(peer, path)

    def judge_peer(self, peer: PeerId, path: str) -> bool:
        """Whether a peer that came over this path, in words, may connect; noted for the audit log."""
        if peer == self._own:
            return False
        decision = self.decide(peer)
        self._decisions.note(peer, "connection", decision, path, self._context.now())
        return decision.allowed

    def judge_stream(self, connection: Connection, protocol: str) -> Decision:
        """Whether a connected peer may use a protocol; noted for the audit log unless it is one of the basic ones."""
        decision = self._publishers.policy.decide_stream(connection.peer, protocol, self._context.wall())
        if not decision.allowed and protocol in RELAY_PROTOCOLS and self._relays_for_us(connection):
            decision = CONFIGURED_RELAY
        if not decision.allowed or protocol not in BASIC_PROTOCOLS:
            self._decisions.note(connection.peer, protocol, decision, connection.way, self._context.now())
        return decision

    def note(self, connection: Connection, subject: str, decision: Decision) -> None:
        """Note for the audit log what was decided elsewhere about a connected peer."""
        self._decisions.note(connection.peer, subject, decision, connection.way, self._context.now())

    def may_connect(self, connection: Connection) -> bool:
        """Whether the peer of a connection may still be connected."""
        return self.decide(connection.peer).allowed or self._relays_for_us(connection)

    def decide(self, peer: PeerId) -> Decision:
        """The policy's decision on a peer, now."""
        return self._publishers.policy.decide_connection(peer, self._context.wall())

    def is_listed(self, peer: PeerId) -> bool:
        """Whether the policy lets this peer in by name, and not as anybody."""
        decision = self.decide(peer)
        return decision.allowed and decision.rule != GUEST_RULE

    def protocols_for(self, connection: Connection) -> tuple[str, ...]:
        """What the peer of a connection may use."""
        allowed = self._publishers.policy.protocols_for(connection.peer, self._context.wall())
        if self._relays_for_us(connection):
            allowed = tuple(dict.fromkeys((*allowed, *sorted(RELAY_PROTOCOLS))))
        return allowed

    def _relays_for_us(self, connection: Connection) -> bool:
        """Whether it is our connection to a relay that the configuration names."""
        return connection.outbound and not connection.relayed and self._is_relay(connection.peer)

    # ---- life of a connection

    def welcome(self, pipe: Pipe, upgraded: Upgraded) -> None:
        """Take over a caller's pipe whose upgrade is done.

        Raises:
            RefusedPeerError: it may not connect any more.
            SwitchboardError: no room; the pipe is closed.
        """
        # The muxer's negotiation may have taken the peer seconds, in which the policy may have changed.
        if not self.decide(upgraded.peer).allowed and not self.judge_caller(upgraded.peer, pipe):
            raise RefusedPeerError(upgraded.peer)
        self.establish(pipe, upgraded, outbound=False)

    def broke(self, error: Exception) -> None:
        """A handshake has ended in an error that nobody foresaw: a defect, which costs the caller its connection."""
        self._tell_defect("a handshake", error)

    def _tell_defect(self, what: str, error: BaseException) -> None:
        more = self._defects.note(f"{type(error).__name__} {_place(error)}")
        if more is not None:
            self._context.log.opt(exception=error).error("{} broke, which is a defect of this node{}", what, more)

    def establish(self, pipe: Pipe, upgraded: Upgraded, *, outbound: bool) -> Connection:
        """A connection of a pipe whose upgrade is done.

        Raises:
            SwitchboardError: no room, or the peer is gone already; the pipe is closed.
        """
        try:
            if self._closed:
                raise ConnectionLostError("this node is stopping")
            guest = not outbound and self.decide(upgraded.peer).rule == GUEST_RULE
            if (silent := self._table.make_room(upgraded.peer)) is not None:
                silent.link.abort("superseded", "it was silent, and the peer has made too many other connections")
            self._table.check_room(upgraded.peer, guest=guest)
            way = pipe.way
        except SwitchboardError:
            pipe.close()
            raise
        except OSError as error:
            pipe.close()
            raise AddressError("the peer hung up") from error
        now = self._context.now()
        self._count += 1
        connection = Connection(
            id=f"{self._context.incarnation}-{self._count}",
            peer=upgraded.peer,
            outbound=outbound,
            via=way,
            opened=now,
            opened_at=self._context.wall(),
            binding=upgraded.binding,
            was_allowed=self.decide(upgraded.peer).allowed,
        )
        connection.link = Link(
            self._reactor,
            pipe.detach(self._reactor),
            role=upgraded.role,
            send_cipher=upgraded.send,
            receive_cipher=upgraded.receive,
            received=upgraded.received,
            plaintext=upgraded.plaintext,
            on_stream=lambda channel: self._on_stream(connection, channel),
            on_end=lambda end: self._ended(connection, end),
            on_gone_away=lambda: self._on_gone_away(connection),
            on_used_up=lambda: self._used_up(connection),
            limits=self._limits_for(upgraded),
            budget=self._budgets.of(upgraded.peer),
            allowance=self._allowances.of(upgraded.peer, now, relay=outbound and self._is_relay(upgraded.peer)),
            patience=self.patience,
        )
        if not outbound:
            connection.link.charge(costs.CONNECTION, "connecting again and again")
        self._table.add(connection, now)
        self._numbers.connection_opened(connection)
        if not outbound:
            self.refusals.forget(upgraded.peer)
        connection.written_about = upgraded.peer not in self.refusals and (outbound or self._spend_line(now))
        self._context.log.log(
            "INFO" if connection.written_about else "DEBUG",
            "connected to {} ({}, {}, {})",
            upgraded.peer, connection.direction, connection.way, upgraded.send.cipher.value,
        )  # fmt: skip
        self._on_opened(connection)
        if not outbound:
            connection.link.end_if_in_debt()
        return connection

    def _limits_for(self, upgraded: Upgraded) -> yamux.Limits:
        """The limits of the streams of a connection: no more of ours than the peer takes."""
        limits = self._limits
        if upgraded.streams is None:
            outbound, total = UNKNOWN_PEER
        else:
            outbound, total = max(1, upgraded.streams - 2 * limits.own_streams), limits.total_streams
        return dataclasses.replace(
            limits,
            outbound_streams=min(limits.outbound_streams, outbound),
            total_streams=min(limits.total_streams, total),
        )

    def _used_up(self, connection: Connection) -> None:
        self._context.log.info(
            "the connection to {} has used up its stream ids; another one will take its place", connection.peer
        )
        self._table.gone_away(connection, self._context.now())

    def _ended(self, connection: Connection, end: LinkEnd) -> None:
        self._allowances.remember(connection.peer, self._context.now())
        self._table.remove(connection, end)
        self._see_closed(connection)
        self._numbers.connection_closed(connection, end.code)
        if end.defect is not None:
            self._tell_defect(f"the connection to {connection.peer}", end.defect.__cause__ or end.defect)
        self._tell_end(connection, end)
        self._on_ended(connection, end)

    def _see_closed(self, connection: Connection) -> None:
        """Keep it in sight until its wire is closed: it takes a descriptor, and the policy concerns it, too."""
        if connection.link.closed:
            return
        same = [each for each in self._closing if each.peer == connection.peer]
        if len(same) >= MAX_CONNECTIONS_PER_PEER:
            same[0].link.abort("closing", "too many connections to the peer are being closed")
        elif len(self._closing) >= MAX_CONNECTIONS:
            next(iter(self._closing)).link.abort("closing", "too many connections are being closed")
        self._closing[connection] = None
        connection.link.on_closed = lambda: self._closing.pop(connection, None)

    def heard(self, peer: PeerId) -> None:
        """The peer has said something, so it lets us in."""
        self.refusals.forget(peer)
        self._refused_lines.forget(peer)

    def _spend_line(self, now: float) -> bool:
        """Whether one more caller is worth a line; those that come and go all day would fill the disk with theirs."""
        if self._lines.level(now) < 1:
            return False
        self._lines.take(1, now)
        return True

    def _tell_end(self, connection: Connection, end: LinkEnd) -> None:
        more: str | None = ""
        if connection.heard:
            self.heard(connection.peer)
        elif connection.refused_us:
            self.refusals.note(connection.peer)
            more = self._refused_lines.note(connection.peer)
        if more is not None:
            why = "it has shut down" if connection.leaving and end.code in HUNG_UP else end.reason
            level = "INFO" if connection.written_about or connection.outbound else "DEBUG"
            self._context.log.log(level, "connection to {} ended: {}{}", connection.peer, why, more)

    # ---- enforcement

    def enforce(self) -> None:
        """Cut what the policy allowed before and does not allow now."""
        policy, wall, now = self._publishers.policy, self._context.wall(), self._context.now()
        for connection in list(self._closing):
            allowed = policy.decide_connection(connection.peer, wall)
            if not allowed.allowed and (connection.was_allowed or not connection.outbound):
                connection.link.abort("not-authorised", f"the policy no longer allows it ({allowed.rule})")
        for connection in self._table:
            allowed = policy.decide_connection(connection.peer, wall)
            if allowed.allowed:
                connection.was_allowed = True
            elif connection.was_allowed or not connection.outbound:
                self._decisions.note(connection.peer, "connection", allowed, connection.way, now)
                self._context.log.info("cut off {}: {}", connection.peer, allowed.rule)
                reason = f"the policy no longer allows it ({allowed.rule})"
                connection.link.abort("not-authorised", reason, at_once=True)
                continue
            for channel, protocol in list(connection.inbound_streams.items()):
                decision = policy.decide_stream(connection.peer, protocol, wall)
                if not decision.allowed:
                    self._decisions.note(connection.peer, protocol, decision, connection.way, now)
                    channel.reset(ResetCode.GATED)

    def tick(self) -> bool:
        """Enforce what only time changes; close drained connections; tell folded decisions.

        Returns whether somebody's time has passed.
        """
        for connection in self._table.drained(self._context.now()):
            connection.link.close("superseded", "another connection to the peer is used")
        wall = self._context.wall()
        expiry = self._publishers.policy.next_expiry(self._expiry_checked)
        expired = expiry is not None and expiry <= wall
        if expired:
            self.enforce()
        self._expiry_checked = wall
        if self._decisions.pending:
            self.flush()
        return expired

    def flush(self) -> None:
        """Tell the decisions that were not told yet."""
        self._decisions.flush()


def _place(error: BaseException) -> str:
    """Where an error was raised."""
    return "".join(
        [f"{frame.f_code.co_qualname}:{line}" for frame, line in traceback.walk_tb(error.__traceback__)][-1:]
    )
