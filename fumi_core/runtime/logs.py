"""Logs for people and for machines: one line an event on stderr, text or JSON, with named fields.

A field's value may come from a client, so text quotes whatever is not plain and JSON escapes it: nobody can forge a line.

Whoever reads stderr may stop: a pipe that nobody empties, a journal on a disk that hangs. Mail goes on then, and lines that there
is no room for are lost, and counted.
"""

from __future__ import annotations

import json
import logging
import os
import re
import select
import socket
import stat
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

from fumi_core.runtime.daemon_thread import start_thread

STDERR = 2
WAITING = 1 << 20
"""Octets of lines that may wait for whoever reads stderr."""
FLUSH = 1.0
"""Seconds that they get at the end; less than a master gives its workers to end at once."""
_PLAIN = re.compile(r"[!#-~]+")
_PLAIN_LINES = re.compile(r"[!#-~]+(?:\n[!#-~]+)*")


class LogMessage:
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
    """Log one event with its fields; a field that is None is left out. Raises nothing, whatever logger an app has given."""
    try:
        if logger.isEnabledFor(level):
            # What log() does, but for looking for its caller.
            logger.handle(logger.makeRecord(logger.name, level, "", 0, LogMessage(message, fields), (), None))
    except Exception as unusable:
        _cannot_log(message, unusable)


def failure(logger: logging.Logger, message: str, error: BaseException, /, **fields: object) -> None:
    """Log an error with its traceback and its fields. Raises nothing."""
    try:
        logger.error(LogMessage(message, fields), exc_info=error)
    except Exception as unusable:
        _cannot_log(message, unusable)


def _cannot_log(message: str, error: Exception) -> None:
    """A filter or handler that an app has added to a logger failed: report that where no such filter or handler is asked."""
    outlet = next(
        (each for each in logging.getLogger().handlers if isinstance(each, NonBlockingStreamHandler)), logging.lastResort
    )
    if outlet is not None:
        outlet.handle(_record(logging.ERROR, LogMessage("cannot log", {"message": message}), error))


def configure(form: str, level: str) -> None:
    """Send every logger's records to stderr as ``text`` or ``json``, from ``level`` up."""
    root = logging.getLogger()
    # Lines may be waiting in the one that there is.
    handler = next(
        (each for each in root.handlers if isinstance(each, NonBlockingStreamHandler)), None
    ) or NonBlockingStreamHandler(STDERR)
    handler.setFormatter(JSONFormatter() if form == "json" else TextFormatter())
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    # At debug asyncio reports which selector it uses, in every process.
    logging.getLogger("asyncio").setLevel(max(root.level, logging.WARNING))
    # These are looked up for every record and shown in none.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False


