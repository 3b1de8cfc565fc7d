"""Every reply the server can give, once, as bytes, with its enhanced status code (RFC 5321 §4.2, RFC 3463, RFC 5248).

The texts are Postfix's where Postfix has the same reply.
"""

from __future__ import annotations

import re

from fumi_core.smtp.results import MessageResult

MAX_TEXT = 496  # bytes of text in a line, so that code, the longest enhanced code and CRLF fit into 512 (RFC 5321 §4.5.3.1.5)

_ENHANCED = re.compile(r"([245]\.[0-9]{1,3}\.[0-9]{1,3})(?: +|$)(.*)", re.DOTALL)
_UNSENDABLE = re.compile(r"[^\x20-\x7e]")

# The default status when a handler's message has none. RFC 5248's registry names these codes for them.
_DEFAULT_STATUS = {
    250: "2.0.0", 421: "4.3.2", 450: "4.2.0", 451: "4.3.0", 452: "4.3.1", 454: "4.7.0", 455: "4.5.4",
    500: "5.5.2", 501: "5.5.4", 502: "5.5.1", 503: "5.5.1", 504: "5.5.4", 521: "5.3.2", 523: "5.3.4", 524: "5.2.4", 525: "5.7.13",
    530: "5.7.0", 534: "5.7.9", 535: "5.7.8", 538: "5.7.11", 541: "5.7.1", 550: "5.7.1", 551: "5.1.6", 552: "5.3.4", 553: "5.1.3",
    554: "5.7.1", 555: "5.5.4", 556: "5.1.10",
}  # fmt: skip


def verdict(code: int) -> MessageResult:
    """What a reply code means for the message: accepted (2xx), deferred (4xx) or rejected (5xx)."""
    if code < 400:
        return MessageResult.ACCEPTED
    return MessageResult.DEFERRED if code < 500 else MessageResult.REJECTED


class Reply:
    """One reply: ``code``, and the bytes with (``data``) and without (``plain``) the enhanced status code."""

    __slots__ = ("code", "data", "plain")

    def __init__(self, code: int, text: str, status: str | None = None) -> None:
        """``status`` is the enhanced status code, None for replies without one: 220, 334, 354 and EHLO's 250."""
        self.code = code
        lines = [_UNSENDABLE.sub("?", line) for line in text.splitlines() or [""]]
        lines = [line[at : at + MAX_TEXT] for line in lines for at in range(0, len(line) or 1, MAX_TEXT)]
        self.plain = _encode(code, lines)
        self.data = _encode(code, [f"{status} {line}".rstrip() for line in lines]) if status else self.plain

    def __repr__(self) -> str:
        return f"<Reply {self.data!r}>"


def _encode(code: int, lines: list[str]) -> bytes:
    *first, last = lines
    return "".join([*(f"{code}-{line}\r\n" for line in first), f"{code} {last}\r\n"]).encode("ascii")


def from_text(code: int, message: str, status: str | None = None) -> Reply:
    """A reply with a handler's text: its enhanced code is the message's own, else ``status``, else the usual one for the code."""
    match = _ENHANCED.match(message)
    if match and match[1][0] == str(code)[0]:
        return Reply(code, match[2], match[1])
    return Reply(code, message, status or _DEFAULT_STATUS.get(code, f"{code // 100}.0.0"))


# What handlers of this package raise: the arguments of SMTPError.
INSUFFICIENT_STORAGE = ("4.3.1 Insufficient system storage", 452)
TOO_LARGE = ("5.3.4 Error: message file too big", 552)
USER_UNKNOWN = ("5.1.1 Recipient address rejected: User unknown", 550)
LOOKUP_FAILED = ("4.3.0 Recipient address rejected: Temporary lookup failure", 451)
TEMPORARY_AUTH_FAILURE = ("4.7.0 Temporary authentication failure", 454)

# 2yz and 3yz
BYE = Reply(221, "Bye", "2.0.0")
OK = Reply(250, "Ok", "2.0.0")
SENDER_OK = Reply(250, "Ok", "2.1.0")
RECIPIENT_OK = Reply(250, "Ok", "2.1.5")
CANNOT_VERIFY = Reply(252, "Cannot VRFY user, but will accept message and attempt delivery", "2.5.0")
CANNOT_EXPAND = Reply(252, "Cannot EXPN list", "2.5.0")
CHUNK_OK = Reply(250, "Ok", "2.0.0")
AUTHENTICATED = Reply(235, "Authentication successful", "2.7.0")
START_DATA = Reply(354, "End data with <CR><LF>.<CR><LF>")

# 4yz
SHUTTING_DOWN = Reply(421, "Service shutting down, closing connection", "4.3.2")
CONNECT_FAILED = Reply(421, "Server local error", "4.3.0")
TOO_MANY_CLIENTS = Reply(421, "Too many connections, try again later", "4.7.0")
TOO_MANY_ERRORS = Reply(421, "Error: too many errors", "4.7.0")
TIMED_OUT = Reply(421, "Error: timeout exceeded", "4.4.2")
LOCAL_ERROR = Reply(451, "Local error in processing", "4.3.0")
TOO_MANY_RECIPIENTS = Reply(452, "Error: too many recipients", "4.5.3")

