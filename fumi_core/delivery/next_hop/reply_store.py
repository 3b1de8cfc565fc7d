"""The next hop's replies to recipients of messages that are not settled yet, in a database that all workers share.

In each process one thread does the work: it takes the waiting jobs, runs them in one transaction, and reports their results after
the commit. A reported result is on disk (``synchronous=FULL``). A database that is broken, full or another program's leads to an
``OSError`` for the caller; the next job tries again.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from fumi_core.runtime.daemon_thread import settle, start_thread

T = TypeVar("T")

KEEP_SECONDS = 5 * 86400
"""Seconds for which a reply is kept: as long as clients retry (RFC 5321 §4.5.4.1)."""
MAX_REPLIES = 100_000
"""Replies kept at most; beyond that the oldest are deleted."""
BUSY_TIMEOUT = 5.0
"""Seconds to wait for another worker's transaction."""
CLOSE_TIMEOUT = 2.0
"""Seconds to wait for the disk when the program ends."""

_APPLICATION = 0x46756D69
_VERSION = 1
_COLUMNS = "recipient, digest, attempt, code, text"
_MARKS = ("application_id", "user_version")
_SCHEMA = f"""
CREATE TABLE IF NOT EXISTS answers (
    sender TEXT NOT NULL, recipient TEXT NOT NULL, digest BLOB NOT NULL, attempt BLOB NOT NULL,
    code INTEGER NOT NULL, text TEXT NOT NULL, time REAL NOT NULL,
    PRIMARY KEY (sender, recipient, digest)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS answers_by_time ON answers (time);
PRAGMA application_id = {_APPLICATION};
PRAGMA user_version = {_VERSION};
"""


class Remembered(NamedTuple):
    """One reply: ``code`` and ``text`` that the next hop sent for ``recipient`` of the message with this ``digest``.

    ``attempt`` identifies a message before its content is known, and is the same when the client sends it again.
    """

    recipient: str
    digest: bytes
    attempt: bytes
    code: int
    text: str


class _Task(NamedTuple):
    job: Callable[[sqlite3.Connection], Any]
    writes: bool
    future: asyncio.Future[Any]


