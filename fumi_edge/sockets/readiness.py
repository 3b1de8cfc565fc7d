"""Waiting for raw non-blocking sockets, plain or TLS, where speed does not matter: before the tunnel and after it.

The handshake and the tunnel register their own callbacks; all other code awaits these coroutines.
"""

from __future__ import annotations

import asyncio
import select
import socket
import ssl
import sys


def _wake(future: asyncio.Future[int], fd: int) -> None:
    if not future.done():
        future.set_result(fd)


async def readable(loop: asyncio.AbstractEventLoop, *descriptors: int) -> int:
    """Return the first of the descriptors that is readable, which includes end and error."""
    woken: asyncio.Future[int] = loop.create_future()
    for fd in descriptors:
        loop.add_reader(fd, _wake, woken, fd)
    try:
        return await woken
    finally:
        for fd in descriptors:
            loop.remove_reader(fd)


async def writable(loop: asyncio.AbstractEventLoop, fd: int) -> None:
    """Return once the descriptor is writable: it takes bytes, is connected, or has failed."""
    woken: asyncio.Future[int] = loop.create_future()
    loop.add_writer(fd, _wake, woken, fd)
    try:
        await woken
    finally:
        loop.remove_writer(fd)


class HangupWatch:
    """Notices a client's reset while the edge waits for a backend, even if the client has sent bytes that are still unread.

    A socket that epoll watches for no event still reports an error, and nothing else: neither unread bytes nor a FIN. The event
    loop may watch the same socket for other events, so all connections share a second epoll for this.

    It replaces ``readable()`` of both sockets, which returns again and again for unread bytes. It is here for correctness,
    although a wait also costs less: 14 instead of 18 µs (median of 7, Python 3.11.7). Only STARTTLS ports wait for a backend in
    this way, and no row of ``ops/bench`` has one. Delete it when an event loop can watch a socket for errors alone. No private
    names are used.
    """

    def __init__(self) -> None:
        self._epoll: select.epoll | None = None
        self._waiting: dict[int, asyncio.Future[int]] = {}

    def open(self, loop: asyncio.AbstractEventLoop) -> None:
        """Open the epoll. To be called after the fork, because processes must not share an epoll. Raises OSError."""
        self._loop = loop
        self._epoll = select.epoll()
        loop.add_reader(self._epoll.fileno(), self._check)

    def close(self) -> None:
        if self._epoll is not None:
            self._loop.remove_reader(self._epoll.fileno())
            self._epoll.close()
            self._epoll = None

    async def readable(self, client: socket.socket, backend: socket.socket) -> None:
        """Return once the backend is readable. Raises ConnectionResetError when the client resets the connection first."""
        assert self._epoll is not None
        watched, wanted = client.fileno(), backend.fileno()
        woken: asyncio.Future[int] = self._loop.create_future()
        self._waiting[watched] = woken
        self._epoll.register(watched, 0)
        self._loop.add_reader(wanted, _wake, woken, wanted)
        try:
            if await woken != wanted:
                raise ConnectionResetError
        finally:
            self._loop.remove_reader(wanted)
            self._epoll.unregister(watched)
            del self._waiting[watched]

    def _check(self) -> None:
        assert self._epoll is not None
        for fd, _ in self._epoll.poll(0):
            _wake(self._waiting[fd], fd)


_TCP_INFO_BYTES_RECEIVED = 128
"""The offset of ``tcpi_bytes_received`` in Linux' ``struct tcp_info`` (linux/tcp.h), which Python does not decode."""


def received_since(sock: socket.socket, before: int) -> bool:
    """Whether the peer of a TCP connection has sent more than ``before`` bytes, read or not; True when this is unknown."""
    try:
        info = socket.socket.getsockopt(sock, socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES_RECEIVED + 8)
    except OSError:
        return True
    if len(info) < _TCP_INFO_BYTES_RECEIVED + 8:
        return True
    # The kernel counts the peer's FIN as one byte.
    return int.from_bytes(info[_TCP_INFO_BYTES_RECEIVED:], sys.byteorder) > before + 1


async def receive(loop: asyncio.AbstractEventLoop, sock: socket.socket, size: int) -> bytes:
    """Receive up to ``size`` bytes; empty at the end. Reads before it waits: no event reports bytes that OpenSSL holds."""
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
    """Send all bytes. A TLS record that did not fit is sent again with the same bytes, as OpenSSL requires."""
    while data:
        try:
            data = data[sock.send(data) :]
        except (BlockingIOError, ssl.SSLWantWriteError):
            await writable(loop, sock.fileno())
        except ssl.SSLWantReadError:
            await readable(loop, sock.fileno())
