"""Resources of this process: the metrics of prometheus_client's process and platform collectors, for one process or several.

Their names, types and texts are those of ``ProcessCollector``; their values come from /proc (proc(5)) and getrusage(2). That
collector is not used because it lists /proc/self/fd to count the descriptors: 76 ms for 20,000 of them (Linux 6.18), which a
worker would spend in its event loop every second. From Linux 6.2 on the kernel counts. On older kernels they are listed, rarely
enough to take one hundredth of the time. Delete this module when ``ProcessCollector`` lets the kernel count.
"""

from __future__ import annotations

import contextlib
import math
import os
import resource
import time
from collections.abc import Iterable
from pathlib import Path

from prometheus_client import CollectorRegistry, Metric, PlatformCollector
from prometheus_client.core import CounterMetricFamily
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from fumi_core.runtime.counting import SummedGaugeFamily

LISTING_SHARE = 0.01
"""The share of the time that listing the descriptors may take."""
_DESCRIPTORS, _STATM = Path("/proc/self/fd"), Path("/proc/self/statm")
_START = "process_start_time_seconds"


class ProcessMetrics(Collector):
    """The process_* metrics, which need /proc. Memory, CPU time and descriptors of several workers are added up.

    The start is that of the process that made this object, and so of the program, not of its workers.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._start = [each for each in ProcessCollector(registry=None).collect() if each.name == _START]
        self._listed = 0
        self._list_again = -math.inf
        registry.register(self)

    def collect(self) -> Iterable[Metric]:
        if not self._start:
            return
        # When no descriptor is left the file cannot be opened. The other metrics are needed then more than ever.
        with contextlib.suppress(OSError):
            yield from _memory()
        yield from self._start
        used = resource.getrusage(resource.RUSAGE_SELF)
        text = "Total user and system CPU time spent in seconds."
        yield CounterMetricFamily("process_cpu_seconds", text, used.ru_utime + used.ru_stime)
        yield SummedGaugeFamily("process_open_fds", "Number of open file descriptors.", self._open_descriptors())
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = math.inf if limit == resource.RLIM_INFINITY else limit
        yield SummedGaugeFamily("process_max_fds", "Maximum number of open file descriptors.", most)

    def _open_descriptors(self) -> int:
        if counted := _DESCRIPTORS.stat().st_size:
            return counted
        begin = time.monotonic()
        if begin >= self._list_again:
            # The last number stands while no descriptor is left to list them with.
            with contextlib.suppress(OSError):
                self._listed = len(os.listdir(_DESCRIPTORS))
            end = time.monotonic()
            self._list_again = end + (end - begin) / LISTING_SHARE
        return self._listed


def _memory() -> list[Metric]:
    """Raises OSError."""
    virtual, resident = (int(pages) * resource.getpagesize() for pages in _STATM.read_text().split()[:2])
    return [
        SummedGaugeFamily("process_virtual_memory_bytes", "Virtual memory size in bytes.", virtual),
        SummedGaugeFamily("process_resident_memory_bytes", "Resident memory size in bytes.", resident),
    ]


def register_process_metrics(registry: CollectorRegistry) -> None:
    """Add the process_* metrics and ``python_info``."""
    ProcessMetrics(registry)
    PlatformCollector(registry)
