"""Adds trace header fields (RFC 5321 §4.4) at the top of a message that arrives in pieces."""

from __future__ import annotations

import re
from collections.abc import Iterable

from fumi_core.smtp.grammar import Address
from fumi_core.smtp.session import Session

MAX_LINE_BYTES = 998
"""Bytes of a line, without CRLF (RFC 5322 §2.1.1). A line without a colon by then does not count as a header field."""

# field-name, and the space that RFC 5322 §4.5 (obs-optional) still allows before the colon
_FIELD = re.compile(rb"[!-9;-~]+[ \t]*:")
_PERHAPS_FIELD = re.compile(rb"(?:[!-9;-~]+[ \t]*|\r?)\Z")


def trace_headers(session: Session, recipients: Iterable[Address]) -> bytes:
    """The fields that final delivery adds at the top: Return-Path, a Delivered-To for each of these recipients, Received."""
    envelope = session.envelope
    sender = envelope.mail_from.address if envelope.mail_from else ""
    names = dict.fromkeys(each.address for each in recipients)
    lines = [f"Return-Path: <{sender}>\r\n", *(f"Delivered-To: {each}\r\n" for each in names)]
    return ("".join(lines) + session.received_header()).encode()


class Traced:
    """Joins trace header fields and a message, which arrives in pieces of any length.

    An empty line goes between them when the message does not begin with a header field or an empty line: without it, a first
    line that begins with a space or tab would continue the last trace field, and other text would become part of the header.
    """

    __slots__ = ("_begun", "_fields", "_text")

    def __init__(self, fields: bytes) -> None:
        """``fields`` are whole lines, each with its CRLF."""
        self._fields = fields
        self._text = b""
        self._begun = False

    def feed(self, piece: bytes) -> bytes:
        """Take the next piece of the message; return what can be passed on, which is nothing until the first line is complete."""
        if self._begun:
            return piece
        self._text += piece
        if len(self._text) <= MAX_LINE_BYTES and _PERHAPS_FIELD.match(self._text):
            return b""
        return self.end()

    def end(self) -> bytes:
        """Return the rest when the message has ended."""
        if self._begun:
            return b""
        self._begun = True
        joined = not self._text or self._text.startswith(b"\r\n") or _FIELD.match(self._text, 0, MAX_LINE_BYTES) is not None
        return self._fields + (b"" if joined else b"\r\n") + self._text
