"""The work of ``fumi-core``: builds an app from the settings, lets it serve, and rebuilds it on reload.

With ``[[core.listener]]`` tables there is an app for each of them.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Iterable, Mapping

import click
from prometheus_client import CollectorRegistry

from fumi_core.app import Fumi
from fumi_core.delivery import TARGETS
from fumi_core.program.listeners import Key, Listening, listening, named
from fumi_core.program.loading import load_app
from fumi_core.program.served import Built, ServedApp
from fumi_core.program.status import CoreListener, core_pages
from fumi_core.program.target_checks import TargetChecks
from fumi_core.runtime.addresses import THIS_HOST, Networks, SocketAddress, peer_of
from fumi_core.runtime.daemon_thread import run_in_daemon_thread
from fumi_core.runtime.listening import ListenAddress, ListenError, check_listen, name_of, open_listeners
from fumi_core.runtime.logs import configure, event
from fumi_core.runtime.master import READ_TIMEOUT
from fumi_core.runtime.metrics_server import Page
from fumi_core.runtime.overview import Facts, Overview
from fumi_core.runtime.process_metrics import register_process_metrics
from fumi_core.runtime.scoreboard import ConnectionCount
from fumi_core.runtime.settings import SettingError, check_mode, read_again
from fumi_core.server.metrics import CoreMetrics

_THIS_HOST = Networks(THIS_HOST)
_LOCALHOST_NAMES = ("localhost", "localhost.localdomain", "localhost6", "ip6-localhost")
# Settings of sockets and processes, which a reload cannot change.
_ONLY_AT_START = ("listen", "metrics", "socket_mode", "workers")


class CoreWork:
    """The program's work; see ``fumi_core.runtime.lifecycle.Work``."""

    log = logging.getLogger("fumi.core")
    metric_prefix = "fumi_core"

    def __init__(self, ctx: click.Context, *, dry: bool = False) -> None:
        """``dry`` is for ``check()`` only: no directories and files are created. Raises SettingError."""
        self._ctx = ctx
        self._serving = False
        self._target_checks = TargetChecks()
        self._settings = ctx.params
        self._listening = listening(ctx)
        check_mode(self._settings["socket_mode"], [each.address for each in self._places()])
        self.metrics_sockets: list[socket.socket] = []
        self.registry = CollectorRegistry()
        reference = self._settings["app"]
        apps = [load_app(reference)] if reference else [Fumi() for _ in self._listening]
        self._served = [ServedApp(app, dry=dry) for app in apps]
        for app in apps:
            app.tally = apps[0].tally
        if self._settings["metrics"]:
            register_process_metrics(self.registry)
            metrics = CoreMetrics(self.registry, apps[0].tally, () if reference else TARGETS)
            for app in apps:
                app.observer = metrics
        for served, listener in zip(self._served, self._listening, strict=True):
            with named(listener):
                served.adopt(served.build(listener.settings, listener.given))

    def check(self) -> list[str]:
        """Check that clients can send mail, that the addresses can be listened on, and that the targets can deliver.

        Returns remarks: addresses in use, most often by the server that is to be restarted, and the targets' remarks. Raises
        SettingError.
        """
        listen_check = check_listen(self._places())
        if listen_check.problems:
            raise SettingError("; ".join(listen_check.problems))
        remarks = [f"{each} is already in use (by a running fumi-core or another program)" for each in listen_check.in_use]
        for served, listener in zip(self._served, self._listening, strict=True):
            with named(listener):
                if (remark := served.check()) is not None and remark not in remarks:
                    remarks.append(remark)
        return remarks

    @property
    def drain_timeout(self) -> float:
        return self._served[0].app.options.close_timeout

    def bind(self) -> None:
        places = self._places()
        try:
            opened = open_listeners(places, self._settings["socket_mode"])
        except ListenError as error:
            raise SettingError(str(error)) from None
        found = iter(zip(places, opened, strict=True))
        for served, listener in zip(self._served, self._listening, strict=True):
            for place, sockets in (next(found) for _ in listener.places):
                served.sockets += sockets
                for name in dict.fromkeys(name_of(place.address, sock) for sock in sockets):
                    served.names.append(name)
                    proxy_protocol = served.app.options.proxy_protocol
                    event(self.log, logging.INFO, "listening", listener=name, mode="plaintext", proxy_protocol=proxy_protocol)
        for place, sockets in found:
            self.metrics_sockets = sockets
            event(self.log, logging.INFO, "serving metrics", address=name_of(place.address, sockets[0]))
        for served, listener in zip(self._served, self._listening, strict=True):
            self._warn(served, listener.name)

    def _places(self) -> list[ListenAddress]:
        """All addresses to listen on: those of the apps, in their order, and the one for the metrics."""
        metrics = self._settings["metrics"]
        places = [place for each in self._listening for place in each.places]
        return places + ([ListenAddress("--metrics", metrics)] if metrics else [])

    def _warn(self, served: ServedApp, listener: str | None) -> None:
        """Log settings that are valid but probably not intended."""
        settings, name = served.settings, served.app.options.name
        if name.lower().rstrip(".") in _LOCALHOST_NAMES:
            event(self.log, logging.WARNING, "set --name: the banner is 220 localhost", name=name, listener=listener)
        if settings["assume_tls"]:
            for name in [sock.getsockname() for sock in served.sockets]:
                if peer_of(name)[0] not in _THIS_HOST:
                    address = SocketAddress("tcp", host=name[0], port=name[1])
                    words = "--assume-tls, but other hosts can connect in plaintext: listen on loopback or a Unix socket"
                    event(self.log, logging.WARNING, words, address=address)
        passes_on = served.target is not None and served.target.name == "smtp"
        if passes_on and not settings["domain"] and not settings["auth_required"]:
            words = "open relay: relays mail from anyone to anyone; add --domain, or --users with --auth-required"
            event(self.log, logging.WARNING, words, deliver=settings["deliver"], listener=listener)

    def unbind(self) -> None:
        for served in self._served:
            for sock in served.sockets:
                sock.close()

    async def start(self, connection_count: ConnectionCount) -> None:
        self._serving = True
        for served in self._served:
            served.app.connection_count = connection_count
            for sock in served.sockets:
                await served.app.listen(sock=sock)

    async def close(self) -> None:
        await asyncio.gather(*(served.app.close() for served in self._served))

    async def reload(self) -> Iterable[str]:
        # In a thread: a file system may hang, and mail must not wait. The master has a time limit of its own.
        try:
            async with asyncio.timeout(READ_TIMEOUT if self._serving else None):
                ctx, found, built = await run_in_daemon_thread(self._read_again)
        except TimeoutError:
            raise SettingError(f"the files were not read within {READ_TIMEOUT:g} seconds") from None
        except OSError as error:
            raise SettingError(f"cannot read the files: {error}") from None  # no thread can be started
        for served, each in zip(self._served, built, strict=True):
            served.adopt(each)
        for served in self._served:
            await served.app.prepare()
        before, self._settings = self._settings, {**ctx.params, **{name: self._settings[name] for name in _ONLY_AT_START}}
        configure(ctx.params["log_format"], ctx.params["log_level"])
        changed = [name for name in _ONLY_AT_START if ctx.params[name] != before[name]]
        return changed + ["listener"] * (list(found) != [each.key for each in self._listening])

    def _read_again(self) -> tuple[click.Context, dict[Key, Listening], list[Built]]:
        """Read everything, and build the apps. Changes nothing; raises ClickException."""
        ctx = read_again(self._ctx)
        found = {each.key: each for each in listening(ctx)}
        built = []
        for number, old in enumerate(self._listening):
            # A listener that is no longer named keeps its settings until the restart.
            new = found.get(old.key, old)
            with named(new):
                built.append(self._served[number].build(new.settings, new.given))
        return ctx, found, built

    def facts(self) -> Facts:
        return {}

    def pages(self, overview: Overview) -> Mapping[str, Page]:
        return core_pages(self._listeners, overview, self._target_checks)

    def _listeners(self) -> list[CoreListener]:
        return [CoreListener(name, served) for served in self._served for name in served.names]

    def local_problem(self) -> str | None:
        return None

    def dependency_problem(self) -> str | None:
        """Why the target of some listener cannot deliver, or None."""
        return self._target_checks.problem(self._served)
