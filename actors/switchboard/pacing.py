"""Who of a relay's circuits may send how much now: the limits and rates of `RelayTable`, in turns.

Theory of operation. A circuit for which no rate is limited is answered at once; only the limit of bytes of the circuit
itself is looked at. The others stand in line: whenever one has something to send, and whenever the budgets have
been filled up a little, once a round of the reactor, the line is gone through from its front, and each takes at most
`TURN` bytes, or a whole frame if it is alone. Who got something goes to the back when it comes again; who got nothing
keeps its place. So those who share a budget get even shares of it, and one that waits for a budget of its own holds up
nobody else.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import Final

from actors.switchboard.protocols import CancellableTimer
from actors.switchboard.splice import Half
from protocol.reservations import RelayTable

TURN: Final = 16 * 1024
"""Bytes that one of several takes at a time: small, for shares differ by what is taken at once."""

SHORTEST_WAIT: Final = 0.002
"""Seconds between two times of going through the line, at least: a fast rate is not a reason to spin."""


class Pacer:
    """See the module. It is the `Meter` of all splices of one relay.

    Args:
        now: the clock that the table is given.
        call_soon, call_later: the reactor's.

    Attributes:
        carried: bytes that went on, by `Direction`, in all.
    """

    def __init__(
        self,
        table: RelayTable,
        now: Callable[[], float],
        call_soon: Callable[[Callable[[], None]], None],
        call_later: Callable[[float, Callable[[], None]], CancellableTimer],
    ) -> None:
        self.carried = [0, 0]
        self._table = table
        self._now = now
        self._call_soon = call_soon
        self._call_later = call_later
        self._line: deque[Half] = deque()
        self._planned = False
        self._timer: CancellableTimer | None = None

    @property
    def waiting(self) -> int:
        """How many stand in line."""
        return len(self._line)

    def take(self, half: Half, wanted: int) -> int:
        """See `Meter`."""
        if half.credit:
            count = min(half.credit, wanted)
            half.credit -= count
            return count
        if not half.circuit.buckets:
            return self._ask(half, wanted)[0]
        if not half.wanted:
            half.wanted = wanted
            self._line.append(half)
            self.go_through_soon()
        return 0

    def passed(self, half: Half, length: int) -> None:
        """See `Meter`."""
        half.circuit.forwarded[half.direction] += length
        self.carried[half.direction] += length

    def went_ahead(self, half: Half, count: int) -> None:
        """So many bytes went to this half's peer before its circuit was open."""
        self._ask(half, count)
        half.channel.enqueue()

    def go_through_soon(self) -> None:
        """Somebody new stands in line, or the limits are other ones."""
        if not self._planned:
            self._planned = True
            self._call_soon(self._go_through)

    def _ask(self, half: Half, wanted: int) -> tuple[int, float]:
        allowance = self._table.allow(half.circuit, half.direction, wanted, self._now())
        if allowance.over:
            half.cut = True
        self.carried[half.direction] += allowance.count
        return allowance.count, allowance.wait

    def _go_through(self) -> None:
        self._planned = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        waiting, self._line = self._line, deque()
        alone, shortest = len(waiting) == 1, math.inf
        for half in waiting:
            if half.channel.closed:
                half.wanted = 0
                continue
            half.credit, wait = self._ask(half, half.wanted if alone else min(half.wanted, TURN))
            if half.credit or half.cut:
                half.wanted = 0
                half.channel.enqueue()
            else:
                self._line.append(half)
                shortest = min(shortest, wait)
        if shortest < math.inf:
            self._timer = self._call_later(max(shortest, SHORTEST_WAIT), self._on_time)

    def _on_time(self) -> None:
        self._timer = None
        self.go_through_soon()
