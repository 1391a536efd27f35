"""What systemd wants to hear from a service of `Type=notify` (sd_notify(3), sd_watchdog_enabled(3))."""

from __future__ import annotations

import contextlib
import dataclasses
import socket
from collections.abc import MutableMapping
from typing import Self

_VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")


@dataclasses.dataclass(frozen=True)
class ServiceManager:
    """The way to whoever started this process, if it wants to be told.

    Attributes:
        path: its notification socket; None if nobody wants to be told anything.
        watchdog: seconds without a sign of life after which it ends this process; None for never.
    """

    path: str | None = None
    watchdog: float | None = None

    @classmethod
    def take_from(cls, environment: MutableMapping[str, str], pid: int) -> Self:
        """As this environment of the process `pid` says. The variables are removed: they are not for its children."""
        path, microseconds, meant = (environment.pop(name, "") for name in _VARIABLES)
        if not path.startswith(("/", "@")):
            return cls()
        wanted = microseconds.isdecimal() and int(microseconds) > 0 and meant in ("", str(pid))
        return cls(path, int(microseconds) / 1e6 if wanted else None)

    def tell(self, *state: str) -> None:
        """Send assignments such as `READY=1`. A manager that has gone, or does not listen, does not matter."""
        sock = self.connect()
        if sock is not None:
            with sock, contextlib.suppress(OSError):
                sock.send("\n".join(state).encode())

    def connect(self) -> socket.socket | None:
        """A new socket to it, which never waits; None if nobody wants to be told anything, or nobody is there."""
        if self.path is None:
            return None
        address = "\0" + self.path[1:] if self.path.startswith("@") else self.path
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        sock.setblocking(False)  # it must not be able to hold up what it watches
        try:
            sock.connect(address)
        except OSError:
            sock.close()
            return None
        return sock
