"""How a link is closed in good order, and how one learns that a peer has received what it was sent.

Theory of operation. Two losses threaten the last bytes of a connection. What its owner has not given to the kernel is
lost when it just closes; and what the kernel has not delivered yet is lost as soon as anything more comes from the
peer, because the kernel answers bytes for a closed socket with a reset. So a link that is closed in good order goes on
for a while, though nobody uses it any more (:class:`Closing`)::

    sending   what is left goes out, and behind it a ping and the go away; whatever comes is read, pings are answered
      |         the peer has answered that ping: it has received everything
    ended     the wire is shut down for writing, and read up to the end of what the peer sends
      |         end of file, or no more patience
    closed

It is bounded: by `BRIEF` where no finished stream depends on it, by `SILENCE` without any progress, and by `LONGEST`.
Progress is what the wire takes of what is left and, once it has taken all of it, only what the other end does: what it
sends, and what its kernel acknowledges. Our own pings, and what others send over the same connection to a relay, say
nothing of it. Over a relay, which may still hold a window of it, patience grows with what that may be.

The ping is one of :class:`Confirmations`, which others may ask for, too: a tunnel has finished when its peer is known
to have received the end of it, and not when that was put into a buffer.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable
from typing import Final, Protocol

from actors.reactor import Reactor
from actors.switchboard.wire import Wire
from supervisor.timers import Timer

MOST_WAITING: Final = 4096
"""Who waits for answers on one link at a time: beyond it the oldest are told that nobody knows. A peer that answers no
pings could otherwise make us keep everything that it has ever opened."""

PACE: Final = 0.5
"""Seconds between two pings that ask whether everything has been received: a busy connection is asked once for many
streams, and the peer is not kept busy with answers."""

RETRY: Final = 10.0
"""Seconds after which it is asked again: some peers drop pings when they are busy."""

LOOK: Final = 0.05
"""Seconds between looks at a link that is being closed."""

BRIEF: Final = 2.0
"""Seconds for what only makes an end more polite: resets of streams that are cut, and the peer's end of file."""

UNANSWERED: Final = 3.0
"""Seconds without an answer to the ping, after the peer's kernel has acknowledged everything: it will not answer."""

SILENCE: Final = 30.0
"""Seconds without any progress, such as an acknowledgement, after which a link is closed as it is."""

LONGEST: Final = 600.0
"""Seconds that closing may take in all: a megabyte at 14 kbit/s."""

HELD: Final = 256 * 1024
"""Bytes that a relay may still hold when it has taken everything: the first window of a stream."""

SLOWEST: Final = 4 * 1024
"""Bytes a second at which a relay is given time to pass them on."""

_MARK: Final = 0x8000_0000  # in the value of a ping; those that measure round trips count from 1


@dataclasses.dataclass(eq=False)
class _Question:
    value: int
    ends: int
    told: deque[Callable[[bool], None]]


