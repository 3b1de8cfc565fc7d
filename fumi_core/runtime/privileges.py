"""Giving up root for good, once the ports are bound and the keys are read."""

from __future__ import annotations

import concurrent.futures.thread  # noqa: F401  asyncio imports it with its first thread, when the user may not read the library
import os
import pwd


class PrivilegeError(Exception):
    """A user that this process cannot become; the text is one line and says what to do."""


def become(name: str) -> None:
    """Become this user, with the user's groups and no others; whoever is that user stays. Raises PrivilegeError."""
    user = find(name)
    if user.pw_uid == os.getuid():
        return
    try:
        os.initgroups(name, user.pw_gid)
        os.setgid(user.pw_gid)
        os.setuid(user.pw_uid)
    except PermissionError:
        raise PrivilegeError(f"cannot become {name}: start as root, or as {name}") from None


def find(name: str) -> pwd.struct_passwd:
    """Raises PrivilegeError for a user that does not exist."""
    try:
        return pwd.getpwnam(name)
    except KeyError:
        raise PrivilegeError(f"there is no user {name!r}") from None
