"""Waiting for a condition by polling it, and the limit after which a test fails."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
PATIENCE = 60.0
"""Seconds after which something that should have happened is a failure. No test waits that long when all is well."""


def until(condition: Callable[[], T | None], what: str = "it", patience: float = PATIENCE) -> T:
    """Poll until the condition is true, and return its value. Raises AssertionError after ``patience`` seconds."""
    deadline = time.monotonic() + patience
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what} did not happen"
        time.sleep(0.005)
    return value
