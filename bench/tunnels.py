"""What is measured of a tunnel, the same for peerup and for each reference."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from bench.load import Load
from bench.references import Tunnel
from tests.support.processes import PROC, cpu_seconds, pss_bytes, tree

Values = dict[str, float]
MIB = 1024 * 1024


@dataclasses.dataclass(frozen=True)
class Scale:
    """How much of everything: `FULL` for results to keep, `QUICK` to see that it works."""

    bulk_bytes: int
    bulk_seconds: float
    echo_rounds: int
    connects: int
    idle_connections: int
    busy_connections: int
    busy_seconds: float
    idle_settle: float
    idle_seconds: float


FULL = Scale(
    bulk_bytes=1_000_000_000,
    bulk_seconds=4.0,
    echo_rounds=2000,
    connects=200,
    idle_connections=1000,
    busy_connections=200,
    busy_seconds=3.0,
    idle_settle=5.0,
    idle_seconds=20.0,
)
QUICK = Scale(
    bulk_bytes=200_000_000,
    bulk_seconds=1.0,
    echo_rounds=300,
    connects=40,
    idle_connections=200,
    busy_connections=50,
    busy_seconds=1.0,
    idle_settle=1.0,
    idle_seconds=2.0,
)

PROBE = 16_000_000
"""Bytes moved first to see how fast a tunnel is, so that a slow one does not take minutes over the full size."""

BUSY_SIZE = 4096
"""Bytes of each question and answer of a busy connection: an interactive service, not a bulk transfer."""


@dataclasses.dataclass(frozen=True)
class Group:
    """Values that are taken together.

    Attributes:
        values: their names, as in the results.
        run: takes them.
    """

    values: tuple[str, ...]
    run: Callable[[Load, Tunnel, Scale], Values]


def bulk(streams: int, direction: str) -> Group:
    """Megabytes per second, and the CPU seconds of all tunnel processes for each gigabyte."""
    name = f"{streams}_stream{'s' if streams > 1 else ''}_{direction}"
    rate, cost = f"bulk_{name}", f"cpu_{name}"

    def run(load: Load, tunnel: Tunnel, scale: Scale) -> Values:
        probe = load.bulk(tunnel.port, PROBE, streams=streams, direction=direction)
        size = min(scale.bulk_bytes, int(PROBE / probe.seconds * scale.bulk_seconds))
        before = cpu_seconds(*tunnel.roots)
        moved = load.bulk(tunnel.port, max(size, PROBE), streams=streams, direction=direction)
        used = cpu_seconds(*tunnel.roots) - before
        return {rate: moved.megabytes_per_second, cost: used / (moved.bytes / 1e9)}

    return Group((rate, cost), run)


def round_trip(load: Load, tunnel: Tunnel, scale: Scale) -> Values:
    times = load.echo(tunnel.port, scale.echo_rounds)
    return {"round_trip_p50": times.p50 * 1e6, "round_trip_p99": times.p99 * 1e6}


def new_connection(load: Load, tunnel: Tunnel, scale: Scale) -> Values:
    times = load.connect(tunnel.port, scale.connects)
    return {"new_connection_p50": times.p50 * 1e3, "new_connection_p99": times.p99 * 1e3}


def idle_connections(load: Load, tunnel: Tunnel, scale: Scale) -> Values:
    """Memory of each, as PSS of all tunnel processes with them less that without, and the time to open one."""
    before = _pss(tunnel)
    with load.hold(tunnel.port, scale.idle_connections) as seconds:
        grown = _pss(tunnel) - before
    count = scale.idle_connections
    return {"idle_connection_memory": grown / 1024 / count, "idle_connection_open": seconds / count * 1e3}


def busy_connections(load: Load, tunnel: Tunnel, scale: Scale) -> Values:
    answer = load.busy(tunnel.port, scale.busy_connections, seconds=scale.busy_seconds, size=BUSY_SIZE)
    return {
        "busy_round_trips": answer.round_trips / answer.seconds,
        "busy_fairness": answer.jain,
        "busy_worst": answer.worst * 1e3,
        "busy_failures": answer.failures,
    }


def idle_tunnel(_load: Load, tunnel: Tunnel, scale: Scale) -> Values:
    """What a tunnel costs when nobody uses it: from a few seconds after its start, when that has come to rest."""
    time.sleep(scale.idle_settle)
    before, began = _cpu_nanoseconds(tunnel), time.monotonic()
    time.sleep(scale.idle_seconds)
    used, elapsed = _cpu_nanoseconds(tunnel) - before, time.monotonic() - began
    return {"idle_memory": _pss(tunnel) / MIB, "idle_cpu": used / 1e9 / elapsed * 100}


GROUPS: tuple[Group, ...] = (
    # First, while nothing has grown by use.
    Group(("idle_memory", "idle_cpu"), idle_tunnel),
    Group(("round_trip_p50", "round_trip_p99"), round_trip),
    Group(("new_connection_p50", "new_connection_p99"), new_connection),
    bulk(1, "up"),
    bulk(1, "down"),
    bulk(8, "up"),
    bulk(8, "down"),
    Group(("busy_round_trips", "busy_fairness", "busy_worst", "busy_failures"), busy_connections),
    Group(("idle_connection_memory", "idle_connection_open"), idle_connections),
)


def _pids(tunnel: Tunnel) -> Iterable[int]:
    return [process.pid for process in tree(*tunnel.roots)]


def _pss(tunnel: Tunnel) -> int:
    return pss_bytes(_pids(tunnel))


def _cpu_nanoseconds(tunnel: Tunnel) -> int:
    """Time on a CPU of every thread; finer than the clock ticks of /proc/PID/stat, but without children that ended."""
    total = 0
    for pid in _pids(tunnel):
        for task in Path(PROC / str(pid) / "task").glob("*/schedstat"):
            try:
                total += int(task.read_text().split()[0])
            except (FileNotFoundError, ProcessLookupError):
                continue
    return total
