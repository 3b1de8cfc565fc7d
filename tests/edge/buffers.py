"""What the kernel still holds for a socket, and the wait until nothing moves any more."""

from __future__ import annotations

import fcntl
import struct
import termios
import time


def waiting(sock, what=termios.FIONREAD):
    """Bytes received and not read yet; with TIOCOUTQ, those sent that the other side has not read."""
    return struct.unpack("i", fcntl.ioctl(sock, what, b"\0\0\0\0"))[0]


def settled(measure, program):
    """Poll until the measure has not changed for a while, the program being idle, and return it: nobody moves any more."""
    value, since = measure(), time.monotonic()
    deadline = since + 20
    while time.monotonic() - since < 0.15 and time.monotonic() < deadline:
        time.sleep(0.01)
        if (now := measure()) != value or not program.rests():
            value, since = now, time.monotonic()
    return value
