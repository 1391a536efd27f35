"""The command line."""

from __future__ import annotations

import click

from peerup.cli.framework import EXIT_CODES, LazyGroup

COMMANDS = {
    "init": "peerup.cli.identity:init",
    "whoami": "peerup.cli.identity:whoami",
    "auth": "peerup.cli.auth:auth",
    "daemon": "peerup.daemon:command",
    "stop": "peerup.cli.node:stop",
    "status": "peerup.cli.node:status",
    "doctor": "peerup.cli.doctor:doctor",
    "ping": "peerup.cli.peers:ping",
    "paths": "peerup.cli.paths:paths",
    "traceroute": "peerup.cli.paths:traceroute",
    "connect": "peerup.cli.peers:connect",
    "disconnect": "peerup.cli.peers:disconnect",
    "resolve": "peerup.cli.peers:resolve",
    "service": "peerup.cli.services:service",
    "proxy": "peerup.cli.proxies:proxy",
    "names": "peerup.cli.names:names",
    "relay": "peerup.cli.relay:relay",
    "config": "peerup.cli.config:config",
    "actors": "peerup.cli.actors:actors",
    "log": "peerup.cli.actors:log",
    "deadletters": "peerup.cli.actors:deadletters",
    "tap": "peerup.cli.trace:tap",
    "why": "peerup.cli.trace:why",
    "fault": "peerup.cli.faults:fault",
    "completion": "peerup.cli.shell:completion",
    "version": "peerup.cli.shell:version",
}


@click.group(
    cls=LazyGroup,
    sources=COMMANDS,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80},
    epilog=f"""\b
First steps:
  peerup init                               make this device's identity
  peerup auth add PEER_ID --comment laptop  let another device in
  peerup service add ssh 127.0.0.1:22       offer a service to it
  peerup daemon                             run the node
  peerup proxy home ssh 2222                reach a peer's service

{EXIT_CODES}""",
)
@click.option("--home", metavar="DIR", envvar="PEERUP_HOME", help="The node's directory (default: the XDG places).")
@click.version_option(package_name="peerup", prog_name="peerup", message="%(prog)s %(version)s")
def cli(home: str | None) -> None:
    """Encrypted tunnels to the services on your own devices."""


def main() -> None:
    """Entry point of the `peerup` program."""
    cli(prog_name="peerup")
