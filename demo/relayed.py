"""Two nodes that listen nowhere, and so reach each other only through a relay of one's own."""

from __future__ import annotations

import functools
from pathlib import Path

from rich.console import Console

from demo.hammer import Storm, spread, storm, wait
from demo.node import DemoError, Node
from demo.services import LARGE, WebServer
from demo.transfer import fetch

AGAIN_WITHIN = 3.0
"""Seconds after any kill within which a new connection through the relay must have succeeded: where the relay's
switchboard was killed, both nodes dial it again, reserve their places anew, and only then find each other."""

VICTIMS = ("relay/keeper", "relay/server", "switchboard")
"""The actors that a relayed connection depends on, in every node that has them."""


class Relay(Node):
    """A relay, run as its owner would run it."""

    serve = ("relay", "serve")

    def initialise(self) -> None:
        """Make its home."""
        self.run("relay", "setup", "--yes", "--listen", self.address)
        self.peer_id = self.run("whoami").strip()


class Hidden(Node):
    """A node behind what lets nothing in: it listens nowhere."""

    def initialise(self) -> None:
        """Make its home, and take the addresses to listen at out of its configuration."""
        super().initialise()
        config = self.home / "config.yaml"
        listen = f'  listen_addresses:\n    - "{self.address}"\n'
        text = config.read_text()
        if listen not in text:
            raise DemoError("the configuration of a new node does not look as expected")
        config.write_text(text.replace(listen, "  listen_addresses: []\n"))
        self.address = "listens nowhere"


class Relayed:
    """The relay and the two nodes.

    Attributes:
        nodes: all three.
    """

    def __init__(self, directory: Path) -> None:
        self._relay, self._cabin, self._phone = (
            Relay("relay", directory),
            Hidden("cabin", directory),
            Hidden("phone", directory),
        )
        self.nodes: tuple[Node, ...] = (self._relay, self._cabin, self._phone)

    def demonstrate(self, console: Console, web: WebServer) -> tuple[list[tuple[str, str]], Storm]:
        """Run them; what was measured, and what a storm of kills did.

        Raises:
            DemoError: something did not hold.
        """
        console.rule("a relay, and two nodes that listen nowhere")
        relay, cabin, phone = self._relay, self._cabin, self._phone
        for node in self.nodes:
            node.initialise()
            console.print(f"{node.name:7} {node.peer_id}\n        {node.address}")
        (where,) = relay.run_json("relay", "info")["addresses"]
        for node, other in ((cabin, phone), (phone, cabin)):
            relay.run("relay", "authorize", node.peer_id, "--comment", node.name)
            node.run("relay", "add", where)
            node.run("auth", "add", other.peer_id, "--comment", other.name)
        cabin.run("service", "add", "web", f"127.0.0.1:{web.port}")
        phone.run("names", "add", "cabin", cabin.peer_id)
        for node in self.nodes:
            node.start()
        for node in (cabin, phone):
            wait(functools.partial(_has_place, node), f"{node.name} to have a place at the relay")

        port = int(phone.run_json("proxy", "cabin", "web", "0")["listen"].rpartition(":")[2])
        _, first = fetch(port, "hello.txt")
        got, seconds = fetch(port, "large.bin")
        if got != web.files["large.bin"]:
            raise DemoError("large.bin came through the relay with another content")
        console.print(f"large.bin through the relay: right sha256 {got[:12]}…, {seconds * 1000:.0f} ms")
        console.print(phone.run("paths"), markup=False, end="")
        console.print(relay.run("relay", "list-peers"), markup=False, end="")
        _check_relayed(phone, cabin)

        console.rule("SIGKILL for what a relayed connection depends on, while a transfer runs")
        victims = [(node, name) for node in self.nodes for name in VICTIMS if name in _names(node)]
        result = storm(port, web, victims)
        result.check(AGAIN_WITHIN, lambda kill: kill.actor == "switchboard")
        _check_relayed(phone, cabin)
        return [
            ("first bytes through the relay, new tunnel", f"{first * 1000:.0f} ms"),
            ("64 MiB through the relay", f"{LARGE / seconds / 1e6:.0f} MB/s"),
            ("actors killed under relayed load", str(len(result.kills))),
            ("new relayed connection after a kill, median / worst", spread([kill.served for kill in result.kills])),
        ], result


def _has_place(node: Node) -> bool:
    return all(relay["state"] in ("held", "renewing") for relay in node.run_json("relay", "list"))


def _names(node: Node) -> set[str]:
    return {actor["name"] for actor in node.actors()}


def _check_relayed(node: Node, peer: Node) -> None:
    """See that the two are connected through the relay, and in no other way."""
    ways = {path["path"] for path in node.run_json("paths") if path["peer_id"] == peer.peer_id}
    if ways != {"relayed"}:
        raise DemoError(f"{node.name} and {peer.name} are connected by {sorted(ways)}, and not through the relay alone")
