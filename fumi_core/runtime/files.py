"""Reads files that may be anything: regular files only, of a limited size, and within a time limit.

A FIFO, or a network file system whose server is down, would block its reader for ever, and nothing interrupts a system call on
such a file system. So the call is made in a thread, which is abandoned when it does not return in time. While one call hangs, the
next call for the same place fails at once, and the number of hanging threads is limited.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Callable
from typing import TypeVar

from fumi_core.runtime.daemon_thread import start_thread

T = TypeVar("T")

FILE_TIMEOUT = 5.0
"""Seconds that a file system has to answer."""
MAX_FILE_BYTES = 4 << 20
"""Size limit of a file, in bytes. The certificates of all public CAs together take a quarter of a megabyte."""
MAX_HANGING_THREADS = 16
"""Threads that may hang at once."""

_hanging: dict[str, threading.Thread] = {}
_lock = threading.Lock()


def read_file(path: str | os.PathLike[str]) -> bytes:
    """Return the content of a regular file. Raises OSError, with an ``strerror`` that fits after "cannot read the file: "."""
    return in_time(os.path.dirname(os.path.abspath(path)), lambda: _read(path))


def in_time(place: str, act: Callable[[], T]) -> T:
    """Return what ``act()`` returns. Raises what it raises; TimeoutError after FILE_TIMEOUT, or when another hangs in ``place``.

    ``place`` names what may hang, such as the path of a directory.
    """
    results: list[T] = []
    errors: list[Exception] = []

    def work() -> None:
        try:
            results.append(act())
        except Exception as error:
            errors.append(error)

    _refuse_hanging(place)
    thread = start_thread(work, "file")
    thread.join(FILE_TIMEOUT)
    if thread.is_alive():
        with _lock:
            _hanging[place] = thread
        raise _timeout()
    if errors:
        raise errors[0]
    return results[0]


def _refuse_hanging(place: str) -> None:
    with _lock:
        for each in [each for each, thread in _hanging.items() if not thread.is_alive()]:
            del _hanging[each]
        if place in _hanging or len(_hanging) >= MAX_HANGING_THREADS:
            raise _timeout()


def _timeout() -> TimeoutError:
    return TimeoutError(errno.ETIMEDOUT, f"no answer within {FILE_TIMEOUT:g} seconds; the file system may hang")


def _read(path: str | os.PathLike[str]) -> bytes:
    # Checked before it is opened: to open a FIFO or a device may have an effect of its own.
    _check_regular(os.stat(path))
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    with open(fd, "rb") as file:
        _check_regular(os.fstat(fd))
        data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise OSError(errno.EFBIG, f"it is larger than {MAX_FILE_BYTES >> 20} MiB")
    return data


def _check_regular(found: os.stat_result) -> None:
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(found.st_mode):
        raise NotRegularError(errno.EINVAL, "it is not a regular file")


class NotRegularError(OSError):
    """A FIFO, a socket or a device."""
