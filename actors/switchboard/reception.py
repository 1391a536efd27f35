"""Where callers come in: listening sockets, those who have yet to say a word, the queue, the handshakes.

A caller that has sent nothing is a descriptor in the reactor's set and nothing more: no task, no buffer, no place.
"""

from __future__ import annotations

import dataclasses
import socket
import struct
from collections.abc import Callable, Mapping
from typing import Final

import trio

from actors.reactor import READ, Reactor
from actors.switchboard.admission import Admission, Limits, Place
from actors.switchboard.crowd import Source, source_of
from actors.switchboard.errors import HandshakeError, SwitchboardError
from actors.switchboard.pipes import Pipes, first_stage
from actors.switchboard.transports import TCP, accept_tcp
from actors.switchboard.upgrade import RefusedPeerError, Upgraded, Upgrader
from actors.switchboard.wire import Pipe, SocketPipe
from protocol.peer_id import PeerId
from supervisor.timers import Timer

ACCEPT_BATCH = 32
"""Connections accepted in a row before others get a turn."""
OUT_OF_DESCRIPTORS_PAUSE = 0.5
"""Seconds without accepting when the process has no descriptor left; callers wait in the kernel's queue."""
ROUND_TRIPS: Final = 3.0
"""Patience with a caller is at least so many of its round trips: one for a step of a handshake, and a lost packet."""
MOST_FOR_ROUND_TRIPS: Final = 1.0
"""Seconds of patience that no round trip time exceeds, since a caller can make its own look long."""

_TCP_INFO: Final = struct.Struct("=B67xI")  # of `struct tcp_info`: the state, and the smoothed round trip time in µs
_CLOSE_WAIT: Final = 8

_PLAIN = frozenset({TCP})


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class _Caller:
    """An accepted socket, where it comes from, and what may be spoken where it was accepted."""

    socket: socket.socket
    source: Source
    transports: frozenset[str]


class _Account:
    """Charges the work of a handshake to its place, and tells there whose turn it is."""

    def __init__(self, admission: Admission[_Caller], place: Place[_Caller], now: Callable[[], float]) -> None:
        self._admission = admission
        self._place = place
        self._now = now
        self.known = place.known

    def waits(self) -> None:
        """See `actors.switchboard.turns.Account`."""
        self._place.begin_work(self._now())

    def worked(self, seconds: float) -> None:
        """See `actors.switchboard.turns.Account`."""
        now = self._now()
        self._place.end_work(now)
        self._admission.worked(self._place, seconds, now)

    def progress(self) -> None:
        """See `actors.switchboard.turns.Account`."""
        self._place.progress(self._now())


