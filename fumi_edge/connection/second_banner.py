"""Reads the banner of the backend connection after STARTTLS, which the client must not get."""

from __future__ import annotations

import asyncio
import socket

from fumi_edge.backends.replies import Replies
from fumi_edge.connection.ends import End, Ended, NoBanner
from fumi_edge.sockets.readiness import HangupWatch
from fumi_edge.tls.records import arrived

BANNER_TIMEOUT = 300.0
"""Seconds in which a backend must send its banner (RFC 5321 §4.5.3.2.1)."""

MAX_DETAIL = 500
"""Characters of a banner that are logged; it may have 64 KiB."""


class BackendRefuses(Exception):
    """The backend sent no complete banner with 220; the message is for the log. ``reply`` is its banner, empty without one."""

    def __init__(self, detail: str, reply: bytes = b"") -> None:
        super().__init__(detail)
        self.reply = reply
        self.summary = f"answered {reply[:3].decode('ascii', 'replace')} instead of 220" if reply else detail
        """The same for the status page: the text of a banner may have the client's address."""


async def second_banner(client: socket.socket, backend: socket.socket, hangup_watch: HangupWatch, idle_timeout: float) -> bytes:
    """Wait for a banner with 220. Returns the bytes after it.

    Raises NoBanner when the backend closes without sending any bytes, BackendRefuses when it sends anything else or too late,
    Ended when the client resets the connection.
    """
    replies = Replies()
    banner: bytes | None = None
    try:
        async with asyncio.timeout(min(BANNER_TIMEOUT, idle_timeout)):
            while banner is None:
                data = await _receive(client, backend, hangup_watch)
                if not data:
                    raise BackendRefuses("closed in the middle of its banner") if replies.rest else NoBanner()
                banner = replies.feed(data)
    except TimeoutError:
        raise BackendRefuses("no banner in time") from None
    except OSError as error:
        raise (BackendRefuses("closed in the middle of its banner") if replies.rest else NoBanner(error)) from None
    if not banner.startswith(b"220"):
        raise BackendRefuses(banner.decode("ascii", "replace").strip()[:MAX_DETAIL], banner)
    return replies.rest


async def _receive(client: socket.socket, backend: socket.socket, hangup_watch: HangupWatch) -> bytes:
    while True:
        try:
            await hangup_watch.readable(client, backend)
        except ConnectionResetError:
            raise Ended(End.CLIENT_RESET) from None
        if (data := arrived(backend)) is not None:
            return data
