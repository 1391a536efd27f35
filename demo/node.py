"""A complete peerup node for the demonstration: its home directory, its daemon, its command line."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from peerup.client import Client, ClientError

READY_DEADLINE = 15.0
"""Seconds; a node is ready in well under two, also on a busy machine."""
STOP_DEADLINE = 15.0


class DemoError(Exception):
    """The demonstration did not show what it promises."""


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Node:
    """One node in one directory, run as a user would run it.

    Attributes:
        name: what the demonstration calls it.
        home: its directory.
        address: the multiaddr that it listens on.
        peer_id: its identity, once initialised.
        serve: the words that run it.
    """

    serve: tuple[str, ...] = ("daemon",)

    def __init__(self, name: str, directory: Path) -> None:
        self.name = name
        self.home = directory / name
        self.address = f"/ip4/127.0.0.1/tcp/{free_port()}"
        self.peer_id = ""
        self._log = (directory / f"{name}.log").open("wb")
        self._daemon: subprocess.Popen[bytes] | None = None

    def command(self, *arguments: str) -> list[str]:
        """The command line `peerup --home … arguments`."""
        return [sys.executable, "-m", "peerup.cli", "--home", str(self.home), *arguments]

    def run(self, *arguments: str) -> str:
        """What the command printed.

        Raises:
            DemoError: it failed; the text says what it said.
        """
        columns = {"COLUMNS": str(shutil.get_terminal_size().columns)}
        done = subprocess.run(
            self.command(*arguments),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env=os.environ | columns,
        )
        if done.returncode != 0:
            raise DemoError(f"`peerup {' '.join(arguments)}` on {self.name} failed:\n{done.stdout}{done.stderr}")
        return done.stdout

    def run_json(self, *arguments: str) -> Any:
        """What the command printed as JSON."""
        return json.loads(self.run(*arguments, "--json"))

    def initialise(self) -> None:
        """Make the home directory, the key and the configuration."""
        self.run("init", "--yes", "--listen", self.address)
        self.peer_id = self.run("whoami").strip()

    @property
    def daemon_pid(self) -> int:
        """The daemon's main process.

        Raises:
            DemoError: it was not started.
        """
        if self._daemon is None:
            raise DemoError(f"{self.name} is not running")
        return self._daemon.pid

    def start(self, *options: str) -> float:
        """Start the daemon with these further options; how many seconds it took until it said `ready`."""
        began = time.monotonic()
        self._daemon = subprocess.Popen(
            self.command(*self.serve, *options), stdout=subprocess.PIPE, stderr=self._log, start_new_session=True
        )
        assert self._daemon.stdout is not None
        os.set_blocking(self._daemon.stdout.fileno(), False)
        said = b""
        while b"ready" not in said:
            if self._daemon.poll() is not None or time.monotonic() - began > READY_DEADLINE:
                raise DemoError(f"{self.name} did not get ready; its log is {self._log.name}")
            said += self._daemon.stdout.read() or b""
            time.sleep(0.005)
        return time.monotonic() - began

    def actors(self) -> list[dict[str, Any]]:
        """The actor tree now; empty while the control API itself is being restarted."""
        try:
            listed: list[dict[str, Any]] = Client(self.home / "run" / "control.sock", timeout=10).get("/v1/actors")
        except ClientError:
            return []
        return listed

    def process_ids(self) -> set[int]:
        """Every process of the node: the daemon and all below it."""
        if self._daemon is None:
            return set()
        parents = {}
        for entry in os.scandir("/proc"):
            if entry.name.isdigit():
                try:
                    fields = Path(entry.path, "stat").read_text().rpartition(")")[2].split()
                except OSError:
                    continue
                parents[int(entry.name)] = int(fields[1])
        found = {self._daemon.pid}
        while grown := {pid for pid, parent in parents.items() if parent in found} - found:
            found |= grown
        return found

    def stop(self) -> set[int]:
        """Stop the daemon as systemd would; the processes that it left behind (there must be none)."""
        if self._daemon is None:
            self._log.close()
            return set()
        everybody = self.process_ids()
        if self._daemon.poll() is None:
            self._daemon.send_signal(signal.SIGTERM)
            try:
                self._daemon.wait(STOP_DEADLINE)
            except subprocess.TimeoutExpired:
                os.killpg(self._daemon.pid, signal.SIGKILL)
        if self._daemon.stdout is not None:
            self._daemon.stdout.close()
        self._log.close()
        return {pid for pid in everybody if Path(f"/proc/{pid}").exists() and not _zombie(pid)}


def _zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True
