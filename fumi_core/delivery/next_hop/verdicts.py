"""The next hop's verdict on a recipient or a message, and the error that the client gets for it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

from fumi_core.client.connection import Failure
from fumi_core.client.replies import ReceivedReply
from fumi_core.errors import SMTPError
from fumi_core.runtime.logs import event
from fumi_core.smtp.session import Session

_log = logging.getLogger("fumi.core")

Verdict = ReceivedReply | Failure
"""The next hop's reply, or why there is no reply."""

_MISCONFIGURED = (530, 534, 535, 538)
"""Replies of a server that requires STARTTLS or AUTH (RFC 3207 §4, RFC 4954 §6): the client cannot correct that."""


def error_for(verdict: Verdict) -> SMTPError | None:
    """The error to reply with: the next hop's own code and text. A 421 ends the next hop's connection, not the client's."""
    if isinstance(verdict, Failure):
        return SMTPError(verdict.text, 451)
    if verdict.positive:
        return None
    if verdict.code in _MISCONFIGURED:
        return SMTPError("4.3.5 Next hop does not accept mail from this server, try again later", 451)
    return SMTPError(verdict.text, 451 if verdict.code == 421 else verdict.code)


def final(verdicts: Mapping[str, Verdict]) -> dict[str, ReceivedReply]:
    """The final verdicts: accepted, or rejected permanently."""
    found = {}
    for name, verdict in verdicts.items():
        error = error_for(verdict)
        if isinstance(verdict, ReceivedReply) and (error is None or error.code >= 500):
            found[name] = verdict
    return found


def log_verdicts(session: Session, next_hop: str, verdicts: Iterable[Verdict]) -> None:
    """Log a failure of the next hop, or that it requires what this client cannot do. ``next_hop`` is its name for the log."""
    for verdict in dict.fromkeys(verdicts):
        if isinstance(verdict, Failure):
            event(_log, logging.WARNING, "next hop failed", id=session.id, next_hop=next_hop, error=verdict)
            return
        if verdict.code in _MISCONFIGURED:
            words = "next hop requires STARTTLS or AUTH: mail is deferred until it accepts this server without them"
            event(_log, logging.ERROR, words, id=session.id, next_hop=next_hop, reply=verdict)
            return
