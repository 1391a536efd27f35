"""Messages of the proxy actors: `proxy/<peer>/<service>` (client side) and `service/<name>` (serving side)."""

from __future__ import annotations

from protocol.messages.codec import Descriptor, Request, message
from protocol.messages.system import Ok


@message("proxy.attach")
class Attach(Request[Ok]):
    """Tunnel this already connected stream socket as if it had come in at the listener (`peerup proxy --stdio`).

    Answered once the stream to the peer is open, so that failure can still be told in words.

    A Unix socket cannot tell a tunnel that broke from one that ended. `outcome`, the write end of a pipe, is told at
    the end: `finished`, or what broke it. An end without a word means that the process that carried it died.

    With `confirm`, `finished` means that all bytes arrived at the far service; and the end of the socket's own sending
    counts only if it is shut down: that it is closed altogether, as when the program that has it is killed, is a break.
    """

    socket: Descriptor
    outcome: Descriptor | None = None
    confirm: bool = False
