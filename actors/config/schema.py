"""The node's configuration as types: peer-up's keys, which load as they are, and a few of our own.

:func:`read_config` takes the parsed YAML and gives a :class:`NodeConfig`, or raises :class:`ConfigError` with
every mistake found, each with its line, its key and what to do. Keys that nobody knows are no mistake; they are
listed in `NodeConfig.warnings`. Values of keys that have no effect yet (such as those of discovery) are checked like
all others, so that a configuration does not become invalid by an update of peerup.
"""

from __future__ import annotations

import contextlib
import dataclasses
import ipaddress
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final

from actors.config.addresses import unused_addresses, why_undialable
from actors.config.reader import Problem, SectionReader
from actors.config.relay_service import RelayServiceConfig, read_relay_service
from protocol.errors import InvalidValueError, PeerupError
from protocol.keeper import MAX_RELAYS
from protocol.messages.config import DEFAULT_SILENCE, UNIX, AddressEntry, NameEntry, ServiceEntry
from protocol.multiaddr import Multiaddr
from protocol.peer_id import PeerId
from protocol.protocol_ids import PINGPONG
from protocol.service import RESERVED_NAMES, ServiceAddress, ServiceName

LATEST_VERSION = 1
_NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
MAX_SOCKETS: Final = 16
"""Listening sockets: as many as are handed on to a successor of the process that has them."""
SHORTEST_SILENCE, LONGEST_SILENCE = 30.0, 24 * 3600.0
LOG_LEVELS = ("trace", "debug", "info", "warning", "error")
LOG_FORMATS = ("text", "json")
CONFINEMENTS = ("auto", "required", "disabled")


class ConfigError(PeerupError):
    """A configuration cannot be used.

    Attributes:
        file: which one.
        problems: everything that is wrong with it.
    """

    code = "bad-config"

    def __init__(self, file: Path, problems: tuple[Problem, ...]) -> None:
        super().__init__("\n".join(f"{file}: {problem}" for problem in problems))
        self.file = file
        self.problems = problems


@dataclasses.dataclass(frozen=True)
class TlsConfig:
    """Files in PEM form, as written; see :meth:`NodeConfig.path`. Empty: none.

    Attributes:
        certificate_file, key_file: the node's own, for listen addresses with `/tls/ws`.
        trusted_file: roots that are believed besides the system's when dialling such addresses.
    """

    certificate_file: str = ""
    key_file: str = ""
    trusted_file: str = ""


@dataclasses.dataclass(frozen=True)
class NetworkConfig:
    """Where the node listens; nowhere if there is no address: it dials, and is reached through relays.

    `listen_addresses` may hold transports that this version does not serve; `served_addresses` are the others.
    `silence_timeout` is how many seconds a connection may be silent before it is given up.
    """

    listen_addresses: tuple[Multiaddr, ...] = ()
    tls: TlsConfig = TlsConfig()
    silence_timeout: float = DEFAULT_SILENCE

    @property
    def served_addresses(self) -> tuple[Multiaddr, ...]:
        """Those of the addresses at which the node can listen."""
        return tuple(filter(is_served, self.listen_addresses))


def is_served(address: Multiaddr) -> bool:
    """Whether a node can listen there: at an IP address, for TCP, and WebSocket or WebSocket in TLS upon it."""
    endpoint = address.endpoint
    if endpoint is None or endpoint.kind not in ("ip4", "ip6") or address.is_relayed:
        return False
    return address.transport in ("tcp", "websocket")


def check_served(addresses: Iterable[Multiaddr]) -> None:
    """Refuse addresses for a new configuration at which its node could not listen.

    Raises:
        InvalidValueError: one of them is such an address.
    """
    for address in addresses:
        if not is_served(address):
            raise InvalidValueError(
                f"cannot listen on {address}: give an IP address with a TCP port, such as /ip4/0.0.0.0/tcp/4001 or "
                "/ip4/0.0.0.0/tcp/443/ws"
            )
        if address.peer_id is not None:
            raise InvalidValueError(f"cannot listen on {address}: leave /p2p/... out, the node has the id of its key")


