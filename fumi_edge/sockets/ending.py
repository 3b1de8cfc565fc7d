"""Ends of a connection outside its tunnel: the last reply, and a close that does not destroy it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import struct

from fumi_edge.sockets.readiness import readable, receive, send_all

LAST_REPLY_TIMEOUT = 5.0
"""Seconds that a client gets to receive the last reply and to close its side."""
FIRST_COMMAND_LIMIT = 4096

NO_BACKEND = b"421 4.3.2 Service not available, closing connection\r\n"
SHUTTING_DOWN = b"421 4.3.2 Service shutting down, closing connection\r\n"
TOO_MANY_CLIENTS = b"421 4.7.0 Too many connections, try again later\r\n"
TIMED_OUT = b"421 4.4.2 Error: timeout exceeded\r\n"

_RESET = struct.pack("ii", 1, 0)


def reset_on_close(sock: socket.socket) -> None:
    """Make close() reset the connection (SO_LINGER 0): the peer sees that it is incomplete, and no TIME_WAIT remains."""
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)


async def send_last_reply(sock: socket.socket, reply: bytes, command_timeout: float | None) -> None:
    """Send the last reply, end our side, then read until the client closes: a RST would destroy the reply on its way.

    With ``command_timeout`` (seconds), the client's first command is awaited before the reply.
    """
    loop = asyncio.get_running_loop()
    # The client may have disconnected, be silent or send invalid TLS: the connection ends anyway.
    with contextlib.suppress(OSError, ValueError):
        if command_timeout is not None:
            async with asyncio.timeout(command_timeout):
                await _first_command(loop, sock)
        async with asyncio.timeout(LAST_REPLY_TIMEOUT):
            await send_all(loop, sock, reply)
            if isinstance(sock, ssl.SSLSocket):
                with contextlib.suppress(OSError):
                    sock.unwrap()
            socket.socket.shutdown(sock, socket.SHUT_WR)
            # Read without TLS from here: the bytes are discarded.
            while True:
                await readable(loop, sock.fileno())
                if not socket.socket.recv(sock, 4096):
                    break


async def _first_command(loop: asyncio.AbstractEventLoop, sock: socket.socket) -> None:
    received = 0
    while data := await receive(loop, sock, FIRST_COMMAND_LIMIT):
        received += len(data)
        if b"\n" in data or received > FIRST_COMMAND_LIMIT:
            return
    raise ConnectionResetError
