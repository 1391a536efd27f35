"""Bulk passes a path that swallows large packets and tells nobody."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.natlab.measure_mtu_hole import measure

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240), pytest.mark.usefixtures("natlab")]

HOLE = 1280


@pytest.mark.parametrize(("out", "back"), [(HOLE, 0), (0, HOLE), (HOLE, HOLE)], ids=["out", "in", "both"])
def test_bulk_passes_where_large_packets_do_not(tmp_path: Path, out: int, back: int) -> None:
    result = measure(out, back, tmp_path)
    print(f"\n{result}")
    assert len(result) == 4
    assert not [told for told in result.values() if not told[0].isdigit()], result
