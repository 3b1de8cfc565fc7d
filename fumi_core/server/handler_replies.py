"""The reply that a handler's decision, or its failure, leads to. A failure is logged, and answered 451 4.3.0."""

from __future__ import annotations

import logging

from fumi_core.errors import SMTPError
from fumi_core.handlers.contexts import Context, DataContext
from fumi_core.runtime.logs import failure
from fumi_core.smtp import replies
from fumi_core.smtp.replies import Reply, from_text
from fumi_core.smtp.session import Session, log_fields

_log = logging.getLogger("fumi.core")


def rejection(context: Context, error: BaseException) -> Reply:
    """The reply to a command whose handlers raised ``error``. Anything but an SMTPError with a valid reply is logged."""
    if isinstance(error, SMTPError):
        try:
            return _reply_to(error, context)
        except Exception as unusable:
            error = unusable
    log_handler_failure(context, error)
    return replies.LOCAL_ERROR


def acceptance(context: DataContext) -> Reply:
    """The reply to an accepted message."""
    if context.accepted is None:
        return replies.OK
    try:
        return from_text(250, str(context.accepted))
    except Exception as unusable:
        log_handler_failure(context, unusable)
        return replies.LOCAL_ERROR


def log_handler_failure(context: Context, error: BaseException) -> None:
    log_failure(context.session, "handler failed", error, context.hook, context.command)


def log_failure(
    session: Session, message: str, error: BaseException, hook: str | None = None, command: str | None = None
) -> None:
    failure(_log, message, error, **log_fields(session), hook=hook, command=command)


def _reply_to(error: SMTPError, context: Context) -> Reply:
    """Convert an SMTPError. Raises if an app has changed it, or subclassed it without calling its constructor."""
    sound = SMTPError(error.message, error.code)
    status = context.default_status if sound.code == context.default_code else None
    return from_text(sound.code, sound.message, status)
