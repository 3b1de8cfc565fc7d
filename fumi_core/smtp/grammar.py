"""The syntax of SMTP commands, each expression under the rule it implements.

RFC 5321 §4.1.2 (paths, mailboxes, parameters), RFC 6531 §3.3 (non-ASCII in them), RFC 1869 §4 (parameters).
All expressions are anchored by fullmatch and cannot backtrack beyond one line's length.
"""

from __future__ import annotations

import re
import socket
import unicodedata
from functools import cache
from typing import NamedTuple

MAX_PATH = 256  # RFC 5321 §4.5.3.1.3, bytes, angle brackets included
# A local part may fill the path. §4.5.3.1.1 has 64 bytes, but SRS, VERP and forwarders write more, and no one can shorten them.
MAX_LABEL = 63  # RFC 1035 §2.3.4, bytes, of an internationalized label's A-label
MAX_DOMAIN = 255  # §4.5.3.1.2

# Classes that take UTF8-non-ascii (RFC 6531 §3.3) list the ASCII characters that are not in them: `re` takes ten milliseconds to
# compile a class that reaches up to U+10FFFF, and these expressions have twenty such classes.

# atext (RFC 5322 §3.2.3): letters, digits and !#$%&'*+-/=?^_`{|}~
_ATEXT = r'[^\x00- "(),.:-<>@\[-\]\x7f]'
# Dot-string = Atom *("." Atom)
_DOT_STRING = rf"{_ATEXT}+(?:\.{_ATEXT}+)*"
# Quoted-string = DQUOTE *(qtextSMTP / quoted-pairSMTP) DQUOTE; qtextSMTP is printable except for DQUOTE and backslash.
_QUOTED_STRING = r'"(?:[^\x00-\x1f"\\\x7f]|\\[ -~])*"'
# sub-domain = Let-dig [Ldh-str]: letters, digits, and hyphens within; underscores are not in the RFC but in use.
_LET_DIG = r"[^\x00-/:-@\[-^`{-\x7f]"
_SUB_DOMAIN = rf"{_LET_DIG}(?:[^\x00-,./:-@\[-^`{{-\x7f]{{,{MAX_LABEL - 2}}}{_LET_DIG})?"
# Domain = sub-domain *("." sub-domain); a final dot is not in the RFC, and accepted only if lenient.
_DOMAIN = rf"{_SUB_DOMAIN}(?:\.{_SUB_DOMAIN})*"
# address-literal = "[" ( IPv4 / "IPv6:" IPv6 / General ) "]"; the inside is checked by is_address_literal().
_ADDRESS_LITERAL = r"\[[!-Z^-~]+\]"
# A-d-l = At-domain *( "," At-domain ) ":": a source route, accepted and ignored (RFC 5321 appendix C).
_SOURCE_ROUTE = rf"(?:@{_DOMAIN}(?:,@{_DOMAIN})*:)?"
# Mailbox = Local-part "@" ( Domain / address-literal )
_MAILBOX = rf"(?P<local>{_DOT_STRING}|{_QUOTED_STRING})@(?P<domain>{_DOMAIN}|{_ADDRESS_LITERAL})"
# esmtp-param = esmtp-keyword ["=" esmtp-value]
_PARAMETERS = r"(?P<parameters>(?: +[A-Za-z0-9][A-Za-z0-9-]*(?:=[^\x00- =\x7f]+)?)*) *"

