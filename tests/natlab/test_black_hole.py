"""Connections that are opened while the direct path dies are served through the relay, each once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.natlab.measure_black_hole import OFFSETS, measure

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240), pytest.mark.usefixtures("natlab")]


def test_what_is_opened_while_a_path_dies_is_tried_on_the_next(tmp_path: Path) -> None:
    clients, requests = measure(tmp_path)
    told = {offset: client.wait() for offset, client in clients.items()}
    print(f"\n{told}, {requests}")
    assert [client.outcome for client in clients.values()] == ["answer"] * len(OFFSETS), told
    assert requests == {client.request: 1 for client in clients.values()}
