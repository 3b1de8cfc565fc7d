"""What a process uses, against prometheus_client's own collector, and over several workers."""

from __future__ import annotations

import contextlib
import os
import resource
from pathlib import Path
from types import SimpleNamespace

import pytest
from prometheus_client import CollectorRegistry, Metric
from prometheus_client.process_collector import ProcessCollector

from fumi_core.runtime import process_metrics
from fumi_core.runtime.process_metrics import ProcessMetrics, register_process_metrics
from fumi_core.runtime.scoreboard import Scoreboard, WorkerState
from fumi_core.runtime.totals import Reporter, Totals


def shape(families: list[Metric]) -> set[tuple[str, str, str]]:
    return {(each.name, each.type, each.documentation) for each in families}


def test_names_types_and_texts_are_those_of_prometheus_client() -> None:
    ours = list(ProcessMetrics(CollectorRegistry()).collect())
    assert shape(ours) == shape(list(ProcessCollector(registry=None).collect()))


def test_descriptors_are_counted_as_they_are_opened() -> None:
    registry = CollectorRegistry()
    register_process_metrics(registry)
    before = registry.get_sample_value("process_open_fds")
    pipes = [os.pipe() for _ in range(10)]
    after = registry.get_sample_value("process_open_fds")
    for each in pipes:
        os.close(each[0])
        os.close(each[1])
    assert before is not None
    assert after == before + 20


def test_what_can_be_measured_is_reported_when_no_descriptor_is_left() -> None:
    registry = CollectorRegistry()
    register_process_metrics(registry)
    before, limits, held = len(os.listdir("/proc/self/fd")), resource.getrlimit(resource.RLIMIT_NOFILE), []
    resource.setrlimit(resource.RLIMIT_NOFILE, (before + 30, limits[1]))
    try:
        with contextlib.suppress(OSError):
            while True:
                held.append(os.open("/", os.O_RDONLY))
        names = [family.name for family in registry.collect()]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for each in held:
            os.close(each)
    assert {"process_open_fds", "process_max_fds", "process_cpu_seconds", "python_info"} <= set(names)
    assert "process_resident_memory_bytes" not in names


class OlderKernel:
    """/proc/self/fd as it was before Linux 6.2, whose size is 0, in ``directory``."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def stat(self) -> SimpleNamespace:
        return SimpleNamespace(st_size=0)

    def __fspath__(self) -> str:
        return str(self._directory)


def test_an_older_kernels_descriptors_are_listed_rarely(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clock = iter([100.0, 100.5, 150.4, 150.6, 150.7])
    monkeypatch.setattr(process_metrics, "_DESCRIPTORS", OlderKernel(tmp_path))
    monkeypatch.setattr(process_metrics, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    metrics = ProcessMetrics(CollectorRegistry())
    counts = []
    for number in range(3):
        (tmp_path / str(number)).touch()
        counts.append(metrics._open_descriptors())
    # Half a second of listing is followed by 50 seconds without.
    assert counts == [1, 1, 3]


def test_workers_are_added_up_and_the_process_that_adds_is_not_counted() -> None:
    board, registry = Scoreboard(2), CollectorRegistry()
    register_process_metrics(registry)
    for slot in board.slots:
        slot.state = WorkerState.SERVING
        Reporter(registry, slot).write(None)
    totals = CollectorRegistry()
    totals.register(Totals(registry, board))
    one, both = (each.get_sample_value("process_max_fds") for each in (registry, totals))
    assert one is not None
    assert both == 2 * one
    own, workers = (each.get_sample_value("process_cpu_seconds_total") for each in (registry, totals))
    assert own is not None
    assert workers is not None
    assert 0 < workers <= 2 * own
    started = "process_start_time_seconds"
    assert totals.get_sample_value(started) == registry.get_sample_value(started)
    assert totals.get_sample_value("python_info", _labels(totals, "python_info")) == 1


def test_the_cpu_time_of_a_worker_outlives_it() -> None:
    board, registry = Scoreboard(1), CollectorRegistry()
    register_process_metrics(registry)
    totals = CollectorRegistry()
    totals.register(Totals(registry, board))
    Reporter(registry, board.slots[0]).write(None)
    before = totals.get_sample_value("process_cpu_seconds_total")
    board.slots[0].clear()
    Reporter(registry, board.slots[0]).write(None)
    after = totals.get_sample_value("process_cpu_seconds_total")
    assert before is not None
    assert after is not None
    assert after >= 2 * before


def _labels(registry: CollectorRegistry, name: str) -> dict[str, str]:
    return next(family.samples[0].labels for family in registry.collect() if family.name == name)
