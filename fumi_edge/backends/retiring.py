"""Connections to backends that are no longer needed: QUIT, then wait in the background for the backend to close first."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

from fumi_edge.backends.dialing import quit_and_close
from fumi_edge.sockets.ending import reset_on_close

MAX_RETIRING = 1024
"""The maximum number of connections that wait, after QUIT, for the backend to close; one more is reset."""
QUIT_SECONDS = 1.0
"""Seconds that backends get to close after QUIT when the edge stops."""


class Retiring:
    """The connections that have been sent QUIT. ``len()`` is their number."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[bytes]] = set()
        self.full: Callable[[], bool] = lambda: False
        """Returns True when all free descriptors are needed for the clients that are connected."""

    def __len__(self) -> int:
        return len(self._tasks)

    def retire(self, sock: socket.socket) -> None:
        """Send QUIT and wait for the close in the background, or reset the connection when too many are waiting."""
        if len(self._tasks) >= MAX_RETIRING or self.full():
            reset_on_close(sock)
            sock.close()
            return
        task = asyncio.get_running_loop().create_task(quit_and_close(sock))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Wait up to QUIT_SECONDS for the backends to close, then stop waiting."""
        if self._tasks:
            _, pending = await asyncio.wait(self._tasks, timeout=QUIT_SECONDS)
            for task in pending:
                task.cancel()
