"""Backends: which one, connecting to it, and the PROXY header that opens every connection (fumi_core.proxy_protocol)."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
from collections.abc import Sequence
from typing import Any

from fumi_core.proxy_protocol import PP2_TYPE_UNIQUE_ID, ProxyHeader, TLSInfo, tls_tlvs
from fumi_core.runtime.addresses import SocketAddress
from fumi_core.runtime.logs import event
from fumi_edge.metrics import BackendMetrics, EdgeMetrics
from fumi_edge.readiness import readable, send_all, writable

log = logging.getLogger("fumi.edge.backends")

AVOID = 5.0
"""Seconds for which a backend that failed is only asked after the others."""
RESOLVE = 30.0
"""Seconds for which the addresses of a host name are kept."""
FAREWELL = 5.0
"""Seconds an abandoned backend has to close its side."""
_BUSY = 0.02  # seconds until a Unix socket with a full queue is asked again

_OURS = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)

Name = tuple[str, int] | str
Target = tuple[int, Any]
"""Address family, and the address as connect() takes it."""


class NoBackend(Exception):
    """No backend could be reached."""


def header(version: str, source: Name, destination: Name, unique_id: str, tls: TLSInfo | None) -> bytes:
    """The PROXY header for one client connection; ``version`` is v2, v1 or off. Without ``tls`` it has no SSL TLV."""
    if version == "off":
        return b""
    transport = "UNIX" if isinstance(source, str) else "TCP6" if ":" in source[0] else "TCP4"
    if version == "v1":
        return ProxyHeader(1, "PROXY", transport, source, destination).to_bytes()
    tlvs = (PP2_TYPE_UNIQUE_ID, unique_id.encode("ascii")), *(tls_tlvs(tls) if tls else ())
    return ProxyHeader(2, "PROXY", transport, source, destination, tlvs).to_bytes()


def greeting(version: str) -> bytes:
    """The header of a connection of the edge's own, which stands for no client."""
    return b"" if version == "off" else ProxyHeader(1 if version == "v1" else 2, "LOCAL").to_bytes()


class Backend:
    """One backend: where it is, and how it has been doing."""

    __slots__ = ("_resolved", "_resolved_at", "address", "failed_at", "metrics", "name")

    def __init__(self, address: SocketAddress, metrics: BackendMetrics) -> None:
        self.address = address
        self.name = str(address)
        self.metrics = metrics
        self.failed_at = float("-inf")
        self._resolved_at = float("inf")
        self._resolved = _literal(address)
        metrics.up.set(1)

    async def targets(self, loop: asyncio.AbstractEventLoop) -> Sequence[Target]:
        """The addresses behind the name, asked of a resolver thread every RESOLVE seconds. Raises OSError."""
        if self._resolved is None or loop.time() - self._resolved_at > RESOLVE:
            found = await loop.getaddrinfo(self.address.host, self.address.port, type=socket.SOCK_STREAM)
            self._resolved = tuple(dict.fromkeys((int(family), name) for family, _, _, _, name in found))
            self._resolved_at = loop.time()
        return self._resolved

    def succeeded(self, seconds: float) -> None:
        self.metrics.connect_seconds.observe(seconds)
        if self.failed_at >= 0:
            self.failed_at = float("-inf")
            self.metrics.up.set(1)
            event(log, logging.INFO, "backend is back", backend=self.name)

    def failed(self, now: float, reason: str, detail: object) -> None:
        self.metrics.errors[reason].inc()
        if self.failed_at < 0:
            event(log, logging.WARNING, "backend failed", backend=self.name, reason=reason, detail=detail)
        self.failed_at = now
        self.metrics.up.set(0)


def _literal(address: SocketAddress) -> Sequence[Target] | None:
    """What needs no resolver: a path, an IP address, or no host at all, which is this machine."""
    if address.kind == "unix":
        return ((socket.AF_UNIX, address.path),)
    host = address.host or "127.0.0.1"
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.inet_pton(family, host)
    except OSError:
        return None
    return ((family, (host, address.port)),)


def reason_of(error: OSError) -> str:
    """An error of connect() as one of BACKEND_ERRORS."""
    if isinstance(error, TimeoutError):
        return "timeout"
    if isinstance(error, socket.gaierror):
        return "resolve"
    if isinstance(error, ConnectionRefusedError | FileNotFoundError):
        return "refused"
    return "unreachable" if error.errno in (errno.EHOSTUNREACH, errno.ENETUNREACH) else "other"