DOMAIN = re.compile(rf"{_DOMAIN}|{_ADDRESS_LITERAL}")
# Spaces after the colon are not in the RFC; many hand-written clients send one.
_FROM, _TO = r"[Ff][Rr][Oo][Mm]: *", r"[Tt][Oo]: *"
_MAIL_ARGUMENT = re.compile(rf"{_FROM}<(?:{_SOURCE_ROUTE}{_MAILBOX})?>{_PARAMETERS}")
_RCPT_ARGUMENT = re.compile(
    rf"{_TO}<(?:{_SOURCE_ROUTE}{_MAILBOX}|(?P<postmaster>[Pp][Oo][Ss][Tt][Mm][Aa][Ss][Tt][Ee][Rr]))>{_PARAMETERS}"
)
# What devices and carriers send: dots anywhere in a local part, no domain, a final dot, no angle brackets.
_LENIENT_LOCAL_PART = rf"(?:\.|{_ATEXT})+|{_QUOTED_STRING}"
_LENIENT_MAILBOX = rf"(?P<local>{_LENIENT_LOCAL_PART})(?:@(?P<domain>{_DOMAIN}|{_ADDRESS_LITERAL})\.?)?"
_LENIENT_PATH = rf"(?![A-Za-z0-9-]+=[^@]*\Z)(?P<open><)?{_SOURCE_ROUTE}{_LENIENT_MAILBOX}(?(open)>)"
# What follows the path when only the path is wrong, to tell "bad address" from "bad syntax".
PATH_SHAPE = re.compile(r"(?:[Ff][Rr][Oo][Mm]|[Tt][Oo]): *<.*>.*", re.DOTALL)

VERBS = (
    *("HELO", "EHLO", "LHLO", "STARTTLS", "AUTH", "MAIL", "RCPT", "DATA", "BDAT"),
    *("RSET", "NOOP", "VRFY", "EXPN", "HELP", "QUIT", "XCLIENT", "XFORWARD"),
)
"""All commands: RFC 5321 §4.1.1, RFC 2033 §4.1, RFC 3207, RFC 4954, RFC 3030, and Postfix's two."""

# HTTP's methods: a browser, or a proxy that was made to connect here.
HTTP_REQUEST = re.compile(rb"(?:GET|POST|PUT|HEAD|DELETE|OPTIONS|PATCH|CONNECT|TRACE|PRI) ", re.IGNORECASE)
CONTROL = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
# Bytes that no SMTP line contains: control characters other than TAB, and bytes beyond ASCII.
NOT_TEXT = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f-\xff]")


class Address(NamedTuple):
    """A reverse-path or forward-path (RFC 5321 §4.1.2): ``address``, "" for the null sender, and the parameters of its command.

    ``args`` has upper-case names and their values, True for a parameter without one: ``{"SIZE": "1024", "SMTPUTF8": True}``.
    """

    address: str
    args: dict[str, str | bool]


class Paths(NamedTuple):
    """The arguments of MAIL and RCPT, for ``read_path()``."""

    mail: re.Pattern[str]
    rcpt: re.Pattern[str]


@cache
def paths(lenient: bool) -> Paths:
    """The RFC's paths or, if ``lenient``, also those that devices and carriers send."""
    if not lenient:
        return Paths(_MAIL_ARGUMENT, _RCPT_ARGUMENT)
    mail = re.compile(rf"{_FROM}(?:<>|{_LENIENT_PATH}){_PARAMETERS}")
    return Paths(mail, re.compile(rf"{_TO}{_LENIENT_PATH}{_PARAMETERS}"))


def read_text(argument: bytes) -> str | None:
    """The argument of a verb; None when it is not UTF-8 (RFC 6531 §3.3)."""
    try:
        return argument.decode()
    except UnicodeDecodeError:
        return None


def is_words(argument: bytes) -> bool:
    """Whether the argument is non-empty text, as VRFY and EXPN require."""
    return bool(argument) and not CONTROL.search(argument) and read_text(argument) is not None


def has_path(argument: bytes) -> bool:
    """Whether there is something in angle brackets, so that the error is in the address."""
    text = read_text(argument)
    return text is not None and PATH_SHAPE.fullmatch(text) is not None


def read_path(pattern: re.Pattern[str], argument: bytes) -> Address | None:
    """The same as ``parse_path()``, for bytes."""
    try:
        return parse_path(pattern, argument.decode())
    except UnicodeDecodeError:
        return None


