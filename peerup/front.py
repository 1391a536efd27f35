"""The process in front of a relay: whoever started the relay waits for this one, and it does not wait for circuits.

Theory of operation. A relay that is told to stop gives open circuits some time. What a successor needs (ports, the run
directory with its lock and the control socket) is free long before. So the relay is a child of the process that was
started, which is the front::

    SIGTERM, SIGINT, SIGABRT    passed on to the relay; SIGHUP is ignored, as the relay does
    READY=1, WATCHDOG=1, ...    what the relay says to systemd is passed on: it listens to its main process alone
    the relay may be left       the front ends with status 0: a successor may be started while circuits run on
    the relay ends              the front ends as it did: with its status, or by the same signal
    the front ends otherwise    the kernel kills the relay

The relay has a process group of its own. Otherwise a signal to the group, such as that of Ctrl-C, would reach it twice,
and the second one ends a drain at once. The front runs a program of its own (:mod:`peerup.front_process`), because what
this process has imported until now takes several times the memory.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Final, NoReturn

from peerup import front_process
from peerup.systemd import ServiceManager
from supervisor import linux


class Front:
    """The relay's end of its connection to the front.

    Attributes:
        pid: the front's process, which is the one that was started.
    """

    def __init__(self, sock: socket.socket, pid: int) -> None:
        self.pid: Final = pid
        self._sock: socket.socket | None = sock

    def tell(self, *state: str) -> None:
        """Have systemd told assignments such as `READY=1`.

        Nothing is told once this process was left: it would be taken for the successor's word.
        """
        self._send("\n".join(state).encode())

    def leave(self) -> None:
        """Have the front end. This process goes on without it."""
        linux.outlive_parent()
        self._send(front_process.LEAVE)
        if self._sock is not None:
            self._sock.close()
        self._sock = None

    def _send(self, message: bytes) -> None:
        if self._sock is not None:
            with contextlib.suppress(OSError):  # it must not be able to hold up what it stands for
                self._sock.send(message)


def stand_in_front(manager: ServiceManager) -> Front:
    """Go on in a child of this process, which stays in front of it and never returns from here.

    Call it before there are threads or other children. `manager` is told what the child has to say.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    front = os.getpid()
    sys.stdout.flush()
    sys.stderr.flush()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, front_process.PASSED_ON)
    pid = os.fork()
    if pid:
        _become_front(pid, ours, manager)
    ours.close()
    theirs.setblocking(False)
    linux.die_with_parent(front, signal.SIGKILL)
    os.setpgid(0, 0)
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return Front(theirs, front)


def _become_front(pid: int, relay: socket.socket, manager: ServiceManager) -> NoReturn:
    child = os.pidfd_open(pid)
    connected = manager.connect()
    kept = [child, relay.fileno(), *([] if connected is None else [connected.fileno()])]
    # What else was opened before the fork is the relay's: whoever reads from it waits for the relay's end alone.
    linux.close_all_descriptors(kept)
    for descriptor in kept:
        os.set_inheritable(descriptor, True)
    told = -1 if connected is None else connected.fileno()
    program = str(Path(front_process.__file__).resolve())
    numbers = (str(number) for number in (pid, child, relay.fileno(), told))
    # Isolated and without site packages: it needs neither, and nothing around it is to change what it does.
    os.execv(sys.executable, [sys.executable, "-I", "-S", program, *numbers])  # noqa: S606 - our own program
