"""The work of ``fumi-edge`` in one process or several: an edge and, with --dev or MODULE:APP, the core behind it."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import socket
from collections.abc import Iterable, Mapping, Sequence

import click
from prometheus_client import CollectorRegistry

from fumi_core.runtime.daemon_thread import run_in_daemon_thread
from fumi_core.runtime.lifecycle import Incomplete
from fumi_core.runtime.listening import ListenError
from fumi_core.runtime.logs import configure, event
from fumi_core.runtime.master import READ_TIMEOUT
from fumi_core.runtime.metrics_server import Page
from fumi_core.runtime.overview import Facts, Overview
from fumi_core.runtime.privileges import PrivilegeError, become
from fumi_core.runtime.process_metrics import register_process_metrics
from fumi_core.runtime.scoreboard import ConnectionCount
from fumi_core.runtime.settings import SettingError
from fumi_edge.certificate_reload import SETTLE_SECONDS, Renewed
from fumi_edge.edge import Edge
from fumi_edge.program.dev import DevCore
from fumi_edge.program.flag_source import FlagSource
from fumi_edge.program.inner import Inner
from fumi_edge.status.facts import EdgeFacts
from fumi_edge.status.page import edge_pages
from fumi_edge.tls.pem import date

MAX_LOGGED_CERTIFICATES = 50
"""The maximum number of certificates that are logged at the start with a line each."""


class EdgeWork:
    """The program's work; see ``fumi_core.runtime.lifecycle.Work``."""

    log = logging.getLogger("fumi.edge")
    metric_prefix = "fumi_edge"

    def __init__(
        self, edge: Edge, core: DevCore | Inner | None = None, user: str | None = None, flags: FlagSource | None = None
    ) -> None:
        """``core`` is started before the edge. ``user`` is the user to become once the sockets are open.

        ``flags`` are read again at a reload; without them a reload is for the certificates alone.
        """
        self._edge = edge
        self._core = core
        self._flags = flags
        self._user = user
        self._serving = False
        self._facts = EdgeFacts(edge)
        if edge.settings.metrics is not None:
            register_process_metrics(edge.registry)

    @property
    def registry(self) -> CollectorRegistry:
        return self._edge.registry

    @property
    def metrics_sockets(self) -> Sequence[socket.socket]:
        return self._edge.metrics_sockets

    @property
    def drain_timeout(self) -> float:
        return self._edge.settings.drain_timeout

    def bind(self) -> None:
        try:
            self._edge.bind()
        except ListenError as error:
            raise SettingError(str(error)) from None
        self._log_certificates()
        if self._user is not None:
            try:
                become(self._user)
            except PrivilegeError as error:
                raise SettingError(f"--user: {error}") from None
            files = dict.fromkeys(path for each in self._renewed for path in each.files())
            if unreadable := [path for path in files if not os.access(path, os.R_OK)]:
                event(self.log, logging.WARNING, "renewals need a restart", user=self._user, unreadable=",".join(unreadable))

    def _log_certificates(self) -> None:
        served = [
            (entry, self._edge.settings.listeners_with(settings) if len(self._edge.certificates) > 1 else None)
            for settings, certificates in self._edge.certificates.items()
            for entry in certificates.served
        ]
        for entry, listeners in served[:MAX_LOGGED_CERTIFICATES]:
            fields = {"name": entry.name, "file": str(entry.pair), "expires": date(entry.not_after), "listeners": listeners}
            event(self.log, logging.INFO, "serving certificate", **fields)
        if len(served) > MAX_LOGGED_CERTIFICATES:
            event(self.log, logging.INFO, "serving more certificates", count=len(served) - MAX_LOGGED_CERTIFICATES)

    @property
    def _renewed(self) -> list[Renewed]:
        """All that is read from certificate files: for clients, and for TLS backends."""
        return [*self._edge.certificates.values(), *self._edge.credentials.values()]

    def unbind(self) -> None:
        self._edge.unbind()

    async def start(self, connection_count: ConnectionCount) -> None:
        if self._core is not None:
            await self._core.start()
        await self._edge.start(connection_count)
        self._serving = True
        _tune_garbage_collector()
        if self._core is not None and (instructions := self._core.instructions()):
            click.echo(instructions)

    async def close(self) -> None:
        if self._core is None:
            await self._edge.close()
        else:
            # The core ends the dialogues. The edge stops accepting, and ends the connections that are left.
            await asyncio.gather(self._edge.close(), self._core.close())

    async def reload(self) -> Iterable[str]:
        """Read the settings and certificates again; returns the names of changed settings that need a restart.

        Raises SettingError when a setting is invalid, and then nothing has changed, and Incomplete when some certificates stay as
        they were.
        """
        changed = [] if self._flags is None else await self._apply(self._flags)
        await self._reload_certificates()
        return changed

    async def _apply(self, source: FlagSource) -> list[str]:
        # In a thread: a file system may hang, and neither mail nor the next reload must wait. The master has its own limit.
        try:
            async with asyncio.timeout(READ_TIMEOUT if self._serving else None):
                edge, forking = self._edge, not self._serving
                again = await run_in_daemon_thread(lambda: source.read_again(edge.certificates, edge.credentials, forking))
        except TimeoutError:
            raise SettingError(f"the files were not read within {READ_TIMEOUT:g} seconds") from None
        await self._edge.apply(again.settings, again.certificates)
        configure(again.flags["log_format"], again.flags["log_level"])
        return source.take(again)

    async def _reload_certificates(self) -> None:
        if self._serving:
            complaints = await self._edge.reload()
        else:
            # This is the master, which reads for new workers. The running workers log each certificate.
            found = [await _read_for_workers(each) for each in self._renewed]
            complaints = list(dict.fromkeys(line for lines in found for line in lines))
        if complaints:
            more = f" (and {len(complaints) - 1} more)" if len(complaints) > 1 else ""
            raise Incomplete(f"{complaints[0]}{more}")

    def facts(self) -> Facts:
        return self._facts.read()

    def pages(self, overview: Overview) -> Mapping[str, Page]:
        return edge_pages(self._edge, overview, {} if self._core is None else self._core.pages())

    def local_problem(self) -> str | None:
        return self._edge.local_problem()

    def dependency_problem(self) -> str | None:
        return self._edge.dependency_problem()


async def _read_for_workers(files: Renewed) -> list[str]:
    """Read twice if there are errors, as a worker does: a certificate and its key are two files, replaced in turn."""
    if complaints := files.renew():
        await asyncio.sleep(SETTLE_SECONDS)
        complaints = files.renew()
    return complaints


def _tune_garbage_collector() -> None:
    """Let the garbage collector run rarely, and examine new objects only.

    The objects of the start live as long as the process, and a connection leaves no reference cycles.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 50, 100)
