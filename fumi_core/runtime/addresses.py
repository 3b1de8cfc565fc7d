"""Addresses as an operator writes them, and the sockets for them.

``HOST:PORT``, ``[V6]:PORT``, ``:PORT`` (every interface), ``unix:/path``, ``fd:N`` (a socket inherited from the parent),
``fd:NAME`` (the sockets that systemd passes under that name).
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from typing import Any, Literal

from fumi_core.runtime.systemd import descriptors

_FD_NAME = re.compile(r"[!-9;-~]{1,255}")

_MAPPED = b"\0" * 10 + b"\xff\xff"  # the first 96 bits of an IPv4-mapped address

THIS_HOST = ("127.0.0.0/8", "::1/128", "unix")
"""The networks of peers on this host, for ``Networks``."""
BACKLOG = 4096
"""Connections the kernel may queue before accept; it caps this at net.core.somaxconn."""
_HINTS = {
    errno.EACCES: "ports below 1024 need root or CAP_NET_BIND_SERVICE",
    errno.EADDRINUSE: "another process has it; stop that one or choose another address",
    errno.EADDRNOTAVAIL: "this machine has no such address",
}


@dataclass(frozen=True, slots=True)
class SocketAddress:
    """An address to listen on or connect to. ``host`` is empty for every interface; ``name`` is systemd's for ``fd``."""

    kind: Literal["tcp", "unix", "fd"]
    host: str = ""
    port: int = 0
    path: str = ""
    fd: int = -1
    name: str = ""

    def __str__(self) -> str:
        if self.kind == "unix":
            return f"unix:{self.path}"
        if self.kind == "fd":
            return f"fd:{self.name or self.fd}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_address(text: str) -> SocketAddress:
    """Parse ADDR. The message of the ValueError says what is wrong."""
    scheme, _, rest = text.partition(":")
    if scheme == "unix":
        if not rest or "\0" in rest:
            raise ValueError(f"{text!r} has no path: write unix:/path/to/socket")
        if len(os.fsencode(rest)) > 107:
            raise ValueError(f"{text!r} is too long: the path of a Unix socket has at most 107 bytes")
        return SocketAddress("unix", path=rest)
    if scheme == "fd":
        if not rest.isdecimal():
            if not _FD_NAME.fullmatch(rest):
                raise ValueError(f"{text!r} names no descriptor: write fd:3, or fd:NAME for one that systemd passes")
            return SocketAddress("fd", name=rest)
        if int(rest) > 2**31 - 1:
            raise ValueError(f"{text!r} is no descriptor: the number is too great")
        return SocketAddress("fd", fd=int(rest))
    host, colon, port = text.rpartition(":")
    if not colon or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"{text!r} is not an address: write HOST:PORT, [V6]:PORT, :PORT, unix:/path or fd:N")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ValueError(f"{text!r} is ambiguous: write an IPv6 address in brackets, as in [::1]:{port}")
    try:
        host.encode("idna")
    except UnicodeError:
        raise ValueError(f"{text!r}: {host!r} is not a host name") from None
    return SocketAddress("tcp", host=host, port=int(port))


def bind(address: SocketAddress, mode: int | None = None) -> list[socket.socket]:
    """Return listening, non-blocking sockets for an address: one, or one for each address of a host name.

    ``mode`` is the permissions of a Unix socket, as in chmod(2); None leaves them to the umask. Other sockets are not affected.
    Raises OSError when the address is in use, unknown or not allowed.
    """
    if address.kind == "fd":
        return [_inherited(fd) for fd in _descriptors(address)]
    if address.kind == "unix":
        return [_listen(socket.AF_UNIX, address.path, mode=mode)]
    if not address.host:
        return [_listen_everywhere(address.port)]
    sockets: list[socket.socket] = []
    with contextlib.ExitStack() as undo:
        for family, name in resolve(address.host, address.port):
            sockets.append(_listen(family, name))
            undo.callback(sockets[-1].close)
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


def is_taken(address: SocketAddress) -> bool:
    """Whether some process listens there now, such as a server that is about to be restarted. Never listens itself."""
    if address.kind == "fd":
        return False
    if address.kind == "unix":
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(address.path) == 0
    hosts = [address.host] if address.host else ["0.0.0.0", *(["::"] if _has_ipv6() else [])]
    return any(_is_taken(family, name) for host in hosts for family, name in resolve(host, address.port))


def _is_taken(family: int, name: Any) -> bool:
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        try:
            sock.bind(name)
        except OSError as error:
            return error.errno == errno.EADDRINUSE
    return False


def _has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
            sock.bind(("::1", 0))
    except OSError:
        return False
    return True


