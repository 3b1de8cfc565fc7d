"""The built-in app's log of mail: a line for each message, rejected or deferred sender or recipient, and failed login.

Other apps choose what they log, for example with ``plugins.logger()``.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from fumi_core.app import Fumi
from fumi_core.errors import MessageAborted, SMTPError
from fumi_core.handlers.contexts import AuthContext, Context, DataContext, MailContext, RcptContext
from fumi_core.handlers.middleware import Next
from fumi_core.runtime.logs import event
from fumi_core.smtp.replies import verdict
from fumi_core.smtp.session import Address, log_fields

_log = logging.getLogger("fumi.core.mail")

MAX_NAMED_RECIPIENTS = 10
"""Recipients of a message that its log line names. The line gives only the number of the others."""


def authentications(app: Fumi) -> None:
    """Log the result of each authentication. Use it before the handler that accepts users.

    A name that was not accepted is left out: people type passwords there. An AUTH that ends before there are credentials is
    logged by the dialogue.
    """

    async def auth(ctx: AuthContext, next: Next) -> None:
        method = ctx.credentials.method
        try:
            await next()
        except asyncio.CancelledError:
            _log_line(ctx, "authentication failed", method=method, error="connection closed before the reply")
            raise
        except BaseException as error:
            # Only a wrong password is a failed login: fail2ban and the like must not block clients for an error of the server.
            rejected = isinstance(error, SMTPError) and error.code >= 500
            _log_line(ctx, "authentication failed" if rejected else "authentication deferred", method=method)
            raise
        if ctx.accepted:
            _log_line(ctx, "authentication accepted", method=method, user=ctx.user)
        else:
            _log_line(ctx, "authentication failed", method=method)

    app.on_auth(auth)


def transactions(app: Fumi) -> None:
    """Log messages, rejections (5xx) and deferrals (4xx). Use it before all other handlers that may reject."""

    async def mail_from(ctx: MailContext, next: Next) -> None:
        try:
            await next()
        except SMTPError as error:
            _log_line(ctx, f"sender {verdict(error.code)}", error, **{"from": _path(ctx.address)})
            raise

    async def rcpt_to(ctx: RcptContext, next: Next) -> None:
        try:
            await next()
        except SMTPError as error:
            sender = {"from": _path(ctx.session.envelope.mail_from)}
            _log_line(ctx, f"recipient {verdict(error.code)}", error, **sender, to=ctx.address.address)
            raise

    async def data(ctx: DataContext, next: Next) -> None:
        envelope = ctx.session.envelope
        fields = {"from": _path(envelope.mail_from), "to": _names(envelope.rcpt_to), "user": ctx.session.user}
        try:
            await next()
        except MessageAborted:
            # The client has disconnected; its session's line says so.
            raise
        except SMTPError as error:
            _log_line(ctx, f"message {verdict(error.code)}", error, **fields, size=ctx.stream.size)
            raise
        if ctx.size_exceeded:
            _log_line(ctx, "message rejected", **fields, size=ctx.stream.size, code=552)
        elif ctx.rejected and all(each.address in ctx.rejected for each in envelope.rcpt_to):
            # A client that may try again was deferred, not rejected.
            best = min(ctx.rejected.values(), key=lambda error: error.code)
            _log_line(ctx, f"message {verdict(best.code)}", best, **fields, size=ctx.stream.size)
        else:
            rejected = _names([Address(each, {}) for each in ctx.rejected]) or None
            _log_line(ctx, "message accepted", **fields, size=ctx.stream.size, reply=ctx.accepted, rejected=rejected)

    app.on_mail_from(mail_from)
    app.on_rcpt_to(rcpt_to)
    app.on_data(data)


def _log_line(ctx: Context, words: str, error: SMTPError | None = None, /, **fields: object) -> None:
    if error is not None:
        fields |= {"code": error.code, "reply": error.message}
    event(_log, logging.INFO, words, **log_fields(ctx.session), **fields)


def _path(address: Address | None) -> str:
    return (address.address if address else "") or "<>"


def _names(addresses: Sequence[Address]) -> str:
    named = ",".join(each.address for each in addresses[:MAX_NAMED_RECIPIENTS])
    return named if len(addresses) <= MAX_NAMED_RECIPIENTS else f"{named},and {len(addresses) - MAX_NAMED_RECIPIENTS} more"
