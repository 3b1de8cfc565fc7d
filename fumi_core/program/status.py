"""What the status page of the core shows: sessions, messages, replies, deliveries, and whether the next hop takes mail."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from fumi_core.delivery import DeliveryTarget
from fumi_core.delivery.next_hop.target import NextHop
from fumi_core.program.served import ServedApp
from fumi_core.program.target_checks import TargetChecks, problems, targets_of
from fumi_core.runtime.journal import Event
from fumi_core.runtime.metrics_server import Page
from fumi_core.runtime.overview import Overview, Worker
from fumi_core.runtime.slow_check import Run
from fumi_core.server.observer import DeliveryResult
from fumi_core.smtp.results import MessageResult
from fumi_core.status import wording
from fumi_core.status.history import INTERVAL, Figures, History, Series, series, together
from fumi_core.status.markup import element
from fumi_core.status.page import StatusPage, View
from fumi_core.status.tables import Column, Row, Table, Tile, number, quantiles, shares, text

ACTIVE = series("fumi_core_connections_active")
CONNECTIONS = series("fumi_core_connections_total")
MESSAGES = series("fumi_core_messages_total")
REPLIES = series("fumi_core_replies_total")
DELIVERIES = series("fumi_core_deliveries_total")
BYTES = series("fumi_core_message_bytes_sum")
REJECTED = series("fumi_core_rejected_total")
SESSIONS = series("fumi_core_sessions_total")


class CoreListener(NamedTuple):
    """A listener of the page: its address, and its app."""

    address: str
    served: ServedApp


def core_pages(
    listeners: Callable[[], Sequence[CoreListener]], overview: Overview, target_checks: TargetChecks
) -> Mapping[str, Page]:
    """The pages of a core, whose samples are recorded from now on. ``listeners`` returns the present ones."""
    codes = list(Figures(overview.registry.collect()).by("code", REPLIES))
    viewer = _Viewer(listeners, overview, codes, target_checks)
    kept = [ACTIVE, CONNECTIONS, BYTES, REJECTED, *(_with(REPLIES, "code", each) for each in codes)]
    kept += [_with(MESSAGES, "result", each) for each in MessageResult]
    kept += [_with(DELIVERIES, "result", each) for each in DeliveryResult]
    page = StatusPage("fumi-core", overview, kept, viewer.view)
    page.start()
    return page.pages()


class _Viewer:
    def __init__(
        self,
        listeners: Callable[[], Sequence[CoreListener]],
        overview: Overview,
        codes: Sequence[str],
        target_checks: TargetChecks,
    ) -> None:
        self._listeners = listeners
        self._overview = overview
        self._codes = codes
        self._targets = Targets(target_checks)

    def view(self, figures: Figures, history: History, workers: Sequence[Worker]) -> View:
        listeners = self._listeners()
        now = time.time()
        targets = self._targets.rows([each.served for each in listeners], self._overview.events())
        problems = [row["problem"] for row in targets if row["problem"] is not None]
        return View(
            problem=self._overview.local_problem() or next(iter(problems), None),
            degraded=(),
            tiles=_tiles(figures, history, self._codes),
            tables=[*([_targets_table(targets, now)] if targets else []), _listeners_table(listeners)],
            small_tables=[
                shares("messages", "Messages", "Result", figures.by("result", MESSAGES)),
                _deliveries(figures, listeners),
                shares("replies", "Replies", "Code", figures.by("code", REPLIES)),
                shares("sessions", "Sessions", "TLS", figures.by("tls_version", SESSIONS)),
                shares("authentications", "Authentications", "Result", figures.by("result", series("fumi_core_auth_total"))),
                shares("rejected", "Rejected", "Reason", figures.by("reason", REJECTED)),
                quantiles(figures, [("DATA to reply", series("fumi_core_data_seconds"))]),
            ],
            limits=_limits(listeners),
        )


class _Check(NamedTuple):
    """A check of a target: its time, by the monotonic clock and in seconds since 1970, and the error that it found, or None."""

    moment: float
    at: float
    problem: str | None
    run: Run


class Targets:
    """Whether the delivery targets work; each is checked at most every INTERVAL seconds, however many browsers show the page."""

    def __init__(self, target_checks: TargetChecks) -> None:
        self._target_checks = target_checks
        self._lock = threading.Lock()
        self._checks: dict[str, _Check] = {}

    def rows(self, served: Sequence[ServedApp], events: Sequence[Event]) -> list[Row]:
        targets = targets_of(served)
        with self._lock:
            runs = self._target_checks.begin(targets, [name for name in targets if self._is_due(name)])
            for name, problem in problems(runs).items():
                self._checks[name] = _Check(time.monotonic(), time.time(), problem, runs[name])
            return [_row(name, target, self._checks[name], events) for name, target in targets.items()]

    def _is_due(self, name: str) -> bool:
        """Whether its last check is old; one that has not returned since would keep each page waiting."""
        last = self._checks.get(name)
        return last is None or (last.moment <= time.monotonic() - INTERVAL and not last.run.is_running)


def _row(name: str, target: DeliveryTarget, last: _Check, events: Sequence[Event]) -> Row:
    failures = [each.without_client() for each in events if _concerns(each, target)]
    return {
        "target": name,
        "state": "up" if last.problem is None else "down",
        "problem": last.problem,
        "checked": last.at,
        "last_error": {"time": failures[-1].last, "error": failures[-1].fields.get("error", "")} if failures else None,
    }


def _concerns(event: Event, target: DeliveryTarget) -> bool:
    """Whether an event is a failure of this target."""
    if isinstance(target, NextHop):
        return event.fields.get("next_hop") == f"{target.protocol}:{target.address}"
    return event.text == "cannot deliver" and target.name == "maildir"


def _targets_table(rows: Sequence[Row], now: float) -> Table:
    def check(row: Row) -> str:
        problem = (row["problem"] or "ok").removeprefix(f"{row['target']}: ")
        return f"{wording.clock(row['checked'], now)}: {problem}"

    def error(row: Row) -> str:
        last = row["last_error"]
        return "none" if last is None else f"{wording.clock(last['time'], now)}: {last['error'] or 'failed'}"

    columns = (
        text("Target", "target"),
        Column("State", lambda row: element("span", row["state"], class_="good" if row["state"] == "up" else "bad"), long=True),
        Column("Last check", check, long=True),
        Column("Last failed delivery", error, long=True),
    )
    return Table(name="targets", title="Delivery and next hop", columns=columns, rows=rows, blocks=True, urgent=True)


def _listeners_table(listeners: Sequence[CoreListener]) -> Table:
    rows: list[Row] = []
    for address, served in listeners:
        options = served.app.options
        rows.append(
            {
                "address": address,
                "protocol": "LMTP" if options.lmtp else "SMTP",
                "proxy_protocol": options.proxy_protocol,
                "deliver": served.settings["app"] or served.settings["deliver"],
                "size": options.size,
            }
        )
    columns = (
        text("Listener", "address"),
        text("Protocol", "protocol"),
        text("PROXY protocol", "proxy_protocol"),
        text("Delivers to", "deliver", long=True),
        number("Largest message", "size", wording.size),
    )
    return Table(name="listeners", title="Listeners", columns=columns, rows=rows, blocks=True)


def _tiles(figures: Figures, history: History, codes: Sequence[str]) -> list[Tile]:
    rate = history.rate
    classes = {
        "2xx, 3xx": [each for each in codes if each[0] in "23"],
        "4xx": [each for each in codes if each[0] == "4"],
        "5xx": [each for each in codes if each[0] == "5"],
    }
    replies = {name: together([history.rates(_with(REPLIES, "code", each)) for each in some]) for name, some in classes.items()}
    all_replies = sum(rate(_with(REPLIES, "code", each)) for each in codes)
    messages = {
        str(name): history.rates(_with(MESSAGES, "result", name)) for name in MessageResult if name != MessageResult.ABORTED
    }
    deliveries = {str(name): history.rates(_with(DELIVERIES, "result", name)) for name in DeliveryResult}
    return [
        Tile(
            "connections", "Current sessions", wording.count(figures.total(ACTIVE)), wording.count,
            {"current": history.levels(ACTIVE)},
        ),
        Tile(
            "connection_rate", "Session rate", wording.rate(rate(CONNECTIONS)), wording.rate, {"rate": history.rates(CONNECTIONS)}
        ),
        Tile("message_rate", "Messages", _rate(history, MESSAGES, MessageResult), wording.rate, messages),
        Tile("reply_rate", "Replies", wording.rate(all_replies), wording.rate, replies),
        Tile("delivery_rate", "Deliveries", _rate(history, DELIVERIES, DeliveryResult), wording.rate, deliveries),
        Tile(
            "traffic", "Message traffic", f"{wording.size(rate(BYTES))}/s", lambda value: wording.size(value) + "/s",
            {"traffic": history.rates(BYTES)},
        ),
    ]  # fmt: skip


def _rate(history: History, counter: Series, results: type[MessageResult] | type[DeliveryResult]) -> str:
    return wording.rate(sum(history.rate(_with(counter, "result", each)) for each in results))


def _with(counter: Series, label: str, value: str) -> Series:
    return Series(counter.name, counter.labels | {(label, str(value))})


def _deliveries(figures: Figures, listeners: Sequence[CoreListener]) -> Table:
    """The deliveries to the targets that there are, and to those that a reload has replaced."""
    present = {each.served.target.name for each in listeners if each.served.target is not None}
    counts = {}
    for target, total in figures.by("target", DELIVERIES).items():
        if not total and target not in present:
            continue
        for result, count in figures.by("result", _with(DELIVERIES, "target", target)).items():
            counts[f"{target} {result}"] = count
    return shares("deliveries", "Deliveries", "Target and result", counts)


def _limits(listeners: Sequence[CoreListener]) -> dict[str, float | str | None]:
    if not listeners:
        return {}
    options = listeners[0].served.app.options
    return {
        "--max-clients": options.max_clients,
        "idle timeout": f"{options.socket_timeout:g} s",
        "--drain-timeout": f"{options.close_timeout:g} s",
    }
