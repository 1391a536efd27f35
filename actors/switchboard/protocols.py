"""Who serves which protocol, and the negotiation of streams that peers open.

Theory of operation. Each inbound stream begins with multistream-select. For every protocol that the peer proposes the
policy is asked first. Peers that may not connect (any more) get a reset; a protocol that the peer may not use, or
that does not exist, gets `na`, and nobody can tell these two apart; a service that it may use and whose actor is
just not there gets a reset with a code that says so. After agreement the stream goes to whoever serves it::

    opened --proposal--> judged --allowed, served--> handed out
                           |----allowed, not served--> reset (service-unavailable)
                           |----refused, peer may connect--> `na`, next proposal
                           |----refused, peer may not--> reset (gated)
    opened --deadline, rule broken, end of stream--> reset (negotiation-failed)
    opened --refused, then anything but a proposal--> `na`, finished; what comes is dropped until the peer ends it

The last line is for peers that send the protocol's bytes right behind their proposal, without waiting for the answer
(go-libp2p and rust-libp2p do). A reset would overtake the `na`, and the peer would not learn why.

Whatever comes to nothing is charged to the peer (`protocol.allowance`), and so is a stream of a service until the
service has answered on it.

All of it happens in callbacks: a stream that negotiates is one small object and one timer, and no task.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from actors.switchboard.connections import Connection
from actors.switchboard.errors import SwitchboardError, TooManyError
from actors.switchboard.link import Channel
from protocol import allowance as costs
from protocol.errors import ProtocolError
from protocol.multistream import Responder, TooManyTriesError
from protocol.policy import Decision
from protocol.protocol_ids import IDENTIFY_PUSH
from protocol.service import service_of_protocol
from protocol.stream_descriptor import ResetCode

NEGOTIATION_DEADLINE = 10.0
"""Seconds for a peer to agree on a protocol after it has opened a stream."""
MAX_PROTOCOLS = 512
"""Protocols that actors may serve."""

Handler = Callable[[Connection, Channel, bytes], None]
"""Takes over an agreed stream. The bytes came behind the negotiation. Sets the channel's callbacks at once."""


class ProtocolTakenError(SwitchboardError):
    """Another actor serves the protocol already."""

    code = "already-served"


class Agreed(NamedTuple):
    """The end of a negotiation: `actor` serves `protocol`, `rule` allows it, `unread` came behind the negotiation."""

    protocol: str
    actor: str
    rule: str
    unread: bytes


class CancellableTimer(Protocol):
    """A call that will be made unless it is cancelled."""

    def cancel(self) -> None:
        """Do not make the call."""
        ...


class ProtocolTable:
    """Protocols served by actors, and those that the switchboard serves itself."""

    def __init__(self) -> None:
        self._own: dict[str, Handler] = {}
        self._actors: dict[str, str] = {}
        self._attaching: set[str] = set()

    def serve_here(self, protocol: str, handler: Handler) -> None:
        """The switchboard serves this protocol itself."""
        self._own[protocol] = handler

    def withdraw_here(self, protocol: str) -> None:
        """The switchboard serves this protocol no more; harmless if it did not."""
        self._own.pop(protocol, None)

    def serve(self, protocol: str, actor: str, *, attach: bool = False) -> None:
        """This actor serves the protocol, with sockets of its own if `attach`; saying so twice is harmless.

        Raises:
            ProtocolTakenError: somebody else does.
            TooManyError: so many are served already.
        """
        holder = "switchboard" if protocol in self._own else self._actors.get(protocol, actor)
        if holder != actor:
            raise ProtocolTakenError(f"{protocol} is served by {holder}")
        if protocol not in self._actors and len(self._actors) >= MAX_PROTOCOLS:
            raise TooManyError(f"{MAX_PROTOCOLS} protocols are served, the limit")
        self._actors[protocol] = actor
        (self._attaching.add if attach else self._attaching.discard)(protocol)

    def attaches(self, protocol: str) -> bool:
        """Whether its actor wants to attach sockets to streams."""
        return protocol in self._attaching

    def withdraw(self, protocol: str, actor: str) -> None:
        """This actor no longer serves the protocol; harmless if it did not."""
        if self._actors.get(protocol) == actor:
            del self._actors[protocol]

    def withdraw_all(self, actor: str) -> list[str]:
        """This actor is gone; the protocols that it served."""
        served = [protocol for protocol, holder in self._actors.items() if holder == actor]
        for protocol in served:
            del self._actors[protocol]
        return served

    def handler(self, protocol: str) -> Handler | str | None:
        """Who serves it: a handler of the switchboard, the name of an actor, or nobody."""
        return self._own.get(protocol) or self._actors.get(protocol)

    def names(self) -> tuple[str, ...]:
        """All served protocols, sorted."""
        return tuple(sorted([*self._own, *self._actors]))


