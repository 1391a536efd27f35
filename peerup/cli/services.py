"""`peerup service`: what this node offers to its peers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import click

from peerup.cli.files import authorized_keys_path, find_other_peer, read_config, report, tell_config
from peerup.cli.framework import Session, command, examples
from peerup.cli.output import Column, note, short_id, table

if TYPE_CHECKING:
    from protocol.peer_id import PeerId


@click.group(
    "service",
    epilog=examples(
        "peerup service add ssh 127.0.0.1:22",
        "peerup service add web localhost:8080 --allow laptop",
        "peerup service disable web",
        "peerup service list",
    ),
)
def service() -> None:
    """Say which local TCP services peers may use. A running node takes changes over at once."""


@command("add", json_output=True)
@click.argument("name")
@click.argument("address", metavar="HOST:PORT")
@click.option(
    "--allow", multiple=True, metavar="PEER", help="Only for this peer (repeatable; default: all authorised)."
)
@click.option("--disabled", is_flag=True, help="Write it down, but do not offer it yet.")
def add(session: Session, name: str, address: str, allow: tuple[str, ...], *, disabled: bool) -> None:
    """Offer the service at HOST:PORT to peers under NAME."""
    from actors.config.file import edit_config

    peers = list(dict.fromkeys(find_other_peer(session, peer) for peer in allow)) or None
    with edit_config(session.home.config_file) as editor:
        editor.add_service(name, address, allowed_peers=peers, enabled=not disabled)
    data = {"name": name, "address": address, "enabled": not disabled, "allowed_peers": _texts(peers)}
    told = tell_config(session, f"service/{name}")
    _note_unauthorised(session, peers or ())
    report(session, f"peers can {'later ' if disabled else ''}reach {address} as {name}", data, told)


def _note_unauthorised(session: Session, peers: Iterable[PeerId]) -> None:
    """Tell a person who may use a service and cannot connect."""
    from actors.gate.authorized_keys_file import load_authorized_keys

    if not read_config(session).security.enable_connection_gating:
        return
    path = authorized_keys_path(session)
    listed = {entry.peer for entry in load_authorized_keys(path).entries} if path.exists() else set()
    for peer in peers:
        if peer not in listed:
            note(f"warning: {peer} may use the service and not connect: it is not in {path} (peerup auth add {peer})")


@command("remove", json_output=True)
@click.argument("name")
def remove(session: Session, name: str) -> None:
    """Offer a service no longer, and forget it."""
    from actors.config.file import edit_config

    with edit_config(session.home.config_file) as editor:
        editor.remove_service(name)
    report(
        session,
        f"{name} is no longer offered",
        {"name": name, "removed": True},
        tell_config(session, f"service/{name}"),
    )


@command("enable", json_output=True)
@click.argument("name")
def enable(session: Session, name: str) -> None:
    """Offer a service that was disabled."""
    _switch(session, name, enabled=True)


@command("disable", json_output=True)
@click.argument("name")
def disable(session: Session, name: str) -> None:
    """Offer a service no longer, without forgetting it."""
    _switch(session, name, enabled=False)


def _switch(session: Session, name: str, *, enabled: bool) -> None:
    from actors.config.file import edit_config

    with edit_config(session.home.config_file) as editor:
        changed = editor.set_service_enabled(name, enabled=enabled)
    text = f"{name} is {'' if changed else 'already '}{'enabled' if enabled else 'disabled'}"
    data = {"name": name, "enabled": enabled, "changed": changed}
    report(session, text, data, tell_config(session, f"service/{name}"))


@command("list", json_output=True)
def list_services(session: Session) -> None:
    """Show the services of this node."""
    config = read_config(session)
    names = {entry.peer: entry.name for entry in config.names}
    data = [
        {
            "name": entry.name,
            "address": entry.address,
            "enabled": entry.enabled,
            "allowed_peers": _texts(entry.allowed_peers),
        }
        for entry in config.services
    ]
    columns = (Column("NAME", fold=True), Column("ADDRESS", fold=True), Column("STATE"), Column("FOR", fold=True))
    rows = [
        (
            entry.name,
            entry.address,
            "enabled" if entry.enabled else "disabled",
            "all authorised peers"
            if entry.allowed_peers is None
            else ", ".join(names.get(peer) or short_id(str(peer)) for peer in entry.allowed_peers) or "nobody",
        )
        for entry in config.services
    ]
    session.show(data, lambda: table(columns, rows, empty="no services; see `peerup service add --help`"))


def _texts(peers: Iterable[PeerId] | None) -> list[str] | None:
    return None if peers is None else [str(peer) for peer in peers]


for _command in (add, list_services, remove, enable, disable):
    service.add_command(_command)