@dataclasses.dataclass(frozen=True)
class RelayConfig:
    """Relays to reserve a place at."""

    addresses: tuple[Multiaddr, ...] = ()


@dataclasses.dataclass(frozen=True)
class DiscoveryConfig:
    """The private DHT. `network` None is the common one."""

    rendezvous: str = "peerup-default-network"
    network: str | None = None
    bootstrap_peers: tuple[Multiaddr, ...] = ()


@dataclasses.dataclass(frozen=True)
class SecurityConfig:
    """Who may connect, and how the node guards itself.

    Attributes:
        authorized_keys_file: as written; see :meth:`NodeConfig.path`.
        enable_connection_gating: whether only the peers in that file may connect.
        confinement: whether each actor's process is limited to what it needs: `auto`, where the kernel can do that;
            `required`, or the node does not run; `disabled`.
    """

    authorized_keys_file: str = "authorized_keys"
    enable_connection_gating: bool = True
    confinement: str = "auto"


@dataclasses.dataclass(frozen=True)
class PingConfig:
    """peer-up's own ping protocol."""

    enabled: bool = True
    id: str = PINGPONG


@dataclasses.dataclass(frozen=True)
class TelemetryConfig:
    """What the node tells about itself."""

    metrics_enabled: bool = False
    metrics_listen_address: str = "127.0.0.1:9091"
    audit_enabled: bool = False


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """The node's log: the least level that is written, and its form."""

    level: str = "info"
    format: str = "text"


@dataclasses.dataclass(frozen=True)
class LimitsConfig:
    """What strangers and peers together may take.

    Attributes:
        connections: live connections.
        handshakes: connections that are not authenticated yet.
        streams_per_connection: streams that a peer may have open on one connection.
        connections_per_service: tunnelled connections through one service or proxy.
    """

    connections: int = 1024
    handshakes: int = 64
    streams_per_connection: int = 1024
    connections_per_service: int = 4096


@dataclasses.dataclass(frozen=True)
class NodeConfig:
    """Everything that `config.yaml` says. See `actors/config/template.py` for what each key means.

    Attributes:
        file: where it was read from; relative paths in it start there.
        warnings: keys that peerup does not know, and what it leaves out.
    """

    file: Path
    version: int
    key_file: str
    network: NetworkConfig
    relay: RelayConfig
    relay_service: RelayServiceConfig
    discovery: DiscoveryConfig
    security: SecurityConfig
    ping: PingConfig
    services: tuple[ServiceEntry, ...]
    names: tuple[NameEntry, ...]
    addresses: tuple[AddressEntry, ...]
    telemetry: TelemetryConfig
    log: LogConfig
    limits: LimitsConfig
    warnings: tuple[Problem, ...]

    def path(self, written: str) -> Path:
        """A path of this configuration: absolute, or starting from the directory of its file."""
        return self.file.parent / Path(written).expanduser()

    @property
    def key_path(self) -> Path:
        """Where the identity key is."""
        return self.path(self.key_file)

    @property
    def authorized_keys_path(self) -> Path:
        """Where authorized_keys is."""
        return self.path(self.security.authorized_keys_file)


def known_keys() -> tuple[str, ...]:
    """The path of every key that a configuration may have, sections too; service, name and peer are examples."""
    peer = "12D3KooWPjceQrSwdWXPyLLeABRXmuqt69Rg3sBYbU1Nft9HyQ6X"
    example = {"services": {"name": {}}, "names": {"name": peer}, "addresses": {peer: []}}
    asked: set[str] = set()
    with contextlib.suppress(ConfigError):
        read_config(example, Path("config.yaml"), asked)
    return tuple(sorted(asked))