class Reception:
    """Accepts callers and turns those who prove to be welcome over.

    Args:
        nursery: where accepting and handshakes run.
        pipes: does what comes before the handshakes on other transports than plain TCP.
        upgrader: does the handshakes.
        judge: whether this peer, over this pipe, may connect; called once its id is proven.
        welcome: takes over the pipe of a peer that may; raises a SwitchboardError where there is no room.
        refused: told of each caller that did not get in, by one of a few reasons.
        broke: told of errors in handshakes that nobody foresaw; without it they are raised. Whatever defect a stranger
            finds, it shall end no more than its own connection.
        listed: whether the policy names this peer; where it comes from it is known in future.
        remembered: told when a peer has authenticated where one may be known from now on, and whether none was before.
        reactor: where silent callers are watched; its clock and timers.
        limits: see `actors.switchboard.admission`.
    """

    def __init__(
        self,
        nursery: trio.Nursery,
        reactor: Reactor,
        pipes: Pipes,
        upgrader: Upgrader,
        *,
        judge: Callable[[PeerId, Pipe], bool],
        welcome: Callable[[Pipe, Upgraded], None],
        refused: Callable[[str], None],
        listed: Callable[[PeerId], bool],
        remembered: Callable[[bool], None] = lambda _: None,
        broke: Callable[[Exception], None] | None = None,
        limits: Limits | None = None,
    ) -> None:
        self._nursery = nursery
        self._pipes = pipes
        self._upgrader = upgrader
        self._judge = judge
        self._welcome = welcome
        self._refused = refused
        self._broke = broke
        self._listed = listed
        self._remembered = remembered
        self._reactor = reactor
        self._now = reactor.clock
        self._admission: Admission[_Caller] = Admission(limits)
        self._timer: Timer | None = None
        self._admitting = False
        self._listening: list[trio.CancelScope] = []

    @property
    def waiting(self) -> int:
        """Callers that have not begun their handshake."""
        return self._admission.waiting

    @property
    def silent(self) -> int:
        """Those among them that have sent nothing yet."""
        return self._admission.silent

    @property
    def handshakes(self) -> int:
        """Handshakes under way."""
        return self._admission.running

    async def listen(self, listener: socket.socket, transports: frozenset[str] = _PLAIN) -> None:
        """Accept at this socket until cancelled or closed. The socket stays the caller's.

        `transports` is what may be spoken there; see `actors.switchboard.transports.Route`.
        """
        with trio.CancelScope() as scope:
            self._listening.append(scope)
            await self._listen(listener, transports)

    async def _listen(self, listener: socket.socket, transports: frozenset[str]) -> None:
        while True:
            await trio.lowlevel.wait_readable(listener)
            try:
                for _ in range(ACCEPT_BATCH):
                    accepted = accept_tcp(listener)
                    if accepted is None:
                        break
                    self._arrived(_Caller(accepted[0], source_of(accepted[1]), transports))
            except OSError:
                self._refused("out-of-descriptors")
                await trio.sleep(OUT_OF_DESCRIPTORS_PAUSE)
            self._admit()

    def close(self) -> None:
        """Stop accepting, and hang up on everybody who still waits. The listening sockets may be closed then."""
        for scope in self._listening:
            scope.cancel()
        for caller in self._admission.drain():
            self._hang_up(caller)
        if self._timer is not None:
            self._timer.cancel()

    def remember(self, address: str) -> None:
        """A peer that the policy names has authenticated at this IP address, whoever called whom."""
        self._remember(source_of(address))

    def known_sources(self) -> dict[str, int]:
        """What a successor should know of where peers come from; plain data, some KiB at most."""
        return self._admission.known_sources(self._now())

    def recall(self, known: Mapping[str, int]) -> None:
        """Know what a predecessor has known."""
        self._admission.recall(known, self._now())

    def _remember(self, source: Source) -> None:
        self._remembered(self._admission.remember(source, self._now()))

    def _arrived(self, caller: _Caller) -> None:
        gone = self._admission.greet(caller.source, caller, self._now())
        if gone is not None:
            self._hang_up(gone, "queue-full")
        if gone is not caller:
            self._reactor.register(
                caller.socket.fileno(), READ, lambda _: self._speaks(caller), lambda _: self._silent_end(caller)
            )

    def _speaks(self, caller: _Caller) -> None:
        """A silent caller has sent something, or has hung up."""
        if not caller.socket.recv(1, socket.MSG_PEEK):
            self._silent_end(caller)
            return
        self._reactor.unregister(caller.socket.fileno())
        self._admission.speaks(caller)
        if not self._admitting:  # of those that speak in one round of the event loop it is seen to together
            self._admitting = True
            self._reactor.call_soon(self._admit)

    def _silent_end(self, caller: _Caller) -> None:
        self._admission.hung_up(caller)
        self._hang_up(caller, first_stage(caller.transports))

    def _hang_up(self, caller: _Caller, reason: str | None = None) -> None:
        self._reactor.unregister(caller.socket.fileno())
        caller.socket.close()
        if reason is not None:
            self._refused(reason)

    def _admit(self) -> None:
        self._admitting = False
        now = self._now()
        for caller in self._admission.silent_for_too_long(now):
            self._hang_up(caller, first_stage(caller.transports))
        self._admission.displace(now)
        while (place := self._admission.next(now)) is not None:
            self._nursery.start_soon(self._handshake, place)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        change = self._admission.next_change(now)
        if change is not None:
            self._timer = self._reactor.call_later(max(change, 0.001), self._timer_fired)

    def _timer_fired(self) -> None:
        self._timer = None
        self._admit()

    async def _handshake(self, place: Place[_Caller]) -> None:
        caller = place.caller
        ground = SocketPipe(caller.socket)
        pipe: Pipe = ground
        account = _Account(self._admission, place, self._now)
        scope = trio.CancelScope()
        proven = handed_over = False

        def displace() -> bool:
            if ground.readable:
                return False  # the caller has done its part, the delay is ours
            scope.cancel()
            return True

        place.displace = displace

        def judge(peer: PeerId) -> bool:
            nonlocal proven
            proven = self._judge(peer, pipe)
            if proven and self._listed(peer):
                self._remember(caller.source)
            return proven

        try:
            with scope:
                place.least_patience = _patience_with(caller)
                pipe = await self._pipes.accept(caller.socket, ground, caller.transports, account)
                upgraded = await self._upgrader.inbound(pipe, judge, account)
                self._welcome(pipe, upgraded)
                handed_over = True
            if scope.cancelled_caught:
                self._refused("too-slow")
        except RefusedPeerError:
            self._refused("not-authorised")
        except HandshakeError as error:
            self._refused(error.stage)
        except SwitchboardError as error:
            self._refused(error.code)
        except Exception as error:
            if self._broke is None:
                raise
            self._refused("defect")
            self._broke(error)
        finally:
            if not handed_over:
                pipe.close()
            self._admission.leave(place, authenticated=proven, now=self._now())
            self._admit()


def _patience_with(caller: _Caller) -> float:
    """Seconds of patience that the caller's way to us demands.

    Raises:
        HandshakeError: it has hung up behind its first words, and work for it would be in vain.
    """
    try:
        state, rtt = _TCP_INFO.unpack(caller.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size))
    except OSError:
        return 0.0
    if state == _CLOSE_WAIT:
        raise HandshakeError(first_stage(caller.transports), "the caller hung up while it waited for its turn")
    return min(ROUND_TRIPS * float(rtt) / 1e6, MOST_FOR_ROUND_TRIPS)
