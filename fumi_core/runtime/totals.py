"""Metrics over all workers: each worker reports its own every second, and a scrape adds them up.

So a worker counts in plain memory, at the same cost as a single process, and nothing is left on the disk. Counters and histograms
are added up, and a new worker continues the counts of the one it replaces, so that none ever falls. A gauge says by its
``over_workers`` whether it counts things, which are added up over the live workers, or is a state, of which the largest is shown.
A limit is added up, but is at most the limit of all workers together.

This replaces prometheus_client's multiprocess mode, which keeps each value in a file: 1.7 µs to count and 3.4 µs to observe,
against 0.03 and 0.10 µs (runtime/counting.py). A report costs a worker 1 ms a second, and a scrape of four workers 5 ms (Python
3.11.7, on a busy machine). No row of ``ops/bench`` scrapes; core-connect with ``--metrics`` shows what counting costs. Delete it
when multiprocess mode counts in memory and its files can be removed with the process. No private names are used.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.registry import Collector

from fumi_core.runtime.counting import LimitGaugeFamily, SummedGaugeFamily, Tallied
from fumi_core.runtime.journal import Event, journal, merged
from fumi_core.runtime.logs import event
from fumi_core.runtime.overview import Facts, Worker
from fumi_core.runtime.scoreboard import Scoreboard, Slot, WorkerState

log = logging.getLogger("fumi.workers")

Key = tuple[str, tuple[tuple[str, str], ...]]
Samples = dict[Key, float]
"""Values by sample name and labels."""
Families = dict[str, Samples]
"""A family's samples, by its name."""


class Reporter:
    """Writes a worker's report into its slot: its own counts and events, and those of the workers that had the slot before.

    A report is two lines of JSON: the metrics, and what only the status page reads.
    """

    def __init__(self, registry: CollectorRegistry, slot: Slot) -> None:
        self._registry = registry
        self._slot = slot
        self._before = _read(slot).families
        self._events_before = _read_page_line(slot).events
        self._started = time.time()
        self._silent = False

    def write(self, local_problem: str | None, facts: Facts | None = None) -> None:
        """``local_problem``: why this worker, though its listeners are open, cannot serve. ``facts`` are for the status page."""
        families = {}
        for family in self._registry.collect():
            samples = families[family.name] = _samples(family)
            if family.type != "gauge":
                _add(samples, self._before.get(family.name, {}))
        metrics = _dumped(local_problem, families)
        try:
            try:
                self._slot.write(metrics + b"\n" + self._page_line(facts or {}))
            except ValueError:
                self._slot.write(metrics + b"\n" + self._page_line({}))
        except ValueError as error:
            if not self._silent:
                event(log, logging.ERROR, "cannot report metrics: too many series, for example of certificates", error=error)
            self._silent = True

    def _page_line(self, facts: Facts) -> bytes:
        events = merged((self._events_before, journal.events))
        return json.dumps([os.getpid(), self._started, facts, events]).encode()


class Totals(Collector):
    """The sums. ``registry`` is the master's own, with all families and series, and is never counted in."""

    def __init__(self, registry: CollectorRegistry, board: Scoreboard) -> None:
        self._registry = registry
        self._board = board

    def local_problem(self) -> str | None:
        """Why no worker can serve, according to their last reports, or None if one can."""
        problems = [_read(slot).local_problem for slot in self._board.slots if slot.state is WorkerState.SERVING]
        return problems[0] if problems and None not in problems else None

    def workers(self) -> list[Worker]:
        """All workers, with their last reports."""
        return [_worker(slot) for slot in self._board.slots]

    def events(self) -> list[Event]:
        """The last events of the master and its workers, the last one last."""
        master = [_event(each) for each in json.loads(self._board.master.read() or b"[]")]
        return merged((master, *(_read_page_line(slot).events for slot in self._board.slots)))

    def describe(self) -> Iterable[Metric]:
        return self._registry.collect()

    def collect(self) -> Iterator[Metric]:
        gauges, counts = [], []
        for slot in self._board.slots:
            families = _read(slot).families
            counts.append(families)
            if families and slot.state is not WorkerState.ABSENT:
                gauges.append(families)
        for family in self._registry.collect():
            if family.type == "gauge":
                yield _with(family, _gauged(family, [each.get(family.name, {}) for each in gauges]))
            else:
                yield _with(family, _counted(family, [each.get(family.name, {}) for each in counts]))


def register_restarts(registry: CollectorRegistry, prefix: str, board: Scoreboard) -> None:
    """Add ``PREFIX_worker_restarts``, which the master counts. No worker reports it, and it is not in their registries."""
    Tallied(f"{prefix}_worker_restarts", "Workers that died and were replaced.", (), registry, lambda: [((), board.restarts)])


def _counted(family: Metric, reports: list[Samples]) -> Samples:
    # The process that adds them up uses CPU time too, which no worker reports.
    total = dict.fromkeys(_samples(family), 0.0)
    for samples in reports:
        _add(total, samples)
    return total


def _gauged(family: Metric, reports: list[Samples]) -> Samples:
    if not reports:
        return _samples(family)
    total: Samples = {}
    for samples in reports:
        if isinstance(family, SummedGaugeFamily | LimitGaugeFamily):
            _add(total, samples)
        else:
            total |= {key: max(value, total.get(key, value)) for key, value in samples.items()}
    if isinstance(family, LimitGaugeFamily):
        total = {key: min(value, family.together) for key, value in total.items()}
    return total


def _samples(family: Metric) -> Samples:
    return {(each.name, tuple(each.labels.items())): each.value for each in family.samples}


def _add(total: Samples, more: Samples) -> None:
    for key, value in more.items():
        total[key] = total.get(key, 0.0) + value


def _with(family: Metric, samples: Samples) -> Metric:
    filled = Metric(family.name, family.documentation, family.type)
    for (name, labels), value in samples.items():
        filled.add_sample(name, dict(labels), value)
    return filled


def _dumped(local_problem: str | None, families: Families) -> bytes:
    rows = {name: [[*key, value] for key, value in samples.items()] for name, samples in families.items()}
    return json.dumps([local_problem, rows]).encode()


def report_of_master() -> bytes:
    """The master's report: its events."""
    return json.dumps(journal.events).encode()


class _Report(NamedTuple):
    local_problem: str | None
    families: Families


def _read(slot: Slot) -> _Report:
    local_problem, families = json.loads(slot.read().partition(b"\n")[0] or b"[null, {}]")
    return _Report(local_problem, {family: _loaded(rows) for family, rows in families.items()})


def _loaded(rows: list[Any]) -> Samples:
    return {(name, tuple((label, value) for label, value in labels)): value for name, labels, value in rows}


class _PageLine(NamedTuple):
    pid: int | None
    started: float | None
    facts: Facts
    events: list[Event]


def _read_page_line(slot: Slot) -> _PageLine:
    pid, started, facts, events = json.loads(slot.read().partition(b"\n")[2] or b"[null, null, {}, []]")
    return _PageLine(pid, started, facts, [_event(each) for each in events])


def _event(row: list[Any]) -> Event:
    return Event(*row)


def _worker(slot: Slot) -> Worker:
    line = _read_page_line(slot)
    if slot.state is WorkerState.ABSENT:
        return Worker(slot.number, slot.state, None, None, 0, {})
    return Worker(slot.number, slot.state, line.pid, line.started, slot.connection_count.connections, line.facts)
