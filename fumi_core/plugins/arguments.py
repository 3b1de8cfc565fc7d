"""Checks the arguments of a plugin when it is created. Each error is a ValueError that says what to write."""

from __future__ import annotations

import math
from collections.abc import Iterable

from fumi_core.runtime.addresses import Networks
from fumi_core.smtp import option_values
from fumi_core.smtp.domains import canonical


def networks(plugin: str, given: Iterable[str]) -> Networks:
    """Return these addresses, CIDR blocks and ``unix``."""
    return Networks(strings(plugin, given, "192.0.2.0/24"))


def domains(plugin: str, given: Iterable[str]) -> frozenset[str]:
    """Return these mail domains, in the form that ``session.domain_of()`` returns."""
    found = strings(plugin, given, "example.org")
    for text in found:
        if not text or "@" in text or text.startswith(".") or not text.isprintable() or " " in text:
            raise ValueError(f"{plugin}: {text!r} is not a domain: write what follows the @, as in 'example.org'")
    return frozenset(map(canonical, found))


def whole(plugin: str, name: str, given: int, least: int) -> int:
    """Return a whole number of at least ``least``."""
    if type(given) is not int or given < least:
        raise ValueError(f"{plugin}: {name} is a whole number of at least {least}, not {given!r}")
    return given


def positive(plugin: str, name: str, given: float) -> float:
    """Return a finite number above 0."""
    if isinstance(given, bool) or not isinstance(given, int | float) or not math.isfinite(given) or given <= 0:
        raise ValueError(f"{plugin}: {name} is a number above 0, not {given!r}")
    return given


def strings(plugin: str, given: Iterable[str], example: str) -> tuple[str, ...]:
    """Return several strings. A single string is an error."""
    found = option_values.strings(given)
    if found is None:
        raise ValueError(f"{plugin} takes a list of strings, not {given!r}: write {plugin}([{example!r}])")
    return found
