"""Looks up names outside the loop, in a few threads of its own.

The system's resolver may take half a minute for a name. In asyncio's threads it would delay deliveries; and asyncio joins its
threads at the end of the program, while these are daemons and are not joined.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections import deque
from collections.abc import Callable, Sequence

from fumi_core.runtime.daemon_thread import settle, start_thread

MAX_THREADS = 8
"""Concurrent lookups."""
MAX_QUEUED_LOOKUPS = 1024
"""Lookups that may wait for a thread; any more fail with OSError at once."""

Resolve = Callable[[str], Sequence[str]]
"""Returns the addresses of a name, () if it has no address; raises OSError if the lookup fails. Called in a thread."""
_Lookup = tuple[str, "asyncio.Future[Sequence[str]]"]


def ipv4_addresses(name: str) -> Sequence[str]:
    """The IPv4 addresses that the system's resolver returns for a fully qualified name."""
    try:
        # With the final dot the search domains of resolv.conf are not tried.
        found = socket.getaddrinfo(f"{name}.", None, socket.AF_INET, socket.SOCK_STREAM)
    except socket.gaierror as error:
        if error.errno in (socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME)):
            return ()
        raise
    return [str(name[0]) for *_, name in found]


class Resolver:
    """Answers within a time limit, even if the lookup hangs. Its threads end when there is nothing to look up."""

    def __init__(self, resolve: Resolve = ipv4_addresses, *, timeout: float, threads: int = MAX_THREADS) -> None:
        self._resolve = resolve
        self._timeout = timeout
        self._threads = threads
        self._running = 0
        self._waiting: deque[_Lookup] = deque()
        self._lock = threading.Lock()  # over the two above

    async def lookup(self, name: str) -> Sequence[str]:
        """Return the addresses. Raises OSError when the resolver fails, too many lookups wait or no thread can
        be started, TimeoutError after the limit."""
        answer: asyncio.Future[Sequence[str]] = asyncio.get_running_loop().create_future()
        with self._lock:
            if len(self._waiting) >= MAX_QUEUED_LOOKUPS:
                raise OSError("too many lookups are waiting")
            if self._running < self._threads:
                start_thread(self._work, "resolver")
                self._running += 1
            self._waiting.append((name, answer))
        async with asyncio.timeout(self._timeout):
            return await answer

    def _work(self) -> None:
        while (lookup := self._next()) is not None:
            name, answer = lookup
            if answer.done():
                continue  # its caller has stopped waiting
            try:
                outcome: Sequence[str] | Exception = self._resolve(name)
            except BaseException as error:  # SystemExit too: it would end the thread, and the caller would get no answer
                outcome = error if isinstance(error, Exception) else RuntimeError(f"the lookup raised {type(error).__name__}")
            settle(answer, outcome)

    def _next(self) -> _Lookup | None:
        with self._lock:
            if self._waiting:
                return self._waiting.popleft()
            self._running -= 1
            return None
