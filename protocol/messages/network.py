"""Messages about the networks that this machine is in."""

from __future__ import annotations

from protocol.messages.codec import Message, Request, message
from protocol.messages.system import Ok


@message("network.changed")
class NetworkChanged(Message):
    """This machine's addresses, routes or links have changed, or it has slept; `why` tells in words."""

    why: tuple[str, ...]


@message("network.watch")
class WatchNetwork(Request[Ok]):
    """Tell me (the sender) `NetworkChanged` from now on. Ask again when the monitor is up again."""
