"""What a log line looks like, to whoever reads it."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Iterator

import pytest

from fumi_core.runtime.logs import JSONFormatter, TextFormatter, event, failure

Lines = Callable[[], list[str]]
Written = Callable[..., tuple[logging.Logger, Lines]]
FORGED = "a@b.example\r\n2026 INFO forged \x1b[31m é"


@pytest.fixture
def written() -> Iterator[Callable[[logging.Formatter], tuple[logging.Logger, Lines]]]:
    logger = logging.Logger("fumi.test", logging.INFO)

    def write(formatter: logging.Formatter) -> tuple[logging.Logger, Lines]:
        handler = logging.StreamHandler(stream := io.StringIO())
        handler.setFormatter(formatter)
        logger.addHandler(handler)
        return logger, lambda: stream.getvalue().splitlines()

    yield write
    logger.handlers.clear()


@pytest.mark.parametrize("formatter", [TextFormatter(), logging.Formatter(logging.BASIC_FORMAT)], ids=["ours", "basicConfig"])
def test_fields_stand_behind_the_words_in_any_text(written: Written, formatter: object) -> None:
    logger, lines = written(formatter)
    event(logger, logging.INFO, "sender accepted", id="1f", user=None, text="two words")
    assert len(lines()) == 1
    assert lines()[0].endswith('sender accepted id=1f text="two words"')


@pytest.mark.parametrize("formatter", [TextFormatter(), JSONFormatter(), logging.Formatter()], ids=["text", "json", "plain"])
def test_nobody_can_forge_a_line(written: Written, formatter: object) -> None:
    logger, lines = written(formatter)
    event(logger, logging.INFO, FORGED, sender=FORGED)
    assert len(lines()) == 1
    assert "\x1b" not in lines()[0]


def test_json_keeps_words_and_fields_apart(written: Written) -> None:
    logger, lines = written(JSONFormatter())
    event(logger, logging.INFO, "message accepted", size=4, user=None)
    logger.info("a %s of others", "line")
    first, second = map(json.loads, lines())
    assert (first["event"], first["size"], "user" in first) == ("message accepted", 4, False)
    assert (second["event"], second["level"], second["logger"]) == ("a line of others", "info", "fumi.test")


def test_a_failure_comes_with_its_traceback(written: Written) -> None:
    logger, lines = written(TextFormatter())
    failure(logger, "a handler failed", KeyError("oops"), id="1f")
    assert "ERROR fumi.test a handler failed id=1f" in lines()[0]
    assert lines()[-1] == "KeyError: 'oops'"


def test_what_is_below_the_level_is_not_logged(written: Written) -> None:
    logger, lines = written(TextFormatter())
    event(logger, logging.DEBUG, "no PROXY header")
    assert lines() == []
