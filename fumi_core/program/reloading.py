"""--reload, for development: the process starts again when a file of a loaded module changes.

It replaces itself (execve), with the arguments, environment and directory of its start, so that nothing of the old modules stays.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable
from types import ModuleType
from typing import NamedTuple, NoReturn

import click

from fumi_core.program.loading import AppError
from fumi_core.program.work import CoreWork
from fumi_core.runtime.daemon_thread import start_thread
from fumi_core.runtime.logs import event, failure
from fumi_core.runtime.settings import SettingError
from fumi_core.runtime.workers import run

CHECK_SECONDS = 0.3
"""Seconds between two checks of the files. A file that still changes between two checks is being written."""
DRAIN_SECONDS = 1.0
"""Seconds that transactions get to end before a restart."""
KILL_SECONDS = 1.0
"""Seconds to wait for a process that was killed."""
_log = logging.getLogger("fumi.core")


class _Signature(NamedTuple):
    """What tells one content of a file from another."""

    changed: int
    size: int
    inode: int


class Watch:
    """The files of all loaded modules, and others; a module is watched from the first check after its import."""

    def __init__(self) -> None:
        self._known: dict[str, _Signature | None] = {}

    def add(self, files: Iterable[str] = ()) -> None:
        """Watch what is loaded now, and these files, which need not exist."""
        loaded = [vars(module).get("__file__") for module in list(sys.modules.values()) if isinstance(module, ModuleType)]
        for path in (*loaded, *files):
            if isinstance(path, str) and path not in self._known:
                self._known[path] = _signature(path)

    def changed(self) -> list[str]:
        """The files that have another content than when they were added. A file that was removed is not one of them."""
        return [path for path, known in self._known.items() if (found := _signature(path)) is not None and found != known]

    def wait(self) -> list[str]:
        """Return the changed files once there are some, and none of them changes any more."""
        before: list[tuple[str, _Signature | None]] = []
        while True:
            now = [(path, _signature(path)) for path in self.changed()]
            if now and now == before:
                return [path for path, _ in now]
            before = now
            time.sleep(CHECK_SECONDS)
            self.add()


def _signature(path: str) -> _Signature | None:
    try:
        about = os.stat(path)
    except OSError:
        return None
    return _Signature(about.st_mtime_ns, about.st_size, about.st_ino)


class _Restart:
    """Starts this process again as it was started."""

    def __init__(self) -> None:
        self._arguments = [sys.executable, *sys.orig_argv[1:]]
        self._directory = os.getcwd()
        self._environment = dict(os.environ)
        self.wanted = threading.Event()
        """Set when the process drains in order to restart."""
        self.failed = threading.Event()
        """Set when the app could not start, so that there is nothing to drain."""

    def at_once(self) -> NoReturn:
        _end_children()
        os.chdir(self._directory)
        sys.stdout.flush()
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        os.execve(sys.executable, self._arguments, self._environment)

    def after_draining(self) -> None:
        """Called in a thread: a hook may keep the event loop, or the end of the process, for as long as it likes."""
        if self.failed.is_set():
            self.at_once()
        self.wanted.set()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(DRAIN_SECONDS)
        if self.wanted.is_set():
            self.at_once()


def _end_children() -> None:
    """Kill the processes of multiprocessing, such as those of a pool: forked ones have our listening sockets."""
    from multiprocessing import active_children  # not loaded at each start of the program

    for child in active_children():
        child.kill()
        child.join(KILL_SECONDS)


def serve_reloading(ctx: click.Context) -> None:
    """Serve, and restart at each change; an app that cannot be loaded or cannot start is logged, and waits for the next change.

    Returns when a signal has stopped the program. Raises SettingError.
    """
    _check(ctx)
    restart, watch = _Restart(), Watch()
    # Compiled files are valid for a source of the same size and second: two changes within a second would be one.
    sys.dont_write_bytecode = True
    try:
        work = CoreWork(ctx)
    except AppError as error:
        watch.add(error.files)
        event(_log, logging.ERROR, "cannot load the app, waiting for a change", error=error.format_message())
        watch.wait()
        restart.at_once()
    watch.add()

    def restart_at_a_change() -> None:
        changed = watch.wait()
        event(_log, logging.INFO, "restarting", changed=",".join(changed))
        restart.after_draining()

    thread = start_thread(restart_at_a_change, "reload")
    try:
        run(work, 1)
    except SettingError:
        raise
    except Exception as error:
        failure(_log, "the app cannot start, waiting for a change", error)
        restart.failed.set()
        signal.pthread_sigmask(signal.SIG_SETMASK, ())  # so that Ctrl-C ends it
        thread.join()
    except BaseException:
        restart.wanted.clear()  # a second signal: end without a restart
        raise
    if restart.wanted.is_set():
        restart.at_once()


def _check(ctx: click.Context) -> None:
    """Raise SettingError for flags that --reload cannot be combined with."""
    settings = ctx.params
    if not settings["app"]:
        raise SettingError("--reload is for MODULE:APP, whose files it watches")
    if settings["workers"] > 1:
        raise SettingError("--reload is for one process: remove --workers")
    if settings["check"]:
        raise SettingError("--check changes and serves nothing: remove --reload")
    addresses = [*settings["listen"], *([settings["metrics"]] if settings["metrics"] else [])]
    if os.environ.get("LISTEN_FDS") or any(each.kind == "fd" for each in addresses):
        raise SettingError("--reload binds its sockets again at each restart: listen on an address, not on a passed socket")
