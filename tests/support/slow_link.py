"""A slow, lossy cable: two taps and this process, for kernels without netem. Ends at SIGTERM.

    python -m tests.support.slow_link PID PID SECONDS LOSS

makes an interface ``slow`` in the network namespace of each process, and passes on what comes in at either after so many seconds;
of the packets a share LOSS, between 0 and 1, is lost.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import heapq
import os
import random
import select
import signal
import struct
import sys
import time
from types import FrameType
from typing import NoReturn

_TUNSETIFF, _IFF_TAP, _IFF_NO_PI = 0x400454CA, 0x0002, 0x1000  # linux/if_tun.h


def _tap(pid: int) -> int:
    """The descriptor of a new interface in the namespace of a process."""
    libc = ctypes.CDLL(None, use_errno=True)
    home = os.open("/proc/self/ns/net", os.O_RDONLY)
    away = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY)
    assert libc.setns(away, 0) == 0, os.strerror(ctypes.get_errno())
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tap, _TUNSETIFF, struct.pack("16sH", b"slow", _IFF_TAP | _IFF_NO_PI))
    assert libc.setns(home, 0) == 0, os.strerror(ctypes.get_errno())
    return tap


def _relay(one: int, other: int, seconds: float, loss: float) -> NoReturn:
    waiting: list[tuple[float, int, int, bytes]] = []
    count = 0
    while True:
        while waiting and waiting[0][0] <= time.monotonic():
            _, _, target, packet = heapq.heappop(waiting)
            with contextlib.suppress(OSError):  # the interface is down, or its queue full: a lost packet
                os.write(target, packet)
        patience = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        for source in select.select([one, other], [], [], patience)[0]:
            try:
                packet = os.read(source, 65536)
            except OSError:
                continue  # the interface is down
            if random.random() >= loss:
                count += 1
                heapq.heappush(waiting, (time.monotonic() + seconds, count, other if source == one else one, packet))


def _end(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(0)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _end)
    taps = [_tap(int(pid)) for pid in sys.argv[1:3]]
    print("ready", flush=True)
    _relay(taps[0], taps[1], float(sys.argv[3]), float(sys.argv[4]))
