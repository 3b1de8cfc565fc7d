"""Metrics that cost an addition each: counts of this process, which become prometheus_client's families when somebody asks.

Its own children take a lock and half a dozen calls each time, because any thread may use them. Here one thread counts, the event
loop's, and any may read; a reader may see a connection counted at one place and not yet at another.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import Generic, TypeVar

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

Labels = tuple[str, ...]


class Count:
    """One series of a counter or a gauge."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0

    def inc(self, amount: float = 1) -> None:
        self.value += amount

    def dec(self) -> None:
        self.value -= 1


class Distribution:
    """One series of a histogram; ``bounds`` are its buckets' upper ends."""

    __slots__ = ("_bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self._bounds, value)] += 1
        self.sum += value


Series = TypeVar("Series", Count, Distribution)


class _Family(Collector, Generic[Series]):
    """A metric with its series by the values of its labels; each is there from when it is first asked for."""

    def __init__(self, name: str, text: str, labels: Labels, registry: CollectorRegistry) -> None:
        self._name, self._text, self._label_names = name, text, labels
        self._series: dict[Labels, Series] = {}
        registry.register(self)

    def labels(self, *values: str) -> Series:
        """The series with these values, one for each label, in their order."""
        if values not in self._series:
            self._series[values] = self._new()
        return self._series[values]

    def describe(self) -> Iterable[Metric]:
        """The family, for its names: ``name[]=`` in a query finds those alone that a registry has been told of."""
        return self.collect()

    def _new(self) -> Series:
        raise NotImplementedError


class Counter(_Family[Count]):
    """``name`` is without the _total that its samples have."""

    _kind: type[CounterMetricFamily | GaugeMetricFamily] = CounterMetricFamily

    def _new(self) -> Count:
        return Count()

    def collect(self) -> Iterable[Metric]:
        family = self._kind(self._name, self._text, labels=self._label_names)
        for values, count in self._series.items():
            family.add_metric(values, count.value)
        yield family


class Gauge(Counter):
    """A number of things that there are now."""

    _kind = GaugeMetricFamily


class Histogram(_Family[Distribution]):
    """``bounds`` rise, and stop short of infinity."""

    def __init__(self, name: str, text: str, labels: Labels, registry: CollectorRegistry, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._ends = [*map(floatToGoString, bounds), "+Inf"]
        super().__init__(name, text, labels, registry)

    def _new(self) -> Distribution:
        return Distribution(self._bounds)

    def collect(self) -> Iterable[Metric]:
        family = HistogramMetricFamily(self._name, self._text, labels=self._label_names)
        for values, seen in self._series.items():
            family.add_metric(values, list(zip(self._ends, accumulate(seen.counts), strict=True)), seen.sum)
        yield family


class Tallied(Collector):
    """A counter whose series stand somewhere else: ``rows`` gives the values of its labels and the count of each."""

    def __init__(
        self,
        name: str,
        text: str,
        labels: Labels,
        registry: CollectorRegistry,
        rows: Callable[[], Iterable[tuple[Labels, float]]],
    ) -> None:
        self._name, self._text, self._label_names, self._rows = name, text, labels, rows
        registry.register(self)

    def describe(self) -> Iterable[Metric]:
        yield CounterMetricFamily(self._name, self._text, labels=self._label_names)

    def collect(self) -> Iterable[Metric]:
        family = CounterMetricFamily(self._name, self._text, labels=self._label_names)
        for values, count in self._rows():
            family.add_metric(values, count)
        yield family
