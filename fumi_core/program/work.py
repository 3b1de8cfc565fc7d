"""The work of ``fumi-core``: builds an app from the settings, lets it serve, and rebuilds it on reload."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from prometheus_client import CollectorRegistry

from fumi_core.app import Fumi
from fumi_core.delivery import TARGETS, DeliveryTarget, parse_target
from fumi_core.delivery.maildir_recipients import has_variables
from fumi_core.plugins.dovecot.auth import DovecotAuth
from fumi_core.program import builtin
from fumi_core.program.filters import filters
from fumi_core.program.loading import load_app
from fumi_core.program.logins import dovecot_at, use_logins
from fumi_core.program.option_flags import OPTIONS
from fumi_core.runtime.addresses import THIS_HOST, Networks, SocketAddress, peer_of
from fumi_core.runtime.listening import ListenAddress, ListenError, check_listen, name_of, open_listeners, passed
from fumi_core.runtime.logs import configure, event
from fumi_core.runtime.metrics_server import Page, Readiness
from fumi_core.runtime.scoreboard import ConnectionCount
from fumi_core.runtime.settings import SettingError, check_mode, given, read_again
from fumi_core.server.metrics import CoreMetrics
from fumi_core.smtp.mailboxes import check_delimiter

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
        self._dry = dry
        self._settings = ctx.params
        addresses = [*self._settings["listen"], self._settings["metrics"]]
        check_mode(self._settings["socket_mode"], [each for each in addresses if each is not None])
        self._target: DeliveryTarget | None = None
        self._dovecot: DovecotAuth | None = None
        self._sockets: list[socket.socket] = []
        self.metrics_sockets: list[socket.socket] = []
        self.registry = CollectorRegistry()
        reference = self._settings["app"]
        self.app = load_app(reference) if reference else Fumi()
        # A module is imported once; each reload starts from the app that it defined.
        self._own = Fumi().adopt(self.app)
        self._metrics: CoreMetrics | None = None
        if self._settings["metrics"]:
            self.app.observer = self._metrics = CoreMetrics(self.registry, self.app.tally, () if reference else TARGETS)
        self._take_over(ctx)

    def check(self) -> list[str]:
        """Check that clients can send mail, that the addresses can be listened on, and that the target can deliver.

        Returns remarks: addresses in use, most often by the server that is to be restarted, and the target's remark. Raises
        SettingError.
        """
        if self._settings["app"] and (problem := self.app.startup_problem()):
            raise SettingError(f"{self._settings['app']}: no client can send mail: {problem}")
        listen_check = check_listen(self._places())
        if listen_check.problems:
            raise SettingError("; ".join(listen_check.problems))
        remarks = [f"{each} is already in use (by a running fumi-core or another program)" for each in listen_check.in_use]
        try:
            remark = self._target.check() if self._target is not None else None
        except OSError as error:
            raise SettingError(f"--deliver {self._settings['deliver']}: {error.strerror or error}") from None
        if self._dovecot is not None and (problem := asyncio.run(self._dovecot.problem())):
            raise SettingError(f"--dovecot-auth {self._settings['dovecot_auth']}: {problem}")
        return remarks if remark is None else [*remarks, remark]

    @property
    def drain_timeout(self) -> float:
        return self.app.options.close_timeout

    def bind(self) -> None:
        places = self._places()
        try:
            opened = open_listeners(places, self._settings["socket_mode"])
        except ListenError as error:
            raise SettingError(str(error)) from None
        for place, sockets in zip(places, opened, strict=True):
            if place.flag == "--metrics":
                self.metrics_sockets = sockets
                event(self.log, logging.INFO, "serving metrics", address=name_of(place.address, sockets[0]))
                continue
            self._sockets += sockets
            for name in dict.fromkeys(name_of(place.address, sock) for sock in sockets):
                event(self.log, logging.INFO, "listening", listener=name, proxy_protocol=self.app.options.proxy_protocol)
        self._warn()

    def _places(self) -> list[ListenAddress]:
        """All addresses to listen on. Without --listen, those that systemd passes come before the default."""
        listen, metrics = self._settings["listen"], self._settings["metrics"]
        if "listen" not in given(self._ctx):
            listen = passed() or listen
        return [ListenAddress("--listen", each) for each in listen] + ([ListenAddress("--metrics", metrics)] if metrics else [])

    def _warn(self) -> None:
        """Log settings that are valid but probably not intended."""
        name = self.app.options.name
        if name.lower().rstrip(".") in _LOCALHOST_NAMES:
            event(self.log, logging.WARNING, "the banner is 220 localhost: set --name", name=name)
        if self._settings["assume_tls"]:
            for name in [sock.getsockname() for sock in self._sockets]:
                if peer_of(name)[0] not in _THIS_HOST:
                    address = SocketAddress("tcp", host=name[0], port=name[1])
                    words = "--assume-tls, but other hosts can connect in plaintext: listen on loopback or a Unix socket"
                    event(self.log, logging.WARNING, words, address=address)
        passes_on = self._target is not None and self._target.name == "smtp"
        if passes_on and not self._settings["domain"] and not self._settings["auth_required"]:
            words = "open relay: relays mail from anyone to anyone; add --domain, or --users with --auth-required"
            event(self.log, logging.WARNING, words, deliver=self._settings["deliver"])

    def unbind(self) -> None:
        for sock in self._sockets:
            sock.close()

    async def start(self, connection_count: ConnectionCount) -> None:
        self.app.connection_count = connection_count
        for sock in self._sockets:
            await self.app.listen(sock=sock)

    async def close(self) -> None:
        await self.app.close()

    async def reload(self) -> Iterable[str]:
        ctx = read_again(self._ctx)
        self._take_over(ctx)
        await self.app.prepare()
        old, self._settings = self._settings, {**ctx.params, **{name: self._settings[name] for name in _ONLY_AT_START}}
        configure(ctx.params["log_format"], ctx.params["log_level"])
        return [name for name in _ONLY_AT_START if ctx.params[name] != old[name]]

    def pages(self, registry: CollectorRegistry, readiness: Readiness) -> Mapping[str, Page]:
        return {}

    def local_problem(self) -> str | None:
        return None

    def dependency_problem(self) -> str | None:
        return self._target.dependency_problem() if self._target else None

    def _take_over(self, ctx: click.Context) -> None:
        """Build an app from the settings, which the running one then adopts. If a setting is invalid, nothing changes."""
        settings = ctx.params
        app, target = Fumi().adopt(self._own), None
        app.observer = self.app.observer
        if settings["app"]:
            _refuse_builtin_flags(settings, given(ctx))
            wanted = {flag for flag in OPTIONS if flag in given(ctx)}
        else:
            app.configure(auth_optional=True, logger=True)
            target = self._target_for(settings)
            wanted = {flag for flag in OPTIONS if settings[flag] not in (None, ())}
        dovecot = self._dovecot_for(settings["dovecot_auth"])
        use_logins(app, settings, dovecot)
        milters = filters(settings, target)
        if settings["proxy_protocol"] == "off" and not settings["app"]:
            _refuse_proxy_flags(settings)
        if settings["auth_required"]:
            app.configure(auth_optional=False)
        try:
            app.configure(**{OPTIONS[flag]: settings[flag] for flag in wanted})
        except ValueError as error:
            raise SettingError(str(error)) from None
        if target is not None and not self._dry:
            _equip(app, target, settings, milters)
        self.app.adopt(app)
        self._target, self._dovecot = target, dovecot

    def _dovecot_for(self, address: SocketAddress | None) -> DovecotAuth | None:
        """Return the present plugin if its address is the same, to keep its connection."""
        if self._dovecot is not None and address == self._settings["dovecot_auth"]:
            return self._dovecot
        return None if address is None else dovecot_at(address)

    def _target_for(self, settings: dict[str, Any]) -> DeliveryTarget:
        """Return the present target if its settings are the same, to keep its threads and connections."""
        delimiter = _delimiter(settings)
        wanted = settings["deliver"], _state(settings), delimiter
        if self._target is not None and wanted == (self._settings["deliver"], _state(self._settings), _delimiter(self._settings)):
            return self._target
        try:
            return parse_target(*wanted)
        except ValueError as error:
            raise SettingError(f"--deliver: {error}") from None


def _refuse_builtin_flags(settings: dict[str, Any], wanted: set[str]) -> None:
    for flag in ("deliver", "domain", "recipient_delimiter", "state"):
        if flag in wanted:
            raise SettingError(f"--{flag.replace('_', '-')} belongs to the built-in app; {settings['app']} delivers by itself")
    if settings["sender_login"]:
        raise SettingError(f"--sender-login belongs to the built-in app; {settings['app']} can use plugins.sender_login()")
    if settings["milter"]:
        raise SettingError(f"--milter belongs to the built-in app; {settings['app']} can use plugins.milter()")


def _refuse_proxy_flags(settings: dict[str, Any]) -> None:
    """Refuse flags that have no effect without PROXY headers, or that would keep every client from sending mail."""
    if settings["trusted_proxy"]:
        raise SettingError("--trusted-proxy has no effect with --proxy-protocol off: remove one of them")
    if settings["require_tls"] and not settings["assume_tls"]:
        raise SettingError("--require-tls needs PROXY headers or --assume-tls; otherwise no client can send mail")


def _equip(app: Fumi, target: DeliveryTarget, settings: dict[str, Any], milters: Sequence[Callable[[Fumi], None]]) -> None:
    try:
        builtin.equip(app, target, settings["domain"], own_senders=settings["sender_login"], milters=milters)
    except (OSError, ValueError) as error:
        raise SettingError(f"--deliver {settings['deliver']}: {getattr(error, 'strerror', None) or error}") from None


def _delimiter(settings: dict[str, Any]) -> str:
    """--recipient-delimiter. Raises SettingError where it is invalid, or given without effect."""
    given, target = settings["recipient_delimiter"], settings["deliver"]
    if given is None:
        return "+"
    if not (target.startswith("maildir:") and has_variables(target)):
        raise SettingError("--recipient-delimiter has no effect without %u or %n in the path of --deliver maildir:PATH")
    try:
        return check_delimiter(given)
    except ValueError as error:
        raise SettingError(f"--recipient-delimiter: {error}") from None


def _state(settings: dict[str, Any]) -> Path | None:
    """--state, else the first of systemd's directories (systemd.exec(5), StateDirectory=), else ./state.

    None for LMTP clients: they get a reply for each recipient, so nothing has to be remembered for them.
    """
    if settings["lmtp"]:
        return None
    return Path(settings["state"] or os.environ.get("STATE_DIRECTORY", "").split(":")[0] or "state")
