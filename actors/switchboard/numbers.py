"""What the switchboard counts."""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Mapping

from actors.switchboard.connections import Connection, ConnectionTable
from protocol.peer_id import PeerId
from supervisor.actor import Metrics

MAX_PEERS = 64
"""Peers with time series of their own; further ones are counted together as `other`."""
DIAL_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class Numbers:
    """The switchboard's time series."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._dial_seconds = metrics.histogram("peerup_dial_seconds", DIAL_SECONDS)
        self._labels: dict[PeerId, str] = {}
        self._shown: set[tuple[str, str]] = set()

    def handshake_refused(self, reason: str) -> None:
        """A caller did not get in."""
        self._metrics.counter("peerup_handshakes_refused_total", reason=reason).inc()

    def dial(self, outcome: str, seconds: float | None = None) -> None:
        """An attempt at one address is over."""
        self._metrics.counter("peerup_dials_total", outcome=outcome).inc()
        if seconds is not None:
            self._dial_seconds.observe(seconds)

    def stream(self, direction: str, outcome: str) -> None:
        """A stream was opened and handed over, or was not."""
        self._metrics.counter("peerup_stream_openings_total", direction=direction, outcome=outcome).inc()

    def connection_opened(self, connection: Connection) -> None:
        """A connection came up."""
        self._metrics.counter("peerup_connections_opened_total", direction=connection.direction).inc()

    def connection_closed(self, connection: Connection, code: str) -> None:
        """A connection ended."""
        self._metrics.counter("peerup_connections_closed_total", reason=code).inc()

    def measure(self, table: ConnectionTable, names: Mapping[PeerId, str]) -> None:
        """Bring the gauges of connections and streams by peer and path up to date."""
        connections: Tally[tuple[str, str]] = Tally()
        streams: Tally[tuple[str, str]] = Tally()
        for connection in table:
            key = (self._label(connection.peer, names), connection.via.path)
            connections[key] += 1
            streams[key] += connection.link.streams
        for peer, path in self._shown | connections.keys():
            self._metrics.gauge("peerup_connections", peer=peer, path=path).set(connections[peer, path])
            self._metrics.gauge("peerup_streams", peer=peer, path=path).set(streams[peer, path])
        self._shown |= connections.keys()

    def _label(self, peer: PeerId, names: Mapping[PeerId, str]) -> str:
        label = self._labels.get(peer)
        if label is None:
            if len(self._labels) >= MAX_PEERS:
                return "other"
            label = self._labels[peer] = names.get(peer) or peer.short
        return label
