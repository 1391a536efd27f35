"""What a link runs over: a path on which bytes go both ways, in order; before the link is there, and under it.

A TCP socket is one, a circuit through a relay another, WebSocket messages a third. Each has two forms:

- a *pipe* while it is being upgraded: a task waits for its bytes;
- a *wire* afterwards. A link drives it from the reactor and never waits for it: it takes and gives what there is, and
  is called when there is more.

`Pipe.detach` turns the first into the second, and nothing that has arrived is lost.
"""

from __future__ import annotations

import contextlib
import dataclasses
import select
import socket
import struct
from collections.abc import Callable
from typing import Final, Protocol

import trio

from actors.reactor import HANG_UP, READ, WRITE, Reactor
from actors.sockets import send_at_once
from actors.switchboard.transports import local_multiaddr, remote_multiaddr
from protocol.circuit.messages import Limit
from protocol.multiaddr import Multiaddr
from protocol.noise import MAX_MESSAGE
from protocol.peer_id import PeerId

__all__ = [
    "HANG_UP",
    "MAX_FRAME",
    "READ",
    "WRITE",
    "Acknowledgement",
    "Pipe",
    "SocketPipe",
    "SocketWire",
    "Way",
    "Wire",
]

MAX_FRAME: Final = 2 + MAX_MESSAGE
"""Bytes of the longest Noise message with its length before it."""

UNACKNOWLEDGED: Final = 20.0
"""Seconds in which what was sent must be acknowledged by the other end's kernel: as long as a link waits for the
answer to a ping, so that a dead way that is used is noticed no later than one that is not."""

_READ_SIZE = 4096
"""More than any honest handshake message; what a stranger can make us keep in one read."""


_UNACKNOWLEDGED: Final = 24  # within `struct tcp_info`: the segment count; eight numbers on, the milliseconds
_TCP_INFO_END: Final = struct.Struct("=9I")
_TCP_INFO: Final = _UNACKNOWLEDGED + _TCP_INFO_END.size
_ACKED: Final = 120  # further on: the bytes that were acknowledged
_ACKED_BYTES: Final = struct.Struct("=Q")
_NOT_SENT: Final = 144  # and the bytes that wait in the socket
_NOT_SENT_BYTES: Final = struct.Struct("=I")


@dataclasses.dataclass(frozen=True, slots=True)
class Acknowledgement:
    """What the kernel knows of the other end's.

    Attributes:
        ago: seconds since the last one.
        outstanding: something that was sent has not been acknowledged.
        waiting: something could not even be sent yet.
    """

    ago: float
    outstanding: bool
    waiting: bool = False

    @property
    def complete(self) -> bool:
        """Whether the other end's kernel has everything."""
        return not self.outstanding and not self.waiting


@dataclasses.dataclass(frozen=True, slots=True)
class Way:
    """How the bytes go to the other end.

    Attributes:
        path: `direct` or `relayed`.
        transport: what the first hop runs over: `tcp`, `websocket`, `wss` (WebSocket in TLS).
        relay: through whom, if relayed.
        limit: what the relay grants to this one circuit; None without limit.
    """

    path: str
    transport: str
    local_address: Multiaddr
    remote_address: Multiaddr
    relay: PeerId | None = None
    limit: Limit | None = None

    def __str__(self) -> str:
        via = "" if self.relay is None else f" via {self.relay}"
        return f"{self.path}{via} {self.transport} {self.remote_address}"


class Pipe(Protocol):
    """Both directions of one connection while it is being upgraded. One task at a time uses it."""

    @property
    def way(self) -> Way:
        """How the other end is reached.

        Raises:
            OSError: it has hung up, and nobody can tell any more.
        """
        ...

    @property
    def readable(self) -> bool:
        """Whether `receive` would return at once."""
        ...

    async def receive(self) -> bytes:
        """The next bytes, as many as are there up to some KiB; empty at the end of the stream.

        Raises:
            OSError, PeerupError: the pipe is broken.
        """
        ...

    async def send(self, data: bytes) -> None:
        """Send all of it.

        Raises:
            OSError, PeerupError: the pipe is broken.
        """

    def detach(self, reactor: Reactor) -> Wire:
        """Give up the pipe for a wire that goes on where it stands, with whatever has arrived meanwhile."""
        ...

    def close(self) -> None:
        """End it in both directions. After `detach`, and the second time, nothing happens."""


