"""The SMTP dialogue in the log, for debugging: each command and each reply, without credentials and message content.

A client may send either in the place of a command: a password after a rejected AUTH, or message content after a rejected DATA. So
only lines with the form of a command are logged, and of their arguments only what SMTP defines.
"""

from __future__ import annotations

import logging
import re
from typing import Any

from fumi_core.runtime.logs import event
from fumi_core.smtp import sasl
from fumi_core.smtp.events import Event
from fumi_core.smtp.grammar import VERBS
from fumi_core.smtp.protocol import Protocol
from fumi_core.smtp.replies import Reply

log = logging.getLogger("fumi.core.dialogue")

_VERBS = "|".join(verb for verb in VERBS if verb != "AUTH")
# The verbs whose arguments are shown: a path, a name, a size, attributes. Other verbs have free text, or no argument.
_SHOWN = re.compile(
    rb"(?i:(?:HELO|EHLO|LHLO) \S+"
    rb"|(?:MAIL FROM|RCPT TO): *(?:<[^>]*>|\S+)(?: +(?:[A-Z0-9-]+=\S*|SMTPUTF8|REQUIRETLS))*"
    rb"|BDAT \d+(?: LAST)?|(?:XCLIENT|XFORWARD)(?: [A-Z]+=\S*)+)\s*"
)
_VERB = re.compile(rf"(?i:({_VERBS}))(?: (.*))?\s*".encode(), re.DOTALL)
_AUTH = re.compile(rf"(?i:(AUTH(?: (?:{'|'.join(sasl.MECHANISMS)}))?))(?: .*)?\s*".encode(), re.DOTALL)


def shown(line: bytes) -> str:
    """Make a line that a client sent in the place of a command safe for the log."""
    if _SHOWN.fullmatch(line):
        return line.decode("utf-8", "replace").rstrip()
    found = _VERB.fullmatch(line)
    if found is not None:
        return found[1].decode() + (" …" if (found[2] or b"").strip() else "")
    found = _AUTH.fullmatch(line)
    if found is not None:
        return found[1].decode() + (" …" if len(line.rstrip()) > len(found[1]) else "")
    return f"({len(line)} bytes, not a command)"


class LoggedProtocol(Protocol):
    """A protocol that logs its commands and replies. Used only for logged connections, so that others pay nothing."""

    def _command(self, line: bytes) -> Event | Reply | None:
        self._log(received=shown(line))
        return super()._command(line)

    def _respond(self, line: bytes) -> Event | Reply:
        self._log(received=f"({len(line)} bytes, response to an AUTH challenge)")
        return super()._respond(line)

    def _encoded(self, reply: Reply) -> bytes:
        data = super()._encoded(reply)
        self._log(sent=data.decode().rstrip())
        return data

    def _log(self, **fields: Any) -> None:
        event(log, logging.DEBUG, "dialogue", id=self.session.id, **fields)
