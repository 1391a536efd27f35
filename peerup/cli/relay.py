"""`peerup relay add`, `list` and `remove`: the relays through which peers reach this node."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from peerup.cli.files import own_peer, read_config, report, tell_config
from peerup.cli.framework import LazyGroup, Session, command, examples
from peerup.cli.output import Column, short_id, size, span, styled, table

if TYPE_CHECKING:
    from protocol.multiaddr import Multiaddr
    from protocol.peer_id import PeerId

SERVER_COMMANDS: dict[str, str] = {
    name: f"peerup.cli.relay_server:{name.replace('-', '_')}"
    for name in ("setup", "serve", "info", "authorize", "deauthorize", "list-peers", "config")
}
"""Commands of a relay itself, as `name: module:attribute`."""

RESERVATIONS = {
    "starting": "being made",
    "connecting": "being made",
    "reserving": "being made",
    "held": "held",
    "renewing": "held",
    "waiting": "none",
}
"""What a person is told of each state: whether there is a reservation."""

STYLES = {"held": "green", "none": "red"}


@click.group(
    "relay",
    cls=LazyGroup,
    short_help="Use relays, or be one.",
    sources=SERVER_COMMANDS,
    epilog=examples(
        "peerup relay add /dns/relay.example/tcp/4001/p2p/12D3KooW...",
        "peerup relay list",
        "peerup relay remove 12D3KooW...",
    ),
)
def relay() -> None:
    """Use relays, so that peers reach this node behind its NAT; or be one.

    A relay carries connections where no direct path exists. It sees only ciphertext.
    """


@command("add", json_output=True)
@click.argument("addresses", metavar="MULTIADDR...", nargs=-1, required=True)
def add(session: Session, addresses: tuple[str, ...]) -> None:
    """Reach this node through these relays.

    Each address ends with the relay's peer id: .../p2p/12D3KooW... Several addresses of one relay are ways to the same
    relay. A running node takes the change over at once.
    """
    from actors.config.file import edit_config
    from protocol.errors import InvalidValueError
    from protocol.multiaddr import Multiaddr

    given = [Multiaddr(address) for address in addresses]
    if itself := [address for address in given if address.peer_id is not None and address.peer_id == own_peer(session)]:
        raise InvalidValueError(f"{itself[0]} is this node; name a relay that others can reach")
    with edit_config(session.home.config_file) as editor:
        added = editor.add_relays(given)
        known = editor.config.relay.addresses
    data = {"added": [str(address) for address in added], "relays": [str(address) for address in known]}
    text = "\n".join(f"added {address}" for address in added) or "known already; nothing to add"
    report(session, text, data, tell_config(session, "relay/keeper"))


@command("remove", json_output=True)
@click.argument("which", metavar="PEER|MULTIADDR")
def remove(session: Session, which: str) -> None:
    """Use a relay no longer: all of it, by peer id or name, or one of its addresses."""
    from actors.config.file import edit_config

    meant = _relay_meant(session, which)
    with edit_config(session.home.config_file) as editor:
        removed = editor.remove_relays(meant)
        known = editor.config.relay.addresses
    data = {"removed": [str(address) for address in removed], "relays": [str(address) for address in known]}
    report(session, "\n".join(f"removed {address}" for address in removed), data, tell_config(session, "relay/keeper"))


@command("list", json_output=True)
def list_relays(session: Session) -> None:
    """Show the relays, and whether peers can reach this node through each.

    RESERVATION: held (they can), being made, or none (they cannot; the reason is below). RENEWAL: when it is renewed,
    by itself. RTT: the time to the relay and back. CIRCUIT LIMIT: after what time, or how many bytes each way, the
    relay cuts a connection through it.
    """
    from peerup.client import NotRunningError

    try:
        data = session.client.get("/v1/relays")
    except NotRunningError:
        data = _configured(session)
    columns = (
        Column("RELAY"),
        Column("RESERVATION"),
        Column("RENEWAL", right=True),
        Column("RTT", right=True),
        Column("CIRCUIT LIMIT", fold=True),
    )

    def show() -> None:
        table(columns, [_row(item) for item in data], empty="no relays; see `peerup relay add --help`")
        for item in data:
            _explain(item)
        if data and data[0]["state"] is None:
            click.echo("the node is not running, so nothing is known of the reservations")

    session.show(data, show)


def _explain(item: dict[str, Any]) -> None:
    """What does not fit into a table; addresses in one piece, to be copied."""
    name = _name(item)
    reached = item["relayed_addresses"]
    click.echo(f"peers reach this node through {name} at" if reached else f"{name} is expected at")
    for address in reached or item["addresses"]:
        click.echo(f"  {address}")
    if item["last_failure"]:
        what = "not renewed: " if RESERVATIONS.get(item["state"]) == "held" else ""
        again = "" if item["next_attempt"] is None else f" (next attempt in {span(item['next_attempt'])})"
        click.echo(f"{name}: {what}{item['last_failure']}{again}")
    if item["warning"]:
        click.echo(f"{name}: {item['warning']}")


def _relay_meant(session: Session, which: str) -> PeerId | Multiaddr:
    from peerup.cli.files import find_peer
    from protocol.multiaddr import Multiaddr

    return Multiaddr(which) if which.startswith("/") else find_peer(session, which)


def _configured(session: Session) -> list[dict[str, Any]]:
    """What can be told of the relays without the node, in the form of `GET /v1/relays`."""
    config = read_config(session)
    names = {entry.peer: entry.name for entry in config.names}
    places: dict[PeerId, list[str]] = {}
    for address in config.relay.addresses:
        if address.peer_id is not None:
            places.setdefault(address.peer_id, []).append(str(address))
    unknown = ("expires_in", "held_for", "next_attempt", "limit_seconds", "limit_bytes", "rtt", "granted", "failed")
    return [
        {
            "peer_id": str(peer),
            "name": names.get(peer, ""),
            "addresses": addresses,
            "state": None,
            "relayed_addresses": [],
            "last_failure": "",
            "warning": "",
            **dict.fromkeys(unknown),
        }
        for peer, addresses in places.items()
    ]


def _name(item: dict[str, Any]) -> str:
    return item["name"] or short_id(item["peer_id"])


def _row(item: dict[str, Any]) -> tuple[Any, ...]:
    told = RESERVATIONS.get(item["state"], "-")
    return (
        _name(item),
        styled(told, STYLES.get(told, "")),
        span(item["next_attempt"]) if item["state"] == "held" else "now" if item["state"] == "renewing" else "-",
        "-" if item["rtt"] is None else f"{item['rtt'] * 1000:.1f}ms",
        _limit(item),
    )


def _limit(item: dict[str, Any]) -> str:
    """What a circuit may take, such as `2m00s, 128.0 KiB each way`."""
    if item["expires_in"] is None:
        return "-"
    parts = []
    if item["limit_seconds"] is not None:
        parts.append(span(item["limit_seconds"]))
    if item["limit_bytes"] is not None:
        parts.append(f"{size(item['limit_bytes'])} each way")
    return ", ".join(parts) or "unlimited"


for _command in (add, list_relays, remove):
    relay.add_command(_command)
