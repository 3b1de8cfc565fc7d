"""A check that may take longer than anyone can wait: of a host that does not answer, or a file system that hangs.

However many ask for its result, and however long it takes, it has one thread.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from fumi_core.runtime.daemon_thread import start_thread

Check = Callable[[], str | None]
"""Returns a problem, or None."""


class Run:
    """One run of a check, begun in a thread of its own."""

    def __init__(self, check: Check) -> None:
        self._check = check
        self._problem: str | None = "the check has failed"
        self._thread: threading.Thread | None = None
        try:
            self._thread = start_thread(self._work, "check")
        except OSError as error:
            self._problem = str(error)

    def _work(self) -> None:
        self._problem = self._check()

    @property
    def is_running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def problem(self, deadline: float) -> str | None:
        """What the check has returned. Raises TimeoutError if it has not by ``deadline``, by the monotonic clock."""
        if self._thread is not None:
            self._thread.join(max(0.0, deadline - time.monotonic()))
        if self.is_running:
            raise TimeoutError
        return self._problem


class SlowCheck:
    """Runs ``check`` when it is asked to, and never twice at once. May be used in any thread."""

    def __init__(self, check: Check) -> None:
        self._check = check
        self._lock = threading.Lock()
        self._last: Run | None = None

    def run(self) -> Run:
        """The run that has not ended yet, or a new one."""
        with self._lock:
            if self._last is None or not self._last.is_running:
                self._last = Run(self._check)
            return self._last