def read_config(values: Any, file: Path, asked: set[str] | None = None) -> NodeConfig:
    """The configuration in these parsed values. The paths of all keys that were looked for are added to `asked`.

    Raises:
        ConfigError: with all that is wrong.
    """
    problems: list[Problem] = []
    warnings: list[Problem] = []
    root = SectionReader(values, "", problems, warnings, asked)
    version = root.integer("version", 1, least=0, most=2**31)
    if version > LATEST_VERSION:
        root.problem("version", f"is {version}, but this peerup knows versions up to {LATEST_VERSION}; update peerup")
    identity = root.section("identity")
    key_file = identity.parsed("key_file", "identity.key", _path)
    network = _network(root.section("network"))
    relay = _relay(root.section("relay"))
    relay_service = read_relay_service(root.section("relay_service"))
    discovery = _discovery(root.section("discovery"))
    security = _security(root.section("security"))
    ping = _ping(root.section("protocols"))
    services = _services(root.section("services", may_be_empty=True))
    names = _names(root.section("names", may_be_empty=True))
    addresses = _addresses(root.section("addresses", may_be_empty=True))
    telemetry = _telemetry(root.section("telemetry"))
    log = _log(root.section("log"))
    limits = _limits(root.section("limits"))
    identity.finish()
    root.finish()
    if problems:
        raise ConfigError(file, tuple(sorted(problems, key=lambda problem: problem.line or 0)))
    return NodeConfig(
        file=file,
        version=version,
        key_file=key_file,
        network=network,
        relay=relay,
        relay_service=relay_service,
        discovery=discovery,
        security=security,
        ping=ping,
        services=services,
        names=names,
        addresses=addresses,
        telemetry=telemetry,
        log=log,
        limits=limits,
        warnings=tuple(warnings),
    )


def read_readable(values: Any, file: Path) -> NodeConfig:
    """Of a configuration that cannot be used, what grants something and can be read by itself.

    Services, relays and limits that are not there are left out or at their defaults; a service with a mistake has no
    address, is not enabled, or lacks the peers that cannot be read; everything else is at its default. Good for
    nothing but :func:`protocol.narrowing.narrowed_config`.
    """
    root = SectionReader(values, "", [], [])
    return NodeConfig(
        file=file,
        version=LATEST_VERSION,
        key_file="identity.key",
        network=NetworkConfig(),
        relay=_relay(root.section("relay")),
        relay_service=read_relay_service(root.section("relay_service")),
        discovery=DiscoveryConfig(),
        security=_security(root.section("security")),
        ping=PingConfig(),
        services=_services(root.section("services", may_be_empty=True)),
        names=(),
        addresses=(),
        telemetry=TelemetryConfig(),
        log=LogConfig(),
        limits=LimitsConfig(),
        warnings=(),
    )


def parse_listen_address(text: str) -> tuple[str, int]:
    """Host and port of an address to listen at: `127.0.0.1:8080`, `[::1]:8080`; port 0 is any free one.

    Raises:
        InvalidValueError: not of this form.
    """
    host, colon, port = text.rpartition(":")
    if colon and port == "0":
        return ServiceAddress.parse(f"{host}:1").host, 0
    address = ServiceAddress.parse(text)
    return address.host, address.port


MAX_UNIX_PATH: Final = 107
"""Bytes of the path of a Unix socket, unix(7)."""


