"""A circuit's two streams, joined: what one peer sends goes on to the other, as a relay does it.

Theory of operation. Each stream is a channel of its own link, and is joined with one half of the splice. Bytes that a
link delivers are kept at the *other* half, which stands in the queue of its link and gives them out in frames that are
as large as may be. So each direction is::

    link of one peer -> deliver -> kept -> fetch -> link of the other peer

While the other link keeps up and no limit counts bytes, they are not even kept: the link seals them from where they
were delivered (`Channel.pass_on`).

What is kept is bounded by the window of the stream that it came from: only what was fetched counts as consumed, and
only that is granted anew; and by what the peer may make us keep in all (`actors.switchboard.budget`). Windows grow with
the speed of the circuit, as long as all circuits together keep within a limit (`Growth`): else those who send fast to
peers that do not read could fill the memory.

What is kept is a queue as well, which everything on the circuit has to wait in, and its bytes are encrypted from end to
end: no keystroke can be picked out of them. So where bytes have to wait, their stream's window is made so small that
about `QUEUE` seconds of them do.

How many bytes may go on, and when, is asked of a `Meter` before they are fetched (limits and rates of the relay).

The end of one direction passes through when everything before it has gone. A reset of either stream resets the other
with the same code: behind what is still kept for it, unless its peer takes nothing of that for `draining.PATIENCE`
seconds. When both streams are closed, however it came, `on_over` is called, once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final, Protocol

from actors.draining import give_up_without_progress
from actors.switchboard.channel import Channel, LinkClosedError
from protocol.reservations import Circuit, Direction
from protocol.stream_descriptor import ResetCode
from protocol.yamux import INITIAL_WINDOW

QUEUE: Final = 0.025
"""Seconds of bytes that should wait here: what a path's rate varies by from moment to moment."""

PACED: Final = 64 * 1024
"""Bytes that may always wait here where circuits share a limited rate: four turns of the pacer, since a circuit that
has less to send than a turn would get a smaller share, and have the less to send for it."""

SAMPLE: Final = 0.1
"""Seconds over which the rate is measured that kept bytes go on at: some bursts of a slow path."""

_ROUNDS: Final = 2  # of the reactor, in which bytes go on from one link to another that keeps up
_PIECE: Final = 16 * 1024  # up to which small ones are kept as one: else a byte could cost a hundred


class Growth:
    """The memory by which the windows of all circuits together may have grown beyond their start.

    Attributes:
        most: bytes.
        grown: bytes in use; they come back as their streams end.
    """

    __slots__ = ("grown", "most")

    def __init__(self, most: int) -> None:
        self.most = most
        self.grown = 0


class Meter(Protocol):
    """Who says how many bytes may go on."""

    def take(self, half: Half, wanted: int) -> int:
        """So many of `wanted` bytes may go to this half's peer now, and must.

        If it is none, `half.channel.enqueue` is called when it is worth asking again. If the circuit's limit is
        reached with these, `half.cut` is set.
        """
        ...

    def passed(self, half: Half, length: int) -> None:
        """So many bytes went to this half's peer, which need no leave (`Half.is_free`)."""


