"""The syntax of SMTP commands, each expression under the rule it implements.

RFC 5321 §4.1.2 (paths, mailboxes, parameters), RFC 6531 §3.3 (non-ASCII in them), RFC 1869 §4 (parameters).
All expressions are anchored by fullmatch and cannot backtrack beyond one line's length.
"""

from __future__ import annotations

import re
import socket
from typing import NamedTuple

MAX_PATH = 256  # RFC 5321 §4.5.3.1.3, octets, angle brackets included
MAX_LOCAL_PART = 64  # §4.5.3.1.1
MAX_DOMAIN = 255  # §4.5.3.1.2

# Classes that take UTF8-non-ascii (RFC 6531 §3.3) name the ASCII characters that are not in them: a class that reaches up to
# U+10FFFF takes `re` ten milliseconds to compile, and there are twenty of them in these expressions.

# atext (RFC 5322 §3.2.3): letters, digits and !#$%&'*+-/=?^_`{|}~
_ATEXT = r'[^\x00- "(),.:-<>@\[-\]\x7f]'
# Dot-string = Atom *("." Atom)
_DOT_STRING = rf"{_ATEXT}+(?:\.{_ATEXT}+)*"
# Quoted-string = DQUOTE *(qtextSMTP / quoted-pairSMTP) DQUOTE; qtextSMTP is what can be printed, but for DQUOTE and backslash.
_QUOTED_STRING = r'"(?:[^\x00-\x1f"\\\x7f]|\\[ -~])*"'
# sub-domain = Let-dig [Ldh-str]: letters, digits, and hyphens within; the underscore is not in the RFC but in use.
_LET_DIG = r"[^\x00-/:-@\[-^`{-\x7f]"
_SUB_DOMAIN = rf"{_LET_DIG}(?:[^\x00-,./:-@\[-^`{{-\x7f]*{_LET_DIG})?"
# Domain = sub-domain *("." sub-domain); a final dot is not in the RFC and not taken.
_DOMAIN = rf"{_SUB_DOMAIN}(?:\.{_SUB_DOMAIN})*"
# address-literal = "[" ( IPv4 / "IPv6:" IPv6 / General ) "]"; what is inside is looked at below.
_ADDRESS_LITERAL = r"\[[!-Z^-~]+\]"
# A-d-l = At-domain *( "," At-domain ) ":": a source route, taken and dropped (RFC 5321 appendix C).
_SOURCE_ROUTE = rf"(?:@{_DOMAIN}(?:,@{_DOMAIN})*:)?"
# Mailbox = Local-part "@" ( Domain / address-literal )
_MAILBOX = rf"(?P<local>{_DOT_STRING}|{_QUOTED_STRING})@(?P<domain>{_DOMAIN}|{_ADDRESS_LITERAL})"
# esmtp-param = esmtp-keyword ["=" esmtp-value]
_PARAMETERS = r"(?P<parameters>(?: +[A-Za-z0-9][A-Za-z0-9-]*(?:=[^\x00- =\x7f]+)?)*) *"

DOMAIN = re.compile(rf"{_DOMAIN}|{_ADDRESS_LITERAL}")
# The space after the colon is not in the RFC; half of all clients written by hand send it.
MAIL_ARGUMENT = re.compile(rf"[Ff][Rr][Oo][Mm]: ?<(?:{_SOURCE_ROUTE}{_MAILBOX})?>{_PARAMETERS}")
RCPT_ARGUMENT = re.compile(
    rf"[Tt][Oo]: ?<(?:{_SOURCE_ROUTE}{_MAILBOX}|(?P<postmaster>[Pp][Oo][Ss][Tt][Mm][Aa][Ss][Tt][Ee][Rr]))>{_PARAMETERS}"
)
# What follows the path when only the path is wrong, to tell "bad address" from "bad syntax".
PATH_SHAPE = re.compile(r"(?:[Ff][Rr][Oo][Mm]|[Tt][Oo]): ?<.*>.*", re.DOTALL)