def check_proxy_listen(text: str, *, only_me: bool = False) -> None:
    """Check where a proxy shall listen: an address as above, or `unix:` and the absolute path of a Unix socket.

    Raises:
        InvalidValueError: neither; or `only_me` where other machines could connect.
    """
    if text.startswith(UNIX):
        path = text.removeprefix(UNIX)
        if not path.startswith("/") or "\0" in path or path.endswith("/"):
            raise InvalidValueError(f"{path!r} is not the absolute path of a socket file")
        if len(path.encode()) > MAX_UNIX_PATH:
            raise InvalidValueError(
                f"the path {path} has {len(path.encode())} bytes, and a Unix socket's at most {MAX_UNIX_PATH}"
            )
        return
    host, _ = parse_listen_address(text)
    if only_me and not _is_loopback(host):
        raise InvalidValueError(
            f"{text} can be reached from other machines, of whose users nothing is known here; "
            "to serve only yourself listen on 127.0.0.1 or [::1]"
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _network(reader: SectionReader) -> NetworkConfig:
    listen = reader.items("listen_addresses", Multiaddr, if_empty=_LISTEN_EMPTY)
    tls = _tls(reader.section("tls"))
    secure = next((address for address in listen or () if address.value("tls") is not None), None)
    if secure is not None and not tls.certificate_file:
        reader.problem(
            "listen_addresses",
            f"has {secure}, which needs a certificate; name its files as tls.certificate_file and tls.key_file",
        )
    foreign = [address for address in listen or () if not is_served(address)]
    if foreign:
        words = f"{', '.join(map(str, foreign))}: only TCP and WebSocket at IP addresses are served yet"
        if len(foreign) == len(listen or ()):
            reader.problem("listen_addresses", f"cannot listen on {words}")
        else:
            reader.warn("listen_addresses", f"does not listen on {words}")
    for address in listen or ():
        if is_served(address) and address.peer_id is not None:
            reader.warn("listen_addresses", f"{address}: /p2p/... is not used, the node has the id of its key")
    if len({address.endpoint for address in listen or () if is_served(address)}) > MAX_SOCKETS:
        reader.problem("listen_addresses", f"names more than {MAX_SOCKETS} ports and addresses to listen at")
    if tls.certificate_file and secure is None:
        reader.warn("tls", "has a certificate that is not used: no listen address ends with /tls/ws")
    made = NetworkConfig(
        (Multiaddr("/ip4/0.0.0.0/tcp/0"), Multiaddr("/ip6/::/tcp/0")) if listen is None else listen,
        tls,
        reader.duration("silence_timeout", DEFAULT_SILENCE),
    )
    if not SHORTEST_SILENCE <= made.silence_timeout <= LONGEST_SILENCE:
        reader.problem(
            "silence_timeout",
            f"must be from {SHORTEST_SILENCE:.0f}s to {LONGEST_SILENCE / 3600:.0f}h: TCP itself may need that long to"
            " send a lost packet again",
        )
    reader.without_effect("force_private_reachability", "a node keeps its places at its relays in any case")
    reader.without_effect("resource_limits_enabled", "limits are always in force, see `limits`")
    reader.finish()
    return made


def _tls(reader: SectionReader) -> TlsConfig:
    keys = ("certificate_file", "key_file", "trusted_file")
    made = TlsConfig(*(reader.parsed(key, "", _path) for key in keys))
    if bool(made.certificate_file) != bool(made.key_file):
        missing = "key_file" if made.certificate_file else "certificate_file"
        reader.problem(keys[0] if made.certificate_file else keys[1], f"is of no use without {missing}; name both")
    reader.finish()
    return made


def _relay(reader: SectionReader) -> RelayConfig:
    made = RelayConfig(reader.items("addresses", _address_with_peer) or ())
    for relay in dict.fromkeys(address.peer_id for address in made.addresses):
        for address, why in unused_addresses(each for each in made.addresses if each.peer_id == relay):
            reader.warn("addresses", f"{address} is not used: it {why}")
    for address in made.addresses:
        if address.is_relayed and not why_undialable(address):
            reader.warn("addresses", f"{address} is not used: it leads through a relay itself")
    if len({address.peer_id for address in made.addresses}) > MAX_RELAYS:
        reader.warn("addresses", f"names more than {MAX_RELAYS} relays, and only the first {MAX_RELAYS} are used")
    # peer-up demands it, so it must not keep a peer-up configuration from loading.
    reader.without_effect("reservation_interval", "each relay says how long a reservation lasts; it is renewed in time")
    reader.finish()
    return made


NO_DISCOVERY = "peers are not searched for, but reached at the addresses that the node is given, and through relays"


def _discovery(reader: SectionReader) -> DiscoveryConfig:
    network = reader.parsed("network", "", check_network_name)
    made = DiscoveryConfig(
        reader.text("rendezvous", "peerup-default-network"),
        network or None,
        reader.items("bootstrap_peers", _address_with_peer) or (),
    )
    for key in ("network", "rendezvous", "bootstrap_peers"):
        if getattr(made, key) != getattr(DiscoveryConfig(), key):
            reader.warn(key, f"has no effect yet: {NO_DISCOVERY}")
    reader.finish()
    return made


def _security(reader: SectionReader) -> SecurityConfig:
    made = SecurityConfig(
        reader.parsed("authorized_keys_file", "authorized_keys", _path),
        # peer-up takes a missing key for "let everybody in". We do not: who wants that must say so.
        reader.boolean("enable_connection_gating", default=True),
        reader.parsed("confinement", "auto", _one_of(CONFINEMENTS)),
    )
    reader.finish()
    return made


def _ping(protocols: SectionReader) -> PingConfig:
    reader = protocols.section("ping_pong")
    made = PingConfig(reader.boolean("enabled", default=True), reader.parsed("id", PINGPONG, _protocol_id))
    if made.id != PINGPONG:
        reader.warn("id", f"has no effect: the ping of peer-up is answered under {PINGPONG}")
    reader.finish()
    protocols.finish()
    return made


_ALLOWED_PEERS_EMPTY = "write [] to let nobody use the service, or remove it to let every authorised peer"
_LISTEN_EMPTY = "write [] to listen nowhere, or remove it to listen at any free port of every address"


def _services(reader: SectionReader) -> tuple[ServiceEntry, ...]:
    found: list[ServiceEntry] = []
    for key in reader.keys():  # noqa: SIM118  # not a dict
        if key in RESERVED_NAMES:  # peer-up has no such rule, and its configurations shall load
            reader.warn(key, "is the name of a protocol of peerup's own; this service is not offered, rename it")
            continue
        name = _key_text(reader, key, ServiceName)
        if name is None:
            continue
        entry = reader.section(key)
        address = entry.parsed("local_address", "", _checked(ServiceAddress.parse))
        if not address and "local_address" not in entry.keys():  # noqa: SIM118  # not a dict
            reader.problem(key, "has no local_address; add one, such as local_address: localhost:22")
        enabled = entry.boolean("enabled", default=False)
        allowed = entry.items("allowed_peers", PeerId.from_text, if_empty=_ALLOWED_PEERS_EMPTY)
        entry.ignore("protocol")  # peer-up stores it and never uses it
        if "protocol" in entry.keys() and entry.peek("protocol") != name.protocol:  # noqa: SIM118  # not a dict
            entry.warn("protocol", f"has no effect and can be removed: the service is reached as {name.protocol}")
        entry.finish()
        found.append(ServiceEntry(str(name), address, enabled, allowed))
    reader.ignore(*reader.keys())
    return tuple(found)


def _names(reader: SectionReader) -> tuple[NameEntry, ...]:
    found = []
    for key in reader.keys():  # noqa: SIM118  # not a dict
        name = _key_text(reader, key, check_peer_name)
        peer = reader.parsed(key, None, PeerId.from_text)
        if name is not None and peer is not None:
            found.append(NameEntry(name, peer))
    return tuple(found)


def _addresses(reader: SectionReader) -> tuple[AddressEntry, ...]:
    found = []
    for key in reader.keys():  # noqa: SIM118  # not a dict
        peer = _key_text(reader, key, PeerId.from_text)
        if peer is None:
            reader.ignore(key)
            continue
        addresses = reader.items(key, _dialable_by(peer)) or ()
        for address, why in unused_addresses(addresses):
            reader.warn(key, f"{address} is not used: it {why}")
        if addresses:
            found.append(AddressEntry(peer, addresses))
    return tuple(found)


def _telemetry(reader: SectionReader) -> TelemetryConfig:
    metrics, audit = reader.section("metrics"), reader.section("audit")
    made = TelemetryConfig(
        metrics.boolean("enabled", default=False),
        metrics.parsed("listen_address", "127.0.0.1:9091", _checked(_check_metrics_address)),
        audit.boolean("enabled", default=False),
    )
    for section in (metrics, audit, reader):
        section.finish()
    return made


def _log(reader: SectionReader) -> LogConfig:
    made = LogConfig(
        reader.parsed("level", "info", _one_of(LOG_LEVELS)), reader.parsed("format", "text", _one_of(LOG_FORMATS))
    )
    reader.finish()
    return made


def _limits(reader: SectionReader) -> LimitsConfig:
    defaults = LimitsConfig()
    made = LimitsConfig(
        reader.integer("connections", defaults.connections, least=1, most=100_000),
        reader.integer("handshakes", defaults.handshakes, least=1, most=10_000),
        reader.integer("streams_per_connection", defaults.streams_per_connection, least=1, most=100_000),
        reader.integer("connections_per_service", defaults.connections_per_service, least=1, most=100_000),
    )
    reader.finish()
    return made


def check_network_name(text: str) -> str:
    """A network name: lower-case letters, digits and inner hyphens, at most 63.

    Raises:
        InvalidValueError: anything else.
    """
    if not _NAME.fullmatch(text):
        raise InvalidValueError(
            f"{text!r} cannot be used here: 1 to 63 lower-case letters, digits and hyphens, no hyphen at either end"
        )
    return text


def check_peer_name(text: str) -> str:
    """A friendly name of a peer, as peer-up writes them: letters, digits, dot, underscore, hyphen; at most 64.

    Raises:
        InvalidValueError: anything else, or what could be taken for a peer id.
    """
    allowed = len(text) <= 64 and all(c.isascii() and (c.isalnum() or c in "._-") for c in text)
    if not allowed or not text or text[0] in ".-":
        raise InvalidValueError(
            f"{text!r} cannot be a name: use 1 to 64 letters, digits, dots, underscores and hyphens, "
            "not beginning with a dot or hyphen"
        )
    try:
        PeerId.from_text(text)
    except InvalidValueError:
        return text
    raise InvalidValueError(f"{text!r} is a peer id and cannot be a name")


def _key_text(reader: SectionReader, key: Any, parse: Callable[[str], Any]) -> Any:
    """What `parse` makes of a key; None after noting the problem."""
    if not isinstance(key, str):
        reader.problem(key, "must be text; put the key in quotes")
        return None
    try:
        return parse(str(key))
    except ValueError as error:
        reader.problem(key, str(error))
        return None


def _checked(parse: Callable[[str], Any]) -> Callable[[str], str]:
    def check(text: str) -> str:
        parse(text)
        return text

    return check


def _check_metrics_address(text: str) -> None:
    host, _ = parse_listen_address(text)
    try:
        ipaddress.ip_address(host)
    except ValueError:
        if host != "localhost":
            raise InvalidValueError(f"{text}: the host must be an IP address or localhost") from None


def _one_of(allowed: tuple[str, ...]) -> Callable[[str], str]:
    def check(text: str) -> str:
        if text.lower() not in allowed:
            raise InvalidValueError(f"must be one of {', '.join(allowed)}, not {text!r}")
        return text.lower()

    return check


def _path(text: str) -> str:
    if not text or "\0" in text:
        raise InvalidValueError("must be the path of a file")
    return text


def _protocol_id(text: str) -> str:
    if not text.startswith("/") or not text.isprintable() or " " in text or len(text) > 200:
        raise InvalidValueError(f"{text!r} is not a protocol id such as /pingpong/1.0.0")
    return text


def _address_with_peer(text: str) -> Multiaddr:
    address = Multiaddr(text)
    if address.peer_id is None:
        raise InvalidValueError(f"{text} does not end with the peer's id; append /p2p/<peer id>")
    return address


def _dialable_by(peer: PeerId) -> Callable[[str], Multiaddr]:
    def parse(text: str) -> Multiaddr:
        address = Multiaddr(text)
        if address.peer_id not in (None, peer):
            raise InvalidValueError(f"{text} leads to another peer, {address.peer_id}")
        if address.endpoint is None and all(component.name != "p2p-circuit" for component in address.components):
            raise InvalidValueError(f"{text} has no port to connect to; write it like /ip4/192.0.2.7/tcp/4101")
        return address

    return parse
