"""The status page of a program, and the same facts as JSON: its state, plots of the last minutes, and tables.

It works without JavaScript and loads no other files; the browser reloads it every few seconds, except with
``?refresh=0``. Client addresses are in it only with ``?clients=1``.
"""

from __future__ import annotations

import json
import math
import socket
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from importlib.resources import files
from typing import Any
from xml.etree.ElementTree import Element

from fumi_core.runtime.metrics_server import Answer, Page, Request
from fumi_core.runtime.overview import Overview, Worker
from fumi_core.runtime.scoreboard import DRAINING, WorkerState
from fumi_core.status import wording
from fumi_core.status.events import events_table
from fumi_core.status.history import INTERVAL, Figures, History, Series
from fumi_core.status.markup import Content, document, element, policy
from fumi_core.status.tables import Column, Row, Table, Tile, nothing_yet, number, text

# Read now: after --user the process may have no permission to read the file.
_STYLE = (files("fumi_core.status") / "status.css").read_text("utf-8")
_HEADERS = (("Content-Security-Policy", policy(_STYLE)), ("Referrer-Policy", "no-referrer"))


class State(StrEnum):
    """The state of a program: ``degraded`` serves, but something needs attention."""

    READY = "ready"
    DEGRADED = "degraded"
    DRAINING = "draining"
    NOT_READY = "not ready"


_CLASSES = {State.READY: "good", State.DEGRADED: "poor", State.DRAINING: "poor", State.NOT_READY: "bad"}


@dataclass(frozen=True, kw_only=True)
class View:
    """What a program shows, now.

    ``problem``: why it cannot serve, or None. ``degraded`` are the reasons for this state. ``tables`` are as wide as the page,
    ``small_tables`` stand side by side. ``limits`` are the most important settings, by their names.
    """

    problem: str | None
    degraded: Sequence[str]
    tiles: Sequence[Tile]
    tables: Sequence[Table]
    small_tables: Sequence[Table]
    limits: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class _Status:
    """Everything on the page, at one time."""

    now: float
    version: str
    state: State
    reasons: Sequence[str]
    workers: Sequence[Worker]
    view: View
    tables: Sequence[Table]
    small_tables: Sequence[Table]


class StatusPage:
    """The page of ``program``; its samples are recorded from ``start()`` on.

    ``kept`` are the series that the plots need, and ``view`` shows what there is at the time of a request. ``others`` are
    the paths of the program's other pages.
    """

    def __init__(
        self,
        program: str,
        overview: Overview,
        kept: Iterable[Series],
        view: Callable[[Figures, History, Sequence[Worker]], View],
        others: Iterable[str] = (),
    ) -> None:
        self._program = program
        self._metric_prefix = program.replace("-", "_")
        self._overview = overview
        self._view = view
        self._others = tuple(others)
        self.history = History(self._read, kept)

    def start(self) -> None:
        self.history.start()

    def pages(self) -> Mapping[str, Page]:
        return {"/": _guarded(self._html), "/status.json": _guarded(self._json)}

    def _read(self) -> Figures:
        return Figures(self._overview.registry.collect())

    def _status(self, request: Request) -> _Status:
        now, figures, workers = time.time(), self._read(), self._overview.workers()
        view = self._view(figures, self.history, workers)
        idle = [each for each in workers if each.state is WorkerState.ABSENT]
        degraded = [*view.degraded, *([f"{len(idle)} of {len(workers)} workers not running"] if idle else [])]
        events = events_table(self._overview.events(), now, clients=request.query.get("clients") == "1")
        limits = [{"name": name, "value": value} for name, value in view.limits.items()]
        settings = Table(name="limits", title="Limits", columns=(text("Limit", "name"), _LIMIT), rows=limits)
        return _Status(
            now=now,
            version=", ".join(figures.by("version", Series(f"{self._metric_prefix}_build_info"))),
            state=_state(view.problem, degraded),
            reasons=[*([] if view.problem is None else [_with_connections(view.problem, workers)]), *degraded],
            workers=workers,
            view=view,
            tables=[*view.tables, events],
            small_tables=[_workers_table(workers, now), settings, *view.small_tables],
        )

    # JSON

    def _json(self, request: Request) -> Answer:
        status = self._status(request)
        facts: dict[str, Any] = {
            "program": self._program,
            "version": status.version,
            "host": socket.gethostname(),
            "pid": self._overview.pid,
            "started": self._overview.started,
            "now": status.now,
            "state": status.state,
            "reasons": status.reasons,
        }
        facts |= {each.name: each.rows for each in (*status.tables, *status.small_tables)}
        facts |= {"limits": status.view.limits, "plots": {each.name: each.facts() for each in status.view.tiles}}
        return Answer(json.dumps(_finite(facts)) + "\n", "application/json")

    # HTML

    def _html(self, request: Request) -> Answer:
        status = self._status(request)
        refreshing, clients = request.query.get("refresh") != "0", request.query.get("clients") == "1"
        prefix = "" if status.state is State.READY else f"{status.state.upper()}: "
        head = element(
            "head",
            element("meta", charset="utf-8"),
            element("meta", name="viewport", content="width=device-width, initial-scale=1"),
            element("meta", name="color-scheme", content="light dark"),
            [element("meta", http_equiv="refresh", content=f"{INTERVAL:.0f}")] if refreshing else [],
            element("title", f"{prefix}{self._program} on {socket.gethostname()}"),
            element("style", _STYLE),
        )
        plots = element("section", [each.element() for each in status.view.tiles], class_="plots", aria_label="Plots")
        wide = element("section", [each.element() for each in status.tables], class_="wide")
        empty = [each for each in status.small_tables if each.is_empty]
        cards = [each.element() for each in status.small_tables if each not in empty]
        small = element("section", cards, [nothing_yet(empty)] if empty else [], class_="small")
        body = element("body", self._header(status, refreshing, clients), element("main", plots, wide, small))
        return Answer(document(element("html", head, body, lang="en")), "text/html", headers=_HEADERS)

    def _header(self, status: _Status, refreshing: bool, clients: bool) -> Element:
        about = _dotted(
            element("span", each)
            for each in (
                f"version {status.version}",
                f"PID {self._overview.pid}",
                wording.counted(len(status.workers), "worker"),
                f"up {wording.duration(status.now - self._overview.started)}",
                wording.moment(status.now),
            )
        )
        pill = element("span", str(status.state), class_=f"pill {_CLASSES[status.state]}")
        more: list[Element] = []
        if status.reasons:
            role = "alert" if status.state is State.NOT_READY else "status"
            more = [element("p", "; ".join(status.reasons), class_=f"problem {_CLASSES[status.state]}", role=role)]
        title = element("h1", self._program, " ", element("small", socket.gethostname()), " ", pill)
        return element("header", title, element("p", about), _links(self._others, refreshing, clients), more)


