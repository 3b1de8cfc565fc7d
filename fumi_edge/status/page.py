"""The status page of an edge: its current state, and plots of the last minutes. All figures come from the metrics.

It works without JavaScript and loads no other files; the browser reloads it every few seconds.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from xml.etree.ElementTree import Element

from prometheus_client import CollectorRegistry

from fumi_core.runtime.metrics_server import Answer, Readiness, Request
from fumi_core.status import wording
from fumi_core.status.history import INTERVAL, SPAN, Figures, History, Point, Series, series
from fumi_core.status.markup import Content, document, element, policy
from fumi_core.status.plot import axis_maximum, plot

# Read now: after --user the process may have no permission to read the file.
_STYLE = (files("fumi_core.status") / "status.css").read_text("utf-8")
_HEADERS = (("Content-Security-Policy", policy(_STYLE)), ("Referrer-Policy", "no-referrer"))

SOON, URGENT = 14, 3
"""Days before a certificate's expiry from which it is shown as a warning and as an error."""
MINUTES = round(SPAN / 60)
"""Minutes that the plots show."""

CURRENT = series("fumi_edge_connections_active")
TOTAL = series("fumi_edge_connections_total")
HANDSHAKES = series("fumi_edge_handshakes_total")
SUCCEEDED = series("fumi_edge_handshakes_total", result="ok")
BYTES_IN, BYTES_OUT = (series("fumi_edge_bytes_total", direction=direction) for direction in ("in", "out"))
STARTTLS = series("fumi_edge_starttls_total")
UPGRADED = series("fumi_edge_starttls_total", result="upgraded")
REJECTED = series("fumi_edge_rejected_total")
SESSIONS = series("fumi_edge_tls_sessions_total")
CONNECTING = series("fumi_edge_backend_connect_seconds")
ERRORS = series("fumi_edge_backend_errors_total")


@dataclass(frozen=True)
class Facts:
    """Data for the page that is not in the metrics."""

    listeners: Mapping[str, bool]
    """The listeners' names, and whether their clients begin in plaintext."""
    backends: Sequence[str]
    max_clients: int | None
    started: float
    """Seconds since 1970."""


