"""What a log line looks like, to whoever reads it."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import IO

import pytest

from fumi_core.runtime import logs
from fumi_core.runtime.logs import JSONFormatter, NonBlockingStreamHandler, TextFormatter, event, failure

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
def test_fields_follow_the_message_in_any_text(written: Written, formatter: object) -> None:
    logger, lines = written(formatter)
    event(logger, logging.INFO, "sender accepted", id="1f", user=None, text="two words")
    assert len(lines()) == 1
    assert lines()[0].endswith('sender accepted id=1f text="two words"')


@pytest.mark.parametrize("formatter", [TextFormatter(), JSONFormatter(), logging.Formatter()], ids=["text", "json", "plain"])
def test_no_client_can_forge_a_line(written: Written, formatter: object) -> None:
    logger, lines = written(formatter)
    event(logger, logging.INFO, FORGED, sender=FORGED)
    assert len(lines()) == 1
    assert "\x1b" not in lines()[0]


def test_json_has_the_message_and_each_field_as_a_key(written: Written) -> None:
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
    assert lines()[-1] == "  KeyError: 'oops'"


def test_an_error_whose_text_comes_from_a_client_forges_no_line(written: Written) -> None:
    logger, lines = written(TextFormatter())
    failure(logger, "a handler failed", ValueError(FORGED))
    assert all(line.startswith("  ") and line.isprintable() for line in lines()[1:])
    assert lines()[-2:] == [r"  ValueError: a@b.example\r", r"  2026 INFO forged \u001b[31m \u00e9"]


def test_what_is_below_the_level_is_not_logged(written: Written) -> None:
    logger, lines = written(TextFormatter())
    event(logger, logging.DEBUG, "no PROXY header")
    assert lines() == []


# Whoever reads them may stop


Outlets = tuple[logging.Logger, IO[bytes], NonBlockingStreamHandler]


@pytest.fixture(params=["pipe", "pipe of another user", "socket"])
def outlet(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Outlets]:
    ends = [end.detach() for end in socket.socketpair()] if request.param == "socket" else list(os.pipe())
    with monkeypatch.context() as patch:
        if request.param == "pipe of another user":
            patch.setattr("os.open", refuse)
        handler = NonBlockingStreamHandler(ends[1])
    handler.setFormatter(TextFormatter())
    logger = logging.Logger("fumi.test", logging.INFO)
    logger.addHandler(handler)
    with open(ends[0], "rb") as reader:
        yield logger, reader, handler
    # The other end stays open: the handler's thread may be about to write.


def refuse(*arguments: object) -> int:
    raise PermissionError


def words(line: bytes) -> str:
    """A line without time, level and logger."""
    return line.decode().rstrip("\n").split(" ", 3)[3]


def test_logging_never_blocks_and_no_line_is_lost_or_out_of_order(outlet: Outlets) -> None:
    logger, reader, _ = outlet
    for number in range(6000):
        event(logger, logging.INFO, "line", number=number)
    assert [words(reader.readline()) for _ in range(6000)] == [f"line number={number}" for number in range(6000)]
    event(logger, logging.INFO, "and on")
    assert words(reader.readline()) == "and on"


def test_a_descriptor_that_others_made_non_blocking_loses_nothing_either(outlet: Outlets) -> None:
    logger, reader, handler = outlet
    os.set_blocking(handler.fd, False)
    for number in range(6000):
        event(logger, logging.INFO, "line", number=number)
    assert [words(reader.readline()) for _ in range(6000)] == [f"line number={number}" for number in range(6000)]


def test_lines_that_there_is_no_room_for_are_counted_where_they_are_missing(
    outlet: Outlets, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger, reader, _ = outlet
    monkeypatch.setattr(logs, "MAX_QUEUED_BYTES", 10_000)
    for number in range(20_000):
        event(logger, logging.INFO, "line", number=number)
    next_one, losses = 0, 0
    while next_one < 20_000:
        line = words(reader.readline())
        if found := re.fullmatch(r"log lines lost count=(\d+)", line):
            next_one += int(found[1])
            losses += 1
        else:
            assert line == f"line number={next_one}"
            next_one += 1
    assert losses


def test_queued_lines_have_a_short_time_limit_at_the_end(outlet: Outlets, monkeypatch: pytest.MonkeyPatch) -> None:
    logger, reader, handler = outlet
    for _ in range(6000):
        event(logger, logging.INFO, "line")
    monkeypatch.setattr(logs, "FLUSH_TIMEOUT", 0.01)
    handler.flush()
    monkeypatch.setattr(logs, "FLUSH_TIMEOUT", 60)
    lines: list[bytes] = []
    thread = threading.Thread(target=lambda: lines.extend(reader.readline() for _ in range(6000)))
    thread.start()
    before = time.monotonic()
    handler.flush()
    assert time.monotonic() - before < 60
    thread.join()
    assert len(lines) == 6000


def test_lines_queued_at_a_fork_are_written_once(outlet: Outlets, monkeypatch: pytest.MonkeyPatch) -> None:
    logger, reader, handler = outlet
    monkeypatch.setattr(logs, "FLUSH_TIMEOUT", 60)
    for _ in range(6000):
        event(logger, logging.INFO, "parent")
    if (pid := os.fork()) == 0:
        for _ in range(6000):
            event(logger, logging.INFO, "child")
        handler.flush()
        os._exit(0)
    lines = Counter(words(reader.readline()) for _ in range(12_000))
    os.waitpid(pid, 0)
    assert lines == {"parent": 6000, "child": 6000}


def test_a_closed_reader_is_no_error(outlet: Outlets) -> None:
    logger, reader, _ = outlet
    reader.close()
    for _ in range(3):
        event(logger, logging.INFO, "to nobody")


def test_a_line_that_cannot_be_formatted_is_one_that_says_so(outlet: Outlets) -> None:
    logger, reader, _ = outlet
    logger.info("%d", "no number")
    assert words(reader.readline()).startswith(f"cannot format a log line logger=fumi.test file={__file__} line=")
    while not (line := reader.readline()).startswith(b"  TypeError"):
        assert line
