"""The decisions of a lane, without any frame: each law of `Shape` for itself, by arithmetic."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.natlab.forwarder import Lane, Shape

FRAMES = 20_000


def fates(
    shape: Shape, *, seed: str = "a", frames: int = FRAMES, every: float = 0.001, size: int = 1000
) -> list[list[float]]:
    lane = Lane(shape.check(), seed)
    return [list(lane.arrivals(size, number * every)) for number in range(frames)]


def lost(shape: Shape, **more: Any) -> list[bool]:
    return [not arrivals for arrivals in fates(shape, **more)]


def test_a_perfect_lane_takes_no_time() -> None:
    assert fates(Shape(), frames=3) == [[0.0], [0.001], [0.002]]


def test_delay_is_added() -> None:
    assert fates(Shape(delay=0.02), frames=2) == [[0.02], [0.021]]


def test_the_same_seed_loses_the_same_frames_whatever_else_changes() -> None:
    one = lost(Shape(loss=0.1))
    assert one == lost(Shape(loss=0.1, jitter=0.5, duplicate=0.3), every=0.5)
    assert one != lost(Shape(loss=0.1), seed="b")
    # More loss loses those and others.
    assert all(more for more, less in zip(lost(Shape(loss=0.3)), one, strict=True) if less)


@pytest.mark.parametrize("burst", [0, 1, 3, 20])
@pytest.mark.parametrize("loss", [0.05, 0.2])
def test_loss_is_as_frequent_and_as_long_as_asked_for(loss: float, burst: float) -> None:
    what = lost(Shape(loss=loss, burst=burst), frames=200_000)
    runs = [sum(1 for _ in group) for is_lost, group in itertools.groupby(what) if is_lost]
    assert sum(what) / len(what) == pytest.approx(loss, rel=0.15)
    assert sum(runs) / len(runs) == pytest.approx(burst or 1 / (1 - loss), rel=0.15)


def test_all_and_nothing_are_exact() -> None:
    assert not any(lost(Shape(loss=0)))
    assert all(lost(Shape(loss=1)))
    assert all(lost(Shape(cut=True)))


@given(jitter=st.floats(0, 1), every=st.floats(0, 0.01), rate=st.sampled_from([0, 1e6, 1e9]))
def test_frames_stay_in_order(jitter: float, every: float, rate: float) -> None:
    times = [time for arrivals in fates(Shape(jitter=jitter, rate=rate), frames=100, every=every) for time in arrivals]
    assert times == sorted(times)
    assert all(number * every <= time <= number * every + jitter + 1 for number, time in enumerate(times))


def test_jitter_changes_the_order_only_if_it_may() -> None:
    times = [arrivals[0] for arrivals in fates(Shape(jitter=0.1, reorder=True), frames=1000)]
    assert times != sorted(times)
    late = [time - number * 0.001 for number, time in enumerate(times)]
    assert 0 <= min(late) < 0.01
    assert 0.09 < max(late) <= 0.1


def test_rate_spaces_frames_and_the_queue_is_bounded() -> None:
    # 1000 bytes at 8 Mbit/s take a millisecond; they come twice as fast as that, and ten fit into the queue.
    what = fates(Shape(rate=8e6, queue=10_000), frames=1000, every=0.0005)
    times = [arrivals[0] for arrivals in what if arrivals]
    assert all(b - a == pytest.approx(0.001) for a, b in itertools.pairwise(times))
    assert 490 <= len(times) <= 515
    waits = [arrivals[0] - number * 0.0005 for number, arrivals in enumerate(what) if arrivals]
    assert 0.0095 < max(waits) <= 0.01 + 1e-9


def test_duplicates_come_twice() -> None:
    counts = [len(arrivals) for arrivals in fates(Shape(duplicate=0.25))]
    assert set(counts) == {1, 2}
    assert counts.count(2) / len(counts) == pytest.approx(0.25, rel=0.1)


def test_a_black_hole_swallows_by_size_of_the_packet() -> None:
    shape = Shape(black_hole=1280)
    assert not any(lost(shape, size=1280 + 14, frames=5))
    assert all(lost(shape, size=1281 + 14, frames=5))


def test_counters_add_up() -> None:
    lane = Lane(Shape(loss=0.5, rate=8e6, queue=2000), "a")
    for _ in range(100):
        list(lane.arrivals(1000, 0.0))
    counted = lane.counters()
    assert counted["passed"] == 2
    assert counted["bytes"] == 2000
    assert counted["passed"] + counted["lost"] + counted["overflowed"] == 100


@pytest.mark.parametrize(
    "shape", [Shape(loss=1.1), Shape(delay=-1), Shape(burst=0.5, loss=0.1), Shape(loss=0.9, burst=2), Shape(rate=-1)]
)
def test_nonsense_is_refused(shape: Shape) -> None:
    with pytest.raises(ValueError, match=r"Shape\("):
        shape.check()
