"""The last events of a process: which lines of the log they are, and how equal ones become one."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from fumi_core.runtime import journal as journals
from fumi_core.runtime.journal import FOLD_SECONDS, MAX_EVENTS, MAX_TEXT, Event, Journal, merged
from fumi_core.runtime.logs import event, failure

log = logging.getLogger("fumi.test")


@pytest.fixture
def journal() -> Iterator[Journal]:
    log.setLevel(logging.DEBUG)
    journals.begin()
    yield journals.journal
    journals.end()
    journals.journal.forget()


def texts(journal: Journal) -> list[str]:
    return [each.text for each in journal.events]


def test_it_keeps_warnings_errors_and_what_operators_wait_for(journal: Journal) -> None:
    event(log, logging.INFO, "connection ended")
    event(log, logging.INFO, "reloaded")
    event(log, logging.WARNING, "backend down", backend="a:25")
    logging.getLogger("asyncio").error("slow %s", "callback")
    failure(log, "connection failed", KeyError("someone@example.org"))
    assert texts(journal) == ["reloaded", "backend down", "slow callback", "connection failed"]
    assert journal.events[-1].fields == {"exception": "KeyError"}
    assert [each.level for each in journal.events] == ["info", "warning", "error", "error"]


def test_equal_events_are_one_and_the_last_ones_stay(journal: Journal) -> None:
    event(log, logging.WARNING, "next hop failed", id="1", next_hop="lmtp:a", error="refused")
    event(log, logging.WARNING, "next hop failed", id="2", next_hop="lmtp:b", error="refused")
    event(log, logging.WARNING, "next hop failed", id="3", next_hop="lmtp:a", error="refused")
    assert [(each.fields["next_hop"], each.fields["id"], each.times) for each in journal.events] == [
        ("lmtp:b", "2", 1),
        ("lmtp:a", "3", 2),
    ]
    for number in range(MAX_EVENTS):
        event(log, logging.ERROR, "cannot deliver", zone=number)
    assert len(journal.events) == MAX_EVENTS
    assert set(texts(journal)) == {"cannot deliver"}


def test_a_flood_of_rejections_is_one_event_with_their_number(journal: Journal) -> None:
    event(log, logging.WARNING, "worker died", worker=1)
    for number in range(500):
        event(log, logging.INFO, "rejected, more suppressed", reason="rate", count=10, last_client_ip=f"192.0.2.{number}")
    assert texts(journal) == ["worker died", "rejected, more suppressed"]
    assert journal.events[-1].times == 5000
    assert journal.events[-1].without_client().fields == {"reason": "rate"}


def test_what_may_identify_a_client_is_left_out(journal: Journal) -> None:
    event(
        log, logging.ERROR, "cannot deliver", client_ip="192.0.2.7", path="/mail/example.org/joe", to="joe@example.org",
        zone="bl.example", reply="550 5.1.1 <joe@example.org>: no such user, says [192.0.2.7] to=ann@[2001:db8::1]",
    )  # fmt: skip
    event(log, logging.ERROR, "cannot deliver", client_ip="unix", listener="unix:/run/fumi")
    failed = logging.getLogger("asyncio")
    failed.error("Task exception was never retrieved\nfuture: <Task exception=KeyError('joe')>")
    failed.error("Exception in callback of ann@example.org")
    assert [(each.text, each.fields) for each in (known.without_client() for known in journal.events)] == [
        ("cannot deliver", {"zone": "bl.example", "reply": "550 5.1.1 <…>: no such user, says […] …"}),
        ("cannot deliver", {"listener": "unix:/run/fumi"}),
        ("Task exception was never retrieved", {}),
        ("Exception in callback of …", {}),
    ]


def test_long_texts_are_cut(journal: Journal) -> None:
    event(log, logging.ERROR, "handler failed", error="x" * 10_000_000)
    logging.getLogger("asyncio").error("y" * 10_000_000)
    journal.note("rejected", reason="z" * 10_000_000)
    one, other, noted = journal.events
    assert one.fields == {"error": "x" * MAX_TEXT + "…"}
    assert other.text == "y" * MAX_TEXT + "…"
    assert noted.fields == {"reason": "z" * MAX_TEXT + "…"}


class Unprintable:
    def __str__(self) -> str:
        raise RuntimeError("no")


def test_a_line_that_cannot_be_formatted_does_not_fail_where_it_is_logged(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("fumi"), "propagate", False)  # pytest's own handler raises there
    log.warning("%d messages", "many")
    log.warning(Unprintable())
    event(log, logging.ERROR, "cannot deliver", error=Unprintable())
    unreadable = "cannot format a log line", {"logger": "fumi.test"}
    assert [(each.text, each.fields) for each in journal.events] == [unreadable] * 2
    assert [(each.level, each.times) for each in journal.events] == [("warning", 2), ("error", 1)]


def test_without_a_page_nothing_is_kept() -> None:
    log.setLevel(logging.DEBUG)
    event(log, logging.ERROR, "cannot deliver")
    journals.journal.note("rejected", reason="rate")
    assert journals.journal.events == []


def made(at: float, text: str, **fields: str) -> Event:
    return Event(at, at, "error", text, fields, 1)


def test_what_several_processes_have_logged_is_one_event() -> None:
    workers = [[made(10.0, "reload failed", error="x"), made(20.0, "backend down")], [made(11.0, "reload failed", error="x")]]
    assert merged(workers) == [
        Event(10.0, 11.0, "error", "reload failed", {"error": "x"}, 2),
        Event(20.0, 20.0, "error", "backend down", {}, 1),
    ]


def test_equal_events_far_from_each_other_stay_apart() -> None:
    late = 11.0 + FOLD_SECONDS
    assert [each.last for each in merged([[made(10.0, "backend down"), made(late, "backend down")]])] == [10.0, late]
