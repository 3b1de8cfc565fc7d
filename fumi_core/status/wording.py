"""Formats numbers for people, with up to three digits and a unit that fits the size."""

from __future__ import annotations

import time
from collections.abc import Sequence

NOTHING = "\N{EN DASH}"
"""Shown in place of a missing number."""


def count(value: float) -> str:
    return f"{value:,.0f}"


def rate(value: float) -> str:
    """A rate per second; below 10 with two digits, because a third would be more precise than the measurement."""
    return f"{value:.2g}/s" if value < 10 else f"{_three(value)}/s"


def size(value: float) -> str:
    """A number of bytes, in decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:,.0f} TB"


def seconds(value: float) -> str:
    """A short time, such as a response time, in one unit."""
    if value < 0.0009995:
        return f"{value * 1e6:.0f} µs"
    if value < 0.9995:
        return f"{_three(value * 1e3)} ms"
    return f"{_three(value)} s" if value < 60 else duration(value)


def duration(value: float) -> str:
    """A long time, such as an uptime, in its two largest units."""
    left = int(value)
    parts: list[str] = []
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        if left >= length or (length == 1 and not parts):
            parts.append(f"{left // length} {unit}")
            left %= length
        elif parts:
            break
    return " ".join(parts[:2])


def days(value: int) -> str:
    return "1 day" if value == 1 else f"{value:,} days"


def share(part: float, whole: float) -> str:
    if not whole:
        return NOTHING
    percent = 100 * part / whole
    return f"{percent:.0f} %" if percent in (0, 100) or percent >= 10 else f"{percent:.1f} %"


def moment(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(at))


def clock(at: float, now: float) -> str:
    """The time of day within the last day, otherwise with the date; UTC."""
    form = "%H:%M:%S" if now - at < 86400 else "%Y-%m-%d %H:%M:%S"
    return time.strftime(form, time.gmtime(at))


def counted(number: int, one: str, many: str | None = None) -> str:
    """A number of things: ``1 worker``, ``2 workers``."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def listed(things: Sequence[str], most: int) -> str:
    """The first ``most`` things, and how many more there are."""
    more = len(things) - most
    return ", ".join([*things[:most], f"and {more:,} more"]) if more > 0 else ", ".join(things)


def date(at: float) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(at))


def _three(value: float) -> str:
    return f"{value:.3g}" if value < 999.5 else f"{value:,.0f}"
