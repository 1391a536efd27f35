"""The pump: carries bytes between a connected stream socket and a stream descriptor."""

from __future__ import annotations

import dataclasses
import enum
import socket
from collections.abc import Callable

from actors.reactor import Reactor


class Outcome(enum.Enum):
    """How a pump ended."""

    FINISHED = "finished"  # both directions finished cleanly
    STREAM_RESET = "stream-reset"  # the far side reset the stream; `code` says why
    LOCAL_RESET = "local-reset"  # the local socket was reset or failed
    STREAM_LOST = "stream-lost"  # the process at the other end of the descriptor is gone
    ABORTED = "aborted"  # `abort` was called here


@dataclasses.dataclass(frozen=True)
class PumpResult:
    """The account of a finished pump.

    Attributes:
        code: the reset code sent or received; 0 when finished.
        sent: bytes from the local socket to the stream.
        received: bytes from the stream to the local socket.
    """

    outcome: Outcome
    code: int
    sent: int
    received: int


class Pump:
    """Takes ownership of both sockets; both are closed before `on_done` is called (exactly once, from the reactor).

    Attributes:
        sent: bytes taken from the local socket and given to the stream so far.
        received: bytes taken from the stream and given to the local socket so far.
    """

    sent: int
    received: int

    def __init__(
        self,
        reactor: Reactor,
        local: socket.socket,
        stream: socket.socket,
        on_done: Callable[[PumpResult], None],
    ) -> None:
        raise NotImplementedError

    def abort(self, code: int) -> None:
        """Reset both sides now. `on_done` is called with `Outcome.ABORTED` before this returns."""
        raise NotImplementedError
