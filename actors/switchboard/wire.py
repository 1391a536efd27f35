"""What a link runs over: a path on which bytes go both ways, in order, without waiting.

A TCP socket is one, a circuit through a relay another, WebSocket messages a third. A link drives its wire from the
reactor and never waits for it: it takes and gives what there is, and is called when there is more.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Protocol

from actors.reactor import HANG_UP, READ, WRITE, Reactor
from actors.sockets import send_at_once

__all__ = ["HANG_UP", "READ", "WRITE", "SocketWire", "Wire"]


class Wire(Protocol):
    """Both directions of one connection, as a link uses them."""

    def start(self, ready: Callable[[int], None], failed: Callable[[Exception], None]) -> None:
        """Begin: call `ready` with READ, WRITE and HANG_UP, from the reactor's loop, while there is something to read,
        and, when it was asked for, room to send. `failed` gets what such a call raises.

        To be ready means that it is worth trying; level-triggered: it is called again while that is so.
        """

    def want_write(self, *, wanted: bool) -> None:
        """Whether `ready` is to be called with WRITE."""

    def recv_into(self, buffer: memoryview, /) -> int:
        """Move what has come to `buffer`. Returns the length, 0 at the end of the stream.

        Raises:
            BlockingIOError: nothing is there.
            OSError, PeerupError: the wire is broken.
        """
        ...

    def send(self, data: memoryview, /) -> int:
        """Take a beginning of `data`, all of it if possible. Returns the length; the rest is offered again.

        Raises:
            BlockingIOError: nothing can be taken now.
            OSError, PeerupError: the wire is broken.
        """
        ...

    def close(self) -> None:
        """End it in both directions; what was taken is still sent as far as that is possible without waiting."""


class SocketWire:
    """A connected, non-blocking stream socket, which it owns. The socket's own methods do the work."""

    __slots__ = ("_fd", "_reactor", "_socket", "recv_into", "send")

    def __init__(self, reactor: Reactor, sock: socket.socket) -> None:
        sock.setblocking(False)
        send_at_once(sock)
        self._reactor = reactor
        self._socket = sock
        self._fd = sock.fileno()
        self.recv_into = sock.recv_into
        self.send = sock.send

    def __repr__(self) -> str:
        return f"<SocketWire {self._fd}>"

    def start(self, ready: Callable[[int], None], failed: Callable[[Exception], None]) -> None:
        """See `Wire`."""
        self._reactor.register(self._fd, READ, ready, failed)

    def want_write(self, *, wanted: bool) -> None:
        """See `Wire`."""
        self._reactor.modify(self._fd, READ | WRITE if wanted else READ)

    def close(self) -> None:
        """See `Wire`."""
        self._reactor.unregister(self._fd)
        self._socket.close()