class InboundStreams:
    """Negotiates the streams that peers open.

    Args:
        table: who serves what.
        call_later: the reactor's timer.
        judge: the policy's decision on a protocol for the peer of a connection.
        may_connect: whether the peer of a connection may still be connected.
        hand_out: gives an agreed stream to an actor.
        charge: charges the peer of a connection for work, in words.
        charge_until_answered: charges it for a stream until a service has answered on it.
    """

    def __init__(
        self,
        table: ProtocolTable,
        call_later: Callable[[float, Callable[[], None]], CancellableTimer],
        judge: Callable[[Connection, str], Decision],
        may_connect: Callable[[Connection], bool],
        hand_out: Callable[[Connection, Channel, Agreed], None],
        *,
        charge: Callable[[Connection, float, str], None] = lambda _, __, ___: None,
        charge_until_answered: Callable[[Connection, Channel, float], None] = lambda _, __, ___: None,
    ) -> None:
        self.table = table
        self.call_later = call_later
        self.judge = judge
        self.may_connect = may_connect
        self.hand_out = hand_out
        self.charge = charge
        self.charge_until_answered = charge_until_answered
        self.negotiating = 0

    def accept(self, connection: Connection, channel: Channel) -> None:
        """Begin the negotiation of a stream that the peer has just opened."""
        _Negotiation(self, connection, channel)


class _RefusedStreamError(SwitchboardError):
    """The negotiation ends in a reset with this code."""

    def __init__(self, code: ResetCode) -> None:
        super().__init__(ResetCode.describe(code))
        self.reset_code = code


class _Negotiation:
    __slots__ = ("_channel", "_connection", "_decision", "_responder", "_room", "_timer")

    def __init__(self, room: InboundStreams, connection: Connection, channel: Channel) -> None:
        self._room = room
        self._connection = connection
        self._channel = channel
        self._decision: Decision | None = None
        self._responder = Responder(self._supports)
        channel.on_data = self._on_data
        channel.on_finish = self._on_finish
        channel.on_reset = self._on_reset
        room.negotiating += 1
        self._timer: CancellableTimer | None = room.call_later(NEGOTIATION_DEADLINE, self._expired)

    def _supports(self, protocol: str) -> bool:
        decision = self._room.judge(self._connection, protocol)
        if not decision.allowed:
            if not self._room.may_connect(self._connection):
                raise _RefusedStreamError(ResetCode.GATED)
            return False
        if self._room.table.handler(protocol) is None:
            if service_of_protocol(protocol) is None:
                return False  # this node does not do that at all, such as to relay
            raise _RefusedStreamError(ResetCode.SERVICE_UNAVAILABLE)
        self._decision = decision
        return True

    def _on_data(self, data: bytes) -> None:
        responder = self._responder
        before = responder.tries
        try:
            self._hear(data)
        finally:
            refused = responder.tries - before - (responder.result is not None)
            if refused > 0:
                self._room.charge(
                    self._connection, refused * costs.PROPOSAL, "proposals of protocols that it cannot use"
                )

    def _hear(self, data: bytes) -> None:
        responder = self._responder
        try:
            responder.receive_data(data)
        except _RefusedStreamError as refused:
            self._give_up(refused.reset_code)
            return
        except TooManyTriesError:
            self._give_up(ResetCode.NEGOTIATION_FAILED)
            return
        except ProtocolError:
            if responder.refused:
                self._decline()
            else:
                self._give_up(ResetCode.NEGOTIATION_FAILED)
            return
        if reply := responder.data_to_send():
            self._channel.send(reply)
        if responder.result is not None:
            self._hand_out(responder.result, responder.leftover)

    def _hand_out(self, protocol: str, leftover: bytes) -> None:
        self._end()
        room, connection, channel = self._room, self._connection, self._channel
        handler = room.table.handler(protocol)
        assert handler is not None
        assert self._decision is not None
        if isinstance(handler, str):
            room.charge_until_answered(connection, channel, costs.SERVICE)
            room.hand_out(connection, channel, Agreed(protocol, handler, self._decision.rule, leftover))
        else:
            cost = costs.PUSH if protocol == IDENTIFY_PUSH else costs.HANDLED
            room.charge(connection, cost, f"streams of {protocol}")
            handler(connection, channel, leftover)

    def _on_finish(self) -> None:
        if self._responder.refused:
            self._end()
            self._channel.on_reset = _ignore  # it is over only when the answer has gone
            self._channel.finish()
        else:
            self._give_up(ResetCode.NEGOTIATION_FAILED)

    def _decline(self) -> None:
        """What the peer sends belongs to a protocol that was refused: let it have the answer, and drop the rest."""
        channel = self._channel
        channel.on_data = _drop
        if reply := self._responder.data_to_send():
            channel.send(reply)
        channel.finish()

    def _on_reset(self, code: int) -> None:
        self._end()

    def _expired(self) -> None:
        self._timer = None
        self._give_up(ResetCode.NEGOTIATION_FAILED)

    def _give_up(self, code: ResetCode) -> None:
        self._end()
        if code == ResetCode.NEGOTIATION_FAILED:
            self._room.charge(self._connection, costs.FAILED, "streams that come to no protocol")
        else:
            self._room.charge(self._connection, costs.UNAVAILABLE, "streams of services that are not there")
        self._channel.reset(code)

    def _end(self) -> None:
        self._room.negotiating -= 1
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _drop(_: bytes) -> None:
    pass


def _ignore(_: int) -> None:
    pass
