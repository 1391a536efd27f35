"""The actor runtime's measurements in the form of the others: medians of one pass, and the floor beside them."""

from __future__ import annotations

import statistics

from bench import runtime_processes
from protocol.messages.system import Strategy

FLOOR = "bare socket"
"""The reference: two bare processes that pass a packet to and fro over the same kind of socket."""


def quantile(samples: list[float], q: float) -> float:
    """The sample below which a part `q` of them lies."""
    ordered = sorted(samples)
    return ordered[min(len(ordered) - 1, int(len(ordered) * q))]


def measure() -> tuple[dict[str, float], dict[str, float]]:
    """One pass: our values, and those of the floor."""
    found = runtime_processes.measure()

    def samples(name: str) -> list[float]:
        return found[name][1]

    ours = {
        "runtime_round_trip_p50": statistics.median(samples("trio_round_trip")) * 1e6,
        "runtime_round_trip_p99": quantile(samples("trio_round_trip"), 0.99) * 1e6,
        "runtime_messages": statistics.median(samples("one_way")),
        "runtime_spawn": statistics.median(samples("spawn")) * 1e3,
    }
    for strategy in Strategy:
        times = samples(f"kill_to_answer_{strategy.value}")
        ours[f"runtime_kill_to_answer_{strategy.value}"] = statistics.median(times) * 1e3
    floor = {
        "runtime_round_trip_p50": statistics.median(samples("floor_round_trip")) * 1e6,
        "runtime_round_trip_p99": quantile(samples("floor_round_trip"), 0.99) * 1e6,
    }
    return ours, floor
