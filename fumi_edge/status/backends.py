"""The table of backends: the state of each, over all workers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from xml.etree.ElementTree import Element

from fumi_core.runtime.overview import Worker
from fumi_core.status import wording
from fumi_core.status.history import SPAN, Figures, History, Point, Series, series
from fumi_core.status.markup import Content, element
from fumi_core.status.plot import axis_maximum, plot
from fumi_core.status.tables import MINUTES, Column, Row, Table, number
from fumi_edge.edge import Edge

CONNECTING = series("fumi_edge_backend_connect_seconds")
ERRORS = series("fumi_edge_backend_errors_total")
OPEN = series("fumi_edge_backend_connections_active")


def of_backend(metric: Series, name: str, part: str = "") -> Series:
    return Series(metric.name + part, metric.labels | {("backend", name)})


def connecting(backends: Iterable[str]) -> list[Series]:
    """The series that the table needs."""
    return [of_backend(CONNECTING, each, part) for each in backends for part in ("_sum", "_count")]


def backend_rows(edge: Edge, names: Iterable[str], figures: Figures, history: History, workers: Sequence[Worker]) -> list[Row]:
    """The facts of the backends of these names, whose series are kept."""
    reports = [each.facts["backends"] for each in workers if "backends" in each.facts]
    checked = any(each.health_interval for each in edge.settings.all_backends)
    rows: list[Row] = []
    for name in names:
        latency = history.means(of_backend(CONNECTING, name))
        rows.append(
            {
                "address": name,
                "open": int(figures.total(of_backend(OPEN, name))),
                "total": int(figures.total(of_backend(CONNECTING, name, "_count"))),
                "rate": history.rate(of_backend(CONNECTING, name, "_count")),
                "connect_seconds": latency[-1].value if latency else None,
                "checks": checked,
                **_state_of_all([each[name] for each in reports if name in each]),
                "errors": {
                    reason: int(count) for reason, count in figures.by("reason", of_backend(ERRORS, name)).items() if count
                },
            }
        )
    return rows


def _state_of_all(reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The state over all workers: down if it is down for all, partly down if for some. The last check and error of any worker."""
    down = [each for each in reports if not each["up"]]
    changes = [each["changed_at"] for each in down or reports if each["changed_at"] is not None]
    checks = [each["last_check"] for each in reports if each["last_check"] is not None]
    errors = [each["last_error"] for each in reports if each["last_error"] is not None]
    state = "up" if not down else "down" if len(down) == len(reports) else f"down in {len(down)} of {len(reports)} workers"
    return {
        "state": state,
        # It is down for all since the last worker noticed; an operator needs the time of the first.
        "since": (min(changes) if down else max(changes)) if changes else None,
        "last_check": _remark(max(checks, key=lambda each: each[0], default=None)),
        "last_error": _remark(max(errors, key=lambda each: each[0], default=None)),
    }


def _remark(result: Sequence[Any] | None) -> dict[str, Any] | None:
    return None if result is None else {"time": result[0], "error": result[1]}


def backends_table(rows: Sequence[Row], history: History, now: float) -> Table:
    columns = (
        Column("Backend", lambda row: row["address"]),
        Column("State", lambda row: _state(row, now), long=True),
        number("Current", "open"),
        number("Total", "total"),
        number("Rate", "rate", wording.rate),
        number("Connect time", "connect_seconds", wording.seconds),
        Column(f"Last {MINUTES} min", lambda row: _latency(history, row["address"])),
        Column("Last check", lambda row: _checked(row, now), long=True),
        Column("Errors", lambda row: _errors(row, now), long=True),
    )
    return Table(name="backends", title="Backends", columns=columns, rows=rows, blocks=True, urgent=True)


def _state(row: Row, now: float) -> Sequence[Content]:
    word = element("span", row["state"], class_="good" if row["state"] == "up" else "bad")
    if row["since"] is None:
        return [word]
    since = wording.clock(row["since"], now)
    return [word, f" since {since} ", element("span", f"({wording.duration(now - row['since'])})")]


def _latency(history: History, name: str) -> Element:
    points: list[Point] = history.means(of_backend(CONNECTING, name))
    return plot([points], SPAN, axis_maximum([points], 0.001), f"connect time of {name}")


def _checked(row: Row, now: float) -> str:
    if not row["checks"]:
        return "checks are off"
    return "not checked yet" if row["last_check"] is None else _result_text(row["last_check"], now)


def _errors(row: Row, now: float) -> str:
    if not row["errors"]:
        return "none"
    counts = ", ".join(f"{wording.count(count)} {reason}" for reason, count in row["errors"].items())
    return counts if row["last_error"] is None else f"{counts}; last at {_result_text(row['last_error'], now)}"


def _result_text(result: Mapping[str, Any], now: float) -> str:
    return f"{wording.clock(result['time'], now)}: {result['error'] or 'ok'}"


def degraded_backends(rows: Sequence[Row], problem: str | None) -> list[str]:
    """The reason for the state degraded, if any. If all are down, ``problem`` names each."""
    down = sum(row["state"] != "up" for row in rows)
    if not down or (down == len(rows) and problem is not None):
        return []
    return [f"{down} of {wording.counted(len(rows), 'backend')} down"]
