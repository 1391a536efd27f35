"""A peer-up relay's `relay-server.yaml`: what it says, in the words of our own configuration.

What has a counterpart is taken over, value for value: a relay that was told to cut circuits after ten minutes goes on
to do so. What has none is named, with its line, so that nobody believes it to be in force. Three things differ in what
they mean, and are put so that nobody is let in who should not be, and nobody is cut off for a default:

- peer-up takes a missing `enable_connection_gating` for "let everybody in". Here it is on unless the file says false.
- peer-up takes 0, or nothing, for its own default. Here that is our default.
- peer-up looks for its files in the directory that it happens to be started in. Here it is that of the file.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from actors.config.reader import Problem, SectionReader
from actors.config.schema import ConfigError, is_served
from protocol.errors import InvalidValueError
from protocol.multiaddr import Multiaddr

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(B|KB|MB|GB)?", re.IGNORECASE)
_UNITS = {"B": 1, "KB": 1024, "MB": 1024**2, "GB": 1024**3}

_COUNTS = {
    "max_reservations": ("reservations", "total"),
    "max_circuits": ("circuits", "per_peer"),
    "max_reservations_per_ip": ("reservations", "per_ip"),
    "max_reservations_per_asn": ("reservations", "per_network"),
}
"""peer-up's numbers, and the limits of ours that mean the same."""

_OWN_KEYS = frozenset({"resources", "health"})
"""Sections that only peer-up's relay has."""


@dataclasses.dataclass(frozen=True)
class PeerUpRelay:
    """What a `relay-server.yaml` says.

    Attributes:
        listen_addresses: where the relay listens.
        key_file, authorized_keys_file: where these are.
        gating: whether only listed peers may use it.
        limits: pairs of the path of a limit of ours, below `relay_service`, and its value.
        metrics: where metrics were served; None if they were not.
        audit: whether there was an audit log.
        network: the name of the private network, if any.
        notes: what is not taken over, or means something else here.
    """

    listen_addresses: tuple[Multiaddr, ...]
    key_file: Path
    authorized_keys_file: Path
    gating: bool
    limits: tuple[tuple[tuple[str, ...], int | str], ...]
    metrics: str | None
    audit: bool
    network: str | None
    notes: tuple[Problem, ...]


def is_peer_up_relay(values: Any) -> bool:
    """Whether these parsed values are those of a peer-up relay rather than of a node of ours."""
    if not isinstance(values, dict) or "relay_service" in values:
        return False
    identity = values.get("identity")
    key = identity.get("key_file") if isinstance(identity, dict) else None
    return bool(_OWN_KEYS & set(values)) or key == "relay_node.key"


def read_peer_up_relay(values: Any, file: Path) -> PeerUpRelay:
    """What the parsed YAML of a `relay-server.yaml` says.

    Raises:
        ConfigError: with all that is wrong in it.
    """
    problems: list[Problem] = []
    notes: list[Problem] = []
    root = SectionReader(values, "", problems, notes)
    root.integer("version", 1, least=0, most=1)
    identity, network, security = root.section("identity"), root.section("network"), root.section("security")
    discovery, resources, health = root.section("discovery"), root.section("resources"), root.section("health")
    telemetry = root.section("telemetry")
    metrics, audit = telemetry.section("metrics"), telemetry.section("audit")
    key_file = identity.text("key_file", "relay_node.key")
    listen = network.items("listen_addresses", Multiaddr)
    served = tuple(filter(is_served, listen or ()))
    if not served:
        root.problem("network", "names no listen_addresses with an IP address and a TCP port")
    for address in listen or ():
        if address not in served:
            network.warn("listen_addresses", f"{address} is not taken over: only TCP and WebSocket are served")
    if "enable_connection_gating" not in security.keys():  # noqa: SIM118  # not a dict
        security.warn("enable_connection_gating", "is missing: peer-up then lets everybody in; here it is on")
    gating = security.boolean("enable_connection_gating", default=True)
    keys_file = security.text("authorized_keys_file", "relay_authorized_keys")
    limits = _limits(resources)
    if health.boolean("enabled", default=False):
        health.warn("enabled", "has no counterpart; ask `peerup status`, or let systemd watch")
    health.ignore("listen_address")
    found = PeerUpRelay(
        listen_addresses=served,
        key_file=file.parent / key_file,
        authorized_keys_file=file.parent / keys_file,
        gating=gating,
        limits=limits,
        metrics=metrics.text("listen_address", "127.0.0.1:9091") if metrics.boolean("enabled", default=False) else None,
        audit=audit.boolean("enabled", default=False),
        network=discovery.text("network", "") or None,
        notes=(),
    )
    metrics.ignore("listen_address")
    for section in (identity, network, security, discovery, resources, health, metrics, audit, telemetry, root):
        section.finish()
    if problems:
        raise ConfigError(file, tuple(sorted(problems, key=lambda problem: problem.line or 0)))
    return dataclasses.replace(found, notes=tuple(sorted(notes, key=lambda note: note.line or 0)))


def _limits(resources: SectionReader) -> tuple[tuple[tuple[str, ...], int | str], ...]:
    found: list[tuple[tuple[str, ...], int | str]] = []
    for key, path in _COUNTS.items():
        number = resources.integer(key, 0, least=0, most=2**31)
        if number:
            found.append((path, number))
    for key, span in (("reservation_ttl", ("reservation_ttl",)), ("session_duration", ("circuit", "duration"))):
        seconds = resources.duration(key, 0.0)
        if seconds:
            found.append((span, f"{seconds:.0f}s"))
    size = resources.parsed("session_data_limit", 0, _size) if _is_text(resources, "session_data_limit") else None
    if size is None:
        size = resources.integer("session_data_limit", 0, least=0, most=2**62)
    if size:
        found.append((("circuit", "data"), size))
    if any(path[0] == "circuit" for path, _ in found):
        resources.warn(
            "session_duration",
            "and session_data_limit are taken over: every circuit is cut there, also between your own devices; "
            "without them here is no such limit for listed peers",
        )
    if "buffer_size" in resources.keys():  # noqa: SIM118  # not a dict
        resources.warn("buffer_size", "has no counterpart: nothing is buffered for a reader that does not read")
        resources.ignore("buffer_size")
    return tuple(found)


def _is_text(reader: SectionReader, key: str) -> bool:
    return isinstance(reader.peek(key), str)


def _size(text: str) -> int:
    """Bytes in a size as peer-up writes it: `64MB`, `1GB`, `4096`; units are of 1024."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise InvalidValueError(f"{text!r} is not a size such as 64MB")
    return int(float(match[1]) * _UNITS[(match[2] or "B").upper()])