def _guarded(page: Page) -> Page:
    """The same page, without client addresses for pages elsewhere on the web that a browser on this host shows."""

    def answer(request: Request) -> Answer:
        if request.query.get("clients") == "1" and _is_of_elsewhere(request):
            return Answer("client addresses: use a URL with 127.0.0.1 or localhost as its host\n", status="403 Forbidden")
        return page(request)

    return answer


def _is_of_elsewhere(request: Request) -> bool:
    # No browser connects to a Unix socket.
    return request.client != "unix" and request.is_from_this_host and not request.names_this_host


def _links(others: Iterable[str], refreshing: bool, clients: bool) -> Element:
    def here(refreshing: bool, clients: bool) -> str:
        return "/" + ("" if refreshing else "?refresh=0") + (("?" if refreshing else "&") + "clients=1" if clients else "")

    refresh = f"stop refreshing every {INTERVAL:.0f} s" if refreshing else f"refresh every {INTERVAL:.0f} s"
    links: list[tuple[str, str]] = [
        (refresh, here(not refreshing, clients)),
        ("without client addresses" if clients else "with client addresses", here(refreshing, not clients)),
        *((each, each) for each in others),
        ("/metrics", "/metrics"),
        ("/readyz", "/readyz"),
        ("/status.json", "/status.json"),
    ]
    return element("p", _dotted(element("a", words, href=address) for words, address in links))


def _dotted(parts: Iterable[Content]) -> list[Content]:
    """The parts, with dots between them."""
    dotted: list[Content] = []
    for each in parts:
        dotted += [" · ", each] if dotted else [each]
    return dotted


def _state(problem: str | None, degraded: Sequence[str]) -> State:
    if problem is not None:
        return State.DRAINING if problem == DRAINING else State.NOT_READY
    return State.DEGRADED if degraded else State.READY


def _with_connections(problem: str, workers: Sequence[Worker]) -> str:
    if problem != DRAINING:
        return problem
    return f"{problem}: {wording.counted(sum(each.connections for each in workers), 'connection')} open"


_LIMIT = Column("Value", lambda row: "none" if row["value"] in (None, math.inf) else _limit(row["value"]), number=True)


def _limit(value: Any) -> str:
    return wording.count(value) if isinstance(value, int | float) else str(value)


def _workers_table(workers: Sequence[Worker], now: float) -> Table:
    rows: list[Row] = [
        {
            "number": each.number,
            "pid": each.pid,
            "state": each.state.name.lower(),
            "connections": each.connections,
            "started": each.started,
        }
        for each in workers
    ]
    colours = {"serving": "good", "draining": "poor", "absent": "bad"}
    columns = (
        Column("Worker", lambda row: str(row["number"])),
        Column("State", lambda row: element("span", row["state"], class_=colours[row["state"]])),
        Column("PID", lambda row: wording.NOTHING if row["pid"] is None else str(row["pid"]), number=True),
        number("Connections", "connections"),
        number("Up", "started", lambda started: wording.duration(now - started)),
    )
    return Table(name="workers", title="Workers", columns=columns, rows=rows)


def _finite(value: Any) -> Any:
    """The same without infinities, which JSON does not have: None stands for no limit."""
    if isinstance(value, Mapping):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
