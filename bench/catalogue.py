"""Every value that the benchmarks give: its unit, which way is better, what it is compared with, what must hold."""

from __future__ import annotations

import dataclasses
from typing import Literal

from bench.relay import DIRECT
from bench.runtime import FLOOR

Better = Literal["higher", "lower", "neither"]


@dataclasses.dataclass(frozen=True)
class Value:
    """One row of the results.

    Attributes:
        reference: what the ratio is taken to; empty where there is nothing to compare with.
        at_least, at_most: bounds of the ratio that must hold.
        limit: bound of our own value, in its unit, that must hold.
    """

    name: str
    unit: str
    better: Better
    meaning: str
    reference: str = "ssh"
    at_least: float | None = None
    at_most: float | None = None
    limit: float | None = None


CATALOGUE: tuple[Value, ...] = (
    Value("bulk_1_stream_up", "MB/s", "higher", "one stream, client to server", at_least=1.0),
    Value("bulk_1_stream_down", "MB/s", "higher", "one stream, server to client", at_least=1.0),
    Value("bulk_8_streams_up", "MB/s", "higher", "eight streams at once, client to server", at_least=1.0),
    Value("bulk_8_streams_down", "MB/s", "higher", "eight streams at once, server to client", at_least=1.0),
    Value("cpu_1_stream_up", "s/GB", "lower", "CPU of all tunnel processes, one stream up"),
    Value("cpu_1_stream_down", "s/GB", "lower", "CPU of all tunnel processes, one stream down"),
    Value("cpu_8_streams_up", "s/GB", "lower", "CPU of all tunnel processes, eight streams up"),
    Value("cpu_8_streams_down", "s/GB", "lower", "CPU of all tunnel processes, eight streams down"),
    Value("round_trip_p50", "µs", "lower", "one byte there and back, median", at_most=4.0),
    Value("round_trip_p99", "µs", "lower", "one byte there and back, 99th percentile", at_most=4.0),
    Value("new_connection_p50", "ms", "lower", "connect to first byte back, median", at_most=4.0),
    Value("new_connection_p99", "ms", "lower", "connect to first byte back, 99th percentile"),
    Value("cold_start", "ms", "lower", "first process started to first byte back"),
    Value("node_ready", "ms", "lower", "a node's start to `ready`", reference="", limit=2000.0),
    Value("idle_connection_memory", "KiB", "lower", "memory of each of 1,000 idle connections"),
    Value("idle_connection_open", "ms", "lower", "time to open each of 1,000 connections"),
    Value("busy_round_trips", "1/s", "higher", "200 busy connections: round trips of 4 KiB, all together"),
    Value("busy_fairness", "", "higher", "200 busy connections: Jain's index, 1 is perfectly fair"),
    Value("busy_worst", "ms", "lower", "200 busy connections: the longest round trip"),
    Value("busy_failures", "", "lower", "200 busy connections: how many broke", limit=0.0),
    Value("idle_memory", "MiB", "lower", "PSS of the whole idle tunnel (peerup: two nodes)"),
    Value("idle_cpu", "%", "lower", "CPU of the whole idle tunnel (peerup: two nodes), of one core"),
    Value("idle_node_memory", "MiB", "lower", "PSS of one idle node", reference="", limit=120.0),
    Value("idle_node_cpu", "%", "lower", "CPU of one idle node, of one core", reference="", limit=0.5),
    Value("idle_node_at_relay_memory", "MiB", "lower", "PSS of one with a service and a place at a relay", ""),
    Value("idle_node_at_relay_cpu", "%", "lower", "CPU of such a node, of one core", "", limit=0.5),
    Value("relayed_bulk_up", "MB/s", "higher", "one stream through a relay, client to server", DIRECT, at_least=0.6),
    Value("relayed_bulk_down", "MB/s", "higher", "one stream through a relay, server to client", DIRECT, at_least=0.6),
    Value("relayed_round_trip_p50", "µs", "lower", "one byte there and back through a relay, median", DIRECT),
    Value("relay_cpu_up", "s/GB", "lower", "CPU of the relay for that, up", reference=""),
    Value("relay_cpu_down", "s/GB", "lower", "CPU of the relay for that, down", reference=""),
    Value("relay_reservation_failures", "", "lower", "500 reservations: not granted, or lost", reference="", limit=0.0),
    Value("relay_reservation_memory", "KiB", "lower", "memory of each of them, with its connection", reference=""),
    Value("relay_circuit_failures", "", "lower", "200 busy circuits on one core: not opened, or broken", "", limit=0.0),
    Value("relay_circuit_memory", "KiB", "lower", "memory of each of them", reference=""),
    Value("relay_circuit_round_trips", "1/s", "higher", "round trips of 4 KiB on them, all together", reference=""),
    Value("relay_circuit_fairness", "", "higher", "Jain's index of them, 1 is perfectly fair", reference=""),
    Value("relay_circuit_worst", "ms", "lower", "the longest round trip of them", reference=""),
    Value("relay_circuit_cpu", "%", "lower", "CPU of the relay meanwhile, of one core", reference=""),
    Value("runtime_round_trip_p50", "µs", "lower", "message to an actor and its answer, median", FLOOR),
    Value("runtime_round_trip_p99", "µs", "lower", "message to an actor and its answer, 99th percentile", FLOOR),
    Value("runtime_messages", "1/s", "higher", "messages to one actor, one way", reference=""),
    Value("runtime_spawn", "ms", "lower", "asking for an actor until it is ready", reference=""),
    Value("runtime_kill_to_answer_one_for_one", "ms", "lower", "SIGKILL until it answers again", reference=""),
    Value("runtime_kill_to_answer_rest_for_one", "ms", "lower", "the same, with those after it", reference=""),
    Value("runtime_kill_to_answer_one_for_all", "ms", "lower", "the same, with all its siblings", reference=""),
)
