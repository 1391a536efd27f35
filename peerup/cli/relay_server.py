"""`peerup relay setup`, `serve`, `info`, `authorize`, `deauthorize`, `list-peers`, `config`: being a relay.

A relay is a node like any other: the same home, key, authorized_keys and program. What makes it one is
`relay_service.enabled: true` in its configuration.
"""

from __future__ import annotations

import dataclasses
import ipaddress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from peerup.cli.files import (
    after_restart,
    authorized_keys_path,
    find_listed_peer,
    find_peer_id,
    node_keys,
    not_this_node,
    note_after_restart,
    note_in_force,
    read_config,
    report,
    tell_authorized,
    tell_unauthorized,
)
from peerup.cli.framework import EXIT_CODES, Failure, Session, command, examples
from peerup.cli.output import Column, good, note, process_of, short_id, size, span, table

if TYPE_CHECKING:
    from actors.config.schema import NodeConfig

DEFAULT_PORT = 4001


# setup


@command(
    "setup",
    json_output=True,
    short_help="Make a relay's home.",
    epilog=examples(
        "peerup --home DIR relay setup",
        "peerup --home DIR relay setup --yes --listen /ip4/0.0.0.0/tcp/443",
        "peerup --home DIR relay setup --yes --listen /ip4/0.0.0.0/tcp/4001 \\",
        "    --announce /dns/relay.example/tcp/4001 --limit circuits.per_peer=64",
        "peerup --home DIR relay setup --yes --import relay-server.yaml",
    ),
)
@click.option("--yes", is_flag=True, help="Ask nothing; take what the options say.")
@click.option(
    "--listen",
    multiple=True,
    metavar="MULTIADDR",
    help="Where to listen (repeatable; default: TCP port 4001 of all addresses).",
)
@click.option(
    "--announce",
    multiple=True,
    metavar="MULTIADDR",
    help="Where clients find the relay, if that is not where it listens (repeatable).",
)
@click.option(
    "--limit",
    "limits",
    multiple=True,
    metavar="KEY=VALUE",
    help="A setting of relay_service, such as circuits.per_peer=64 or reservation_ttl=2h (repeatable).",
)
@click.option(
    "--import",
    "imported",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Take over a peer-up relay: its relay-server.yaml, and the key and authorized keys that this names.",
)
def setup(
    session: Session,
    listen: tuple[str, ...],
    announce: tuple[str, ...],
    limits: tuple[str, ...],
    imported: Path | None,
    *,
    yes: bool,
) -> None:
    """Make a relay's home: configuration, identity key, and an empty list of who may use it.

    An identity key that is already there is kept; a configuration is never overwritten.
    """
    from actors.config.relay_init import RelaySettings, init_relay
    from protocol.multiaddr import Multiaddr

    if imported is not None and not imported.exists():
        raise Failure(
            f"there is no file {imported}",
            "name the relay-server.yaml of a peer-up relay",
            code="no-file",
            as_json=session.as_json,
        )
    asks = not yes and not session.as_json
    if imported is None and not listen and asks and not session.home.config_file.exists():
        port = click.prompt("TCP port to listen on", type=click.IntRange(1, 65535), default=DEFAULT_PORT)
        listen = _everywhere(port)
        if not announce:
            answer = click.prompt(
                "Address that clients find it at (a name or IP address; empty to find out)",
                default="",
                show_default=False,
            )
            announce = _announced(answer, port) if answer else ()
    if imported is None and not listen:
        if not asks and not yes:
            raise click.UsageError("give --listen MULTIADDR, such as --listen /ip4/0.0.0.0/tcp/4001")
        listen = _everywhere(DEFAULT_PORT)
    settings = RelaySettings(
        listen_addresses=tuple(map(Multiaddr, listen)),
        announce_addresses=tuple(map(Multiaddr, announce)),
        limits=tuple(map(_limit, limits)),
        imported=imported,
    )
    made = init_relay(session.home, settings)
    home, peer_id = made.node.home, str(made.node.peer)

    def human() -> None:
        good(f"This relay is {peer_id}")
        click.echo(f"  configuration    {home.config_file}")
        click.echo(f"  identity key     {home.key_file}{' (kept)' if made.node.kept_key else ''}")
        kept = " (kept)" if made.node.kept_authorized_keys else ""
        click.echo(f"  who may use it   {home.authorized_keys_file}{kept}")
        for address in made.config.network.listen_addresses:
            click.echo(f"  listens on       {address}")
        for address in made.config.relay_service.announce_addresses:
            click.echo(f"  announces        {address}")
        click.echo("Next:")
        click.echo(f"  {session.program} relay authorize PEER_ID --comment NAME   let a device use it")
        click.echo(f"  {session.program} relay serve                              run it")
        click.echo(f"  {session.program} relay info                               what clients need to know")

    data = {
        "peer_id": peer_id,
        "config": str(home.config_file),
        "key": str(home.key_file),
        "kept_key": made.node.kept_key,
        "authorized_keys": str(home.authorized_keys_file),
        "listen_addresses": [str(address) for address in made.config.network.listen_addresses],
        "announce_addresses": [str(address) for address in made.config.relay_service.announce_addresses],
        "notes": [str(problem) for problem in made.notes],
    }
    session.show(data, human)
    for problem in made.notes:
        note(f"note: {imported}: {problem}")


