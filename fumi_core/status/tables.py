"""Tables and plots of the page: their facts, for /status.json, and how the page shows them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from xml.etree.ElementTree import Element

from fumi_core.status import wording
from fumi_core.status.history import SPAN, Figures, Point, Series
from fumi_core.status.markup import Content, element
from fumi_core.status.plot import MARKS, axis_maximum, plot

MINUTES = round(SPAN / 60)
"""Minutes that the plots show."""

Row = Mapping[str, Any]
"""The facts of one row, as JSON has them."""
Cell = Content | Sequence[Content]


class Column(NamedTuple):
    """A column's head, and what it shows of a row: text, or a number, which stands on the right.

    ``long``: where each row is a block of its own, this has a line of its own.
    """

    head: str
    show: Callable[[Row], Cell]
    number: bool = False
    long: bool = False


def number(head: str, name: str, form: Callable[[float], str] = wording.count) -> Column:
    """A column of the numbers of this name; a dash where there is none."""
    return Column(head, lambda row: wording.NOTHING if row[name] is None else form(row[name]), number=True)


def text(head: str, name: str, long: bool = False) -> Column:
    """A column of the texts of this name; a dash where there is none."""
    return Column(head, lambda row: wording.NOTHING if row[name] in (None, "") else str(row[name]), long=long)


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table. ``name`` is its name in /status.json, where it has ``rows``.

    ``columns`` begin with that of the row's name. Rows for which ``folded`` is true are not shown, but named below the table,
    after ``folded_as``.
    With ``blocks`` a narrow screen shows each row as a block of its own. ``urgent``: a narrow screen shows it before the plots.
    """

    name: str
    title: str
    columns: Sequence[Column]
    rows: Sequence[Row]
    folded: Callable[[Row], bool] | None = None
    folded_as: str = "0"
    note: str | None = None
    blocks: bool = False
    urgent: bool = False

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to show: no rows, or folded ones only."""
        return all(self.folded is not None and self.folded(row) for row in self.rows)

    def element(self) -> Element:
        hidden = [row for row in self.rows if self.folded is not None and self.folded(row)]
        shown = [row for row in self.rows if row not in hidden]
        parts: list[Content] = [element("h2", self.title)]
        if shown:
            head = element("tr", [element("th", each.head, scope="col", class_=_kind(each)) for each in self.columns])
            lines = [element("tr", [self._cell(row, column) for column in self.columns]) for row in shown]
            parts.append(
                element("table", element("thead", head), element("tbody", lines), class_="blocks" if self.blocks else None)
            )
        if hidden and shown:
            names = ", ".join(_text(self.columns[0].show(row)) for row in hidden)
            parts.append(element("p", f"{self.folded_as}: {names}"))
        if self.is_empty:
            parts.append(element("p", "None yet."))
        if self.note is not None:
            parts.append(element("p", self.note))
        return element("article", parts, class_=f"{self.name} urgent" if self.urgent else self.name)

    def _cell(self, row: Row, column: Column) -> Element:
        content = column.show(row)
        if column is self.columns[0]:
            return element("th", content, scope="row")
        return element("td", content, data_head=column.head, class_=_kind(column))


def _kind(column: Column) -> str | None:
    return "number" if column.number else "long" if column.long else None


def _text(content: Cell) -> str:
    if isinstance(content, str):
        return content
    return "".join(content.itertext()) if isinstance(content, Element) else "".join(map(_text, content))


def shares(name: str, title: str, head: str, counts: Mapping[str, float]) -> Table:
    """Counts since the start, with their shares as bars; those that are 0 are folded."""
    whole = sum(counts.values())
    columns = (
        Column(head, lambda row: row["name"].replace("_", " ")),
        Column("", lambda row: _bar(row["total"], whole)),
        number("Total", "total"),
        Column("Share", lambda row: wording.share(row["total"], whole), number=True),
    )
    rows = [{"name": each, "total": int(count)} for each, count in counts.items()]
    return Table(name=name, title=title, columns=columns, rows=rows, folded=lambda row: not row["total"])


def nothing_yet(tables: Iterable[Table]) -> Element:
    """The names of tables that have nothing to show, as one card."""
    return element("article", element("h2", "None yet"), element("p", ", ".join(each.title for each in tables)))


def quantiles(figures: Figures, kinds: Iterable[tuple[str, Series]]) -> Table:
    """Quantiles of durations since the start, estimated from the buckets of histograms; ``kinds`` are their names and these."""
    rows = [
        {"name": name, **{head: figures.quantile(share, histogram) for head, share in _QUANTILES.items()}}
        for name, histogram in kinds
    ]
    columns = (text("Duration", "name"), *(number(head, head, wording.seconds) for head in _QUANTILES))
    return Table(
        name="durations", title="Durations", columns=columns, rows=rows,
        folded=lambda row: row["p50"] is None, folded_as="None yet",
    )  # fmt: skip


_QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}


def _bar(count: float, whole: float) -> Element:
    width = round(100 * count / whole, 1) if whole else 0
    bar = element("rect", width=width, height=8)
    return element("svg", bar, viewBox="0 0 100 8", preserveAspectRatio="none", aria_hidden="true", class_="bar")


@dataclass(frozen=True)
class Tile:
    """A plot with its title, the value ``now``, and lines by their names; ``unit`` formats their values."""

    name: str
    title: str
    now: str
    unit: Callable[[float], str]
    lines: Mapping[str, Sequence[Point]]

    def element(self) -> Element:
        values = list(self.lines.values())
        most = max((point.value for line in values for point in line), default=0.0)
        keys = [element("span", name, class_=f"key n{number}") for number, name in enumerate(self.lines)]
        label = f"{self.title}: {self.now}, maximum {self.unit(most)} in the last {MINUTES} minutes"
        return element(
            "figure",
            element("figcaption", element("span", self.title), element("b", self.now)),
            element(
                "p", element("span", f"max {self.unit(most)}"), element("span", keys if len(keys) > 1 else ()), class_="axis"
            ),
            element("div", plot(values, SPAN, axis_maximum(values, 1.0), label), class_="frame"),
            element("p", [element("span", each) for each in _MARKS], class_="marks", aria_hidden="true"),
        )

    def facts(self) -> Row:
        """For /status.json: each line as pairs of an age in seconds and a value."""
        lines = {name: [[round(each.ago, 1), round(each.value, 6)] for each in line] for name, line in self.lines.items()}
        return {"title": self.title, "now": self.now, "lines": lines}


_MARKS = [*(f"-{MINUTES * (MARKS - at) / MARKS:g} min" for at in range(MARKS)), "now"]
