"""A campaign: so many inputs for one target, each from a seed of its own; the first that fails is made small and shown."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from random import Random
from types import FrameType
from typing import TypeVar

import pytest

SEED = os.environ.get("FUZZ_SEED", "5321")
INPUTS = int(os.environ.get("FUZZ_INPUTS", "100000"))
ONLY = os.environ.get("FUZZ_ONLY", "")
HANGS_AFTER = 60.0
SHRINKING_TRIES = 3000


@dataclass(frozen=True)
class Case:
    """One input, ``cut`` deciding how it arrives; what else it takes to repeat it, a subclass adds."""

    data: bytes
    cut: int = field(repr=False)

    def check(self) -> None:
        """Raises whatever, when something is wrong."""
        raise NotImplementedError


C = TypeVar("C", bound=Case)
Make = Callable[[Random], C]


class Hangs(Exception):
    """An input took longer than any may."""


def run(name: str, percent: int, make: Make[C]) -> None:
    """Check this share of the campaign's inputs. Fails at the first that fails."""
    for number in _numbers(name, INPUTS * percent // 100):
        case = make(chance(name, number))
        try:
            with _deadline():
                case.check()
        except Exception as error:
            _report(f"{name}:{number}", case, error)


def chance(name: str, number: int) -> Random:
    """The source of an input's randomness."""
    return Random(f"{SEED}:{name}:{number}")


def _numbers(name: str, count: int) -> range:
    if not ONLY:
        return range(count)
    campaign, _, number = ONLY.partition(":")
    return range(int(number), int(number) + 1) if campaign == name else range(0)


@contextmanager
def _deadline() -> Iterator[None]:
    def ring(number: int, frame: FrameType | None) -> None:
        raise Hangs

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, HANGS_AFTER)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _report(which: str, case: Case, error: Exception) -> None:
    small = case if isinstance(error, Hangs) else shrunk(case, error)
    again = _failure(small) or error
    pytest.fail(
        f"{type(again).__name__}: {again}\n"
        f"smallest input of {len(case.data)} → {len(small.data)} octets: {small}\n"
        f"again with: FUZZ_SEED={SEED} FUZZ_ONLY={which}\n"
        f"the input itself: {case.data!r}",
        pytrace=False,
    )


def _failure(case: Case) -> Exception | None:
    try:
        case.check()
    except Exception as error:
        return error
    return None


def _kind(error: Exception | None) -> tuple[type, str]:
    """By what two failures count as the same."""
    return type(error), str(error)[:12]


def shrunk(case: C, error: Exception) -> C:
    """The smallest that fails in the same way, by leaving out ever smaller pieces."""
    tries, size, kind = SHRINKING_TRIES, len(case.data) // 2, _kind(error)
    while size and tries:
        at, smaller = 0, False
        while at < len(case.data) and tries:
            tries -= 1
            candidate = replace(case, data=case.data[:at] + case.data[at + size :])
            if _kind(_failure(candidate)) == kind:
                case, smaller = candidate, True
            else:
                at += size
        size = size if smaller and size == 1 else size // 2
    return case
