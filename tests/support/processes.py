"""Processes as the kernel sees them: trees, descriptors, memory, CPU, and waiting for conditions with a deadline.

Everything is read from /proc, so it works without any library and for processes of which we are not the parent. A
process may end between two reads; then it is simply no longer part of the answer.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

CLOCK_TICKS = os.sysconf("SC_CLK_TCK")
PROC = Path("/proc")


@dataclasses.dataclass(frozen=True)
class Process:
    """One process at one moment.

    Attributes:
        state: the letter of /proc/PID/stat: `R`, `S`, `D`, `T` (stopped), `Z` (zombie)…
        started: clock ticks after boot; with the pid it names a process for ever (pids are used again).
        cpu: seconds of user and system time of the process itself.
        cpu_children: the same of its children that have ended and been waited for.
    """

    pid: int
    parent: int
    group: int
    session: int
    name: str
    state: str
    started: int
    cpu: float
    cpu_children: float

    @property
    def is_zombie(self) -> bool:
        """Whether it has ended and nobody has waited for it."""
        return self.state == "Z"


def read_process(pid: int) -> Process | None:
    """The process with this pid, or None where there is none."""
    try:
        text = (PROC / str(pid) / "stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The name stands in parentheses and may itself contain any character, so the last one closes it.
    before, _, after = text.rpartition(")")
    name = before.partition("(")[2]
    field = after.split()  # field[0] is field 3 (state) of proc(5)
    return Process(
        pid=pid,
        parent=int(field[1]),
        group=int(field[2]),
        session=int(field[3]),
        name=name,
        state=field[0],
        started=int(field[19]),
        cpu=(int(field[11]) + int(field[12])) / CLOCK_TICKS,
        cpu_children=(int(field[13]) + int(field[14])) / CLOCK_TICKS,
    )


def _pids() -> list[int]:
    return [int(entry.name) for entry in PROC.iterdir() if entry.name.isdigit()]


def all_processes() -> dict[int, Process]:
    """Every process that we may see, by pid."""
    found = (read_process(pid) for pid in _pids())
    return {process.pid: process for process in found if process is not None}


def tree(*roots: int) -> list[Process]:
    """The processes `roots` and everything below them, parents first. Zombies are included."""
    everything = all_processes()
    children: dict[int, list[int]] = {}
    for process in everything.values():
        children.setdefault(process.parent, []).append(process.pid)
    result: list[Process] = []
    seen: set[int] = set()
    waiting = [pid for pid in roots if pid in everything]
    while waiting:
        pid = waiting.pop(0)
        if pid not in seen:
            seen.add(pid)
            result.append(everything[pid])
            waiting.extend(sorted(children.get(pid, ())))
    return result


def pids_with_environment(name: str, value: str) -> list[int]:
    """Processes that were started with this environment variable: finds orphans that no tree contains any more."""
    wanted = f"{name}={value}".encode()
    found: list[int] = []
    for pid in _pids():
        try:
            environment = (PROC / str(pid) / "environ").read_bytes()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        if wanted in environment.split(b"\0"):
            found.append(pid)
    return sorted(found)


def cpu_seconds(*roots: int) -> float:
    """User and system time of these trees so far, with that of children that have ended and been waited for."""
    return sum(process.cpu + process.cpu_children for process in tree(*roots))


def descriptors(pid: int) -> dict[int, str]:
    """The open descriptors of a process and what each refers to, such as `socket:[1234]`; empty if it is gone."""
    found: dict[int, str] = {}
    try:
        entries = list((PROC / str(pid) / "fd").iterdir())
    except (FileNotFoundError, ProcessLookupError):
        return found
    for entry in entries:
        try:
            found[int(entry.name)] = str(entry.readlink())
        except FileNotFoundError:  # closed since
            continue
    return found


def descriptor_count(*roots: int) -> int:
    """How many descriptors these trees hold open together."""
    return sum(len(descriptors(process.pid)) for process in tree(*roots))


def pss_bytes(pids: Iterable[int]) -> int:
    """Proportional set size of these processes together: shared pages are counted once, divided among the sharers."""
    total = 0
    for pid in pids:
        try:
            text = (PROC / str(pid) / "smaps_rollup").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        for line in text.splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1]) * 1024
    return total


def peak_rss_bytes(pids: Iterable[int]) -> int:
    """The sum of the largest resident set that each process has had (VmHWM); shared pages count once per process."""
    total = 0
    for pid in pids:
        try:
            text = (PROC / str(pid) / "status").read_text(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            continue
        for line in text.splitlines():
            if line.startswith("VmHWM:"):
                total += int(line.split()[1]) * 1024
    return total


def is_alive(pid: int, started: int | None = None) -> bool:
    """Whether this process runs (a zombie does not). With `started` a new process of the same pid is told apart."""
    process = read_process(pid)
    return process is not None and not process.is_zombie and (started is None or process.started == started)


class ConditionNotMetError(AssertionError):
    """A condition did not become true before its deadline."""


def wait_until(condition: Callable[[], T], *, within: float, what: str, every: float = 0.01) -> T:
    """Call `condition` until its result is true, and return that result.

    For tests without an event loop; the pause between two looks is short, and a condition, not time, ends the wait.

    Args:
        within: seconds after which it is an error.
        what: the condition in words, for the error.
        every: seconds between two looks.

    Raises:
        ConditionNotMetError: it was still false at the deadline; names `what` and the last result.
    """
    deadline = time.monotonic() + within
    while True:
        result = condition()
        if result:
            return result
        if time.monotonic() >= deadline:
            raise ConditionNotMetError(f"not within {within:g} s: {what} (last seen: {result!r})")
        time.sleep(every)


async def wait_until_async(condition: Callable[[], T], *, within: float, what: str, every: float = 0.01) -> T:
    """The same for tests that run under trio; other tasks go on meanwhile. `condition` itself is not async.

    Raises:
        ConditionNotMetError: it was still false at the deadline.
    """
    import trio

    deadline = trio.current_time() + within
    while True:
        result = condition()
        if result:
            return result
        if trio.current_time() >= deadline:
            raise ConditionNotMetError(f"not within {within:g} s: {what} (last seen: {result!r})")
        await trio.sleep(every)