# 5yz
LINE_TOO_LONG = Reply(500, "Error: line too long", "5.5.2")
NOT_RECOGNIZED = Reply(500, "Error: command not recognized", "5.5.2")
BARE_NEWLINE_IN_COMMAND = Reply(500, "Error: a line must end with <CR><LF>", "5.5.2")
NOT_ASCII = Reply(500, "Error: bad syntax", "5.5.2")
SYNTAX_HELO = Reply(501, "Syntax: HELO hostname", "5.5.4")
SYNTAX_EHLO = Reply(501, "Syntax: EHLO hostname", "5.5.4")
SYNTAX_LHLO = Reply(501, "Syntax: LHLO hostname", "5.5.4")
SYNTAX_AUTH = Reply(501, "Syntax: AUTH mechanism", "5.5.4")
SYNTAX_BDAT = Reply(501, "Syntax: BDAT count [LAST]", "5.5.4")
SYNTAX_EXPN = Reply(501, "Syntax: EXPN list", "5.5.4")
SYNTAX_MAIL = Reply(501, "Syntax: MAIL FROM:<address>", "5.5.4")
SYNTAX_RCPT = Reply(501, "Syntax: RCPT TO:<address>", "5.5.4")
SYNTAX_VRFY = Reply(501, "Syntax: VRFY address", "5.5.4")
SYNTAX_DATA = Reply(501, "Syntax: DATA", "5.5.4")
SYNTAX_QUIT = Reply(501, "Syntax: QUIT", "5.5.4")
SYNTAX_RSET = Reply(501, "Syntax: RSET", "5.5.4")
SYNTAX_SIZE = Reply(501, "Bad message size syntax", "5.5.4")
BAD_PARAMETER = Reply(501, "Bad parameter", "5.5.4")
BAD_ENVID = Reply(501, "Bad ENVID parameter syntax", "5.5.4")
BAD_NOTIFY = Reply(501, "Error: Bad NOTIFY parameter syntax", "5.5.4")
BAD_ORCPT = Reply(501, "Error: Bad ORCPT parameter syntax", "5.5.4")
BAD_RET = Reply(501, "Bad RET parameter syntax", "5.5.4")
AUTH_ABORTED = Reply(501, "Authentication aborted", "5.7.0")
AUTH_BAD_NAME = Reply(501, "Bad user name syntax", "5.5.4")
AUTH_MALFORMED = Reply(501, "Cannot decode response", "5.5.2")
NO_INITIAL_RESPONSE = Reply(501, "This mechanism takes no initial response", "5.7.0")
BAD_SENDER = Reply(501, "Bad sender address syntax", "5.1.7")
BAD_RECIPIENT = Reply(501, "Bad recipient address syntax", "5.1.3")
NOT_IMPLEMENTED = Reply(502, "Error: command not implemented", "5.5.1")
USE_LHLO = Reply(500, "Error: this is an LMTP server, use LHLO", "5.5.1")
HELO_FIRST = Reply(503, "Error: send HELO/EHLO first", "5.5.1")
NESTED_MAIL = Reply(503, "Error: nested MAIL command", "5.5.1")
NEED_MAIL = Reply(503, "Error: need MAIL command", "5.5.1")
NEED_RCPT = Reply(503, "Error: need RCPT command", "5.5.1")
NEED_BDAT = Reply(503, "Error: BODY=BINARYMIME needs BDAT", "5.5.1")
MAIL_AFTER_BDAT = Reply(503, "Error: MAIL after BDAT", "5.5.1")
RCPT_AFTER_BDAT = Reply(503, "Error: RCPT after BDAT", "5.5.1")
DATA_AFTER_BDAT = Reply(503, "Error: DATA after BDAT", "5.5.1")
IN_TRANSACTION = Reply(503, "Error: MAIL transaction in progress", "5.5.1")
AUTH_NOT_ENABLED = Reply(503, "Error: authentication not enabled", "5.5.1")
ALREADY_AUTHENTICATED = Reply(503, "Error: already authenticated", "5.5.1")
UNKNOWN_MECHANISM = Reply(504, "Unrecognized authentication type", "5.5.4")
ALREADY_TLS = Reply(503, "Error: TLS already active", "5.5.1")
MUST_STARTTLS = Reply(530, "Must issue a STARTTLS command first", "5.7.0")
AUTHENTICATION_REQUIRED = Reply(530, "Authentication required", "5.7.0")
AUTH_FAILED = Reply(535, "Error: authentication failed", "5.7.8")
ENCRYPTION_REQUIRED = Reply(538, "Encryption required for requested authentication mechanism", "5.7.11")
NOT_AUTHORIZED = Reply(550, "Error: insufficient authorization", "5.7.0")
BARE_NEWLINE = Reply(550, "Error: bare <LF> or <CR> received", "5.6.11")
SIZE_DECLARED = Reply(552, "Message size exceeds fixed limit", "5.3.4")
SIZE_EXCEEDED = from_text(552, TOO_LARGE[0])
NEED_SMTPUTF8 = Reply(553, "Must declare SMTPUTF8 to send unicode address", "5.6.7")
NOT_SMTP = Reply(554, "Error: this is an SMTP server", "5.5.1")
UNSUPPORTED_PARAMETER = Reply(555, "Unsupported option", "5.5.4")
