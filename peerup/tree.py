"""The tree of actors of a node: who runs, in which order, supervised how.

main                the service: watches everything, builds the tree anew if its root or the actor system is lost
└─ root             one_for_one: whoever needs a restarted actor notices by watching it and subscribes again
   ├─ config        what the person wrote down; first, because others follow it
   ├─ keyring       the identity key
   ├─ gate          who may do what
   ├─ switchboard   sockets, connections, streams; needs the keyring's signature and the gate's policy
   ├─ nat/monitor   tells when this machine is in another network, or has slept
   ├─ relay/server  only if this node is a relay; stops before the switchboard, so that open circuits get their time
   ├─ proxies       one_for_one, children come and go: proxy/<peer>/<service>, service/<name>,
   │                and relay/keeper while relays are configured
   ├─ metrics       only if enabled
   └─ api           the control socket; last, so that whoever finds it finds all of the node
"""

from __future__ import annotations

import dataclasses

from actors.config.paths import NodeHome
from actors.config.schema import NodeConfig
from peerup import __version__
from peerup.confinement import Table
from protocol.messages import Data
from protocol.messages.system import ChildSpec, Strategy, SupervisorSpec
from supervisor.overseer import FACTORY, supervisor_arguments

INTENSITY = 40
"""So many restarts of root's children within WINDOW are borne. With the back-off below, one child that ends right after
each start reaches 17 in a window and so never takes the healthy ones along; three such children mean that something
common to all is broken, and then a new tree is the better try."""

PROXIES_INTENSITY = 300
"""The same for the supervisor of proxies and services, which may have hundreds of children."""

WINDOW = 60.0
"""Seconds, see INTENSITY."""

BACKOFF_INITIAL = 0.1
"""Seconds before the second restart of a child in a window; the first is immediate."""

BACKOFF_LIMIT = 5.0
"""The longest wait in seconds: a person who has repaired the cause does not want to wait longer."""

TUNNELS_BACKOFF_LIMIT = 1.0
"""The same for those whose absence people feel at once: the switchboard, the proxies and the services."""

START_DEADLINE = 10.0
"""Seconds for an actor to get ready. Each needs well below one; some wait for another that may just be restarting."""

SWITCHBOARD_START_DEADLINE = 20.0
"""The switchboard waits for up to three others in turn."""

DRAIN_SLACK = 5.0
"""Seconds that a relay may need to stop beyond the time that open circuits get."""

SWITCHBOARD_STOP_DEADLINE = 18.0
"""Seconds for the switchboard to close all connections in good order (`actors.switchboard.admittance.CLOSING`)."""

PROXIES_STOP_DEADLINE = 10.0
"""Seconds for all proxies and services to end their tunnels, side by side."""

HEARTBEAT = 2.0
"""Seconds between heartbeats. They are most of what an idle node does: each wakes a process whose code and data have
left the CPU's caches meanwhile. With HEARTBEAT_DEADLINE, a hung actor is noticed after three to five seconds."""

HEARTBEAT_DEADLINE = 3.0
"""Seconds without an answer after which an actor counts as hung. Under full load on two cores a healthy one was never
seen to need one second; a hung one must not stay for long."""


OPERATORS = ("api",)
"""Who may set taps, message faults and log levels of every process, and hurt processes: people, by the control API."""

PREDECESSORS = ("relay/server",)
"""Who may let a successor start while this node is still stopping: open circuits take their time."""

STARTERS = ("config",)
"""Who may have proxies and services started and stopped: it follows the configuration."""

VITAL = ("config", "keyring", "gate", "switchboard", "proxies", "api")
"""The actors that a watchdog outside waits for. Those that may fail for what no restart repairs, such as a port that
somebody else has (metrics) or relays that cannot be reached, are their supervisor's business alone."""


def time_to_drain(config: NodeConfig) -> float:
    """Seconds by which the stop of this node may take longer, because it gives the circuits of a relay some time."""
    served = config.relay_service
    return served.drain_time + DRAIN_SLACK if served.enabled else 0.0


