"""A program from its first socket to its last reply: alone in one process, or one of several workers.

No signal is lost on the way: from before the first socket is bound they wait until somebody is there who heeds them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import signal
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from enum import IntEnum
from typing import Any, NoReturn, Protocol

import click
from prometheus_client import CollectorRegistry

from fumi_core.runtime.daemon_thread import start_thread
from fumi_core.runtime.logs import event
from fumi_core.runtime.metrics_server import MetricsServer, Page, Problem
from fumi_core.runtime.scoreboard import ConnectionCount, Scoreboard, WorkerState
from fumi_core.runtime.systemd import Notifier

STOPS = (signal.SIGTERM, signal.SIGINT)
TIDY_TIMEOUT = 2.0
"""Seconds that a process may take to end once it has drained, or was told to end at once."""
_ending = threading.Event()
"""Set when the process tidies up, and will end within TIDY_TIMEOUT."""
HELD = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGCHLD)


class Incomplete(Exception):
    """A reload that changed what it could: the message says what stays as it was."""


class Outcome(IntEnum):
    """What became of a reload. After FAILED everything is as it was."""

    FAILED = 0
    PARTLY = 1
    DONE = 2


class Work(Protocol):
    """What a program does, alone or in each worker. It is made before there is a thread, an event loop or a second process."""

    log: logging.Logger

    @property
    def registry(self) -> CollectorRegistry:
        """All metrics, of this process alone."""

    @property
    def metrics_sockets(self) -> Sequence[socket.socket]:
        """Where the metrics are served; none for nowhere."""

    @property
    def drain_timeout(self) -> float:
        """Seconds that ``close()`` may take."""

    def bind(self) -> None:
        """Open all listening sockets. Raises SettingError."""

    def unbind(self) -> None:
        """Close the listening sockets, in a process that does not serve them."""

    async def start(self, connection_count: ConnectionCount) -> None:
        """Serve them in the running event loop; ``connection_count`` counts the connections."""

    async def close(self) -> None:
        """Stop accepting and drain."""

    async def reload(self) -> Iterable[str]:
        """Take over new settings; returns those that need a restart. Raises ClickException, and then everything stays as it was,
        or Incomplete.

        Called in processes that do not serve, too, to which it may be news later: those that fork workers.
        """

    def pages(self, registry: CollectorRegistry, ready: Problem) -> Mapping[str, Page]:
        """What is served beside the metrics and by whom they are: ``registry`` holds those of all workers.

        Called once, in the process that serves them, which may have threads.
        """

    def trouble(self) -> str | None:
        """Why this worker cannot serve, from memory and at once; or None."""

    def problem(self) -> str | None:
        """Why none could, or None. It asks the next hop or the backends, which may take seconds, and is called in a thread."""


def raise_descriptor_limit() -> None:
    """Take all the descriptors the kernel will give: each connection is one, or two."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Some kernels refuse an unlimited soft limit; the old one then stays.
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def ignore_user_signals() -> None:
    """Let SIGUSR1 and SIGUSR2 do nothing, where they would end the process: to others they are a soft stop, or a new log.

    Called before an app is imported, which may have a use for them.
    """
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def hold_reloads() -> None:
    """Let SIGHUP wait until ``heed()``: while an app is imported or certificates are loaded it would end the process.

    A stop need not wait: nothing is served yet.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})


def hold_signals() -> None:
    """Let signals wait from here on until ``heed()``."""
    signal.pthread_sigmask(signal.SIG_BLOCK, HELD)


def heed(handlers: Mapping[signal.Signals, Callable[[], object]]) -> None:
    """Have the running loop call these, and let the signals that waited come."""
    loop = asyncio.get_running_loop()
    for number, handler in handlers.items():
        loop.add_signal_handler(number, handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD)


async def reload(work: Work, quiet: bool = False) -> Outcome:
    """Reload, and log what went wrong; unless ``quiet``, also what could be reloaded in part only or needs a restart."""
    try:
        skipped = sorted(await work.reload())
    except click.ClickException as error:
        problem = " ".join(error.format_message().split())
        event(work.log, logging.ERROR, "not reloaded: the old settings stay", error=problem)
        return Outcome.FAILED
    except Incomplete as error:
        if not quiet:
            event(work.log, logging.ERROR, "reloaded in part", error=error)
        return Outcome.PARTLY
    except Exception:
        # A fault of ours; the program it is in serves on, with what it had.
        work.log.exception("reload failed")
        return Outcome.FAILED
    if skipped and not quiet:
        event(work.log, logging.WARNING, "these changes need a restart", settings=",".join(skipped))
    return Outcome.DONE


async def alone(work: Work, notifier: Notifier, stops: Sequence[signal.Signals]) -> None:
    """Work until one of these signals, then drain. A second one ends the process at once, whatever it is doing."""
    loop = asyncio.get_running_loop()
    stopped: asyncio.Future[signal.Signals] = loop.create_future()
    slot = (board := Scoreboard(1)).slots[0]

    is_stopping = False

    def stop(number: int, frame: object) -> None:
        # Not a handler of the loop: the second signal must not wait for a loop that a hook keeps busy.
        nonlocal is_stopping
        if is_stopping:
            leave(number, frame)
        is_stopping = True
        loop.call_soon_threadsafe(begin_to_stop, signal.Signals(number))

    def begin_to_stop(number: signal.Signals) -> None:
        # A second signal may have cancelled it meanwhile.
        if not stopped.done():
            stopped.set_result(number)

    async def take_over() -> None:
        if stopped.done():
            return
        notifier.reloading()
        if await reload(work) is Outcome.DONE:
            event(work.log, logging.INFO, "reloaded")
        if not stopped.done():
            notifier.ready()

    def problem() -> str | None:
        return board.problem() or work.trouble() or work.problem()

    await work.start(slot.connection_count)
    slot.state = WorkerState.SERVING
    endpoint = serve_metrics(work, work.registry, problem)
    notifier.ready()
    for each in stops:
        signal.signal(each, stop)
    heed({} if signal.SIGHUP in stops else {signal.SIGHUP: in_turn(take_over)})
    with every(notifier.interval, notifier.alive):
        number = await stopped
        event(work.log, logging.INFO, "stopping", signal=number.name)
        slot.state = WorkerState.DRAINING
        notifier.stopping()
        await work.close()
    end_within(TIDY_TIMEOUT, 0)
    if endpoint is not None:
        await asyncio.to_thread(endpoint.close)


def serve_metrics(work: Work, registry: CollectorRegistry, ready: Problem) -> MetricsServer | None:
    """Serve what is in the registry, where the program is to do so at all."""
    if not work.metrics_sockets:
        return None
    return MetricsServer(work.metrics_sockets, registry, ready=ready, pages=work.pages(registry, ready))


def in_turn(act: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    """Return a function that runs ``act`` in the running loop, never twice at once.

    Calls during a run cause exactly one further run, however many there were: it sees everything that changed before it began.
    """
    running: asyncio.Task[None] | None = None
    wanted = False

    async def work() -> None:
        nonlocal wanted
        while wanted:
            wanted = False
            await act()

    def start() -> None:
        nonlocal running, wanted
        wanted = True
        if running is None or running.done():
            running = asyncio.get_running_loop().create_task(work())

    return start


@contextlib.contextmanager
def every(seconds: float | None, act: Callable[[], None]) -> Iterator[None]:
    """Call it now and then, for the length of the block; not at all when there is no interval."""
    if seconds is None:
        yield
        return
    loop = asyncio.get_running_loop()
    timer: asyncio.Handle

    def again() -> None:
        nonlocal timer
        act()
        timer = loop.call_later(seconds, again)

    timer = loop.call_soon(again)
    try:
        yield
    finally:
        timer.cancel()


def leave(number: int, frame: object) -> NoReturn:
    """End at once: by way of an exception, so that what is to be tidied up is, within a time; without, where that has begun."""
    if _ending.is_set():
        os._exit(128 + number)
    end_within(TIDY_TIMEOUT, 128 + number)
    raise Left(128 + number)


class Left(KeyboardInterrupt):
    """Raised by a signal, wherever the process is just then; the argument is the exit status.

    No SystemExit, which a hook may raise, and which ends nothing there.
    """


def end_within(seconds: float, status: int) -> None:
    """End the process with this exit status if it has not ended by itself in so many seconds.

    Python waits at its end for every thread that is not a daemon: one that a hook has left in a system call may take for ever.
    """

    def end() -> None:
        time.sleep(seconds)
        os._exit(status)

    _ending.set()
    with contextlib.suppress(OSError):  # no thread is left to be had, so there is none to wait for
        start_thread(end, "end")
