"""Options of the whole test suite."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--interop",
        choices=["auto", "require"],
        default="auto",
        help="what to do where go or node is missing: skip the tests that need it (auto), or fail them (require)",
    )
