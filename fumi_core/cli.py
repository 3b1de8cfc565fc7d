"""``fumi-core``, the program."""

from __future__ import annotations

import asyncio
import importlib
import logging
import os
import sys
import traceback
from dataclasses import dataclass, replace
from typing import Any

import click
from prometheus_client import CollectorRegistry

from fumi_core import builtin
from fumi_core.app import Fumi
from fumi_core.delivery import TARGETS, Target, parse_target
from fumi_core.metrics import CoreMetrics
from fumi_core.runtime.addresses import SocketAddress, bind
from fumi_core.runtime.endpoint import Endpoint
from fumi_core.runtime.lifecycle import raise_descriptor_limit, stop_signal
from fumi_core.runtime.logs import configure, event
from fumi_core.runtime.settings import ADDRESS, NETWORK, SECONDS, Program, SettingError, config_option
from fumi_core.users import Users, hash_password

log = logging.getLogger("fumi.core")

# Which option of Fumi each flag sets; the defaults are the built-in app's, and a MODULE:APP keeps its own.
_OPTIONS = {
    "proxy_protocol": "proxy_protocol",
    "trusted_proxy": "trusted_proxies",
    "assume_tls": "assume_tls",
    "require_tls": "require_tls",
    "allow_insecure_auth": "allow_insecure_auth",
    "lmtp": "lmtp",
    "size": "size",
    "max_clients": "max_clients",
    "name": "name",
    "banner": "banner",
    "drain_timeout": "close_timeout",
}


@click.command(cls=Program, context_settings={"auto_envvar_prefix": "FUMI_CORE", "help_option_names": ["-h", "--help"]})
@click.argument("app", metavar="[MODULE:APP]", required=False)
@click.option(
    "--listen", type=ADDRESS, multiple=True, default=["127.0.0.1:2525"], show_default=True, help="Where to listen; repeatable."
)
@click.option(
    "--proxy-protocol",
    type=click.Choice(["required", "off"]),
    default="required",
    show_default=True,
    help="Whether every connection begins with a PROXY header.",
)
@click.option("--trusted-proxy", type=NETWORK, multiple=True, help="Who may send that header; repeatable. [default: this host]")
@click.option("--assume-tls", is_flag=True, help="Take every client for one that came over TLS: for stunnel.")
@click.option("--deliver", metavar="TARGET", help="maildir:PATH, lmtp:ADDR, smtp:ADDR or discard:  [default: maildir:./maildir]")
@click.option("--domain", multiple=True, help="Accept recipients of this domain alone; repeatable. [default: all]")
@click.option("--users", metavar="FILE", type=click.Path(dir_okay=False), help="Let these users in: NAME:HASH a line.")
@click.option("--hash-password", is_flag=True, help="Read a password, print its hash for --users, and exit.")
@click.option("--auth-required", is_flag=True, help="Refuse MAIL before AUTH.")
@click.option("--allow-insecure-auth", is_flag=True, help="Offer AUTH to clients that did not come over TLS, too.")
@click.option("--require-tls", is_flag=True, help="Refuse MAIL from a client that did not come over TLS.")
@click.option("--size", type=click.IntRange(1), help="Largest message, in octets. [default: no limit]")
@click.option("--max-clients", type=click.IntRange(1), help="Most clients at once. [default: no limit]")
@click.option("--name", help="The server's name in banner and trace lines. [default: this host's]")
@click.option("--banner", default="", help="Words behind the name in the banner.")
@click.option("--lmtp", is_flag=True, help="Speak LMTP: an answer for each recipient.")
@click.option("--metrics", type=ADDRESS, help="Serve /metrics, /healthz and /readyz here.")
@click.option(
    "--drain-timeout", type=SECONDS, default=30.0, show_default=True, help="Seconds transactions get to end at SIGTERM."
)
@click.option("--log-format", type=click.Choice(["text", "json"]), default="text", show_default=True)
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]), default="info", show_default=True)
@config_option("core")
@click.option("--check", is_flag=True, help="Check all settings, and exit.")
@click.version_option(package_name="fumi")
@click.pass_context
def main(ctx: click.Context, /, **settings: Any) -> None:
    """A plaintext SMTP server, to stand behind fumi-edge, HAProxy or stunnel.

    Without MODULE:APP it takes mail for anyone and delivers it: into ./maildir, unless told otherwise.

    \b
      fumi-core --deliver maildir:/var/mail/inbox
      fumi-core --deliver lmtp:unix:/run/dovecot/lmtp
      fumi-core --proxy-protocol off --listen 127.0.0.1:2525 myapp:app

    Every flag can be given as an environment variable too: FUMI_CORE_LISTEN and so on.
    """
    if settings["hash_password"]:
        click.echo(hash_password(_ask_password()))
        return
    configure(settings["log_format"], settings["log_level"])
    raise_descriptor_limit()
    given = {name for name in settings if ctx.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT}
    program = _program(settings, given)
    if settings["check"]:
        _check((*settings["listen"], *filter(None, [settings["metrics"]])))
        click.echo("settings are good")
        return
    try:
        asyncio.run(_serve(program, settings))
    except OSError as error:
        raise SettingError(str(error)) from None