class Status:
    """``page()`` returns the page; ``start()`` begins to record the metrics in ``registry`` every few seconds."""

    def __init__(self, registry: CollectorRegistry, readiness: Readiness, facts: Callable[[], Facts]) -> None:
        self._read: Callable[[], Figures] = lambda: Figures(registry.collect())
        self._readiness = readiness
        self._present_facts = facts
        self._facts = facts()
        each_listener = [
            Series(name, _of("listener", each)) for each in self._facts.listeners for name in (TOTAL.name, HANDSHAKES.name)
        ]
        self._history = History(
            self._read,
            [
                CURRENT,
                TOTAL,
                HANDSHAKES,
                SUCCEEDED,
                BYTES_IN,
                BYTES_OUT,
                STARTTLS,
                UPGRADED,
                REJECTED,
                *each_listener,
                *_connecting(self._facts.backends),
            ],
        )

    def start(self) -> None:
        self._history.start()

    def page(self, request: Request) -> Answer:
        self._facts = self._present_facts()
        # A reload may have named other backends.
        self._history.keep(_connecting(self._facts.backends))
        figures, problem = self._read(), self._readiness()
        head = element(
            "head",
            element("meta", charset="utf-8"),
            element("meta", name="viewport", content="width=device-width, initial-scale=1"),
            element("meta", name="color-scheme", content="light dark"),
            element("meta", http_equiv="refresh", content=f"{INTERVAL:.0f}"),
            element("title", f"{'' if problem is None else 'NOT READY: '}fumi-edge on {socket.gethostname()}"),
            element("style", _STYLE),
        )
        body = element("body", self._header(figures, problem), element("main", self._plots(figures), self._tables(figures)))
        return Answer(document(element("html", head, body, lang="en")), "text/html", headers=_HEADERS)

    def _header(self, figures: Figures, problem: str | None) -> Element:
        version = ", ".join(figures.by("version", series("fumi_edge_build_info")))
        now = time.time()
        about = (
            f"version {version} · uptime {wording.duration(now - self._facts.started)} · {wording.moment(now)} · "
            f"refreshed every {INTERVAL:.0f} s"
        )
        state = (
            element("span", "ready", class_="pill good") if problem is None else element("span", "not ready", class_="pill bad")
        )
        more = [] if problem is None else [element("p", problem, class_="problem", role="alert")]
        return element(
            "header", element("h1", "fumi-edge ", element("small", socket.gethostname()), " ", state), element("p", about), more
        )

    # Plots

    def _plots(self, figures: Figures) -> Element:
        history = self._history
        current, limit = figures.total(CURRENT), self._facts.max_clients
        failed = _less(history.rates(HANDSHAKES), history.rates(SUCCEEDED))
        not_upgraded = _less(history.rates(STARTTLS), history.rates(UPGRADED))
        rate = history.rate
        return element(
            "section",
            _tile(
                "Current connections",
                wording.count(current) + (f" of {wording.count(limit)}" if limit else ""),
                wording.count,
                ("current", history.levels(CURRENT)),
            ),
            _tile("Connection rate", wording.rate(rate(TOTAL)), wording.rate, ("rate", history.rates(TOTAL))),
            _tile(
                "TLS handshakes",
                wording.rate(rate(HANDSHAKES)),
                wording.rate,
                ("succeeded", history.rates(SUCCEEDED)),
                ("failed", failed),
            ),
            _tile(
                "STARTTLS",
                f"{wording.share(rate(UPGRADED), rate(STARTTLS))} upgraded" if rate(STARTTLS) else wording.NOTHING,
                wording.rate,
                ("upgraded", history.rates(UPGRADED)),
                ("not upgraded", not_upgraded),
            ),
            _tile(
                "Traffic",
                f"{wording.size(rate(BYTES_IN))}/s in, {wording.size(rate(BYTES_OUT))}/s out",
                lambda value: wording.size(value) + "/s",
                ("in", history.rates(BYTES_IN)),
                ("out", history.rates(BYTES_OUT)),
            ),
            _tile("Rejected", wording.rate(rate(REJECTED)), wording.rate, ("rejected", history.rates(REJECTED))),
            class_="plots",
            aria_label=f"The last {MINUTES} minutes",
        )

    # Tables

    def _tables(self, figures: Figures) -> Element:
        return element(
            "section",
            self._listeners(figures),
            self._backends(figures),
            _certificates(figures, time.time()),
            _ciphers(figures),
            _shares("STARTTLS ports", "Outcome", figures.by("result", STARTTLS)),
            _shares("TLS handshakes", "Result", figures.by("result", HANDSHAKES)),
            _shares("Rejected", "Reason", figures.by("reason", REJECTED)),
            _times(figures),
            class_="tables",
        )

    def _listeners(self, figures: Figures) -> Element:
        rows: list[list[Content]] = []
        for name, starttls in self._facts.listeners.items():
            own = _of("listener", name)
            attempts = figures.total(Series(HANDSHAKES.name, own))
            failed = attempts - figures.total(Series(SUCCEEDED.name, own | SUCCEEDED.labels))
            rows.append(
                [
                    name,
                    "STARTTLS" if starttls else "TLS",
                    wording.count(figures.total(Series(CURRENT.name, own))),
                    wording.rate(self._history.rate(Series(TOTAL.name, own))),
                    wording.count(figures.total(Series(TOTAL.name, own))),
                    wording.share(failed, attempts),
                ]
            )
        return _table(
            "Listeners", ("Address", "Mode", "Current", "Rate", "Total", "Failed handshakes"), rows, words=2, named=True
        )

    def _backends(self, figures: Figures) -> Element:
        rows: list[list[Content]] = []
        for name in self._facts.backends:
            own = _of("backend", name)
            up = figures.total(Series("fumi_edge_backend_up", own)) > 0
            latency = self._history.means(Series(CONNECTING.name, own))
            errors = {reason: count for reason, count in figures.by("reason", Series(ERRORS.name, own)).items() if count}
            rows.append(
                [
                    name,
                    element("span", "up" if up else "down", class_="good" if up else "bad"),
                    wording.rate(self._history.rate(Series(CONNECTING.name + "_count", own))),
                    wording.seconds(latency[-1].value) if latency else wording.NOTHING,
                    plot([latency], SPAN, axis_maximum([latency], 0.001), f"connect time of {name}"),
                    ", ".join(f"{wording.count(count)} {reason}" for reason, count in errors.items()) or "none",
                ]
            )
        return _table(
            "Backends", ("Address", "State", "Rate", "Connect time", f"Last {MINUTES} min", "Errors"), rows, words=2, named=True
        )


def _connecting(backends: Sequence[str]) -> list[Series]:
    return [Series(CONNECTING.name + part, _of("backend", each)) for each in backends for part in ("_sum", "_count")]


def _of(label: str, value: str) -> frozenset[tuple[str, str]]:
    return frozenset(((label, value),))


def _less(all_of_it: Sequence[Point], part: Sequence[Point]) -> list[Point]:
    """The difference of two lines, at least 0: the two counters are not read at the same instant."""
    return [Point(one.ago, max(0.0, one.value - other.value)) for one, other in zip(all_of_it, part, strict=False)]


