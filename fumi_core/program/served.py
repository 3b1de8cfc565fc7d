"""An app of the program: built from settings, and built again from other settings at a reload."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fumi_core.app import Fumi
from fumi_core.delivery import DeliveryTarget, parse_target
from fumi_core.delivery.maildir_recipients import has_variables
from fumi_core.plugins.dovecot.auth import DovecotAuth
from fumi_core.program import builtin
from fumi_core.program.filters import check_filters, filters
from fumi_core.program.logins import dovecot_at, use_logins
from fumi_core.program.option_flags import OPTIONS, error_text
from fumi_core.runtime.settings import SettingError
from fumi_core.smtp.mailboxes import check_delimiter

Settings = Mapping[str, Any]
"""The values of the flags, by their names."""


class Built(NamedTuple):
    """The result of ``ServedApp.build``."""

    settings: dict[str, Any]
    app: Fumi
    target: DeliveryTarget | None
    dovecot: DovecotAuth | None


class ServedApp:
    """An app that listens, with the delivery target and the logins of its settings."""

    def __init__(self, app: Fumi, *, dry: bool = False) -> None:
        """``dry`` is for ``check()`` only: no directories and files are created. Call ``adopt(build(…))`` first."""
        self.app = app
        self.settings: dict[str, Any] = {}
        self.target: DeliveryTarget | None = None
        self.sockets: list[socket.socket] = []
        """The listening sockets of its clients."""
        self.names: list[str] = []
        """The addresses of these sockets."""
        # A module is imported once; each reload starts from the app that it defined.
        self._own = Fumi().adopt(app)
        self._dry = dry
        self._dovecot: DovecotAuth | None = None

    def build(self, settings: Settings, given: Collection[str]) -> Built:
        """Build an app from the settings, without changing the present one; ``given`` were given. Raises SettingError."""
        settings = dict(settings)
        app, target = Fumi().adopt(self._own), None
        app.observer = self.app.observer
        if settings["app"]:
            _refuse_builtin_flags(settings, given)
            wanted = {flag for flag in OPTIONS if flag in given}
        else:
            app.configure(auth_optional=True, logger=True)
            target = self._target_for(settings)
            wanted = {flag for flag in OPTIONS if settings[flag] not in (None, ())}
        dovecot = self._dovecot_for(settings)
        use_logins(app, settings, dovecot)
        milters = filters(settings, target)
        if settings["proxy_protocol"] == "off" and not settings["app"]:
            _refuse_proxy_flags(settings)
        if settings["auth_required"]:
            app.configure(auth_optional=False)
        try:
            app.configure(**{OPTIONS[flag]: settings[flag] for flag in wanted})
        except ValueError as error:
            raise SettingError(error_text(error)) from None
        if target is not None and not self._dry:
            _equip(app, target, settings, milters)
        return Built(settings, app, target, dovecot)

    def adopt(self, built: Built) -> None:
        """Use the result of ``build`` for new connections."""
        self.app.adopt(built.app)
        self.settings, self.target, self._dovecot = built.settings, built.target, built.dovecot

    def check(self) -> str | None:
        """Check that clients can send mail, and that the target can deliver. Returns its remark. Raises SettingError."""
        settings = self.settings
        if settings["app"] and (problem := self.app.startup_problem()):
            raise SettingError(f"{settings['app']}: no client can send mail: {problem}")
        try:
            remark = self.target.check() if self.target is not None else None
        except OSError as error:
            raise SettingError(f"--deliver {settings['deliver']}: {error.strerror or error}") from None
        check_filters(settings["milter"])
        if self._dovecot is not None and (problem := asyncio.run(self._dovecot.problem())):
            raise SettingError(f"--dovecot-auth {settings['dovecot_auth']}: {problem}")
        return remark

    def _dovecot_for(self, settings: Settings) -> DovecotAuth | None:
        """Return the present plugin if its address is the same, to keep its connection."""
        address = settings["dovecot_auth"]
        if self._dovecot is not None and address == self.settings["dovecot_auth"]:
            return self._dovecot
        return None if address is None else dovecot_at(address)

    def _target_for(self, settings: Settings) -> DeliveryTarget:
        """Return the present target if its settings are the same, to keep its threads and connections."""
        delimiter = _delimiter(settings)
        wanted = settings["deliver"], _state(settings), delimiter
        if self.target is not None and wanted == (self.settings["deliver"], _state(self.settings), _delimiter(self.settings)):
            return self.target
        try:
            return parse_target(*wanted)
        except ValueError as error:
            raise SettingError(f"--deliver: {error}") from None


def _refuse_builtin_flags(settings: Settings, wanted: Collection[str]) -> None:
    for flag in ("deliver", "domain", "recipient_delimiter", "state"):
        if flag in wanted:
            raise SettingError(f"--{flag.replace('_', '-')} belongs to the built-in app; {settings['app']} delivers by itself")
    if settings["sender_login"]:
        raise SettingError(f"--sender-login belongs to the built-in app; {settings['app']} can use plugins.sender_login()")
    if settings["milter"]:
        raise SettingError(f"--milter belongs to the built-in app; {settings['app']} can use plugins.milter()")


def _refuse_proxy_flags(settings: Settings) -> None:
    """Refuse flags that have no effect without PROXY headers, or that would keep every client from sending mail."""
    if settings["trusted_proxy"]:
        raise SettingError("--trusted-proxy has no effect with --proxy-protocol off: remove one of them")
    if settings["require_tls"] and not settings["assume_tls"]:
        raise SettingError("--require-tls needs PROXY headers or --assume-tls; otherwise no client can send mail")


def _equip(app: Fumi, target: DeliveryTarget, settings: Settings, milters: Sequence[Callable[[Fumi], None]]) -> None:
    try:
        builtin.equip(app, target, settings["domain"], own_senders=settings["sender_login"], milters=milters)
    except (OSError, ValueError) as error:
        raise SettingError(f"--deliver {settings['deliver']}: {getattr(error, 'strerror', None) or error}") from None


def _delimiter(settings: Settings) -> str:
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


def _state(settings: Settings) -> Path | None:
    """--state, else the first of systemd's directories (systemd.exec(5), StateDirectory=), else ./state.

    None for LMTP clients: they get a reply for each recipient, so nothing has to be remembered for them.
    """
    if settings["lmtp"]:
        return None
    return Path(settings["state"] or os.environ.get("STATE_DIRECTORY", "").split(":")[0] or "state")
