"""Connecting to an IP address, a host name or a Unix socket without blocking the loop, and closing with QUIT."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import random
import socket
import ssl
from collections.abc import Callable, Sequence
from typing import Any, Protocol
from weakref import WeakKeyDictionary

from fumi_core.proxy_protocol import Endpoint
from fumi_core.runtime.addresses import SocketAddress
from fumi_core.runtime.daemon_thread import run_in_daemon_thread
from fumi_core.runtime.dead_peers import detect_dead_peer
from fumi_core.runtime.logs import event
from fumi_core.runtime.taskless import in_task
from fumi_edge.backends.tls import BackendTLS, TLSError
from fumi_edge.metrics import BackendError
from fumi_edge.sockets.ending import reset_on_close
from fumi_edge.sockets.readiness import receive, send_all, writable

log = logging.getLogger("fumi.edge.backends")

RESOLVE_INTERVAL = 30.0
"""Seconds after which a host name is resolved again, while one of its addresses can be connected to.

Caching resolvers, Kubernetes' among them, give the same answer for about as long.
"""
MIN_RESOLVE_INTERVAL = 1.0
"""The minimum of seconds between two lookups when none of the addresses can be connected to."""
AVOID_ADDRESS_SECONDS = 30.0
"""Seconds for which an address is tried after the others of the same name when a connection to it has failed."""
MAX_TIMEOUTS = 12
"""Connect timeouts, together a minute by default, after which no further address of a name is tried for one client: it waits five
minutes for a banner (RFC 5321 §4.5.3.2.1), and there may be other backends."""
CLOSE_SECONDS = 5.0
"""Seconds that a backend gets to close its side after QUIT."""
LAST_REPLY_LIMIT = 64 * 1024
"""The maximum number of bytes that a backend may still send after QUIT."""
_CONNECT_RETRY_SECONDS = 0.02  # for a Unix socket with a full queue

LOCAL_ERRORS = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
"""Errors that are not the backend's: this process or this host has no more resources."""

ResolvedAddress = tuple[int, Any]
"""Address family, and the address as connect() takes it."""
Opening = bytes | Callable[[Endpoint, Endpoint], bytes]
"""The bytes that are sent first on a connection, or a function that makes them from its local address and the backend's."""


class Destination(Protocol):
    """Where a backend is: ``name`` is its name in logs and metrics, ``descriptors`` the number that a connection needs here.

    ``tls`` is for a backend over TLS.
    """

    name: str
    descriptors: int
    tls: BackendTLS | None

    async def connect(self, loop: asyncio.AbstractEventLoop, timeout: float, opening: Opening) -> socket.socket:
        """Return a connection on which ``opening`` has been sent. Each step may take ``timeout`` seconds. Raises OSError."""

    def avoid(self, sock: socket.socket) -> bool:
        """Note that a connection made by ``connect()`` had no banner, or a wrong one. Returns whether to try another address."""

    def copy_for_other_loop(self) -> Destination:
        """Return a destination with the same address, for another event loop."""


