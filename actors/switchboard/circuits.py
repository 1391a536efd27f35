"""One end of a circuit through a relay: a stream on the connection to the relay, as a wire for a connection to a peer.

Theory of operation. The stream's channel is joined with a `CircuitEnd`, which is what a link (the inner one) runs over;
the link of the relay's connection (the outer one) asks it for bytes and gives it bytes. No descriptor, no task and no
queue of its own lies between the two links of one process:

    inner link -> peer   The inner link seals what it has when the outer link's turn comes: `fetch` has it do so,
                         straight into the outer link's frame. Only small pieces that come at other times are queued
                         here, up to `QUEUE` bytes.
    peer -> inner link   What the outer link delivers is given to the inner link at once, which takes all of it; its
                         yamux windows bound what it keeps. So it counts as consumed when `deliver` returns.

During the upgrade there is no inner link yet: a task waits in `receive`. What it has not taken is not consumed, and so
is no more than the stream's first window.

The end of the stream is the end of the wire. A reset, or the loss of the relay's connection, is told to the inner link
as a `CircuitCutError` in words. `shut_down` and `close` finish the stream after what is queued; if the other end has
not finished soon after `close`, it is reset. A link that closes in good order has waited before it says so until its
peer has everything (`actors.switchboard.closing`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final

import trio

from actors.reactor import READ, WRITE
from actors.switchboard.channel import Channel
from actors.switchboard.errors import CircuitCutError, CircuitLostError
from actors.switchboard.wire import Acknowledgement
from protocol.errors import PeerupError
from protocol.stream_descriptor import ResetCode
from supervisor.timers import Timer

SMALL: Final = 16 * 1024
"""Bytes that are rather copied than offered again: less than it costs to be asked."""
LEAST_TARGET: Final = 1024
"""Bytes of a frame that are worth a Noise message of their own."""
QUEUE: Final = 64 * 1024
"""Bytes that may be queued here."""
FAREWELL: Final = 3.0
"""Seconds that the other end has for its own end once we have closed ours."""


class CircuitEnd:
    """Joins `channel`; `unread` are bytes of the circuit that came with what was said before.

    `words(code)` tells why a circuit ends whose stream is reset with this code.

    Raises:
        LinkClosedError: the channel is closed.
    """

    __slots__ = (
        "_backlog",
        "_channel",
        "_closed",
        "_counted",
        "_cut",
        "_failed",
        "_finished",
        "_flush",
        "_news",
        "_queue",
        "_queued",
        "_ready",
        "_shut",
        "_take",
        "_taken",
        "_target",
        "_timer",
        "_wants",
        "_words",
    )

    depth: int = 1

    def __init__(self, channel: Channel, words: Callable[[int], str], *, unread: bytes = b"") -> None:
        self._channel = channel
        self._words = words
        self._queue: deque[memoryview] = deque()  # small pieces for the peer
        self._queued = 0
        self._backlog = bytearray(unread)  # from the peer, until somebody takes it
        self._counted = 0  # of the backlog, what is not consumed yet
        self._target: memoryview | None = None  # where the outer link wants what it fetches
        self._taken = 0
        self._wants = False  # the inner link waits to be asked for the rest of what it has sealed
        self._flush: Callable[[], None] | None = None  # or to seal more
        self._finished = False  # the peer will send no more
        self._shut = False  # finish the stream after what is queued
        self._closed = False
        self._cut: CircuitCutError | None = None
        self._ready: Callable[[int], None] | None = None
        self._take: Callable[[memoryview], None] = _ignore
        self._failed: Callable[[Exception], None] = _ignore
        self._news: trio.Event | None = None
        self._timer: Timer | None = None
        channel.join(self)

    def __repr__(self) -> str:
        return f"<CircuitEnd over {self._channel!r}>"

    # ---- during the upgrade

    @property
    def readable(self) -> bool:
        """Whether `receive` would return at once."""
        return bool(self._backlog) or self._finished or self._cut is not None

    async def receive(self) -> bytes:
        """What has come, at least one byte; empty at the end of the stream. For one task at a time.

        Raises:
            CircuitCutError: the circuit was cut.
        """
        while not self._backlog:
            if self._cut is not None:
                raise self._cut
            if self._finished:
                return b""
            self._news = trio.Event()
            await self._news.wait()
        data = bytes(self._backlog)
        self._take_backlog(len(data))
        return data

    def push(self, data: bytes) -> None:
        """Send a small piece.

        Raises:
            CircuitCutError: the circuit is over, or its other end takes nothing.
        """
        self._check()
        if self._queued + len(data) > QUEUE:
            raise CircuitCutError("the peer does not read what is sent to it")
        self._enqueue(memoryview(data))

    # ---- the wire, called by the inner link

    def start(
        self,
        ready: Callable[[int], None],
        take: Callable[[memoryview], None],
        failed: Callable[[Exception], None],
    ) -> None:
        """See `Wire`."""
        self._ready = ready
        self._take = take
        self._failed = failed
        if self.readable:
            self._channel.reactor.call_soon(self._begin)

    def soon(self, function: Callable[[], None], /) -> None:
        """See `Wire`."""
        self._flush = function
        self._channel.enqueue()

    def want_write(self, *, wanted: bool) -> None:
        """See `Wire`."""
        self._wants = wanted
        if wanted:
            self._channel.enqueue()

    def limit_unsent(self, length: int, /) -> None:
        """See `Wire`. Nothing waits here: what the inner link seals goes straight into the outer one's batch."""

    def unsent(self) -> int:
        """See `Wire`. What the outer link has taken is in its hands."""
        return 0

    def acknowledgement(self) -> Acknowledgement | None:
        """See `Wire`. The relay acknowledges what we send, and that says nothing of the peer."""
        return None

    def recv_into(self, buffer: memoryview, /) -> int:
        """See `Wire`. All bytes are given to `take`; this has the end."""
        if self._finished and self._cut is None:
            return 0
        self._check()
        raise BlockingIOError

    def send(self, data: memoryview, /) -> int:
        """See `Wire`."""
        target = self._target
        if target is not None:
            start = self._taken
            length = min(len(target) - start, len(data))
            if not length:
                raise BlockingIOError
            target[start : start + length] = data[:length]
            self._taken += length
            return length
        self._check()
        if len(data) > SMALL or self._queued + len(data) > QUEUE:
            raise BlockingIOError
        self._enqueue(memoryview(bytes(data)))
        return len(data)

    def target(self) -> memoryview | None:
        """See `Wire`."""
        if self._target is None or len(self._target) - self._taken < LEAST_TARGET:
            return None
        return self._target[self._taken :]

    def filled(self, length: int, /) -> None:
        """See `Wire`."""
        self._taken += length

    def progress(self) -> int:
        """See `Wire`."""
        return self._channel.sent + self._channel.progress()

    def shut_down(self) -> None:
        """See `Wire`."""
        self._shut = True
        if not self._channel.closed:
            self._channel.enqueue()

    def close(self) -> None:
        """See `Wire`."""
        if self._closed:
            return
        self._closed = True
        self._wants = False
        self._flush = None
        self._take_backlog(len(self._backlog))
        if not self._channel.closed:
            self._timer = self._channel.reactor.call_later(FAREWELL, self._expired)
            self._channel.enqueue()

    # ---- the end of the outer link's channel

    def fetch(self, buffer: memoryview, start: int, limit: int) -> int:
        """See `LocalEnd`."""
        if self._queue:
            return self._fetch_queued(buffer, start, limit)
        if self._closed:
            self._channel.finish_now()
            return 0
        if self._shut and not (self._wants or self._flush):
            self._channel.finish_now()
            return 0
        if not limit or not (self._wants or self._flush):
            return 0
        self._target = buffer[start : start + limit]
        self._taken = 0
        if self._wants:
            self._call(WRITE)
        if (flush := self._flush) is not None and (not self._taken or limit - self._taken >= LEAST_TARGET):
            self._flush = None
            flush()
        self._target = None
        return self._taken

    def deliver(self, buffer: memoryview, start: int, end: int, now: float) -> None:
        """See `LocalEnd`."""
        length = end - start
        if self._closed:
            self._channel.reset(ResetCode.SHUTDOWN)
            return
        if self._ready is None:
            self._backlog += buffer[start:end]
            self._counted += length
            self._tell()
            return
        if self._backlog:
            self._give_backlog()
        self._give(buffer[start:end])
        if not self._channel.closed:
            self._channel.consumed(length, now)

    def peer_finished(self) -> None:
        """See `LocalEnd`."""
        self._finished = True
        if self._ready is None:
            self._tell()
        elif not self._closed:
            self._call(READ)

    def stream_closed(self) -> None:
        """See `LocalEnd`."""
        self._stop_timer()

    def over(self, code: int) -> None:
        """See `LocalEnd`."""
        self._stop_timer()
        self._queue.clear()
        self._queued = 0
        if self._cut is None:
            self._cut = (CircuitLostError if code == ResetCode.CONNECTION_LOST else CircuitCutError)(self._words(code))
        if self._ready is None:
            self._tell()
        elif not self._closed:
            self._failed(self._cut)

    # ---- within

    def _begin(self) -> None:
        """The inner link is there: let it have what came before it, and the end if there was one."""
        self._give_backlog()
        if self._closed:
            return
        if self._cut is not None:
            self._failed(self._cut)
        elif self._finished:
            self._call(READ)

    def _give_backlog(self) -> None:
        data = bytes(self._backlog)
        self._take_backlog(len(data))
        self._give(memoryview(data))

    def _give(self, data: memoryview) -> None:
        """Let the inner link have this. What it raises is its own end, and not the outer link's."""
        if data and not self._closed:
            try:
                self._take(data)
            except (PeerupError, OSError) as error:
                self._failed(error)

    def _call(self, what: int) -> None:
        """Call the inner link; as `_give`."""
        assert self._ready is not None
        try:
            self._ready(what)
        except (PeerupError, OSError) as error:
            self._failed(error)

    def _fetch_queued(self, buffer: memoryview, start: int, limit: int) -> int:
        length = 0
        while self._queue and length < limit:
            piece = self._queue.popleft()
            if len(piece) > limit - length:
                self._queue.appendleft(piece[limit - length :])
                piece = piece[: limit - length]
            buffer[start + length : start + length + len(piece)] = piece
            length += len(piece)
        self._queued -= length
        return length

    def _enqueue(self, data: memoryview) -> None:
        self._queue.append(data)
        self._queued += len(data)
        self._channel.enqueue()

    def _take_backlog(self, length: int) -> None:
        del self._backlog[:length]
        counted = self._counted - min(self._counted, len(self._backlog))
        if counted and not self._channel.closed:
            self._counted -= counted
            self._channel.consumed(counted, self._channel.reactor.clock())

    def _check(self) -> None:
        if self._cut is not None:
            raise self._cut
        if self._closed or self._channel.closed:
            raise CircuitCutError("the circuit is closed")

    def _tell(self) -> None:
        if self._news is not None:
            self._news.set()

    def _expired(self) -> None:
        self._timer = None
        if not self._channel.closed:
            self._channel.reset(ResetCode.SHUTDOWN)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _ignore(_: object) -> None:
    pass
