"""Small plots: lines over the last minutes, as SVG that fills the width of its container."""

from __future__ import annotations

import math
from collections.abc import Sequence
from xml.etree.ElementTree import Element

from fumi_core.status.history import INTERVAL, Point
from fumi_core.status.markup import element

WIDTH, HEIGHT = 300, 60
MARKS = 3
"""Parts into which vertical lines divide the time."""
GAP = 2.5 * INTERVAL
"""Seconds without a point after which a line is interrupted."""


def axis_maximum(lines: Sequence[Sequence[Point]], least: float) -> float:
    """The maximum of a plot's axis: the next 1, 2 or 5 times a power of ten, and at least ``least``."""
    most = max((point.value for line in lines for point in line), default=0.0)
    if most <= least:
        return least
    power = 10.0 ** math.floor(math.log10(most))
    return next(step * power for step in (1, 2, 5, 10, 20) if step * power >= most)


def plot(lines: Sequence[Sequence[Point]], span: float, top: float, label: str) -> Element:
    """The lines of the last ``span`` seconds, on a scale from 0 to ``top``; ``label`` is the text for screen readers.

    A line is interrupted after GAP seconds without points; of several, those of zeros are left out. Line N has the classes
    ``line nN``, and its area ``area nN``.
    """

    def across(point: Point) -> float:
        return round(WIDTH * (1 - point.ago / span), 1)

    def height(point: Point) -> float:
        return round(HEIGHT * (1 - min(point.value / top, 1.0)), 1)

    marks = "".join(f"M{WIDTH * at / MARKS:g} 0V{HEIGHT}" for at in range(MARKS + 1))
    drawn = [element("path", d=f"M0 {HEIGHT}H{WIDTH}{marks}", class_="base")]
    for number, line in enumerate(lines):
        if len(lines) > 1 and not any(point.value for point in line):
            continue  # it would hide the base line, and zeros of the other lines
        for run in _runs([point for point in line if point.ago <= span]):
            places = [f"{across(point)} {height(point)}" for point in run]
            ends = across(run[0]), across(run[-1])
            drawn.append(element("path", d=f"M{ends[0]} {HEIGHT}L{'L'.join(places)}V{HEIGHT}Z", class_=f"area n{number}"))
            # A run of one point is drawn as a dot: a line of length 0 with round ends.
            drawn.append(element("path", d=f"M{places[0]}L{'L'.join(places)}", class_=f"line n{number}"))
    return element(
        "svg",
        drawn,
        viewBox=f"0 -2 {WIDTH} {HEIGHT + 4}",
        preserveAspectRatio="none",
        role="img",
        aria_label=label,
        class_="plot",
    )


def _runs(points: Sequence[Point]) -> list[list[Point]]:
    """Split the points into runs without a gap."""
    runs: list[list[Point]] = []
    for point in points:
        if runs and runs[-1][-1].ago - point.ago <= GAP:
            runs[-1].append(point)
        else:
            runs.append([point])
    return runs