def parse_path(pattern: re.Pattern[str], argument: str) -> Address | None:
    """Parse what follows MAIL or RCPT; None when it does not match, or is longer than §4.5.3.1 allows."""
    match = pattern.fullmatch(argument)
    if match is None:
        return None
    local, domain, words = match.group("local", "domain", "parameters")
    if domain is not None:
        address = f"{local}@{domain}"
    else:
        # Paths without a domain: <>, <Postmaster> and, if lenient, a local part alone.
        address, domain = local or match.groupdict().get("postmaster") or "", ""
        if "%" in address or "!" in address:
            return None  # user%domain and domain!user are routes to other domains: the next server may follow them
    if local is not None and not _fits(local, domain):
        return None
    parameters = _parameters(words) if words else {}
    return None if parameters is None else Address(address, parameters)


def _fits(local: str, domain: str) -> bool:
    if not local.isascii() or not domain.isascii():
        if not is_visible(local + domain) or not all(map(_fits_as_label, domain.split("."))):
            return False
        local_length, domain_length = len(local.encode()), len(domain.encode())
    else:
        local_length, domain_length = len(local), len(domain)
    if domain_length > MAX_DOMAIN or local_length + domain_length + 3 > MAX_PATH:
        return False
    return domain[:1] != "[" or is_address_literal(domain[1:-1])


def _fits_as_label(label: str) -> bool:
    """Whether the A-label of an internationalized label, ``xn--`` included, is short enough."""
    return label.isascii() or len(label.encode("punycode")) + 4 <= MAX_LABEL


# Unassigned characters are not in it: which they are depends on the version of Unicode.
_INVISIBLE_CATEGORIES = frozenset({"Cc", "Cf", "Co", "Cs", "Zl", "Zp", "Zs"})
# Fillers, variation selectors and other invisible letters and marks (Unicode's Default_Ignorable_Code_Point, and U+2800).
_INVISIBLE = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u2800\u3164\uffa0") | frozenset(
    map(chr, (*range(0xFE00, 0xFE10), *range(0xE0000, 0xE1000)))
)
_JOINERS = "\u200c\u200d"


def is_visible(text: str) -> bool:
    """Whether all characters beyond ASCII are visible: with invisible ones two different addresses look the same.

    The joiners of Indic and Arabic scripts are allowed between two of their letters (RFC 5892 appendix A.1, A.2).
    """
    for at, character in enumerate(text):
        if character.isascii():
            continue
        if character in _JOINERS:
            before, after = text[at - 1 : at], text[at + 1 : at + 2]
            if not (_is_foreign_letter(before) and _is_foreign_letter(after)):
                return False
        elif unicodedata.category(character) in _INVISIBLE_CATEGORIES or character in _INVISIBLE:
            return False
    return True


def _is_foreign_letter(character: str) -> bool:
    return not character.isascii() and unicodedata.category(character)[0] in "LM"


def is_client_hostname(text: str) -> bool:
    """EHLO's argument: ``Domain / address-literal`` in the RFC, any printable words of up to 255 bytes in practice."""
    return text.isprintable() and 1 <= len(text.encode()) <= 255


# Controls of ASCII and of ISO 6429 (C1), and the two separators that some programs treat as line ends.
CONTROL_CHARACTER = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def is_address_literal(text: str) -> bool:
    """Whether the inside of ``[…]`` is an address: IPv4, or ``IPv6:`` and IPv6. No other tag is registered."""
    version6 = text[:5].lower() == "ipv6:"
    try:
        socket.inet_pton(socket.AF_INET6 if version6 else socket.AF_INET, text[5:] if version6 else text)
    except OSError:
        return False
    return True


def _parameters(text: str) -> dict[str, str | bool] | None:
    """The parameters by keyword, in capitals; None when a keyword is repeated (RFC 5321 §4.1.1.11)."""
    parameters: dict[str, str | bool] = {}
    for word in filter(None, text.split(" ")):  # Unicode's other spaces are part of a value
        keyword, equals, value = word.partition("=")
        if keyword.upper() in parameters:
            return None
        parameters[keyword.upper()] = value if equals else True
    return parameters