class Remote:
    """A TCP or Unix address, or a host name: connections are spread at random over its addresses.

    An address that has failed is tried after the others for AVOID_ADDRESS_SECONDS. The name is resolved again every
    RESOLVE_INTERVAL seconds in the background, and at once when all addresses have failed.
    """

    descriptors = 1

    __slots__ = ("_addresses", "_failed", "_failure_logged", "_lookup", "_resolved_at", "_used", "address", "name", "tls")

    def __init__(self, address: SocketAddress, tls: BackendTLS | None = None) -> None:
        """With ``tls``, connections are encrypted, and the server is verified."""
        self.address = address
        self.tls = tls
        self.name = str(address)
        self._addresses = _literal(address)
        self._failed: dict[ResolvedAddress, float] = {}
        """When a connection to an address failed, in the loop's time; kept when the name is resolved again."""
        self._used: WeakKeyDictionary[socket.socket, ResolvedAddress] = WeakKeyDictionary()
        """The addresses of the connections to a name with several."""
        self._failure_logged = False
        """Whether it has been logged that the name can no longer be resolved."""
        self._resolved_at = float("-inf") if not self._addresses else float("inf")
        self._lookup: asyncio.Task[OSError | None] | None = None

    def __eq__(self, other: object) -> bool:
        """Whether the addresses are equal: a reload then keeps the result of the last lookup, and TLS sessions."""
        return type(other) is type(self) and (other.address, other.tls) == (self.address, self.tls)

    def __hash__(self) -> int:
        return hash((self.address, self.tls))

    async def addresses(self, loop: asyncio.AbstractEventLoop, timeout: float) -> Sequence[ResolvedAddress]:
        """The addresses in the order in which to try them. Raises OSError, or TimeoutError.

        Waits only for the first lookup, and for one after all addresses have failed.
        """
        if self._lookup is None and (not self._addresses or loop.time() - self._resolved_at >= RESOLVE_INTERVAL):
            self._start_lookup(loop)
        if not self._addresses and (failure := await in_task(self._lookup_error(timeout))) is not None:
            raise failure
        if self._failed and all(self._avoided(each, loop.time()) for each in self._addresses):
            await self._resolve_again(loop, timeout)
        if len(self._addresses) == 1:
            return self._addresses
        # Not in turn: for a client that upgrades there are two connections, and with two addresses every session would go to the
        # same one. And all are shuffled, so that those which remain share what would have gone to one that has failed.
        shuffled, now = random.sample(self._addresses, len(self._addresses)), loop.time()
        return sorted(shuffled, key=lambda address: self._avoided(address, now))

    def _avoided(self, address: ResolvedAddress, now: float) -> bool:
        return now - self._failed.get(address, float("-inf")) < AVOID_ADDRESS_SECONDS

    def _start_lookup(self, loop: asyncio.AbstractEventLoop) -> None:
        # One lookup at a time, because each takes a thread; all that wait share its result.
        self._lookup = self._lookup or loop.create_task(self._resolve(loop))

    async def _lookup_error(self, timeout: float) -> OSError | None:
        """Wait up to ``timeout`` seconds for a running lookup, and return its error or None. Raises TimeoutError."""
        if self._lookup is None:
            return None
        async with asyncio.timeout(timeout):
            return await asyncio.shield(self._lookup)

    async def _resolve(self, loop: asyncio.AbstractEventLoop) -> OSError | None:
        try:
            found = await run_in_daemon_thread(
                lambda: socket.getaddrinfo(self.address.host, self.address.port, type=socket.SOCK_STREAM)
            )
            self._addresses = tuple(dict.fromkeys((int(family), name) for family, _, _, _, name in found))
            self._failed = {address: at for address, at in self._failed.items() if address in self._addresses}
            self._failure_logged = False
        except OSError as error:
            if self._addresses and not self._failure_logged:
                self._failure_logged = True
                event(log, logging.WARNING, "cannot resolve, keeping the old addresses", backend=self.name, error=error)
            return error
        finally:
            self._resolved_at = loop.time()
            self._lookup = None
        return None

    async def connect(self, loop: asyncio.AbstractEventLoop, timeout: float, opening: Opening) -> socket.socket:
        """See Destination. The lookup may take ``timeout`` seconds, and then each address; none is begun after MAX_TIMEOUTS."""
        tried: set[ResolvedAddress] = set()
        failure: OSError = OSError("no address")
        addresses = await self.addresses(loop, timeout)
        until = loop.time() + MAX_TIMEOUTS * timeout
        while addresses:
            for address in addresses:
                if address in self._failed:
                    # This attempt tests it again; until it ends, other connections avoid the address.
                    self._failed[address] = loop.time()
                try:
                    if self.tls is None:
                        sock = await _connect(loop, address, timeout, opening)
                    else:
                        sock = await in_task(_connect_tls(loop, address, timeout, opening, self.tls))
                except OSError as error:
                    failure = error
                    if error.errno in LOCAL_ERRORS:
                        raise
                    self._failed[address] = now = loop.time()
                    if now >= until:
                        raise
                else:
                    self._failed.pop(address, None)
                    if len(self._addresses) > 1:
                        self._used[sock] = address
                    return sock
            tried.update(addresses)
            # The host may have moved.
            await self._resolve_again(loop, timeout)
            addresses = [address for address in self._addresses if address not in tried]
        raise failure

    async def _resolve_again(self, loop: asyncio.AbstractEventLoop, timeout: float) -> None:
        """Wait for a new lookup, or for one that is running, at most ``timeout`` seconds."""
        if loop.time() - self._resolved_at >= MIN_RESOLVE_INTERVAL:
            self._start_lookup(loop)
        if self._lookup is not None:
            with contextlib.suppress(TimeoutError):
                await in_task(self._lookup_error(timeout))

    def avoid(self, sock: socket.socket) -> bool:
        """See Destination. An address of several is tried after the others for AVOID_ADDRESS_SECONDS."""
        now = asyncio.get_running_loop().time()
        if (address := self._used.pop(sock, None)) is not None:
            self._failed[address] = now
        return address is not None and not all(self._avoided(each, now) for each in self._addresses)

    def copy_for_other_loop(self) -> Remote:
        return Remote(self.address, self.tls and self.tls.copy_for_other_loop())


