"""The master of a set of workers: forks them, replaces those that die, and ends them.

It only waits for signals: SIGTERM and SIGINT drain all workers; a second one, or SIGQUIT, ends them at once; SIGHUP has them
reload their settings; SIGCHLD reports a child that ended.

New settings are tried here first, and kept for workers forked later. That may take half a minute, as with a thousand
certificates, and is done in a thread, so that a stop and the watchdog need not wait for it. No worker is forked in the meantime;
a thread that has not returned after READ_TIMEOUT seconds is abandoned. Otherwise there is no event loop and no thread, except the
log's, which starts once stderr is full, and only ever writes.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from functools import partial

from fumi_core.runtime.daemon_thread import start_thread
from fumi_core.runtime.journal import journal
from fumi_core.runtime.lifecycle import HELD_SIGNALS, Outcome, Work, reload, tell_how_to_quit
from fumi_core.runtime.logs import event
from fumi_core.runtime.scoreboard import Scoreboard, WorkerState
from fumi_core.runtime.systemd import Notifier
from fumi_core.runtime.totals import report_of_master

METRICS_ROLE = -1
"""The role of the process that serves the metrics; the workers' are the numbers of their slots."""

CHECK_SECONDS = 1.0
"""Seconds between two checks of the workers when no signal arrives."""
SETTLING_CHECK_SECONDS = 0.02
"""The same while the master waits for all workers to finish a step."""
EARLY_DEATH_SECONDS = 10.0
"""A worker that dies within this many seconds of its start counts as unable to start."""
MAX_PAUSE_SECONDS = 30.0
"""The longest pause, in seconds, before such a worker is started again."""
DRAIN_GRACE_SECONDS = 5.0
"""Seconds that draining may take beyond the drain timeout."""
KILL_TIMEOUT = 2.0
"""Seconds that a worker may take to end after a signal to end at once."""
READ_TIMEOUT = 60.0
"""Seconds that reading new settings may take; after that the file system counts as hung."""
HANG_SECONDS = 3.0
"""Seconds beyond the watchdog's own that a worker may go without a sign of life."""


@dataclass(slots=True)
class _Child:
    role: int
    pid: int = 0
    started: float = 0.0
    failures: int = 0
    """Early deaths in succession."""
    due: float = 0.0
    """When to start it, by the monotonic clock."""

    @property
    def pause(self) -> float:
        """Seconds to wait before it is started again: 0 after the first failure."""
        return min(MAX_PAUSE_SECONDS, 0.1 * 2 ** min(self.failures, 10)) if self.failures > 1 else 0.0


