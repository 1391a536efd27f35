"""The program of the process in front of a relay (:mod:`peerup.front`): `front_process.py PID PIDFD RELAY MANAGER`.

It runs for as long as the relay does and is to take little memory, so it imports nothing but what it needs of the
standard library. The arguments are the relay's pid, and descriptors: of the relay's process, of the connection to it,
and of the connected socket of the service manager (-1 if there is none). The signals that it passes on are blocked when
it starts.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
from typing import Final, NoReturn

PASSED_ON: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGABRT)

LEAVE: Final = b"leave"
"""What the relay sends when it may be left; everything else that it sends is for the service manager."""

_LONGEST: Final = 4096
"""Bytes of one message from the relay."""


def _wait(pid: int, child: int, relay: int, manager: int) -> int:
    """Pass on what there is, until the relay ends or may be left; how it ended, as `os.waitstatus_to_exitcode` says."""
    wake, waker = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
    for number in PASSED_ON:
        signal.signal(number, lambda number, _: signal.pidfd_send_signal(child, number))
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
    poll = select.poll()
    for descriptor in (wake, relay, child):
        poll.register(descriptor, select.POLLIN)
    while True:
        ready = [descriptor for descriptor, _ in poll.poll()]
        if wake in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(wake, _LONGEST)
        if relay in ready:
            message = os.read(relay, _LONGEST)
            if message == LEAVE:
                return 0
            if not message:
                poll.unregister(relay)  # it is ending
            elif manager >= 0:
                with contextlib.suppress(OSError):  # a manager that has gone, or does not listen, does not matter
                    os.write(manager, message)
        elif child in ready:
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _end(code: int) -> NoReturn:
    if code < 0:
        with contextlib.suppress(OSError):  # two signals cannot be caught and need not be given back
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    _end(_wait(*map(int, sys.argv[1:])))
