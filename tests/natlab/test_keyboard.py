"""Bulk does not ruin the keyboard: beside a reference in the same laboratory, not against the clock."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.natlab.lab import Lab
from tests.natlab.measure_keyboard import NETWORKS, REFERENCE, Cell, World

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

SECONDS = 5.0
GENEROUS = 2.5
"""Times the echo time of two `ssh -L`. It is about 1; with the queues that this is about it was 5."""


@pytest.mark.skipif(shutil.which("sshd", path="/usr/sbin:/usr/bin") is None, reason="there is no sshd to compare with")
def test_an_echo_beside_bulk_takes_little_longer_than_on_a_connection_of_its_own(natlab: Lab, tmp_path: Path):
    world = World(natlab, tmp_path, NETWORKS["10M"])
    try:
        world.use("reno")
        world.start_ssh()
        world.start_nodes()
        cells = {way: Cell("10M", "reno", "up", way) for way in (REFERENCE, "direct", "relayed", "other peer")}
        for cell in cells.values():
            world.measure(cell, SECONDS)
            assert not cell.failure, cell
    finally:
        world.close()
    reference = cells.pop(REFERENCE)
    for cell in cells.values():
        assert cell.p50 < GENEROUS * reference.p50, (cell, reference)
        assert cell.bulk > 0.7 * reference.bulk, (cell, reference)