class Master:
    """``master_alive_w`` is a descriptor; when it is closed, all children end."""

    def __init__(self, work: Work, board: Scoreboard, notifier: Notifier, master_alive_w: int) -> None:
        self._work = work
        self._board = board
        self._notifier = notifier
        self._master_alive_w = master_alive_w
        self._workers = [_Child(number) for number in range(len(board.slots))]
        self._children = [*self._workers, *([_Child(METRICS_ROLE)] if work.metrics_sockets else [])]
        self._settled = False
        """All workers serve with the newest settings, and systemd has been notified."""
        self._has_served = False
        """All workers have served at some time, and systemd was notified."""
        self._stopping = False
        self._valid = threading.Event()
        """Set when the settings read last are valid."""
        self._partly = False
        """They were applied only in part, and the log says so."""
        self._reading: threading.Thread | None = None
        """The thread that reads new settings. Until it ends SIGHUP is blocked; of several the kernel keeps one."""
        self._reading_until = float("inf")
        """The time, by the monotonic clock, at which that thread is abandoned."""
        self._hanging: threading.Thread | None = None
        """A thread that was abandoned. It is in a system call that does not return, so forking meanwhile is safe."""
        self._announced = 0
        """The last reload that was logged."""
        self._journal_changes = 0
        """How many changes of the journal are on the board."""
        self._deadline = float("inf")
        self._next_alive = 0.0
        self._status = 0

    def run(self) -> int | None:
        """Return in each child, as fork() does, with the child's role; return None in the master when all children have ended.

        Raises SystemExit in the master after a signal to end at once.
        """
        # The parent may have SIGCHLD ignored; then the exit status of a child would be lost.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        # Memory pages that the garbage collector does not touch stay shared.
        gc.collect()
        gc.freeze()
        while not self._stopping or any(child.pid for child in self._workers):
            for child in self._due():
                if not self._fork(child):
                    return child.role
            awaited = HELD_SIGNALS if self._reading is None else set(HELD_SIGNALS) - {signal.SIGHUP}
            received = signal.sigtimedwait(awaited, self._seconds_to_wait())
            if received is not None:
                self._handle(signal.Signals(received.si_signo))
            self._reap()
            self._check()
        self._end_metrics()
        if self._status:
            raise SystemExit(self._status)
        return None

    # Starting children

    def _due(self) -> list[_Child]:
        now = time.monotonic()
        return [child for child in self._missing() if child.due <= now]

    def _missing(self) -> list[_Child]:
        """The children that are to be started, now or later."""
        if self._stopping or self._reading is not None:
            return []
        return [child for child in self._children if not child.pid]

    def _fork(self, child: _Child) -> bool:
        """Returns False in the child."""
        now = time.monotonic()
        if child.role != METRICS_ROLE:
            self._board.slots[child.role].reloads = self._board.reloads
        # Both processes would write what is still buffered.
        sys.stdout.flush()
        sys.stderr.flush()
        try:
            child.pid = os.fork()
        except OSError as error:
            child.failures += 1
            child.due = now + max(1.0, child.pause)
            event(self._work.log, logging.ERROR, "cannot start a worker", error=error.strerror)
            return True
        if child.pid == 0:
            return False
        if child.started and child.role != METRICS_ROLE:
            self._board.restarts += 1
        child.started = now
        return True

    # Children that end

    def _reap(self) -> None:
        # Only our own children: an app may have started others.
        for child in self._children:
            if child.pid:
                pid, status = os.waitpid(child.pid, os.WNOHANG)
                if pid:
                    self._ended(child, os.waitstatus_to_exitcode(status))

    def _ended(self, child: _Child, code: int) -> None:
        pid, child.pid = child.pid, 0
        if child.role != METRICS_ROLE:
            self._board.slots[child.role].clear()
        if self._stopping and (code == 0 or self._status):
            return
        now = time.monotonic()
        child.failures = child.failures + 1 if now - child.started < EARLY_DEATH_SECONDS else 1
        child.due = now + child.pause
        event(
            self._work.log,
            logging.ERROR,
            "metrics process died" if child.role == METRICS_ROLE else "worker died",
            worker=None if child.role == METRICS_ROLE else child.role,
            pid=pid,
            reason=f"exit status {code}" if code >= 0 else signal.Signals(-code).name,
            seconds=round(now - child.started, 3),
            pause=child.pause or None,
        )

    def _end_metrics(self) -> None:
        os.close(self._master_alive_w)
        deadline = time.monotonic() + KILL_TIMEOUT
        while any(child.pid for child in self._children):
            if signal.sigtimedwait([signal.SIGCHLD], max(0.0, deadline - time.monotonic())) is None:
                self._signal_children(signal.SIGKILL)
                deadline += KILL_TIMEOUT
            self._reap()

    # Signals

    def _seconds_to_wait(self) -> float:
        """Seconds until there is something to do without a signal."""
        now = time.monotonic()
        quiet = self._stopping or (self._settled and self._reading is None)
        moments = [now + (CHECK_SECONDS if quiet else SETTLING_CHECK_SECONDS), self._deadline]
        moments += [child.due for child in self._missing()]
        if self._notifier.interval is not None:
            moments.append(self._next_alive)
        return max(0.0, min(moments) - now)

    def _handle(self, number: signal.Signals) -> None:
        if number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
            if self._stopping or number == signal.SIGQUIT:
                self._stop_at_once(number)
            else:
                self._stop(number)
        elif number == signal.SIGHUP and not self._stopping:
            self._reload()

    def _stop(self, number: signal.Signals) -> None:
        self._stopping = True
        event(self._work.log, logging.INFO, "stopping", signal=number.name)
        tell_how_to_quit(number, sum(self._board.connections))
        self._notifier.stopping()
        self._work.unbind()
        self._signal_children(signal.SIGTERM)
        self._deadline = time.monotonic() + self._work.drain_timeout + DRAIN_GRACE_SECONDS

    def _stop_at_once(self, number: signal.Signals) -> None:
        self._stopping = True
        self._status = 128 + number
        self._signal_children(signal.SIGQUIT)
        self._deadline = time.monotonic() + KILL_TIMEOUT

    def _reload(self) -> None:
        self._notifier.reloading()
        if self._hanging is not None and self._hanging.is_alive():
            self._not_reloaded("an earlier reload still waits for a file")
            return
        self._valid.clear()
        try:
            self._reading = start_thread(partial(self._read, self._valid), "reload")
        except OSError as error:
            self._not_reloaded(str(error))
        else:
            self._reading_until = time.monotonic() + READ_TIMEOUT

    def _not_reloaded(self, error: str) -> None:
        event(self._work.log, logging.ERROR, "reload failed: the old settings stay in use", error=error)
        if self._settled:
            self._notifier.ready()

    def _read(self, valid: threading.Event) -> None:
        outcome = asyncio.run(reload(self._work))
        self._partly = outcome is Outcome.PARTLY
        if outcome is not Outcome.FAILED:
            valid.set()

    def _give_up_reading(self) -> None:
        self._hanging, self._reading = self._reading, None
        # The result of an abandoned thread does not matter.
        self._valid = threading.Event()
        self._not_reloaded(f"the files were not read within {READ_TIMEOUT:g} seconds")

    def _finish_reading(self) -> None:
        self._reading = None
        if self._valid.is_set():
            self._board.reloads += 1
            self._settled = False
            self._signal_children(signal.SIGHUP)
        elif self._settled:
            self._notifier.ready()

    def _signal_children(self, number: signal.Signals) -> None:
        for child in self._children:
            if child.pid:
                os.kill(child.pid, number)

    # Watching the workers

    def _check(self) -> None:
        now = time.monotonic()
        if journal.changes != self._journal_changes:
            self._journal_changes = journal.changes
            self._board.master.write(report_of_master())
        if self._reading is not None and not self._reading.is_alive() and not self._stopping:
            self._finish_reading()
        if self._reading is not None and now >= self._reading_until and not self._stopping:
            self._give_up_reading()
        if not self._settled and not self._stopping and self._reading is None:
            self._settle()
        if now >= self._deadline:
            event(self._work.log, logging.WARNING, "killing workers that did not stop in time")
            self._signal_children(signal.SIGKILL)
            self._deadline = float("inf")
        if self._notifier.interval is not None and now >= self._next_alive:
            self._next_alive = now + self._notifier.interval
            if self._is_healthy(2 * self._notifier.interval + HANG_SECONDS):
                self._notifier.alive()

    def _is_healthy(self, silence: float) -> bool:
        """No worker has been silent for longer, and at least one serves. None has to before the first has, or at a stop."""
        living = [slot for slot in self._board.slots if slot.state is not WorkerState.ABSENT]
        some = self._stopping or not self._has_served or any(slot.state is WorkerState.SERVING for slot in living)
        return some and all(slot.silence < silence for slot in living)

    def _settle(self) -> None:
        newest = self._board.reloads
        if all(slot.state is WorkerState.SERVING and slot.reloads == newest for slot in self._board.slots):
            self._settled = self._has_served = True
            if newest != self._announced:
                if not self._partly:
                    event(self._work.log, logging.INFO, "reloaded")
                self._announced = newest
            self._notifier.ready()
