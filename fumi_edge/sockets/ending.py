"""How a connection ends other than through its tunnel: the reason, the last words, and a close that does not destroy them."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import struct

from fumi_edge.sockets.readiness import readable, receive, send_all

LAST_WORDS = 5.0
"""Seconds a client has to take the last reply and to close its side."""
COMMAND_LIMIT = 4096

NO_BACKEND = b"421 4.3.2 Service not available, closing connection\r\n"
SHUTTING_DOWN = b"421 4.3.2 Service shutting down, closing connection\r\n"
TOO_MANY_CLIENTS = b"421 4.7.0 Too many connections, try again later\r\n"
TIMED_OUT = b"421 4.4.2 Error: timeout exceeded\r\n"

_RESET = struct.pack("ii", 1, 0)


class Ended(Exception):
    """The connection ends here. ``reason`` is for the log, ``reply`` the last words to the client.

    With ``when_asked`` they are the answer to its first command, because the client does not expect any before.
    """

    def __init__(self, reason: str, reply: bytes = b"", when_asked: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.reply = reply
        self.when_asked = when_asked


class NoBanner(Exception):
    """The backend has hung up before it said anything; neither has the client been heard. Another backend may do better."""


def reset_on_close(sock: socket.socket) -> None:
    """Make close() break the connection off (SO_LINGER 0): the peer must not take this for a regular end, nor TIME_WAIT stay."""
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)


async def take_leave(sock: socket.socket, ended: Ended, idle_timeout: float) -> None:
    """Say the last words, end our side, then read until the client has ended its own: RST would destroy what is on its way."""
    loop = asyncio.get_running_loop()
    # The client may be gone, silent or talking nonsense; it has had its chance.
    with contextlib.suppress(OSError, ValueError):
        if ended.when_asked:
            async with asyncio.timeout(idle_timeout):
                await _first_command(loop, sock)
        async with asyncio.timeout(LAST_WORDS):
            await send_all(loop, sock, ended.reply)
            if isinstance(sock, ssl.SSLSocket):
                with contextlib.suppress(OSError):
                    sock.unwrap()
            socket.socket.shutdown(sock, socket.SHUT_WR)
            # Without TLS from here: what comes is thrown away.
            while True:
                await readable(loop, sock.fileno())
                if not socket.socket.recv(sock, 4096):
                    break


async def _first_command(loop: asyncio.AbstractEventLoop, sock: socket.socket) -> None:
    received = 0
    while data := await receive(loop, sock, COMMAND_LIMIT):
        received += len(data)
        if b"\n" in data or received > COMMAND_LIMIT:
            return
    raise ConnectionResetError