class NonBlockingStreamHandler(logging.Handler):
    """Writes lines to a descriptor, in their order, and never waits for room.

    A line is written by whoever logs it, as far as there is room: to hand each to a thread costs more. When the descriptor is
    full, that line and all later ones are queued, and a background thread writes them as room appears. Once more than WAITING
    octets are queued, new lines are dropped until the queue is empty; then one line reports the number.
    """

    def __init__(self, fd: int) -> None:
        super().__init__()
        self.fd = fd
        self._try = _without_waiting(fd)
        self._waiting: deque[bytes] = deque()  # what the thread is writing comes first
        self._octets = 0
        self._lost = 0
        self._writer: threading.Thread | None = None
        self._changed = threading.Condition(self.lock)
        os.register_at_fork(after_in_child=self._forked)

    def emit(self, record: logging.LogRecord) -> None:
        """Called with the lock."""
        line = self._line(record)
        if not self._waiting:
            self._write(line)
        elif self._lost or self._octets + len(line) > WAITING:
            self._lost += 1
        else:
            self._wait(line)

    def flush(self) -> None:
        """Give what waits a moment; called at exit."""
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting, FLUSH)

    def _line(self, record: logging.LogRecord) -> bytes:
        try:
            text = self.format(record)
        except Exception as error:
            # What logging does of itself is to print it to stderr, and to wait until it can.
            fault = LogMessage(
                "cannot format a log line", {"logger": record.name, "file": record.pathname, "line": record.lineno}
            )
            text = self.format(_record(logging.ERROR, fault, error))
        return text.encode("utf-8", "backslashreplace") + b"\n"

    def _write(self, line: bytes) -> None:
        if self._lost:
            line = self._loss() + line
        try:
            written = self._try(line)
        except BlockingIOError:
            written = 0
        except OSError:
            # A full disk, or nobody there who could ever read it.
            self._lost += 1
            return
        self._lost = 0
        if written < len(line):
            self._wait(line[written:])

    def _wait(self, line: bytes) -> None:
        if self._writer is None:
            # Now, and not before: a thread does not outlive a fork.
            try:
                self._writer = start_thread(self._write_waiting, "log")
            except OSError:
                self._lost += 1  # the system has no thread to give
                return
        self._waiting.append(line)
        self._octets += len(line)
        self._changed.notify_all()

    def _write_waiting(self) -> None:
        """The thread."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting)
                line = self._waiting[0]
            whole = _write_all(self.fd, line)
            with self._changed:
                self._octets -= len(self._waiting.popleft())
                if not whole:
                    self._lost += 1
                elif self._lost and not self._waiting:
                    self._wait(self._loss())
                    self._lost = 0
                self._changed.notify_all()

    def _loss(self) -> bytes:
        return self._line(_record(logging.WARNING, LogMessage("log lines lost", {"count": self._lost})))

    def _forked(self) -> None:
        """What waits is the parent's to write, and so is the thread."""
        self._waiting.clear()
        self._octets = self._lost = 0
        self._writer = None
        self._changed = threading.Condition(self.lock)


def _record(level: int, event: LogMessage, error: BaseException | None = None) -> logging.LogRecord:
    info = (type(error), error, error.__traceback__) if error else None
    return logging.LogRecord("fumi.logs", level, "", 0, event, (), info)


def _without_waiting(fd: int) -> Callable[[bytes], int]:
    """What writes as much as there is room for, and raises BlockingIOError where there is none.

    O_NONBLOCK on the descriptor itself would be there for all who share it: the shell, the other program in a pipeline.
    """
    mode = os.fstat(fd).st_mode
    if stat.S_ISREG(mode):
        return partial(os.write, fd)  # never full for long
    if stat.S_ISSOCK(mode):
        sock = socket.socket(fileno=os.dup(fd))
        return lambda line: sock.send(line, socket.MSG_DONTWAIT)
    try:
        own = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError:
        # Another user's pipe, or no /proc. Each line goes by the thread.
        return lambda line: 0
    return partial(os.write, own)


def _write_all(fd: int, line: bytes) -> bool:
    """Wait for room; whether it was written."""
    room = select.poll()
    room.register(fd, select.POLLOUT)
    while line:
        try:
            line = line[os.write(fd, line) :]
        except BlockingIOError:
            room.poll()  # somebody who shares the descriptor has made it so
        except OSError:
            return False
    return True


def _stamp(record: logging.LogRecord) -> str:
    return f"{_second(int(record.created))}.{int(record.msecs):03d}Z"


@lru_cache(2)
def _second(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))


class TextFormatter(logging.Formatter):
    """``2026-01-31T12:00:00.123Z INFO fumi.core session ended id=… client_ip=…``; a traceback follows on lines of its own."""

    def format(self, record: logging.LogRecord) -> str:
        words = [_stamp(record), record.levelname, record.name, _one_line(record.getMessage())]
        if record.exc_info:
            words.append("\n" + self.formatException(record.exc_info))
        return " ".join(words)


class JSONFormatter(logging.Formatter):
    """One JSON object a line: ``time level logger event``, the fields, and ``traceback`` where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {"time": _stamp(record), "level": record.levelname.lower(), "logger": record.name}
        if isinstance(record.msg, LogMessage):
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
