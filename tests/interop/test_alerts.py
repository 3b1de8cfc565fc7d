"""The alerts: what they point to, the series of their tests, and real faults that make each of them fire."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.interop.alert_series import FILE, notation, recorded, written
from tests.interop.bad_day import HEALTHY, run, table
from tests.support.programs import Programs
from tests.support.prometheus import RULES, quicker
from tests.support.readme import ROOT, sections

ALERTS = re.findall(r"- alert: (\w+)", RULES)
FACTOR = 20
"""By how much ``for:`` and ranges are shorter: five minutes are 15 seconds, and Prometheus scrapes every second."""


def test_each_alert_points_to_its_section() -> None:
    """``runbook_url`` begins with the repository's address if pyproject.toml names one."""
    named = re.search(r'^Repository = "(.*?)/?"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    begin = f"{named[1]}/blob/main/" if named else ""
    found = re.findall(r"- alert: (\w+)(?:\n +.*)*?\n +runbook_url: (\S+)", RULES)
    assert [alert for alert, _ in found] == ALERTS
    for alert, link in found:
        file, _, anchor = link.removeprefix(begin).partition("#")
        assert link == f"{begin}{file}#{anchor}"
        titles = [section.title for section in sections((ROOT / file).read_text())]
        assert [title for title in titles if title.lower() == anchor] == [alert]


def test_the_series_of_the_tests_are_what_the_programs_count(programs: Programs) -> None:
    """``python -m tests.interop.alert_series`` writes them again."""
    text = FILE.read_text()
    assert comparable(written(text, recorded(programs))) == comparable(text)


def comparable(text: str) -> str:
    """The text without the numbers of descriptors, which other versions of Python open more or less of."""
    return re.sub(r"(process_open_fds.*\n +values: ).*", r"\1", text)


def test_values_are_written_as_promtool_reads_them() -> None:
    assert notation([0, 2, 4, 6]) == "0+2x3"
    assert notation([1, 1, 1, 0, 0]) == "1x2 0x1"
    assert notation([0, 0, 5, 10, 15]) == "0x1 5+5x2"
    assert notation([7]) == "7"


def test_quicker_rules_differ_in_nothing_but_their_times() -> None:
    rule = "expr: rate(a[5m]) > 0.3 and increase(b[1h]) > 1\nfor: 2m\n"
    assert quicker(rule, 20) == "expr: rate(a[15s]) > 0.3 and increase(b[180s]) > 1\nfor: 6s\n"
    times = r"\[\d+[smh]\]|for: \d+[smh]\b"
    assert re.sub(times, "", quicker(RULES, FACTOR)) == re.sub(times, "", RULES)


@pytest.mark.long
def test_every_alert_fires_for_a_real_fault_and_none_for_a_healthy_edge_and_core(tmp_path: Path) -> None:
    day = run(tmp_path, FACTOR, 300)
    shown = "\n".join(table(day))
    print(shown)
    assert {alert for alert, _ in day.seen} == set(ALERTS)
    assert [each for each in day.seen.values() if each.firing is None] == [], shown
    assert day.unexpected == set()
    assert not {instance for _, instance in day.seen} & set(HEALTHY)
    assert day.healthy_mails > 100
    assert day.errors == []
