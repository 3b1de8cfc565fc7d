"""The protocols between systemd and a service: sd_notify(3), sd_watchdog_enabled(3) and sd_listen_fds(3).

All of them use environment variables, which are removed once read: they are for this process, and not for its children. Without
systemd they are not set, and nothing happens.
"""

from __future__ import annotations

import functools
import logging
import os
import socket
import time

from fumi_core.runtime.logs import event

log = logging.getLogger("fumi.systemd")

FIRST_DESCRIPTOR = 3
"""The first descriptor that is passed, SD_LISTEN_FDS_START."""
NOTIFY_TIMEOUT = 1.0
"""Seconds to wait while systemd is busy with other services: a handful of datagrams fills its queue."""


@functools.cache
def descriptors() -> tuple[tuple[int, str], ...]:
    """The sockets that were passed to this process, each with its name (FileDescriptorName=); the name may be empty."""
    pid, count = os.environ.pop("LISTEN_PID", ""), os.environ.pop("LISTEN_FDS", "")
    names = os.environ.pop("LISTEN_FDNAMES", "").split(":")
    if pid != str(os.getpid()) or not count.isdecimal():
        return ()
    passed = range(FIRST_DESCRIPTOR, FIRST_DESCRIPTOR + int(count))
    return tuple((fd, names[at] if at < len(names) else "") for at, fd in enumerate(passed))


class Notifier:
    """Notifies systemd of the service's state. ``interval`` is the seconds between ``alive()`` calls; None without a watchdog."""

    def __init__(self) -> None:
        """Reads NOTIFY_SOCKET, WATCHDOG_USEC and WATCHDOG_PID, and removes them from the environment."""
        path = os.environ.pop("NOTIFY_SOCKET", "")
        limit, pid = os.environ.pop("WATCHDOG_USEC", ""), os.environ.pop("WATCHDOG_PID", str(os.getpid()))
        # "@" stands for the NUL of the abstract namespace.
        self._address = "\0" + path[1:] if path.startswith("@") else path
        watched = path and limit.isdecimal() and int(limit) and pid == str(os.getpid())
        self.interval: float | None = int(limit) / 2_000_000 if watched else None

    def ready(self) -> None:
        """The service serves, or has reloaded."""
        self._send("READY=1", NOTIFY_TIMEOUT)

    def reloading(self) -> None:
        """The service is reloading its settings; ``ready()`` must follow."""
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}", NOTIFY_TIMEOUT)

    def stopping(self) -> None:
        self._send("STOPPING=1", NOTIFY_TIMEOUT)

    def alive(self) -> None:
        # The next one follows soon.
        self._send("WATCHDOG=1", 0.0)

    def _send(self, state: str, patience: float) -> None:
        """Wait up to ``patience`` seconds for room: systemd never requests a state that is sent once."""
        if not self._address:
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.settimeout(patience)
            try:
                # Only a connected socket reports when the other end has room.
                sock.connect(self._address)
                sock.send(state.encode())
            except OSError as error:
                problem = error.strerror or error
                event(log, logging.WARNING, "cannot notify systemd", state=state.partition("\n")[0], error=problem)
