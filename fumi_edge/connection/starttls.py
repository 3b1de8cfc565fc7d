"""The SMTP preamble of a STARTTLS port (RFC 3207), sans-IO: takes bytes of both sides, returns bytes for both and a decision.

Until the client upgrades, the dialogue is in lock-step: one command from the client, one whole reply from the backend. The edge
therefore knows which bytes came in plaintext, offers STARTTLS only in the reply to EHLO or LHLO, and never takes bytes sent after
STARTTLS in plaintext for bytes sent inside TLS: it rejects the client (RFC 3207 §4.2, CVE-2011-0411). A client can still upgrade
after a 530 to MAIL, or after it has sent messages in plaintext: the content of DATA, BDAT and AUTH is forwarded unread, up to the
next command.

    BANNER ──reply──▶ COMMAND ──forwarded──▶ REPLY ──reply──▶ COMMAND …
                         │                     └ 3yz to DATA or AUTH → TEXT, RESPONSE ──end──▶ REPLY
                         │ BDAT → CHUNK ──end──▶ REPLY
                         │ STARTTLS → UPGRADE, with bytes after it → INJECTION
                         └ not SMTP at all → NOT_SMTP

``negotiation.py`` looks for bytes after STARTTLS that arrive later, before it sends the 220.

The decision is PLAINTEXT, and the tunnel carries all that follows, when the beginning of the next command cannot be known (a BDAT
that does not follow RFC 3030, a very long line of AUTH or BDAT, a 3yz reply to another command) or content begins and STARTTLS
was not offered.
"""

from __future__ import annotations

import enum
import re
from typing import NamedTuple

from fumi_core.smtp.grammar import HTTP_REQUEST
from fumi_edge.backends.replies import Replies

LINE_LIMIT = 4096

READY = b"220 2.0.0 Ready to start TLS\r\n"
NO_ARGUMENT = b"501 5.5.4 Syntax: STARTTLS takes no argument\r\n"
MUST_STARTTLS = b"530 5.7.0 Must issue a STARTTLS command first\r\n"
LINE_TOO_LONG = b"500 5.5.2 Error: line too long\r\n"
INJECTED = b"554 5.7.0 Error: commands behind STARTTLS are refused\r\n"
NOT_SMTP = b"554 5.5.1 Error: this is an SMTP server\r\n"

TOO_MANY_ERRORS = b"421 4.7.0 Error: too many errors\r\n"
MAX_ERRORS = 20

_CHUNK = re.compile(rb"BDAT (\d{1,18})( LAST)?\r\n", re.IGNORECASE)
"""Exactly RFC 3030 §2, so that every correct backend reads the same chunk size."""
_END_OF_TEXT = b"\r\n.\r\n"
_LONG_COMMANDS = frozenset((b"AUTH", b"BDAT"))
"""Commands whose line may be longer (RFC 4954 §4); the backend enforces its own limit."""
_COMMANDS_BEFORE_TLS = frozenset((b"EHLO", b"HELO", b"NOOP", b"RSET", b"HELP", b"QUIT"))
_WITHHELD_KEYWORDS = frozenset(
    (b"AUTH", b"CHUNKING", b"BINARYMIME", b"ETRN", b"ATRN", b"BURL", b"VRFY", b"EXPN", b"XCLIENT", b"XFORWARD")
)
"""EHLO keywords of commands that are answered 530 before TLS. A client that sees AUTH may send its password at once."""
_LINE = re.compile(rb"[^\n]*\n")
_KEYWORD = re.compile(rb"[^ \t\r\n=]*")
_VERB = re.compile(rb"[^ \t\r\n]*")
_BINARY = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\xff]")


class Verdict(enum.Enum):
    """How a preamble ends."""

    UPGRADE = "upgraded"
    PLAINTEXT = "plaintext"
    INJECTION = "injection"
    NOT_SMTP = "not_smtp"
    ERRORS = "errors"


class Step(NamedTuple):
    """Bytes for the client and the backend and, at the end, the verdict. With PLAINTEXT the tunnel sends these bytes first."""

    client: bytes = b""
    backend: bytes = b""
    verdict: Verdict | None = None


class _Await(enum.Enum):
    REPLY = 1
    GREETING_REPLY = 2
    DATA_REPLY = 3
    AUTH_REPLY = 4
    COMMAND = 5
    TEXT = 6
    CHUNK = 7
    RESPONSE = 8


