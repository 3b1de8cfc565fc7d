"""Runs a program from its first socket to its last reply: in one process, or as several workers.

No signal is lost on the way: signals are blocked before the first socket is bound, and delivered once handlers are installed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from enum import IntEnum
from typing import Any, NoReturn, Protocol

import click
from prometheus_client import CollectorRegistry

from fumi_core.runtime.daemon_thread import start_thread
from fumi_core.runtime.journal import journal
from fumi_core.runtime.logs import configure, event
from fumi_core.runtime.metrics_server import MetricsServer, Page
from fumi_core.runtime.overview import Facts, Overview, Worker
from fumi_core.runtime.scoreboard import ConnectionCount, Scoreboard, Slot, WorkerState
from fumi_core.runtime.systemd import Notifier
from fumi_core.runtime.totals import register_restarts

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
CLEANUP_TIMEOUT = 2.0
"""Seconds that a process may take to end after it has drained, or after a signal to end at once."""
DRAIN_NOTICE_SECONDS = 0.2
"""Seconds after which a stop logs that connections are still open."""
_draining = threading.Event()
"""Set when the process has begun to drain."""
_ending = threading.Event()
"""Set when the process has begun to clean up; it then ends within CLEANUP_TIMEOUT."""
HELD_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGCHLD)


class Incomplete(Exception):
    """A reload that changed only some settings; the message says which ones keep their old values."""


class Outcome(IntEnum):
    """The result of a reload. After FAILED all settings are unchanged."""

    FAILED = 0
    PARTLY = 1
    DONE = 2


class Work(Protocol):
    """What a program does, alone or in each worker. It is created before any thread, event loop or second process exists."""

    log: logging.Logger
    metric_prefix: str
    """What the names of its metrics begin with, without the underscore."""

    @property
    def registry(self) -> CollectorRegistry:
        """All metrics, of this process only."""

    @property
    def metrics_sockets(self) -> Sequence[socket.socket]:
        """The listening sockets for the metrics; empty when metrics are not served."""

    @property
    def drain_timeout(self) -> float:
        """Seconds that ``close()`` may take."""

    def bind(self) -> None:
        """Open all listening sockets. Raises SettingError."""

    def unbind(self) -> None:
        """Close the listening sockets, in a process that does not serve clients."""

    async def start(self, connection_count: ConnectionCount) -> None:
        """Serve the listening sockets in the running event loop; ``connection_count`` counts the connections."""

    async def close(self) -> None:
        """Stop accepting and drain."""

    async def reload(self) -> Iterable[str]:
        """Apply new settings. Returns the settings that need a restart. Raises ClickException when nothing was changed, or
        Incomplete.

        Also called, possibly later, in processes that do not serve clients: those that fork workers.
        """

    def facts(self) -> Facts:
        """What this worker reports for the status page. Cheap, from memory, and called in any thread."""

    def pages(self, overview: Overview) -> Mapping[str, Page]:
        """The pages served beside the metrics. Called once, in the process that serves the pages, which may have threads."""

    def local_problem(self) -> str | None:
        """Why this worker cannot serve, or None. Cheap: answers from memory."""

    def dependency_problem(self) -> str | None:
        """Why no worker could serve, or None. Asks the next hop or the backends, may take seconds, and is called in a thread."""


def prepare(log_format: str, log_level: str) -> None:
    """What both programs do before an app is imported or certificates are loaded: log, descriptors, signals."""
    configure(log_format, log_level)
    raise_descriptor_limit()
    ignore_user_signals()
    hold_reloads()


def raise_descriptor_limit() -> None:
    """Raise the descriptor limit to the kernel's maximum: each connection takes one descriptor, or two."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Some kernels refuse an unlimited soft limit; the old limit then stays.
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def ignore_user_signals() -> None:
    """Ignore SIGUSR1 and SIGUSR2, which would end the process: other programs use them for a soft stop or to reopen a log.

    Called before an app is imported, since the app may handle these signals itself.
    """
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def hold_reloads() -> None:
    """Block SIGHUP until ``handle_signals()``: while an app is imported or certificates are loaded it would end the process.

    Stop signals are not blocked: nothing is served yet.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})


def hold_signals() -> None:
    """Block signals until ``handle_signals()``."""
    signal.pthread_sigmask(signal.SIG_BLOCK, HELD_SIGNALS)


def handle_signals(handlers: Mapping[signal.Signals, Callable[[], object]]) -> None:
    """Have the running loop call these handlers, then unblock signals, so that blocked ones are delivered."""
    loop = asyncio.get_running_loop()
    for number, handler in handlers.items():
        loop.add_signal_handler(number, handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD_SIGNALS)


async def reload(work: Work, quiet: bool = False) -> Outcome:
    """Reload, and log errors; unless ``quiet``, also log what was reloaded only in part or needs a restart."""
    try:
        skipped = sorted(await work.reload())
    except click.ClickException as error:
        problem = " ".join(error.format_message().split())
        event(work.log, logging.ERROR, "reload failed: the old settings stay in use", error=problem)
        return Outcome.FAILED
    except Incomplete as error:
        if not quiet:
            event(work.log, logging.ERROR, "reloaded in part", error=error)
        return Outcome.PARTLY
    except Exception:
        # A bug of ours; the program goes on with its old settings.
        work.log.exception("reload failed")
        return Outcome.FAILED
    if skipped and not quiet:
        event(work.log, logging.WARNING, "settings changed that need a restart", settings=",".join(skipped))
    return Outcome.DONE


async def run_alone(work: Work, notifier: Notifier, stops: Sequence[signal.Signals]) -> None:
    """Work until one of these signals, then drain. A second signal ends the process at once, whatever it is doing."""
    loop = asyncio.get_running_loop()
    stopped: asyncio.Future[signal.Signals] = loop.create_future()
    slot = (board := Scoreboard(1)).slots[0]

    is_stopping = False

    def stop(number: int, frame: object) -> None:
        # Not a handler of the loop: a hook that blocks the loop must not delay the second signal.
        nonlocal is_stopping
        if is_stopping:
            leave(number, frame)
        is_stopping = True
        loop.call_soon_threadsafe(begin_to_stop, signal.Signals(number))

    def begin_to_stop(number: signal.Signals) -> None:
        # A second signal may have cancelled it in the meantime.
        if not stopped.done():
            stopped.set_result(number)

    async def reload_settings() -> None:
        if stopped.done():
            return
        notifier.reloading()
        if await reload(work) is Outcome.DONE:
            event(work.log, logging.INFO, "reloaded")
        if not stopped.done():
            notifier.ready()

    def readiness() -> str | None:
        return local_problem() or work.dependency_problem()

    def local_problem() -> str | None:
        return board.local_problem() or work.local_problem()

    def workers() -> list[Worker]:
        return [Worker(0, slot.state, pid, started, slot.connection_count.connections, work.facts())]

    pid, started = os.getpid(), time.time()
    await work.start(slot.connection_count)
    slot.state = WorkerState.SERVING
    register_restarts(work.registry, work.metric_prefix, board)
    overview = Overview(work.registry, readiness, local_problem, workers, lambda: journal.events, pid, started)
    metrics_server = serve_metrics(work, overview)
    notifier.ready()
    for each in stops:
        signal.signal(each, stop)
    handle_signals({} if signal.SIGHUP in stops else {signal.SIGHUP: in_turn(reload_settings)})
    with every(notifier.interval, notifier.alive):
        number = await stopped
        event(work.log, logging.INFO, "stopping", signal=number.name)
        slot.state = WorkerState.DRAINING
        notifier.stopping()
        await drain(work, slot, number)
    end_within(CLEANUP_TIMEOUT, 0)
    if metrics_server is not None:
        await asyncio.to_thread(metrics_server.close)


async def drain(work: Work, slot: Slot, number: signal.Signals | None = None) -> None:
    """Close; after a moment, log how many connections are still open. ``number`` is the signal that stopped the program."""
    _draining.set()
    closing = asyncio.ensure_future(work.close())
    await asyncio.wait([closing], timeout=DRAIN_NOTICE_SECONDS)
    if not closing.done() and (connections := slot.connection_count.connections):
        event(work.log, logging.INFO, "draining", connections=connections)
        tell_how_to_quit(number, connections)
    await closing


def stop_unless_draining() -> None:
    """Have the program drain, as a first SIGTERM does."""
    if not _draining.is_set():
        os.kill(os.getpid(), signal.SIGTERM)


def tell_how_to_quit(number: signal.Signals | None, connections: int) -> None:
    """After Ctrl-C in a terminal, print why the program has not ended."""
    if number is signal.SIGINT and connections and sys.stderr.isatty():
        click.echo(f"draining {connections} connection{'s' * (connections != 1)} (Ctrl-C again to quit)", err=True)


def serve_metrics(work: Work, overview: Overview) -> MetricsServer | None:
    """Serve the metrics and the pages, if the program has sockets for them."""
    if not work.metrics_sockets:
        return None
    pages = work.pages(overview)
    return MetricsServer(work.metrics_sockets, overview.registry, readiness=overview.readiness, pages=pages)


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
    """Call ``act`` every ``seconds`` within the block; never when ``seconds`` is None."""
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
    """End at once: by an exception, so that cleanup runs, within a time limit; without one if cleanup has begun already."""
    if _ending.is_set():
        os._exit(128 + number)
    end_within(CLEANUP_TIMEOUT, 128 + number)
    raise Left(128 + number)


class Left(KeyboardInterrupt):
    """Raised by a signal, wherever the process is at that moment; the argument is the exit status.

    It is not a SystemExit, because a hook may raise that, which must not end the program.
    """


def end_within(seconds: float, status: int) -> None:
    """End the process with this exit status if it has not ended by itself within this many seconds.

    At exit Python waits for every thread that is not a daemon, and a hook's thread may be in a system call that never returns.
    """

    def end() -> None:
        time.sleep(seconds)
        os._exit(status)

    _ending.set()
    with contextlib.suppress(OSError):  # no thread can be started, so there is no hook's thread to wait for
        start_thread(end, "end")
