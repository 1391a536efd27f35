"""Two nodes, one tunnel, and a hammer; then two more that meet only through a relay.

Starts two complete nodes on loopback, tunnels to a real web server and a real OpenSSH server, then kills every actor
of both nodes with SIGKILL, one after another, while a transfer runs, and shows what that did. Then starts a relay and
two nodes that listen nowhere, and does the same to what their connection depends on. Exit status 0 only if all of it
held.
"""

from __future__ import annotations

import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from demo.hammer import Storm, spread, storm
from demo.node import DemoError, Node
from demo.relayed import Relayed
from demo.services import LARGE, SshServer, WebServer, wait_for_port
from demo.transfer import fetch

AGAIN_WITHIN = 1.0
"""Seconds after any kill within which a new connection through the tunnel must have succeeded."""
console = Console(highlight=False)


IN_THE_PATH = {"switchboard", "root"}
"""Killing one of these cuts the running transfer: the switchboard carries it, and root takes its children along."""


def main() -> int:
    """Run the demonstration; the exit status."""
    began = time.monotonic()
    left: set[int] = set()
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="peerup-demo-")))
        laptop, home = Node("laptop", directory), Node("home", directory)
        relayed = Relayed(directory)
        nodes = (laptop, home, *relayed.nodes)
        try:
            web = WebServer(directory)
            stack.callback(web.stop)
            wait_for_port(web.port)
            measured = _demonstrate(stack, directory, web, laptop, home)
            left = laptop.stop() | home.stop()  # the machine may be small, and they are done
            more, kills = relayed.demonstrate(console, web)
            _print_kills(kills)
            measured += more
        except DemoError as error:
            console.print(f"[bold red]The demonstration failed:[/] {error}")
            for node in nodes:
                log = directory / f"{node.name}.log"
                console.rule(f"the end of {node.name}'s log")
                console.print(log.read_text(errors="replace")[-3000:], markup=False)
            measured = None
        finally:
            # Backwards: a relay that still had circuits would give them time to end.
            left = left.union(*(node.stop() for node in reversed(nodes)))
    if left:
        console.print(f"[bold red]Processes left behind:[/] {sorted(left)}")
    if measured is None or left:
        return 1
    _print_measured([*measured, ("whole demonstration", f"{time.monotonic() - began:.1f} s")])
    console.print("No process left. All of it held.")
    return 0


def _demonstrate(stack: ExitStack, directory: Path, web: WebServer, laptop: Node, home: Node) -> list[tuple[str, str]]:
    console.rule("two nodes, each with its own identity, in its own directory")
    for node in (laptop, home):
        node.initialise()
        console.print(f"{node.name:7} {node.peer_id}\n        {node.address}")
    laptop.run("auth", "add", home.peer_id, "--comment", "home")
    home.run("auth", "add", laptop.peer_id, "--comment", "laptop")
    laptop.run("names", "add", "home", home.peer_id, "--address", home.address)
    started = max(laptop.start(), home.start())
    console.print(f"both ready, the slower one after {started:.2f} s")

    console.rule("a web server behind home, reached from laptop")
    home.run("service", "add", "web", f"127.0.0.1:{web.port}")
    port = _port(laptop.run_json("proxy", "home", "web", "0"))
    speed = 0.0
    for name, sha256 in web.files.items():
        got, seconds = fetch(port, name)
        if got != sha256:
            raise DemoError(f"{name} came through with another content")
        if name == "large.bin":
            speed = LARGE / seconds / 1e6
        console.print(f"http://127.0.0.1:{port}/{name:9} right sha256 {got[:12]}…, {seconds * 1000:.1f} ms")
    ssh = _try_ssh(stack, directory, laptop, home)

    for node in (laptop, home):
        console.rule(f"peerup actors ({node.name})")
        console.print(node.run("actors"), markup=False, end="")

    console.rule("SIGKILL for every actor, one after another, while a transfer runs")
    victims = [(node, actor["name"]) for node in (laptop, home) for actor in node.actors()]
    result = storm(port, web, victims)
    _print_kills(result)
    result.check(AGAIN_WITHIN, lambda kill: kill.actor in IN_THE_PATH)
    kills = result.kills
    return [
        ("node ready", f"{started:.2f} s"),
        ("64 MiB through the tunnel", f"{speed:.0f} MB/s"),
        ("ssh through the tunnel", ssh),
        ("actors killed", str(len(kills))),
        ("killed actor answering again, median / worst", spread([kill.back for kill in kills])),
        ("new tunnelled connection after a kill, median / worst", spread([kill.served for kill in kills])),
    ]


def _port(printed: Any) -> int:
    return int(printed["listen"].rpartition(":")[2])


def _try_ssh(stack: ExitStack, directory: Path, laptop: Node, home: Node) -> str:
    if not SshServer.available():
        console.print("ssh: skipped, there is no sshd on this machine")
        return "skipped: no sshd here"
    server = SshServer(directory)
    stack.callback(server.stop)
    wait_for_port(server.port)
    home.run("service", "add", "ssh", f"127.0.0.1:{server.port}")
    port = _port(laptop.run_json("proxy", "home", "ssh", "0"))
    began = time.monotonic()
    said = server.session("-p", str(port))
    seconds = time.monotonic() - began
    console.print(f"ssh -p {port} 127.0.0.1: {said!r}, whole session {seconds * 1000:.0f} ms")
    proxy_command = " ".join(laptop.command("proxy", "home", "ssh", "--stdio"))
    said = server.session("-o", f"ProxyCommand={proxy_command}")
    console.print(f"ssh -o ProxyCommand='peerup proxy home ssh --stdio': {said!r}")
    return f"{seconds * 1000:.0f} ms for a session"


def _print_kills(result: Storm) -> None:
    table = Table("node", "killed actor", "back after", "new connection after", "running transfer")
    for kill in result.kills:
        table.add_row(
            kill.node, kill.actor, f"{kill.back * 1000:.0f} ms", f"{kill.served * 1000:.0f} ms", kill.transfer
        )
    console.print(table)
    console.print(result.meanwhile)


def _print_measured(rows: list[tuple[str, str]]) -> None:
    table = Table("measured", "here, now")
    for row in rows:
        table.add_row(*row)
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
