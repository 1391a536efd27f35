"""The running tunnels of a proxy actor: how many there may be, what they carried, how each one ended.

This is the same on both sides of a tunnel. Bytes are counted here and nowhere else in the node. What is below the
stream (a plain one, a durable one) is not known here: a stream is a descriptor.
"""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import struct

from actors.pump import Outcome, Pump, PumpResult
from actors.reactor import Reactor
from protocol.messages import Data
from protocol.messages.gate import TunnelEnded
from protocol.messages.switchboard import ConnectionInfo
from protocol.peer_id import PeerId
from protocol.stream_descriptor import ResetCode, reset_message
from supervisor.actor import Context

MAX_TUNNELS = 2048
"""Concurrent tunnels of one actor. Each takes two descriptors here; the limit of a process is usually higher."""
COUNT_INTERVAL = 2.0
"""Seconds between additions to the byte counters while tunnels run."""
GATE = "gate"

MEANINGS: dict[int, str] = {
    ResetCode.NEGOTIATION_FAILED: "the peer no longer offers the service to this node",
    ResetCode.GATED: "the peer's policy no longer allows it",
    ResetCode.LIMIT_EXCEEDED: "the peer serves as many connections as it may",
    ResetCode.SHUTDOWN: "the other node, or the actor that served the connection, was stopped",
    ResetCode.LOST: "a process that carried the connection ended",
    ResetCode.CONNECTION_LOST: "the connection to the peer ended",
    ResetCode.SERVICE_UNREACHABLE: "the service does not accept connections on the peer's side",
    ResetCode.SERVICE_UNAVAILABLE: "the peer's actor for the service is being restarted",
}
"""What a reset by the far side means, for people."""

_NO_LINGER = struct.pack("ii", 1, 0)


@dataclasses.dataclass(eq=False)
class Tunnel:
    """One tunnelled connection."""

    peer: PeerId
    path: str
    since: float
    pump: Pump | None = None
    counted_sent: int = 0
    counted_received: int = 0


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
        self._service = service
        self._role = role
        self._limit = limit
        self._tunnels: dict[Tunnel, None] = {}
        self._reserved = 0
        self._counting = False
        self.last_failure = ""
        metrics = context.metrics
        self._sent = metrics.counter("peerup_tunnel_bytes_total", service=service, role=role, direction="sent")
        self._received = metrics.counter("peerup_tunnel_bytes_total", service=service, role=role, direction="received")
        self._open = metrics.gauge("peerup_tunnels", service=service, role=role)

    @property
    def count(self) -> int:
        """Tunnels that run or are being set up."""
        return len(self._tunnels) + self._reserved

    def reserve(self) -> bool:
        """Count in a tunnel that is being set up, if there is room for it. Follow with `run` or `failed`."""
        if self.count >= self._limit:
            return False
        self._reserved += 1
        return True

    def run(self, local: socket.socket, stream: socket.socket, peer: PeerId, path: str) -> None:
        """Carry bytes between the two sockets, which are taken over, until both directions are done."""
        self._reserved -= 1
        tunnel = Tunnel(peer, path, self._context.now())
        self._tunnels[tunnel] = None
        self._open.set(len(self._tunnels))
        tunnel.pump = Pump(self._reactor, local, stream, lambda result: self._ended(tunnel, result))
        if not self._counting:
            self._counting = True
            self._reactor.call_later(COUNT_INTERVAL, self._count)

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
        """Reset all tunnels."""
        for tunnel in list(self._tunnels):
            if tunnel.pump is not None:
                tunnel.pump.abort(code)

    def describe(self) -> dict[str, Data]:
        """Numbers for people."""
        running = [tunnel for tunnel in self._tunnels if tunnel.pump is not None]
        return {
            "open": len(running),
            "being_set_up": self._reserved,
            "limit": self._limit,
            "sent_by_open": sum(tunnel.pump.sent for tunnel in running if tunnel.pump),
            "received_by_open": sum(tunnel.pump.received for tunnel in running if tunnel.pump),
            "last_failure": self.last_failure,
        }

    def _ended(self, tunnel: Tunnel, result: PumpResult) -> None:
        self._count_one(tunnel, result.sent, result.received)
        del self._tunnels[tunnel]
        self._open.set(len(self._tunnels))
        outcome = result.outcome.value
        words = outcome
        if result.outcome is not Outcome.FINISHED:
            words = f"{outcome}: {ResetCode.describe(result.code)}"
            meaning = MEANINGS.get(result.code) if result.outcome is Outcome.STREAM_RESET else None
            self.last_failure = f"{words} ({meaning})" if meaning else words
        if result.outcome is Outcome.STREAM_RESET:
            outcome = ResetCode.describe(result.code) if result.code in _KNOWN_CODES else outcome
        self._finished(outcome)
        self._report(tunnel, words)

    def _finished(self, outcome: str) -> None:
        self._context.metrics.counter(
            "peerup_tunnels_ended_total", service=self._service, role=self._role, outcome=outcome
        ).inc()

    def _report(self, tunnel: Tunnel, outcome: str) -> None:
        ended = TunnelEnded(
            peer=tunnel.peer,
            service=self._service,
            role=self._role,
            path=tunnel.path,
            sent=tunnel.counted_sent,
            received=tunnel.counted_received,
            duration=self._context.now() - tunnel.since,
            outcome=outcome,
        )
        self._context.tell(GATE, ended)

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


def path_of(connection: ConnectionInfo) -> str:
    """How a peer is connected, in words for the audit log."""
    return f"{connection.path} {connection.transport} {connection.remote_address}"


def close_with_reset(sock: socket.socket) -> None:
    """Close a TCP socket so that its client sees a reset and not a clean end."""
    with contextlib.suppress(OSError):  # not a TCP socket, or already broken: closing is all that can be done
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
    sock.close()


def reset_stream(stream: socket.socket, code: ResetCode) -> None:
    """Reset a stream that was handed to us, with the reason, and close it."""
    with contextlib.suppress(OSError):  # the switchboard is gone: the close says it
        stream.send(reset_message(code))
    stream.close()
