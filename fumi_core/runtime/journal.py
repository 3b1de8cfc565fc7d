"""The last events of a process, for its status page: errors, warnings, rejections, reloads, restarts.

They are lines of the log, in memory, so they include only what ``--log-level`` allows. Equal events in quick succession are one,
with a count, so a flood of rejections does not displace the others. Workers report theirs, and ``merged`` makes one list of all.

A text of the log may come from a client or an app, so it may be long or unreadable: each is cut to MAX_TEXT characters.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from fumi_core.runtime.logs import LogMessage

MAX_EVENTS = 50
"""Events that are kept."""
MAX_TEXT = 500
"""Characters that are kept of an event's text, and of each of its fields."""
FOLD_SECONDS = 60.0
"""Equal events are one if no more than this many seconds lie between them."""
CLIENT_FIELDS = frozenset(("client_ip", "client_port", "last_client_ip", "from", "to", "user", "path"))
"""Fields that may identify a client or its user; the path of a mailbox does."""
HIDDEN = "\N{HORIZONTAL ELLIPSIS}"
"""Stands for what was left out of a text."""

_ALSO = frozenset((
    "starting", "stopping", "draining", "reloaded", "rejected", "rejected, more suppressed", "backend up", "Dovecot available",
    "certificate loaded", "certificate removed",
))  # fmt: skip
"""Events that are kept although they are neither errors nor warnings. None of them is logged for each connection."""
_SENTENCES = frozenset(("error", "reply"))
"""Fields that may quote another server, which knows the client."""
_MAIL_ADDRESS = re.compile(r"""[^\s<>()[\]",:;@]+@(?:\[[^\s\]]*\]|[^\s<>()[\]",:;@]+)""")
_PASSING = CLIENT_FIELDS | {"id", "count", "pid", "seconds", "pause", "connections"}
"""Fields in which equal events may differ."""


class Event(NamedTuple):
    """One event, or several equal ones, with the fields of the last. Times are in seconds since 1970."""

    first: float
    last: float
    level: str
    text: str
    fields: Mapping[str, str]
    times: int

    @property
    def key(self) -> tuple[str, str, frozenset[tuple[str, str]]]:
        """What equal events have in common."""
        return self.level, self.text, frozenset(each for each in self.fields.items() if each[0] not in _PASSING)

    def and_(self, other: Event) -> Event:
        """Both as one; they must be equal."""
        latest = max(self, other, key=lambda each: each.last)
        return latest._replace(first=min(self.first, other.first), times=self.times + other.times)

    def without_client(self) -> Event:
        """The same event, without CLIENT_FIELDS, and without the client's address and mail addresses in texts."""
        client = self.fields.get("client_ip", "")
        fields = {
            name: _without(value, client) if name in _SENTENCES else value
            for name, value in self.fields.items()
            if name not in CLIENT_FIELDS
        }
        return self._replace(text=_without(self.text, client), fields=fields)


class Journal(logging.Handler):
    """Keeps the last events of the loggers to which it is added."""

    def __init__(self) -> None:
        super().__init__()
        self._events: list[Event] = []
        self.changes = 0
        """How often an event was added."""
        self.kept = False
        """Whether events are kept; without a status page they are not read."""

    def handle(self, record: logging.LogRecord) -> bool:
        # Called for each line of the log: most of them end here.
        message = record.msg
        if record.levelno >= logging.WARNING or (type(message) is LogMessage and message.words in _ALSO):
            self._add_locked(_event(record))
        return True

    def note(self, text: str, **fields: object) -> None:
        """Add an event that the log has in another line."""
        if self.kept:
            now = time.time()
            self._add_locked(Event(now, now, "info", text, {name: _cut(value) for name, value in fields.items()}, 1))

    def _add_locked(self, new: Event) -> None:
        self.acquire()
        try:
            self._add(new)
        finally:
            self.release()

    def _add(self, new: Event) -> None:
        for number in range(len(self._events) - 1, -1, -1):
            known = self._events[number]
            if new.last - known.last > FOLD_SECONDS:
                break
            if known.key == new.key:
                new = self._events.pop(number).and_(new)
                break
        self._events = [*self._events, new][-MAX_EVENTS:]
        self.changes += 1

    @property
    def events(self) -> list[Event]:
        """The events, the last one last. May be read in any thread."""
        return self._events

    def forget(self) -> None:
        """Forget all events, in a process that was forked: they are the parent's."""
        self._events = []


journal = Journal()
"""The journal of this process."""

_LOGGERS = ("fumi", "asyncio")


def begin() -> None:
    """Keep the events that are logged from now on."""
    journal.kept = True
    for name in _LOGGERS:
        logging.getLogger(name).addHandler(journal)


def end() -> None:
    """Keep no more events."""
    journal.kept = False
    for name in _LOGGERS:
        logging.getLogger(name).removeHandler(journal)


def merged(journals: Iterable[Iterable[Event]]) -> list[Event]:
    """The last events of several journals, the last one last; an event that several processes have logged is one."""
    found: list[Event] = []
    latest: dict[object, int] = {}
    for each in sorted((each for events in journals for each in events), key=lambda each: each.last):
        at = latest.get(each.key)
        if at is not None and each.first - found[at].last <= FOLD_SECONDS:
            found[at] = found[at].and_(each)
        else:
            latest[each.key] = len(found)
            found.append(each)
    return sorted(found, key=lambda each: each.last)[-MAX_EVENTS:]


def _event(record: logging.LogRecord) -> Event:
    text, fields = _texts(record)
    if record.exc_info and record.exc_info[0] is not None:
        # The traceback is in the log. The exception's text may contain anything, also about clients.
        fields["exception"] = record.exc_info[0].__name__
    count = int(fields.pop("count", "1")) if fields.get("count", "1").isdecimal() else 1
    return Event(record.created, record.created, record.levelname.lower(), text, fields, count)


def _texts(record: logging.LogRecord) -> tuple[str, dict[str, str]]:
    """The text and the fields of a line. Of several lines, as asyncio's, the first: the others have objects and exceptions."""
    message = record.msg
    try:
        if isinstance(message, LogMessage):
            return _cut(message.words), {name: _cut(value) for name, value in message.fields.items()}
        return _cut(record.getMessage().partition("\n")[0]), {}
    except Exception:
        # A line of an app, with a wrong argument for example. The log says more, and the app must not fail here.
        return "cannot format a log line", {"logger": record.name}


def _cut(value: object) -> str:
    text = str(value)
    return text if len(text) <= MAX_TEXT else text[:MAX_TEXT] + HIDDEN


def _without(text: str, client: str) -> str:
    """A text without mail addresses and the address of this client, which is ``unix`` on a Unix socket."""
    if "." in client or ":" in client:
        text = text.replace(client, HIDDEN)
    return _MAIL_ADDRESS.sub(HIDDEN, text)