def check_inherited(address: SocketAddress) -> None:
    """Check that the descriptor was passed, if the address is one. Call it before opening a socket, which could get that number.

    Raises OSError.
    """
    if address.kind == "fd":
        for fd in _descriptors(address):
            _inherited(fd).detach()


def explain(error: OSError) -> str:
    """Why an address cannot be bound, and what to do about it."""
    hint = _HINTS.get(error.errno or 0)
    return (error.strerror or str(error)) + (f" ({hint})" if hint else "")


def name_of(address: SocketAddress, sock: socket.socket) -> str:
    """The listener's name in logs and metrics: as it was written, except that a port chosen by the kernel replaces port 0."""
    if address.kind == "tcp" and address.port == 0:
        host, port = sock.getsockname()[:2]
        return str(SocketAddress("tcp", host=host, port=port))
    return str(address)


def passed() -> list[SocketAddress]:
    """The sockets that systemd passes to this process: the listeners when no address is given."""
    return [SocketAddress("fd", fd=fd) for fd, _ in descriptors()]


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


def _listen_everywhere(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        try:
            return _listen(socket.AF_INET6, ("::", port), v6only=False)
        except OSError as error:
            # A kernel booted without IPv6 still claims it; then only IPv4 is available.
            if error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                raise
    return _listen(socket.AF_INET, ("0.0.0.0", port))


def _listen(family: int, name: Any, v6only: bool = True, mode: int | None = None) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        if family == socket.AF_UNIX:
            _remove_stale(name)
        else:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(v6only))
        sock.bind(name)
        if mode is not None:
            os.chmod(name, mode)  # nobody can connect yet
        sock.listen(BACKLOG)
        sock.setblocking(False)
    except BaseException:
        sock.close()
        raise
    return sock


def _remove_stale(path: str) -> None:
    """Unlink a socket on which nobody listens any more; leave everything else for bind() to refuse."""
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            return
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)


def peer_of(name: Any) -> tuple[str, int]:
    """(host, port) from a getpeername() result: ("unix", 0) for a Unix socket, IPv4 for an IPv4-mapped IPv6 address."""
    if not isinstance(name, tuple):
        return "unix", 0
    return unmapped(name[0].partition("%")[0]), name[1]


def unmapped(host: str) -> str:
    """The IPv4 address of an IPv4-mapped IPv6 address (RFC 4291 §2.5.5.2), in any spelling; other hosts unchanged."""
    if ":" not in host:
        return host
    try:
        octets = socket.inet_pton(socket.AF_INET6, host)
    except (OSError, ValueError):
        return host
    return socket.inet_ntop(socket.AF_INET, octets[12:]) if octets[:12] == _MAPPED else host


def block_of(host: str, *, ipv4: int, ipv6: int) -> str:
    """The CIDR block of this many bits that contains a host, for counting clients by block; ``unix`` for every Unix socket."""
    host = unmapped(host)
    try:
        bits = ipv4 if ip_address(host).version == 4 else ipv6
        return str(ip_network((host, bits), strict=False))
    except ValueError:
        return "unix"


class Networks:
    """A set of CIDR blocks, and ``unix`` for every peer on a Unix socket; ``host in networks`` takes microseconds.

    IPv4-mapped IPv6 addresses and blocks are treated as the IPv4 addresses and blocks that they map.
    """

    __slots__ = ("_blocks", "_unix")

    def __init__(self, texts: Iterable[str]) -> None:
        """Raises ValueError for a string that is not a network, an address or ``unix``."""
        self._unix = False
        self._blocks: list[tuple[int, int, int]] = []
        for text in texts:
            if text == "unix":
                self._unix = True
                continue
            try:
                network = ip_network(text)
            except ValueError as error:
                raise ValueError(f"{text!r} is not a network: write 192.0.2.0/24, 2001:db8::/32 or unix ({error})") from None
            if network.version == 6 and network.prefixlen >= 96 and network.network_address.ipv4_mapped is not None:
                network = ip_network((unmapped(str(network.network_address)), network.prefixlen - 96))
            self._blocks.append((network.version, int(network.network_address), int(network.netmask)))

    def __contains__(self, host: str) -> bool:
        if host == "unix":
            return self._unix
        host = unmapped(host)
        version, family = (6, socket.AF_INET6) if ":" in host else (4, socket.AF_INET)
        try:
            number = int.from_bytes(socket.inet_pton(family, host), "big")
        except (OSError, ValueError):
            return False  # not an address: a Unix socket's path
        return any(kind == version and number & mask == network for kind, network, mask in self._blocks)
