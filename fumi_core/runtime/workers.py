"""``--workers N``: a single process, or a master, its workers, and a process that serves their metrics.

All workers accept from the same listening sockets, which the master opened: a free worker takes the next connection, and a killed
worker loses only its own connections. (With SO_REUSEPORT each worker has a queue of its own, and connections in the queue of a
worker that dies are reset.)
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections.abc import Coroutine, Sequence
from functools import partial
from typing import Any

from prometheus_client import CollectorRegistry

from fumi_core.runtime import journal
from fumi_core.runtime.daemon_thread import start_thread
from fumi_core.runtime.lifecycle import (
    CLEANUP_TIMEOUT,
    STOP_SIGNALS,
    Left,
    Work,
    drain,
    end_within,
    every,
    handle_signals,
    hold_signals,
    in_turn,
    leave,
    reload,
    run_alone,
    serve_metrics,
    stop_unless_draining,
)
from fumi_core.runtime.logs import event, failure
from fumi_core.runtime.loop import Loop
from fumi_core.runtime.master import METRICS_ROLE, Master
from fumi_core.runtime.overview import Overview
from fumi_core.runtime.scoreboard import Scoreboard, WorkerState
from fumi_core.runtime.systemd import Notifier
from fumi_core.runtime.totals import Reporter, Totals, register_restarts
from fumi_core.version import VERSION

REPORT_SECONDS = 1.0
"""Seconds between two reports of a worker, and so the maximum age of the metrics."""


def run(work: Work, workers: int, stops: Sequence[signal.Signals] = STOP_SIGNALS) -> None:
    """Bind, and work until a stop signal; returns in each process when that process is to end. Raises SettingError, and
    SystemExit.

    ``stops`` are the signals that stop a single process.
    """
    hold_signals()
    begun = time.time()
    journal.begin()
    work.bind()
    if not work.metrics_sockets:
        journal.end()
    event(work.log, logging.INFO, "starting", version=VERSION, pid=os.getpid(), workers=workers)
    notifier = Notifier()
    if workers == 1:
        _run(run_alone(work, notifier, stops), work.log)
        return
    board = Scoreboard(workers)
    master_alive_r, master_alive_w = os.pipe()
    role = Master(work, board, notifier, master_alive_w).run()
    if role is None:
        return
    journal.journal.forget()
    os.close(master_alive_w)  # only the master keeps it, so reading master_alive_r returns when the master ends, however it ends
    if role == METRICS_ROLE:
        _serve_metrics(work, board, master_alive_r, begun)
    else:
        _run(_serve(work, board, role, master_alive_r), work.log)


def _run(program: Coroutine[Any, Any, None], log: logging.Logger) -> None:
    try:
        with asyncio.Runner(loop_factory=Loop) as runner:
            _run_to_the_end(program, runner, log)
    except Left as left:
        raise SystemExit(left.args[0]) from None


def _run_to_the_end(program: Coroutine[Any, Any, None], runner: asyncio.Runner, log: logging.Logger) -> None:
    """Run it. If a task or callback of an app calls ``sys.exit()``, which ends the loop, drain first, and then raise that."""
    main = runner.get_loop().create_task(program)
    ended_by: BaseException | None = None

    async def wait() -> None:
        await asyncio.wait([main])

    while not main.done():
        try:
            runner.run(wait())
        except (SystemExit, KeyboardInterrupt) as error:
            if isinstance(error, Left) or main.done():
                raise
            failure(log, "the app ended the program outside a hook, stopping", error)
            if ended_by is None:
                stop_unless_draining()  # a second signal would end the program at once
                ended_by = error
    main.result()
    if ended_by is not None:
        raise ended_by


async def _serve(work: Work, board: Scoreboard, number: int, master_alive_r: int) -> None:
    """A worker: like a single process, but it obeys its master, and reports to the scoreboard."""
    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()
    slot = board.slots[number]

    def orphaned() -> None:
        loop.remove_reader(master_alive_r)
        event(work.log, logging.ERROR, "master process died, stopping", worker=number, pid=os.getpid())
        stopped.set()

    async def reload_settings() -> None:
        newest = board.reloads
        await reload(work, quiet=True)
        slot.reloads = newest

    def report() -> None:
        slot.live()
        reporter.write(work.local_problem(), work.facts() if work.metrics_sockets else None)

    for sock in work.metrics_sockets:
        sock.close()
    await work.start(slot.connection_count)
    reporter = Reporter(work.registry, slot)
    report()
    slot.state = WorkerState.SERVING
    # A stop may arrive several times: from the terminal or systemd, which signal all processes, and from the master.
    signal.signal(signal.SIGQUIT, leave)
    handle_signals({signal.SIGTERM: stopped.set, signal.SIGINT: stopped.set, signal.SIGHUP: in_turn(reload_settings)})
    loop.add_reader(master_alive_r, orphaned)
    with every(REPORT_SECONDS, report):
        await stopped.wait()
        slot.state = WorkerState.DRAINING
        await drain(work, slot)
    end_within(CLEANUP_TIMEOUT, 0)
    report()


def _serve_metrics(work: Work, board: Scoreboard, master_alive_r: int, begun: float) -> None:
    """The process that adds up the workers' reports. It ends with the master, in which its threads would make fork() unsafe."""
    work.unbind()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
    start_thread(partial(_reload_on_signal, work), "reload")
    totals, registry = Totals(work.registry, board), CollectorRegistry()
    registry.register(totals)
    register_restarts(registry, work.metric_prefix, board)

    def local_problem() -> str | None:
        return board.local_problem() or totals.local_problem()

    def readiness() -> str | None:
        return local_problem() or work.dependency_problem()

    serve_metrics(work, Overview(registry, readiness, local_problem, totals.workers, totals.events, os.getppid(), begun))
    os.read(master_alive_r, 1)


def _reload_on_signal(work: Work) -> None:
    """Reload in a thread, for one SIGHUP after the other; a signal handler could interrupt itself."""
    while True:
        signal.sigwait([signal.SIGHUP])
        asyncio.run(reload(work, quiet=True))
