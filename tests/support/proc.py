"""What /proc says of a process."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

_PIDFD_GETFD = 438  # linux/unistd.h, the same for all architectures


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def memory(pid: int) -> int:
    """Resident bytes."""
    found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    assert found
    return int(found[1]) * 1024


def open_files(pid: int) -> list[str]:
    """What each descriptor of a process is, as /proc calls it; nothing of a process that has ended."""
    files: list[str] = []
    with contextlib.suppress(FileNotFoundError):
        files.extend(os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir())
    return files


def connections(pid: int) -> Iterator[socket.socket]:
    """The connected TCP sockets of a process of this user or, for root, of any: duplicates, each closed after its turn."""
    call = ctypes.CDLL(None, use_errno=True).syscall
    process = os.pidfd_open(pid)
    try:
        for name in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                if not os.readlink(f"/proc/{pid}/fd/{name}").startswith("socket:"):
                    continue
                if (fd := call(_PIDFD_GETFD, process, int(name), 0)) < 0:
                    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
                with socket.socket(fileno=fd) as sock:
                    if sock.family in (socket.AF_INET, socket.AF_INET6):
                        sock.getpeername()
                        yield sock
    finally:
        os.close(process)
