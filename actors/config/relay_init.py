"""Making a relay's home, and judging a configuration by what a relay needs.

A relay's home is a node's home with another configuration: the section `relay_service` written out with every limit,
and `enabled: true`. A peer-up relay can be taken over with its identity and its list of peers, so that its clients
notice nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from actors.config.file import parse_config, read_config_text
from actors.config.init import NewNode, init_node
from actors.config.paths import NodeHome
from actors.config.peer_up_relay import PeerUpRelay, is_peer_up_relay, read_peer_up_relay
from actors.config.reader import Problem
from actors.config.schema import ConfigError, NodeConfig, check_served
from actors.config.template import render_config
from actors.config.yaml_text import YamlSyntaxError, parse_yaml, set_value
from actors.files import FileError, FileExistsAlreadyError, create_exclusive, make_private_directory
from actors.gate.authorized_keys_file import load_authorized_keys
from actors.keyring.key_file import KeyFileError, load_key
from protocol.errors import InvalidValueError
from protocol.multiaddr import Multiaddr

SECTION = "relay_service"

Setting = tuple[tuple[str, ...], int | str]
"""The path of a key below `relay_service`, and its value."""


@dataclasses.dataclass(frozen=True)
class RelaySettings:
    """What a new relay is to be.

    Attributes:
        listen_addresses: where it listens; may be empty where `imported` says it.
        announce_addresses: where clients find it; empty to find out.
        limits: settings below `relay_service`, such as `(("circuits", "per_peer"), 64)`.
        imported: the `relay-server.yaml` of a peer-up relay to take over.
    """

    listen_addresses: tuple[Multiaddr, ...] = ()
    announce_addresses: tuple[Multiaddr, ...] = ()
    limits: tuple[Setting, ...] = ()
    imported: Path | None = None


@dataclasses.dataclass(frozen=True)
class NewRelay:
    """What was made. `notes` tells what an imported configuration said that is not taken over."""

    node: NewNode
    config: NodeConfig
    notes: tuple[Problem, ...]


def init_relay(home: NodeHome, settings: RelaySettings) -> NewRelay:
    """Make a relay's home: all of it, or nothing. A key or authorized_keys found there are kept.

    Raises:
        FileExistsAlreadyError: there is a configuration already, or a key beside one to be imported.
        FileError, KeyFileError: something cannot be made or read, or a key cannot be used.
        ConfigError: the configuration to be imported is broken.
        InvalidValueError: a limit, or an address, cannot be.
    """
    if home.config_file.exists():
        raise FileExistsAlreadyError(
            f"{home.config_file} exists already and is not overwritten; for another relay choose another --home"
        )
    check_served(settings.listen_addresses)
    imported = None if settings.imported is None else _read_imported(settings.imported)
    text = _render(settings, imported)
    config = _checked(text, home.config_file)
    with contextlib.ExitStack() as undo:
        if imported is not None:
            _copy_files(home, imported, undo)
        node = init_node(home, text=text)
        undo.pop_all()
    return NewRelay(node, config, () if imported is None else imported.notes)


def render_relay_config(listen_addresses: Sequence[Multiaddr]) -> str:
    """The text of a relay's `config.yaml`: a node's, with the section `relay_service` written out and enabled."""
    lines = []
    inside = False
    for line in render_config(listen_addresses).splitlines():
        inside = line == f"# {SECTION}:" or (inside and line.startswith("#"))
        lines.append(line[2:] if inside else line)
    return set_value("\n".join(lines) + "\n", (SECTION, "enabled"), value=True)


@dataclasses.dataclass(frozen=True)
class Checked:
    """What a configuration file is worth for a relay.

    Attributes:
        kind: `peerup` or `peer-up`, whose relay's configuration it is.
        problems: why it cannot be served; none if it can.
        warnings: what is not understood or not taken over.
    """

    kind: str
    problems: tuple[Problem, ...]
    warnings: tuple[Problem, ...]


def check_relay_config(file: Path, *, whole_home: bool) -> Checked:
    """Judge this file, with `whole_home` also the key and the authorized_keys that it names.

    Raises:
        FileError: it cannot be read, or others may write to it.
    """
    try:
        text = read_config_text(file)
        values = parse_yaml(text)
    except ConfigError as error:
        return Checked("peerup", error.problems, ())
    except YamlSyntaxError as error:
        return Checked("peerup", (error.problem,), ())
    if is_peer_up_relay(values):
        return _check_peer_up(values, file)
    try:
        config = parse_config(text, file)
    except ConfigError as error:
        return Checked("peerup", error.problems, ())
    problems = []
    if not config.relay_service.enabled:
        problems.append(Problem(f"{SECTION}.enabled", "is not true, so this is no relay", _line(values)))
    if whole_home:
        problems += _file_problems(config)
    warnings = list(config.warnings)
    if not config.security.enable_connection_gating:
        reason = "is false: everybody may use this relay, within guest_circuit"
        warnings.append(Problem("security.enable_connection_gating", reason))
    return Checked("peerup", tuple(problems), tuple(warnings))


def _file_problems(config: NodeConfig) -> list[Problem]:
    """What is wrong with the files that the configuration names."""
    problems = []
    try:
        load_key(config.key_path)
    except (FileError, KeyFileError) as error:
        problems.append(Problem("identity.key_file", str(error)))
    if any(address.value("tls") is not None for address in config.network.listen_addresses):
        for name in ("certificate_file", "key_file"):
            path = config.path(getattr(config.network.tls, name))
            if not os.access(path, os.R_OK):
                problems.append(Problem(f"network.tls.{name}", f"{path} is not there, or cannot be read"))
    try:
        keys = load_authorized_keys(config.authorized_keys_path)
    except FileError as error:
        problems.append(Problem("security.authorized_keys_file", str(error)))
    else:
        where = f"security.authorized_keys_file: {config.authorized_keys_path}"
        problems += [Problem(where, f"line {item.line}: {item.reason}") for item in keys.problems if item.fatal]
    return problems


def _check_peer_up(values: Any, file: Path) -> Checked:
    try:
        found = read_peer_up_relay(values, file)
    except ConfigError as error:
        return Checked("peer-up", error.problems, ())
    return Checked("peer-up", (), found.notes)


def _read_imported(file: Path) -> PeerUpRelay:
    text = read_config_text(file)
    try:
        values = parse_yaml(text)
    except YamlSyntaxError as error:
        raise ConfigError(file, (error.problem,)) from error
    if not is_peer_up_relay(values):
        raise InvalidValueError(f"{file} is not the configuration of a peer-up relay; it has no section `resources`")
    found = read_peer_up_relay(values, file)
    load_key(found.key_file)  # refused now, not when half of the home is made
    return found


def _render(settings: RelaySettings, imported: PeerUpRelay | None) -> str:
    listen = settings.listen_addresses or (() if imported is None else imported.listen_addresses)
    text = render_relay_config(listen)
    limits = settings.limits
    if imported is not None:
        limits = (*imported.limits, *limits)
        if not imported.gating:
            text = set_value(text, ("security", "enable_connection_gating"), value=False)
        if imported.network is not None:
            text = set_value(text, ("discovery", "network"), imported.network)
        if imported.metrics is not None:
            text = set_value(text, ("telemetry", "metrics", "enabled"), value=True)
            text = set_value(text, ("telemetry", "metrics", "listen_address"), imported.metrics)
        if imported.audit:
            text = set_value(text, ("telemetry", "audit", "enabled"), value=True)
    if settings.announce_addresses:
        announced = [str(address) for address in settings.announce_addresses]
        text = set_value(text, (SECTION, "announce_addresses"), announced)
    for path, value in limits:
        try:
            text = set_value(text, (SECTION, *path), value)
        except (YamlSyntaxError, TypeError) as error:
            raise InvalidValueError(f"{'.'.join(path)} is not a limit of a relay") from error
    return text


def _checked(text: str, file: Path) -> NodeConfig:
    """The configuration in this text. Every key must be known: a limit with a slip in its name limits nothing."""
    try:
        config = parse_config(text, file)
    except ConfigError as error:
        # The lines are those of a file that is not there yet.
        raise InvalidValueError("; ".join(f"{item.key}: {item.reason}" for item in error.problems)) from error
    unknown = [warning.key for warning in config.warnings if warning.key.startswith(f"{SECTION}.")]
    if unknown:
        raise InvalidValueError(f"{', '.join(unknown)}: there is no such key; `peerup relay info` shows all limits")
    return config


def _copy_files(home: NodeHome, imported: PeerUpRelay, undo: contextlib.ExitStack) -> None:
    """Put the imported relay's key and its list of peers where those of this home belong."""
    key = load_key(imported.key_file)
    home.check()
    make_private_directory(home.config_dir)
    create_exclusive(home.key_file, key.to_protobuf(), mode=0o600)
    undo.callback(home.key_file.unlink, missing_ok=True)
    if imported.authorized_keys_file.exists():
        content = load_authorized_keys(imported.authorized_keys_file).to_bytes()
        create_exclusive(home.authorized_keys_file, content)
        undo.callback(home.authorized_keys_file.unlink, missing_ok=True)


def _line(values: Any) -> int | None:
    """The line of the section, where it is known."""
    positions = getattr(values, "lc", None)
    return None if positions is None or SECTION not in values else int(positions.key(SECTION)[0]) + 1
