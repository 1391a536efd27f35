"""The listening sockets, which outlive the process: a successor gets them from the checkpoint, backlog and all."""

from __future__ import annotations

import dataclasses
import socket
from collections.abc import Iterator, Sequence

from actors.switchboard.transports import inherit_listener, listen_tcp, local_multiaddr
from protocol.messages import Data
from protocol.multiaddr import Multiaddr
from supervisor.actor import Checkpoint


@dataclasses.dataclass(frozen=True)
class Listener:
    """One listening socket. `wanted` is what the configuration says (port 0, say), `address` what came of it."""

    wanted: Multiaddr
    address: Multiaddr
    socket: socket.socket


class Listeners:
    """All listening sockets."""

    def __init__(self) -> None:
        self._listeners: list[Listener] = []

    def __iter__(self) -> Iterator[Listener]:
        return iter(self._listeners)

    def open(self, wanted: Sequence[Multiaddr], checkpoint: Checkpoint | None) -> None:
        """Listen on these addresses, on the predecessor's sockets where it left any for them.

        Raises:
            AddressError: one of them cannot be listened on; nothing is left open.
        """
        inherited = _inherited(checkpoint)
        try:
            for address in dict.fromkeys(wanted):
                sock = inherited.pop(str(address), None) or listen_tcp(address)
                self._listeners.append(Listener(address, local_multiaddr(sock), sock))
        except BaseException:
            self.close()
            raise
        finally:
            for sock in inherited.values():
                sock.close()

    def to_checkpoint(self) -> tuple[dict[str, Data], list[int]]:
        """What a successor needs: state, and the descriptors in the same order."""
        state: dict[str, Data] = {"listeners": [str(listener.wanted) for listener in self._listeners]}
        return state, [listener.socket.fileno() for listener in self._listeners]

    def close(self) -> None:
        """Close all."""
        for listener in self._listeners:
            listener.socket.close()
        self._listeners.clear()


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
