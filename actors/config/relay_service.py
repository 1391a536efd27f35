"""The section `relay_service` of the configuration: whether this node serves as a relay, and what it grants.

Its defaults are for a small server that relays for its owner's devices: those are not cut after any time or number of
bytes, and all else is limited so that one device gone wrong does not take everything. Each limit can be `unlimited`.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Final

from actors.config.addresses import why_undialable
from actors.config.reader import SectionReader, parse_duration
from protocol.circuit.messages import MAX_DURATION
from protocol.errors import InvalidValueError
from protocol.messages.relay import CircuitLimit, RelayRules, ScopedLimit
from protocol.multiaddr import Multiaddr
from protocol.reservations import MAX_TTL, MIN_TTL

UNLIMITED: Final = "unlimited"

RESERVATIONS: Final = ScopedLimit(None, 64, 128, 1024)
CIRCUITS: Final = ScopedLimit(64, 128, 256, 512)
BYTES_PER_SECOND: Final = ScopedLimit(None, None, None, None)
REQUESTS_PER_MINUTE: Final = ScopedLimit(120, 600, 1200, 6000)
CIRCUIT: Final = CircuitLimit(None, None)
GUEST_CIRCUIT: Final = CircuitLimit(120, 128 * 1024)

MAX_DRAIN_TIME: Final = 3600.0
"""The longest time for open circuits when a relay stops, in seconds."""

MAX_ANNOUNCED: Final = 16
"""Addresses of a relay: no more fit into what clients take from a reservation."""

_WHY_TTL: Final = ": in less, devices lose their places before they can renew them"
_MOST: Final = 2**53
_SIZE: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?(B|kB|KB|MB|GB|TB|KiB|MiB|GiB|TiB)")
_FACTORS: Final = {
    "B": 1,
    "kB": 10**3,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}


@dataclasses.dataclass(frozen=True)
class RelayServiceConfig:
    """See `actors/config/template.py` for what each key means. Times are in seconds; None is unlimited."""

    enabled: bool = False
    announce_addresses: tuple[Multiaddr, ...] = ()
    drain_time: float = 30.0
    reservation_ttl: float = 3600.0
    reservations: ScopedLimit = RESERVATIONS
    circuits: ScopedLimit = CIRCUITS
    bytes_per_second: ScopedLimit = BYTES_PER_SECOND
    requests_per_minute: ScopedLimit = REQUESTS_PER_MINUTE
    circuit: CircuitLimit = CIRCUIT
    guest_circuit: CircuitLimit = GUEST_CIRCUIT

    @property
    def rules(self) -> RelayRules:
        """What the relay grants."""
        return RelayRules(
            self.reservations,
            self.circuits,
            self.bytes_per_second,
            self.requests_per_minute,
            int(self.reservation_ttl),
            self.circuit,
            self.guest_circuit,
        )


def parse_size(text: str) -> int:
    """Bytes in a size such as `128KiB`, `1.5GB`, `4096B`.

    Raises:
        InvalidValueError: not such a size.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise InvalidValueError(f"{text!r} is not a size such as 128KiB, 64MB or 2GiB")
    return int(float(match[1]) * _FACTORS[match[2]])


def read_relay_service(reader: SectionReader) -> RelayServiceConfig:
    """The section that this reader stands for."""
    default = RelayServiceConfig()
    made = RelayServiceConfig(
        enabled=reader.boolean("enabled", default=default.enabled),
        announce_addresses=reader.items("announce_addresses", _announced) or (),
        drain_time=_duration(reader, "drain_time", default.drain_time, (1, MAX_DRAIN_TIME)),
        reservation_ttl=_duration(reader, "reservation_ttl", default.reservation_ttl, (MIN_TTL, MAX_TTL), _WHY_TTL),
        reservations=_scoped(reader.section("reservations"), default.reservations),
        circuits=_scoped(reader.section("circuits"), default.circuits),
        bytes_per_second=_scoped(reader.section("bytes_per_second"), default.bytes_per_second),
        requests_per_minute=_scoped(reader.section("requests_per_minute"), default.requests_per_minute),
        circuit=_circuit(reader.section("circuit"), default.circuit),
        guest_circuit=_circuit(reader.section("guest_circuit"), default.guest_circuit),
    )
    for address in made.announce_addresses:
        if why := why_undialable(address):
            reader.warn("announce_addresses", f"{address} is of no use to clients: it {why}")
    if len(made.announce_addresses) > MAX_ANNOUNCED:
        reader.problem("announce_addresses", f"are more than {MAX_ANNOUNCED}, which is what clients can be told")
    if (made.reservations.per_peer or 0) > 1:
        reader.warn("reservations", "per_peer has no effect above 1: a peer has at most one reservation")
    reader.finish()
    return made


def _announced(text: str) -> Multiaddr:
    address = Multiaddr(text)
    if address.is_relayed:
        raise InvalidValueError(f"{text} leads through another relay; a relay must be reachable by itself")
    if address.endpoint is None and not any(part.name.startswith("dns") for part in address.components):
        raise InvalidValueError(f"{text} has no port to connect to; write it like /ip4/192.0.2.7/tcp/4101")
    return address


def _duration(reader: SectionReader, key: str, default: float, bounds: tuple[float, float], why: str = "") -> float:
    least, most = bounds
    seconds = reader.duration(key, default)
    if not least <= seconds <= most:
        reader.problem(key, f"must be from {least:.0f}s to {most:.0f}s{why}")
        return default
    return seconds


def _scoped(reader: SectionReader, default: ScopedLimit) -> ScopedLimit:
    made = ScopedLimit(
        *(
            reader.limit(field.name, getattr(default, field.name), most=_MOST, parse=parse_size)
            for field in dataclasses.fields(ScopedLimit)
        )
    )
    reader.finish()
    return made


def _circuit(reader: SectionReader, default: CircuitLimit) -> CircuitLimit:
    made = CircuitLimit(
        reader.limit("duration", default.seconds, least=1, most=MAX_DURATION, parse=lambda t: int(parse_duration(t))),
        reader.limit("data", default.data, least=1, most=_MOST, parse=parse_size),
    )
    reader.finish()
    return made
