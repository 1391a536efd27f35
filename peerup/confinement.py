"""What the process of each actor may do: the table behind `docs/confinement.md`, which the kernel enforces.

The rule: who talks to the network reads no secrets, and who reads secrets has no network. What people edit is not
readable through a right to its directory, where other things lie as well, but lent by the supervisor file by file
(:mod:`supervisor.lending`); so it may be moved, replaced or linked to elsewhere while the node runs.
"""

from __future__ import annotations

import os
import ssl
from pathlib import Path

from actors.config.paths import NodeHome
from actors.config.schema import NodeConfig, parse_listen_address
from protocol.messages.confinement import Confinement, ConfinementRule

DISABLED = "disabled"
"""The value of `security.confinement` with which nothing is confined."""

REQUIRED = "required"
"""The value with which the node does not run where the kernel cannot confine it."""

_RESOLVER = ("/etc",)
"""The files that say how names are resolved are in here, and some of them are replaced when the network changes."""

_SECRET_OF_ROOT = (
    "/etc/shadow",
    "/etc/shadow-",
    "/etc/gshadow",
    "/etc/gshadow-",
    "/etc/sudoers",
    "/etc/sudoers.d",
    "/etc/ssh",
    "/etc/ssl/private",
    "/etc/pki/tls/private",
    "/etc/letsencrypt",
    "/etc/wireguard",
    "/etc/NetworkManager/system-connections",
    "/etc/krb5.keytab",
    "/etc/security",
)
"""What root, and nobody else, could read in there."""

_PLAIN_NAME_SERVICES = frozenset({"files", "dns", "myhostname", "resolve"})
"""Sources of host names in nsswitch.conf that need no local Unix socket, or are followed by one that needs none."""

_NETWORK_TABLES = "/proc/self/net"


class Table:
    """The confinement of each actor of one node.

    Arguments:
        home, config: the node's.
        service_pid: the process that ends the node on SIGTERM.
    """

    def __init__(self, home: NodeHome, config: NodeConfig, service_pid: int) -> None:
        self._home = home
        self._config = config
        self._service_pid = service_pid
        self._required = config.security.confinement == REQUIRED
        tls = config.network.tls
        self._tls = tuple(
            str(config.path(name)) for name in (tls.certificate_file, tls.key_file, tls.trusted_file) if name
        )

    def of(self, name: str) -> Confinement | None:
        """What the actor of this name may do; None if nothing is confined.

        Raises:
            KeyError: there is no entry for it. Whoever adds an actor decides what it may do.
        """
        if self._config.security.confinement == DISABLED:
            return None
        return _ENTRIES[name](self)

    def rules_for_proxies(self) -> tuple[ConfinementRule, ...]:
        """What the children of `proxies` may do, which are started while the node runs."""
        if self._config.security.confinement == DISABLED:
            return ()
        return tuple(
            ConfinementRule(pattern, self.of(pattern), _SOCKET_ARGUMENTS.get(pattern, ""))
            for pattern in CHILDREN_OF_PROXIES
        )

    # One method for each line of the table

    def config(self) -> Confinement:
        """Reads the configuration, keeps what it remembers in the state directory."""
        written = (str(self._home.state_dir),)
        return self._made(lent=(str(self._home.config_file),), write=written, ownership=True)

    def keyring(self) -> Confinement:
        """Reads the identity key, and has no network at all."""
        return self._made(read=(str(self._config.key_path),))

    def gate(self) -> Confinement:
        """Reads authorized_keys, and writes the audit log."""
        audited = (str(self._home.log_dir),) if self._config.telemetry.audit_enabled else ()
        return self._made(lent=(str(self._config.authorized_keys_path),), write=audited)

    def switchboard(self) -> Confinement:
        """Talks to the network, and reads what TLS needs."""
        endpoints = [address.endpoint for address in self._config.network.served_addresses]
        ports = dict.fromkeys(endpoint.port for endpoint in endpoints if endpoint is not None)
        return self._made(
            lent=self._tls,
            read=(_NETWORK_TABLES, *_certificate_authorities()),
            system=_resolver_directories(),
            families=("inet", "netlink", *_name_service_sockets()),
            bind=tuple(ports),
            connect=None,
            privileged_ports=True,
        )

    def monitor(self) -> Confinement:
        """Hears from the kernel about addresses and routes."""
        return self._made(families=("netlink",))

    def messages_only(self) -> Confinement:
        """Does all that it does with messages."""
        return self._made()

    def metrics(self) -> Confinement:
        """Serves one TCP port, and reads what the kernel tells everybody of processes."""
        _, port = parse_listen_address(self._config.telemetry.metrics_listen_address)
        return self._made(families=("inet",), bind=(port,), read=("/proc",), privileged_ports=True)

    def api(self) -> Confinement:
        """Serves the control socket, and may end the node."""
        return self._made(families=("unix",), sockets=(str(self._home.run_dir),), terminate=self._service_pid)

    def proxy(self) -> Confinement:
        """Listens where it is told to, and connects to nothing."""
        return self._made(families=("inet",), bind=None, privileged_ports=True)

    def service(self) -> Confinement:
        """Connects to a local service, whose host may have to be looked up."""
        families = ("inet", "netlink", *_name_service_sockets())
        return self._made(families=families, connect=None, system=_resolver_directories())

    def proxies(self) -> Confinement:
        """The supervisor of the last ones: what any of its children may reach."""
        # A proxy may be asked to listen at a Unix socket in any directory.
        return self._made(bind=None, connect=None, system=_resolver_directories(), sockets=("/",))

    def _made(
        self,
        *,
        read: tuple[str, ...] = (),
        system: tuple[str, ...] = (),
        write: tuple[str, ...] = (),
        sockets: tuple[str, ...] = (),
        lent: tuple[str, ...] = (),
        families: tuple[str, ...] = (),
        bind: tuple[int, ...] | None = (),
        connect: tuple[int, ...] | None = (),
        terminate: int = 0,
        ownership: bool = False,
        privileged_ports: bool = False,
    ) -> Confinement:
        return Confinement(
            read=read,
            system=system,
            withheld=self._withheld(),
            write=write,
            sockets=sockets,
            lent=lent,
            families=families,
            bind=bind,
            connect=connect,
            terminate=terminate,
            ownership=ownership,
            privileged_ports=privileged_ports,
            required=self._required,
        )

    def _withheld(self) -> tuple[str, ...]:
        home, config = self._home, self._config
        own = (home.config_dir, home.state_dir, home.log_dir, home.run_dir, config.key_path)
        named = (config.authorized_keys_path, *map(Path, self._tls))
        # Where a name is a link, what it leads to today is withheld as well.
        return tuple(dict.fromkeys([*map(str, (*own, *named)), *(_SECRET_OF_ROOT if os.geteuid() == 0 else ())]))