class Half:
    """The end of one stream of a splice: keeps what is to go to its peer. A `LocalEnd`.

    Attributes:
        channel: the stream.
        circuit, direction: what the bytes to this half's peer count for.
        cut: the circuit's limit of bytes is reached: reset it as soon as what was taken has been sent.
        length: bytes that are kept.
        credit: bytes that the meter has taken for this half and not given yet.
        wanted: bytes that the meter was asked for; 0 when this half does not wait for it.
    """

    __slots__ = (
        "_early",
        "_finish",
        "_gone",
        "_kept",
        "_last_code",
        "_rate",
        "_round",
        "_since",
        "_splice",
        "_window",
        "channel",
        "circuit",
        "credit",
        "cut",
        "direction",
        "length",
        "other",
        "wanted",
    )

    other: Half

    def __init__(self, splice: Splice, channel: Channel, circuit: Circuit, direction: Direction, early: bytes) -> None:
        self.channel = channel
        self.circuit = circuit
        self.direction = direction
        self.cut = False
        self.credit = 0
        self.wanted = 0
        self._splice = splice
        self._kept: deque[bytearray] = deque()
        self.length = len(early)
        self._early = len(early)  # of that, what came with the negotiation and counts for no window
        self._round = 0  # of the reactor, in which the first of what is kept came
        self._since = 0.0  # when the first of what is kept came, or when a rate was last measured since then
        self._gone = 0  # bytes that have gone on since
        self._rate = 0.0  # bytes a second, measured last
        self._finish = False  # the other peer has finished: finish after what is kept
        self._last_code: int | None = None  # reset with this code after what is kept
        self._window = INITIAL_WINDOW
        if early:
            self._kept.append(bytearray(early))

    @property
    def is_free(self) -> bool:
        """Whether nothing waits here, and no limit counts what goes to this half's peer."""
        circuit = self.circuit
        return not self.length and not circuit.buckets and (circuit.limit is None or not circuit.limit.data)

    # ---- to this half's peer

    def fetch(self, buffer: memoryview, start: int, limit: int) -> int:
        """See `LocalEnd`."""
        if self.cut and not self.credit:
            self._splice.reset(ResetCode.LIMIT_EXCEEDED)
            return 0
        kept = self._kept
        if not kept:
            if self._finish and not self.channel.stream.local_finished:
                self.channel.finish_now()
            if self._last_code is not None:
                self._splice.reset(self._last_code)
            return 0
        if not limit:
            return 0
        length = self._splice.meter.take(self, min(limit, self.length))
        if not length:
            if self.cut:
                self._splice.reset(ResetCode.LIMIT_EXCEEDED)
            return 0
        end = start + length
        while start < end:
            piece = kept[0]
            stop = start + len(piece)
            if stop <= end:
                buffer[start:stop] = piece
                kept.popleft()
                start = stop
            else:
                room = end - start
                buffer[start:end] = memoryview(piece)[:room]
                del piece[:room]
                start = end
        self.length -= length
        self._measure(length)
        counted = length
        if self._early:
            early = min(self._early, length)
            self._early -= early
            counted -= early
        if counted:
            self.other.gone_on(counted, self._round)
        return length

    def _measure(self, length: int) -> None:
        """So many of the kept bytes have gone on: if some always were, this tells what the way to this peer takes."""
        now = self.channel.reactor.clock()
        self._gone += length
        elapsed = now - self._since
        if elapsed >= SAMPLE:
            rate = self._gone / elapsed
            # the better of two, since a path that has lost a packet stands still for a moment
            self.other.channel.resize_window(max(rate, self._rate), QUEUE, PACED if self.circuit.buckets else 0)
            self._rate = rate
            self._since, self._gone = now, 0

    def gone_on(self, length: int, came: int) -> None:
        """So many bytes of this half's peer, which came in that round of the reactor, went to the other one."""
        reactor = self.channel.reactor
        self.channel.budget.give_back(length)
        self._consumed(length, reactor.clock(), behind=reactor.rounds - came > _ROUNDS)

    def _consumed(self, length: int, now: float, *, behind: bool) -> None:
        channel, growth = self.channel, self._splice.growth
        channel.consumed(length, now, behind=behind or growth.grown >= growth.most)
        window = max(channel.stream.window, INITIAL_WINDOW)
        if window != self._window:
            growth.grown += window - self._window
            self._window = window

    def keep(self, data: memoryview, came: int) -> None:
        """Something for this half's peer has come, in that round of the reactor."""
        kept, length = self._kept, len(data)
        if not kept:
            self._round = came
            self._since, self._gone, self._rate = self.channel.reactor.clock(), 0, 0.0
            kept.append(bytearray(data))
        elif length < _PIECE and len(kept[-1]) + length <= _PIECE:
            kept[-1] += data
        else:
            kept.append(bytearray(data))
        self.length += length
        self.channel.enqueue()

    # ---- from this half's peer

    def deliver(self, buffer: memoryview, start: int, end: int, now: float) -> None:
        """See `LocalEnd`."""
        other = self.other
        if other.is_free and other.channel.pass_on(buffer, start, end):
            self._splice.meter.passed(other, end - start)
            self._consumed(end - start, now, behind=False)
        elif not other.channel.closed:
            if self.channel.budget.take(end - start, other.length):
                other.keep(buffer[start:end], self.channel.reactor.rounds)
            else:
                self._splice.reset(ResetCode.LIMIT_EXCEEDED)

    def peer_finished(self) -> None:
        """See `LocalEnd`."""
        self.other._finish = True  # noqa: SLF001  # the other half
        self.other.channel.enqueue()

    def stream_closed(self) -> None:
        """See `LocalEnd`."""
        self._splice.check_over()

    def over(self, code: int) -> None:
        """See `LocalEnd`."""
        other = self.other
        if self.channel.may_drain and other.length and not other.channel.closed:
            other.drain(code)
        else:
            self._splice.reset(code)

    def drain(self, code: int) -> None:
        """The other peer has reset its stream: reset this one behind what is kept for it."""
        self._last_code = int(code)
        self._splice.ending(code)
        self.channel.enqueue()
        give_up_without_progress(
            self.channel.reactor,
            lambda: None if self.channel.closed else self.length,
            lambda: self._splice.reset(code),
        )

    def drop(self) -> None:
        """The streams are over: forget what is kept."""
        self._kept.clear()
        self.other.channel.budget.give_back(self.length - self._early)
        self.length = self._early = 0
        self._splice.growth.grown -= self._window - INITIAL_WINDOW
        self._window = INITIAL_WINDOW


