"""The status page, as the real program serves it, and the parts that it is made of."""

from __future__ import annotations

import base64
import hashlib
import re
import urllib.request
from collections.abc import Callable
from email.message import Message
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from fumi_core.status import wording
from fumi_core.status.history import INTERVAL, SPAN, Figures, History, Point, series
from fumi_core.status.markup import document, element
from fumi_core.status.plot import HEIGHT, WIDTH, axis_maximum, plot
from tests.edge.backends import StartBackend
from tests.edge.clients import Clients
from tests.edge.program import Program, StartEdge
from tests.support.clock import Clock
from tests.support.peer import Peer
from tests.support.waiting import until

VOID = {"meta"}


class Reader(HTMLParser):
    """What stands on a page: the tables as rows of words, the plots' labels, and the tags with their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.words: list[str] = []
        self.style = self.title = ""
        self.feed(text)
        assert not self.open, "a tag that is not closed"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.tables[self.title].append([])
        if tag in ("td", "th"):
            self.tables[self.title][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            self.style += data
            return
        self.words.append(data)
        if self.open[-1:] == ["h2"]:
            self.title = data
            self.tables[data] = []
        elif "table" in self.open:
            self.tables[self.title][-1][-1] += data

    def row(self, title: str, name: str) -> list[str]:
        return next(row[1:] for row in self.tables[title] if row[0] == name)


Look = Callable[[Program], tuple[Reader, Message]]


@pytest.fixture
def look() -> Look:
    def at(program: Program) -> tuple[Reader, Message]:
        port = program.events("serving metrics")[0]["port"]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=30) as answer:
            return Reader(answer.read().decode()), answer.headers

    return at


def test_it_counts_what_was_done(backend: StartBackend, edge: StartEdge, clients: Clients, look: Look) -> None:
    program = edge(backend=backend())
    ways: list[tuple[Callable[[int], Peer], int, bytes]] = [(clients.tls, program.tls_port, b"QUIT\r\n")] * 3
    ways += [(clients.plain, program.tls_port, b"EHLO me\r\n"), (clients.plain, program.starttls_port, b"QUIT\r\n")]
    ways += [(clients.plain, program.starttls_port, b"STARTTLS\r\nEHLO me\r\n")]
    for way, port, words in ways:
        client = way(port)
        client.ask(words)
        client.close()
    client = clients.plain(program.starttls_port)
    client.line()
    client.ask(b"STARTTLS\r\n")
    client = clients.upgrade(client)
    client.ask(b"QUIT\r\n")
    client.close()
    program.ended(7)
    held = clients.tls(program.tls_port)
    held.line()
    page, _ = look(program)
    tls, starttls = f"127.0.0.1:{program.tls_port}", f"127.0.0.1:{program.starttls_port}"
    mode, still_open, _, came, failed = page.row("Listeners", tls)
    assert (mode, still_open, came, failed) == ("TLS", "1", "5", "20 %")
    mode, still_open, _, came, failed = page.row("Listeners", starttls)
    assert (mode, still_open, came, failed) == ("STARTTLS", "0", "3", "0 %")
    assert [row[2] for row in page.tables["STARTTLS ports"][1:]] == ["1", "1", "0", "1"]
    assert page.row("TLS handshakes", "ok")[1:] == ["5", "83 %"]
    assert page.row("Rejected", "injection")[1:] == ["1", "100 %"]
    assert page.row("TLS sessions", "TLSv1.3 TLS_AES_256_GCM_SHA384")[1:] == ["5", "100 %"]
    assert page.row("Certificates", "localhost")[1] == "1 day"
    assert all(each.endswith("s") for row in page.tables["Durations"][1:] for each in row[1:])


def test_it_says_which_backend_is_down_and_why_nobody_is_served(backend: StartBackend, edge: StartEdge, look: Look) -> None:
    server = backend()
    program = edge("--backend", "127.0.0.1:9", "--health-interval", "0.1", backend=server)
    until(lambda: look(program)[0].row("Backends", "127.0.0.1:9")[0] == "down", "the verdict")
    until(lambda: program.fetch("/readyz")[0] == 200, "the verdict on the other")
    page, _ = look(program)
    assert page.row("Backends", server.address)[0] == "up"
    assert re.fullmatch(r"[\d,]+ refused", page.row("Backends", "127.0.0.1:9")[-1])
    assert "ready" in page.words
    server.close()
    until(lambda: "not ready" in look(program)[0].words, "the end of the last backend")
    page, _ = look(program)
    assert page.row("Backends", server.address)[0] == "down"
    assert any(tag == "title" for tag, _ in page.tags)
    assert any(word.startswith("NOT READY") for word in page.words)
    reason = program.fetch("/readyz")[1].strip()
    assert reason.startswith("backend ")
    assert any(word.startswith("backend ") for word in page.words)


def test_it_needs_no_script_and_nothing_from_elsewhere(backend: StartBackend, edge: StartEdge, look: Look) -> None:
    page, headers = look(edge(backend=backend()))
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    directives = dict(each.split(" ", 1) for each in headers["Content-Security-Policy"].split("; "))
    digest = base64.b64encode(hashlib.sha256(page.style.encode()).digest()).decode()
    assert directives.pop("style-src") == f"'sha256-{digest}'"
    assert set(directives.values()) == {"'none'"}
    assert directives.keys() >= {"default-src", "base-uri", "form-action", "frame-ancestors"}
    assert headers["Cache-Control"] == "no-store"
    assert headers["Referrer-Policy"] == "no-referrer"
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "link", "img", "iframe", "a", "form", "object", "use", "image"}
    names = {name for _, attributes in page.tags for name in attributes}
    assert not [name for name in names if name.startswith("on") or name in ("style", "href", "src")]
    assert "url(" not in page.style
    assert "@import" not in page.style
    assert ("meta", {"http-equiv": "refresh", "content": f"{INTERVAL:.0f}"}) in page.tags


def test_names_with_markup_in_them_are_text(backend: StartBackend, edge: StartEdge, tmp_path: Path, look: Look) -> None:
    path = str(tmp_path / "<b>&amp;\"'")
    program = edge(backend=backend(path=path))
    page, _ = look(program)
    assert page.row("Backends", f"unix:{path}")[0] == "up"
    assert not [tag for tag, _ in page.tags if tag == "b" and "unix" in tag]
    labels = [attributes["aria-label"] for tag, attributes in page.tags if "aria-label" in attributes]
    assert f"connect time of unix:{path}" in labels


def test_workers_are_one_edge(backend: StartBackend, edge: StartEdge, clients: Clients, look: Look) -> None:
    program = edge("--workers", "2", backend=backend())
    until(lambda: program.fetch("/readyz")[0] == 200, "the workers")
    for _ in range(8):
        client = clients.tls(program.tls_port)
        client.ask(b"QUIT\r\n")
        client.close()
    name = f"127.0.0.1:{program.tls_port}"
    until(lambda: look(program)[0].row("Listeners", name)[3] == "8", "the sum")


def test_it_remembers_the_last_minutes(backend: StartBackend, edge: StartEdge, clients: Clients, look: Look) -> None:
    program = edge(backend=backend())
    client = clients.tls(program.tls_port)
    client.line()
    until(lambda: [label for label in plots(look(program)[0]) if label.startswith("Current connections: 1,")], "a look")
    until(lambda: "Current connections: 1, maximum 1 in the last 15 minutes" in plots(look(program)[0]), "a second look")


def plots(page: Reader) -> list[str]:
    return [label for tag, attributes in page.tags if tag == "svg" and (label := attributes.get("aria-label"))]


# Its parts


Measured = tuple[History, Counter, Gauge, Histogram, Callable[..., None]]


@pytest.fixture
def measured() -> Measured:
    """A history of a counter, a gauge and a histogram, by a clock of ours."""
    registry, clock = CollectorRegistry(), Clock()
    counter = Counter("things", "", ["kind"], registry=registry)
    gauge = Gauge("level", "", registry=registry)
    histogram = Histogram("seconds", "", registry=registry, buckets=(1, 2, 4))
    kept = [series("things_total"), series("things_total", kind="b"), series("level")]
    kept += [series("seconds_sum"), series("seconds_count")]
    history = History(lambda: Figures(registry.collect()), kept, clock)

    def pass_by(seconds: float = INTERVAL) -> None:
        clock.now += seconds
        history.sample()

    return history, counter, gauge, histogram, pass_by


def test_rates_are_what_a_counter_grew_by_in_a_second(measured: Measured) -> None:
    history, counter, _, _, pass_by = measured
    pass_by()
    for grown in (10, 0, 5):
        counter.labels("a").inc(grown)
        counter.labels("b").inc(grown)
        pass_by()
    assert history.rates(series("things_total")) == [Point(10, 4), Point(5, 0), Point(0, 2)]
    assert history.rates(series("things_total", kind="b")) == [Point(10, 2), Point(5, 0), Point(0, 1)]
    assert history.rate(series("things_total")) == 2
    for _ in range(14):
        pass_by()
    assert history.rate(series("things_total")) == 0


def test_a_counter_that_begins_anew_is_no_negative_rate(measured: Measured) -> None:
    history, counter, _, _, pass_by = measured
    counter.labels("a").inc(100)
    pass_by()
    counter.clear()
    pass_by()
    assert history.rates(series("things_total")) == [Point(0, 0)]
    assert history.rate(series("things_total")) == 0


def test_what_is_too_old_is_forgotten(measured: Measured) -> None:
    history, _, gauge, _, pass_by = measured
    for value in range(1000):
        gauge.set(value)
        pass_by()
    levels = history.levels(series("level"))
    assert levels[-1] == Point(0, 999)
    assert levels[0].ago == SPAN
    assert len(levels) == SPAN / INTERVAL + 1


def test_means_are_of_what_was_observed_in_between(measured: Measured) -> None:
    history, _, _, histogram, pass_by = measured
    pass_by()
    histogram.observe(1)
    histogram.observe(3)
    pass_by()
    pass_by()
    assert history.means(series("seconds")) == [Point(INTERVAL, 2)]


def test_a_quantile_is_estimated_as_prometheus_does() -> None:
    registry = CollectorRegistry()
    histogram = Histogram("seconds", "", registry=registry, buckets=(1, 2, 4))
    assert Figures(registry.collect()).quantile(0.5, series("seconds")) is None
    for value in (0.5, 1.5, 1.5, 3):
        histogram.observe(value)
    figures = Figures(registry.collect())
    assert figures.quantile(0.25, series("seconds")) == 1
    assert figures.quantile(0.5, series("seconds")) == 1.5
    assert figures.quantile(1, series("seconds")) == 4
    histogram.observe(100)
    assert Figures(registry.collect()).quantile(1, series("seconds")) == 4


@pytest.mark.parametrize(
    ("most", "top"), [(0, 1), (0.3, 1), (1, 1), (1.2, 2), (2, 2), (3, 5), (6, 10), (10, 10), (99, 100), (101, 200), (4e9, 5e9)]
)
def test_a_plot_goes_up_to_a_round_number(most: float, top: float) -> None:
    assert axis_maximum([[Point(0, most)], []], 1) == top


def test_a_plot_has_a_line_for_each_run_of_points_and_stays_inside() -> None:
    points = [Point(ago, 5.0) for ago in (SPAN, SPAN - INTERVAL)] + [Point(INTERVAL, 0.0), Point(0.0, 100.0)]
    drawn = plot([points], SPAN, 10, "x")
    lines = [each.get("d", "") for each in drawn if each.get("class") == "line n0"]
    assert len(lines) == 2
    numbers = [float(number) for line in lines for number in re.findall(r"[\d.]+", line)]
    assert min(numbers) >= 0
    assert max(numbers[::2]) <= WIDTH
    assert max(numbers[1::2]) <= HEIGHT
    ElementTree.fromstring(ElementTree.tostring(drawn))


def test_a_plot_of_one_point_is_a_dot_and_of_none_a_base_line() -> None:
    assert [each.get("class") for each in plot([[]], SPAN, 1, "x")] == ["base"]
    (line,) = [each.get("d") for each in plot([[Point(0, 1)]], SPAN, 1, "x") if each.get("class") == "line n0"]
    assert line == f"M{WIDTH}.0 0.0L{WIDTH}.0 0.0"


def test_markup_escapes_text_and_attributes() -> None:
    text = document(element("p", "<i>&", element("b", "x"), "tail <", title='"<&', class_="y", data_head=None))
    assert text == '<!DOCTYPE html>\n<p title="&quot;<&amp;" class="y">&lt;i&gt;&amp;<b>x</b>tail &lt;</p>\n'


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        (wording.count(1234567), "1,234,567"),
        (wording.rate(0), "0/s"),
        (wording.rate(0.25), "0.25/s"),
        (wording.rate(0.799), "0.8/s"),
        (wording.rate(9.96), "10/s"),
        (wording.rate(12.34), "12.3/s"),
        (wording.rate(999.7), "1,000/s"),
        (wording.size(0), "0 B"),
        (wording.size(999.9), "1 kB"),
        (wording.size(1_250_000), "1.25 MB"),
        (wording.size(5e15), "5,000 TB"),
        (wording.seconds(0.00008), "80 µs"),
        (wording.seconds(0.0009999), "1 ms"),
        (wording.seconds(0.25), "250 ms"),
        (wording.seconds(4.9), "4.9 s"),
        (wording.seconds(90), "1 min 30 s"),
        (wording.duration(0), "0 s"),
        (wording.duration(3600), "1 h"),
        (wording.duration(90061), "1 d 1 h"),
        (wording.days(1), "1 day"),
        (wording.days(-2), "-2 days"),
        (wording.share(0, 0), wording.NOTHING),
        (wording.share(1, 3), "33 %"),
        (wording.share(1, 300), "0.3 %"),
        (wording.share(999, 1000), "100 %"),
        (wording.date(0), "1970-01-01"),
    ],
)
def test_numbers_are_said_for_people(said: str, meant: str) -> None:
    assert said == meant
