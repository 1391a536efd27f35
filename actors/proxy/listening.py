"""The local end of a proxy: from `host:port` or `unix:/path` to a listening socket, which outlives the process by the
checkpoint.

A port is open to every user of this machine, and on other addresses than loopback to others as well. A Unix socket is a
file that nobody but its owner may open.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import socket
import stat
from pathlib import Path

from actors.proxy.errors import ListenError, PortInUseError
from actors.sockets import RESET_ON_CLOSE, fit_for_loopback, send_at_once
from protocol.messages.config import UNIX
from supervisor.actor import Checkpoint

BACKLOG = 1024
"""Connections that wait in the kernel while the proxy is busy or being restarted."""


def listen(address: str) -> socket.socket:
    """A listening socket at this `host:port` (`[ipv6]:port`), port 0 picks a free one; or at `unix:/path`.

    Raises:
        ListenError: not such an address, or it cannot be listened on.
        PortInUseError: somebody else does.
    """
    if address.startswith(UNIX):
        return _listen_unix(Path(address.removeprefix(UNIX)))
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


def _listen_unix(path: Path) -> socket.socket:
    """A listening Unix socket at this path, which only this user may open; one that nobody listens at is replaced."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        _remove_stale(path)
        os.fchmod(sock.fileno(), 0o600)  # before it has a name: the file never has another mode
        sock.bind(str(path))
        _check_private(path)
        sock.listen(BACKLOG)
    except ListenError:
        sock.close()
        raise
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise PortInUseError(f"cannot listen at {path}: there is a file already, which is no socket") from error
        raise ListenError(f"cannot listen at {path}: {(error.strerror or str(error)).lower()}") from error
    return sock


def _check_private(path: Path) -> None:
    """Remove a new socket again whose mode the file system did not take from its descriptor.

    Raises:
        ListenError: so it was.
    """
    if stat.S_IMODE(path.lstat().st_mode) & 0o077:
        path.unlink()
        raise ListenError(f"cannot listen at {path}: this file system lets others open the socket")


def _remove_stale(path: Path) -> None:
    """Remove the socket file that a process of this user left; anything else stays.

    Raises:
        PortInUseError: somebody listens there.
    """
    with contextlib.suppress(FileNotFoundError):
        status = path.lstat()
        if not stat.S_ISSOCK(status.st_mode) or status.st_uid != os.geteuid():
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
            answer = probe.connect_ex(str(path))
        if answer in (0, errno.EAGAIN, errno.EINPROGRESS):
            raise PortInUseError(f"cannot listen at {path}: another program does")
        if answer == errno.ECONNREFUSED:
            path.unlink()


def remove_file(sock: socket.socket) -> None:
    """Remove the file of a Unix socket that will not be listened at any more."""
    if sock.family == socket.AF_UNIX:
        with contextlib.suppress(OSError):
            path = Path(sock.getsockname())
            if stat.S_ISSOCK(path.lstat().st_mode):
                path.unlink()


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
    if sock.family == socket.AF_UNIX:
        return
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
    send_at_once(sock)


def address_of(sock: socket.socket) -> str:
    """Where a socket listens, as `host:port` or `unix:/path`."""
    if sock.family == socket.AF_UNIX:
        return f"{UNIX}{sock.getsockname()}"
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