class Splice:
    """Joins the streams of a circuit, which both must be free: in memory, and not finished by us.

    `to_source` and `to_destination` are bytes of the circuit that came with what was said before; they go first.
    `on_over(code)` is called once, when both streams are closed; 0 if they ended well.

    Raises:
        LinkClosedError: one of them is over; both are now.
    """

    __slots__ = ("_code", "_on_over", "_over", "_resetting", "destination", "growth", "meter", "source")

    def __init__(
        self,
        circuit: Circuit,
        source: Channel,
        destination: Channel,
        *,
        meter: Meter,
        growth: Growth,
        on_over: Callable[[int], None],
        to_source: bytes = b"",
        to_destination: bytes = b"",
    ) -> None:
        self.meter = meter
        self.growth = growth
        self._on_over = on_over
        self._resetting = False
        self._over = False
        self._code = int(ResetCode.NONE)
        self.source = Half(self, source, circuit, Direction.TO_SOURCE, to_source)
        self.destination = Half(self, destination, circuit, Direction.TO_DESTINATION, to_destination)
        self.source.other, self.destination.other = self.destination, self.source
        try:
            for half in (self.source, self.destination):
                half.channel.join(half)
        except LinkClosedError:
            self._over = True  # whoever asked for it hears of it by the error
            self.reset(ResetCode.CONNECTION_LOST)
            raise
        for half in (self.source, self.destination):
            half.channel.enqueue()

    def reset(self, code: int) -> None:
        """Reset both streams with this code. Twice is once."""
        if self._resetting:
            return
        self._resetting = True
        self.ending(code)
        self.source.channel.reset(code)
        self.destination.channel.reset(code)
        self.check_over()

    def ending(self, code: int) -> None:
        """It ends with this code, unless it has begun to end with another one."""
        if not self._code:
            self._code = int(code)

    def check_over(self) -> None:
        """One of the streams may have been the last to close."""
        if not self._over and self.source.channel.closed and self.destination.channel.closed:
            self._over = True
            self.source.drop()
            self.destination.drop()
            self._on_over(self._code)
