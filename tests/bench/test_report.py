"""What the table says of given figures. No server runs here."""

import json

import pytest

from . import environment, report
from .report import Result
from .rounds import in_order
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


def test_every_other_round_goes_from_the_last_contestant_to_the_first() -> None:
    orders = [[contestant.name for contestant in in_order(KEPT, number)] for number in range(3)]
    assert orders[0] == ["fumi-core", "aiosmtpd", "smtp-server", "smtp-sink"]
    assert orders == [orders[0], orders[0][::-1], orders[0]]


@pytest.mark.parametrize(
    ("path", "arguments", "build"),
    [
        ("/usr/bin/python3.11", "'--enable-shared'", "the system's"),
        ("/opt/python/bin/python3.13", "'--enable-optimizations' '--with-lto'", "(profile-guided optimization)"),
        ("/root/.pyenv/versions/3.11.7/bin/python3.11", "'--enable-shared'", "NOT built with profile-guided optimization"),
        ("/opt/other/bin/python3", None, "NOT built with profile-guided optimization"),
    ],
)
def test_the_interpreter_is_named_with_the_way_it_was_built(
    monkeypatch: pytest.MonkeyPatch, path: str, arguments: str | None, build: str
) -> None:
    monkeypatch.setattr("sys._base_executable", path)
    monkeypatch.setattr("sysconfig.get_config_var", {"CONFIG_ARGS": arguments}.get)
    assert path in environment.interpreter()
    assert build in environment.interpreter()


def test_the_names_of_rows_are_different() -> None:
    assert len({row.name for row in ROWS}) == len(ROWS)
