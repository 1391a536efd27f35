"""Bulk that another implementation sends does not ruin a round trip on the same connection."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.interop import toolchains
from tests.natlab.measure_foreign_bulk import REFERENCE, run
from tests.natlab.measure_keyboard import NETWORKS

pytestmark = [pytest.mark.slow, pytest.mark.interop, pytest.mark.timeout(240), pytest.mark.usefixtures("natlab")]

SECONDS = 5.0
GENEROUS = 3.0
"""Times the echo time beside the same bulk on another TCP connection. It is about 1; without smaller grants it is 5."""


def test_a_ping_beside_bulk_from_go_takes_little_longer_than_on_a_connection_of_its_own(
    request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    try:
        toolchains.BUILDERS["go"]()
    except toolchains.MissingToolError as error:
        if request.config.getoption("interop") == "require":
            pytest.fail(f"--interop=require, but {error}")
        pytest.skip(str(error))
    reference, row = (run(name, NETWORKS["10M"], "reno", SECONDS, tmp_path) for name in (REFERENCE, "go"))
    assert row.p50 < GENEROUS * reference.p50, (row, reference)
    assert row.bulk > 0.7 * reference.bulk, (row, reference)
