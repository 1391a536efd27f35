"""What the kernel tells of a process, as series."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from protocol.messages.system import Sample

_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")
_UTIME, _STIME = 11, 12  # fields of /proc/<pid>/stat, counted from behind the name (proc(5), 14 and 15)


def process_samples(pid: int, proc: Path = Path("/proc")) -> tuple[Sample, ...]:
    """CPU seconds, resident bytes, open descriptors; nothing when the process is gone.

    The kernel lists the descriptors of a process that forbids inspection, as actors do, to root alone; then they are
    left out.
    """
    directory = proc / str(pid)
    try:
        # The name, in parentheses, may hold anything; what follows the last one does not.
        fields = (directory / "stat").read_text().rpartition(")")[2].split()
        resident = int((directory / "statm").read_text().split()[1]) * _PAGE
    except OSError:
        return ()
    seconds = (int(fields[_UTIME]) + int(fields[_STIME])) / _TICKS
    samples = [
        Sample("peerup_process_cpu_seconds_total", "counter", {}, seconds),
        Sample("peerup_process_resident_memory_bytes", "gauge", {}, resident),
    ]
    with contextlib.suppress(OSError):
        descriptors = len(os.listdir(directory / "fd"))  # noqa: PTH208  # a Path for each of 10,000 descriptors is slow
        samples.append(Sample("peerup_process_open_fds", "gauge", {}, descriptors))
    return tuple(samples)