class ReplyStore:
    """The database in ``directory``."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "answers.sqlite3"
        self._tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._until_count = 0

    def prepare(self) -> None:
        """Create the directory and the database if they do not exist. Raises OSError when they cannot be used."""
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _as_os_error(), contextlib.closing(self._open()) as connection:
            connection.execute("DELETE FROM answers WHERE time < ?", [time.time() - KEEP_SECONDS])

    def startup_problem(self) -> str | None:
        """Why an existing database cannot be used; None if it can, or does not exist."""
        try:
            if self.path.exists():
                with _as_os_error():
                    self._open().close()
        except OSError as error:
            return str(error)
        return None

    def close(self) -> None:
        """Wait, for at most CLOSE_TIMEOUT seconds, until the thread has finished its jobs."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._tasks.put(None)
            thread.join(CLOSE_TIMEOUT)

    def _submit(self, job: Callable[[sqlite3.Connection], T], writes: bool) -> asyncio.Future[T]:
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        try:
            self._thread = self._thread or start_thread(self._work, "replies")
        except OSError as error:
            future.set_exception(error)
        else:
            self._tasks.put(_Task(job, writes, future))
        return future

    # Jobs; each future gets the result after the commit, or an OSError

    def of_recipient(self, sender: str, recipient: str) -> asyncio.Future[tuple[list[Remembered], bool]]:
        """The replies to this recipient of mail from ``sender``; and whether the store holds no reply at all."""
        select = _selection("sender = ? AND recipient = ?", sender, recipient)

        def job(connection: sqlite3.Connection) -> tuple[list[Remembered], bool]:
            found = select(connection)
            return found, not found and connection.execute("SELECT 1 FROM answers LIMIT 1").fetchone() is None

        return self._submit(job, False)

    def of_message(self, sender: str, digest: bytes) -> asyncio.Future[list[Remembered]]:
        """The replies to recipients of this message."""
        return self._submit(_selection("sender = ? AND digest = ?", sender, digest), False)

    def record(self, sender: str, replies: Iterable[Remembered]) -> asyncio.Future[None]:
        """Store these replies, in place of earlier ones to the same recipients of the same message."""
        rows = list(replies)

        def job(connection: sqlite3.Connection) -> None:
            now = time.time()
            connection.executemany(
                f"INSERT OR REPLACE INTO answers ({_COLUMNS}, sender, time) VALUES (?, ?, ?, ?, ?, ?, ?)",
                [(*row, sender, now) for row in rows],
            )
            connection.execute("DELETE FROM answers WHERE time < ?", [now - KEEP_SECONDS])
            self._bound(connection, len(rows))

        return self._submit(job, True)

    def forget(self, sender: str, digest: bytes, recipients: Iterable[str]) -> asyncio.Future[None]:
        keys = [(sender, digest, each) for each in recipients]

        def job(connection: sqlite3.Connection) -> None:
            connection.executemany("DELETE FROM answers WHERE sender = ? AND digest = ? AND recipient = ?", keys)

        return self._submit(job, True)

    def _bound(self, connection: sqlite3.Connection, added: int) -> None:
        """Delete the oldest replies if there are too many.

        Counting is slow, so it is done only after enough additions that there may be too many.
        """
        self._until_count -= added
        if self._until_count > 0:
            return
        count = connection.execute("SELECT count(*) FROM answers").fetchone()[0]
        if count > MAX_REPLIES:
            oldest = "SELECT time FROM answers ORDER BY time LIMIT 1 OFFSET ?"
            connection.execute(f"DELETE FROM answers WHERE time <= ({oldest})", [count - MAX_REPLIES - 1])
        self._until_count = max(1, (MAX_REPLIES - count) // 2)

    # In the thread

    def _work(self) -> None:
        connection: sqlite3.Connection | None = None
        ending = False
        while not ending:
            taken = [self._tasks.get()]
            with contextlib.suppress(queue.Empty):
                while True:
                    taken.append(self._tasks.get_nowait())
            ending = None in taken
            connection = self._run([each for each in taken if each is not None], connection)
        _close(connection)

    def _run(self, tasks: list[_Task], connection: sqlite3.Connection | None) -> sqlite3.Connection | None:
        """Returns the connection for the next run; None after a failure."""
        failure: OSError | None = None
        results: list[Any] = [None] * len(tasks)
        try:
            with _as_os_error():
                connection = connection or self._open()
                connection.execute("BEGIN IMMEDIATE" if any(task.writes for task in tasks) else "BEGIN")
                results = [task.job(connection) for task in tasks]
                connection.execute("COMMIT")
        except OSError as error:
            failure = error
            _close(connection)
            connection = None
        for task, result in zip(tasks, results, strict=True):
            settle(task.future, failure or result)
        return connection

    def _open(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, timeout=BUSY_TIMEOUT, isolation_level=None, check_same_thread=False)
        try:
            application, version = (connection.execute(f"PRAGMA {each}").fetchone()[0] for each in _MARKS)
            tables = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]
            if (application, version) != (_APPLICATION, _VERSION):
                if tables or application:
                    raise OSError(f"{self.path} is another program's, or another version's, database")
                connection.executescript(f"PRAGMA journal_mode = WAL; {_SCHEMA}")
            connection.execute("PRAGMA synchronous = FULL")
        except BaseException:
            connection.close()
            raise
        return connection


def _selection(condition: str, *values: object) -> Callable[[sqlite3.Connection], list[Remembered]]:
    def job(connection: sqlite3.Connection) -> list[Remembered]:
        since = time.time() - KEEP_SECONDS
        found = connection.execute(f"SELECT {_COLUMNS} FROM answers WHERE {condition} AND time >= ?", [*values, since])
        return [Remembered(*row) for row in found]

    return job


@contextlib.contextmanager
def _as_os_error() -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise OSError(str(error)) from error


def _close(connection: sqlite3.Connection | None) -> None:
    if connection is not None:
        with contextlib.suppress(sqlite3.Error):  # the connection is useless now, whatever the error is
            connection.close()
