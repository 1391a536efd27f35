"""Options of the whole test suite."""

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


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where several processes share the tests, begin with the files that have slow ones.

    So the run does not end with one process in a long test and the others idle. The order within a file stays.
    """
    if hasattr(config, "workerinput"):
        slow = {item.path for item in items if item.get_closest_marker("slow") is not None}
        items.sort(key=lambda item: item.path not in slow)
