"""Whole nodes for tests: the demonstration's, set up without a process for each command."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from click.testing import CliRunner

import demo.node
from demo.node import DemoError
from peerup.cli import cli
from tests.support.ports import own_port

# The demonstration promises to be quick. A test only wants to end: nodes start and stop in a second, and on a machine
# that does ten things at once may take twenty.
demo.node.READY_DEADLINE = demo.node.STOP_DEADLINE = 60.0

_alone = threading.Lock()
"""Held during a command in this process, which has standard output to itself."""


def run_here(home: Path, *arguments: str) -> str:
    """What `peerup --home HOME arguments` prints, run in this process.

    For commands that set a node up. They do the same as in a process of their own; the start of one takes ten times as
    long as what they do.

    Raises:
        DemoError: it failed; the text says what it said.
    """
    without = {key: None for key in os.environ if key.startswith("PEERUP")}
    with _alone:
        done = CliRunner().invoke(cli, ["--home", str(home), *arguments], env=without)
    if done.exit_code != 0:
        unforeseen = done.exception if not isinstance(done.exception, SystemExit) else None
        raise DemoError(f"`peerup {' '.join(arguments)}` on {home} failed:\n{done.output}") from unforeseen
    return done.stdout


class Node(demo.node.Node):
    """One node in one directory. Until it is started its commands run in this process, afterwards as a user's do."""

    def __init__(self, name: str, directory: Path) -> None:
        super().__init__(name, directory)
        self.address = f"/ip4/127.0.0.1/tcp/{own_port()}"

    def run(self, *arguments: str) -> str:
        return run_here(self.home, *arguments) if self._daemon is None else super().run(*arguments)
