"""The owner of a recipient's Maildir: directories and files belong to the owner of the directory that they are in.

A server that runs as root acts as that owner while it touches the owner's directories. Otherwise a user who replaces ``tmp`` or
``new`` by a symbolic link would have root write files wherever the user likes.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Owner:
    """A directory's user, group and permissions."""

    uid: int
    gid: int
    mode: int

    @classmethod
    def of(cls, directory: Path) -> Owner:
        """Raises OSError when it does not exist, or is not a directory."""
        found = os.stat(directory)
        if not stat.S_ISDIR(found.st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(directory))
        return cls(found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode))

    @contextlib.contextmanager
    def acting(self) -> Iterator[None]:
        """If this process is root: let this thread use files with the owner's permissions only. Raises PermissionError if it may
        not.

        Uses Linux's setfsuid(2), which, unlike seteuid(2), is for one thread.
        """
        if os.geteuid() != 0 or self.uid == 0:
            yield
            return
        group = os.getegid()
        try:
            _become(self.uid, self.gid)
            yield
        finally:
            _become(0, group)

    def give(self, fd: int) -> None:
        """Give an open file the directory's permissions, without execute, and its group if this process may do that."""
        os.fchmod(fd, self.mode & 0o666)
        if os.fstat(fd).st_gid != self.gid:
            with contextlib.suppress(PermissionError):  # this user is not in the group
                os.fchown(fd, -1, self.gid)

    def make_directory(self, path: Path) -> None:
        """Create a directory like this one, if it does not exist. Raises OSError."""
        try:
            path.mkdir(mode=0o700)
        except FileExistsError:
            return  # another delivery has made it
        if path.stat().st_gid != self.gid:
            with contextlib.suppress(PermissionError):
                os.chown(path, -1, self.gid)
        path.chmod(self.mode & 0o2777)


def _become(uid: int, gid: int) -> None:
    libc = ctypes.CDLL(None)
    libc.setfsgid(gid)
    libc.setfsuid(uid)
    # They report no errors; called with an invalid number they change nothing and return the present one.
    if libc.setfsuid(-1) != uid or libc.setfsgid(-1) != gid:
        raise PermissionError(errno.EPERM, "cannot act as the owner of the directory")
