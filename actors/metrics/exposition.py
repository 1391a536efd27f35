"""Samples of many actors as one Prometheus text, written by prometheus_client."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector, CollectorRegistry

from protocol.messages.system import Sample

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4

_NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
_LABEL = re.compile(r"(?!__)[a-zA-Z_][a-zA-Z0-9_]*")
_KINDS = frozenset({"counter", "gauge", "histogram"})

HELP = {
    "peerup_info": "Version of the running program; always 1.",
    "peerup_tree_readable": "Whether the top supervisor told its tree.",
    "peerup_actors": "Actors and supervisors in the tree.",
    "peerup_scrape_seconds": "How long gathering these series took.",
    "peerup_actor_up": "Whether the actor is running.",
    "peerup_actor_scraped": "Whether the actor told its own series in time.",
    "peerup_actor_restarts": "Restarts since the actor's supervisor started.",
    "peerup_actor_uptime_seconds": "Seconds since the actor became ready.",
    "peerup_actor_mailbox": "Messages waiting in the mailbox at the last heartbeat.",
    "peerup_actor_handled": "Messages handled by this incarnation.",
    "peerup_process_cpu_seconds": "CPU time of the actor's process, user and system.",
    "peerup_process_resident_memory_bytes": "Resident memory of the actor's process, shared pages included.",
    "peerup_process_open_fds": "Open descriptors of the actor's process.",
    "peerup_messages_not_allowed": "Messages refused because their sender may not send that kind.",
    "peerup_checkpoints_refused": "Checkpoints that were over a bound or came from somebody else.",
    "peerup_reports_lost": "Reports to another actor that were given up: too many waited, or it did not take them.",
    "peerup_auth_decisions": "Decisions about connections and streams, by rule.",
    "peerup_audit_events_lost": "Audit events that could not be written.",
    "peerup_authorized_keys_problems": "Problems in authorized_keys.",
    "peerup_authorized_peers": "Peers in the policy.",
    "peerup_policy_version": "Version of the policy in force.",
    "peerup_config_problems": "Problems in the configuration file; above 0 only what it takes away counts.",
    "peerup_network_changes": "Changes of this machine's networks that were told to others.",
    "peerup_relays_configured": "Relays where this node keeps reservations.",
    "peerup_relay_reservations_held": "Reservations in force.",
    "peerup_relay_attempts": "Attempts to get, renew or keep a reservation, by outcome.",
    "peerup_relay_rtt_seconds": "Round trip to a relay, as last measured.",
    "peerup_signatures": "Signatures made with the identity key.",
    "peerup_signatures_refused": "Requests that the keyring refused.",
}
"""By name of the family, which for a counter is without `_total`. What is not here has its name as help."""


class Exposition(Collector):
    """Collects samples, then writes them grouped by name, as the format demands.

    Attributes:
        left_out: why samples could not be shown: names or labels that the format forbids, one name with two kinds.
    """

    def __init__(self) -> None:
        self.left_out: list[str] = []
        self._families: dict[str, Metric] = {}

    def add(self, actor: str, samples: Iterable[Sample]) -> None:
        """Add samples of this actor; of the node as a whole if the name is empty."""
        for sample in samples:
            self._add(actor, sample)

    def render(self) -> bytes:
        """The text."""
        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        text: bytes = generate_latest(registry)
        return text

    def collect(self) -> Iterator[Metric]:
        """Called by prometheus_client."""
        yield from self._families.values()

    def describe(self) -> list[Metric]:
        """Called by prometheus_client at registration, which need not know the names."""
        return []

    def _add(self, actor: str, sample: Sample) -> None:
        well_formed = _NAME.fullmatch(sample.name) and all(map(_LABEL.fullmatch, sample.labels))
        if not well_formed or sample.kind not in _KINDS:
            self.left_out.append(f"{actor}: {sample.name!r} of kind {sample.kind!r}")
            return
        name = sample.name.removesuffix("_total") if sample.kind == "counter" else sample.name
        family = self._families.get(name)
        if family is None:
            family = self._families[name] = Metric(name, HELP.get(name, name), sample.kind)
        elif family.type != sample.kind:
            self.left_out.append(f"{actor}: {sample.name} is a {sample.kind}, elsewhere a {family.type}")
            return
        labels = dict(sample.labels)
        if actor:
            if "actor" in labels:
                labels["exported_actor"] = labels.pop("actor")
            labels["actor"] = actor
        if sample.kind == "histogram":
            for bound, count in sample.buckets:
                family.add_sample(f"{name}_bucket", {**labels, "le": f"{bound:g}"}, count)
            family.add_sample(f"{name}_bucket", {**labels, "le": "+Inf"}, sample.count)
            family.add_sample(f"{name}_count", labels, sample.count)
            family.add_sample(f"{name}_sum", labels, sample.value)
        else:
            family.add_sample(f"{name}_total" if sample.kind == "counter" else name, labels, sample.value)
