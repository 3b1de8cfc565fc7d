"""Metrics over all workers: each worker reports its own every second, and a scrape adds them up.

So a worker counts in plain memory, at the same cost as a single process, and nothing is left on the disk. Counters and histograms
are added up, and a new worker continues the counts of the one it replaces, so that none ever falls. A gauge whose name ends in
``_active`` counts things and is added up over the live workers; any other gauge is a state, of which the largest is shown.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.registry import Collector

from fumi_core.runtime.logs import event
from fumi_core.runtime.scoreboard import Scoreboard, Slot, WorkerState

log = logging.getLogger("fumi.workers")

RESTARTS = "_worker_restarts_total"
"""The name, after the prefix, of the counter that the master keeps for all workers. The workers have it too, at 0."""

Key = tuple[str, tuple[tuple[str, str], ...]]
Series = dict[Key, float]
"""Values by sample name and labels."""


Families = dict[str, Series]


class Reporter:
    """Writes a worker's report into its slot: its own counts plus those of the workers that had the slot before."""

    def __init__(self, registry: CollectorRegistry, slot: Slot) -> None:
        self._registry = registry
        self._slot = slot
        self._before = _read(slot).families
        self._silent = False

    def write(self, local_problem: str | None) -> None:
        """``local_problem``: why this worker, though its listeners are open, cannot serve."""
        families = {}
        for family in self._registry.collect():
            series = families[family.name] = _series(family)
            if family.type != "gauge":
                _add(series, self._before.get(family.name, {}))
        try:
            self._slot.write(_dumped(local_problem, families))
        except ValueError as error:
            if not self._silent:
                event(log, logging.ERROR, "cannot report metrics: too many series, such as certificates", error=error)
            self._silent = True


class Totals(Collector):
    """The sums. ``registry`` is the master's own, with all families and series, and is never counted in."""

    def __init__(self, registry: CollectorRegistry, board: Scoreboard) -> None:
        self._registry = registry
        self._board = board

    def local_problem(self) -> str | None:
        """Why no worker can serve, by the workers' last reports, or None when one can."""
        problems = [_read(slot).local_problem for slot in self._board.slots if slot.state is WorkerState.SERVING]
        return problems[0] if problems and None not in problems else None

    def describe(self) -> Iterable[Metric]:
        return self._registry.collect()

    def collect(self) -> Iterator[Metric]:
        states, counts = [], []
        for slot in self._board.slots:
            families = _read(slot).families
            counts.append(families)
            if families and slot.state is not WorkerState.ABSENT:
                states.append(families)
        for family in self._registry.collect():
            if family.type == "gauge":
                yield _with(family, _state(family, [each.get(family.name, {}) for each in states]))
            else:
                yield _with(family, self._counted(family, [each.get(family.name, {}) for each in counts]))

    def _counted(self, family: Metric, reports: list[Series]) -> Series:
        total = _series(family)
        for series in reports:
            _add(total, series)
        for key in total:
            if key[0].endswith(RESTARTS):
                total[key] += self._board.restarts
        return total


def _state(family: Metric, reports: list[Series]) -> Series:
    if not reports:
        return _series(family)
    total: Series = {}
    for series in reports:
        if family.name.endswith("_active"):
            _add(total, series)
        else:
            total |= {key: max(value, total.get(key, value)) for key, value in series.items()}
    return total


def _series(family: Metric) -> Series:
    return {(each.name, tuple(each.labels.items())): each.value for each in family.samples}


def _add(total: Series, more: Series) -> None:
    for key, value in more.items():
        total[key] = total.get(key, 0.0) + value


def _with(family: Metric, series: Series) -> Metric:
    filled = Metric(family.name, family.documentation, family.type)
    for (name, labels), value in series.items():
        filled.add_sample(name, dict(labels), value)
    return filled


def _dumped(local_problem: str | None, families: Families) -> bytes:
    rows = {name: [[*key, value] for key, value in series.items()] for name, series in families.items()}
    return json.dumps([local_problem, rows]).encode()


class _Report(NamedTuple):
    local_problem: str | None
    families: Families


def _read(slot: Slot) -> _Report:
    local_problem, families = json.loads(slot.read() or b"[null, {}]")
    return _Report(local_problem, {family: _loaded(rows) for family, rows in families.items()})


def _loaded(rows: list[Any]) -> Series:
    return {(name, tuple((label, value) for label, value in labels)): value for name, labels, value in rows}
