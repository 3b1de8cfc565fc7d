"""The table of certificates, the first to expire first."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any
from xml.etree.ElementTree import Element

from fumi_core.runtime.overview import Facts, Worker
from fumi_core.status import wording
from fumi_core.status.markup import element
from fumi_core.status.tables import Column, Row, Table, text
from fumi_edge.status.facts import days_left

SOON, URGENT = 14, 3
"""Days before a certificate's expiry from which it is shown as a warning and as an error; the alerts have the same.

One that is valid for less than six weeks is a warning in the last third of its time.
"""
MAX_REASONS = 3
"""Certificates that are named as reasons for the state."""
MAX_SHOWN_NAMES = 5


def reported(workers: Sequence[Worker]) -> tuple[list[Facts], int]:
    """The certificates of all workers, and how many more there are. Workers differ while they reload."""
    found: dict[tuple[Any, ...], Facts] = {}
    more = 0
    for worker in workers:
        for each in worker.facts.get("certificates", ()):
            key = each["name"], each["file"], each["not_after"], each["listeners"]
            known = found.get(key)
            # Each worker has its own time of loading: the last one counts.
            found[key] = each if known is None else max(known, each, key=lambda one: float(one["loaded"]))
        more = max(more, worker.facts.get("more_certificates", 0))
    return sorted(found.values(), key=lambda each: (not each["served"], each["not_after"])), more


def certificates_table(certificates: Sequence[Facts], more: int, now: float) -> Table:
    rows: list[Row] = [{**each, "days": days_left(each, now)} for each in certificates]
    columns = [
        text("Certificate", "name"),
        Column("Expires", lambda row: _expiry(row, now), long=True),
        Column("Names", lambda row: _names(row), long=True),
        text("File", "file", long=True),
        text("Issuer", "issuer", long=True),
        text("Key", "key_type"),
        Column("Loaded", lambda row: wording.clock(row["loaded"], now)),
    ]
    if any(each["listeners"] for each in certificates):
        columns.append(text("Listeners", "listeners", long=True))
    note = f"and {more:,} more that expire later" if more else None
    return Table(name="certificates", title="Certificates", columns=columns, rows=rows, note=note, blocks=True, urgent=True)


def _expiry(row: Row, now: float) -> list[Element | str]:
    state = "bad" if row["days"] < URGENT else "poor" if _expires_soon(row) else "good"
    left = "expired" if row["not_after"] < now else f"in {_left(row, now)}"
    unused = [] if row["served"] else [", not in use"]
    return [element("span", left, class_=state), " ", element("span", f"({wording.date(row['not_after'])})"), *unused]


def _expires_soon(row: Row) -> bool:
    third = (row["not_after"] - row["not_before"]) / 86400 / 3
    return bool(row["days"] < max(URGENT, min(SOON, third)))


def _left(row: Row, now: float) -> str:
    return wording.days(row["days"]) if row["days"] else wording.duration(row["not_after"] - now)


def _names(row: Row) -> str:
    more = row["more_names"] + max(0, len(row["names"]) - MAX_SHOWN_NAMES)
    names = ", ".join(row["names"][:MAX_SHOWN_NAMES]) or wording.NOTHING
    return f"{names} and {more:,} more" if more else names


def degraded_certificates(certificates: Iterable[Facts], now: float) -> list[str]:
    """The reasons for the state degraded: certificates in use that expire soon."""
    found: dict[str, str] = {}
    for each in certificates:
        row = {**each, "days": days_left(each, now)}
        if each["served"] and _expires_soon(row):
            left = "has expired" if each["not_after"] < now else f"expires in {_left(row, now)}"
            found.setdefault(each["name"], f"{each['name']} {left}")
    reasons = list(found.values())
    more = len(reasons) - MAX_REASONS
    return [*reasons[:MAX_REASONS], *([f"{more:,} more certificates expire soon"] if more > 0 else [])]
