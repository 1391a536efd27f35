"""The listening sockets, which outlive the process: a successor gets them from the checkpoint, backlog and all.

Addresses that differ in what runs on TCP alone (`/tcp/443`, `/tcp/443/ws`, `/tcp/443/tls/ws`) share one socket;
who calls there is told apart by the first byte.
"""

from __future__ import annotations

import contextlib
import dataclasses
import socket
from collections.abc import Iterator, Sequence

from actors.switchboard.transports import (
    SECURE_WEBSOCKET,
    inherit_listener,
    listen_tcp,
    local_multiaddr,
    parse_route,
)
from protocol.messages import Data
from protocol.multiaddr import Endpoint, Multiaddr
from supervisor.actor import Checkpoint

_STACK = frozenset({"tls", "sni", "ws"})


@dataclasses.dataclass(frozen=True)
class Listener:
    """One address that is listened on.

    Attributes:
        wanted: what the configuration says (port 0, say).
        address: what came of it.
        transport: see `actors.switchboard.transports.Route`.
        socket: may be another listener's, too.
    """

    wanted: Multiaddr
    address: Multiaddr
    transport: str
    socket: socket.socket


class Listeners:
    """All listening sockets."""

    def __init__(self) -> None:
        self._listeners: list[Listener] = []

    def __iter__(self) -> Iterator[Listener]:
        return iter(self._listeners)

    def open(
        self, wanted: Sequence[Multiaddr], checkpoint: Checkpoint | None, *, server_name: str | None = None
    ) -> None:
        """Listen on these addresses, on the predecessor's sockets where it left any for them.

        `server_name` is whom the node's certificate is for; addresses with TLS name it.

        Raises:
            AddressError: one of them cannot be listened on; nothing is left open.
        """
        inherited = _inherited(checkpoint)
        shared: dict[Endpoint, socket.socket] = {}
        try:
            for address in dict.fromkeys(wanted):
                route = parse_route(address)
                sock = shared.get(route.endpoint) or inherited.pop(str(address), None) or listen_tcp(address)
                if route.endpoint.port:
                    shared[route.endpoint] = sock
                actual = _address_of(sock, address, server_name if route.transport == SECURE_WEBSOCKET else None)
                self._listeners.append(Listener(address, actual, route.transport, sock))
        except BaseException:
            self.close()
            raise
        finally:
            for sock in inherited.values():
                sock.close()

    def sockets(self) -> list[tuple[socket.socket, frozenset[str]]]:
        """Each listening socket, with all that its callers may speak."""
        found: dict[socket.socket, set[str]] = {}
        for listener in self._listeners:
            found.setdefault(listener.socket, set()).add(listener.transport)
        return [(sock, frozenset(transports)) for sock, transports in found.items()]

    def to_checkpoint(self) -> tuple[dict[str, Data], list[int]]:
        """What a successor needs: state, and the descriptors in the same order."""
        first = {listener.socket: listener for listener in reversed(self._listeners)}  # of those that share one
        state: dict[str, Data] = {"listeners": [str(listener.wanted) for listener in first.values()]}
        return state, [sock.fileno() for sock in first]

    def give_up(self) -> None:
        """Close all for good, so that another process may have the ports.

        Whoever else holds these sockets, such as a supervisor, does not listen any more either.
        """
        for sock, _ in self.sockets():
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        self.close()

    def close(self) -> None:
        """Close all."""
        for listener in self._listeners:
            listener.socket.close()
        self._listeners.clear()


def _address_of(sock: socket.socket, wanted: Multiaddr, server_name: str | None) -> Multiaddr:
    """Where the socket listens, and the rest as it was wanted; with the server's name if it has none."""
    rest = "".join(str(component) for component in wanted.without_peer_id().components if component.name in _STACK)
    if server_name is not None and "/sni/" not in rest:
        rest = rest.replace("/tls", f"/tls/sni/{server_name}", 1)
    return Multiaddr(f"{local_multiaddr(sock)}{rest}")


def _inherited(checkpoint: Checkpoint | None) -> dict[str, socket.socket]:
    if checkpoint is None:
        return {}
    texts = checkpoint.state.get("listeners", [])
    found: dict[str, socket.socket] = {}
    for text, descriptor in zip(texts, checkpoint.descriptors, strict=False):
        sock = inherit_listener(descriptor.detach())
        if sock is not None:
            found[str(text)] = sock
    return found
