"""`peerup names`: friendly names of peers, and where they are."""

from __future__ import annotations

import click

from peerup.cli.files import find_peer_id, not_this_node, read_config, report, tell_config
from peerup.cli.framework import Session, command, examples
from peerup.cli.output import Column, table


@click.group(
    "names",
    epilog=examples(
        "peerup names add home 12D3KooW... --address /ip4/192.0.2.7/tcp/4001",
        "peerup names add home 12D3KooW... --address /dns/home.example/tcp/4001",
        "peerup names list",
    ),
)
def names() -> None:
    """Give peers names, and say where they are. A running node takes changes over at once."""


@command("add", json_output=True)
@click.argument("name")
@click.argument("peer_id")
@click.option("--address", "addresses", multiple=True, metavar="MULTIADDR", help="Where the peer is (repeatable).")
@click.option("--replace", is_flag=True, help="Let the name mean this peer from now on, with these addresses alone.")
def add(session: Session, name: str, peer_id: str, addresses: tuple[str, ...], *, replace: bool) -> None:
    """Call the peer with this id NAME, and remember where it is."""
    from actors.config.file import edit_config
    from protocol.multiaddr import Multiaddr

    peer = not_this_node(session, find_peer_id(peer_id))
    places = [Multiaddr(address) for address in addresses]
    with edit_config(session.home.config_file) as editor:
        editor.add_name(name, peer, replace=replace)
        if replace:
            editor.set_addresses(peer, places)
        else:
            editor.add_addresses(peer, places)
        known = next((entry.addresses for entry in editor.config.addresses if entry.peer == peer), ())
    data = {"name": name, "peer_id": str(peer), "addresses": [str(address) for address in known]}
    report(session, f"{name} is {peer}", data, tell_config(session))


@command("remove", json_output=True)
@click.argument("name")
def remove(session: Session, name: str) -> None:
    """Forget a name, and with a peer's last name its addresses."""
    from actors.config.file import edit_config

    with edit_config(session.home.config_file) as editor:
        peer = editor.remove_name(name)
    data = {"name": name, "peer_id": str(peer), "removed": True}
    report(session, f"{name} is forgotten", data, tell_config(session))


@command("list", json_output=True)
def list_names(session: Session) -> None:
    """Show the names, and where the peers are."""
    config = read_config(session)
    places = {entry.peer: [str(address) for address in entry.addresses] for entry in config.addresses}
    data = [
        {"name": entry.name, "peer_id": str(entry.peer), "addresses": places.get(entry.peer, [])}
        for entry in config.names
    ]
    named = {entry.peer for entry in config.names}
    data.extend(
        {"name": "", "peer_id": str(peer), "addresses": known} for peer, known in places.items() if peer not in named
    )
    columns = (Column("NAME", fold=True), Column("PEER ID", fold=True), Column("ADDRESSES", fold=True))
    rows = [(item["name"] or "-", item["peer_id"], "\n".join(item["addresses"]) or "-") for item in data]
    session.show(data, lambda: table(columns, rows, empty="no names; see `peerup names add --help`"))


for _command in (add, list_names, remove):
    names.add_command(_command)
