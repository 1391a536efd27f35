"""Options of the whole test suite."""

import gc
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest_plugins = ["tests.natlab.plugin", "tests.support.deadlines"]

_BYTECODE = pytest.StashKey[str]()
_FAILED = pytest.StashKey[bool]()


def pytest_configure(config: pytest.Config) -> None:
    """Let the processes that tests start share compiled modules where the environment forbids them to be kept.

    Otherwise each of many hundred processes compiles every module anew, which takes two fifths of its start. They are
    kept beside the repository, as the environment asks, and go with the run.
    """
    if os.environ.get("PYTHONDONTWRITEBYTECODE") and not hasattr(config, "workerinput"):
        config.stash[_BYTECODE] = os.environ["PYTHONPYCACHEPREFIX"] = tempfile.mkdtemp(prefix="peerup-bytecode-")
        Path(config.stash[_BYTECODE]).chmod(0o755)
        del os.environ["PYTHONDONTWRITEBYTECODE"]


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove what was compiled for this run."""
    if _BYTECODE in config.stash:
        shutil.rmtree(config.stash[_BYTECODE], ignore_errors=True)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--interop",
        choices=["auto", "require"],
        default="auto",
        help="what to do where go or node is missing: skip the tests that need it (auto), or fail them (require)",
    )
    parser.addoption(
        "--natlab",
        choices=["auto", "require"],
        default="auto",
        help="what to do where no NAT laboratory can be built: skip its tests (auto), or fail them (require)",
    )


@pytest.fixture(autouse=True)
def _no_defect_is_contained(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a test an error that nobody foresaw is the test's failure, and not a peer's lost connection."""
    if (link := sys.modules.get("actors.switchboard.link")) is not None:
        monkeypatch.setattr(link, "CONTAIN_DEFECTS", False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    item.stash[_FAILED] = item.stash.get(_FAILED, False) or report.failed
    return report


def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Let go at once of what a test that failed has left open, so that no later test is blamed for it."""
    if item.stash.get(_FAILED, False):
        for name in ("last_exc", "last_type", "last_value", "last_traceback"):
            vars(sys).pop(name, None)
        gc.collect()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where several processes share the tests, have each begin with files that have slow ones.

    So the run does not end with one process in a long test and the others idle. `--dist worksteal` gives each process
    at first an equal share of the tests, one share after the other. The order within a file stays.
    """
    if hasattr(config, "workerinput"):
        items[:] = slow_files_first(items, shares=int(config.workerinput["workercount"]))


def slow_files_first(items: list[pytest.Item], shares: int) -> list[pytest.Item]:
    """The same tests, in that order."""
    files: dict[Path, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(item.path, []).append(item)
    # In the order of the tests, and not of a set, because all processes must come to the same result.
    slow = [path for path, tests in files.items() if any(test.get_closest_marker("slow") for test in tests)]
    ordered: list[list[pytest.Item]] = [[] for _ in range(shares)]
    for path in slow:
        min(ordered, key=len).extend(files[path])
    quick = [item for item in items if item.path not in slow]
    for number, share in enumerate(ordered):
        room = len(items) * (number + 1) // shares - len(items) * number // shares - len(share)
        share.extend(quick[: max(room, 0)])
        del quick[: max(room, 0)]
    return [item for share in ordered for item in share] + quick
