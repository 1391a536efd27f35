"""`peerup init` and `peerup whoami`: the node's home and identity."""

from __future__ import annotations

import click

from peerup.cli.files import key_path
from peerup.cli.framework import Session, command, examples
from peerup.cli.output import good, note

DEFAULT_LISTEN = ("/ip4/0.0.0.0/tcp/4001", "/ip6/::/tcp/4001")


@command(
    "init",
    json_output=True,
    short_help="Make a node's home: configuration and key.",
    epilog=examples(
        "peerup init",
        "peerup init --yes --listen /ip4/127.0.0.1/tcp/4101",
        "peerup --home ~/nodes/laptop init --yes",
    ),
)
@click.option("--yes", is_flag=True, help="Ask nothing; take what the options say.")
@click.option(
    "--listen",
    multiple=True,
    metavar="MULTIADDR",
    help="Where to listen for peers (repeatable); `none` to listen nowhere and be reached through relays.",
)
@click.option("--network", metavar="NAME", help="A private network for peers to find each other in (no effect yet).")
def init(session: Session, listen: tuple[str, ...], network: str | None, *, yes: bool) -> None:
    """Make a node's home: configuration, identity key and the list of peers that may connect.

    An identity key that is already there is kept. A configuration is never overwritten.
    """
    from actors.config.init import init_node
    from actors.config.schema import NO_DISCOVERY
    from protocol.multiaddr import Multiaddr

    if not listen and not yes and not session.as_json and not session.home.config_file.exists():
        answer = click.prompt("Where to listen for peers (addresses, blanks between)", default=" ".join(DEFAULT_LISTEN))
        listen = tuple(answer.split())
    addresses = () if listen == ("none",) else tuple(Multiaddr(text) for text in listen or DEFAULT_LISTEN)
    made = init_node(session.home, listen_addresses=addresses, network=network)
    if network is not None:
        note(f"warning: --network is written down and has no effect yet: {NO_DISCOVERY}")
    home, peer_id = made.home, str(made.peer)

    def human() -> None:
        good(f"This node is {peer_id}")
        click.echo(f"  configuration    {home.config_file}")
        click.echo(f"  identity key     {home.key_file}{' (kept)' if made.kept_key else ''}")
        click.echo(f"  who may connect  {home.authorized_keys_file}{' (kept)' if made.kept_authorized_keys else ''}")
        click.echo("Next:")
        click.echo(f"  {session.program} auth add PEER_ID --comment NAME   let another device in")
        click.echo(f"  {session.program} service add ssh 127.0.0.1:22      offer a service to it")
        click.echo(f"  {session.program} daemon                            run the node")

    data = {
        "peer_id": peer_id,
        "config": str(home.config_file),
        "key": str(home.key_file),
        "kept_key": made.kept_key,
        "authorized_keys": str(home.authorized_keys_file),
        "listen_addresses": [str(address) for address in addresses],
    }
    session.show(data, human)


@command("whoami", json_output=True, short_help="Print this node's peer id.")
def whoami(session: Session) -> None:
    """Print this node's peer id: what other devices authorise it by."""
    from actors.keyring.key_file import load_key

    path = key_path(session)
    peer_id = str(load_key(path).peer_id)
    session.show({"peer_id": peer_id, "key": str(path)}, lambda: click.echo(peer_id))