class Wire(Protocol):
    """Both directions of one connection, as a link uses them.

    Attributes:
        depth: how many links are below it, whose rooms (`Reactor.rooms`) are in use when this one's link is called.
    """

    @property
    def depth(self) -> int:
        """See the class."""
        ...

    def start(
        self,
        ready: Callable[[int], None],
        take: Callable[[memoryview], None],
        failed: Callable[[Exception], None],
    ) -> None:
        """Begin: call `ready` with READ, WRITE and HANG_UP, from the reactor's loop, while there is something to read,
        and, when it was asked for, room to send. What has come already and lies in memory may be given to `take`
        instead, all of it. `failed` gets what such a call raises.

        To be ready means that it is worth trying; level-triggered: it is called again while that is so.
        """

    def soon(self, function: Callable[[], None], /) -> None:
        """Call it when what it will send can go on, but not before this returns. One call is under way at most."""

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

    def target(self) -> memoryview | None:
        """Where to seal what is to be sent instead of giving it to `send`; None where that is of no use now."""
        ...

    def filled(self, length: int, /) -> None:
        """So many bytes at the beginning of `target` are to be sent."""

    def acknowledgement(self) -> Acknowledgement | None:
        """How the other end acknowledges what is sent; None where nobody knows."""
        ...

    def progress(self) -> int:
        """A number that changes when the other end, or whoever carries the bytes there, has taken more of them."""
        ...

    def shut_down(self) -> None:
        """Send nothing after what was taken, and tell the other end so when that has gone; reading goes on.
        Twice is once.
        """

    def close(self) -> None:
        """End it in both directions; what was taken is still sent as far as that is possible without waiting."""


class SocketWire:
    """A connected, non-blocking stream socket, which it owns. The socket's own methods do the work."""

    __slots__ = ("_fd", "_reactor", "_socket", "recv_into", "send", "soon")

    depth: int = 0

    def __init__(self, reactor: Reactor, sock: socket.socket) -> None:
        sock.setblocking(False)
        send_at_once(sock)
        with contextlib.suppress(OSError):  # not a TCP socket
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(UNACKNOWLEDGED * 1000))
        self.soon = reactor.call_soon
        self._reactor = reactor
        self._socket = sock
        self._fd = sock.fileno()
        self.recv_into = sock.recv_into
        self.send = sock.send

    def __repr__(self) -> str:
        return f"<SocketWire {self._fd}>"

    def start(
        self,
        ready: Callable[[int], None],
        take: Callable[[memoryview], None],
        failed: Callable[[Exception], None],
    ) -> None:
        """See `Wire`."""
        self._reactor.register(self._fd, READ, ready, failed)

    def want_write(self, *, wanted: bool) -> None:
        """See `Wire`."""
        self._reactor.modify(self._fd, READ | WRITE if wanted else READ)

    def target(self) -> None:
        """See `Wire`."""

    def filled(self, length: int, /) -> None:
        """See `Wire`."""

    def acknowledgement(self) -> Acknowledgement | None:
        """See `Wire`."""
        try:
            told = self._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _NOT_SENT + _NOT_SENT_BYTES.size)
        except OSError:
            return None
        if len(told) < _TCP_INFO:
            return None
        outstanding, *_, ago = _TCP_INFO_END.unpack_from(told, _UNACKNOWLEDGED)
        waits = len(told) >= _NOT_SENT + _NOT_SENT_BYTES.size and _NOT_SENT_BYTES.unpack_from(told, _NOT_SENT)[0] > 0
        return Acknowledgement(ago / 1000, outstanding=bool(outstanding), waiting=waits)

    def progress(self) -> int:
        """See `Wire`."""
        try:
            told = self._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _ACKED + _ACKED_BYTES.size)
        except OSError:
            return 0
        return int(_ACKED_BYTES.unpack_from(told, _ACKED)[0]) if len(told) >= _ACKED + _ACKED_BYTES.size else 0

    def shut_down(self) -> None:
        """See `Wire`."""
        with contextlib.suppress(OSError):  # it is broken, which reading tells
            self._socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """See `Wire`."""
        self._reactor.unregister(self._fd)
        self._socket.close()


class SocketPipe:
    """A connected, non-blocking TCP socket, which it owns until it is detached."""

    __slots__ = ("_socket",)

    def __init__(self, sock: socket.socket) -> None:
        self._socket: socket.socket | None = sock

    def __repr__(self) -> str:
        return f"<SocketPipe {-1 if self._socket is None else self._socket.fileno()}>"

    @property
    def way(self) -> Way:
        """See `Pipe`."""
        sock = self._held()
        return Way("direct", "tcp", local_multiaddr(sock), remote_multiaddr(sock))

    @property
    def readable(self) -> bool:
        """See `Pipe`."""
        poll = select.poll()
        poll.register(self._held(), select.POLLIN)
        return bool(poll.poll(0))

    async def receive(self) -> bytes:
        """See `Pipe`."""
        sock = self._held()
        while True:
            try:
                return sock.recv(_READ_SIZE)
            except (BlockingIOError, InterruptedError):
                await trio.lowlevel.wait_readable(sock)

    async def send(self, data: bytes) -> None:
        """See `Pipe`."""
        sock = self._held()
        view = memoryview(data)
        while view:
            try:
                view = view[sock.send(view) :]
            except (BlockingIOError, InterruptedError):
                await trio.lowlevel.wait_writable(sock)

    def detach(self, reactor: Reactor) -> Wire:
        """See `Pipe`."""
        sock, self._socket = self._held(), None
        return SocketWire(reactor, sock)

    def close(self) -> None:
        """See `Pipe`."""
        sock, self._socket = self._socket, None
        if sock is not None:
            sock.close()

    def _held(self) -> socket.socket:
        if self._socket is None:
            raise OSError("the pipe is closed")
        return self._socket
