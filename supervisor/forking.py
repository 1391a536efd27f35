"""Making a process: `fork`, and the few lines that each child runs before anything else."""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import os
import signal
import sys
import traceback
from collections.abc import Callable, Collection

from supervisor import linux
from supervisor.log_output import say_once

CRASHED = os.EX_SOFTWARE
"""The exit status of a process whose code raised an exception that nobody handled."""

# As plain numbers: sixty members of an enumeration are spread over many pages, and each process would copy them.
_SIGNALS = tuple(sorted(int(number) for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}))

_inherited: list[object] = []
"""What a child got from its parent by the fork: kept so that no finaliser of it ever closes a descriptor here."""


class Child:
    """A process that this process made.

    Attributes:
        pid: its process id, ours to wait for.
        pidfd: readable when it has ended; closed by :meth:`reap`.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        try:
            self.pidfd = os.pidfd_open(pid)
        except OSError:
            # Nobody would notice its end, and nobody could stop it: better none than that.
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send it a signal; harmless when it has ended."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, number)

    def reap(self) -> int:
        """Wait for it and close its descriptor; the wait status, for :func:`describe_status`."""
        _, status = os.waitpid(self.pid, 0)
        os.close(self.pidfd)
        self.pidfd = -1
        return status


def describe_status(status: int) -> str:
    """A wait status in words: `exit status 1`, `killed by SIGKILL`."""
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return f"exit status {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"


def _on_roomy_stack(main: Callable[[], int]) -> int:
    return main()


# CPython keeps the frames of a thread in chunks of 16 KiB, and gives a chunk back to the kernel as soon as no frame is
# in it. A child starts deep inside its ancestors' calls; where that happens to be close to the end of a chunk, every
# further call maps memory and unmaps it again: some actors needed half as much CPU again for that. A frame that wants
# more than a chunk gets one of the next power of two: this one asks for a little over half of 256 KiB, which is never
# touched, and all the calls of the child find room in the other half.
_on_roomy_stack.__code__ = _on_roomy_stack.__code__.replace(co_stacksize=17 * 1024)


def fork(main: Callable[[], int], *, keep: Collection[int], inherited: object = None) -> Child:
    """Make a process that runs `main` and ends with the status that it returns.

    The child dies with its parent, has no descriptors but the standard ones and `keep`, default signal dispositions,
    and ends with :data:`CRASHED` and a traceback if `main` raises. `inherited` is what the child must never finalise.

    Raises:
        OSError: the process could not be made.
    """
    _flush()
    # Collected first and then moved out of the collector's sight: the child's collections do not touch, and so do not
    # copy, the pages that it shares with us.
    gc.collect()
    gc.freeze()
    parent = os.getpid()
    # A signal that came between the fork and the reset of handlers would run the parent's handler in the child.
    before = linux.ALL_SIGNALS.install()
    try:
        pid = os.fork()
        if pid == 0:
            _inherited.append(inherited)
            _run(main, parent, keep)
    finally:
        before.install()
    return Child(pid)


def _run(main: Callable[[], int], parent: int, keep: Collection[int]) -> None:
    """Never returns: whatever happens, the parent's code must not go on in the child."""
    status = CRASHED
    try:
        linux.die_with_parent(parent, signal.SIGKILL)
        linux.close_all_descriptors(keep)
        _reset_signals()
        faulthandler.enable()
        status = _on_roomy_stack(main)
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else CRASHED
    except BaseException:  # noqa: BLE001 - the last line of defence of a process; it ends below
        say_once(traceback.format_exc())
    finally:
        _flush()
        os._exit(status)


def _reset_signals() -> None:
    signal.set_wakeup_fd(-1)
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    linux.NO_SIGNALS.install()


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