class Backends:
    """All backends of an edge."""

    def __init__(self, addresses: Sequence[SocketAddress], connect_timeout: float, metrics: EdgeMetrics) -> None:
        self._all = [Backend(address, metrics.backend(str(address))) for address in dict.fromkeys(addresses)]
        self._timeout = connect_timeout
        self._retiring: set[asyncio.Task[None]] = set()

    def candidates(self, now: float) -> Sequence[Backend]:
        """The backends in the order in which to try them: as configured, those that just failed last."""
        if len(self._all) == 1:
            return self._all
        return sorted(self._all, key=lambda backend: now - backend.failed_at < AVOID)

    async def connect(self, opening: bytes) -> tuple[socket.socket, Backend]:
        """A connection on which ``opening``, the PROXY header, has been sent. Raises NoBackend when there is none to be had."""
        loop = asyncio.get_running_loop()
        for backend in self.candidates(loop.time()):
            begun = loop.time()
            try:
                sock = await self._connect(loop, backend, opening)
            except OSError as error:
                if error.errno in _OURS:
                    # Nothing is known of the backend: it is this process that has no more.
                    backend.metrics.errors["other"].inc()
                else:
                    backend.failed(loop.time(), reason_of(error), error)
                continue
            backend.succeeded(loop.time() - begun)
            return sock, backend
        raise NoBackend

    async def _connect(self, loop: asyncio.AbstractEventLoop, backend: Backend, opening: bytes) -> socket.socket:
        failure: OSError = OSError("no address")
        for family, name in await backend.targets(loop):
            sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            try:
                rest = _begin(sock, family, name, opening)
                if rest is not None:
                    async with asyncio.timeout(self._timeout):
                        await _complete(loop, sock, name, rest)
            except OSError as error:
                sock.close()
                failure = error
            except BaseException:
                sock.close()
                raise
            else:
                return sock
        raise failure

    def retire(self, sock: socket.socket) -> None:
        """Take leave of a backend in the background, so that it closes first and keeps the TIME_WAIT (RFC 9293 §3.6)."""
        task = asyncio.get_running_loop().create_task(_take_leave(sock))
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)

    async def close(self) -> None:
        if self._retiring:
            await asyncio.wait(self._retiring)


def _begin(sock: socket.socket, family: int, name: Any, opening: bytes) -> bytes | None:
    """Start to connect; what is left of the opening, or None when connection and opening are through already.

    On the same machine the TCP handshake is over when connect() returns, although it says EINPROGRESS: to try to send
    costs less than to ask the loop.
    """
    if family != socket.AF_UNIX:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    code = sock.connect_ex(name)
    if code == errno.EAGAIN and family == socket.AF_UNIX:
        return opening
    if code not in (0, errno.EINPROGRESS):
        raise OSError(code, os.strerror(code))
    if not opening:
        return None if code == 0 else b""
    try:
        return opening[sock.send(opening) :] or None
    except BlockingIOError:
        return opening


async def _complete(loop: asyncio.AbstractEventLoop, sock: socket.socket, name: Any, opening: bytes) -> None:
    if isinstance(name, str):
        # A Unix socket whose queue is full gives EAGAIN, and no event when there is room again.
        while (code := sock.connect_ex(name)) == errno.EAGAIN:
            await asyncio.sleep(_BUSY)
    else:
        await writable(loop, sock.fileno())
        code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if code not in (0, errno.EISCONN):
        raise OSError(code, os.strerror(code))
    await send_all(loop, sock, opening)


async def _take_leave(sock: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(FAREWELL):
            await send_all(loop, sock, b"QUIT\r\n")
            while True:
                await readable(loop, sock.fileno())
                if not sock.recv(4096):
                    break
    except OSError:
        # It is gone, or does not go: either way there is nothing more to say to it.
        pass
    finally:
        sock.close()


def probe(address: SocketAddress, timeout: float, opening: bytes) -> str | None:
    """Ask a backend for its banner, as a health check does; what is wrong with it, or None. Blocks up to ``timeout`` a step."""
    try:
        with _dial(address, timeout) as sock:
            sock.sendall(opening)
            banner = b""
            while b"\n" not in banner and len(banner) < 4096:
                data = sock.recv(4096)
                if not data:
                    return "closed the connection without a banner"
                banner += data
            if not banner.startswith(b"220"):
                return f"answered {banner[:80].decode('ascii', 'replace').strip()!r} instead of 220"
            sock.sendall(b"QUIT\r\n")
            while sock.recv(4096):
                pass
    except TimeoutError:
        return "did not answer in time"
    except OSError as error:
        return error.strerror or str(error)
    return None


def _dial(address: SocketAddress, timeout: float) -> socket.socket:
    if address.kind != "unix":
        return socket.create_connection((address.host or "127.0.0.1", address.port), timeout)
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.settimeout(timeout)
        sock.connect(address.path)
    except BaseException:
        sock.close()
        raise
    return sock
