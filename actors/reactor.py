"""Synchronous callbacks on descriptors, served by one trio task: the loop that carries bytes.

Theory of operation. A task per stream would cost two trio wake-ups for every hop of every byte. Instead all sockets of
the data plane of one process are in one epoll set of our own, and plain callbacks are made for what is ready.

How the loop shares its thread with trio: trio's documented instrument `before_io_wait` is called when no task can run
and trio is about to sleep. There we sleep ourselves, in our own epoll set, of which trio's epoll descriptor is a
member: whatever would have woken trio ends our sleep, and until then a ready socket costs one system call and its
callback, and no step of trio's scheduler. Trio is never made to wait: its deadlines bound our sleep, and a task that a
callback made runnable, or an event in trio's own set, ends the loop after the callbacks of one round (each of which
does a bounded amount of work).

Trio does not publish its epoll descriptor nor its queue of tasks. Where they cannot be had, or trio's clock is not the
real one (tests with virtual time), a task waits for our set to become readable instead: the same behaviour, a little
slower a hop.
"""

from __future__ import annotations

import math
import mmap
import os
import select
from collections import deque
from collections.abc import Callable, Sized
from typing import Final, NamedTuple, NoReturn

import trio

from protocol.errors import PeerupError
from supervisor.timers import Timer, Timers

READ: Final = select.EPOLLIN
WRITE: Final = select.EPOLLOUT
HANG_UP: Final = select.EPOLLHUP
ERROR: Final = select.EPOLLERR

SCRATCH_SIZE: Final = 512 * 1024
"""Room to receive into; shared by all callbacks, since they run one at a time and keep nothing in it."""

_MAX_EVENTS: Final = 64  # of one round, so that no round is long

Ready = Callable[[int], None]
Failed = Callable[[Exception], None]


class Rooms(NamedTuple):
    """Where the bytes of one link lie for a moment: as they came, opened, and laid out to be sealed."""

    received: memoryview
    opened: memoryview
    outgoing: memoryview


def _trio_sleeps_on() -> tuple[int, Sized] | None:
    """The descriptor that trio itself sleeps on and its runnable tasks, if this trio has them and keeps real time."""
    if not isinstance(trio.lowlevel.current_clock(), _real_clock()):
        return None
    try:
        from trio._core._run import GLOBAL_RUN_CONTEXT  # see the module's docstring

        runner = GLOBAL_RUN_CONTEXT.runner
        descriptor: object = runner.io_manager._epoll.fileno()  # noqa: SLF001  # likewise
        runnable: object = runner.runq  # what `current_statistics` counts, and much else that takes time
    except (ImportError, AttributeError):
        return None
    return (descriptor, runnable) if isinstance(descriptor, int) and isinstance(runnable, Sized) else None


def _real_clock() -> type:
    from trio._core._run import SystemClock  # not public either, and as easily done without

    return SystemClock


