"""The last events, as a table: the latest first."""

from __future__ import annotations

from collections.abc import Sequence

from fumi_core.runtime.journal import MAX_EVENTS, Event
from fumi_core.status import wording
from fumi_core.status.markup import element
from fumi_core.status.tables import Column, Row, Table, text

_CLASSES = {"warning": "poor", "error": "bad", "critical": "bad"}


def events_table(events: Sequence[Event], now: float, *, clients: bool) -> Table:
    """With ``clients``, the fields that identify clients are in it, too."""
    shown = [each if clients else each.without_client() for each in reversed(events)]
    rows: list[Row] = [
        {
            "time": each.last,
            "first": each.first,
            "level": each.level,
            "event": each.text,
            "times": each.times,
            "fields": dict(each.fields),
        }
        for each in shown
    ]
    columns = (
        Column("Time (UTC)", lambda row: wording.clock(row["time"], now)),
        Column("Level", lambda row: element("span", row["level"], class_=_CLASSES.get(row["level"]))),
        text("Event", "event"),
        Column("Times", lambda row: _times(row, now), long=True),
        Column("Details", _details, long=True),
    )
    title = f"Last {MAX_EVENTS} events: errors, rejections, reloads, restarts"
    return Table(name="events", title=title, columns=columns, rows=rows, blocks=True)


def _times(row: Row, now: float) -> str:
    return "" if row["times"] == 1 else f"{wording.count(row['times'])} since {wording.clock(row['first'], now)}"


def _details(row: Row) -> str:
    return ", ".join(f"{name} {value}" for name, value in row["fields"].items())
