"""Logs for people and for machines: one line per event on stderr, as text or JSON, with named fields.

A field's value may come from a client, so text quotes unusual characters and JSON escapes them: clients cannot forge log lines.

The reader of stderr may stop reading: a pipe that is not read, a journal on a disk that hangs. Mail goes on then; lines for
which there is no room are dropped and counted.
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
MAX_QUEUED_BYTES = 1 << 20
"""Bytes of lines that may be queued while stderr is full."""
FLUSH_TIMEOUT = 1.0
"""Seconds to write queued lines at exit; less than a master gives its workers to end at once."""
_PLAIN = re.compile(r"[!#-~]+")
_PLAIN_LINES = re.compile(r"[!#-~]+(?:\n[!#-~]+)*")


class LogMessage:
    """A record's message: its text and its named fields. As a string it has both, for formatters that ignore fields."""

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
    """Log one event with its fields; a field that is None is left out. Never raises, whatever logger an app supplies."""
    try:
        if logger.isEnabledFor(level):
            # The same as log(), without the search for its caller, which no line shows: 2 µs less a line (Python 3.11.7).
            logger.handle(logger.makeRecord(logger.name, level, "", 0, LogMessage(message, fields), (), None))
    except Exception as unusable:
        _cannot_log(message, unusable)


def failure(logger: logging.Logger, message: str, error: BaseException, /, **fields: object) -> None:
    """Log an error with its traceback and its fields. Never raises."""
    try:
        logger.error(LogMessage(message, fields), exc_info=error)
    except Exception as unusable:
        _cannot_log(message, unusable)


def _cannot_log(message: str, error: Exception) -> None:
    """Report the failure of a filter or handler that an app has added to a logger, by the stderr handler alone."""
    handler = next(
        (each for each in logging.getLogger().handlers if isinstance(each, NonBlockingStreamHandler)), logging.lastResort
    )
    if handler is not None:
        handler.handle(_record(logging.ERROR, LogMessage("cannot log", {"message": message}), error))


def configure(form: str, level: str) -> None:
    """Send every logger's records to stderr as ``text`` or ``json``, from ``level`` up."""
    root = logging.getLogger()
    # Lines may be queued in the present handler.
    handler = next(
        (each for each in root.handlers if isinstance(each, NonBlockingStreamHandler)), None
    ) or NonBlockingStreamHandler(STDERR)
    handler.setFormatter(JSONFormatter() if form == "json" else TextFormatter())
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    # At debug asyncio reports which selector it uses, in every process.
    logging.getLogger("asyncio").setLevel(max(root.level, logging.WARNING))
    # These are looked up for every record and never shown.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False