class Reactor:
    """One per process. All methods are called from the thread and the trio run that `run` is in.

    `clock` gives seconds of a monotonic clock. `direct=False` forbids the shortcut that the module describes.

    Attributes:
        clock: the one given.
        scratch: the shared room to receive into; good within one callback.
        rooms: for the links of the switchboard, by their depth; good within one callback, too.
        rounds: how often the loop has looked for ready descriptors.
    """

    def __init__(self, clock: Callable[[], float], *, direct: bool = True) -> None:
        self.clock = clock
        # Fresh pages: unlike a bytearray's they take no memory before there is traffic to fill them.
        self.scratch = _fresh_pages()
        self.rooms = (
            Rooms(self.scratch, _fresh_pages(), _fresh_pages()),
            Rooms(_fresh_pages(), _fresh_pages(), _fresh_pages()),
        )
        self.rounds = 0
        self._epoll = select.epoll()
        self._handlers: dict[int, tuple[Ready, Failed]] = {}
        self._soon: deque[Callable[[], None]] = deque()
        self._timers = Timers()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll.register(self._wake, READ)
        self._allow_direct = direct
        self._direct = False
        self._trio_epoll = -1
        self._runnable: Sized = ()
        self._dispatching = False
        self._stale: set[int] = set()  # unregistered in this round
        self._failure: BaseException | None = None
        self._failed = trio.Event()
        self._buffers: list[memoryview] = []

    # ---- what callbacks and tasks use

    def register(self, fd: int, events: int, callback: Ready, on_error: Failed) -> None:
        """Call `callback(ready)` whenever one of `events` (READ | WRITE) holds, level-triggered.

        HANG_UP and ERROR are always told. A PeerupError or OSError that the callback raises goes to `on_error`;
        anything else that it raises, or that `on_error` raises, is a defect and is raised from `run`.
        """
        self._epoll.register(fd, events)
        self._handlers[fd] = (callback, on_error)

    def modify(self, fd: int, events: int) -> None:
        """Wait for other events on a registered descriptor; with 0 only HANG_UP and ERROR are told."""
        self._epoll.modify(fd, events)

    def unregister(self, fd: int) -> None:
        """Forget a descriptor. Do this before closing it. Unknown descriptors are ignored."""
        if self._handlers.pop(fd, None) is not None:
            self._epoll.unregister(fd)
            if self._dispatching:
                self._stale.add(fd)

    def call_soon(self, function: Callable[[], None]) -> None:
        """Call it from the loop, after the callbacks of this round. Errors are raised from `run`."""
        self._soon.append(function)
        if not self._dispatching:
            self._interrupt()

    def call_later(self, delay: float, function: Callable[[], None]) -> Timer:
        """Call it in `delay` seconds. Errors are raised from `run`."""
        timer = self._timers.call_at(self.clock() + delay, function)
        if not self._dispatching:
            self._interrupt()
        return timer

    def take_buffer(self, size: int) -> memoryview:
        """A buffer of at least `size` bytes that may be kept across callbacks; give it back to be used again."""
        if self._buffers and len(self._buffers[-1]) >= size:
            return self._buffers.pop()
        return memoryview(bytearray(size))

    def return_buffer(self, buffer: memoryview) -> None:
        """Give back what `take_buffer` gave."""
        if len(self._buffers) < 4:
            self._buffers.append(buffer)

    # ---- the loop

    async def run(self) -> NoReturn:
        """Serve until cancelled.

        Raises:
            Exception: whatever a callback raised that nobody foresaw.
        """
        found = _trio_sleeps_on() if self._allow_direct else None
        self._failed = trio.Event()
        self._failure = None
        if found is None:
            await self._run_as_task()
        descriptor, self._runnable = found
        self._trio_epoll = descriptor
        self._epoll.register(descriptor, READ)
        self._direct = True
        self._token = trio.lowlevel.current_trio_token()
        instrument = _Sleeper(self)
        trio.lowlevel.add_instrument(instrument)
        try:
            await self._failed.wait()
            assert self._failure is not None
            raise self._failure
        finally:
            self._direct = False
            trio.lowlevel.remove_instrument(instrument)
            self._epoll.unregister(descriptor)

    def close(self) -> None:
        """Release the reactor's own descriptors. Registered descriptors stay their owners'."""
        self._handlers.clear()
        self._epoll.close()
        os.close(self._wake)

    async def _run_as_task(self) -> NoReturn:
        while True:
            with trio.move_on_after(0 if self._soon else self._seconds_to_timer()):
                await trio.lowlevel.wait_readable(self._epoll.fileno())
            self._round(0)
            self._raise_failure()
            await trio.lowlevel.checkpoint()

    def _has_failed(self) -> bool:
        return self._failure is not None

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _sleep_for_trio(self, timeout: float) -> None:
        """Serve descriptors for as long as trio would sleep. Raises nothing."""
        if self._failure is not None:
            return
        deadline = self.clock() + timeout if timeout else 0.0
        while True:
            trio_ready = self._round(timeout)
            if self._has_failed():
                self._failed.set()  # makes a task runnable
            elif not timeout or trio_ready:
                return
            if self._runnable:
                # trio has decided already how long it will sleep; this makes it look again at once
                self._token.run_sync_soon(_nothing)
                return
            if timeout != math.inf:
                timeout = deadline - self.clock()
                if timeout <= 0:
                    # the same: trio would sleep once more for as long as it had decided, and nobody serve descriptors
                    self._token.run_sync_soon(_nothing)
                    return

    def _round(self, timeout: float) -> bool:
        """Sleep until something is ready, at most `timeout` seconds; make the calls. Whether trio's set is ready."""
        handlers = self._handlers
        trio_ready = False
        try:
            timeout = 0 if self._soon else min(timeout, self._seconds_to_timer())
            events = self._epoll.poll(None if timeout == math.inf else timeout, _MAX_EVENTS)
            self.rounds += 1
            self._dispatching = True
            self._stale.clear()
            for fd, ready in events:
                if self._stale and fd in self._stale:
                    continue  # what was ready is gone; what has its number now is told of in the next round
                handler = handlers.get(fd)
                if handler is None:
                    if fd == self._trio_epoll:
                        trio_ready = True
                    elif fd == self._wake:
                        os.eventfd_read(self._wake)
                    continue
                try:
                    handler[0](ready)
                except (PeerupError, OSError) as error:
                    handler[1](error)
            self._timers.run(self.clock())
            for _ in range(len(self._soon)):
                self._soon.popleft()()
        except BaseException as error:  # noqa: BLE001  # raised again from `run`; trio would only log it here
            self._failure = error
        finally:
            self._dispatching = False
        return trio_ready

    def _seconds_to_timer(self) -> float:
        when = self._timers.next()
        return math.inf if when is None else max(0.0, when - self.clock())

    def _interrupt(self) -> None:
        """Make a loop that runs as a task look at timers and calls. A direct one looks before each sleep."""
        if not self._direct:
            os.eventfd_write(self._wake, 1)


def _fresh_pages() -> memoryview:
    return memoryview(mmap.mmap(-1, SCRATCH_SIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


class _Sleeper(trio.abc.Instrument):
    def __init__(self, reactor: Reactor) -> None:
        self._reactor = reactor

    def before_io_wait(self, timeout: float) -> None:
        """Trio is about to sleep."""
        self._reactor._sleep_for_trio(timeout)  # noqa: SLF001  # part of the reactor


def _nothing() -> None:
    pass
