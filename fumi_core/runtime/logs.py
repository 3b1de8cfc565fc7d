"""Logs for people and for machines: one line an event on stderr, text or JSON, with named fields.

A field's value may come from a client, so text quotes whatever is not plain and JSON escapes it: nobody can forge a line.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import time
from functools import lru_cache
from typing import Any

_PLAIN = re.compile(r"[!#-~]+")
_PLAIN_LINES = re.compile(r"[!#-~]+(?:\n[!#-~]+)*")


class Event:
    """A record's message: words, and named fields. As text it is both, so that formatters which know no fields show them too."""

    __slots__ = ("fields", "words")

    def __init__(self, words: str, fields: dict[str, object]) -> None:
        self.words = words
        self.fields = {name: value for name, value in fields.items() if value is not None}

    def __str__(self) -> str:
        values = [str(value) for value in self.fields.values()]
        together = "\n".join(values)
        if not _PLAIN_LINES.fullmatch(together) or together.count("\n") >= len(values):
            values = [_quoted(value) for value in values]
        return " ".join([_one_line(self.words), *map("=".join, zip(self.fields, values, strict=True))])


def event(logger: logging.Logger, level: int, message: str, /, **fields: object) -> None:
    """Log one event with its fields; a field that is None is left out."""
    if logger.isEnabledFor(level):
        # What log() does, but for looking for its caller.
        logger.handle(logger.makeRecord(logger.name, level, "", 0, Event(message, fields), (), None))


def failure(logger: logging.Logger, message: str, error: BaseException, /, **fields: object) -> None:
    """Log an error of ours, with its traceback and its fields."""
    logger.error(Event(message, fields), exc_info=error)


def configure(form: str, level: str) -> None:
    """Send every logger's records to stderr as ``text`` or ``json``, from ``level`` up.

    Both programs begin with this: before anything else could become descriptor 2, and get what is meant for stderr.
    """
    _complete()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JSONFormatter() if form == "json" else TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    # These are looked up for every record and shown in none.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False


def _complete() -> None:
    """Open on /dev/null what is closed of stdin, stdout and stderr."""
    for fd, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(fd)
        except OSError:
            # The lowest number that is free is this one.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
        if getattr(sys, name) is None:
            setattr(sys, name, open(fd, mode, closefd=False))  # noqa: SIM115  for as long as there is a program


def _stamp(record: logging.LogRecord) -> str:
    return f"{_second(int(record.created))}.{int(record.msecs):03d}Z"


@lru_cache(2)
def _second(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))


class TextFormatter(logging.Formatter):
    """``2026-01-31T12:00:00.123Z INFO fumi.core session ended id=… client=…``; a traceback follows on lines of its own."""

    def format(self, record: logging.LogRecord) -> str:
        words = [_stamp(record), record.levelname, record.name, _one_line(record.getMessage())]
        if record.exc_info:
            words.append("\n" + self.formatException(record.exc_info))
        return " ".join(words)


class JSONFormatter(logging.Formatter):
    """One JSON object a line: ``time level logger event``, the fields, and ``traceback`` where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {"time": _stamp(record), "level": record.levelname.lower(), "logger": record.name}
        if isinstance(record.msg, Event):
            line |= {"event": record.msg.words, **record.msg.fields}
        else:
            line["event"] = record.getMessage()
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def _quoted(text: str) -> str:
    return text if _PLAIN.fullmatch(text) else json.dumps(text)


def _one_line(text: str) -> str:
    return text if text.isprintable() else json.dumps(text)[1:-1]