def _everywhere(port: int) -> tuple[str, ...]:
    return (f"/ip4/0.0.0.0/tcp/{port}", f"/ip6/::/tcp/{port}")


def _announced(answer: str, port: int) -> tuple[str, ...]:
    """The multiaddr of an answer that may also be a bare name or IP address."""
    if answer.startswith("/"):
        return (answer,)
    try:
        version = ipaddress.ip_address(answer).version
    except ValueError:
        return (f"/dns/{answer}/tcp/{port}",)
    return (f"/ip{version}/{answer}/tcp/{port}",)


def _limit(text: str) -> tuple[tuple[str, ...], int | str]:
    """The path and the value in `circuits.per_peer=64`."""
    key, equals, value = text.partition("=")
    if not equals or not key or not value:
        raise click.BadParameter(f"{text!r} is not KEY=VALUE, such as circuits.per_peer=64", param_hint="--limit")
    return tuple(key.split(".")), int(value) if value.isdecimal() else value


# serve


@command(
    "serve",
    epilog=examples("peerup --home DIR relay serve", "peerup relay serve --log-format json 2>>relay.log")
    + f"\n\n{EXIT_CODES}",
)
@click.option("--log-level", metavar="LEVEL", help="The least that is logged (default: as configured).")
@click.option("--log-format", type=click.Choice(["text", "json"]), help="Form of the log (default: as configured).")
@click.option("--allow-faults", is_flag=True, help="Let `peerup fault` break parts of this relay on purpose.")
@click.option("--ready-fd", type=click.IntRange(min=3), metavar="N", help="Also write `ready` to this descriptor.")
def serve(
    session: Session, log_level: str | None, log_format: str | None, *, allow_faults: bool, ready_fd: int | None
) -> None:
    """Run the relay, in the foreground, until SIGTERM or Ctrl-C.

    Prints `ready` on standard output when all of it is up; the log goes to standard error. When told to stop it grants
    nothing new and lets open circuits end for as long as relay_service.drain_time says. Ctrl-C waits for that, and a
    second one ends it at once. SIGTERM does not: this command then returns within about a second, so that another relay
    can be started in its place, and the circuits run on in the background. Works as a systemd service of type notify.
    """
    from peerup.daemon import LOG_LEVELS, run

    if log_level is not None and log_level not in LOG_LEVELS:
        raise click.BadParameter(f"{log_level!r} is none of {', '.join(LOG_LEVELS)}", param_hint="--log-level")
    _relay_config(session)
    run(session.home, log_level=log_level, log_format=log_format, allow_faults=allow_faults, ready_fd=ready_fd)


def _relay_config(session: Session) -> NodeConfig:
    """The configuration of this home, which must be a relay's.

    Raises:
        Failure: there is none, or it is that of a node that serves no others.
    """
    home = session.home
    if not home.config_file.exists():
        raise Failure(
            f"there is no relay in {home.config_dir}",
            "make one with `peerup relay setup`, or say where it is with --home DIR",
            code="not-a-relay",
            as_json=session.as_json,
        )
    config = read_config(session)
    if not config.relay_service.enabled:
        raise Failure(
            f"the node in {home.config_dir} is not a relay",
            f"set `relay_service: {{enabled: true}}` in {home.config_file}, or make a relay in a home of its own with "
            "`peerup --home DIR relay setup`",
            code="not-a-relay",
            as_json=session.as_json,
        )
    return config


