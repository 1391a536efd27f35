"""Streams outlive a network that is away for a while, and a node that does not run for a while."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.natlab.measure_silence import measure
from tests.natlab.peerup_nodes import Pair, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240), pytest.mark.usefixtures("natlab")]

STREAMS = {"direct, idle", "direct, busy", "relayed, idle", "relayed, busy"}


def accuse_nobody(pair: Pair) -> None:
    """Nobody was told that a peer refuses this node; and the reservation is there again."""
    told = [f"{node.host.name}: {line}" for node in pair.nodes for line in node.log.read_text().splitlines()]
    assert not [line for line in told if "authorise" in line]
    wait_for(lambda: pair.home.held() == 1, "the reservation", 30)


@pytest.mark.parametrize(
    ("way", "seconds"),
    [("cable", 6), ("address", 6), ("wifi", 25), ("stopped", 25)],
)
def test_streams_outlive_an_interruption(tmp_path: Path, way: str, seconds: float) -> None:
    result = measure(way, seconds, tmp_path, ssh=False, finish=accuse_nobody)
    print(f"\n{way}, {seconds} s: {result}")
    assert result.keys() == STREAMS
    assert not [told for told in result.values() if told.startswith(("ended", "silent"))], result


def test_silence_that_lasts_for_longer_than_is_wanted_ends_streams(tmp_path: Path) -> None:
    def hurry(pair: Pair) -> None:
        config = pair.laptop.home / "config.yaml"
        config.write_text(config.read_text().replace("  # silence_timeout: 15m\n", "  silence_timeout: 30s\n"))

    result = measure("wifi", 60, tmp_path, ssh=False, prepare=hurry)
    print(f"\nwith a limit of 30 s: {result}")
    ended = [float(told.split()[2]) for told in result.values() if told.startswith("ended")]
    assert len(ended) == len(STREAMS)
    assert min(ended) >= 29
