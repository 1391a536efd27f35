"""A link: one secured, multiplexed connection to a peer, on a reactor."""

from __future__ import annotations

import dataclasses
import socket
from collections.abc import Callable

from actors.reactor import Reactor
from protocol.errors import PeerupError
from protocol.noise import CipherState
from protocol.yamux import Role


class LinkClosedError(PeerupError):
    """The link is closed or closing: no stream can be opened on it."""

    code = "link-closed"


@dataclasses.dataclass(frozen=True)
class LinkEnd:
    """Why a link ended: a stable `code` (`local-close`, `remote-close`, `keepalive-timeout`, `protocol-error`, ...)."""

    code: str
    reason: str


class Channel:
    """One stream, used in memory by the switchboard itself, or handed over as a descriptor.

    Callbacks are plain attributes; set them before returning to the reactor:
    `on_data(bytes)`, `on_finish()` (the peer will send no more), `on_reset(code)` (over, whoever did it but you).

    Attributes:
        id: the yamux stream id.
        inbound: the peer opened it.
    """

    id: int
    inbound: bool
    on_data: Callable[[bytes], None]
    on_finish: Callable[[], None]
    on_reset: Callable[[int], None]

    def send(self, data: bytes) -> None:
        """Send; what the peer's window does not admit is queued, at most 1 MiB (then LimitExceededError)."""
        raise NotImplementedError

    def finish(self) -> None:
        """Half-close: nothing more will be sent, after what is queued."""
        raise NotImplementedError

    def reset(self, code: int) -> None:
        """End the stream both ways at once."""
        raise NotImplementedError

    def hand_over(self, unread: bytes = b"") -> socket.socket:
        """Attach the stream to a new socket pair and return the other end, non-blocking, for somebody else.

        `unread` (bytes that came with the negotiation and belong to the application) are delivered first. From now on no
        callback but `on_closed` is made.
        """
        raise NotImplementedError


class Link:
    """Takes over a connected non-blocking TCP socket after the Noise handshake and muxer negotiation.

    Attributes:
        sent, received: bytes on the wire (since the link was made).
        rtt: seconds, smoothed; None until measured.
        streams: open streams, both directions.
    """

    sent: int
    received: int
    rtt: float | None

    def __init__(
        self,
        reactor: Reactor,
        sock: socket.socket,
        *,
        role: Role,
        send_cipher: CipherState,
        receive_cipher: CipherState,
        received: bytes,
        on_stream: Callable[[Channel], None],
        on_end: Callable[[LinkEnd], None],
    ) -> None:
        """`received`: ciphertext that came in with the last handshake message."""
        raise NotImplementedError

    @property
    def streams(self) -> int:
        """Open streams, both directions."""
        raise NotImplementedError

    def open_stream(self) -> Channel:
        """Open a stream; usable at once.

        Raises:
            LinkClosedError: closed, closing, or the peer said go away.
            LimitExceededError: too many streams, or too many not yet acknowledged.
        """
        raise NotImplementedError

    def close(self, reason: str = "local-close") -> None:
        """Say go away, reset what is open, send what is queued within a bound, close the socket. `on_end` follows."""
        raise NotImplementedError

    def abort(self) -> None:
        """Close the socket now, without a word to the peer."""
        raise NotImplementedError
