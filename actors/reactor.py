"""Synchronous callbacks on descriptors, run by one trio task."""

from __future__ import annotations

from collections.abc import Callable

READ: int = 0x001
WRITE: int = 0x004


class Timer:
    """A call that will be made. `cancel` it at will; cancelling twice or too late does nothing."""

    def cancel(self) -> None:
        """Do not make the call."""
        raise NotImplementedError


class Reactor:
    """One per process. All methods but `run` are called from the thread and trio run that `run` is in."""

    def __init__(self, clock: Callable[[], float]) -> None:
        raise NotImplementedError

    async def run(self) -> None:
        """Serve until cancelled. An exception from a callback that nobody foresaw is raised from here."""
        raise NotImplementedError

    def register(
        self, fd: int, events: int, callback: Callable[[int], None], on_error: Callable[[Exception], None]
    ) -> None:
        """Call `callback(ready)` whenever one of `events` (READ | WRITE) holds, level-triggered.

        A PeerupError or OSError that the callback raises goes to `on_error`, any other ends `run`.
        """
        raise NotImplementedError

    def modify(self, fd: int, events: int) -> None:
        """Wait for other events on a registered descriptor; 0 keeps it registered and silent (but for hang-ups)."""
        raise NotImplementedError

    def unregister(self, fd: int) -> None:
        """Forget a descriptor. Do this before closing it. Unknown descriptors are ignored."""
        raise NotImplementedError

    def call_soon(self, function: Callable[[], None]) -> None:
        """Call it from the loop, after the callbacks that are being made."""
        raise NotImplementedError

    def call_later(self, delay: float, function: Callable[[], None]) -> Timer:
        """Call it in `delay` seconds."""
        raise NotImplementedError

    def close(self) -> None:
        """Release the reactor's own descriptor. Registered descriptors stay their owners'."""
        raise NotImplementedError
