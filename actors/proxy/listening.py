"""The local end of a proxy: `host:port` to a listening socket, which outlives the process by the checkpoint."""

from __future__ import annotations

import errno
import ipaddress
import socket

from actors.proxy.errors import ListenError, PortInUseError
from actors.sockets import RESET_ON_CLOSE, fit_for_loopback, send_at_once
from supervisor.actor import Checkpoint

BACKLOG = 1024
"""Connections that wait in the kernel while the proxy is busy or being restarted."""


def listen(address: str) -> socket.socket:
    """A listening socket at this `host:port` (`[ipv6]:port`); port 0 picks a free one.

    Raises:
        ListenError: not such an address, or it cannot be listened on.
        PortInUseError: somebody else does.
    """
    host, port = _parse(address)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        fit_for_loopback(sock, host)
        sock.bind((host, port))
        sock.listen(BACKLOG)
        _prepare(sock)
    except OSError as error:
        sock.close()
        reason = (error.strerror or str(error)).lower()
        if error.errno == errno.EADDRINUSE:
            raise PortInUseError(f"cannot listen on {address}: another program does") from error
        raise ListenError(f"cannot listen on {address}: {reason}") from error
    return sock


def inherit(checkpoint: Checkpoint | None, address: str) -> socket.socket | None:
    """The listening socket that the predecessor left for this address, if it did."""
    if checkpoint is None:
        return None
    found: socket.socket | None = None
    for descriptor in checkpoint.descriptors:
        sock = socket.socket(fileno=descriptor.detach())
        # Who asked for any port is asked for the one it got when everything is started anew.
        meant = (checkpoint.state.get("wanted"), checkpoint.state.get("listen"))
        if found is None and address in meant and _listens(sock):
            sock.setblocking(False)
            _prepare(sock)
            found = sock
        else:
            sock.close()
    return found


def _prepare(sock: socket.socket) -> None:
    """What accepted sockets inherit: until their tunnel has ended well, closing them is a reset."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
    send_at_once(sock)


def address_of(sock: socket.socket) -> str:
    """Where a socket listens, as `host:port`."""
    host, port = sock.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _listens(sock: socket.socket) -> bool:
    try:
        return bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    except OSError:
        return False


def _parse(address: str) -> tuple[str, int]:
    host, colon, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if host == "localhost":
        host = "127.0.0.1"
    try:
        number = int(port)
        parsed = ipaddress.ip_address(host)
    except ValueError as error:
        raise ListenError(f"{address!r} is not an address to listen on: write IP:PORT") from error
    if not colon or not 0 <= number <= 65535:
        raise ListenError(f"{address!r} is not an address to listen on: the port is 0 to 65535")
    return str(parsed), number
