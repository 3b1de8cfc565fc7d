"""Whether the edge is ready, for its status page, which must be there also while a backend does not answer.

Without health checks this takes a connection to each backend, and as long as ``--health-timeout`` allows, when the server of the
page has given up. However many browsers show the page, one thread asks.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from fumi_core.runtime.daemon_thread import start_thread

CHECK_TIMEOUT = 6.0
"""Seconds for which a page waits for the answer."""


class _Asked:
    """One check, in a thread that has begun. ``answer`` is valid when the thread has ended."""

    def __init__(self, check: Callable[[], str | None]) -> None:
        self.answer: str | None = "the check has failed"
        self._check = check
        self.thread = start_thread(self._work, "readiness")

    def _work(self) -> None:
        self.answer = self._check()


class Readiness:
    """``problem()`` is what ``check`` returns, or that there is no answer in time. May be called in any thread."""

    def __init__(self, check: Callable[[], str | None]) -> None:
        self._check = check
        self._lock = threading.Lock()
        self._asked: _Asked | None = None

    def problem(self) -> str | None:
        """Why the edge is not ready, or None. Raises OSError if the system has no more threads."""
        with self._lock:
            if self._asked is None or not self._asked.thread.is_alive():
                self._asked = _Asked(self._check)
            asked = self._asked
        asked.thread.join(CHECK_TIMEOUT)
        return f"no answer from the backends within {CHECK_TIMEOUT:g} s" if asked.thread.is_alive() else asked.answer
