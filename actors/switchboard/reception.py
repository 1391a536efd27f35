"""Where callers come in: listening sockets, the queue before the handshakes, the handshakes."""

from __future__ import annotations

import dataclasses
import socket
from collections.abc import Callable

import trio

from actors.switchboard.admission import Admission, Limits, Place, source_of
from actors.switchboard.errors import HandshakeError, SwitchboardError
from actors.switchboard.pipes import Pipes
from actors.switchboard.protocols import CancellableTimer
from actors.switchboard.transports import TCP, accept_tcp
from actors.switchboard.upgrade import RefusedPeerError, Upgraded, Upgrader
from actors.switchboard.wire import Pipe, SocketPipe
from protocol.peer_id import PeerId

ACCEPT_BATCH = 32
"""Connections accepted in a row before others get a turn."""
OUT_OF_DESCRIPTORS_PAUSE = 0.5
"""Seconds without accepting when the process has no descriptor left; callers wait in the kernel's queue."""


_PLAIN = frozenset({TCP})


@dataclasses.dataclass(frozen=True)
class _Caller:
    """An accepted socket, and what may be spoken where it was accepted."""

    socket: socket.socket
    transports: frozenset[str]


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
        now, call_later: clock and timer.
        limits: see `actors.switchboard.admission`.
    """

    def __init__(
        self,
        nursery: trio.Nursery,
        pipes: Pipes,
        upgrader: Upgrader,
        *,
        judge: Callable[[PeerId, Pipe], bool],
        welcome: Callable[[Pipe, Upgraded], None],
        refused: Callable[[str], None],
        now: Callable[[], float],
        call_later: Callable[[float, Callable[[], None]], CancellableTimer],
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
        self._now = now
        self._call_later = call_later
        self._admission: Admission[_Caller] = Admission(limits)
        self._timer: CancellableTimer | None = None
        self._listening: list[trio.CancelScope] = []

    @property
    def waiting(self) -> int:
        """Callers that wait for their handshake."""
        return self._admission.waiting

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
                    self._arrived(_Caller(accepted[0], transports), accepted[1])
            except OSError:
                self._refused("out-of-descriptors")
                await trio.sleep(OUT_OF_DESCRIPTORS_PAUSE)
            self._admit()

    def close(self) -> None:
        """Stop accepting, and hang up on everybody who still waits. The listening sockets may be closed then."""
        for scope in self._listening:
            scope.cancel()
        for caller in self._admission.drain():
            caller.socket.close()
        if self._timer is not None:
            self._timer.cancel()

    def _arrived(self, caller: _Caller, source: str) -> None:
        if (gone := self._admission.arrive(source_of(source), caller)) is not None:
            gone.socket.close()
            self._refused("queue-full")

    def _admit(self) -> None:
        now = self._now()
        self._admission.displace(now)
        while (place := self._admission.next(now)) is not None:
            self._nursery.start_soon(self._handshake, place)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        change = self._admission.next_change(now)
        if change is not None:
            self._timer = self._call_later(max(change, 0.001), self._timer_fired)

    def _timer_fired(self) -> None:
        self._timer = None
        self._admit()

    async def _handshake(self, place: Place[_Caller]) -> None:
        ground = SocketPipe(place.caller.socket)
        pipe: Pipe = ground
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
            return proven

        try:
            with scope:
                pipe = await self._pipes.accept(place.caller.socket, ground, place.caller.transports)
                upgraded = await self._upgrader.inbound(pipe, judge)
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
            self._admission.leave(place, authenticated=proven)
            self._admit()
