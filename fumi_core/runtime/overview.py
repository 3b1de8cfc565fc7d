"""What the status page of a program shows beside its metrics: its processes, what they report, and the last events."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from prometheus_client import CollectorRegistry

from fumi_core.runtime.journal import Event
from fumi_core.runtime.metrics_server import Readiness
from fumi_core.runtime.scoreboard import WorkerState

Facts = Mapping[str, Any]
"""What a worker reports of itself for the page, as JSON has it; each program has its own names. Empty before the first report."""


class Worker(NamedTuple):
    """A process that serves clients, or the slot of one that has ended. ``started`` is in seconds since 1970."""

    number: int
    state: WorkerState
    pid: int | None
    started: float | None
    connections: int
    facts: Facts


@dataclass(frozen=True)
class Overview:
    """The processes of a program. Its functions may be called in any thread."""

    registry: CollectorRegistry
    """The metrics of all workers."""
    readiness: Readiness
    local_problem: Readiness
    """The same as ``readiness``, from memory: it does not connect to the backends or the next hop."""
    workers: Callable[[], Sequence[Worker]]
    events: Callable[[], Sequence[Event]]
    pid: int
    """The process to which signals are sent: the master, if there is one."""
    started: float
    """Seconds since 1970."""
