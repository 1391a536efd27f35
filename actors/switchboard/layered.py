"""A wire on top of another: what TLS and WebSocket have in common.

Both turn bytes into other bytes, in both directions, and both have to keep what the wire below does not take at once.
That is at most one `send` of the layer above, for the next one waits until all of it has gone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from actors.reactor import READ, WRITE, Reactor
from actors.switchboard.wire import Acknowledgement, Wire
from protocol.errors import PeerupError


class LayeredWire:
    """The base of such a wire; see `Wire`. Subclasses have `recv_into` and `send`."""

    def __init__(self, reactor: Reactor, below: Wire) -> None:
        self.depth: int = below.depth
        self.soon = below.soon
        self._reactor = reactor
        self._below = below
        self._ready: Callable[[int], None] = _nobody
        self._failed: Callable[[Exception], None] = _nobody
        self._unsent = memoryview(b"")
        self._wanted = False
        self._recall_planned = False
        self._shut = False  # nothing is to be sent but what is kept, and the last words
        self._said = False  # these were offered
        self._closed = False

    def start(
        self,
        ready: Callable[[int], None],
        take: Callable[[memoryview], None],
        failed: Callable[[Exception], None],
    ) -> None:
        """See `Wire`."""
        self._ready, self._failed = ready, failed
        self._below.start(self._below_ready, _nobody, failed)
        self._recall()  # something may have come already

    def want_write(self, *, wanted: bool) -> None:
        """See `Wire`."""
        self._wanted = wanted
        self._below.want_write(wanted=wanted or bool(self._unsent))

    def target(self) -> None:
        """See `Wire`."""

    def filled(self, length: int, /) -> None:
        """See `Wire`."""

    def limit_unsent(self, length: int, /) -> None:
        """See `Wire`."""
        self._below.limit_unsent(length)

    def unsent(self) -> int:
        """See `Wire`."""
        return len(self._unsent) + self._below.unsent()

    def acknowledgement(self) -> Acknowledgement | None:
        """See `Wire`."""
        return self._below.acknowledgement()

    def progress(self) -> int:
        """See `Wire`."""
        return self._below.progress()

    def shut_down(self) -> None:
        """See `Wire`."""
        if not self._shut and not self._closed:
            self._shut = True
            with contextlib.suppress(OSError, PeerupError):  # it is broken, which reading tells
                self._flush()
                self._end()

    def _end(self) -> None:
        """Say the last words when nothing is kept any more, and shut down below when they have gone."""
        if not self._unsent and not self._said:
            self._said = True
            self._offer(self._last_words())
        if not self._unsent:
            self._below.shut_down()

    def close(self) -> None:
        """See `Wire`."""
        if not self._closed:
            self._closed = True
            with contextlib.suppress(OSError, PeerupError):
                if self._flush() and not self._said:
                    self._offer(self._last_words())
            self._below.close()

    def _last_words(self) -> bytes:
        """What is said at the end, if it can be said at once."""
        return b""

    def _idle(self) -> bytes:
        """What is to be sent now that there is nothing else on its way."""
        return b""

    def _offer(self, data: bytes | memoryview) -> None:
        """Send this; keep what cannot be sent now. Nothing may be kept already."""
        view = memoryview(data)
        while view:
            try:
                view = view[self._below.send(view) :]
            except BlockingIOError:
                break
        self._unsent = view
        if view:
            self._below.want_write(wanted=True)

    def _accept(self) -> None:
        """Demand that nothing is kept, before more is taken.

        Raises:
            BlockingIOError: something still is.
        """
        if not self._flush():
            raise BlockingIOError

    def _flush(self) -> bool:
        """Send what was kept. Whether nothing is kept any more."""
        if self._unsent:
            self._offer(self._unsent)
        return not self._unsent

    def _say_idle(self) -> None:
        if not self._unsent and not self._said and (data := self._idle()):
            self._offer(data)

    def _below_ready(self, ready: int) -> None:
        if ready & WRITE:
            if self._flush():
                self._say_idle()
            if self._shut:
                self._end()
            if self._unsent:
                ready &= ~WRITE
            elif not self._wanted:
                self._below.want_write(wanted=False)
                ready &= ~WRITE
        if ready:
            self._ready(ready)

    def _recall(self) -> None:
        """There may be more to read, of which the wire below knows nothing: have `ready` called once more."""
        if not self._recall_planned and not self._closed:
            self._recall_planned = True
            self._reactor.call_soon(self._recalled)

    def _recalled(self) -> None:
        self._recall_planned = False
        if not self._closed:
            try:
                self._ready(READ)
            except (PeerupError, OSError) as error:
                self._failed(error)


def _nobody(_: object) -> None:
    """Before `start`."""
