"""Waiting for raw non-blocking sockets, plain or TLS, where speed does not matter: before the tunnel and after it.

The handshake and the tunnel register their own callbacks; everything else is a coroutine on top of these.
"""

from __future__ import annotations

import asyncio
import select
import socket
import ssl


def _wake(future: asyncio.Future[int], fd: int) -> None:
    if not future.done():
        future.set_result(fd)


async def readable(loop: asyncio.AbstractEventLoop, *descriptors: int) -> int:
    """Return the first of the descriptors that has something to read, or has ended."""
    woken: asyncio.Future[int] = loop.create_future()
    for fd in descriptors:
        loop.add_reader(fd, _wake, woken, fd)
    try:
        return await woken
    finally:
        for fd in descriptors:
            loop.remove_reader(fd)


async def writable(loop: asyncio.AbstractEventLoop, fd: int) -> None:
    """Return once the descriptor takes bytes, is connected, or has failed."""
    woken: asyncio.Future[int] = loop.create_future()
    loop.add_writer(fd, _wake, woken, fd)
    try:
        await woken
    finally:
        loop.remove_writer(fd)


class Company:
    """Notices that a client has broken off while a backend is waited for, whatever it may have sent ahead."""

    __slots__ = ("_client", "_loop")

    def __init__(self, loop: asyncio.AbstractEventLoop, client: socket.socket) -> None:
        self._loop = loop
        self._client = client

    async def readable(self, fd: int) -> None:
        """Return once the descriptor has something to read. Raises ConnectionResetError when the client breaks off first."""
        # Watched for nothing, a socket still reports that it is broken, and only that: neither unread bytes nor a FIN count.
        try:
            broken = select.epoll()
        except OSError:
            await readable(self._loop, fd)  # no descriptor is left to watch with
            return
        with broken:
            broken.register(self._client.fileno(), 0)
            if await readable(self._loop, fd, broken.fileno()) != fd:
                raise ConnectionResetError


async def receive(loop: asyncio.AbstractEventLoop, sock: socket.socket, size: int) -> bytes:
    """Up to ``size`` bytes, empty at the end. Reads before it waits: decrypted bytes that OpenSSL still holds wake nobody."""
    while True:
        try:
            return sock.recv(size)
        except (BlockingIOError, ssl.SSLWantReadError):
            await readable(loop, sock.fileno())
        except ssl.SSLWantWriteError:
            await writable(loop, sock.fileno())
        except ssl.SSLZeroReturnError:
            return b""


async def send_all(loop: asyncio.AbstractEventLoop, sock: socket.socket, data: bytes) -> None:
    """Send every byte. A TLS record that did not fit is offered again, as OpenSSL wants it."""
    while data:
        try:
            data = data[sock.send(data) :]
        except (BlockingIOError, ssl.SSLWantWriteError):
            await writable(loop, sock.fileno())
        except ssl.SSLWantReadError:
            await readable(loop, sock.fileno())
