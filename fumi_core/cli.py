"""``fumi-core``, the program."""

from __future__ import annotations

import sys
from typing import Any

import click

from fumi_core.program.users import hash_password
from fumi_core.program.work import CoreWork
from fumi_core.runtime.lifecycle import hold_reloads, ignore_user_signals, raise_descriptor_limit
from fumi_core.runtime.logs import configure
from fumi_core.runtime.settings import (
    ADDRESS,
    CONFIGURATION_OK,
    COUNT,
    MODE,
    NETWORK,
    OCTETS,
    SECONDS,
    WORKERS,
    Program,
    SettingError,
    config_option,
)
from fumi_core.runtime.workers import run
from fumi_core.smtp.grammar import DOMAIN, MAX_DOMAIN
from fumi_core.version import VERSION


class DomainType(click.ParamType):  # type: ignore[type-arg]
    """A recipient's domain, after the @; stays a string, in the form used in addresses."""

    name = "domain"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        text = str(value)
        if "*" in text:
            self.fail(f"{text!r}: there are no wildcards: name each domain", param, ctx)
        if "," in text or " " in text:
            self.fail(
                f"{text!r} is not one domain: repeat the flag, or separate several by spaces in the environment", param, ctx
            )
        if len(text) > MAX_DOMAIN or not DOMAIN.fullmatch(text):
            self.fail(f"{text!r} is not a domain: write what is behind the @, such as example.org", param, ctx)
        return text


@click.command(cls=Program, context_settings={"auto_envvar_prefix": "FUMI_CORE"})
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
@click.option("--assume-tls", is_flag=True, help="Treat every connection as TLS-protected: for stunnel.")
@click.option("--deliver", metavar="TARGET", help="maildir:PATH, lmtp:ADDR, smtp:ADDR or discard:  [default: maildir:./maildir]")
@click.option(
    "--domain",
    type=DomainType(),
    metavar="NAME",
    multiple=True,
    help="Accept recipients of this domain alone; repeatable. [default: all]",
)
@click.option(
    "--state",
    metavar="DIR",
    type=click.Path(file_okay=False),
    help="Where lmtp: remembers answers that differ. [default: $STATE_DIRECTORY, else ./state]",
)
@click.option("--users", metavar="FILE", type=click.Path(dir_okay=False), help="Password file, NAME:HASH per line.")
@click.option("--sender-login", is_flag=True, help="Reject MAIL from a user whose login it is not, nor login@ one of --domain.")
@click.option("--hash-password", is_flag=True, help="Read a password, print its hash for --users, and exit.")
@click.option("--auth-required", is_flag=True, help="Refuse MAIL before AUTH.")
@click.option("--allow-insecure-auth", is_flag=True, help="Offer AUTH to clients that did not come over TLS, too.")
@click.option("--require-tls", is_flag=True, help="Refuse MAIL from a client that did not come over TLS.")
@click.option("--size", type=OCTETS, help="Largest message, in octets. [default: no limit]")
@click.option(
    "--bare-newlines",
    type=click.Choice(["reject", "normalize"]),
    help="What to do with a CR or LF alone in a message: reject it, or make it a CRLF. [default: reject]",
)
@click.option(
    "--lenient-addresses",
    is_flag=True,
    help="Take addresses without <> or a domain, with dots anywhere or a final dot, as devices and carriers send them.",
)
@click.option("--max-clients", type=COUNT, help="Maximum concurrent connections. [default: no limit]")
@click.option("--name", help="The server's name in banner and trace lines. [default: this host's]")
@click.option("--banner", default="", help="Text after the host name in the banner.")
@click.option("--lmtp", is_flag=True, help="Speak LMTP: an answer for each recipient.")
@click.option("--metrics", type=ADDRESS, help="Serve /metrics, /healthz and /readyz here.")
@click.option("--socket-mode", type=MODE, help="Permissions of Unix listeners, such as 0660. [default: by the umask]")
@click.option("--workers", type=WORKERS, default="1", show_default=True, help="Processes that share the work.")
@click.option(
    "--drain-timeout", type=SECONDS, default=30.0, show_default=True, help="Seconds transactions get to end at SIGTERM."
)
@click.option("--log-format", type=click.Choice(["text", "json"]), default="text", show_default=True)
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="info",
    show_default=True,
    help="From which level on events are logged; debug adds the SMTP dialogue, without credentials and message content.",
)
@config_option("core")
@click.option("--check", is_flag=True, help="Check all settings, the next hop too, and exit.")
@click.version_option(VERSION)
@click.pass_context
def main(ctx: click.Context, /, **settings: Any) -> None:
    """A plaintext SMTP server, to stand behind fumi-edge, HAProxy or stunnel.

    Without MODULE:APP it takes mail for anyone and delivers it: into ./maildir, unless told otherwise.

    \b
      fumi-core --deliver maildir:/var/mail/inbox
      fumi-core --deliver lmtp:unix:/run/dovecot/lmtp
      fumi-core --proxy-protocol off --listen 127.0.0.1:2525 myapp:app

    Every setting can be an environment variable too: FUMI_CORE_LISTEN and so on. SIGHUP has --config and --users
    read again; SIGTERM lets transactions end.
    """
    if settings["hash_password"]:
        try:
            password = _ask_password()
            if not password:
                raise SettingError("--hash-password: there is no password to read")
            click.echo(hash_password(password))
        except UnicodeError:
            raise SettingError("--hash-password: the password is not UTF-8 text") from None
        except ValueError as error:
            raise SettingError(f"--hash-password: {error}") from None
        return
    configure(settings["log_format"], settings["log_level"])
    raise_descriptor_limit()
    ignore_user_signals()
    hold_reloads()
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
