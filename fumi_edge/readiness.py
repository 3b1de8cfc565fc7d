"""Waiting for raw non-blocking sockets, plain or TLS, where speed does not matter: before the tunnel and after it.

The handshake and the tunnel register their own callbacks; everything else is a coroutine on top of these.
"""

from __future__ import annotations

import asyncio
import socket
import ssl


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


async def readable(loop: asyncio.AbstractEventLoop, *descriptors: int) -> None:
    """Return once one of the descriptors has something to read, or has ended."""
    woken: asyncio.Future[None] = loop.create_future()
    for fd in descriptors:
        loop.add_reader(fd, _wake, woken)
    try:
        await woken
    finally:
        for fd in descriptors:
            loop.remove_reader(fd)


async def writable(loop: asyncio.AbstractEventLoop, fd: int) -> None:
    """Return once the descriptor takes bytes, is connected, or has failed."""
    woken: asyncio.Future[None] = loop.create_future()
    loop.add_writer(fd, _wake, woken)
    try:
        await woken
    finally:
        loop.remove_writer(fd)


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
