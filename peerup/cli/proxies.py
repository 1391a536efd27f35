"""`peerup proxy`: local listeners, or standard input and output, that lead to a peer's service."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from peerup.cli.files import own_peer
from peerup.cli.framework import DefaultGroup, Session, command, examples
from peerup.cli.output import Column, good, table

DEFAULT_HOST = "127.0.0.1"


@click.group(
    "proxy",
    cls=DefaultGroup,
    default="add",
    epilog=examples(
        "peerup proxy home ssh 2222             listen on 127.0.0.1:2222",
        "peerup proxy home web 0                listen on a free port",
        "peerup proxy home web 0.0.0.0:8080     let others use it, too",
        "peerup proxy home web 8080 --only-me   refuse other users of this machine",
        "peerup proxy home web --unix web.sock  listen at a file for you alone",
        "peerup proxy home ssh --stdio          one connection on stdin/stdout",
        "ssh -o ProxyCommand='peerup proxy home ssh --stdio' me@home",
        "ssh -o ProxyUseFdpass=yes \\",
        "    -o ProxyCommand='peerup proxy home ssh --fdpass' me@home",
        "peerup proxy list",
        "peerup proxy stop home ssh",
        "A peer that is called like a subcommand: peerup proxy add list ssh 2222",
    ),
)
def proxy() -> None:
    """Reach a service of a peer through a local port.

    The node keeps the listener, also after a restart, until `peerup proxy stop`.

    A local port is open to every user of this machine, and what they do there is done in your name. Where others use
    the machine, take --unix, --only-me or --stdio.
    """


@command("add", json_output=True)
@click.argument("peer")
@click.argument("service")
@click.argument("local_port", required=False)
@click.option(
    "--unix",
    "unix_path",
    type=click.Path(dir_okay=False),
    metavar="PATH",
    help="Listen at a Unix socket that only you may open, instead of a port.",
)
@click.option("--only-me", is_flag=True, help="Serve only connections of your own user (on the loopback interface).")
@click.option("--stdio", is_flag=True, help="Connect standard input and output instead of listening.")
@click.option("--fdpass", is_flag=True, help="Hand the connection itself over (ssh -o ProxyUseFdpass=yes).")
def add(
    session: Session,
    peer: str,
    service: str,
    local_port: str | None,
    *,
    unix_path: str | None,
    only_me: bool,
    stdio: bool,
    fdpass: bool,
) -> None:
    """Reach SERVICE of PEER through LOCAL_PORT (PORT, HOST:PORT, or 0 for a free port).

    Prints the address it listens on. A port is open to all users of this machine, unless --only-me is given: then
    connections of others are refused, and those whose user the kernel does not tell. With --unix, listens at a file of
    mode 0600, which is removed when the proxy stops. With --stdio, connects standard input and output, for one
    connection. With --fdpass, the program that started this one gets that connection as a descriptor, and no byte goes
    through here.
    """
    if peer == str(own_peer(session)):
        raise click.UsageError(f"{peer} is this node itself; name a peer whose service you want to reach")
    if stdio or fdpass:
        if local_port is not None or unix_path is not None or only_me:
            raise click.UsageError("--stdio and --fdpass listen on no port; leave LOCAL_PORT, --unix, --only-me out")
        from peerup.stdio import pass_on, pump

        if fdpass:
            pass_on(session.client.open_stdio(peer, service))
            return
        raise click.exceptions.Exit(pump(*session.client.open_tunnel(peer, service)))
    if unix_path is not None:
        if local_port is not None or only_me:
            raise click.UsageError("--unix takes no LOCAL_PORT, and needs no --only-me: only you may open the file")
        listen = f"unix:{Path(unix_path).absolute()}"
    elif local_port is None:
        raise click.UsageError("give the LOCAL_PORT to listen on (0 for a free one), or --stdio")
    else:
        listen = parse_listen(local_port)
    session.wait_message(f"opening {peer}/{service}...")
    data = session.client.post("/v1/proxies", {"peer": peer, "service": service, "listen": listen, "only_me": only_me})
    session.show(data, lambda: click.echo(data["listen"]))


def parse_listen(text: str) -> str:
    """`port` or `host:port` as `host:port`; IPv6 addresses in brackets.

    Raises:
        UsageError: it is neither.
    """
    host, _, port = text.rpartition(":")
    if not (port.isascii() and port.isdecimal() and int(port) <= 65535):
        raise click.UsageError(f"{text!r} is not a local port; write PORT, HOST:PORT or 0")
    if ":" in host and not (host.startswith("[") and host.endswith("]")):
        raise click.UsageError(f"write the IPv6 address in brackets, such as [::1]:{port}")
    return f"{host or DEFAULT_HOST}:{int(port)}"


@command("list", json_output=True)
def list_proxies(session: Session) -> None:
    """Show all proxies."""
    data = session.client.get("/v1/proxies")
    columns = (Column("PEER", fold=True), Column("SERVICE", fold=True), Column("LISTEN"), Column("STATE"))
    rows = [(item["peer"], item["service"], _where(item), item["state"]) for item in data]
    session.show(data, lambda: table(columns, rows, empty="no proxies; see `peerup proxy --help`"))


def _where(item: dict[str, Any]) -> str:
    """Where a proxy listens, for people."""
    return f"{item['listen'] or '(stdio)'}{' (only you)' if item['only_me'] else ''}"


@command("stop", json_output=True)
@click.argument("peer")
@click.argument("service", required=False)
def stop(session: Session, peer: str, service: str | None) -> None:
    """Stop a proxy and forget it: PEER SERVICE, or the actor's name proxy/PEER/SERVICE."""
    from peerup.client import segment

    if service is None and not peer.startswith("proxy/"):
        raise click.UsageError("name the peer and the service, as in `peerup proxy stop home ssh`")
    name = peer if service is None else f"proxy/{peer}/{service}"
    data = session.client.delete(f"/v1/proxies/{segment(name)}")
    session.show(data, lambda: good(f"stopped {name}"))


for _command in (add, list_proxies, stop):
    proxy.add_command(_command)
