"""Two nodes, one tunnel, and a hammer.

Starts two complete nodes on loopback, tunnels to a real web server and a real OpenSSH server, then kills every actor
of both nodes with SIGKILL, one after another, while a transfer runs, and shows what that did. Exit status 0 only if
all of it held.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from demo.node import DemoError, Node
from demo.services import LARGE, SshServer, WebServer, wait_for_port
from demo.transfer import LongDownload, fetch

AGAIN_WITHIN = 1.0
"""Seconds after any kill within which a new connection through the tunnel must have succeeded."""
ON_ITS_WAY = 16 * 1024 * 1024
"""Bytes; more than all buffers between the killed process and the client hold."""
BACK_WITHIN = 10.0
"""Seconds after which the demonstration gives up waiting for a killed actor."""

console = Console(highlight=False)


IN_THE_PATH = {"switchboard", "root"}
"""Killing one of these cuts the running transfer: the switchboard carries it, and root takes its children along."""


@dataclass
class Kill:
    """What one SIGKILL did. Times in seconds."""

    node: str
    actor: str
    back: float
    served: float
    transfer: str


def main() -> int:
    """Run the demonstration; the exit status."""
    began = time.monotonic()
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="peerup-demo-")))
        laptop, home = Node("laptop", directory), Node("home", directory)
        try:
            measured = _demonstrate(stack, directory, laptop, home)
        except DemoError as error:
            console.print(f"[bold red]The demonstration failed:[/] {error}")
            for node in (laptop, home):
                log = directory / f"{node.name}.log"
                console.rule(f"the end of {node.name}'s log")
                console.print(log.read_text(errors="replace")[-3000:], markup=False)
            measured = None
        finally:
            left = laptop.stop() | home.stop()
    if left:
        console.print(f"[bold red]Processes left behind:[/] {sorted(left)}")
    if measured is None or left:
        return 1
    _print_measured([*measured, ("whole demonstration", f"{time.monotonic() - began:.1f} s")])
    console.print("No process left. All of it held.")
    return 0


def _demonstrate(stack: ExitStack, directory: Path, laptop: Node, home: Node) -> list[tuple[str, str]]:
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
    web = WebServer(directory)
    stack.callback(web.stop)
    wait_for_port(web.port)
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
    kills = _kill_everything(port, web, laptop, home)
    _print_kills(kills)
    slow = [kill for kill in kills if kill.served > AGAIN_WITHIN]
    if slow:
        raise DemoError(f"no new connection within {AGAIN_WITHIN} s after killing {', '.join(k.actor for k in slow)}")
    cut = {kill.actor for kill in kills if kill.transfer == "cut"}
    if not cut <= IN_THE_PATH:
        raise DemoError(f"the transfer was cut by killing {', '.join(sorted(cut - IN_THE_PATH))}, not in its path")
    return [
        ("node ready", f"{started:.2f} s"),
        ("64 MiB through the tunnel", f"{speed:.0f} MB/s"),
        ("ssh through the tunnel", ssh),
        ("actors killed", str(len(kills))),
        ("killed actor answering again, median / worst", _spread([kill.back for kill in kills])),
        ("new tunnelled connection after a kill, median / worst", _spread([kill.served for kill in kills])),
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


def _kill_everything(port: int, web: WebServer, laptop: Node, home: Node) -> list[Kill]:
    kills: list[Kill] = []
    download = LongDownload(port, "large.bin", web.files["large.bin"])
    try:
        _wait(lambda: download.received > 0, "the transfer to begin")
        for node in (laptop, home):
            names = [actor["name"] for actor in node.actors()]
            kills.extend(_kill(node, name, port, web, download) for name in names)
        whole = download.finished
        _wait(lambda: download.finished > whole, "a whole file after the storm")
    finally:
        download.stop()
    if download.wrong:
        raise DemoError(f"{download.wrong} downloads had a wrong content")
    console.print(
        f"meanwhile: {download.received / 1e6:.0f} MB downloaded, {download.finished} whole files with the right hash, "
        f"{download.broken} cut off by a kill in their path, 0 with a wrong content"
    )
    return kills


def _kill(node: Node, name: str, port: int, web: WebServer, download: LongDownload) -> Kill:
    _wait(lambda: _actor(node, name).get("state") == "running", f"{name} to run")
    pid = _actor(node, name)["pid"]
    _wait(lambda: download.is_under_way, "the transfer to go on")
    before, received = download.broken, download.received
    killed = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    served = _first_success(lambda: fetch(port, "hello.txt", timeout=AGAIN_WITHIN)[0] == web.files["hello.txt"])
    back = _first_success(lambda: _actor(node, name).get("state") == "running" and _actor(node, name)["pid"] != pid)
    # What is on its way past the killed process still arrives; only after that does an end show, if there is one.
    _wait(lambda: download.broken > before or download.received > received + ON_ITS_WAY, "the transfer's fate")
    return Kill(node.name, name, back - killed, served - killed, "cut" if download.broken > before else "untouched")


def _actor(node: Node, name: str) -> dict[str, Any]:
    return next((actor for actor in node.actors() if actor["name"] == name), {})


def _first_success(attempt: Any) -> float:
    until = time.monotonic() + BACK_WITHIN
    while True:
        try:
            if attempt():
                return time.monotonic()
        except (OSError, DemoError):
            pass
        if time.monotonic() > until:
            raise DemoError(f"not again within {BACK_WITHIN} s")


def _wait(condition: Any, what: str) -> None:
    until = time.monotonic() + BACK_WITHIN
    while not condition():
        if time.monotonic() > until:
            raise DemoError(f"waited {BACK_WITHIN} s in vain for {what}")
        time.sleep(0.002)


def _spread(seconds: list[float]) -> str:
    ordered = sorted(seconds)
    return f"{ordered[len(ordered) // 2] * 1000:.0f} / {ordered[-1] * 1000:.0f} ms"


def _print_kills(kills: list[Kill]) -> None:
    table = Table("node", "killed actor", "back after", "new connection after", "running transfer")
    for kill in kills:
        table.add_row(
            kill.node, kill.actor, f"{kill.back * 1000:.0f} ms", f"{kill.served * 1000:.0f} ms", kill.transfer
        )
    console.print(table)


def _print_measured(rows: list[tuple[str, str]]) -> None:
    table = Table("measured", "here, now")
    for row in rows:
        table.add_row(*row)
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
