"""Counters and histograms for the hot path, told to Prometheus when it asks.

Only the event loop counts, so nothing is locked here; the client library's own locks each number, and a request has a
score of them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

MOST_SERIES = 1_000
Labels = tuple[str, ...]


def _others(labels: Labels) -> Labels:
    return ("other",) * len(labels)


class Counts(Collector):
    """A counter by label values. Beyond `MOST_SERIES` of them the rest share the value "other"."""

    def __init__(self, registry: CollectorRegistry, name: str, about: str, *labels: str) -> None:
        self._name, self._about, self._labels = name, about, labels
        self._values: dict[Labels, float] = {} if labels else {(): 0}
        registry.register(self)

    def add(self, labels: Labels = (), by: float = 1) -> None:
        """So many more."""
        try:
            self._values[labels] += by
        except KeyError:
            key = labels if len(self._values) < MOST_SERIES else _others(labels)
            self._values[key] = self._values.get(key, 0) + by

    def collect(self) -> Iterator[Metric]:
        family = CounterMetricFamily(self._name, self._about, labels=self._labels)
        for labels, value in list(self._values.items()):
            family.add_metric(labels, value)
        yield family

    def describe(self) -> list[Metric]:
        return []


class Series:
    """What was observed under one set of label values."""

    __slots__ = ("_bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self.counts = [0] * (len(bounds) + 1)  # by bucket, the last one without a bound
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self._bounds, value)] += 1
        self.sum += value


class Histograms(Collector):
    """A histogram by label values, bounded as `Counts`. `bounds` ascend."""

    def __init__(
        self, registry: CollectorRegistry, name: str, about: str, bounds: Sequence[float], *labels: str
    ) -> None:
        self._name, self._about, self._labels, self._bounds = name, about, labels, bounds
        self._bound_names = [floatToGoString(bound) for bound in (*bounds, float("inf"))]  # type: ignore[no-untyped-call]
        self._series: dict[Labels, Series] = {}
        registry.register(self)

    def __getitem__(self, labels: Labels) -> Series:
        """Where what has these labels is observed."""
        try:
            return self._series[labels]
        except KeyError:
            key = labels if len(self._series) < MOST_SERIES else _others(labels)
            return self._series.setdefault(key, Series(self._bounds))

    def collect(self) -> Iterator[Metric]:
        family = HistogramMetricFamily(self._name, self._about, labels=self._labels)
        for labels, series in list(self._series.items()):
            buckets, count = [], 0
            for name, more in zip(self._bound_names, series.counts, strict=True):
                count += more
                buckets.append((name, count))
            family.add_metric(labels, buckets, series.sum)
        yield family

    def describe(self) -> list[Metric]:
        return []