def _tile(title: str, now: str, unit: Callable[[float], str], *lines: tuple[str, Sequence[Point]]) -> Element:
    """A plot with its title, the current value, and the scale of its height."""
    values = [line for _, line in lines]
    top = axis_maximum(values, 1.0)
    most = max((point.value for line in values for point in line), default=0.0)
    keys = [element("span", name, class_=f"key n{number}") for number, (name, _) in enumerate(lines)] if len(lines) > 1 else []
    return element(
        "figure",
        element("figcaption", element("span", title), element("b", now)),
        element(
            "div", plot(values, SPAN, top, f"{title}: {now}, maximum {unit(most)} in the last {MINUTES} minutes"), class_="frame"
        ),
        element("p", element("span", f"{MINUTES} min, 0 to {unit(top)}"), element("span", keys), class_="axis"),
    )


def _table(title: str, heads: Sequence[str], rows: Sequence[Sequence[Content]], words: int = 1, named: bool = False) -> Element:
    """A table whose first ``words`` columns are text, and the others numbers.

    With ``named``, a narrow screen shows each row as a block of its own, with the column's head before each value.
    """
    kinds = [None if at < words else "number" for at in range(len(heads))]
    head = element("tr", [element("th", each, scope="col", class_=kind) for each, kind in zip(heads, kinds, strict=True)])
    lines = [
        element(
            "tr",
            element("th", row[0], scope="row"),
            [
                element("td", each, data_head=name, class_=kind)
                for each, name, kind in zip(row[1:], heads[1:], kinds[1:], strict=True)
            ],
            class_="none" if row[-2:-1] == ["0"] else None,
        )
        for row in rows
    ]
    table = element("table", element("thead", head), element("tbody", lines), class_="named" if named else None)
    return element("article", element("h2", title), table)


def _shares(title: str, head: str, counts: Mapping[str, float]) -> Element:
    """Counts since the start, with their shares as bars."""
    whole = sum(counts.values())
    rows: list[list[Content]] = [
        [name.replace("_", " "), _bar(count, whole), wording.count(count), wording.share(count, whole)]
        for name, count in counts.items()
    ]
    return _table(title, (head, "", "Total", "Share"), rows, words=2)


def _bar(count: float, whole: float) -> Element:
    width = round(100 * count / whole, 1) if whole else 0
    bar = element("rect", width=width, height=8)
    return element("svg", bar, viewBox="0 0 100 8", preserveAspectRatio="none", aria_hidden="true", class_="bar")


def _certificates(figures: Figures, now: float) -> Element:
    rows: list[list[Content]] = []
    for name, expires in figures.by("name", series("fumi_edge_certificate_not_after_timestamp_seconds")).items():
        days = int((expires - now) // 86400)
        state = "bad" if days < URGENT else "poor" if days < SOON else "good"
        left = "expired" if expires < now else wording.days(days)
        rows.append([name, wording.date(expires), element("span", left, class_=state)])
    return _table("Certificates", ("Name", "Expires", "Remaining"), rows)


def _ciphers(figures: Figures) -> Element:
    counts = {}
    for version in figures.by("version", SESSIONS):
        for cipher, count in figures.by("cipher", Series(SESSIONS.name, _of("version", version))).items():
            if count:
                counts[version, cipher] = count
    whole = sum(counts.values())
    rows: list[list[Content]] = [
        [f"{version} {cipher}", _bar(count, whole), wording.count(count), wording.share(count, whole)]
        for (version, cipher), count in sorted(counts.items(), key=lambda each: -each[1])
    ]
    resumed = figures.total(Series(SESSIONS.name, _of("resumed", "true")))
    table = _table("TLS sessions", ("Cipher", "", "Total", "Share"), rows, words=2)
    table.append(element("p", f"{wording.share(resumed, whole)} resumed." if whole else "None yet."))
    return table


def _times(figures: Figures) -> Element:
    """Quantiles of durations since the start, estimated from the histograms' buckets."""
    kinds = (
        ("TLS handshake", series("fumi_edge_handshake_seconds")),
        ("Backend connect", CONNECTING),
        ("Client connection", series("fumi_edge_session_seconds")),
    )
    rows: list[list[Content]] = []
    for name, histogram in kinds:
        found = [figures.quantile(share, histogram) for share in (0.5, 0.95, 0.99)]
        rows.append([name, *(wording.NOTHING if each is None else wording.seconds(each) for each in found)])
    return _table("Durations", ("", "p50", "p95", "p99"), rows)
