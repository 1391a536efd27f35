"""The fixture `natlab`: a fresh laboratory for a test, or a clear word why there is none.

With `--natlab=auto`, the default, tests that need it are skipped where namespaces, nftables and so on cannot be used;
the reason is printed. With `--natlab=require`, as in CI, they fail there, so that nobody takes a skip for a success.
"""

from __future__ import annotations

import functools
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import pytest

from tests.natlab.lab import Lab
from tests.natlab.namespaces import SBIN, LabError
from tests.natlab.probes import Servers, exchange

PROGRAMS = ("ip", "nft", "conntrack", "ethtool")
PACKAGES = "nftables iproute2 conntrack ethtool"


def missing_programs(*names: str) -> list[str]:
    """Which of these programs are not installed."""
    path = os.pathsep.join((os.environ.get("PATH", ""), SBIN))
    return [name for name in names if shutil.which(name, path=path) is None]


@functools.cache
def why_not() -> str:
    """One sentence why laboratories cannot be built here, or nothing if one was built and a packet went through it."""
    missing = missing_programs(*PROGRAMS)
    if missing:
        return f"the programs {', '.join(missing)} are missing (Debian, Ubuntu: apt install {PACKAGES})"
    reason: list[str] = []
    # In a thread of its own: where namespaces may be made but not left again, that thread is lost and not the tests.
    thread = threading.Thread(target=lambda: reason.append(_try_one()), name="first laboratory")
    thread.start()
    thread.join()
    return reason[0] if reason else "building a laboratory failed in a way that was not foreseen"


def _try_one() -> str:
    try:
        with Lab() as lab:
            servers = Servers(lab)
            inside = lab.host("inside", behind=lab.nat("nat", hairpin=True, drop_fragments=True))
            far = lab.host("far", link=lab.link(delay=0.001))
            for host in (inside, far):
                with servers.udp() as ends, host.udp() as client:
                    exchange(client, ends[0])
    except PermissionError as error:
        return f"network namespaces may not be made ({error}): run as root, or all of pytest under `unshare -Urn`"
    except (OSError, LabError, AssertionError) as error:
        return f"a first laboratory did not work: {error}"
    return ""


def unavailable(config: pytest.Config, reason: str) -> NoReturn:
    """Skip the running test because of `reason`, or fail it, as `--natlab` says."""
    if config.getoption("--natlab") == "require":
        pytest.fail(f"--natlab=require, but {reason}", pytrace=False)
    pytest.skip(f"no NAT laboratory here: {reason}")


@pytest.fixture
def natlab_factory(request: pytest.FixtureRequest) -> Iterator[Callable[..., Lab]]:
    """Makes laboratories with the given arguments of `Lab`; all are closed after the test."""
    reason = why_not()
    if reason:
        unavailable(request.config, reason)
    labs: list[Lab] = []

    def make(**arguments: Any) -> Lab:
        labs.append(Lab(**arguments))
        return labs[-1]

    yield make
    for lab in reversed(labs):
        lab.close()


@pytest.fixture
def natlab(natlab_factory: Callable[..., Lab]) -> Lab:
    """A fresh laboratory, closed after the test with everything that runs in it."""
    return natlab_factory()


@pytest.fixture
def natlab_program(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Say that the test needs these programs in the laboratory: `natlab_program("turnserver")`."""

    def need(*names: str) -> None:
        missing = missing_programs(*names)
        if missing:
            unavailable(request.config, f"the programs {', '.join(missing)} are missing")

    return need
