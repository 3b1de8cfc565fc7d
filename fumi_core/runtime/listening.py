"""Listening sockets: how both programs open them at the start, and how ``--check`` checks them without listening."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import socket
import stat
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from fumi_core.runtime.addresses import SocketAddress
from fumi_core.runtime.systemd import descriptors

BACKLOG = 4096
"""Connections the kernel may queue before accept; it caps this at net.core.somaxconn."""
_HINTS = {
    errno.EACCES: "ports below 1024 need root or CAP_NET_BIND_SERVICE",
    errno.EADDRINUSE: "another process has it; stop that one or choose another address",
    errno.EADDRNOTAVAIL: "this machine has no such address",
}


class ListenAddress(NamedTuple):
    """An address to listen on, and its flag."""

    flag: str
    address: SocketAddress

    def __str__(self) -> str:
        return f"{self.flag} {self.address}"


class ListenError(Exception):
    """An address that cannot be listened on; the text is one line that names the flag and says what to do."""


def open_listeners(places: Sequence[ListenAddress], mode: int | None) -> list[list[socket.socket]]:
    """Return the sockets of each address, as ``bind()`` does. Raises ListenError, and then leaves none open."""
    if problem := clash(places):
        raise ListenError(problem)
    descriptors()  # removes systemd's variables from the environment, also if all listeners are named
    for place in places:
        # All of them before the first socket is opened, which could get the number of a descriptor that was not passed.
        with _named(place):
            check_inherited(place.address)
    opened: list[list[socket.socket]] = []
    with contextlib.ExitStack() as undo:
        for place in places:
            with _named(place):
                opened.append(bind(place.address, mode))
            for sock in opened[-1]:
                undo.callback(sock.close)
        undo.pop_all()
    return opened


class ListenCheck(NamedTuple):
    """A line for each address that cannot be listened on, and the addresses that are in use now."""

    problems: list[str]
    in_use: list[SocketAddress]


def check_listen(places: Sequence[ListenAddress]) -> ListenCheck:
    """Try to bind all addresses, without listening: a client would be accepted and then reset.

    An address in use is not a problem: usually the server that is about to be restarted uses it.
    """
    result = ListenCheck([problem] if (problem := clash(places)) else [], [])
    for place in places:
        try:
            with _named(place):
                if _is_in_use(place.address):
                    result.in_use.append(place.address)
        except ListenError as error:
            result.problems.append(str(error))
    return result


def clash(places: Iterable[ListenAddress]) -> str | None:
    """The error of the first two addresses that conflict, or None."""
    for one, other in itertools.combinations(places, 2):
        if one.address == other.address and not _any_port(one.address):
            if one.flag == other.flag:
                return f"{one} is given twice: remove one"
            return f"{one} and {other}: one address cannot serve both"
        for whole, part in ((one, other), (other, one)):
            if _is_part(part.address, whole.address):
                return f"{part} is part of {whole}, which is every address of this machine: remove one"
    return None


def _any_port(address: SocketAddress) -> bool:
    return address.kind == "tcp" and not address.port


def _is_part(part: SocketAddress, whole: SocketAddress) -> bool:
    both_tcp = part.kind == whole.kind == "tcp"
    return both_tcp and part.port == whole.port != 0 and bool(part.host) and not whole.host


@contextlib.contextmanager
def _named(place: ListenAddress) -> Iterator[None]:
    """Turn an OSError into a ListenError for this address."""
    try:
        yield
    except OSError as error:
        # The hints are about ports, and do not apply to a path.
        hint = _HINTS.get(error.errno or 0) if place.address.kind == "tcp" else None
        raise ListenError(f"{place}: {error.strerror or error}" + (f" ({hint})" if hint else "")) from None


def bind(address: SocketAddress, mode: int | None = None) -> list[socket.socket]:
    """Return listening, non-blocking sockets for an address: one, or one for each address of a host name.

    ``mode`` is the permissions of a Unix socket, as in chmod(2); None leaves them to the umask. Other sockets are not affected.
    Raises OSError when the address is in use, unknown or not allowed.
    """
    if address.kind == "fd":
        return [_inherited(fd) for fd in _descriptors(address)]
    sockets = [_bound_path(address.path, mode)] if address.kind == "unix" else _bound(address)
    with contextlib.ExitStack() as undo:
        for sock in sockets:
            undo.callback(sock.close)
        for sock in sockets:
            sock.listen(BACKLOG)
            sock.setblocking(False)
        undo.pop_all()
    return sockets


def resolve(host: str, port: int) -> list[tuple[int, Any]]:
    """Return the family and socket name of each address to bind for a host. Raises OSError.

    On a machine without IPv6, the IPv6 addresses of a name that also has others are left out: /etc/hosts has ::1 for localhost
    anyway.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    names: list[tuple[int, Any]] = list(dict.fromkeys((family, name) for family, _, _, _, name in found))
    others = [each for each in names if each[0] != socket.AF_INET6]
    return others if len(names) > len(others) > 0 and not _has_ipv6() else names


