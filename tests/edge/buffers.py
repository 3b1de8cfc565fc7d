"""What the kernel still holds for a socket, and the wait until nothing moves any more."""

from __future__ import annotations

import fcntl
import socket
import struct
import termios
import time
from collections.abc import Callable
from typing import TypeVar

from tests.edge.program import Program

T = TypeVar("T")


def waiting(sock: socket.socket, what: int = termios.FIONREAD) -> int:
    """Bytes received and not read yet; with TIOCOUTQ, those sent that the other side has not read."""
    (count,) = struct.unpack("i", fcntl.ioctl(sock, what, b"\0\0\0\0"))
    return int(count)


def settled(measure: Callable[[], T], program: Program) -> T:
    """Poll until the measure has not changed for a while, the program being idle, and return it: no more bytes move."""
    value, since = measure(), time.monotonic()
    deadline = since + 20
    while time.monotonic() - since < 0.15 and time.monotonic() < deadline:
        time.sleep(0.01)
        if (now := measure()) != value or not program.rests():
            value, since = now, time.monotonic()
    return value
