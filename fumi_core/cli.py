"""The program ``fumi-core``: its flags, and what it does with them."""

from __future__ import annotations

import sys
from typing import Any

import click
from click.shell_completion import CompletionItem

from fumi_core.delivery import TARGETS
from fumi_core.program.listeners import LISTENER_KEYS
from fumi_core.program.option_flags import option_flag
from fumi_core.program.reloading import serve_reloading
from fumi_core.program.users import hash_password
from fumi_core.program.work import CoreWork
from fumi_core.runtime.config_file import config_option
from fumi_core.runtime.flag_groups import heading
from fumi_core.runtime.flag_types import ADDRESS, BYTES, COUNT, MODE, NETWORK, WORKERS
from fumi_core.runtime.lifecycle import prepare
from fumi_core.runtime.settings import CONFIGURATION_OK, Program, SettingError
from fumi_core.runtime.workers import run
from fumi_core.smtp.grammar import DOMAIN, MAX_DOMAIN
from fumi_core.version import VERSION


class DomainType(click.ParamType):  # type: ignore[type-arg]
    """The domain of recipients, which follows the @. The value stays a string, as in addresses."""

    name = "domain"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        text = str(value)
        if "*" in text:
            self.fail(f"{text!r}: wildcards are not supported: name each domain", param, ctx)
        if "," in text or " " in text:
            self.fail(
                f"{text!r} is not one domain: repeat the flag, or separate several by spaces in the environment", param, ctx
            )
        if len(text) > MAX_DOMAIN or not DOMAIN.fullmatch(text):
            self.fail(f"{text!r} is not a domain: write what follows the @, such as example.org", param, ctx)
        return text


def complete_target(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The delivery targets that begin so, for a shell."""
    return [CompletionItem(f"{name}:") for name in TARGETS if name.startswith(incomplete)]


@click.command(cls=Program, context_settings={"auto_envvar_prefix": "FUMI_CORE"})
@click.argument("app", metavar="[MODULE:APP]", required=False)
@heading("Connections")
@click.option("--listen", type=ADDRESS, multiple=True, default=["127.0.0.1:2525"], help="Listens on this address. Repeatable.")
@option_flag("--proxy-protocol", default="required")
@option_flag("--trusted-proxy", type=NETWORK, multiple=True, show_default="this host")
@option_flag("--assume-tls")
@option_flag("--max-clients", type=COUNT, show_default="no limit")
@click.option("--socket-mode", type=MODE, show_default="by the umask", help="Permissions of Unix sockets, such as 0660.")
@heading("Mail")
@click.option(
    "--deliver",
    metavar="TARGET",
    default="maildir:./maildir",
    shell_complete=complete_target,
    help="Delivery target: discard:, maildir:PATH, smtp:ADDR or lmtp:ADDR.",
)
@click.option(
    "--domain",
    type=DomainType(),
    metavar="NAME",
    multiple=True,
    show_default="all",
    help="Accepts recipients of this domain only, without wildcards. Repeatable.",
)
@click.option(
    "--recipient-delimiter",
    metavar="C",
    show_default="+",
    help="Separates the user's name from a detail in a local part.",
)
@click.option(
    "--milter", type=ADDRESS, multiple=True, help="Checks mail with the mail filter (milter) at this address. Repeatable."
)
@click.option(
    "--milter-failure",
    type=click.Choice(["tempfail", "accept"]),
    default="tempfail",
    help="Treatment of mail when a mail filter fails.",
)
@option_flag("--size", type=BYTES, show_default="no limit")
@option_flag("--lmtp")
@option_flag("--name", show_default="this host's")
@option_flag("--banner")
@option_flag("--bare-newlines")
@option_flag("--lenient-addresses")
@heading("Authentication")
@click.option("--users", metavar="FILE", type=click.Path(dir_okay=False), help="Password file, NAME:HASH per line.")
@click.option("--dovecot-auth", type=ADDRESS, help="Checks logins with Dovecot, on its auth-client socket.")
@click.option("--auth-required", is_flag=True, help="Rejects MAIL before AUTH.")
@click.option("--sender-login", is_flag=True, help="Rejects senders other than the user's own address.")
@option_flag("--require-tls")
@option_flag("--allow-insecure-auth")
@click.option("--hash-password", is_flag=True, help="Reads a password, prints its hash for --users, and exits.")
@heading("Operation")
@config_option("core", LISTENER_KEYS)
@click.option(
    "--state",
    metavar="DIR",
    type=click.Path(file_okay=False),
    show_default="$STATE_DIRECTORY, else ./state",
    help="Stores differing replies of an LMTP server here.",
)
@click.option("--metrics", type=ADDRESS, help="Serves /metrics, /healthz, /readyz and, at /, the status page.")
@click.option("--workers", type=WORKERS, default="1", help="Number of processes that share the work; auto is one per CPU.")
@option_flag("--drain-timeout")
@click.option("--log-format", type=click.Choice(["text", "json"]), default="text", help="Log format.")
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="info",
    help="Lowest level that is logged. debug adds the SMTP dialogue, without credentials and message content.",
)
@click.option(
    "--reload", is_flag=True, help="For development: restarts when a file of MODULE:APP, or of a module that it imports, changes."
)
@click.option(
    "--check", is_flag=True, help="Checks all settings, connects to the next hop and reads its banner, changes nothing and exits."
)
@click.version_option(VERSION, help="Prints the version and exits.")
@click.pass_context
def main(ctx: click.Context, /, **settings: Any) -> None:
    """An SMTP server in plaintext, for use behind fumi-edge, HAProxy or stunnel.

    Runs the app APP of the Python module MODULE; with MODULE:MAKE(), the app that its function MAKE returns. Without an app, it
    accepts mail and delivers it, to ./maildir by default.

    \b
      fumi-core --deliver maildir:/var/mail/inbox
      fumi-core --deliver lmtp:unix:/run/dovecot/lmtp
      fumi-core --proxy-protocol off --listen 127.0.0.1:2525 myapp:app

    Each setting can also be an environment variable, such as FUMI_CORE_LISTEN, or a key in the file of --config. SIGHUP reloads
    that file and --users. SIGTERM stops the server when all transactions have ended, after --drain-timeout at the latest.
    """
    if settings["hash_password"]:
        try:
            password = _ask_password()
            if not password:
                raise SettingError("--hash-password: the password is empty")
            click.echo(hash_password(password))
        except UnicodeError:
            raise SettingError("--hash-password: the password is not UTF-8 text") from None
        except ValueError as error:
            raise SettingError(f"--hash-password: {error}") from None
        return
    prepare(settings["log_format"], settings["log_level"])
    if settings["reload"]:
        serve_reloading(ctx)
        return
    work = CoreWork(ctx, dry=settings["check"])
    if settings["check"]:
        for remark in work.check():
            click.echo(remark)
        click.echo(CONFIGURATION_OK)
        return
    run(work, settings["workers"])


def _ask_password() -> str:
    if sys.stdin.isatty():
        return str(click.prompt("Password", hide_input=True, confirmation_prompt=True, err=True))
    return sys.stdin.buffer.readline().decode().rstrip("\r\n")