# ehlo = "EHLO" SP ( Domain / address-literal ): clients say many other things; what matters is that it is one printable word.
CLIENT_HOSTNAME = re.compile(r"[^\x00- \x7f]{1,255}")

VERBS = (
    *("HELO", "EHLO", "LHLO", "STARTTLS", "AUTH", "MAIL", "RCPT", "DATA", "BDAT"),
    *("RSET", "NOOP", "VRFY", "EXPN", "HELP", "QUIT", "XCLIENT", "XFORWARD"),
)
"""Every command there is: RFC 5321 §4.1.1, RFC 2033 §4.1, RFC 3207, RFC 4954, RFC 3030, and Postfix's two."""

# The verbs of HTTP: a browser, or a proxy made to speak to us by one.
HTTP_REQUEST = re.compile(rb"(?:GET|POST|PUT|HEAD|DELETE|OPTIONS|PATCH|CONNECT|TRACE|PRI) ", re.IGNORECASE)
CONTROL = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
# What no line of SMTP contains: control characters other than TAB, and bytes beyond ASCII.
NOT_TEXT = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f-\xff]")


class Address(NamedTuple):
    """A reverse-path or forward-path: ``address`` ("" for the null sender) and its parameters, ``{"SIZE": "1024"}``."""

    address: str
    args: dict[str, str | bool]


def read_text(argument: bytes) -> str | None:
    """What stands behind a verb; None when it is not UTF-8 (RFC 6531 §3.3)."""
    try:
        return argument.decode()
    except UnicodeDecodeError:
        return None


def is_words(argument: bytes) -> bool:
    """Whether there is something, and it is text: what VRFY and EXPN are asked about."""
    return bool(argument) and not CONTROL.search(argument) and read_text(argument) is not None


def has_path(argument: bytes) -> bool:
    """Whether there is something in angle brackets, so that it is the address that is wrong."""
    text = read_text(argument)
    return text is not None and PATH_SHAPE.fullmatch(text) is not None


def read_path(pattern: re.Pattern[str], argument: bytes) -> Address | None:
    """As ``parse_path()``, from bytes."""
    text = read_text(argument)
    return None if text is None else parse_path(pattern, text)


def parse_path(pattern: re.Pattern[str], argument: str) -> Address | None:
    """Read what follows MAIL or RCPT; None when it is not of that form, or longer than §4.5.3.1 allows."""
    match = pattern.fullmatch(argument)
    if match is None:
        return None
    local, domain = match["local"], match["domain"]
    address = f"{local}@{domain}" if local is not None else (match.groupdict().get("postmaster") or "")
    if local is not None and not _fits(local, domain):
        return None
    parameters = _parameters(match["parameters"]) if match["parameters"] else {}
    return None if parameters is None else Address(address, parameters)


def _fits(local: str, domain: str) -> bool:
    if not local.isascii() or not domain.isascii():
        local_length, domain_length = len(local.encode()), len(domain.encode())
    else:
        local_length, domain_length = len(local), len(domain)
    if local_length > MAX_LOCAL_PART or domain_length > MAX_DOMAIN or local_length + domain_length + 3 > MAX_PATH:
        return False
    return domain[0] != "[" or is_address_literal(domain[1:-1])


def is_address_literal(text: str) -> bool:
    """Whether the inside of ``[…]`` is an address: IPv4, or ``IPv6:`` and IPv6. No other tag is registered."""
    version6 = text[:5].lower() == "ipv6:"
    try:
        socket.inet_pton(socket.AF_INET6 if version6 else socket.AF_INET, text[5:] if version6 else text)
    except OSError:
        return False
    return True


def _parameters(text: str) -> dict[str, str | bool] | None:
    """By keyword, in capitals; None when one comes twice (RFC 5321 §4.1.1.11)."""
    parameters: dict[str, str | bool] = {}
    for word in filter(None, text.split(" ")):  # other spaces, those of Unicode, are part of a value
        keyword, equals, value = word.partition("=")
        if keyword.upper() in parameters:
            return None
        parameters[keyword.upper()] = value if equals else True
    return parameters
