"""What differs between two configurations, in words."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from actors.config.relay_service import RelayServiceConfig
from actors.config.schema import NodeConfig
from protocol.messages.config import ConfigSnapshot

_NOT_LIVE_AT_RELAYS = {"enabled", "drain_time"}

LIVE = frozenset(
    {
        "security.enable_connection_gating",
        "network.silence_timeout",
        "relay.addresses",
        *(
            f"relay_service.{field.name}"
            for field in dataclasses.fields(RelayServiceConfig)
            if field.name not in _NOT_LIVE_AT_RELAYS
        ),
    }
)
"""Keys outside of services, names and addresses that take effect at once."""

_LATER = " (takes effect when the node is started again)"


def describe_changes(old: NodeConfig, new: NodeConfig) -> tuple[str, ...]:
    """One line for each difference, with a note where it does not take effect at once."""
    lines = [
        *_entries(
            "services", {entry.name: entry for entry in old.services}, {entry.name: entry for entry in new.services}
        ),
        *_entries("names", {entry.name: entry for entry in old.names}, {entry.name: entry for entry in new.names}),
        *_entries(
            "addresses",
            {str(entry.peer): entry for entry in old.addresses},
            {str(entry.peer): entry for entry in new.addresses},
        ),
    ]
    for key, before, after in _scalars(old, new):
        if before != after:
            lines.append(f"{key} changed{'' if key in LIVE else _LATER}")
    return tuple(lines)


def describe_narrowing(before: ConfigSnapshot, after: ConfigSnapshot) -> tuple[str, ...]:
    """One line for each thing that one configuration grants and the other, narrower one does not."""
    lines = []
    services = {service.name: service for service in after.services}
    for old in before.services:
        new = services.get(old.name)
        if old.enabled and (new is None or not new.enabled):
            lines.append(f"services.{old.name} is not offered")
        elif new is not None and new.allowed_peers != old.allowed_peers:
            lines.append(f"services.{old.name} is for fewer peers")
    lines.extend(f"relay {address} is not used" for address in before.relays if address not in after.relays)
    if after.gating and not before.gating:
        lines.append("connection gating is on")
    if before.relay_service != after.relay_service:
        lines.append("limits of relay_service are lower")
    return tuple(lines)


def not_live(config: NodeConfig) -> dict[str, str]:
    """What counts as it was when the node was started, by key, in a form to be compared."""
    return {key: str(value) for key, value, _ in _scalars(config, config) if key not in LIVE}


def _entries(section: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterable[str]:
    for name in sorted(old.keys() | new.keys()):
        if name not in new:
            yield f"{section}.{name} removed"
        elif name not in old:
            yield f"{section}.{name} added"
        elif old[name] != new[name]:
            yield f"{section}.{name} changed"


def _scalars(old: NodeConfig, new: NodeConfig) -> Iterable[tuple[str, Any, Any]]:
    yield "identity.key_file", old.key_file, new.key_file
    for section in ("network", "relay", "relay_service", "discovery", "security", "ping", "telemetry", "log", "limits"):
        before, after = getattr(old, section), getattr(new, section)
        for field in dataclasses.fields(before):
            yield f"{section}.{field.name}", getattr(before, field.name), getattr(after, field.name)
