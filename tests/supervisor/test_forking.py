"""Making a process where the machine gives no more."""

from __future__ import annotations

import os
import resource
import time

import pytest

from supervisor import forking
from tests.supervisor.process_harness import forked


def sleep() -> int:
    time.sleep(60)
    return 0


def without_descriptors() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = os.dup(0)  # every number below it is in use
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit + 1, hard))
    with pytest.raises(OSError, match="open files"):
        forking.fork(sleep, keep=())
    with pytest.raises(ChildProcessError):  # none is left that nobody supervises
        os.waitpid(-1, os.WNOHANG)


def test_a_process_that_cannot_be_watched_is_not_left_running():
    with forked(without_descriptors) as pid:
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
