"""Reads the banner of the backend connection after STARTTLS, which the client must not get."""

from __future__ import annotations

import asyncio
import contextlib
import socket

from fumi_edge.backends.replies import Replies
from fumi_edge.connection.ends import End, Ended, NoBanner
from fumi_edge.sockets.readiness import HangupWatch

BANNER_TIMEOUT = 300.0
"""Seconds in which a backend must send its banner (RFC 5321 §4.5.3.2.1)."""


async def second_banner(
    client: socket.socket, backend: socket.socket, hangup_watch: HangupWatch, idle_timeout: float
) -> tuple[bytes | None, bytes]:
    """Return the banner, None if it does not come in time, and the bytes after it.

    Raises NoBanner when the backend closes without sending any bytes, Ended when the client resets the connection.
    """
    replies = Replies()
    banner: bytes | None = None
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(min(BANNER_TIMEOUT, idle_timeout)):
            while banner is None and (data := await _receive(client, backend, hangup_watch)):
                banner = replies.feed(data)
            if banner is None and not replies.rest:
                raise NoBanner
    return banner, replies.rest


async def _receive(client: socket.socket, backend: socket.socket, hangup_watch: HangupWatch) -> bytes:
    while True:
        try:
            await hangup_watch.readable(client, backend)
        except ConnectionResetError:
            raise Ended(End.CLIENT_RESET) from None
        try:
            return backend.recv(4096)
        except BlockingIOError:
            continue
        except OSError:
            return b""