class NonBlockingStreamHandler(logging.Handler):
    """Writes lines to a descriptor, in order, and never waits for room.

    The thread that logs a line also writes it, if there is room: handing each line to another thread costs more. When the
    descriptor is full, that line and all later ones are queued, and a background thread writes them as room appears. Once more
    than MAX_QUEUED_BYTES are queued, new lines are dropped until the queue is empty; then one line reports the number.

    It replaces ``logging.StreamHandler``, which waits for room with the event loop, and ``QueueHandler`` with ``QueueListener``,
    whose queue is not bounded in bytes. It is not here for its speed: a line costs 8 µs with it, 12 µs with either of theirs; in
    the row edge-handshake of ``ops/bench``, with a line a connection, its CPU is 1.02 (0.96 … 1.20) of StreamHandler's (7 rounds
    on a busy machine, Python 3.11.7). Delete it when the standard library has a handler that never blocks. No private names are
    used.
    """

    def __init__(self, fd: int) -> None:
        super().__init__()
        self.fd = fd
        self._write_some = _without_blocking(fd)
        self._queued: deque[bytes] = deque()  # the line that the thread is writing is first
        self._queued_bytes = 0
        self._lost = 0
        self._writer: threading.Thread | None = None
        self._changed = threading.Condition(self.lock)
        os.register_at_fork(after_in_child=self._forked)

    def emit(self, record: logging.LogRecord) -> None:
        """Called with the lock held."""
        line = self._line(record)
        if not self._queued:
            self._write(line)
        elif self._lost or self._queued_bytes + len(line) > MAX_QUEUED_BYTES:
            self._lost += 1
        else:
            self._queue(line)

    def flush(self) -> None:
        """Wait a moment for queued lines to be written; called at exit."""
        with self._changed:
            self._changed.wait_for(lambda: not self._queued, FLUSH_TIMEOUT)

    def _line(self, record: logging.LogRecord) -> bytes:
        try:
            text = self.format(record)
        except Exception as error:
            # logging's default would print the error to stderr, and wait until it can.
            fault = LogMessage(
                "cannot format a log line", {"logger": record.name, "file": record.pathname, "line": record.lineno}
            )
            text = self.format(_record(logging.ERROR, fault, error))
        return text.encode("utf-8", "backslashreplace") + b"\n"

    def _write(self, line: bytes) -> None:
        if self._lost:
            line = self._loss() + line
        try:
            written = self._write_some(line)
        except BlockingIOError:
            written = 0
        except OSError:
            # A full disk, or a pipe without a reader.
            self._lost += 1
            return
        self._lost = 0
        if written < len(line):
            self._queue(line[written:])

    def _queue(self, line: bytes) -> None:
        if self._writer is None:
            # Started only now: a thread does not survive a fork.
            try:
                self._writer = start_thread(self._write_queued, "log")
            except OSError:
                self._lost += 1  # the system has no more threads
                return
        self._queued.append(line)
        self._queued_bytes += len(line)
        self._changed.notify_all()

    def _write_queued(self) -> None:
        """The background thread: write queued lines until the queue is empty."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queued)
                line = self._queued[0]
            whole = _write_all(self.fd, line)
            with self._changed:
                self._queued_bytes -= len(self._queued.popleft())
                if not whole:
                    self._lost += 1
                elif self._lost and not self._queued:
                    self._queue(self._loss())
                    self._lost = 0
                self._changed.notify_all()

    def _loss(self) -> bytes:
        return self._line(_record(logging.WARNING, LogMessage("log lines lost", {"count": self._lost})))

    def _forked(self) -> None:
        """In a forked child: queued lines, and the thread that writes them, are the parent's."""
        self._queued.clear()
        self._queued_bytes = self._lost = 0
        self._writer = None
        self._changed = threading.Condition(self.lock)


def _record(level: int, event: LogMessage, error: BaseException | None = None) -> logging.LogRecord:
    info = (type(error), error, error.__traceback__) if error else None
    return logging.LogRecord("fumi.logs", level, "", 0, event, (), info)


def _without_blocking(fd: int) -> Callable[[bytes], int]:
    """Return a function that writes as much as there is room for, and raises BlockingIOError when there is no room.

    O_NONBLOCK on the descriptor itself would affect every process that shares it: the shell, the other program in a pipeline.
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
        # Another user's pipe, or no /proc. The thread writes each line.
        return lambda line: 0
    return partial(os.write, own)


def _write_all(fd: int, line: bytes) -> bool:
    """Wait for room and write; returns whether the line was written."""
    room = select.poll()
    room.register(fd, select.POLLOUT)
    while line:
        try:
            line = line[os.write(fd, line) :]
        except BlockingIOError:
            room.poll()  # another process that shares the descriptor made it non-blocking
        except OSError:
            return False
    return True


def _stamp(record: logging.LogRecord) -> str:
    return f"{_second(int(record.created))}.{int(record.msecs):03d}Z"


@lru_cache(2)
def _second(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))


class TextFormatter(logging.Formatter):
    """``2026-01-31T12:00:00.123Z INFO fumi.core session ended id=… client_ip=…``; a traceback follows on indented lines.

    The text of an exception may come from a client, so each of these lines is escaped as fields are.
    """

    def format(self, record: logging.LogRecord) -> str:
        line = " ".join([_stamp(record), record.levelname, record.name, _one_line(record.getMessage())])
        if not record.exc_info:
            return line
        return line + "".join(f"\n  {_one_line(each)}" for each in self.formatException(record.exc_info).split("\n"))


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
