"""What comes before a reset goes first: how long it is waited for.

A reset that crosses from one connection to another must not overtake the bytes before it. They wait for somebody who
reads, though, and that may be never; so whoever holds them gives up after a while without progress.
"""

from __future__ import annotations

import fcntl
import socket
import sys
import termios
from collections.abc import Callable
from typing import Final

from actors.reactor import Reactor

PATIENCE: Final = 5.0
"""Seconds without progress after which what came before a reset is given up, and the reset passed on all the same."""

_FIRST_LOOK: Final = 0.005  # seconds until it is looked whether all has gone; then twice that,
_LAST_LOOK: Final = 0.1  # up to this


def give_up_without_progress(reactor: Reactor, progress: Callable[[], int | None], give_up: Callable[[], None]) -> None:
    """Call `give_up` when `progress()` has been the same for `PATIENCE` seconds; None ends the watch."""
    before = progress()

    def look() -> None:
        nonlocal before
        now = progress()
        if now is None:
            return
        if now == before:
            give_up()
            return
        before = now
        reactor.call_later(PATIENCE, look)

    reactor.call_later(PATIENCE, look)


def when_gone(reactor: Reactor, left: Callable[[], int | None], done: Callable[[], None]) -> None:
    """Call `done` when `left()` is 0, at once if it is, or has been the same for `PATIENCE` seconds; None: not at all.

    For what no event tells of, such as that the other end's kernel has confirmed everything.
    """
    before, since, pause = -1, 0.0, _FIRST_LOOK

    def look() -> None:
        nonlocal before, since, pause
        now, clock = left(), reactor.clock()
        if now is None:
            return
        if now != before:
            before, since = now, clock
        if not now or clock - since >= PATIENCE:
            done()
            return
        reactor.call_later(pause, look)
        pause = min(_LAST_LOOK, 2 * pause)

    look()


def unacknowledged(sock: socket.socket) -> int:
    """Bytes given to a connected TCP socket that the other end's kernel has not confirmed; 0 where nobody knows."""
    try:
        told = fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4))
    except OSError:
        return 0
    return int.from_bytes(told, sys.byteorder)


def unread(sock: socket.socket) -> int:
    """Bytes that lie in a connected socket to be read; 0 where nobody knows."""
    try:
        told = fcntl.ioctl(sock.fileno(), termios.FIONREAD, bytes(4))
    except OSError:
        return 0
    return int.from_bytes(told, sys.byteorder)
