"""Options of the whole test suite."""

import sys
from pathlib import Path

import pytest

pytest_plugins = ["tests.natlab.plugin", "tests.support.deadlines"]


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
