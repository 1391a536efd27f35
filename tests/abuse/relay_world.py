"""A real relay that is attacked by an authorised peer, and two nodes that reach each other through it alone."""

from __future__ import annotations

import contextlib
from pathlib import Path

from protocol.keys import PrivateKey
from tests.abuse.attacker import new_key
from tests.chaos.load import EchoServer, echo_works
from tests.support.nodes import Node
from tests.support.processes import wait_until


class Relay(Node):
    """A relay of ours."""

    serve = ("relay", "serve")

    def initialise(self) -> None:
        """Make the home directory, the key and the configuration."""
        self.run("relay", "setup", "--yes", "--listen", self.address)
        self.peer_id = self.run_json("relay", "info")["peer_id"]


class RelayWorld:
    """`relay` is attacked; the tunnel from `laptop` to `home` through it must not notice.

    Attributes:
        port: the relay's.
        tunnel: the local port of an echo service on `home`, at `laptop`.
    """

    def __init__(self, directory: Path, stack: contextlib.ExitStack, *, log_level: str = "info") -> None:
        server = EchoServer()
        stack.callback(server.stop)
        self.directory = directory
        self.relay = Relay("relay", directory)
        self.laptop, self.home = (Node(name, directory) for name in ("laptop", "home"))
        for node in (self.relay, self.laptop, self.home):
            node.initialise()
        for node in (self.laptop, self.home):
            self.relay.run("relay", "authorize", node.peer_id)
            node.run("relay", "add", f"{self.relay.address}/p2p/{self.relay.peer_id}")
        self.laptop.run("auth", "add", self.home.peer_id)
        self.home.run("auth", "add", self.laptop.peer_id)
        self.laptop.run("names", "add", "home", self.home.peer_id)
        self.home.run("service", "add", "echo", f"127.0.0.1:{server.port}")
        for node in (self.relay, self.home, self.laptop):
            stack.callback(node.stop)
            node.start("--log-level", log_level)
        self.port = int(self.relay.address.rpartition("/")[2])
        self.tunnel = int(self.laptop.run_json("proxy", "home", "echo", "0")["listen"].rpartition(":")[2])
        wait_until(lambda: echo_works(self.tunnel), within=60, what="the tunnel through the relay before any attack")
        (path,) = {each["path"] for each in self.laptop.run_json("paths", "home")}
        assert path == "relayed", f"the tunnel does not go through the relay: {path}"

    def another_insider(self) -> PrivateKey:
        """A key that the relay authorises, and whose peer owes nothing for what others have done."""
        key = new_key()
        self.relay.run("relay", "authorize", str(key.peer_id))
        return key

    def switchboard(self) -> int:
        """The pid of the relay's switchboard."""
        (pid,) = (actor["pid"] for actor in self.relay.actors() if actor["name"] == "switchboard")
        return int(pid)

    def log(self) -> str:
        return (self.directory / "relay.log").read_text()
