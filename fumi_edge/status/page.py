"""What the status page of an edge shows: its listeners, backends and certificates, and the outcomes of its clients."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

from fumi_core.runtime.metrics_server import Page
from fumi_core.runtime.overview import Overview, Worker
from fumi_core.runtime.slow_check import SlowCheck
from fumi_core.status import wording
from fumi_core.status.history import Figures, History, Point, Series, less, series
from fumi_core.status.page import StatusPage, View
from fumi_core.status.tables import Column, Row, Table, Tile, number, quantiles, shares, text
from fumi_edge.connection.limits import ClientLimits
from fumi_edge.edge import Edge
from fumi_edge.status.backends import backend_rows, backends_table, connecting, degraded_backends
from fumi_edge.status.certificates import certificates_table, degraded_certificates, reported

CURRENT = series("fumi_edge_connections_active")
LIMIT = series("fumi_edge_connections_limit")
TOTAL = series("fumi_edge_connections_total")
HANDSHAKES = series("fumi_edge_handshakes_total")
SUCCEEDED = series("fumi_edge_handshakes_total", result="ok")
BYTES_IN, BYTES_OUT = (series("fumi_edge_bytes_total", direction=direction) for direction in ("in", "out"))
STARTTLS = series("fumi_edge_starttls_total")
UPGRADED = series("fumi_edge_starttls_total", result="upgraded")
REJECTED = series("fumi_edge_rejected_total")
SESSIONS = series("fumi_edge_tls_sessions_total")

CHECK_TIMEOUT = 6.0
"""Seconds for which a page waits for the readiness."""


def edge_pages(edge: Edge, overview: Overview, others: Mapping[str, Page]) -> Mapping[str, Page]:
    """The pages of an edge, whose samples are recorded from now on, and ``others``, the first of which is linked."""
    plotted = [CURRENT, TOTAL, HANDSHAKES, SUCCEEDED, BYTES_IN, BYTES_OUT, STARTTLS, UPGRADED, REJECTED]
    of_listeners = [_of_listener(TOTAL, each) for each in edge.bound]
    kept = [*plotted, *of_listeners, *connecting(edge.backends)]
    page = StatusPage("fumi-edge", overview, kept, _Viewer(edge, overview).view, list(others)[:1])
    page.start()
    return {**page.pages(), **others}


class _Viewer:
    def __init__(self, edge: Edge, overview: Overview) -> None:
        self._edge = edge
        self._readiness = SlowCheck(overview.readiness)

    def view(self, figures: Figures, history: History, workers: Sequence[Worker]) -> View:
        # A reload may have changed the backends, and may change them again at any time: they are read once.
        names, now = list(self._edge.backends), time.time()
        history.keep(connecting(names))
        backends = backend_rows(self._edge, names, figures, history, workers)
        certificates, more = reported(workers)
        problem = self._problem()
        return View(
            problem=problem,
            degraded=[*degraded_backends(backends, problem), *degraded_certificates(certificates, now)],
            tiles=_tiles(figures, history),
            tables=[
                *([] if self._edge.is_direct else [backends_table(backends, history, now)]),
                certificates_table(certificates, more, now),
                self._listeners(figures, history),
            ],
            small_tables=[
                _ciphers(figures),
                shares("starttls", "STARTTLS ports", "Outcome", figures.by("result", STARTTLS)),
                shares("handshakes", "TLS handshakes", "Result", figures.by("result", HANDSHAKES)),
                shares("rejected", "Rejected", "Reason", figures.by("reason", REJECTED)),
                _durations(figures),
            ],
            limits=_limits(self._edge, figures),
        )

    def _problem(self) -> str | None:
        """Why the edge is not ready, or None; in time also while backends without health checks do not answer."""
        try:
            return self._readiness.run().problem(time.monotonic() + CHECK_TIMEOUT)
        except TimeoutError:
            return f"no answer from the backends within {CHECK_TIMEOUT:g} s"

    def _listeners(self, figures: Figures, history: History) -> Table:
        rows = [self._listener(name, figures, history) for name in self._edge.bound]
        columns = [
            text("Listener", "address"),
            text("Mode", "mode"),
            Column("Backends", lambda row: ", ".join(row["backends"]), long=True),
            number("Current", "open"),
            number("Rate", "rate", wording.rate),
            number("Total", "total"),
            Column("Failed handshakes", lambda row: wording.share(row["failed_handshakes"], row["handshakes"]), number=True),
        ]
        if any(row["limits"] for row in rows):
            columns.append(text("Limits of its own", "limits", long=True))
        return Table(name="listeners", title="Listeners", columns=columns, rows=rows, blocks=True)

    def _listener(self, name: str, figures: Figures, history: History) -> Row:
        own = self._edge.bound[name]
        backends = own.backends or self._edge.settings.backends
        attempts = figures.total(_of_listener(HANDSHAKES, name))
        return {
            "address": name,
            "mode": "STARTTLS" if own.starttls else "TLS",
            "backends": [each.name for each in backends.destinations],
            "open": int(figures.total(_of_listener(CURRENT, name))),
            "rate": history.rate(_of_listener(TOTAL, name)),
            "total": int(figures.total(_of_listener(TOTAL, name))),
            "handshakes": int(attempts),
            "failed_handshakes": int(attempts - figures.total(_of_listener(SUCCEEDED, name))),
            "limits": None if own.limits is None else _limits_text(own.limits),
        }


def _of_listener(metric: Series, name: str) -> Series:
    return Series(metric.name, metric.labels | {("listener", name)})


def _tiles(figures: Figures, history: History) -> list[Tile]:
    current, limit, rate = figures.total(CURRENT), figures.total(LIMIT), history.rate
    upgraded = f"{wording.share(rate(UPGRADED), rate(STARTTLS))} upgraded" if rate(STARTTLS) else wording.NOTHING
    succeeded: Sequence[Point] = history.rates(SUCCEEDED)
    of_limit = "" if math.isinf(limit) else f" of {wording.count(limit)}"
    traffic = {"in": history.rates(BYTES_IN), "out": history.rates(BYTES_OUT)}
    return [
        Tile(
            "connections", "Current connections", wording.count(current) + of_limit, wording.count,
            {"current": history.levels(CURRENT)},
        ),
        Tile("connection_rate", "Connection rate", wording.rate(rate(TOTAL)), wording.rate, {"rate": history.rates(TOTAL)}),
        Tile(
            "handshake_rate", "TLS handshakes", wording.rate(rate(HANDSHAKES)), wording.rate,
            {"succeeded": succeeded, "failed": less(history.rates(HANDSHAKES), succeeded)},
        ),
        Tile(
            "starttls_rate", "STARTTLS", upgraded, wording.rate,
            {
                "upgraded": history.rates(UPGRADED),
                "not upgraded": less(history.rates(STARTTLS), history.rates(UPGRADED)),
            },
        ),
        Tile(
            "traffic", "Traffic", f"{wording.size(rate(BYTES_IN))}/s in, {wording.size(rate(BYTES_OUT))}/s out",
            lambda value: wording.size(value) + "/s", traffic,
        ),
        Tile("rejection_rate", "Rejected", wording.rate(rate(REJECTED)), wording.rate, {"rejected": history.rates(REJECTED)}),
    ]  # fmt: skip


def _ciphers(figures: Figures) -> Table:
    counts: dict[str, float] = {}
    for version in figures.by("version", SESSIONS):
        for cipher, count in figures.by("cipher", Series(SESSIONS.name, frozenset((("version", version),)))).items():
            if count:
                counts[f"{version} {cipher}"] = count
    whole = sum(counts.values())
    resumed = figures.total(Series(SESSIONS.name, frozenset((("resumed", "true"),))))
    table = shares("tls_sessions", "TLS sessions", "Cipher", dict(sorted(counts.items(), key=lambda each: -each[1])))
    note = f"{wording.share(resumed, whole)} resumed." if whole else None
    return replace(table, columns=(text("Cipher", "name"), *table.columns[1:]), folded=None, note=note)


def _durations(figures: Figures) -> Table:
    kinds = (
        ("TLS handshake", series("fumi_edge_handshake_seconds")),
        ("Backend connect", series("fumi_edge_backend_connect_seconds")),
        ("Client connection", series("fumi_edge_session_seconds")),
    )
    return quantiles(figures, kinds)


def _limits(edge: Edge, figures: Figures) -> dict[str, float | str | None]:
    limits = edge.settings.limits
    limit = figures.total(LIMIT)
    return {
        "--max-clients": limits.max_clients,
        "connections that --max-clients and the descriptors allow": limit,
        "--max-clients-per-ip (of each worker)": limits.max_clients_per_ip,
        "--rate-per-ip (of each worker)": _rate(limits),
        "--drain-timeout": f"{edge.settings.drain_timeout:g} s",
    }


def _rate(limits: ClientLimits) -> str | None:
    rate = limits.rate_per_ip
    return None if rate is None else f"{rate.clients}/{_UNITS[int(rate.seconds)]}"


_UNITS = {1: "s", 60: "min", 3600: "h"}


def _limits_text(limits: ClientLimits) -> str:
    """A listener's own limits as text."""
    parts = {
        wording.counted(limits.max_clients or 0, "client"): limits.max_clients,
        f"{wording.counted(limits.max_clients_per_ip or 0, 'client')} per address": limits.max_clients_per_ip,
        f"{_rate(limits)} per address": limits.rate_per_ip,
    }
    return ", ".join(words for words, value in parts.items() if value is not None) or "none"
