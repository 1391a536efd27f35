"""TCP for the switchboard: multiaddrs to sockets and back.

Everything here works on plain non-blocking sockets; waiting is trio's. A link takes such a socket over as it is, or
with WebSocket on it, in TLS or not (`actors.switchboard.pipes`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import socket
from typing import Any

import trio

from actors.sockets import fit_for_loopback, limit_segments, send_at_once
from actors.switchboard.errors import AddressError
from protocol.multiaddr import Endpoint, Multiaddr

BACKLOG = 1024
"""Connections that the kernel completes while the switchboard is busy, or is being restarted."""
CONNECT_DEADLINE = 10.0
"""Seconds for one TCP connection attempt: the kernel alone would go on for two minutes."""
RESOLVE_DEADLINE = 5.0
"""Seconds for one name resolution."""

_FAMILIES = {
    "ip4": (socket.AF_INET,),
    "ip6": (socket.AF_INET6,),
    "dns4": (socket.AF_INET,),
    "dns6": (socket.AF_INET6,),
    "dns": (socket.AF_INET, socket.AF_INET6),
}


TCP = "tcp"
WEBSOCKET = "websocket"
SECURE_WEBSOCKET = "wss"

_STACKS = {(): TCP, ("ws",): WEBSOCKET, ("tls", "ws"): SECURE_WEBSOCKET, ("tls", "sni", "ws"): SECURE_WEBSOCKET}


@dataclasses.dataclass(frozen=True)
class Route:
    """What an address asks for.

    Attributes:
        endpoint: where the TCP connection goes.
        transport: what runs on it: `TCP` (nothing more), `WEBSOCKET`, `SECURE_WEBSOCKET`.
        server_name: the name that the address gives to TLS (`/sni/…`).
    """

    endpoint: Endpoint
    transport: str
    server_name: str | None


def parse_route(address: Multiaddr) -> Route:
    """How to connect to this multiaddr; a `/p2p/…` at its end is for others to judge.

    Raises:
        AddressError: no transport here can reach such an address.
    """
    endpoint, transport = address.endpoint, None
    if endpoint is not None:
        stack = address.without_peer_id().components[3 if address.components[0].name == "ip6zone" else 2 :]
        transport = _STACKS.get(tuple(component.name for component in stack))
    if endpoint is None or transport is None or endpoint.transport != "tcp" or endpoint.kind not in _FAMILIES:
        raise AddressError(f"{address} is not an address that can be dialled: neither TCP nor WebSocket")
    return Route(endpoint, transport, next((part.value for part in stack if part.name == "sni"), None))


def is_dialable(address: Multiaddr) -> bool:
    """Whether the address can be tried."""
    try:
        parse_route(address)
    except AddressError:
        return False
    return True


def _is_name(endpoint: Endpoint) -> bool:
    return endpoint.kind.startswith("dns")


def local_multiaddr(sock: socket.socket) -> Multiaddr:
    """The address of this end of a TCP socket."""
    return _multiaddr_of(sock.getsockname())


def remote_multiaddr(sock: socket.socket) -> Multiaddr:
    """The address of the other end of a TCP socket."""
    return _multiaddr_of(sock.getpeername())


def _multiaddr_of(sockaddr: tuple[Any, ...]) -> Multiaddr:
    return Multiaddr.from_endpoint(sockaddr[0], sockaddr[1])


def listen_tcp(address: Multiaddr) -> socket.socket:
    """A listening socket for this address; port 0 picks a free one.

    Raises:
        AddressError: the address is not ours, not on TCP, or in use; the reason says which.
    """
    wanted = parse_route(address).endpoint
    if _is_name(wanted):
        raise AddressError(f"cannot listen on {address}: give an IP address")
    family = _FAMILIES[wanted.kind][0]
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        fit_for_loopback(sock, wanted.host)
        limit_segments(sock, wanted.host)
        sock.bind(_sockaddr(family, wanted.host, wanted.port))
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise AddressError(f"cannot listen on {address}: the port is in use by another program") from error
        if error.errno in (errno.EACCES, errno.EPERM):
            raise AddressError(
                f"cannot listen on {address}: not permitted; ports below 1024 need CAP_NET_BIND_SERVICE "
                f"(the systemd unit of a relay gives it), or: sysctl net.ipv4.ip_unprivileged_port_start={wanted.port}"
            ) from error
        if error.errno == errno.EADDRNOTAVAIL:
            raise AddressError(
                f"cannot listen on {address}: this machine does not have this address (0.0.0.0 and :: are all it has)"
            ) from error
        raise AddressError(f"cannot listen on {address}: {_words(error)}") from error
    return sock


def inherit_listener(fd: int) -> socket.socket | None:
    """The listening TCP socket behind an inherited descriptor, which is taken over; None (and closed) if it is none."""
    sock = socket.socket(fileno=fd)
    try:
        listening = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError:
        listening = 0
    if not listening or sock.family not in (socket.AF_INET, socket.AF_INET6) or sock.type != socket.SOCK_STREAM:
        sock.close()
        return None
    sock.setblocking(False)
    limit_segments(sock, str(sock.getsockname()[0]))
    return sock


def accept_tcp(listener: socket.socket) -> tuple[socket.socket, str] | None:
    """The next waiting connection and its source IP address, or None when nothing waits.

    A caller that hung up meanwhile is skipped. When the process is out of descriptors OSError says so.
    """
    while True:
        try:
            sock, sockaddr = listener.accept()
        except (BlockingIOError, InterruptedError):
            return None
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EBADF, errno.EINVAL):
                raise
            continue  # accept(2): errors of the new connection itself are reported here too
        sock.setblocking(False)
        tune(sock)
        return sock, str(sockaddr[0])


def tune(sock: socket.socket) -> None:
    """Options of every connected TCP socket: no delay, and the kernel notices a peer that vanished."""
    send_at_once(sock)
    with contextlib.suppress(OSError):  # the peer may have reset it already; reading will say so
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


async def resolve(address: Multiaddr) -> list[Multiaddr]:
    """The concrete addresses behind a multiaddr with a DNS name; any other comes back as it is.

    The name stays in them as the one whose certificate is expected.

    Raises:
        AddressError: unknown name, or no answer in time.
    """
    route = parse_route(address)
    wanted = route.endpoint
    if not _is_name(wanted):
        return [address]
    rest = _stack_for(route)
    found: list[Multiaddr] = []
    families = _FAMILIES[wanted.kind]
    try:
        with trio.fail_after(RESOLVE_DEADLINE):
            answers = await trio.socket.getaddrinfo(
                wanted.host, wanted.port, families[0] if len(families) == 1 else 0, socket.SOCK_STREAM
            )
    except (OSError, UnicodeError) as error:
        raise AddressError(f"the name {wanted.host} cannot be resolved: {error}") from error
    except trio.TooSlowError as error:
        raise AddressError(f"the name {wanted.host} was not resolved within {RESOLVE_DEADLINE:g} s") from error
    for family, _, _, _, sockaddr in answers:
        if family in (socket.AF_INET, socket.AF_INET6):
            made = Multiaddr(f"{Multiaddr.from_endpoint(str(sockaddr[0]), int(sockaddr[1]))}{rest}")
            if made not in found:
                found.append(made)
    if not found:
        raise AddressError(f"the name {wanted.host} has no address")
    return found


async def connect_tcp(address: Multiaddr) -> socket.socket:
    """A connected, non-blocking socket to this address (an IP address, see :func:`resolve`), whatever shall run on it.

    Raises:
        AddressError: refused, unreachable, or no answer in time.
    """
    wanted = parse_route(address).endpoint
    if _is_name(wanted):
        raise AddressError(f"{address} must be resolved first")
    family = _FAMILIES[wanted.kind][0]
    try:
        sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    except OSError as error:  # out of descriptors, or a machine without IPv6
        raise AddressError(_words(error)) from error
    fit_for_loopback(sock, wanted.host)
    limit_segments(sock, wanted.host)
    try:
        error_number = sock.connect_ex(_sockaddr(family, wanted.host, wanted.port))
        if error_number == errno.EINPROGRESS:
            with trio.fail_after(CONNECT_DEADLINE):
                await trio.lowlevel.wait_writable(sock)
            error_number = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        else:
            await trio.lowlevel.checkpoint()
        if not error_number and sock.getsockname() == sock.getpeername():
            error_number = errno.ECONNREFUSED  # a dial to its own ephemeral port connects to itself
        _raise_errno(error_number)
    except trio.TooSlowError as error:
        sock.close()
        raise AddressError(f"no answer within {CONNECT_DEADLINE:g} s") from error
    except OSError as error:
        sock.close()
        raise AddressError(_words(error)) from error
    except BaseException:
        sock.close()
        raise
    tune(sock)
    return sock


def _stack_for(route: Route) -> str:
    if route.transport == TCP:
        return ""
    return "/ws" if route.transport == WEBSOCKET else f"/tls/sni/{route.server_name or route.endpoint.host}/ws"


def _sockaddr(family: int, host: str, port: int) -> tuple[str, int] | tuple[str, int, int, int]:
    if family == socket.AF_INET:
        return host, port
    bare, _, zone = host.partition("%")
    try:
        scope = socket.if_nametoindex(zone) if zone else 0
    except OSError as error:
        raise AddressError(f"there is no network interface {zone}") from error
    return bare, port, 0, scope


def _raise_errno(number: int) -> None:
    if number:
        raise OSError(number, os.strerror(number))


def _words(error: OSError) -> str:
    return (error.strerror or str(error)).lower()