# info


@command("info", json_output=True, short_help="Show its id, addresses, limits, and what it does now.")
def info(session: Session) -> None:
    """Show the relay's id, addresses and limits, what it does now, and the command for its clients."""
    from actors.keyring.key_file import load_key

    config = _relay_config(session)
    peer_id = str(load_key(config.key_path).peer_id)
    live = _live(session)
    listen = [*map(str, config.network.listen_addresses)] if live is None else live["listen_addresses"]
    listen = [_with_peer(address, peer_id) for address in listen]
    announce = [_with_peer(str(address), peer_id) for address in config.relay_service.announce_addresses]
    addresses = announce or ([] if live is None else live["addresses"]) or [a for a in listen if _is_definite(a)]
    addresses = list(dict.fromkeys(_with_peer(address, peer_id) for address in addresses))
    data = {
        "peer_id": peer_id,
        "home": str(session.home.config_dir),
        "listen_addresses": listen,
        "announce_addresses": announce,
        "addresses": addresses,
        "gating": config.security.enable_connection_gating,
        "limits": _limits(config),
        "drain_time": config.relay_service.drain_time,
        "client_command": " ".join(["peerup", "relay", "add", *addresses]) if addresses else None,
        "running": live is not None,
        "live": live,
    }
    session.show(data, lambda: _print_info(data))
    if live is not None and not session.as_json:
        note_after_restart(after_restart(session))


def _print_info(data: dict[str, Any]) -> None:
    click.echo(f"{'peer id':<14} {data['peer_id']}")
    for title, key in (("listens on", "listen_addresses"), ("announces", "announce_addresses")):
        for address in data[key]:
            click.echo(f"{title:<14} {address}")
    who = "the peers in authorized_keys" if data["gating"] else "everybody (gating is off)"
    click.echo(f"{'may use it':<14} {who}")
    live = data["live"]
    if live is None:
        click.echo(f"{'state':<14} not running; start it with `peerup relay serve`")
    else:
        state = "draining" if live["draining"] else "serving" if live["serving"] else "not serving yet"
        click.echo(f"{'state':<14} {state}, up {span(live['uptime'])}, {process_of(live)}")
        click.echo(f"{'reservations':<14} {live['reservations']} (devices that can be reached through it)")
        click.echo(f"{'circuits':<14} {live['circuits']} open; {size(live['bytes'])} carried since the start")
    click.echo("limits (keys below relay_service)")
    for key, limit in data["limits"].items():
        if key != "guest_circuit" or not data["gating"]:
            click.echo(f"  {key:<20} {_limit_words(key, limit)}")
    click.echo(f"  {'drain_time':<20} {span(data['drain_time'])}")
    click.echo("on a client")
    if data["client_command"]:
        for address in data["addresses"]:
            click.echo(f"  peerup relay add {address}")
    else:
        click.echo("  its public address is not known: set relay_service.announce_addresses, or ask again when it runs")


def _live(session: Session) -> dict[str, Any] | None:
    """What the running relay tells of itself; None if it does not run."""
    from peerup.client import NotRunningError

    try:
        status, relay = session.client.get("/v1/status"), session.client.get("/v1/relay")
    except NotRunningError:
        return None
    live: dict[str, Any] = relay | {
        "uptime": status["uptime"],
        "pid": status["pid"],
        "main_pid": status.get("main_pid", status["pid"]),
        "listen_addresses": status["listen_addresses"],
        "bytes": relay["to_destination"] + relay["to_source"],
    }
    return live


def _with_peer(address: str, peer_id: str) -> str:
    return address if "/p2p/" in address else f"{address}/p2p/{peer_id}"


def _is_definite(address: str) -> bool:
    """Whether a client could dial it: not every address, not any port."""
    words = address.split("/")
    return words[2] not in ("0.0.0.0", "::") and words[4:5] != ["0"]  # noqa: S104  # compared, not bound


def _limits(config: NodeConfig) -> dict[str, Any]:
    """The limits by the names that they have in the configuration; None is unlimited."""
    service = config.relay_service
    scoped = {key: getattr(service, key) for key in ("reservations", "circuits", "bytes_per_second")}
    scoped["requests_per_minute"] = service.requests_per_minute
    return {
        **{key: dataclasses.asdict(limit) for key, limit in scoped.items()},
        "circuit": {"duration": service.circuit.seconds, "data": service.circuit.data},
        "guest_circuit": {"duration": service.guest_circuit.seconds, "data": service.guest_circuit.data},
        "reservation_ttl": service.reservation_ttl,
    }


