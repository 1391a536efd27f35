"""A node whose program files are replaced while it runs goes on with the code that it began with."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.nodes import Node, run_here
from tests.support.ports import own_port
from tests.support.processes import wait_until

ROOT = Path(__file__).parents[2]
PACKAGES = ("actors", "peerup", "protocol", "supervisor")


class CopiedNode(Node):
    """A relay that runs a copy of the program, and commands that run the original."""

    serve = ("relay", "serve")

    def __init__(self, directory: Path) -> None:
        super().__init__("relay", directory)
        self.port = own_port()
        self.program = directory / "program"
        for package in PACKAGES:
            shutil.copytree(
                ROOT / package, self.program / package, ignore=shutil.ignore_patterns("__pycache__", "*.pyc")
            )

    def initialise(self) -> None:
        listen = f"/ip4/127.0.0.1/tcp/{self.port}/ws"
        run_here(self.home, "relay", "setup", "--yes", "--listen", listen)

    def command(self, *arguments: str) -> list[str]:
        module = f"import sys; sys.path.insert(0, {str(self.program)!r}); from peerup.cli import main; main()"
        return [sys.executable, "-c", module, "--home", str(self.home), *arguments]

    def replace_program(self) -> None:
        """As an installation over the running node does, of a version that fits nowhere."""
        for path in self.program.rglob("*.py"):
            path.write_text("raise RuntimeError('this is another version of the program')\n")
        for path in list(self.program.rglob("__pycache__")):
            shutil.rmtree(path)

    def pids(self) -> dict[str, int]:
        return {actor["name"]: actor["pid"] for actor in self.actors() if actor["pid"] and actor["state"] == "running"}

    def hears_a_websocket_caller(self) -> bool:
        request = (
            f"GET / HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
        )
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=5) as sock:
                sock.sendall(request.encode())
                return sock.recv(100).startswith(b"HTTP/1.1 101")
        except OSError:
            return False


@pytest.mark.slow
def test_every_actor_comes_back_after_the_program_was_replaced(tmp_path):
    node = CopiedNode(tmp_path)
    node.initialise()
    node.start()
    try:
        node.replace_program()
        failed = subprocess.run(node.command("status"), capture_output=True, text=True, timeout=60, check=False)
        assert "another version" in failed.stderr
        before = node.pids()
        assert {"switchboard", "relay/server", "gate", "proxies"} < before.keys()
        for name, pid in before.items():
            if name != "root":
                os.kill(pid, signal.SIGKILL)
                wait_until(
                    lambda name=name, pid=pid: node.pids().get(name, pid) != pid, within=30, what=f"{name} is back"
                )
        wait_until(node.hears_a_websocket_caller, within=30, what="WebSocket is spoken")
        root = node.pids()["root"]
        os.kill(root, signal.SIGKILL)
        wait_until(lambda: node.pids().get("root", root) != root, within=30, what="the whole tree is back")
        wait_until(node.hears_a_websocket_caller, within=30, what="WebSocket is spoken")
    finally:
        assert node.stop() == set()
