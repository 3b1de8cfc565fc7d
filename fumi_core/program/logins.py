"""Who may log in: the users of --users or of Dovecot, and the flags that have no effect without them."""

from __future__ import annotations

import logging
from typing import Any

from fumi_core.app import Fumi
from fumi_core.plugins.dovecot.auth import METHODS, DovecotAuth
from fumi_core.program import mail_log
from fumi_core.program.users import Users
from fumi_core.runtime.logs import event
from fumi_core.runtime.settings import SettingError

_log = logging.getLogger("fumi.core")


def dovecot_at(address: object) -> DovecotAuth:
    """The plugin for --dovecot-auth. Raises SettingError."""
    try:
        return DovecotAuth(str(address))
    except ValueError as error:
        raise SettingError(f"--dovecot-auth: {str(error).removeprefix('dovecot_auth: ')}") from None


def use_logins(app: Fumi, settings: dict[str, Any], dovecot: DovecotAuth | None) -> None:
    """Let the app's clients log in as the settings say. Raises SettingError."""
    if not settings["users"] and dovecot is None:
        _refuse_flags_of_users(settings)
        return
    if settings["users"] and dovecot is not None:
        raise SettingError("--users and --dovecot-auth exclude each other: remove one of them")
    if not settings["app"]:
        app.use(mail_log.authentications)
    if dovecot is not None:
        app.use(dovecot)
        if not settings["app"]:
            app.configure(auth_methods=METHODS)
        return
    app.use(users := _users(settings["users"]))
    if settings["sender_login"]:
        _refuse_senders_of_nobody(settings, users)


def _refuse_flags_of_users(settings: dict[str, Any]) -> None:
    needed = "--users FILE or --dovecot-auth ADDR"
    if settings["auth_required"] and not settings["app"]:
        raise SettingError(f"--auth-required needs {needed}; otherwise no client can send mail")
    if settings["sender_login"]:
        raise SettingError(f"--sender-login needs {needed}: without logins it has no effect")


def _users(path: str) -> Users:
    try:
        users = Users(path)
        if not len(users):
            event(_log, logging.WARNING, "no users in the file: nobody can log in", file=path)
        return users
    except OSError as error:
        raise SettingError(f"--users {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise SettingError(f"--users {path}: the file is not UTF-8 text") from None
    except ValueError as error:
        raise SettingError(f"--users: {error}") from None


def _refuse_senders_of_nobody(settings: dict[str, Any], users: Users) -> None:
    if len(users) and not settings["domain"] and not any("@" in name for name in users.names):
        words = "no user can send mail: name the users by their addresses (joe@example.org), or add --domain"
        raise SettingError(f"--sender-login: {words}")