def _has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
            sock.bind(("::1", 0))
    except OSError:
        return False
    return True


def _bound(address: SocketAddress) -> list[socket.socket]:
    """The TCP sockets for an address, bound and not listening yet."""
    if not address.host:
        return [_bound_everywhere(address.port)]
    sockets: list[socket.socket] = []
    with contextlib.ExitStack() as undo:
        for family, name in resolve(address.host, address.port):
            sockets.append(_bound_to(family, name))
            undo.callback(sockets[-1].close)
        undo.pop_all()
    return sockets


def _bound_everywhere(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        try:
            return _bound_to(socket.AF_INET6, ("::", port), v6only=False)
        except OSError as error:
            # A kernel booted without IPv6 still claims it; then only IPv4 is available.
            if error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                raise
    return _bound_to(socket.AF_INET, ("0.0.0.0", port))


def _bound_to(family: int, name: Any, v6only: bool = True) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(v6only))
        sock.bind(name)
    except BaseException:
        sock.close()
        raise
    return sock


def _bound_path(path: str, mode: int | None) -> socket.socket:
    """A Unix socket that replaces one on which no process listens; bind() refuses every other file there."""
    if _is_socket(path) and not _has_listener(path):
        os.unlink(path)
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.bind(path)
        if mode is not None:
            os.chmod(path, mode)  # no client can connect yet
    except BaseException:
        sock.close()
        raise
    return sock


def _is_socket(path: str) -> bool:
    try:
        return stat.S_ISSOCK(os.stat(path).st_mode)
    except FileNotFoundError:
        return False


def _has_listener(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.setblocking(False)  # otherwise it waits for room in the listener's queue
        try:
            sock.connect(path)
        except ConnectionRefusedError:
            return False
        except BlockingIOError:
            pass  # a listener whose queue is full
    return True


def _is_in_use(address: SocketAddress) -> bool:
    """Whether some process listens there now. Raises OSError if none does, and it cannot be listened on either."""
    if address.kind == "fd":
        # A name has a meaning only in what systemd starts, and it passes sockets to the service alone, not to a check.
        if descriptors() or not address.name:
            check_inherited(address)
        return False
    if address.kind == "unix":
        return _is_path_in_use(os.path.abspath(address.path))
    try:
        for sock in _bound(address):
            sock.close()
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        return True
    return False


def _is_path_in_use(path: str) -> bool:
    """The same for a Unix socket, without binding it, which would create or replace a file."""
    directory = os.path.dirname(path)
    if not os.path.isdir(directory):
        raise FileNotFoundError(errno.ENOENT, f"the directory {directory} does not exist")
    if not os.access(directory, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, f"no permission to write to {directory}")
    if _is_socket(path):
        return _has_listener(path)
    if os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, "the file exists and is not a socket")
    return False


def name_of(address: SocketAddress, sock: socket.socket) -> str:
    """The listener's name in logs and metrics: as it was written, except that a port chosen by the kernel replaces port 0."""
    if address.kind == "tcp" and address.port == 0:
        host, port = sock.getsockname()[:2]
        return str(SocketAddress("tcp", host=host, port=port))
    return str(address)


def passed() -> list[SocketAddress]:
    """The sockets that systemd passes to this process: the listeners when no address is given."""
    return [SocketAddress("fd", fd=fd) for fd, _ in descriptors()]


def check_inherited(address: SocketAddress) -> None:
    """Check that the descriptor was passed, if the address is one. Raises OSError."""
    if address.kind == "fd":
        for fd in _descriptors(address):
            _inherited(fd).detach()


def _descriptors(address: SocketAddress) -> list[int]:
    if not address.name:
        return [address.fd]
    if not (found := [fd for fd, name in descriptors() if name == address.name]):
        raise OSError(errno.ENOENT, f"systemd passes no socket named {address.name}")
    return found


def _inherited(fd: int) -> socket.socket:
    try:
        sock = socket.socket(fileno=fd)
        accepting = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError as error:
        raise OSError(error.errno, f"descriptor {fd} is not an open socket") from None
    if not accepting:
        sock.detach()
        raise OSError(errno.EINVAL, f"descriptor {fd} is not a listening socket")
    sock.setblocking(False)
    sock.set_inheritable(False)
    return sock