CHILDREN_OF_PROXIES = ("proxy/*", "service/*", "relay/keeper")
"""The names of the actors that are started while the node runs."""

_SOCKET_ARGUMENTS = {"proxy/*": "listen"}
"""Of those, the argument that may name a Unix socket to listen at."""

_ENTRIES = {
    "config": Table.config,
    "keyring": Table.keyring,
    "gate": Table.gate,
    "switchboard": Table.switchboard,
    "nat/monitor": Table.monitor,
    "relay/server": Table.messages_only,
    "proxies": Table.proxies,
    "relay/keeper": Table.messages_only,
    "proxy/*": Table.proxy,
    "service/*": Table.service,
    "metrics": Table.metrics,
    "api": Table.api,
}


def _certificate_authorities() -> tuple[str, ...]:
    """Where OpenSSL looks for the authorities that the system believes, wherever the environment says that is."""
    paths = ssl.get_default_verify_paths()
    found = (paths.cafile, paths.capath)
    return tuple(path for path in found if path and not path.startswith("/etc/"))


def _resolver_directories() -> tuple[str, ...]:
    """Where the files are that say how names are resolved."""
    target = os.path.realpath("/etc/resolv.conf")
    place = str(Path(target).parent)
    own = Path(place).parts
    # `/run/systemd/resolve`, `/run/NetworkManager` and the like, but nothing as wide as `/run`.
    extra = (place,) if len(own) > 2 and own[1] in ("run", "var", "mnt") else (target,)
    return (*_RESOLVER, *extra)


def _name_service_sockets() -> tuple[str, ...]:
    """`unix` if a source of host names in nsswitch.conf needs to talk to a program of this machine (mDNS, for one)."""
    try:
        text = Path("/etc/nsswitch.conf").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ()
    for line in text.splitlines():
        database, colon, sources = line.partition("#")[0].partition(":")
        if colon and database.strip() == "hosts":
            named = {source for source in sources.split() if not source.startswith("[")}
            return () if named <= _PLAIN_NAME_SERVICES and named & {"dns", "files"} else ("unix",)
    return ()
