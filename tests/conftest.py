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
