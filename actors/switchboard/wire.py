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
import errno
import fcntl
import select
import socket
import struct
import sys
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
    "network_failed",
]

MAX_FRAME: Final = 2 + MAX_MESSAGE
"""Bytes of the longest Noise message with its length before it."""

BACKSTOP: Final = 25 * 3600.0
"""Seconds without an acknowledgement, or with a receiver that takes nothing, after which the kernel itself gives up:
more than the longest silence that can be configured. The kernel counts a slow receiver's full window as silence, so it
must not be the judge; the link is, by what progresses."""

LAST_WORDS: Final = 20.0
"""Seconds in which the other end's kernel must acknowledge what is on its way when a connection is closed."""

LONGEST_RETRY: Final = 5.0
"""Seconds between two retransmissions at most, where the kernel lets us choose (Linux 6.15). Left to itself TCP doubles
the time up to two minutes, and a network that was away for one minute would be used again only after another."""

_TCP_RTO_MAX_MS: Final = 44

_SIOCOUTQNSD: Final = 0x894B  # of linux/sockios.h: bytes of the send queue that are not sent

_READ_SIZE = 4096
"""More than any honest handshake message; what a stranger can make us keep in one read."""


_TCP_INFO: Final = struct.Struct("=24xI28xI60xQ16xI")
"""Of `struct tcp_info`: segments not acknowledged, milliseconds since the last acknowledgement, bytes acknowledged, and
bytes that wait in the socket."""

_NETWORK: Final = frozenset((errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN, errno.EHOSTDOWN))


@dataclasses.dataclass(frozen=True, slots=True)
class Acknowledgement:
    """What the kernel knows of the other end's.

    Attributes:
        ago: seconds since the last one.
        outstanding: something that was sent has not been acknowledged.
        acknowledged: bytes of what was sent, since the beginning.
        waiting: something could not even be sent yet.
    """

    ago: float
    outstanding: bool
    acknowledged: int
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

    def limit_unsent(self, length: int, /) -> None:
        """Do not ask for more while half of so many bytes or more were taken and are not under way yet."""

    def unsent(self) -> int:
        """Bytes that were taken and are not under way yet."""
        ...

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


def network_failed(error: Exception) -> bool:
    """Whether the network, and not the peer, is the cause of an error of a pipe or wire."""
    return isinstance(error, OSError) and (error.errno in _NETWORK or isinstance(error, ConnectionAbortedError))


class SocketWire:
    """A connected, non-blocking stream socket, which it owns. The socket's own methods do the work."""

    __slots__ = ("_fd", "_reactor", "_socket", "recv_into", "send", "soon")

    depth: int = 0

    def __init__(self, reactor: Reactor, sock: socket.socket) -> None:
        sock.setblocking(False)
        send_at_once(sock)
        _set(sock, socket.TCP_USER_TIMEOUT, BACKSTOP)
        _set(sock, _TCP_RTO_MAX_MS, LONGEST_RETRY)
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

    def limit_unsent(self, length: int, /) -> None:
        """See `Wire`."""
        with contextlib.suppress(OSError):  # not a TCP socket, or already broken: reading will say so
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, length)

    def unsent(self) -> int:
        """See `Wire`. 0 where the kernel does not tell."""
        try:
            return int.from_bytes(fcntl.ioctl(self._fd, _SIOCOUTQNSD, bytes(4)), sys.byteorder)
        except OSError:
            return 0

    def acknowledgement(self) -> Acknowledgement | None:
        """See `Wire`."""
        try:
            told = self._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size)
        except OSError:
            return None
        if len(told) < _TCP_INFO.size:
            return None
        outstanding, ago, acknowledged, waiting = _TCP_INFO.unpack(told)
        return Acknowledgement(ago / 1000, bool(outstanding), acknowledged, bool(waiting))

    def progress(self) -> int:
        """See `Wire`."""
        told = self.acknowledgement()
        return 0 if told is None else told.acknowledged

    def shut_down(self) -> None:
        """See `Wire`."""
        with contextlib.suppress(OSError):  # it is broken, which reading tells
            self._socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """See `Wire`."""
        self._reactor.unregister(self._fd)
        _set(self._socket, socket.TCP_USER_TIMEOUT, LAST_WORDS)
        self._socket.close()


def _set(sock: socket.socket, option: int, seconds: float) -> None:
    """Set a time of a TCP socket, where the kernel has it; other sockets have none."""
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.IPPROTO_TCP, option, int(seconds * 1000))


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
