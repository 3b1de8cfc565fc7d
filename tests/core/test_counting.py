"""Our own counters, gauges and histograms against prometheus_client's: what is exposed must be the same to the letter."""

from __future__ import annotations

import prometheus_client
from prometheus_client import CollectorRegistry, exposition
from prometheus_client.openmetrics import exposition as openmetrics

import fumi_core.runtime.metrics_server  # for what it asks of prometheus_client
from fumi_core.runtime import counting

BOUNDS = (0.001, 0.25, 1, 2.5, 1048576)
OBSERVED = (0, 0.001, 0.0011, 0.25, 1, 1.5, 2.5, 3, 1e6, 1e9)
assert fumi_core.runtime.metrics_server


def test_both_formats_are_what_prometheus_client_writes() -> None:
    theirs, ours = CollectorRegistry(), CollectorRegistry()
    their_counter = prometheus_client.Counter("a_things", "Things.", ("kind", "how"), registry=theirs)
    our_counter = counting.Counter("a_things", "Things.", ("kind", "how"), ours)
    their_plain = prometheus_client.Counter("b_more", "More.", registry=theirs)
    our_plain = counting.Counter("b_more", "More.", (), ours).labels()
    their_gauge = prometheus_client.Gauge("c_open", 'With "quotes" and \\.', ("listener",), registry=theirs)
    our_gauge = counting.Gauge("c_open", 'With "quotes" and \\.', ("listener",), ours, over_workers="sum")
    their_histogram = prometheus_client.Histogram("d_seconds", "Seconds.", ("backend",), registry=theirs, buckets=BOUNDS)
    our_histogram = counting.Histogram("d_seconds", "Seconds.", ("backend",), ours, BOUNDS)
    for counter in (their_counter, our_counter):
        counter.labels("x", 'y"\n\\')
        counter.labels("x", "z").inc()
        counter.labels("x", "z").inc(2.5)
    for plain in (their_plain, our_plain):
        plain.inc()
    for gauge in (their_gauge, our_gauge):
        gauge.labels(":25").inc()
        gauge.labels(":25").inc()
        gauge.labels(":25").dec()
    for histogram in (their_histogram, our_histogram):
        histogram.labels("nothing yet")
        for value in OBSERVED:
            histogram.labels("b").observe(value)
    for written in (exposition.generate_latest, openmetrics.generate_latest):
        assert written(ours) == written(theirs)


def test_a_tallied_counter_reads_what_is_counted_elsewhere() -> None:
    registry = CollectorRegistry()
    tally = {"MAIL": 0, "RCPT": 3}
    rows = lambda: [((verb,), count) for verb, count in tally.items()]  # noqa: E731
    counting.Tallied("commands", "Commands.", ("command",), registry, rows)
    tally["MAIL"] += 1
    assert registry.get_sample_value("commands_total", {"command": "MAIL"}) == 1
    assert registry.get_sample_value("commands_total", {"command": "RCPT"}) == 3