_CONTENT = (_Await.TEXT, _Await.CHUNK, _Await.RESPONSE)
_REPLY_TO = {
    b"EHLO": _Await.GREETING_REPLY,
    b"LHLO": _Await.GREETING_REPLY,
    b"DATA": _Await.DATA_REPLY,
    b"AUTH": _Await.AUTH_REPLY,
}


class Preamble:
    """The preamble of one connection. It must not be used after a verdict."""

    def __init__(self, require_tls: bool = False, hide_starttls: bool = False) -> None:
        self._require_tls = require_tls
        self._hide = hide_starttls
        self._await = _Await.REPLY
        self._replies = Replies()
        self._commands = b""
        self._overlong = False
        self._errors = 0
        self._offered = False
        self._text_before = b""
        self._chunk_left = 0
        self.refused = False
        """Whether a command was answered 530."""

    @property
    def wants_client(self) -> bool:
        """Whether it is the client's turn. Otherwise the client must not be read."""
        return self._await is _Await.COMMAND or self._await in _CONTENT

    @property
    def in_content(self) -> bool:
        """Whether the client's next bytes belong to a message or to an AUTH response, and are not a command."""
        return self._await in _CONTENT

    @property
    def held(self) -> int:
        """Number of backend bytes that are held until the reply is complete or the client's content has ended."""
        return len(self._replies.rest)

    def receive_from_backend(self, data: bytes) -> Step:
        """Take bytes from the backend. A whole reply goes to the client; then the client's next waiting command is acted on."""
        if self._await is _Await.COMMAND:
            # A reply without a command, such as a 421 when the backend shuts down.
            return Step(client=data)
        if self._await in _CONTENT:
            # A reply before the content has ended.
            self._replies.rest += data
            return Step()
        reply = self._replies.feed(data)
        if reply is None:
            return Step()
        if self._await is _Await.GREETING_REPLY and reply.startswith(b"250"):
            reply = self._offer(reply)
        rest, self._replies.rest = self._replies.rest, b""
        if reply.startswith(b"3") and not self._require_tls:
            if not self._expect_content():
                return Step(reply + rest, self._commands, Verdict.PLAINTEXT)
        else:
            self._await = _Await.COMMAND
        step = self.receive_from_client(b"")
        return step._replace(client=reply + rest + step.client)

    def _expect_content(self) -> bool:
        """Expect the content that follows a 3yz reply. False when its end cannot be known, or STARTTLS was not offered."""
        if self._offered and self._await is _Await.DATA_REPLY:
            self._await, self._text_before = _Await.TEXT, b"\r\n"
        elif self._offered and self._await is _Await.AUTH_REPLY:
            self._await = _Await.RESPONSE
        else:
            return False
        return True

    def _content(self) -> bytes:
        """Take from the client's bytes those that belong to the expected content."""
        data, end = self._commands, 0
        if self._await is _Await.TEXT:
            found = (self._text_before + data).find(_END_OF_TEXT)
            if found >= 0:
                end, self._await = found + len(_END_OF_TEXT) - len(self._text_before), _Await.REPLY
            else:
                end, self._text_before = len(data), (self._text_before + data)[-len(_END_OF_TEXT) + 1 :]
        elif self._await is _Await.CHUNK:
            end = min(self._chunk_left, len(data))
            self._chunk_left -= end
            if not self._chunk_left:
                self._await = _Await.REPLY
        else:
            end = data.find(b"\n") + 1
            if end:
                self._await = _Await.AUTH_REPLY
            else:
                end = len(data)
        self._commands = data[end:]
        return data[:end]

    def backend_ended(self) -> bytes:
        """Return the backend's last bytes, even of an incomplete reply, for the client."""
        rest, self._replies.rest = self._replies.rest, b""
        return rest

    def receive_from_client(self, data: bytes) -> Step:
        """Take bytes from the client and act on its complete commands, up to the first one that the backend has to answer."""
        self._commands += data
        if self._await in _CONTENT:
            return Step(backend=self._content())
        answers = b""
        while self._await is _Await.COMMAND:
            line = self._next_line()
            if line is None:
                step = self._unfinished()
            elif not line:
                step = self._protocol_error(LINE_TOO_LONG)
            else:
                step = self._command(line)
            answers += step.client
            if line is None or step.verdict is not None or step.backend:
                return step._replace(client=answers)
        return Step(client=answers)

    def _next_line(self) -> bytes | None:
        """The next line with its line break; empty if it was too long, None while it is incomplete."""
        end = self._commands.find(b"\n") + 1
        if self._overlong:
            line, self._commands = (b"" if end else None), self._commands[end:] if end else b""
            self._overlong = line is None
            return line
        if not end:
            return None
        line, self._commands = self._commands[:end], self._commands[end:]
        whole = len(line) <= LINE_LIMIT or self._may_be_long(line) or _BINARY.match(line)
        return line if whole else b""

    def _unfinished(self) -> Step:
        """Act on the beginning of an incomplete line: reject binary data, and limit the length."""
        if _BINARY.match(self._commands):
            return Step(NOT_SMTP, verdict=Verdict.NOT_SMTP)
        if len(self._commands) > LINE_LIMIT:
            if self._may_be_long(self._commands):
                return Step(backend=self._commands, verdict=Verdict.PLAINTEXT)
            self._commands, self._overlong = b"", True
        return Step()

    def _may_be_long(self, line: bytes) -> bool:
        return not self._require_tls and _verb(line) in _LONG_COMMANDS

    def _protocol_error(self, reply: bytes) -> Step:
        """Answer an error without the backend; after MAX_ERRORS of them the connection ends."""
        self._errors += 1
        return Step(reply) if self._errors <= MAX_ERRORS else Step(TOO_MANY_ERRORS, verdict=Verdict.ERRORS)

    def _command(self, line: bytes) -> Step:
        verb = _verb(line)
        if _BINARY.match(line) or (self._require_tls and HTTP_REQUEST.match(line)):
            return Step(NOT_SMTP, verdict=Verdict.NOT_SMTP)
        if verb == b"STARTTLS" and line.endswith(b"\r\n"):
            return self._starttls(line)
        if self._require_tls and (verb not in _COMMANDS_BEFORE_TLS or b"\r" in line.rstrip(b"\r\n")):
            self.refused = True
            return self._protocol_error(MUST_STARTTLS)
        if verb == b"BDAT":
            return self._bdat(line)
        self._await = _REPLY_TO.get(verb, _Await.REPLY)
        return Step(backend=line)

    def _bdat(self, line: bytes) -> Step:
        """Expect the chunk, which the client sends without waiting for a reply; the reply follows the chunk."""
        found = _CHUNK.fullmatch(line)
        if found is None or not self._offered:
            return Step(backend=line + self._commands, verdict=Verdict.PLAINTEXT)
        self._await, self._chunk_left = _Await.CHUNK, int(found[1])
        return Step(backend=line + self._content())

    def _starttls(self, line: bytes) -> Step:
        if line[len(b"STARTTLS") : -2].strip(b" \t"):
            return self._protocol_error(NO_ARGUMENT)
        if self._commands:
            return Step(INJECTED, verdict=Verdict.INJECTION)
        return Step(verdict=Verdict.UPGRADE)

    def _offer(self, reply: bytes) -> bytes:
        """The reply to EHLO (RFC 5321 §4.1.1.1) as the edge's: with STARTTLS once, or without it when it is hidden.

        The first line holds the server's name and is never a keyword.
        """
        withheld = (_WITHHELD_KEYWORDS if self._require_tls else frozenset()) | ({b"STARTTLS"} if self._hide else frozenset())
        name, *lines = [_text(line) for line in _LINE.findall(reply)]
        kept = [line for line in lines if _keyword(line) not in withheld]
        self._offered = not self._hide
        if self._offered and b"STARTTLS" not in map(_keyword, kept):
            kept.append(b"STARTTLS\r\n")
        return _list(name, *kept)


def _text(line: bytes) -> bytes:
    """A line of a reply without its code."""
    return line[4:] if line[3:4] in (b" ", b"-") else line[3:]


def _keyword(line: bytes) -> bytes:
    """The keyword of a line of the EHLO reply, in upper case; that of the old form ``AUTH=LOGIN`` is AUTH."""
    found = _KEYWORD.match(line)
    return found[0].upper() if found else b""


def _list(*texts: bytes) -> bytes:
    """A 250 reply of these lines, with a hyphen after every code except the last."""
    *before, last = texts
    return b"".join(b"250-" + text for text in before) + b"250 " + last


def _verb(line: bytes) -> bytes:
    found = _VERB.match(line)
    return found[0].upper() if found else b""
