"""The metrics now and over the last minutes: a fixed number of samples of some series, kept in memory."""

from __future__ import annotations

import threading
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

from prometheus_client import Metric

from fumi_core.runtime.daemon_thread import start_thread

INTERVAL = 5.0
"""Seconds between two samples."""
SPAN = 900.0
"""Seconds for which samples are kept."""
MINUTE = 60.0
"""Seconds over which the current rate is computed."""


class Series(NamedTuple):
    """The sum of all samples of a metric that have these labels, whatever other labels they have."""

    name: str
    labels: frozenset[tuple[str, str]] = frozenset()


def less(all_of_it: Sequence[Point], part: Sequence[Point]) -> list[Point]:
    """The difference of two lines, at least 0: the two counters are not read at the same instant."""
    return [Point(one.ago, max(0.0, one.value - other.value)) for one, other in zip(all_of_it, part, strict=False)]


def together(lines: Sequence[Sequence[Point]]) -> list[Point]:
    """The sum of lines with the same times."""
    return [Point(points[0].ago, sum(each.value for each in points)) for points in zip(*lines, strict=False)]


def series(name: str, **labels: str) -> Series:
    return Series(name, frozenset(labels.items()))


class Point(NamedTuple):
    """A value, and its age in seconds."""

    ago: float
    value: float


class Figures:
    """All metrics at one moment."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._samples: dict[str, list[tuple[dict[str, str], float]]] = {}
        for family in families:
            for sample in family.samples:
                self._samples.setdefault(sample.name, []).append((sample.labels, sample.value))

    def total(self, wanted: Series) -> float:
        return sum(value for labels, value in self._samples.get(wanted.name, ()) if wanted.labels <= labels.items())

    def by(self, label: str, wanted: Series) -> dict[str, float]:
        """The totals for each value of a label, in the order of the samples."""
        found: dict[str, float] = {}
        for labels, value in self._samples.get(wanted.name, ()):
            if wanted.labels <= labels.items():
                found[labels[label]] = found.get(labels[label], 0.0) + value
        return found

    def quantile(self, share: float, histogram: Series) -> float | None:
        """The quantile of a histogram, estimated from its buckets; ``share`` is 0 to 1. None without observations.

        Interpolates linearly within a bucket, as Prometheus' histogram_quantile() does.
        """
        buckets = self.by("le", Series(histogram.name + "_bucket", histogram.labels))
        wanted = share * buckets.get("+Inf", 0.0)
        if not wanted:
            return None
        low, below = 0.0, 0.0
        for bound, count in buckets.items():
            if bound == "+Inf":
                break
            if count >= wanted:
                return low + (float(bound) - low) * (wanted - below) / (count - below)
            low, below = float(bound), count
        return low


class History:
    """Samples some series every INTERVAL seconds, from ``start()`` on, in its own thread. ``clock`` returns seconds."""

    def __init__(self, read: Callable[[], Figures], kept: Iterable[Series], clock: Callable[[], float] = time.monotonic) -> None:
        self._read = read
        self._columns = {each: at for at, each in enumerate(dict.fromkeys(kept))}
        self._clock = clock
        self._rows: deque[tuple[float, array[float]]] = deque(maxlen=int(SPAN / INTERVAL) + 1)
        self._lock = threading.Lock()

    def start(self) -> None:
        start_thread(self._watch, "history")

    def _watch(self) -> None:
        while True:
            self.sample()
            time.sleep(INTERVAL)

    def keep(self, wanted: Iterable[Series]) -> None:
        """Sample these series too, from now on."""
        with self._lock:
            for each in wanted:
                self._columns.setdefault(each, len(self._columns))

    def sample(self) -> None:
        """Add a sample of all series, and drop samples older than SPAN."""
        figures = self._read()
        with self._lock:
            row = array("d", (figures.total(each) for each in self._columns))
            self._rows.append((self._clock(), row))

    def levels(self, wanted: Series) -> list[Point]:
        """The values at each sample, the oldest first."""
        return self._levels((wanted,))[0]

    def rates(self, counter: Series) -> list[Point]:
        """The rates per second between each two samples."""
        return _rates(self.levels(counter))

    def means(self, histogram: Series) -> list[Point]:
        """The means of the observations between each two samples; no point where nothing was observed."""
        parts = [Series(histogram.name + part, histogram.labels) for part in ("_sum", "_count")]
        # From the same samples: another may be taken at any time.
        sums, counts = map(_rates, self._levels(parts))
        return [Point(count.ago, each.value / count.value) for each, count in zip(sums, counts, strict=True) if count.value]

    def rate(self, counter: Series) -> float:
        """The rate per second over the last MINUTE, or over all samples if they cover less."""
        points = self.levels(counter)
        recent = [point for point in points if point.ago <= MINUTE + INTERVAL]
        if len(recent) < 2 or recent[0].ago <= recent[-1].ago:
            return 0.0
        return max(0.0, recent[-1].value - recent[0].value) / (recent[0].ago - recent[-1].ago)

    def _levels(self, wanted: Iterable[Series]) -> list[list[Point]]:
        """The values of several series at the same samples."""
        with self._lock:
            samples = list(self._rows)
        now, columns = self._clock(), [self._columns[each] for each in wanted]
        return [[Point(now - at, row[column]) for at, row in samples if column < len(row)] for column in columns]


def _rates(points: Iterable[Point]) -> list[Point]:
    return [
        Point(late.ago, max(0.0, late.value - early.value) / (early.ago - late.ago))
        for early, late in pairwise(points)
        if early.ago > late.ago
    ]
