"""``logger()``: logs each step of a client, and its result."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

from fumi_core.app import Fumi
from fumi_core.errors import MessageAborted, SMTPError
from fumi_core.handlers.contexts import AuthContext, CloseContext, ConnectContext, Context, DataContext, MailContext, RcptContext
from fumi_core.handlers.middleware import Next
from fumi_core.runtime.logs import event
from fumi_core.smtp.replies import verdict
from fumi_core.smtp.session import Session, log_fields

_log = logging.getLogger("fumi.core.events")


def logger() -> Callable[[Fumi], None]:
    """Log connects, authentications, senders, recipients, messages and closes, at level INFO, to ``fumi.core.events``.

    A proxy's health checks are logged at level DEBUG.

    Use it first: it then sees the results of all later handlers, rejections included. Passwords and other credentials are never
    logged; a user name only when the login succeeded, since people type passwords there. Without the ``fumi-core`` program,
    ``logging.basicConfig(level=logging.INFO)`` is enough to see the lines.
    """

    def plugin(app: Fumi) -> None:
        lines = _Lines()
        app.on_connect(lines.connect)
        app.on_auth(lines.auth)
        app.on_mail_from(lines.mail_from)
        app.on_rcpt_to(lines.rcpt_to)
        app.on_data(lines.data)
        app.on_close(lines.close)

    return plugin


class _Lines:
    def __init__(self) -> None:
        self._connected: dict[Session, float] = {}  # on_close follows every on_connect, and removes the entry

    async def connect(self, ctx: ConnectContext, next: Next) -> None:
        session = ctx.session
        self._connected[session] = time.monotonic()
        tls = session.tls.version if session.tls else ("yes" if session.secure else None)
        fields = {"proxy": session.proxy_address, "tls": tls}
        await _outcome(ctx, next, "connection", fields)

    async def auth(self, ctx: AuthContext, next: Next) -> None:
        fields = {"method": ctx.credentials.method}
        try:
            await next()
        except Exception as error:
            words = "authentication deferred" if _verdict(error) == "deferred" else "authentication failed"
            _log_line(ctx, words, **fields, **_refusal(error))
            raise
        except asyncio.CancelledError:
            _log_line(ctx, "authentication failed", **fields, error="connection closed before the reply")
            raise
        if ctx.accepted:
            _log_line(ctx, "authentication accepted", **fields, user=ctx.credentials.username)
        else:
            _log_line(ctx, "authentication failed", **fields, code=ctx.default_code)

    async def mail_from(self, ctx: MailContext, next: Next) -> None:
        await _outcome(ctx, next, "sender", {"from": ctx.address.address or "<>"})

    async def rcpt_to(self, ctx: RcptContext, next: Next) -> None:
        await _outcome(ctx, next, "recipient", {"to": ctx.address.address})

    async def data(self, ctx: DataContext, next: Next) -> None:
        started = time.monotonic()
        envelope = ctx.session.envelope
        failure = await _failure_of(ctx, next)
        fields: dict[str, Any] = {
            "from": (envelope.mail_from.address if envelope.mail_from else "") or "<>",
            "recipients": len(envelope.rcpt_to),
            "size": ctx.stream.size,
            "seconds": round(time.monotonic() - started, 3),
        }
        if isinstance(failure, MessageAborted):
            _log_line(ctx, "message aborted", **fields, error=failure)
        elif ctx.size_exceeded:
            _log_line(ctx, "message rejected", **fields, code=552)
        elif failure is not None:
            _log_line(ctx, f"message {_verdict(failure)}", **fields, **_refusal(failure))
        else:
            # In LMTP each recipient has its own reply.
            errors = [ctx.rejected.get(each.address) for each in envelope.rcpt_to]
            best = min((error.code if error else 250 for error in errors), default=250)
            rejected = sum(error is not None for error in errors) or None
            _log_line(ctx, f"message {verdict(best)}", **fields, recipients_rejected=rejected)
        if failure is not None:
            raise failure

    async def close(self, ctx: CloseContext, next: Next) -> None:
        started = self._connected.pop(ctx.session, None)
        seconds = None if started is None else round(time.monotonic() - started, 3)
        _log_line(ctx, "connection closed", seconds=seconds, transactions=ctx.session.transaction)
        await next()


async def _outcome(ctx: Context, next: Next, what: str, fields: dict[str, Any]) -> None:
    try:
        await next()
    except Exception as error:
        _log_line(ctx, f"{what} {_verdict(error)}", **fields, **_refusal(error))
        raise
    _log_line(ctx, f"{what} accepted", **fields)


async def _failure_of(ctx: DataContext, next: Next) -> Exception | None:
    """Run the other handlers and return their error. Waits until the message has arrived, since its size is known only then."""
    failure = None
    try:
        await next()
    except Exception as error:
        failure = error
    try:
        await ctx.stream.skip()
    except Exception as error:
        return failure or error
    return failure


def _verdict(error: Exception) -> str:
    """Other exceptions are answered 451, or 421 to a connection."""
    return verdict(error.code if isinstance(error, SMTPError) else 451)


def _refusal(error: Exception) -> dict[str, Any]:
    if isinstance(error, SMTPError):
        return {"code": error.code, "reply": error.message}
    return {"error": type(error).__name__}


def _log_line(ctx: Context, words: str, **fields: Any) -> None:
    level = logging.DEBUG if ctx.session.health_check else logging.INFO
    event(_log, level, words, **log_fields(ctx.session), **fields)
