"""Reloads certificates on request (SIGHUP) and when their files change. A bad certificate leaves the old one in use.

Those for clients and those for TLS backends are reloaded in the same way.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Sequence
from typing import Protocol

from fumi_core.runtime.daemon_thread import run_in_daemon_thread
from fumi_core.runtime.logs import event, failure
from fumi_edge.metrics import EdgeMetrics, ReloadResult
from fumi_edge.tls.certificates import Certificates
from fumi_edge.tls.credentials import Credentials
from fumi_edge.tls.pem import Certificate, date
from fumi_edge.tls.sources import Stamp

log = logging.getLogger("fumi.edge.certificates")

SETTLE_SECONDS = 1.0
"""Seconds in which errors of changed files are not reported: a certificate and its key are two files, written in turn."""
CLOCK_CHECK_SECONDS = 10.0
"""Maximum seconds between two checks for expired certificates: the system clock may be set."""
FIRST_CHECK_TIMEOUT = 5.0
"""Maximum seconds for which the start waits for the first check of the files; the check continues after that."""


class Renewed(Protocol):
    """Certificates or CAs that are read from files, and reloaded."""

    @property
    def stamp_read(self) -> Stamp:
        """The ``stamp()`` from before the files were read."""

    def stamp(self) -> Stamp:
        """The state of all files, equal as long as no file changes. May be called in another thread."""

    def files(self) -> list[str]:
        """The paths of the files and directories."""

    def renew(self) -> list[str]:
        """Read all files again, and use what is good. Returns a line for each error."""


class FileReloader:
    """Checks the files every ``interval`` seconds from ``start()`` to ``close()``; with 0 only ``reload()`` reads them."""

    def __init__(self, files: Renewed, metrics: EdgeMetrics, interval: float, listeners: str | None = None) -> None:
        """``listeners`` are those that use the certificates, for the log, if other listeners use others."""
        self._files = files
        self._metrics = metrics
        self._interval = interval
        self._listeners = listeners
        self._settle = min(SETTLE_SECONDS, interval or SETTLE_SECONDS)
        self._seen = files.stamp_read
        self._reported: set[str] = set()
        self._not_valid: list[str] = []
        """The problems of ``_log_validity()`` that were logged last."""
        self._lock = asyncio.Lock()
        self._tasks: list[asyncio.Task[None]] = []
        self._checked = asyncio.Event()
        if not interval:
            self._checked.set()

    def start(self) -> None:
        if self._interval:
            self._tasks.append(asyncio.get_running_loop().create_task(self._watch()))

    async def first_check(self) -> None:
        """Wait for the first check of the files: a worker that replaces another has the certificates that the master read."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FIRST_CHECK_TIMEOUT):
                await self._checked.wait()

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def reload(self) -> list[str]:
        """Read all files, changed or not, and log all errors again. Returns a line for each error."""
        async with self._lock:
            self._reported = set()
            return await self._check_files(always=True)

    async def _watch(self) -> None:
        while True:
            async with self._lock:
                await self._check_files()
            self._checked.set()
            await asyncio.sleep(self._interval)

    async def _check_files(self, always: bool = False) -> list[str]:
        try:
            stamp = await self._stamp()
            if always or stamp != self._seen:
                return await self._read(stamp)
            return []
        except Exception as error:
            # Neither a system error nor a programming error must end the checks.
            self._metrics.certificate_reloads[ReloadResult.FAILED].inc()
            if isinstance(error, OSError):
                self._log_complaints(logging.ERROR, "reload failed", [str(error)])
            else:
                failure(log, "reload failed", error)
            return [str(error)]

    async def _stamp(self) -> Stamp:
        # In a thread, as the reading: a file system may hang, and mail must not wait for it.
        return await run_in_daemon_thread(self._files.stamp)

    async def _read(self, stamp: Stamp) -> list[str]:
        """Install all good certificates; report errors once the files have stopped changing."""
        results = self._metrics.certificate_reloads
        while complaints := await self._install():
            if stamp == self._seen:
                # The files have settled, unless one has changed while it was read.
                stamp = await self._stamp()
                if stamp == self._seen:
                    break
            results[ReloadResult.DEFERRED].inc()
            self._seen = stamp
            await asyncio.sleep(self._settle)
            stamp = await self._stamp()
        self._seen = stamp
        results[ReloadResult.FAILED if complaints else ReloadResult.OK].inc()
        self._log_complaints(logging.WARNING, "certificate not loaded", complaints)
        return complaints

    def _log_complaints(self, level: int, words: str, complaints: Sequence[str]) -> None:
        """Log the complaints that were not logged last time."""
        for complaint in complaints:
            if complaint not in self._reported:
                event(log, level, words, error=complaint, listeners=self._listeners)
        self._reported = set(complaints)

    async def _install(self) -> list[str]:
        """Read the files, use what is good, and log it. Returns a line for each error."""
        raise NotImplementedError

    def _log_validity(self, words: str, problems: list[str]) -> None:
        """Log certificates that are not valid, beside those that clients get, unless that was logged last time."""
        for problem in problems:
            if problem not in self._not_valid:
                event(log, logging.WARNING, words, error=problem, listeners=self._listeners)
        self._not_valid = problems