@dataclasses.dataclass(frozen=True)
class Options:
    """What the tree is built from.

    Attributes:
        service_pid: the process that ends the node on SIGTERM.
        main_pid: the process that was started: `service_pid`, or the front of a relay (decision 21).
        started_at: seconds since the Unix epoch.
    """

    home: NodeHome
    config: NodeConfig
    service_pid: int
    main_pid: int
    started_at: float
    allow_faults: bool


def build_tree(options: Options) -> SupervisorSpec:
    """The specification of the root supervisor of this node."""
    home, config = options.home, options.config
    audit = str(home.audit_file) if config.telemetry.audit_enabled else None
    limits = config.limits
    table = Table(home, config, options.service_pid)
    children = [
        _actor("config", "actors.config.actor:Config", path=str(home.config_file), proxies=str(home.proxies_file)),
        _actor("keyring", "actors.keyring.actor:Keyring", path=str(config.key_path)),
        _actor("gate", "actors.gate.actor:Gate", path=str(config.authorized_keys_path), audit=audit),
        dataclasses.replace(
            _actor(
                "switchboard",
                "actors.switchboard.actor:Switchboard",
                listen=[str(address) for address in config.network.served_addresses],
                max_connections=limits.connections,
                max_streams=limits.streams_per_connection,
                admission={"concurrent": limits.handshakes},
                pingpong=config.ping.enabled,
                tls=_tls_files(config),
            ),
            start_deadline=SWITCHBOARD_START_DEADLINE,
            backoff_limit=TUNNELS_BACKOFF_LIMIT,
            stop_deadline=SWITCHBOARD_STOP_DEADLINE,
        ),
        _actor("nat/monitor", "actors.nat.monitor:NetworkMonitor"),
        *_relay_server(config),
        _proxies(table),
    ]
    if config.telemetry.metrics_enabled:
        listen = config.telemetry.metrics_listen_address
        children.append(_actor("metrics", "actors.metrics.actor:Metrics", listen=listen))
    children.append(
        _actor(
            "api",
            "actors.api.actor:ApiActor",
            socket_path=str(home.control_socket),
            home=str(home.explicit or home.config_dir),
            version=__version__,
            service_pid=options.service_pid,
            main_pid=options.main_pid,
            started_at=options.started_at,
            allow_faults=options.allow_faults,
            own_session=True,
        )
    )
    confined = (dataclasses.replace(child, confinement=table.of(child.name)) for child in children)
    return _supervision(INTENSITY, tuple(confined))


def _tls_files(config: NodeConfig) -> dict[str, Data]:
    tls = config.network.tls
    named = {"certificate": tls.certificate_file, "key": tls.key_file, "trusted": tls.trusted_file}
    return {name: str(config.path(written)) for name, written in named.items() if written}


def _actor(name: str, factory: str, **arguments: Data) -> ChildSpec:
    return ChildSpec(
        name,
        factory,
        arguments,
        start_deadline=START_DEADLINE,
        heartbeat=HEARTBEAT,
        heartbeat_deadline=HEARTBEAT_DEADLINE,
    )


def _relay_server(config: NodeConfig) -> list[ChildSpec]:
    if not config.relay_service.enabled:
        return []
    made = _actor("relay/server", "actors.relay.server:RelayServer", drain=config.relay_service.drain_time)
    return [dataclasses.replace(made, stop_deadline=time_to_drain(config))]


def _proxies(table: Table) -> ChildSpec:
    spec = dataclasses.replace(
        _supervision(PROXIES_INTENSITY, (), STARTERS),
        backoff_limit=TUNNELS_BACKOFF_LIMIT,
        confinements=table.rules_for_proxies(),
    )
    made = _actor("proxies", FACTORY, **supervisor_arguments(spec))
    return dataclasses.replace(made, stop_deadline=PROXIES_STOP_DEADLINE)


def _supervision(intensity: int, children: tuple[ChildSpec, ...], starters: tuple[str, ...] = ()) -> SupervisorSpec:
    strategy = Strategy.ONE_FOR_ONE
    return SupervisorSpec(strategy, intensity, WINDOW, BACKOFF_INITIAL, BACKOFF_LIMIT, children, starters)
