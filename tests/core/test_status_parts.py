"""The parts of which status pages are made: history, plots, markup, wording."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any
from xml.etree import ElementTree

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from fumi_core.runtime.journal import Event
from fumi_core.runtime.metrics_server import Page, Request
from fumi_core.runtime.overview import Overview, Worker
from fumi_core.runtime.scoreboard import WorkerState
from fumi_core.status import wording
from fumi_core.status.history import INTERVAL, SPAN, Figures, History, Point, less, series, together
from fumi_core.status.markup import document, element
from fumi_core.status.page import StatusPage, View
from fumi_core.status.plot import HEIGHT, WIDTH, axis_maximum, plot
from tests.support.clock import Clock
from tests.support.status_page import Reader

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


def test_a_counter_that_is_reset_is_no_negative_rate(measured: Measured) -> None:
    history, counter, _, _, pass_by = measured
    counter.labels("a").inc(100)
    pass_by()
    counter.clear()
    pass_by()
    assert history.rates(series("things_total")) == [Point(0, 0)]
    assert history.rate(series("things_total")) == 0


def test_samples_older_than_the_span_are_dropped(measured: Measured) -> None:
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


def test_a_sample_that_is_taken_meanwhile_is_not_in_half_of_a_mean() -> None:
    """The page reads in one thread, and the history samples in another."""
    registry, clock = CollectorRegistry(), Clock()
    histogram = Histogram("seconds", "", registry=registry)
    sampling = False

    def time() -> float:
        nonlocal sampling
        clock.now += INTERVAL
        if not sampling:
            sampling = True
            history.sample()
            sampling = False
        return clock.now

    history = History(lambda: Figures(registry.collect()), [series("seconds_sum"), series("seconds_count")], time)
    for _ in range(3):
        histogram.observe(2)
        assert {each.value for each in history.means(series("seconds"))} <= {2}
    assert history.means(series("seconds"))


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
def test_numbers_are_formatted_for_people(said: str, meant: str) -> None:
    assert said == meant


def pages_of(workers: list[Worker], problem: str | None = None, degraded: tuple[str, ...] = ()) -> Mapping[str, Page]:
    """The pages of a program with these workers."""
    event = Event(1.0, 9.0, "error", "<b>cannot deliver</b>", {"client_ip": "192.0.2.1", "state": "<i>"}, 2)
    overview = Overview(CollectorRegistry(), lambda: problem, lambda: problem, lambda: workers, lambda: [event], 7, 0.0)
    view = View(problem=problem, degraded=degraded, tiles=(), tables=(), small_tables=(), limits={"--max-clients": math.inf})
    return StatusPage("fumi-core", overview, (), lambda figures, history, workers: view).pages()


def page_of(workers: list[Worker], problem: str | None = None, degraded: tuple[str, ...] = ()) -> tuple[Reader, dict[str, Any]]:
    """The page, and its facts, of a program with these workers."""
    pages = pages_of(workers, problem, degraded)
    return Reader(pages["/"](Request("/", {})).text), json.loads(pages["/status.json"](Request("/status.json", {})).text)


@pytest.mark.parametrize("path", ["/", "/status.json"])
@pytest.mark.parametrize(
    ("client", "host", "shown"),
    [
        ("127.0.0.1", "127.0.0.1:9525", True),
        ("::1", "[::1]:9525", True),
        ("127.0.0.1", "localhost", True),  # also through ssh -L
        ("unix", "", True),
        ("192.0.2.9", "mail.example.org:9525", True),
        ("127.0.0.1", "rebound.example:9525", False),  # a browser here, and a name of somebody else that resolves to 127.0.0.1
        ("::1", "rebound.example", False),
        ("::ffff:127.0.0.1", "localhost.rebound.example", False),
        ("127.0.0.1", "", False),
    ],
)
def test_a_page_elsewhere_on_the_web_cannot_read_client_addresses(path: str, client: str, host: str, shown: bool) -> None:
    page = pages_of([SERVING])[path]
    assert "192.0.2.1" not in page(Request(path, {}, client, host)).text
    answer = page(Request(path, {"clients": "1"}, client, host))
    assert ("192.0.2.1" in answer.text) is shown
    assert answer.status == ("200 OK" if shown else "403 Forbidden")


SERVING, ABSENT = Worker(0, WorkerState.SERVING, 8, 0.0, 3, {}), Worker(1, WorkerState.ABSENT, None, None, 0, {})
DRAINED = Worker(0, WorkerState.DRAINING, 8, 0.0, 3, {})


@pytest.mark.parametrize(
    ("workers", "problem", "degraded", "state", "reasons"),
    [
        ([SERVING], None, (), "ready", []),
        ([SERVING], None, ("a", "b"), "degraded", ["a", "b"]),
        ([SERVING, ABSENT], None, (), "degraded", ["1 of 2 workers not running"]),
        ([SERVING], "broken", ("a",), "not ready", ["broken", "a"]),
        ([DRAINED], "draining", (), "draining", ["draining: 3 connections open"]),
    ],
)
def test_the_state_is_the_worst_of_all(
    workers: list[Worker], problem: str | None, degraded: tuple[str, ...], state: str, reasons: list[str]
) -> None:
    page, facts = page_of(workers, problem, degraded)
    assert (page.state, facts["state"]) == (state, state)
    assert facts["reasons"] == reasons
    assert not reasons or "; ".join(reasons) in page.words


def test_events_are_escaped_and_do_not_identify_the_client() -> None:
    page, facts = page_of([SERVING])
    assert not {"b", "i"} & {tag for tag, _ in page.tags}
    (row,) = page.tables["Last 50 events: errors, rejections, reloads, restarts"][1:]
    assert row[1:3] + row[4:] == ["error", "<b>cannot deliver</b>", "state <i>"]
    assert facts["events"][0]["fields"] == {"state": "<i>"}


def test_no_limit_is_null_in_json() -> None:
    page, facts = page_of([SERVING])
    assert facts["limits"] == {"--max-clients": None}
    assert page.row("Limits", "--max-clients") == ["none"]


def test_lines_are_added_and_subtracted_point_by_point() -> None:
    one, other = [Point(5, 1), Point(0, 3)], [Point(5, 2), Point(0, 1)]
    assert together([one, other]) == [Point(5, 3), Point(0, 4)]
    assert less(one, other) == [Point(5, 0), Point(0, 2)]
    assert together([]) == []
