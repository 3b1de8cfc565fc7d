"""An event loop in which time passes only when nothing else happens: minutes of silence take no time, and come out the same."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any


class _Selector(selectors.DefaultSelector):
    """Does not wait: the clock goes on to when waiting would have ended."""

    now = 1000.0

    def select(self, timeout: float | None = None) -> Any:
        ready = super().select(0)
        if not ready and timeout is not None and timeout > 0:
            self.now += timeout
        return ready


class PassingLoop(asyncio.SelectorEventLoop):
    """``time()`` is its own clock."""

    def __init__(self) -> None:
        self._clock = _Selector()
        super().__init__(self._clock)

    def time(self) -> float:
        return self._clock.now


def run_passing(main: Coroutine[Any, Any, None]) -> None:
    """Run it in a loop of its own. An error that asyncio would only log fails, too."""
    loop, errors = PassingLoop(), []
    loop.set_exception_handler(lambda loop, context: errors.append(context))
    try:
        loop.run_until_complete(main)
    finally:
        loop.close()
    assert not errors
