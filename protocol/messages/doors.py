"""Messages by which proxy actors let the switchboard do without them what needs no decision of theirs.

A client's proxy lends its listening socket (`LendListener`), a service's actor tells where its service listens
(`ServeAt`). The switchboard then accepts and connects by itself, and joins the streams with those sockets; the actor
owns the streams as it owns those of `OpenAttached` and `StreamOffered`, and learns of them from `StreamReport`.
Whatever cannot be done at once, or needs words, still comes to the actor: `CallerAccepted`, `StreamOffered`.
"""

from __future__ import annotations

from protocol.messages.codec import Descriptor, Message, Request, message
from protocol.messages.system import Ok
from protocol.peer_id import PeerId


@message("switchboard.lend-listener")
class LendListener(Request[Ok]):
    """Accept at this listening TCP socket, and join each connection with a stream to `peer` for `protocol`.

    The sender must be a proxy. It may have one socket lent; another one takes the place of the first.

    The listener is set to close with a reset and to send without delay, which accepted sockets inherit. `lease` is the
    reading end of a pipe: when its writing end is closed, or whoever holds it is gone, the switchboard closes the
    listener; so does `CloseStreams`. More than `limit` streams of the sender are never open: further callers are reset.
    With `only_user` callers of any other user of this machine are reset, too, and those whose user cannot be told.
    """

    listener: Descriptor
    lease: Descriptor
    peer: PeerId
    protocol: str
    limit: int
    only_user: int | None = None


@message("switchboard.caller-accepted")
class CallerAccepted(Message):
    """To the lender of a listener: a connection was accepted that the switchboard cannot join with a stream at once.

    Most of all because the peer is not connected: ask with `OpenAttached`, which waits and finds words.
    """

    socket: Descriptor


@message("switchboard.serve-at")
class ServeAt(Request[Ok]):
    """Connect the streams of this protocol, which the sender serves with `attach`, to the first of these addresses.

    Addresses are `host:port`, with a literal IP address of the loopback interface. A stream whose connection the kernel
    does not make at once is offered to the sender (`StreamOffered`). More than `limit` streams of the sender are never
    open: further ones are reset. Ends as `ServeProtocol` does, and with another one.
    """

    protocol: str
    addresses: tuple[str, ...]
    limit: int
