"""How long a restart of a relay keeps its clients waiting: `python -m tests.natlab.measure_relay_restart`.

Three real nodes on loopback. One connection through the relay is open and idle, as a terminal is. The relay is
restarted as systemd does it: SIGTERM, wait for the end of the main process, start. Prints as JSON how many seconds the
stop and the start took, when a new connection through the relay worked, and whether the old one still did then.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.chaos.load import echo_works
from tests.peerup.test_relay_daemons import Relayed, echoes

DRAIN = "30s"
PATIENCE = 90.0


def measure(directory: Path) -> dict[str, Any]:
    """The figures; the relay's circuits get `DRAIN`."""
    with contextlib.ExitStack() as stack:
        world = Relayed(directory, stack, drain=DRAIN)
        with world.connection() as terminal:
            began = time.monotonic()
            os.kill(world.relay.daemon_pid, signal.SIGTERM)
            os.waitpid(world.relay.daemon_pid, 0)
            stopped = time.monotonic() - began
            world.relay.start()
            started = time.monotonic() - began
            while not echo_works(world.port) and time.monotonic() - began < PATIENCE:
                time.sleep(0.05)
            works = time.monotonic() - began
            survived = False
            with contextlib.suppress(OSError):
                survived = echoes(terminal)
            return {"stopped": stopped, "ready": started, "new_connection": works, "old_connection_lives": survived}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        print(json.dumps(measure(Path(directory)), indent=2))