_SCOPES = {"per_peer": "per peer", "per_ip": "per IP", "per_network": "per network", "total": "in all"}


def _limit_words(key: str, limit: Any) -> str:
    """A limit such as `64 per peer, 512 in all`."""
    if not isinstance(limit, dict):
        return span(limit)
    if "duration" in limit:
        words = [span(limit["duration"])] if limit["duration"] is not None else []
        words += [f"{size(limit['data'])} each way"] if limit["data"] is not None else []
    else:
        shown = size if key == "bytes_per_second" else str
        words = [f"{shown(limit[scope])} {name}" for scope, name in _SCOPES.items() if limit[scope] is not None]
    return ", ".join(words) or "unlimited"


# who may use it


@command(
    "authorize",
    json_output=True,
    short_help="Let a device use this relay.",
    epilog=examples(
        "peerup relay authorize 12D3KooW... --comment laptop",
        "peerup relay authorize 12D3KooW... --comment guest --expires 7d",
    ),
)
@click.argument("peer_id", metavar="PEER_ID")
@click.option("--comment", default="", help="Whose device this is.")
@click.option("--expires", metavar="WHEN", help="Until when: 7d from now, or a date such as 2030-12-31T18:00.")
def authorize(session: Session, peer_id: str, comment: str, expires: str | None) -> None:
    """Let a device use this relay: reserve a place here, and connect to others that have one.

    Both ends of a circuit must be authorized. A running relay takes the change over at once.
    """
    from actors.gate.authorized_keys_file import add_peer
    from peerup.cli.auth import expiry, present

    _relay_config(session)
    until = expiry(expires)
    attributes = {} if until is None else {"expires": until}
    path = authorized_keys_path(session)
    entry = add_peer(path, not_this_node(session, find_peer_id(peer_id)), comment, attributes)
    told = tell_authorized(session, path, entry.peer)
    report(session, f"{entry.peer} may use this relay", present(entry), told, what="relay")


@command("deauthorize", json_output=True, short_help="Let a device use this relay no longer.")
@click.argument("peer", metavar="PEER")
def deauthorize(session: Session, peer: str) -> None:
    """Let a device use this relay no longer.

    PEER is a peer id, else a name (`peerup names`), else the comment of a line. What could mean several is refused.
    A running relay ends its connections, its reservation and its circuits at once.
    """
    from actors.gate.authorized_keys_file import remove_peer

    _relay_config(session)
    path = authorized_keys_path(session)
    found = find_listed_peer(session, path, peer)
    remove_peer(path, found)
    data = {"peer_id": str(found), "removed": True}
    told = tell_unauthorized(session, path, found)
    report(session, f"{found} may use this relay no longer", data, told, what="relay")


@command("list-peers", json_output=True)
def list_peers(session: Session) -> None:
    """Show who may use this relay, and what they use of it now.

    EXPIRES: until when it may be used. RESERVED FOR: how long the device can still be reached through it; devices renew
    that by themselves. CIRCUITS, BYTES: open connections through the relay that the device is an end of, and what
    passed over these.
    """
    from actors.gate.authorized_keys_file import load_authorized_keys
    from peerup.cli.auth import present, when
    from peerup.client import NotRunningError

    _relay_config(session)
    path = authorized_keys_path(session)
    keys = load_authorized_keys(path)
    try:
        relay = session.client.get("/v1/relay")
        connected = {peer["peer_id"] for peer in session.client.get("/v1/peers") if peer["connections"]}
    except NotRunningError:
        relay, connected = None, set()
    listed = [present(entry) for entry in keys.entries]
    known = {item["peer_id"] for item in listed}
    data = [item | _use(item["peer_id"], relay, connected, authorized=True) for item in listed]
    for peer_id in sorted(_users(relay) - known):  # guests, where gating is off
        guest = dict.fromkeys(listed[0] if listed else ("line", "expires", "verified"))
        data.append(guest | {"peer_id": peer_id, "comment": ""} | _use(peer_id, relay, connected, authorized=False))
    columns = (
        Column("PEER"),
        Column("COMMENT", fold=True),
        Column("EXPIRES"),
        Column("ONLINE"),
        Column("RESERVED FOR", right=True),
        Column("CIRCUITS", right=True),
        Column("BYTES", right=True),
    )

    def human() -> None:
        rows = [
            (
                short_id(item["peer_id"]),
                item["comment"] or ("" if item["authorized"] else "(guest)"),
                when(item) if item["authorized"] else "-",
                _yes(item["connected"]),
                _left(item["reserved_until"]) if item["reserved"] else _yes(item["reserved"]),
                "-" if item["circuits"] is None else item["circuits"],
                "-" if item["bytes"] is None else size(item["bytes"]),
            )
            for item in data
        ]
        table(columns, rows, empty="nobody may use this relay; see `peerup relay authorize --help`")
        if relay is None:
            click.echo("the relay is not running, so nothing is known of connections and circuits")
        elif relay["reservations"] > len(relay["held"]) or relay["circuits"] > len(relay["open"]):
            click.echo(
                f"{relay['reservations']} reservations and {relay['circuits']} circuits are too many to tell all"
            )

    session.show(data, human)
    note_in_force(path, keys, node_keys(session))


