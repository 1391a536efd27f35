"""An actor's own time series: plain objects, updated without a lock or a call into anything."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

from protocol.messages.system import Sample


class CounterSeries:
    """A value that only grows."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: float = 0

    def inc(self, amount: float = 1, /) -> None:
        """Add `amount`, which is not negative."""
        if amount < 0:
            raise ValueError("a counter never goes down")
        self.value += amount


class GaugeSeries:
    """A value that goes up and down."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: float = 0

    def set(self, value: float, /) -> None:
        """Make it `value`."""
        self.value = value

    def inc(self, amount: float = 1, /) -> None:
        """Add `amount`, which may be negative."""
        self.value += amount


class HistogramSeries:
    """Counts of observations by size; `counts[i]` are those at most `bounds[i]` and above the bound before."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        if not bounds or list(bounds) != sorted(set(bounds)):
            raise ValueError("a histogram's bounds grow strictly, and there is at least one")
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float, /) -> None:
        """Count one observation."""
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.total += value


_Labels = tuple[tuple[str, str], ...]


class Registry:
    """All series of one actor. Implements :class:`supervisor.actor.Metrics`."""

    def __init__(self) -> None:
        self._series: dict[tuple[str, _Labels], CounterSeries | GaugeSeries | HistogramSeries] = {}

    def counter(self, name: str, **labels: str) -> CounterSeries:
        """The counter with this name and these labels, made at the first call."""
        key = (name, tuple(sorted(labels.items())))
        found = self._series.get(key)
        if found is None:
            found = self._series[key] = CounterSeries()
        if not isinstance(found, CounterSeries):
            raise TypeError(f"{name} is not a counter")
        return found

    def gauge(self, name: str, **labels: str) -> GaugeSeries:
        """The gauge with this name and these labels, made at the first call."""
        key = (name, tuple(sorted(labels.items())))
        found = self._series.get(key)
        if found is None:
            found = self._series[key] = GaugeSeries()
        if not isinstance(found, GaugeSeries):
            raise TypeError(f"{name} is not a gauge")
        return found

    def histogram(self, name: str, buckets: Sequence[float], **labels: str) -> HistogramSeries:
        """The histogram with this name and these labels, made at the first call. Bounds without +Inf."""
        key = (name, tuple(sorted(labels.items())))
        bounds = tuple(float(bound) for bound in buckets)
        found = self._series.get(key)
        if found is None:
            found = self._series[key] = HistogramSeries(bounds)
        if not isinstance(found, HistogramSeries) or found.bounds != bounds:
            raise TypeError(f"{name} is not a histogram with these bounds")
        return found

    def samples(self) -> list[Sample]:
        """All series as they are now, in order of name and labels."""
        return [_sample(name, labels, self._series[name, labels]) for name, labels in sorted(self._series)]


def _sample(name: str, labels: _Labels, series: CounterSeries | GaugeSeries | HistogramSeries) -> Sample:
    if isinstance(series, HistogramSeries):
        cumulative: list[tuple[float, int]] = []
        seen = 0
        for bound, count in zip(series.bounds, series.counts, strict=False):  # the last count has no bound: +Inf
            seen += count
            cumulative.append((bound, seen))
        return Sample(name, "histogram", dict(labels), series.total, seen + series.counts[-1], tuple(cumulative))
    kind = "counter" if isinstance(series, CounterSeries) else "gauge"
    return Sample(name, kind, dict(labels), float(series.value))
