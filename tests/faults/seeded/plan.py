"""Which system call fails, and how: a page of memory that the test writes and every process of the program reads.

The test arms one fault: the call, how many of that call go well before, what happens then and how often. The processes of the
program count the calls together.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

CALLS = ("", "open", "write", "fsync", "link", "unlink", "directory fsync", "send")
"""``send`` is each reply to a client and each command to a next hop; the others are those on files of a Maildir,
``link`` whichever call it is by which a file gets into new/."""
ACTIONS = ("fail", "kill before", "kill after", "shorten", "hold")

_PAGE = struct.Struct("=BBxxiiiii")


class Fault(NamedTuple):
    """``after`` calls go well, then ``times`` of them do not. ``error`` is the errno of an action that fails."""

    call: str
    action: str
    after: int = 0
    times: int = 1
    error: int = errno.EIO


class Plan:
    """The page, in the test and in each process."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        os.ftruncate(self._file, mmap.PAGESIZE)
        self._page = mmap.mmap(self._file, mmap.PAGESIZE)
        self._threads = threading.Lock()

    def close(self) -> None:
        self._page.close()
        os.close(self._file)

    # The test's side

    def arm(self, fault: Fault) -> None:
        call, action = CALLS.index(fault.call), ACTIONS.index(fault.action)
        with self._locked():
            self._write(call, action, fault.after, fault.times, fault.error, 0, 0)

    def disarm(self) -> int:
        """Let every call go well, and every held one go on. Returns how often the fault struck."""
        with self._locked():
            struck = self._read()[5]
            self._write(0, 0, 0, 0, 0, struck, 1)
            return struck

    @property
    def struck(self) -> int:
        return self._read()[5]

    # The program's side

    def armed_for(self, call: str) -> bool:
        """Whether it is worth asking."""
        return self._page[0] == CALLS.index(call)

    def strikes(self, call: str) -> Fault | None:
        """Called for each call: the fault, where it is this call's turn."""
        with self._locked():
            number, action, after, times, error, struck, released = self._read()
            if CALLS[number] != call:
                return None
            if after > 0:
                self._write(number, action, after - 1, times, error, struck, released)
                return None
            self._write(number if times > 1 else 0, action, 0, times - 1, error, struck + 1, released)
            return Fault(call, ACTIONS[action], error=error)

    @property
    def released(self) -> bool:
        """Whether a call that is held may go on."""
        return bool(self._read()[6])

    # Both

    def _read(self) -> tuple[int, ...]:
        return _PAGE.unpack_from(self._page)

    def _write(self, *values: int) -> None:
        _PAGE.pack_into(self._page, 0, *values)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Between threads, and between processes: a lock of lockf() is a process's, also after a fork, and ends with it."""
        with self._threads:
            fcntl.lockf(self._file, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.lockf(self._file, fcntl.LOCK_UN)
