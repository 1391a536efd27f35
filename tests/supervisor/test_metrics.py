"""An actor's own series."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.messages.system import Sample
from supervisor.metrics import Registry


def test_counters_grow_and_never_shrink():
    registry = Registry()
    registry.counter("peerup_x_total", peer="a").inc()
    registry.counter("peerup_x_total", peer="a").inc(2.5)
    registry.counter("peerup_x_total", peer="b").inc()
    with pytest.raises(ValueError, match="never goes down"):
        registry.counter("peerup_x_total", peer="a").inc(-1)
    assert registry.samples() == [
        Sample("peerup_x_total", "counter", {"peer": "a"}, 3.5),
        Sample("peerup_x_total", "counter", {"peer": "b"}, 1.0),
    ]


def test_labels_are_the_same_in_any_order():
    registry = Registry()
    assert registry.gauge("g", a="1", b="2") is registry.gauge("g", b="2", a="1")


def test_gauges_go_both_ways():
    gauge = Registry().gauge("g")
    gauge.set(4)
    gauge.inc(-1.5)
    assert gauge.value == 2.5


def test_a_name_has_one_kind():
    registry = Registry()
    registry.counter("n")
    registry.histogram("h", (1, 2))
    for wrong in (
        lambda: registry.gauge("n"),
        lambda: registry.histogram("n", (1,)),
        lambda: registry.counter("h"),
        lambda: registry.histogram("h", (1, 3)),
    ):
        with pytest.raises(TypeError):
            wrong()


@pytest.mark.parametrize("bounds", [(), (2, 1), (1, 1)])
def test_bounds_grow(bounds):
    with pytest.raises(ValueError, match="grow"):
        Registry().histogram("h", bounds)


@given(st.lists(st.floats(-10, 10)), st.lists(st.floats(-10, 10), min_size=1, unique=True).map(sorted))
def test_histograms_count_like_counting_by_hand(values, bounds):
    registry = Registry()
    histogram = registry.histogram("h", bounds)
    for value in values:
        histogram.observe(value)
    [sample] = registry.samples()
    assert sample.kind == "histogram"
    assert sample.count == len(values)
    assert sample.value == pytest.approx(sum(values))
    assert sample.buckets == tuple((bound, sum(value <= bound for value in values)) for bound in bounds)
