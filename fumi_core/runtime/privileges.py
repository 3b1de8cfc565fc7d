"""Drops root privileges for good, once the ports are bound and the keys are read."""

from __future__ import annotations

import concurrent.futures.thread  # noqa: F401  asyncio imports it with its first thread, when the user may not read the library
import os
import pwd


class PrivilegeError(Exception):
    """A user that this process cannot switch to; the text is one line and says what to do."""


def become(name: str) -> None:
    """Switch to this user, with the user's groups and no others; no change if it is the current user. Raises PrivilegeError."""
    user = find(name)
    if user.pw_uid == os.getuid():
        return
    try:
        os.initgroups(name, user.pw_gid)
        os.setgid(user.pw_gid)
        os.setuid(user.pw_uid)
    except PermissionError:
        raise PrivilegeError(f"cannot switch to user {name}: start as root or as {name}") from None


def find(name: str) -> pwd.struct_passwd:
    """Return the user's entry. Raises PrivilegeError if there is no such user."""
    try:
        return pwd.getpwnam(name)
    except KeyError:
        raise PrivilegeError(f"user {name!r} does not exist") from None
