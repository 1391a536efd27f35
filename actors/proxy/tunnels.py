"""The running tunnels of a proxy actor: how many there may be, what they carried, how each one ended.

This is the same on both sides of a tunnel. Bytes are counted here and nowhere else in the node.

Theory of operation. A tunnel is carried in one of two ways. A TCP socket is given to the switchboard, which carries the
bytes itself; the tunnel is then *attached*: known here by its stream's id, and its bytes and its end are told in
reports, which may also be the first that is heard of it. It goes on when this process is killed, and the successor
adopts it. Any other socket is joined with a stream
descriptor by a pump in this process, and ends with it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import socket
import sys
import termios
from collections.abc import Iterable

from actors.outbox import Outbox
from actors.pump import Outcome, Pump, PumpResult
from actors.reactor import Reactor
from actors.sockets import RESET_ON_CLOSE
from protocol.messages import Data, Descriptor
from protocol.messages.gate import TunnelEnded
from protocol.messages.switchboard import AdoptStreams, CloseStreams, ConnectionInfo, EndedStream, StreamReport
from protocol.peer_id import PeerId
from protocol.stream_descriptor import ResetCode
from supervisor.actor import Context
from supervisor.errors import AskError, DeadlineExceededError, RefusedError

MAX_TUNNELS = 2048
"""Concurrent tunnels of one actor. An attached one takes a descriptor in the switchboard, a pumped one two here."""
COUNT_INTERVAL = 2.0
"""Seconds between additions to the byte counters while tunnels run."""
ADOPT_DEADLINE = 2.0
"""Seconds for the switchboard to tell which tunnels a predecessor left."""
CLOSE_DEADLINE = 4.0
"""Seconds for the switchboard to close what is attached; it gives what has just finished a moment to be confirmed."""
REMEMBERED = 2048
"""Attached tunnels that are over and whose end may be told again: more than one report tells of."""
GATE = "gate"
SWITCHBOARD = "switchboard"

MEANINGS: dict[int, str] = {
    ResetCode.NEGOTIATION_FAILED: "the peer no longer offers the service to this node",
    ResetCode.GATED: "the peer's policy no longer allows it",
    ResetCode.LIMIT_EXCEEDED: (
        "the peer serves as many connections, or keeps as many unread bytes, as it may, in all or for this node"
    ),
    ResetCode.SHUTDOWN: "the other node, or the actor that served the connection, was stopped",
    ResetCode.LOST: "a process that carried the connection ended",
    ResetCode.CONNECTION_LOST: "the connection to the peer ended",
    ResetCode.LOCAL_RESET: "the service, on the peer's side, broke the connection off",
    ResetCode.SERVICE_UNREACHABLE: "the service does not accept connections on the peer's side",
    ResetCode.SERVICE_UNAVAILABLE: "the peer's actor for the service is being restarted",
}
"""What a reset by the far side means, for people."""

_OURS = frozenset({Outcome.FINISHED, Outcome.LOCAL_RESET, Outcome.ABORTED})
"""What the far side has no part in."""


@dataclasses.dataclass(eq=False)
class Tunnel:
    """One tunnelled connection; without a pump it is attached."""

    peer: PeerId
    path: str
    since: float
    pump: Pump | None = None
    counted_sent: int = 0
    counted_received: int = 0
    outcome: Descriptor | None = None


class Tunnels:
    """All tunnels of one actor.

    Args:
        context: of the actor.
        reactor: where the bytes run.
        service: whose tunnels these are.
        role: `client` or `server`.
        limit: how many there may be.
    """

    def __init__(
        self, context: Context, reactor: Reactor, service: str, role: str, *, limit: int = MAX_TUNNELS
    ) -> None:
        self._context = context
        self._reactor = reactor
        self._gate = Outbox(context, GATE)
        self._service = service
        self._role = role
        self._limit = limit
        self._tunnels: dict[Tunnel, None] = {}
        self._attached: dict[str, Tunnel] = {}
        self._over: dict[str, None] = {}  # ids of attached ones whose end was noted
        self._switchboard = 0  # the incarnation of the present one, once it was seen to come
        self._reserved = 0
        self._adopted = True
        self._counting = False
        self.last_failure = ""
        metrics = context.metrics
        self._sent = metrics.counter("peerup_tunnel_bytes_total", service=service, role=role, direction="sent")
        self._received = metrics.counter("peerup_tunnel_bytes_total", service=service, role=role, direction="received")
        self._open = metrics.gauge("peerup_tunnels", service=service, role=role)

    @property
    def count(self) -> int:
        """Tunnels that run or are being set up."""
        return len(self._tunnels) + len(self._attached) + self._reserved

    def reserve(self) -> bool:
        """Count in a tunnel that is being set up, if there is room. Follow with `run`, `attached` or `failed`."""
        if self.count >= self._limit:
            return False
        self._reserved += 1
        return True

    def run(
        self,
        local: socket.socket,
        stream: socket.socket,
        peer: PeerId,
        path: str,
        outcome: Descriptor | None = None,
        *,
        confirm: bool = False,
    ) -> None:
        """Carry bytes between the two sockets, which are taken over, until both directions are done.

        What came of it is written to `outcome` (see `protocol.messages.proxy.Attach`, for `confirm` as well).
        """
        self._reserved -= 1
        tunnel = Tunnel(peer, path, self._context.now(), outcome=outcome)
        self._tunnels[tunnel] = None
        self._measure()
        tunnel.pump = Pump(self._reactor, local, stream, lambda result: self._ended(tunnel, result), confirm=confirm)
        if not self._counting:
            self._counting = True
            self._reactor.call_later(COUNT_INTERVAL, self._count)

    def attached(self, stream_id: str, peer: PeerId, path: str) -> None:
        """The switchboard carries the bytes of this stream of ours."""
        self._reserved -= 1
        self._begin(stream_id, Tunnel(peer, path, self._context.now()))
        self._measure()

    def _begin(self, stream_id: str, tunnel: Tunnel) -> None:
        if stream_id in self._attached or stream_id in self._over:
            return  # the task that has its opening in hand may run after its end was told
        self._attached[stream_id] = tunnel
        if _incarnation_of(stream_id) < self._switchboard:
            self._lose(stream_id)

    def _take(self, stream_id: str) -> Tunnel | None:
        """An attached tunnel, which is over."""
        self._over[stream_id] = None
        if len(self._over) > REMEMBERED:
            del self._over[next(iter(self._over))]
        return self._attached.pop(stream_id, None)

    def has_attached(self, stream_id: str) -> bool:
        """Whether the stream is ours and not known to be over."""
        return stream_id in self._attached

    def attach_failed(self, stream_id: str, reason: str, outcome: str) -> None:
        """A stream that was `attached` got no socket after all."""
        tunnel = self._take(stream_id)
        if tunnel is not None:
            self._measure()
            self.refused(reason, outcome)
            self._report(tunnel, outcome)

    async def adopt(self) -> None:
        """Take over what a predecessor left in the switchboard; later, if that does not answer now."""
        try:
            await self._adopt()
        except DeadlineExceededError:
            self._adopted = False
            self._context.nursery.start_soon(self._adopt_later)

    async def _adopt_later(self) -> None:
        while not self._adopted:
            try:
                await self._adopt()
            except DeadlineExceededError as error:
                self._context.log.warning("the tunnels of this actor's predecessor are not known yet: {}", error)

    async def _adopt(self) -> None:
        try:
            left = await self._context.ask(SWITCHBOARD, AdoptStreams(), timeout=ADOPT_DEADLINE)
        except DeadlineExceededError:
            raise
        except AskError as error:  # it is not there; then it has no streams either
            self._context.log.debug("no tunnels to adopt: {}", error)
            self._adopted = True
            return
        self._adopted = True
        for stream in left.streams:
            self._attached[stream.stream_id] = Tunnel(
                stream.peer, stream.path, stream.since, None, stream.sent, stream.received
            )
        self._measure()

    def reported(self, report: StreamReport) -> None:
        """Take note of what the switchboard tells of our streams.

        Raises:
            RefusedError: not yet, tell it again.
        """
        if not self._adopted:
            raise RefusedError("not-ready", "the streams of the predecessor are not known yet")
        for stream in report.opened:
            self._begin(stream.stream_id, Tunnel(stream.peer, stream.path, stream.since))
        for traffic in report.moved:
            tunnel = self._attached.get(traffic.stream_id)
            if tunnel is not None:
                self._count_one(tunnel, traffic.sent, traffic.received)
        for _ in range(report.turned_away):
            self.refused(f"{self._limit} connections are open, the limit", "limit-exceeded")
        for _ in range(report.peer_full):
            self.refused("as many connections to the peer are open as it takes at a time", "limit-exceeded")
        self._note_ends(report.ended)

    def switchboard_lost(self) -> None:
        """The switchboard is gone and what was attached with it; what it carried since its last report is not known."""
        for stream_id in list(self._attached):
            self._lose(stream_id)

    def switchboard_back(self, incarnation: int) -> None:
        """A successor of the switchboard is there: streams of earlier ones are gone, also those we hear of only now."""
        self._switchboard = incarnation
        for stream_id in [one for one in self._attached if _incarnation_of(one) < incarnation]:
            self._lose(stream_id)

    def _lose(self, stream_id: str) -> None:
        tunnel = self._take(stream_id)
        assert tunnel is not None
        result = PumpResult(Outcome.STREAM_LOST, ResetCode.LOST, tunnel.counted_sent, tunnel.counted_received)
        self._ended_with(tunnel, result, None)
        self._measure()

    async def close(self) -> None:
        """Reset all tunnels, because this actor is stopping."""
        self.abort(ResetCode.SHUTDOWN)
        try:
            closed = await self._context.ask(SWITCHBOARD, CloseStreams(), timeout=CLOSE_DEADLINE)
        except AskError as error:
            self._context.log.debug("the switchboard closes no tunnels: {}", error)
        else:
            self._note_ends(closed.ended)
        self._gate.close()

    def failed(self, peer: PeerId, path: str, reason: str, outcome: str) -> None:
        """A tunnel that was reserved did not come about."""
        self._reserved -= 1
        self.refused(reason, outcome)
        self._report(Tunnel(peer, path, self._context.now()), outcome)

    def refused(self, reason: str, outcome: str) -> None:
        """A connection was turned away before it became anything."""
        if reason != self.last_failure:  # a client that tries again and again is told of once
            self._context.log.warning("{}", reason)
        self.last_failure = reason
        self._finished(outcome)

    def abort(self, code: ResetCode) -> None:
        """Reset all tunnels that this process carries."""
        for tunnel in list(self._tunnels):
            if tunnel.pump is not None:
                tunnel.pump.abort(code)

    def describe(self) -> dict[str, Data]:
        """Numbers for people."""
        running = [tunnel.pump for tunnel in self._tunnels if tunnel.pump is not None]
        attached = self._attached.values()
        return {
            "open": len(running) + len(attached),
            "attached": len(attached),
            "being_set_up": self._reserved,
            "limit": self._limit,
            "sent_by_open": sum(p.sent for p in running) + sum(tunnel.counted_sent for tunnel in attached),
            "received_by_open": sum(p.received for p in running) + sum(tunnel.counted_received for tunnel in attached),
            "last_failure": self.last_failure,
        }

    def _note_ends(self, ends: Iterable[EndedStream]) -> None:
        for ended in ends:
            stream = ended.stream
            if stream.stream_id in self._over:
                continue  # it was told before
            tunnel = self._take(stream.stream_id)
            if tunnel is None:  # over before it was told of
                tunnel = Tunnel(stream.peer, stream.path, stream.since)
            result = PumpResult(Outcome(ended.outcome), ended.code, stream.sent, stream.received)
            self._ended_with(tunnel, result, ended.duration, ended.reason)
        self._measure()

    def _ended(self, tunnel: Tunnel, result: PumpResult) -> None:
        del self._tunnels[tunnel]
        self._measure()
        self._ended_with(tunnel, result, None)

    def _ended_with(self, tunnel: Tunnel, result: PumpResult, duration: float | None, reason: str = "") -> None:
        self._count_one(tunnel, result.sent, result.received)
        outcome = result.outcome.value
        words = outcome
        if result.outcome is not Outcome.FINISHED:
            words = f"{outcome}: {ResetCode.describe(result.code)}"
            meaning = None if result.outcome in _OURS else MEANINGS.get(result.code)
            if meaning and reason:
                meaning = f"{meaning}: {reason}"
            self.last_failure = f"{words} ({meaning})" if meaning else words
        if result.outcome is Outcome.STREAM_RESET:
            outcome = ResetCode.describe(result.code) if result.code in _KNOWN_CODES else outcome
        self._finished(outcome)
        self._report(tunnel, words, duration)
        if tunnel.outcome is not None:
            _tell_outcome(tunnel.outcome, words if words == Outcome.FINISHED.value else self.last_failure)

    def _measure(self) -> None:
        self._open.set(len(self._tunnels) + len(self._attached))

    def _finished(self, outcome: str) -> None:
        self._context.metrics.counter(
            "peerup_tunnels_ended_total", service=self._service, role=self._role, outcome=outcome
        ).inc()

    def _report(self, tunnel: Tunnel, outcome: str, duration: float | None = None) -> None:
        ended = TunnelEnded(
            peer=tunnel.peer,
            service=self._service,
            role=self._role,
            path=tunnel.path,
            sent=tunnel.counted_sent,
            received=tunnel.counted_received,
            duration=self._context.now() - tunnel.since if duration is None else duration,
            outcome=outcome,
        )
        self._gate.send(ended)

    def _count(self) -> None:
        for tunnel in self._tunnels:
            if tunnel.pump is not None:
                self._count_one(tunnel, tunnel.pump.sent, tunnel.pump.received)
        self._counting = bool(self._tunnels)
        if self._counting:
            self._reactor.call_later(COUNT_INTERVAL, self._count)

    def _count_one(self, tunnel: Tunnel, sent: int, received: int) -> None:
        self._sent.inc(sent - tunnel.counted_sent)
        self._received.inc(received - tunnel.counted_received)
        tunnel.counted_sent, tunnel.counted_received = sent, received


_KNOWN_CODES = frozenset(ResetCode)

# parts of struct tcp_info (linux/tcp.h)
_BYTES_RECEIVED = slice(128, 136)
_DATA_SEGMENTS_OUT = slice(156, 160)
_CLOSE_WAIT = 8


def _incarnation_of(stream_id: str) -> int:
    """Of the switchboard that gave the stream this id (`StreamAttached`)."""
    number = stream_id.partition("-")[0]
    return int(number) if number.isdecimal() else 0


def path_of(connection: ConnectionInfo) -> str:
    """How a peer is connected, in words for the audit log."""
    return f"{connection.path} {connection.transport} {connection.remote_address}"


def _tell_outcome(pipe: Descriptor, words: str) -> None:
    with contextlib.suppress(OSError):  # whoever wanted to know has left
        os.write(pipe.fileno(), words.encode())
    pipe.close()


def reset_on_close(sock: socket.socket) -> None:
    """From now on the end of all processes that hold this TCP socket, or of the socket, is a reset for its client."""
    with contextlib.suppress(OSError):  # not a TCP socket, or already broken
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)


def close_with_reset(sock: socket.socket) -> None:
    """Close a TCP socket so that its client sees a reset and not a clean end."""
    reset_on_close(sock)
    sock.close()


def is_tcp(sock: socket.socket) -> bool:
    """Whether the switchboard can carry its bytes."""
    return sock.family in (socket.AF_INET, socket.AF_INET6) and sock.type == socket.SOCK_STREAM


def is_untouched(sock: socket.socket) -> bool:
    """Whether nobody has read from or written to this accepted TCP socket yet, in whatever process."""
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        waiting = fcntl.ioctl(sock.fileno(), termios.FIONREAD, bytes(4))
    except OSError:
        return False
    if len(info) < _DATA_SEGMENTS_OUT.stop:
        return False  # a kernel that does not tell
    if any(info[_DATA_SEGMENTS_OUT]):
        return False
    received = int.from_bytes(info[_BYTES_RECEIVED], sys.byteorder)
    # the end of the stream counts as one byte here and as none there
    finished = info[0] == _CLOSE_WAIT
    return received - finished == int.from_bytes(waiting, sys.byteorder)