def _literal(address: SocketAddress) -> tuple[ResolvedAddress, ...]:
    """The address of an address that needs no lookup: a path, an IP address, or no host, which means this host; else ()."""
    if address.kind == "unix":
        return ((socket.AF_UNIX, address.path),)
    host = address.host or "127.0.0.1"
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.inet_pton(family, host)
    except OSError:
        return ()
    return ((family, (host, address.port)),)


async def _connect(loop: asyncio.AbstractEventLoop, address: ResolvedAddress, timeout: float, opening: Opening) -> socket.socket:
    family, name = address
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        rest = _begin(sock, family, name, opening)
        if rest is not None:
            await in_task(_complete(loop, sock, name, rest, timeout))
    except BaseException:
        sock.close()
        raise
    return sock


async def _connect_tls(
    loop: asyncio.AbstractEventLoop, address: ResolvedAddress, timeout: float, opening: Opening, tls: BackendTLS
) -> socket.socket:
    """Connect, and do the handshake; the opening is the first thing inside TLS. All of it may take ``timeout`` seconds."""
    family, name = address
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        async with asyncio.timeout(timeout):
            if _begin(sock, family, name, b"") is not None:
                await _connected(loop, sock, name)
            sock = encrypted = await tls.connect(loop, sock)
            if not isinstance(opening, bytes):
                opening = opening(_endpoint(sock.getsockname()), _endpoint(name))
            await tls.send_first(loop, encrypted, opening)
    except BaseException:
        sock.close()
        raise
    return sock


def _begin(sock: socket.socket, family: int, name: Any, opening: Opening) -> bytes | None:
    """Start to connect. Returns the unsent rest of the opening, or None when connected and all of it is sent.

    On the same host the TCP handshake is complete when connect() returns, although it reports EINPROGRESS: trying to send
    costs less than waiting for the loop.
    """
    if family != socket.AF_UNIX:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        detect_dead_peer(sock)
    code = sock.connect_ex(name)
    if not isinstance(opening, bytes):
        opening = opening(_endpoint(sock.getsockname()), _endpoint(name))
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


def _endpoint(address: Any) -> Endpoint:
    return (address[0], address[1]) if isinstance(address, tuple) else os.fsdecode(address)


async def _complete(loop: asyncio.AbstractEventLoop, sock: socket.socket, name: Any, opening: bytes, timeout: float) -> None:
    async with asyncio.timeout(timeout):
        await _connected(loop, sock, name)
        await send_all(loop, sock, opening)


async def _connected(loop: asyncio.AbstractEventLoop, sock: socket.socket, name: Any) -> None:
    """Return once the socket is connected. Raises OSError."""
    if isinstance(name, str):
        # A Unix socket with a full queue returns EAGAIN, and no event reports free space.
        while (code := sock.connect_ex(name)) == errno.EAGAIN:
            await asyncio.sleep(_CONNECT_RETRY_SECONDS)
    else:
        await writable(loop, sock.fileno())
        code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if code not in (0, errno.EISCONN):
        raise OSError(code, os.strerror(code))


async def quit_and_close(sock: socket.socket, timeout: float = CLOSE_SECONDS) -> bytes:
    """Send QUIT and wait for the backend to close first, so that TIME_WAIT (RFC 9293 §3.6) uses none of our ports.

    If it has not closed after ``timeout`` seconds, or sends more than LAST_REPLY_LIMIT bytes, the connection is reset, which
    leaves no TIME_WAIT either; a backend that never stops sending would keep the event loop busy. Returns the bytes that it
    sent.
    """
    loop = asyncio.get_running_loop()
    received = b""
    try:
        async with asyncio.timeout(timeout):
            await send_all(loop, sock, b"QUIT\r\n")
            while data := await receive(loop, sock, 4096):
                received += data
                if len(received) > LAST_REPLY_LIMIT:
                    raise TimeoutError
        if isinstance(sock, ssl.SSLSocket):
            sock.unwrap()
    except TimeoutError:
        reset_on_close(sock)
    except OSError:
        pass  # the backend has closed already
    finally:
        sock.close()
    return received


def error_text(error: OSError) -> str:
    """The text of a connection's error, for logs."""
    return error.strerror or str(error) or "timed out"


def reason_of(error: OSError) -> BackendError:
    """An error of connect() as a label of the metrics."""
    if isinstance(error, TLSError):
        return error.reason
    if isinstance(error, TimeoutError):
        return BackendError.TIMEOUT
    if isinstance(error, socket.gaierror):
        return BackendError.RESOLVE
    if isinstance(error, ConnectionRefusedError | FileNotFoundError):
        return BackendError.REFUSED
    # EADDRNOTAVAIL: no local address of that family, or no free local port for this destination.
    unreachable = error.errno in (errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EADDRNOTAVAIL)
    return BackendError.UNREACHABLE if unreachable else BackendError.OTHER