def _use(peer_id: str, relay: dict[str, Any] | None, connected: set[str], *, authorized: bool) -> dict[str, Any]:
    """What a peer uses of the relay now; None where that is not known: a large relay does not tell all one by one."""
    use: dict[str, Any] = dict.fromkeys(("connected", "reserved", "reserved_until", "circuits", "bytes"))
    if relay is not None:
        use["connected"] = peer_id in connected
        use["reserved_until"] = next((item["expires"] for item in relay["held"] if item["peer_id"] == peer_id), None)
        if use["reserved_until"] is not None or relay["reservations"] <= len(relay["held"]):
            use["reserved"] = use["reserved_until"] is not None
        if relay["circuits"] <= len(relay["open"]):
            circuits = [item for item in relay["open"] if peer_id in (item["source"], item["destination"])]
            use["circuits"] = len(circuits)
            use["bytes"] = sum(item["to_destination"] + item["to_source"] for item in circuits)
    return use | {"authorized": authorized}


def _users(relay: dict[str, Any] | None) -> set[str]:
    if relay is None:
        return set()
    ends = {item[end] for item in relay["open"] for end in ("source", "destination")}
    return ends | {item["peer_id"] for item in relay["held"]}


def _yes(value: bool | None) -> str:  # noqa: FBT001  # a value to print, not a switch
    return "-" if value is None else "yes" if value else "no"


def _left(until: float) -> str:
    import time

    return span(max(0.0, until - time.time()))


# config


@click.group("config", epilog=examples("peerup relay config validate", "peerup relay config validate config.yaml"))
def config() -> None:
    """Check the configuration of a relay."""


@command("validate", json_output=True)
@click.argument("path", metavar="[FILE]", type=click.Path(path_type=Path), required=False)
def validate(session: Session, path: Path | None) -> None:
    """Check a relay's configuration, by default this home's. Exit status 1 if it cannot be served.

    Every problem is shown with its line; unknown keys are warnings. Says which keys of a running relay take effect only
    when it is started again. FILE may also be the relay-server.yaml of a
    peer-up relay: then it is said what `peerup relay setup --import` would make of it.
    """
    from actors.config.relay_init import check_relay_config

    file = path or session.home.config_file
    found = check_relay_config(file, whole_home=path is None)
    later = after_restart(session) if path is None and not found.problems else None
    data = {
        "file": str(file),
        "valid": not found.problems,
        "kind": found.kind,
        "problems": [{"line": item.line, "key": item.key, "reason": item.reason} for item in found.problems],
        "warnings": [{"line": item.line, "key": item.key, "reason": item.reason} for item in found.warnings],
        "after_restart": later,
    }
    if found.problems and not session.as_json:
        for warning in found.warnings:
            note(f"warning: {warning}")
        lines = "\n".join(f"  {problem}" for problem in found.problems)
        raise Failure(f"{file} cannot be served:\n{lines}", code="bad-config")

    def human() -> None:
        for warning in found.warnings:
            note(f"warning: {warning}")
        good(f"{file}: valid{', of a peer-up relay' if found.kind == 'peer-up' else ''}")
        note_after_restart(later)

    session.show(data, human)
    if found.problems:
        raise click.exceptions.Exit(1)


config.add_command(validate)