class Confirmations:
    """What the peer of a link is known to have received.

    Args:
        ping: sends a ping with this value behind everything that has been laid out.
        ends: how many ends of streams, FIN and RST, have been laid out.
    """

    __slots__ = (
        "_asked",
        "_confirmed",
        "_count",
        "_ends",
        "_over",
        "_ping",
        "_reactor",
        "_sent_at",
        "_timer",
        "_told",
        "_waiting",
    )

    def __init__(self, reactor: Reactor, ping: Callable[[int], None], ends: Callable[[], int]) -> None:
        self._reactor = reactor
        self._ping = ping
        self._ends = ends
        self._confirmed = 0
        self._count = 0
        self._asked: deque[_Question] = deque()
        self._told: deque[Callable[[bool], None]] = deque()  # whom to tell of a question that has yet to be asked
        self._waiting = 0
        self._timer: Timer | None = None
        self._sent_at = reactor.clock() - PACE
        self._over: bool | None = None

    @property
    def pending(self) -> bool:
        """Whether streams have been ended, and the peer is not known to have received all of it."""
        return self._ends() != self._confirmed

    def ask(self, told: Callable[[bool], None]) -> None:
        """Call `told(True)` when the peer has received everything sent so far, `told(False)` if that stays unknown."""
        if self._over is not None:
            told(self._over)
            return
        self._told.append(told)
        self._waiting += 1
        self._plan()
        if self._waiting > MOST_WAITING:
            self._give_up_oldest()

    def hurry(self) -> None:
        """Ask now, if anybody waits for it."""
        if self._told and self._over is None:
            self._count = (self._count + 1) % _MARK
            question = _Question(_MARK | self._count, self._ends(), self._told)
            self._told = deque()
            self._asked.append(question)
            self._sent_at = self._reactor.clock()
            self._plan()
            self._ping(question.value)

    def answered(self, value: int) -> bool:
        """Take the answer to a ping. Whether it was one of these."""
        if not value & _MARK:
            return False
        if any(question.value == value for question in self._asked):
            while self._asked:
                question = self._asked.popleft()  # an answer is one to all earlier pings, too
                self._confirmed = question.ends
                self._waiting -= len(question.told)
                for told in question.told:
                    told(True)
                if question.value == value:
                    break
        self._plan()
        return True

    def end(self, *, received: bool) -> None:
        """The link is gone; `received`: the peer is known to have received everything that was asked about."""
        self._over = received
        self._stop_timer()
        waiting = [*(told for question in self._asked for told in question.told), *self._told]
        self._asked.clear()
        self._told.clear()
        self._waiting = 0
        for told in waiting:
            told(received)

    def _give_up_oldest(self) -> None:
        while self._asked and not self._asked[0].told:
            self._asked.popleft()
        self._waiting -= 1
        told = (self._asked[0].told if self._asked else self._told).popleft()
        told(False)

    def _plan(self) -> None:
        """Ask when it is time to: for those who wait, or again for those who were not answered."""
        self._stop_timer()
        if self._told or self._asked:
            wait = self._sent_at + (PACE if self._told else RETRY) - self._reactor.clock()
            if wait > 0:
                self._timer = self._reactor.call_later(wait, self._due)
            else:
                self._due()

    def _due(self) -> None:
        self._timer = None
        if not self._told and self._asked:
            self._told = self._asked.pop().told  # an answer that still comes says no more than that of the next one
        self.hurry()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class ClosingLink(Protocol):
    """What closing needs of a link."""

    sent: int
    received: int

    @property
    def unsent(self) -> bool:
        """Whether something is laid out, or waits to be, that the wire has not taken."""
        ...

    def shut_down(self) -> None:
        """Send nothing more; read on."""

    def destroy(self) -> None:
        """Close the wire."""


class Closing:
    """Closes a link in good order; it begins at once.

    Args:
        worth: streams that have ended well may depend on what is left.
    """

    def __init__(
        self, link: ClosingLink, wire: Wire, reactor: Reactor, confirmations: Confirmations, *, worth: bool
    ) -> None:
        self._link = link
        self._wire = wire
        self._reactor = reactor
        self._worth = worth
        self._confirmed = False
        self._began = self._progress_at = reactor.clock()
        self._mark: tuple[int, ...] | None = None
        self._handed = False  # the wire has taken everything
        self._ended_at: float | None = None
        self._timer = reactor.call_later(LOOK, self._look)
        confirmations.ask(self._told)
        confirmations.hurry()

    def stop(self) -> None:
        """The wire has been closed."""
        self._timer.cancel()

    def _told(self, received: bool) -> None:  # noqa: FBT001  # what `Confirmations` calls
        self._confirmed = received

    def _look(self) -> None:
        now = self._reactor.clock()
        if (mark := self._seen()) != self._mark:
            self._mark, self._progress_at = mark, now
        if self._ended_at is None:
            if not self._link.unsent and (self._confirmed or self._is_acknowledged(now)):
                self._ended_at = now
                self._link.shut_down()
            elif self._impatient(now, self._began):
                self._link.destroy()
                return
        elif now - self._ended_at >= BRIEF and (self._confirmed or self._impatient(now, self._ended_at)):
            self._link.destroy()
            return
        self._timer = self._reactor.call_later(LOOK, self._look)

    def _impatient(self, now: float, since: float) -> bool:
        if not self._worth:
            return now - since >= BRIEF
        held = min(self._link.sent, HELD) if self._wire.acknowledgement() is None else 0
        return now - self._progress_at >= SILENCE + held / SLOWEST or now - self._began >= LONGEST

    def _seen(self) -> tuple[int, ...]:
        """What changes with progress."""
        self._handed = self._handed or not self._link.unsent
        if not self._handed:
            return self._link.received, self._wire.progress(), self._link.sent
        known = self._wire.acknowledgement()
        return self._link.received, 0 if known is None else known.acknowledged

    def _is_acknowledged(self, now: float) -> bool:
        """Whether the peer has everything, but does not say so."""
        known = self._wire.acknowledgement()
        return known is not None and known.complete and now - self._progress_at >= UNANSWERED
