"""Checks before the start: listeners that conflict or cannot be bound, and files that --user cannot read.

An address in use is not a problem: usually a running edge uses it, and this is the check before its restart.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import socket
import stat
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from fumi_core.runtime.addresses import SocketAddress, bind, resolve
from fumi_core.runtime.privileges import find

_ACL = "system.posix_acl_access"


class ListenAddress(NamedTuple):
    """An address to listen on, and its flag."""

    flag: str
    address: SocketAddress

    def __str__(self) -> str:
        return f"{self.flag} {self.address}"


def clash(places: Iterable[ListenAddress]) -> str | None:
    """A message about the first two addresses that cannot both be listened on, or None."""
    for one, other in itertools.combinations(places, 2):
        if one.address == other.address and not _any_port(one.address):
            if one.flag == other.flag:
                return f"{one} is given twice"
            return f"{one} and {other}: one address cannot serve both"
        for whole, part in ((one, other), (other, one)):
            if _is_part(part.address, whole.address):
                return f"{whole} is every address of this machine, and {part} one of them"
    return None


def _any_port(address: SocketAddress) -> bool:
    return address.kind == "tcp" and not address.port


def _is_part(part: SocketAddress, whole: SocketAddress) -> bool:
    both_tcp = part.kind == whole.kind == "tcp"
    return both_tcp and part.port == whole.port != 0 and bool(part.host) and not whole.host


class ListenCheck(NamedTuple):
    """A line for each address that cannot be listened on, and the addresses that are in use now."""

    problems: list[str]
    taken: list[SocketAddress]


def check_listen(places: Iterable[ListenAddress]) -> ListenCheck:
    """Try to bind all addresses, without listening: a client would be accepted and then reset."""
    result = ListenCheck([], [])
    for flag, address in places:
        try:
            _try(address)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                result.taken.append(address)
            else:
                result.problems.append(f"cannot listen on {flag} {address}: {error.strerror or error}")
    return result


def _try(address: SocketAddress) -> None:
    if address.kind == "fd":
        for sock in bind(address):
            sock.detach()
    elif address.kind == "unix":
        _try_path(os.path.abspath(address.path))
    else:
        for family, name in resolve(address.host or "0.0.0.0", address.port):
            with socket.socket(family, socket.SOCK_STREAM) as sock:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                sock.bind(name)


def _try_path(path: str) -> None:
    """Check the path of a Unix socket without binding it, which would leave a file or replace one. Raises OSError."""
    directory = os.path.dirname(path)
    if not os.path.isdir(directory):
        raise FileNotFoundError(errno.ENOENT, f"there is no directory {directory}")
    if not os.access(directory, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, f"no permission to write to {directory}")
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            raise FileExistsError(errno.EEXIST, "the file exists and is not a socket")


def unreadable(name: str, paths: Iterable[str]) -> list[str]:
    """The files and directories that a user cannot read according to owners and modes. Raises PrivilegeError."""
    user = find(name)
    if user.pw_uid == 0:
        return []
    groups = os.getgrouplist(name, user.pw_gid)
    return [path for path in paths if not _readable(path, user.pw_uid, groups)]


def _readable(path: str, uid: int, groups: Sequence[int]) -> bool:
    return _allowed(path, 4, uid, groups) and all(_allowed(each, 1, uid, groups) for each in _way(path))


def _way(path: str) -> set[str]:
    """All parent directories of a path and, if it is a link, of its target."""
    way: set[str] = set()
    for each in (os.path.abspath(path), os.path.realpath(path)):
        while each != (each := os.path.dirname(each)):
            way.add(each)
    return way


def _allowed(path: str, right: int, uid: int, groups: Sequence[int]) -> bool:
    """Whether the mode grants a right (4 to read, 1 to enter a directory). True when this is unknown, as with an ACL."""
    try:
        found = os.stat(path)
        with contextlib.suppress(OSError):
            if _ACL in os.listxattr(path):
                return True
    except OSError:
        return True
    shift = 6 if found.st_uid == uid else 3 if found.st_gid in groups else 0
    return bool(found.st_mode >> shift & right)
