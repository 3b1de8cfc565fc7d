"""Which messages are being delivered at this moment, by all workers: a byte of a file is locked for each (fcntl(2), F_SETLK).

The kernel frees the locks of a process that dies, and all of them when it closes any descriptor of the file. The first 8 bytes of
the file change with every reply that is remembered, so that a worker sees without a query of the database that nothing was
added.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path

_STAMP_BYTES = 8


class MessageLocks:
    """The file ``path``, which each worker opens when it first needs it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = -1
        self._held: set[bytes] = set()

    def acquire(self, digest: bytes) -> bool:
        """Lock the message with this digest; False if it is locked already. Raises OSError."""
        if digest in self._held or not self._lock(digest):
            return False
        self._held.add(digest)
        return True

    def is_free(self, digest: bytes) -> bool:
        """Whether this message is not locked. Raises OSError."""
        if digest in self._held or not self._lock(digest):
            return False
        self._unlock(digest)
        return True

    def release(self, digest: bytes) -> None:
        self._held.discard(digest)
        with contextlib.suppress(OSError):  # the lock ends with the process
            self._unlock(digest)

    def stamp(self) -> bytes:
        """Raises OSError."""
        return os.pread(self._file(), _STAMP_BYTES, 0)

    def change_stamp(self) -> None:
        """Raises OSError."""
        os.pwrite(self._file(), os.urandom(_STAMP_BYTES), 0)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _lock(self, digest: bytes) -> bool:
        try:
            fcntl.lockf(self._file(), fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _offset(digest))
        except (BlockingIOError, PermissionError):  # POSIX allows either
            return False
        return True

    def _unlock(self, digest: bytes) -> None:
        fcntl.lockf(self._file(), fcntl.LOCK_UN, 1, _offset(digest))

    def _file(self) -> int:
        if self._fd < 0:
            self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        return self._fd


def _offset(digest: bytes) -> int:
    """The position of the message's byte; it need not exist in the file."""
    return _STAMP_BYTES + (int.from_bytes(digest[:8], "big") >> 2)
