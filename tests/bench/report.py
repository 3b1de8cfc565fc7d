"""What a run found: medians of the figures, ratios within each round, the table for people and JSON for machines."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from .rows import Row

COLUMNS = ("row", "", "Fumi", "peer", "", "ratio", "min … max", "target", "")
LEFT_ALIGNED = {0, 1, 3, 8}


@dataclass
class Result:
    """The figures of a row by contestant, one a round, and why a contestant has no more of them: that makes the row invalid."""

    row: Row
    figures: dict[str, list[float]]
    errors: dict[str, str] = field(default_factory=dict)

    def comparisons(self) -> list["Comparison"]:
        """One for each peer; for a row without peers, one of the figure itself."""
        ours = self.figures[self.row.ours.name]
        valid = not self.errors
        if not self.row.peers:
            return [Comparison(None, ours, [], ours, self.row.at_most, valid)]
        named = [(peer.contestant.name, peer.at_most) for peer in self.row.peers]
        return [compared(ours, peer, self.figures[peer], at_most, valid) for peer, at_most in named]


@dataclass(frozen=True)
class Comparison:
    """Fumi's figures beside a peer's; `values`, their ratios or the figures themselves, are what the target is for."""

    peer: str | None
    ours: Sequence[float]
    theirs: Sequence[float]
    values: Sequence[float]
    at_most: float | None
    valid: bool

    @property
    def met(self) -> bool | None:
        """Whether the target is reached; None without a target. What is invalid has not reached it."""
        if self.at_most is None:
            return None
        return self.valid and bool(self.values) and median(self.values) <= self.at_most

    def verdict(self) -> str:
        """`met` in a word."""
        if not self.valid:
            return "invalid"
        return {True: "met", False: "missed", None: ""}[self.met]


def compared(ours: Sequence[float], peer: str, theirs: Sequence[float], at_most: float | None, valid: bool) -> Comparison:
    """Figures compared round by round: those of one round had the same neighbours on the machine."""
    # A contestant that failed has fewer rounds than the others.
    ratios = [mine / its for mine, its in zip(ours, theirs, strict=False)]
    return Comparison(peer, ours, theirs, ratios, at_most, valid)


def table(results: Iterable[Result]) -> str:
    """All comparisons as one table, and under it what failed. A ratio is the median of the rounds' ratios."""
    results = list(results)
    lines = [COLUMNS, *(line for result in results for line in table_lines(result))]
    widths = [max(len(line[column]) for line in lines) for column in range(len(COLUMNS))]
    text = ["  ".join(aligned(line, widths)).rstrip() for line in lines]
    failures = [f"{result.row.name}: {name}: {why}" for result in results for name, why in result.errors.items()]
    return "\n".join([*text, "", *failures] if failures else text)


def aligned(line: Sequence[str], widths: Sequence[int]) -> list[str]:
    """Cells padded to the widths of their columns, words to the left and numbers to the right."""
    return [
        cell.ljust(width) if column in LEFT_ALIGNED else cell.rjust(width)
        for column, (cell, width) in enumerate(zip(line, widths, strict=True))
    ]


def table_lines(result: Result) -> list[tuple[str, ...]]:
    """The cells of one row of the benchmark: one line a comparison, the first of which names the row."""
    lines: list[tuple[str, ...]] = []
    for number, comparison in enumerate(result.comparisons()):
        lines.append(
            (
                "" if number else result.row.name,
                "" if number else result.row.unit,
                figure(comparison.ours),
                comparison.peer or "",
                figure(comparison.theirs),
                f"{median(comparison.values):.2f}" if comparison.values else "-",
                f"{min(comparison.values):.2f} … {max(comparison.values):.2f}" if comparison.values else "-",
                "" if comparison.at_most is None else f"≤ {comparison.at_most:.2f}",
                comparison.verdict(),
            )
        )
    return lines


def figure(samples: Sequence[float]) -> str:
    """The median of some figures, to four digits or so; a dash for none."""
    return f"{median(samples):.{0 if median(samples) >= 1000 else 1}f}" if samples else "-"


def as_json(results: Iterable[Result], rounds: int, versions: Mapping[str, str]) -> str:
    """The same for machines, with every round's figures."""
    machine = {"cpus": os.cpu_count(), "kernel": os.uname().release, "versions": dict(versions)}
    return json.dumps({"rounds": rounds, "machine": machine, "rows": [row_as_dict(result) for result in results]}, indent=2)


def row_as_dict(result: Result) -> dict[str, object]:
    """One row of the JSON: figures by contestant, and the comparisons."""
    return {
        "row": result.row.name,
        "work": result.row.work,
        "unit": result.row.unit,
        "valid": not result.errors,
        "errors": result.errors,
        "figures": {name: figures_as_dict(samples) for name, samples in result.figures.items()},
        "comparisons": [comparison_as_dict(comparison) for comparison in result.comparisons()],
    }


def figures_as_dict(samples: Sequence[float]) -> dict[str, object]:
    """A contestant's figures, one a round, and their median."""
    return {"median": median(samples) if samples else None, "rounds": samples}


def comparison_as_dict(comparison: Comparison) -> dict[str, object]:
    """One comparison of the JSON. Without a peer, the ratio is the figure itself."""
    values = comparison.values
    return {
        "peer": comparison.peer,
        "ratio": median(values) if values else None,
        "min": min(values, default=None),
        "max": max(values, default=None),
        "at_most": comparison.at_most,
        "met": comparison.met,
    }


def write_json(file: Path, results: Iterable[Result], rounds: int, versions: Mapping[str, str]) -> None:
    """`as_json` into a file."""
    file.write_text(as_json(results, rounds, versions) + "\n")
