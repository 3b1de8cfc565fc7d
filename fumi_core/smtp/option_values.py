"""Checks for the values of options. A check takes an option's name and a value, and returns the value to keep.

It raises TypeError for a wrong type and ValueError for an invalid value; the error says what to write.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Collection, Iterable
from typing import TypeVar

from fumi_core.runtime.addresses import Networks

T = TypeVar("T")
Check = Callable[[str, object], T]


def boolean(option: str, given: object) -> bool:
    if not isinstance(given, bool):
        raise TypeError(f"{option} is True or False, not {given!r}")
    return given


def whole_number(least: int, most: float = math.inf) -> Check[int]:
    bounds = f"of at least {least}" if most == math.inf else f"from {least} to {most}"

    def check(option: str, given: object) -> int:
        if not isinstance(given, int) or isinstance(given, bool):
            raise TypeError(f"{option} is a whole number, not {given!r}")
        if not least <= given <= most:
            raise ValueError(f"{option} is a whole number {bounds}, not {given!r}")
        return given

    return check


def or_none(check: Check[T]) -> Check[T | None]:
    def check_unless_none(option: str, given: object) -> T | None:
        try:
            return None if given is None else check(option, given)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{error}; None means no limit") from None

    return check_unless_none


def seconds(*, zero: bool = False) -> Check[float]:
    """A finite number of seconds above 0. With ``zero``, 0 is valid, too."""
    bounds = "of at least 0" if zero else "above 0"

    def check(option: str, given: object) -> float:
        if not isinstance(given, int | float) or isinstance(given, bool):
            raise TypeError(f"{option} is a number of seconds, not {given!r}")
        if not math.isfinite(given) or given < 0 or (given == 0 and not zero):
            raise ValueError(f"{option} is a number of seconds {bounds}, not {given!r}")
        return given

    return check


def string(pattern: str, form: str) -> Check[str]:
    """A string that the whole pattern matches; ``form`` describes it in errors."""
    allowed = re.compile(pattern)

    def check(option: str, given: object) -> str:
        if not isinstance(given, str):
            raise TypeError(f"{option} is a string, not {given!r}")
        if not allowed.fullmatch(given):
            raise ValueError(f"{option} is {form}, not {given!r}")
        return given

    return check


class Choice:
    """One of several strings."""

    def __init__(self, *values: str) -> None:
        self.values = values
        self._check = string("|".join(map(re.escape, values)), " or ".join(map(repr, values)))

    def __call__(self, option: str, given: object) -> str:
        return self._check(option, given)


def strings(given: object) -> tuple[str, ...] | None:
    """The strings of an iterable, None for anything else, also for a single string: its characters are never meant."""
    if isinstance(given, Iterable) and not isinstance(given, str | bytes):
        found = tuple(given)
        if all(isinstance(each, str) for each in found):
            return found
    return None


def _strings(option: str, given: object, example: str) -> tuple[str, ...]:
    found = strings(given)
    if found is None:
        raise TypeError(f"{option} is a list of strings, not {given!r}: write [{example!r}]")
    return found


def names_of(known: Collection[str], example: str) -> Check[tuple[str, ...]]:
    """Several of the known names, in any case; they are kept in upper case, each once."""

    def check(option: str, given: object) -> tuple[str, ...]:
        names = tuple(name.upper() for name in _strings(option, given, example))
        for name in names:
            if name not in known:
                raise ValueError(f"{option}: {name!r} is not one of {', '.join(known)}")
        return tuple(dict.fromkeys(names))

    return check


def networks(option: str, given: object) -> tuple[str, ...]:
    """CIDR blocks, addresses and ``unix``."""
    found = _strings(option, given, "192.0.2.0/24")
    try:
        Networks(found)
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from None
    return found


def boolean_or_logger(option: str, given: object) -> bool | logging.Logger:
    if not isinstance(given, bool | logging.Logger):
        raise TypeError(f"{option} is True, False or a logging.Logger, not {given!r}")
    return given
