"""Whether the delivery targets work, for ``/readyz`` and the status page, which have an answer in time whatever a target does."""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Iterable, Mapping

from fumi_core.delivery import DeliveryTarget
from fumi_core.program.served import ServedApp
from fumi_core.runtime.slow_check import Run, SlowCheck

CHECK_TIMEOUT = 6.0
"""Time limit for checking all targets, in seconds: shorter than the limits of browsers, and of the server for a page."""


class _TargetCheck(SlowCheck):
    def __init__(self, target: DeliveryTarget) -> None:
        super().__init__(target.dependency_problem)
        self.target = target


class TargetChecks:
    """The checks of the present targets. May be used in any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._checks: dict[str, _TargetCheck] = {}

    def begin(self, targets: Mapping[str, DeliveryTarget], names: Collection[str]) -> dict[str, Run]:
        """Check those of these names; ``targets`` are all there are."""
        with self._lock:
            self._checks = {name: self._of(name, target) for name, target in targets.items()}
            return {name: self._checks[name].run() for name in names}

    def _of(self, name: str, target: DeliveryTarget) -> _TargetCheck:
        known = self._checks.get(name)
        return known if known is not None and known.target is target else _TargetCheck(target)

    def problem(self, served: Iterable[ServedApp]) -> str | None:
        """Why some target does not work, or None."""
        targets = targets_of(served)
        found = problems(self.begin(targets, targets))
        return next((each for each in found.values() if each is not None), None)


def targets_of(served: Iterable[ServedApp]) -> dict[str, DeliveryTarget]:
    """The targets by their --deliver. Listeners with the same one have a target each, of which one is checked."""
    return {each.settings["deliver"]: each.target for each in served if each.target is not None}


def problems(runs: Mapping[str, Run]) -> dict[str, str | None]:
    """Why each target does not work, or None."""
    deadline = time.monotonic() + CHECK_TIMEOUT
    return {name: _problem(name, run, deadline) for name, run in runs.items()}


def _problem(name: str, run: Run, deadline: float) -> str | None:
    try:
        return run.problem(deadline)
    except TimeoutError:
        return f"{name}: no answer within {CHECK_TIMEOUT:g} s"