@dataclass(slots=True)
class _Setup:
    app: Fumi
    target: Target | None
    registry: CollectorRegistry
    metrics: CoreMetrics | None = None


def _program(settings: dict[str, Any], given: set[str]) -> _Setup:
    if settings["app"]:
        for flag in ("deliver", "domain"):
            if flag in given:
                raise SettingError(f"--{flag} belongs to the built-in app; {settings['app']} delivers by itself")
        app, target = _load(settings["app"]), None
        wanted = {flag for flag in _OPTIONS if flag in given}
    else:
        app, target = Fumi(auth_optional=True, logger=True), _target(settings["deliver"] or "maildir:./maildir")
        wanted = {flag for flag in _OPTIONS if settings[flag] not in (None, ())}
    if settings["users"]:
        app.use(_users(settings["users"]))
    elif settings["auth_required"] and not settings["app"]:
        raise SettingError("--auth-required needs --users FILE: nobody could send mail")
    if settings["auth_required"]:
        app.configure(auth_optional=False)
    try:
        app.configure(**{_OPTIONS[flag]: settings[flag] for flag in wanted})
    except ValueError as error:
        raise SettingError(str(error)) from None
    program = _Setup(app, target, CollectorRegistry())
    if settings["metrics"]:
        app.observer = program.metrics = CoreMetrics(program.registry, app.tally, TARGETS if target else ())
    if target is not None:
        try:
            builtin.equip(app, target, settings["domain"])
        except (OSError, ValueError) as error:
            raise SettingError(f"--deliver {settings['deliver']}: {getattr(error, 'strerror', None) or error}") from None
    return program


def _target(text: str) -> Target:
    try:
        return parse_target(text)
    except ValueError as error:
        raise SettingError(f"--deliver: {error}") from None


def _users(path: str) -> Users:
    try:
        return Users(path)
    except OSError as error:
        raise SettingError(f"--users {path}: {error.strerror}") from None
    except ValueError as error:
        raise SettingError(f"--users: {error}") from None


def _ask_password() -> str:
    if sys.stdin.isatty():
        return str(click.prompt("Password", hide_input=True, confirmation_prompt=True, err=True))
    return sys.stdin.readline().rstrip("\r\n")


def _load(reference: str) -> Fumi:
    module, colon, name = reference.partition(":")
    if not (module and colon and name):
        raise SettingError(f"{reference!r} is not MODULE:APP, as in myapp:app")
    sys.path.insert(0, os.getcwd())
    try:
        loaded = importlib.import_module(module)
    except Exception as error:
        at = traceback.extract_tb(error.__traceback__)[-1]
        raise SettingError(f"{reference}: {type(error).__name__}: {error} ({at.filename}:{at.lineno})") from None
    if not hasattr(loaded, name):
        raise SettingError(f"{reference}: {module} has no {name}")
    app = getattr(loaded, name)
    if not isinstance(app, Fumi):
        raise SettingError(f"{reference} is a {type(app).__name__}, not a Fumi")
    return app


def _check(addresses: tuple[SocketAddress, ...]) -> None:
    """Whether the addresses are this host's; a server that runs on them already is no fault."""
    for address in addresses:
        if address.kind == "tcp":
            for sock in _bind(replace(address, port=0)):
                sock.close()
        elif address.kind == "unix" and not os.access(os.path.dirname(address.path) or ".", os.W_OK | os.X_OK):
            raise SettingError(f"--listen {address}: cannot write to its directory")


def _bind(address: SocketAddress) -> list[Any]:
    try:
        return bind(address)
    except OSError as error:
        raise SettingError(f"--listen {address}: {error.strerror or error}") from None


async def _serve(program: _Setup, settings: dict[str, Any]) -> None:
    app = program.app
    for address in settings["listen"]:
        for sock in _bind(address):
            await app.listen(sock=sock)
        event(log, logging.INFO, "listening", address=address, proxy_protocol=app.options.proxy_protocol)
    endpoint = _endpoint(program, settings["metrics"])
    signal = await stop_signal()
    event(log, logging.INFO, "stopping", signal=signal.name)
    await app.close()
    if endpoint is not None:
        endpoint.close()


def _endpoint(program: _Setup, address: SocketAddress | None) -> Endpoint | None:
    if address is None or program.metrics is None:
        return None

    def problem() -> str | None:
        if not program.app.addresses:
            return "not accepting"
        return program.target.problem() if program.target else None

    try:
        return Endpoint(address, program.registry, ready=problem, refresh=program.metrics.refresh)
    except OSError as error:
        raise SettingError(f"--metrics {address}: {error.strerror or error}") from None
