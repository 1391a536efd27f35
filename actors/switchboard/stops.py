"""Circuits that relays announce: `/libp2p/circuit/relay/0.2.0/stop`, and the handshakes inside them.

Theory of operation. Only a relay that the configuration names may announce a circuit, over a direct connection. It says
from whom the circuit comes, but that is its word; who it is, the handshake inside the circuit proves, on which the
policy decides as on any other caller. A peer that proves to be another one than the relay said is refused.

    stream -> STOP's CONNECT -> place -> OK -> upgrade -> connection
                                  |-> none: RESOURCE_LIMIT_EXCEEDED

Whoever calls through a relay is a stranger until then, and all of them come from one address. So handshakes have
places, a number for each relay and one in all. When there is none, the oldest handshake that has taken longer than
`PATIENCE` makes room: those who dawdle lose theirs to the next. Deadlines are those of all upgrades. And each relay
spends tokens, as a source of callers does: what its strangers can make us compute is bounded however fast they are, and
however badly the relay means it. Who may connect gives the token back.

The answer to CONNECT, to the proposal and to the first handshake message, which a relay may pass on together, leave
together: no round trip is lost.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable

import trio

from actors.switchboard.circuit_pipes import CircuitPipe, cut_words
from actors.switchboard.circuits import CircuitEnd
from actors.switchboard.connections import Connection
from actors.switchboard.errors import HandshakeError
from actors.switchboard.link import Channel
from actors.switchboard.protocols import CancellableTimer
from actors.switchboard.upgrade import RefusedPeerError, Upgraded, Upgrader
from actors.switchboard.wire import Pipe
from protocol.circuit.exchange import REQUEST_TIMEOUT
from protocol.circuit.messages import Status
from protocol.circuit.stop import StopResponder
from protocol.errors import PeerupError
from protocol.peer_id import PeerId
from protocol.stream_descriptor import ResetCode
from protocol.token_bucket import TokenBucket

HANDSHAKES = 64
"""Handshakes in circuits at once, as among callers."""
HANDSHAKES_PER_RELAY = 32
"""Of one relay: a second one stays usable however busy the first is."""
RATE = 50.0
"""Handshakes a second of strangers through one relay: they cost at most a twentieth of one core."""
BURST = 256.0
"""Tokens that a relay may save up."""
PATIENCE = 1.0
"""Seconds that a handshake keeps its place when others want it: several round trips to the far side of the world."""


@dataclasses.dataclass(eq=False)
class _Handshake:
    relay: PeerId
    since: float
    scope: trio.CancelScope


class Stops:
    """See the module.

    Args:
        nursery: where handshakes run.
        upgrader: does them.
        may_relay: whether this peer is a relay that the configuration names.
        judge: whether this peer may come over this pipe; called once its id is proven.
        welcome: takes over the pipe of a peer that may; raises a SwitchboardError where there is no room.
        refused: told of each circuit that came to nothing, by one of a few reasons.
        now, call_later: clock and timer.
        broke: told of errors that nobody foresaw, see `actors.switchboard.reception.Reception`.
    """

    def __init__(
        self,
        nursery: trio.Nursery,
        upgrader: Upgrader,
        *,
        may_relay: Callable[[PeerId], bool],
        judge: Callable[[PeerId, Pipe], bool],
        welcome: Callable[[Pipe, Upgraded], None],
        refused: Callable[[str], None],
        now: Callable[[], float],
        call_later: Callable[[float, Callable[[], None]], CancellableTimer],
        broke: Callable[[Exception], None] | None = None,
        handshakes: int = HANDSHAKES,
        handshakes_per_relay: int = HANDSHAKES_PER_RELAY,
        rate: float = RATE,
        burst: float = BURST,
    ) -> None:
        self._nursery = nursery
        self._upgrader = upgrader
        self._may_relay = may_relay
        self._judge = judge
        self._welcome = welcome
        self._refused = refused
        self._now = now
        self._call_later = call_later
        self._broke = broke
        self._limit = handshakes
        self._limit_per_relay = handshakes_per_relay
        self._running: dict[_Handshake, None] = {}  # oldest first
        self._by_relay: Counter[PeerId] = Counter()
        self._rate, self._burst = rate, burst
        self._tokens: dict[PeerId, TokenBucket] = {}  # of those that the configuration names, or named

    @property
    def handshakes(self) -> int:
        """Handshakes under way."""
        return len(self._running)

    def serve_stop(self, connection: Connection, channel: Channel, first: bytes) -> None:
        """Take over a stream of the stop protocol."""
        if connection.relayed or not self._may_relay(connection.peer):
            self._refused("circuit-not-configured")
            channel.reset(ResetCode.GATED)
            return
        responder = StopResponder()

        def on_data(data: bytes) -> None:
            responder.receive_data(data)
            if responder.state == "deciding":
                deadline.cancel()
                self._decide(connection, channel, responder)
            elif reply := responder.data_to_send():
                deadline.cancel()
                self._refused("circuit-malformed")
                _answer_last(channel, reply)

        def give_up() -> None:
            deadline.cancel()
            if not channel.closed:
                self._refused("circuit-too-slow")
                channel.reset(ResetCode.PROTOCOL_VIOLATION)

        def on_reset(_: int) -> None:
            deadline.cancel()

        channel.on_data, channel.on_finish, channel.on_reset = on_data, give_up, on_reset
        deadline = self._call_later(REQUEST_TIMEOUT, give_up)
        if first:
            on_data(first)

    def _decide(self, connection: Connection, channel: Channel, responder: StopResponder) -> None:
        source = responder.source
        assert source is not None
        tokens = self._tokens_of(connection.peer)
        scope = self._place(connection.peer) if tokens.level(self._now()) >= 1 else None
        if scope is None:
            responder.refuse(Status.RESOURCE_LIMIT_EXCEEDED, "too many handshakes are under way", rule="handshakes")
            self._refused("circuit-queue-full")
            _answer_last(channel, responder.data_to_send())
            return
        tokens.take(1, self._now())
        responder.accept()
        channel.send(responder.data_to_send())
        limit = responder.limit
        channel.stream.exempt = True  # the link through the circuit charges the peer that sends them
        end = CircuitEnd(channel, lambda code: cut_words(connection, code, limit), unread=responder.leftover)
        self._nursery.start_soon(self._upgrade, CircuitPipe(connection, end, limit), source, scope)

    def _place(self, relay: PeerId) -> _Handshake | None:
        """A place for a handshake, that of a slow one if need be; None if there is none."""
        full_of_relay = self._by_relay[relay] >= self._limit_per_relay
        if full_of_relay or len(self._running) >= self._limit:
            now = self._now()
            for handshake in self._running:
                if now - handshake.since < PATIENCE:
                    return None
                if not full_of_relay or handshake.relay == relay:
                    handshake.scope.cancel()
                    self._leave(handshake)
                    break
            else:
                return None
        place = _Handshake(relay, self._now(), trio.CancelScope())
        self._running[place] = None
        self._by_relay[relay] += 1
        return place

    def _tokens_of(self, relay: PeerId) -> TokenBucket:
        tokens = self._tokens.get(relay)
        if tokens is None:
            tokens = self._tokens[relay] = TokenBucket(self._rate, self._burst, self._now())
        return tokens

    def _leave(self, handshake: _Handshake) -> None:
        if self._running.pop(handshake, 0) is None:
            self._by_relay[handshake.relay] -= 1
            if not self._by_relay[handshake.relay]:
                del self._by_relay[handshake.relay]

    async def _upgrade(self, pipe: CircuitPipe, source: PeerId, place: _Handshake) -> None:
        def judge(peer: PeerId) -> bool:
            if peer != source:
                self._refused("circuit-wrong-source")
                return False
            if not self._judge(peer, pipe):
                return False
            self._tokens_of(place.relay).take(-1, self._now())
            return True

        handed_over = False
        try:
            with place.scope:
                upgraded = await self._upgrader.inbound(pipe, judge)
                self._welcome(pipe, upgraded)
                handed_over = True
            if place.scope.cancelled_caught:
                self._refused("too-slow")
        except RefusedPeerError:
            self._refused("not-authorised")
        except HandshakeError as error:
            self._refused(error.stage)
        except PeerupError as error:
            self._refused(error.code)
        except Exception as error:
            if self._broke is None:
                raise
            self._refused("defect")
            self._broke(error)
        finally:
            if not handed_over:
                pipe.close()
            self._leave(place)


def _answer_last(channel: Channel, answer: bytes) -> None:
    """Send the answer that ends the stream, whatever the relay sends or closes meanwhile."""
    channel.on_data, channel.on_finish = _ignore, channel.finish
    channel.send(answer)
    channel.finish()


def _ignore(_: bytes) -> None:
    pass
