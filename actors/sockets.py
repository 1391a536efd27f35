"""What every TCP socket is told, whoever owns it."""

from __future__ import annotations

import contextlib
import socket
import struct
from typing import Final

RESET_ON_CLOSE: Final = struct.pack("ii", 1, 0)
"""SO_LINGER: closing the socket, or the end of all processes that hold it, is a reset for its peer."""

FINISH_ON_CLOSE: Final = struct.pack("ii", 0, 0)
"""SO_LINGER: closing the socket is a clean end again."""

_UNPACED: Final = b"reno"
"""A congestion control that never waits: always there, and free for everybody to choose."""

LARGE_BUFFER: Final = 2 * 1024 * 1024
"""Bytes that may be under way each way between two processes of this machine: some milliseconds of a bulk tunnel, so
that one works while the other waits for a processor. Memory is taken only as far as it is filled."""


def fit_for_loopback(sock: socket.socket, host: str) -> None:
    """Tell a TCP socket that will connect to, or listen on, this IP address; before it does.

    Over loopback there is no path whose queues could fill. What the kernel does for the sake of a path only costs
    there: a congestion control that paces (BBR is the default of some kernels; it goes on pacing whatever is chosen
    later), and small buffers that grow as round trips are measured, which make sender and receiver take turns. Without
    both a bulk tunnel takes a quarter less CPU. Sockets to other machines are left as the administrator wants them.
    """
    if host == "::1" or host.startswith("127."):
        with contextlib.suppress(OSError):  # a kernel without the choice
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, _UNPACED)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, LARGE_BUFFER)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, LARGE_BUFFER)


SEGMENT: Final = 1220
"""Bytes of a TCP segment at most on a path to another machine: with IPv6's headers 1280, which every path carries."""


def limit_segments(sock: socket.socket, host: str) -> None:
    """Have a TCP socket that will connect to, or listen on, this IP address send and ask for no larger segments.

    Many tunnels and access lines carry less than Ethernet's 1500 bytes, and where a firewall swallows the routers' word
    of that ("fragmentation needed") a connection opens, carries small answers, and hangs for good at the first full
    segment. A socket that hangs so cannot be mended: Linux takes a smaller TCP_MAXSEG only before the connection is
    made, and without DF or with another IPV6_MTU nothing changes. So no segment is large in the first place. Either
    end's limit holds for both directions. It costs one percent of a path that could carry more.
    """
    if host == "::1" or host.startswith("127."):
        return
    with contextlib.suppress(OSError):  # a kernel without the choice
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, SEGMENT)


SMALL_BUFFER: Final = 256 * 1024
"""Bytes that may be under way each way until much has gone through: more than a terminal or a web page needs. With a
quarter of it a single stream on loopback is slowed down by 40 %."""


def is_within_machine(sock: socket.socket) -> bool:
    """Whether both ends of a connected TCP socket are at a loopback address, as far as its own address tells."""
    try:
        host = str(sock.getsockname()[0])
    except OSError:
        return False
    return host == "::1" or host.startswith(("127.", "::ffff:127."))


def buffer_is_larger(sock: socket.socket, option: int, size: int) -> bool:
    """Whether a buffer (SO_SNDBUF, SO_RCVBUF) is larger than asking for `size` bytes makes it."""
    return sock.getsockopt(socket.SOL_SOCKET, option) > 2 * size  # the kernel counts its bookkeeping, as much again


def send_at_once(sock: socket.socket) -> None:
    """Tell a connected socket to send small pieces without delay."""
    with contextlib.suppress(OSError):  # not TCP, or already broken: reading will say so
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
