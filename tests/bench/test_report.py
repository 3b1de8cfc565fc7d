"""What the table says of given figures. No server runs here."""

import json

import pytest

from . import report
from .report import Result
from .rows import ROWS, Row

KEPT = next(row for row in ROWS if row.name == "core-kept")
IDLE = next(row for row in ROWS if row.name == "tls-idle")


def result(row: Row, *figures: list[float]) -> Result:
    """A result with the figures of each contestant, in the row's order."""
    names = [contestant.name for contestant in row.contestants()]
    return Result(row, dict(zip(names, figures, strict=True)))


def test_ratios_compare_the_figures_of_one_round() -> None:
    against_aiosmtpd = result(KEPT, [10, 20, 30], [100, 100, 300], [50, 50, 50], [30, 30, 30]).comparisons()[0]
    assert against_aiosmtpd.values == pytest.approx([0.1, 0.2, 0.1])
    assert against_aiosmtpd.met


def test_a_target_is_met_by_the_median_and_not_by_the_best_round() -> None:
    against_aiosmtpd = result(KEPT, [10, 40, 50], [100, 100, 100], [50, 50, 50], [30, 30, 30]).comparisons()[0]
    assert against_aiosmtpd.verdict() == "missed"


def test_a_peer_without_a_target_is_shown_without_a_verdict() -> None:
    against_smtp_sink = result(KEPT, [10], [100], [50], [30]).comparisons()[2]
    assert (against_smtp_sink.met, against_smtp_sink.verdict()) == (None, "")


def test_a_contestant_that_failed_makes_the_whole_row_invalid() -> None:
    failed = result(KEPT, [10, 10], [100, 100], [50], [30, 30])
    failed.errors["smtp-server"] = "lost connection"
    assert {comparison.verdict() for comparison in failed.comparisons()} == {"invalid"}
    assert "core-kept: smtp-server: lost connection" in report.table([failed])


def test_a_row_without_peers_is_judged_by_its_own_figure() -> None:
    assert result(IDLE, [0.0]).comparisons()[0].met
    assert not result(IDLE, [1.0]).comparisons()[0].met


def test_json_holds_every_round() -> None:
    written = json.loads(report.as_json([result(KEPT, [10, 12], [100, 100], [50, 50], [30, 30])], 2, {}))
    assert written["rows"][0]["figures"]["fumi-core"] == {"median": 11, "rounds": [10, 12]}
    assert written["rows"][0]["comparisons"][0]["met"] is True
