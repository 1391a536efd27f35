"""Callbacks at moments, driven from outside: no clock, no thread."""

from __future__ import annotations

import heapq
from collections.abc import Callable

_COMPACT_ABOVE = 64
"""Below this many entries, cancelled ones are left in the heap until their time comes."""


class Timer:
    """A callback that is due at `when`; `cancel` makes it never happen."""

    __slots__ = ("_function", "_owner", "when")

    def __init__(self, when: float, function: Callable[[], None], owner: Timers) -> None:
        self.when = when
        self._function: Callable[[], None] | None = function
        self._owner = owner

    def cancel(self) -> None:
        """Do not call back. Harmless when it was called already."""
        if self._function is not None:
            self._function = None
            self._owner._forgotten()  # noqa: SLF001  # the two classes are one idea

    @property
    def pending(self) -> bool:
        """Whether it is still to be called."""
        return self._function is not None

    def fire(self) -> None:
        """Call back now, once."""
        function, self._function = self._function, None
        if function is not None:
            function()


class Timers:
    """A heap of timers. Those due at the same moment run in the order in which they were made.

    `changed` is called with the new earliest moment whenever a timer is made that is due before all others.
    """

    def __init__(self, changed: Callable[[float], None] | None = None) -> None:
        self._heap: list[tuple[float, int, Timer]] = []
        self._made = 0
        self._cancelled = 0
        self._changed = changed

    def call_at(self, when: float, function: Callable[[], None]) -> Timer:
        """Call back at `when`, from :meth:`run`."""
        timer = Timer(when, function, self)
        self._made += 1
        heap = self._heap
        heapq.heappush(heap, (when, self._made, timer))
        if self._changed is not None and heap[0][2] is timer:
            self._changed(when)
        return timer

    def next(self) -> float | None:
        """When the earliest pending timer is due, or None."""
        heap = self._heap
        while heap and not heap[0][2].pending:
            heapq.heappop(heap)
            self._cancelled -= 1
        return heap[0][0] if heap else None

    def run(self, now: float) -> None:
        """Call back everything that is due at `now`, also what the callbacks make due."""
        while (when := self.next()) is not None and when <= now:
            heapq.heappop(self._heap)[2].fire()

    def clear(self) -> None:
        """Cancel all timers."""
        for _, _, timer in self._heap:
            timer._function = None  # noqa: SLF001  # the two classes are one idea
        self._heap.clear()
        self._cancelled = 0

    def __len__(self) -> int:
        return len(self._heap) - self._cancelled

    def _forgotten(self) -> None:
        self._cancelled += 1
        if self._cancelled > _COMPACT_ABOVE and self._cancelled * 2 > len(self._heap):
            self._heap = [entry for entry in self._heap if entry[2].pending]
            heapq.heapify(self._heap)
            self._cancelled = 0
