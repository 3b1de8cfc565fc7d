"""fumi-core, with system calls that fail by the plan in the file ``plan`` of the current directory.

Calls on files are wrapped where Python makes them, in ``os``; only those on a Maildir count. Replies and commands are wrapped in
``socket.socket.send``.
"""

from __future__ import annotations

import os
import signal
import socket
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .plan import Plan

MAILDIR = "maildir"
HOLD = 30.0
"""Seconds after which a held call goes on in any case."""


def main(prog_name: str) -> None:
    from fumi_core import cli
    from fumi_core.client import connection
    from fumi_core.runtime import master

    # Workers are killed by the hundred here, and not because they cannot start.
    master.EARLY_DEATH_SECONDS = 0.0
    # A next hop that dies just when it is connected to may never be heard of again; see clients.BANNER.
    connection.MAIL_TIMEOUT = 4.0
    plan = Plan(Path("plan"))
    _wrap(plan, "open", lambda path, flags, *mode: _is_ours(path) and flags & os.O_CREAT)
    _wrap(plan, "unlink", lambda path: _is_ours(path))
    for name in ("link", "rename"):
        _wrap(plan, name, lambda source, target: _is_ours(target), "link")
    _wrap(plan, "write", lambda fd, data: _is_ours(_path(fd)))
    _wrap(plan, "fsync", lambda fd: not _is_directory(fd))
    _wrap(plan, "fsync", _is_directory, "directory fsync")
    _wrap_send(plan)
    cli.main(prog_name=prog_name)


def _is_ours(path: str | bytes | os.PathLike[str]) -> bool:
    return MAILDIR in os.fsdecode(path)


def _path(fd: int) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return ""


def _is_directory(fd: int) -> bool:
    return stat.S_ISDIR(os.fstat(fd).st_mode)


def _wrap(plan: Plan, name: str, concerns: Callable[..., bool], call: str = "") -> None:
    real = getattr(os, name)

    def wrapped(*arguments: Any, **keywords: Any) -> object:
        if not plan.armed_for(call or name) or not concerns(*arguments):
            return real(*arguments, **keywords)
        return _strike(plan, call or name, real, arguments, keywords)

    setattr(os, name, wrapped)


def _wrap_send(plan: Plan) -> None:
    real = socket.socket.send

    def send(self: socket.socket, data: Any, *flags: int) -> int:
        # One octet is the event loop that wakes itself.
        if len(data) == 1 or not plan.armed_for("send"):
            return real(self, data, *flags)
        sent: int = _strike(plan, "send", real, (self, data, *flags), {})
        return sent

    socket.socket.send = send  # type: ignore[assignment, method-assign]


def _strike(plan: Plan, call: str, real: Callable[..., Any], arguments: Any, keywords: Any) -> Any:
    fault = plan.strikes(call)
    if fault is None:
        return real(*arguments, **keywords)
    if fault.action == "fail":
        raise OSError(fault.error, os.strerror(fault.error))
    if fault.action == "kill before":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault.action == "shorten":
        fd, data = arguments
        return real(fd, memoryview(data)[: max(1, len(data) // 2)])
    if fault.action == "hold":
        deadline = time.monotonic() + HOLD
        while not plan.released and time.monotonic() < deadline:
            time.sleep(0.001)
    result = real(*arguments, **keywords)
    if fault.action == "kill after":
        os.kill(os.getpid(), signal.SIGKILL)
    return result
