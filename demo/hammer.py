"""SIGKILL for actors, one after another, while a transfer runs: how long each is gone, and what that does to others."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from demo.node import DemoError, Node
from demo.services import WebServer
from demo.transfer import LongDownload, fetch

ON_ITS_WAY = 16 * 1024 * 1024
"""Bytes; more than all buffers between the killed process and the client hold."""
BACK_WITHIN = 10.0
"""Seconds after which the demonstration gives up waiting for a killed actor."""


@dataclass
class Kill:
    """What one SIGKILL did. Times in seconds."""

    node: str
    actor: str
    back: float
    served: float
    transfer: str


@dataclass
class Storm:
    """What a whole series did.

    Attributes:
        kills: one by one.
        meanwhile: what the transfer came to, in words.
    """

    kills: list[Kill]
    meanwhile: str

    def check(self, again_within: float, in_the_path: Callable[[Kill], bool]) -> None:
        """See that service came back in time, and that only kills in the transfer's path have cut it.

        Raises:
            DemoError: it was otherwise.
        """
        slow = [kill for kill in self.kills if kill.served > again_within]
        if slow:
            names = ", ".join(f"{kill.actor} of {kill.node}" for kill in slow)
            raise DemoError(f"no new connection within {again_within} s after killing {names}")
        cut = [kill for kill in self.kills if kill.transfer == "cut" and not in_the_path(kill)]
        if cut:
            names = ", ".join(f"{kill.actor} of {kill.node}" for kill in cut)
            raise DemoError(f"the transfer was cut by killing {names}, not in its path")


def storm(port: int, web: WebServer, victims: Iterable[tuple[Node, str]]) -> Storm:
    """Kill these actors while large files are fetched through this port, one after another.

    Raises:
        DemoError: an actor did not come back, or a file had a wrong content.
    """
    kills: list[Kill] = []
    download = LongDownload(port, "large.bin", web.files["large.bin"])
    try:
        wait(lambda: download.received > 0, "the transfer to begin")
        kills.extend(_kill(node, name, port, web, download) for node, name in victims)
        whole = download.finished
        wait(lambda: download.finished > whole, "a whole file after the storm")
    finally:
        download.stop()
    if download.wrong:
        raise DemoError(f"{download.wrong} downloads had a wrong content")
    meanwhile = (
        f"meanwhile: {download.received / 1e6:.0f} MB downloaded, {download.finished} whole files with the right hash, "
        f"{download.broken} cut off by a kill in their path, 0 with a wrong content"
    )
    return Storm(kills, meanwhile)


def wait(condition: Callable[[], Any], what: str, within: float = BACK_WITHIN) -> None:
    """Return as soon as the condition is true.

    Raises:
        DemoError: it is not within so many seconds.
    """
    until = time.monotonic() + within
    while not condition():
        if time.monotonic() > until:
            raise DemoError(f"waited {within} s in vain for {what}")
        time.sleep(0.002)


def spread(seconds: list[float]) -> str:
    """Median and worst of these times."""
    ordered = sorted(seconds)
    return f"{ordered[len(ordered) // 2] * 1000:.0f} / {ordered[-1] * 1000:.0f} ms"


def _kill(node: Node, name: str, port: int, web: WebServer, download: LongDownload) -> Kill:
    wait(lambda: _actor(node, name).get("state") == "running", f"{name} to run")
    pid = _actor(node, name)["pid"]
    wait(lambda: download.is_under_way, "the transfer to go on")
    before, received = download.broken, download.received
    killed = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    served = _first_success(lambda: fetch(port, "hello.txt", timeout=1.0)[0] == web.files["hello.txt"])
    back = _first_success(lambda: _actor(node, name).get("state") == "running" and _actor(node, name)["pid"] != pid)
    # What is on its way past the killed process still arrives; only after that does an end show, if there is one.
    wait(lambda: download.broken > before or download.received > received + ON_ITS_WAY, "the transfer's fate")
    return Kill(node.name, name, back - killed, served - killed, "cut" if download.broken > before else "untouched")


def _actor(node: Node, name: str) -> dict[str, Any]:
    return next((actor for actor in node.actors() if actor["name"] == name), {})


def _first_success(attempt: Callable[[], bool]) -> float:
    until = time.monotonic() + BACK_WITHIN
    while True:
        try:
            if attempt():
                return time.monotonic()
        except (OSError, DemoError):
            pass
        if time.monotonic() > until:
            raise DemoError(f"not again within {BACK_WITHIN} s")