class Reloader(FileReloader):
    """Reloads the certificates for clients, and chooses again among them when one expires or becomes valid."""

    def __init__(self, certificates: Certificates, metrics: EdgeMetrics, interval: float, listeners: str | None = None) -> None:
        """``listeners`` are those that use the certificates, for the log, if other listeners use others."""
        super().__init__(certificates, metrics, interval, listeners)
        self._certificates = certificates
        self._publish()

    def start(self) -> None:
        for entry in self._certificates.entries:
            self._warn(entry)
        self._log_validity("CA certificate is not valid", self._certificates.authority_problems(time.time()))
        self._log_skipped(())
        if problem := self._certificates.startup_problem():
            event(log, logging.WARNING, "no cipher for the certificates", error=problem, listeners=self._listeners)
        super().start()
        self._tasks.append(asyncio.get_running_loop().create_task(self._choose()))

    async def _choose(self) -> None:
        """Make a new selection when a certificate expires or becomes valid.

        The clock may be set, so it is checked every CLOCK_CHECK_SECONDS.
        """
        while True:
            until = self._certificates.selection.until
            if (now := time.time()) <= until:
                await asyncio.sleep(min(CLOCK_CHECK_SECONDS, until - now + 0.001))
                continue
            async with self._lock:
                await self._choose_again(now)

    async def _choose_again(self, now: float) -> None:
        """Make a new selection, in a thread, because it may have to make a thousand contexts."""
        before = self._certificates.selection
        try:
            self._certificates.install(await run_in_daemon_thread(lambda: self._certificates.choose(now)))
        except Exception as error:
            failure(log, "certificate selection failed", error)
            await asyncio.sleep(CLOCK_CHECK_SECONDS)
        self._publish()
        for entry in self._certificates.entries:
            if any(moment <= now for moment in entry.changes(before.chosen_at)):
                self._warn(entry)

    async def _install(self) -> list[str]:
        before, skipped = self._certificates.entries, self._certificates.skipped
        reading = await run_in_daemon_thread(self._certificates.read)
        self._certificates.install(reading)
        self._publish()
        now = self._certificates.entries
        for entry in [each for each in now if each not in before]:
            event(
                log,
                logging.INFO,
                "certificate loaded",
                name=entry.name,
                file=str(entry.pair),
                expires=date(entry.not_after),
                listeners=self._listeners,
            )
            self._warn(entry)
        self._log_validity("CA certificate is not valid", self._certificates.authority_problems(time.time()))
        self._log_skipped(skipped)
        kept = {each.pair for each in now}
        for entry in [each for each in before if each.pair not in kept]:
            event(log, logging.INFO, "certificate removed", name=entry.name, file=str(entry.pair), listeners=self._listeners)
        return reading.complaints

    def _log_skipped(self, before: Sequence[str]) -> None:
        for line in [each for each in self._certificates.skipped if each not in before]:
            event(log, logging.INFO, "certificate skipped", error=line, listeners=self._listeners)

    def _publish(self) -> None:
        self._metrics.certificates(((entry.name, entry.not_after) for entry in self._certificates.served), self._certificates)

    def _warn(self, entry: Certificate) -> None:
        if problem := entry.validity_problem(time.time()):
            level = logging.WARNING if entry in self._certificates.selection.served else logging.INFO
            event(log, level, "certificate is not valid", name=entry.name, error=problem, listeners=self._listeners)


class CredentialsReloader(FileReloader):
    """Reloads the CAs and the certificate for TLS backends."""

    def __init__(self, credentials: Credentials, metrics: EdgeMetrics, interval: float) -> None:
        super().__init__(credentials, metrics, interval)
        self._credentials = credentials
        self._publish()

    def start(self) -> None:
        self._log_validity("certificate for backends is not valid", self._credentials.validity_problems(time.time()))
        super().start()

    async def _install(self) -> list[str]:
        before = self._credentials.context
        reading = await run_in_daemon_thread(self._credentials.read)
        self._credentials.install(reading)
        self._publish()
        if reading.context is not before:
            event(log, logging.INFO, "certificates for backends loaded", file=",".join(self._credentials.files()) or None)
        self._log_validity("certificate for backends is not valid", self._credentials.validity_problems(time.time()))
        return reading.complaints

    def _publish(self) -> None:
        own = self._credentials.certificate
        self._metrics.certificates([(own.name, own.not_after)] if own is not None else [], self._credentials)
