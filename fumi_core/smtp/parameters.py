"""The parameters of MAIL and RCPT, each by its extension's RFC: their syntax, and their effect on the envelope."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from fumi_core.smtp import grammar, replies
from fumi_core.smtp.options import Options
from fumi_core.smtp.replies import Reply
from fumi_core.smtp.session import Envelope, Session

Value = str | bool
"""The string after the =; True without =."""

# xtext = *( xchar / hexchar ) (RFC 3461 §4)
# Lower-case digits are not in the RFC; some clients send them, and they are unambiguous.
_XTEXT = re.compile(r"(?:[!-*,-<>-~]|\+[0-9A-Fa-f]{2})*")
_XTEXT_HEX = re.compile(rb"\+([0-9A-Fa-f]{2})")
_NOTIFY = frozenset({"SUCCESS", "FAILURE", "DELAY"})
_ADDRESS_TYPE = re.compile(r"[A-Za-z0-9-]+")
# utf-8-addr-xtext and utf-8-addr-unitext (RFC 6533 §3): UTF-8 as it is, or \x{…}, which is never a control character
_UTF8_ADDRESS = re.compile(r"(?:[^\x00- +=\x7f\\]|\\x\{[0-9A-Fa-f]{2,6}\}|\+[0-9A-Fa-f]{2})+")
_UTF8_HEX = re.compile(r"\\x\{([0-9A-Fa-f]{2,6})\}")


def read_xtext(text: str) -> str | None:
    """Decode xtext (RFC 3461 §4); None when it is not xtext, or encodes control characters or bytes beyond ASCII."""
    if not _XTEXT.fullmatch(text):
        return None
    return _decoded(text)


def _decoded(text: str) -> str | None:
    """The UTF-8 text with ``+XX`` replaced; None when the result is not valid text."""
    try:
        decoded = _XTEXT_HEX.sub(lambda found: bytes([int(found[1], 16)]), text.encode()).decode()
    except UnicodeDecodeError:
        return None
    return None if grammar.CONTROL_CHARACTER.search(decoded) else decoded


def read_mail(
    envelope: Envelope,
    given: Mapping[str, Value],
    session: Session,
    options: Options,
    withheld: frozenset[str] = frozenset(),
) -> Reply | None:
    """Read the parameters of MAIL into the envelope. Returns the refusal if one is unknown, not offered or malformed.

    ``withheld`` are extensions that are not offered, whatever the options say.
    """
    for keyword, value in given.items():
        if withheld and _extension(keyword, value) in withheld:
            return replies.UNSUPPORTED_PARAMETER
        read = _MAIL.get(keyword)
        refusal = read(envelope, value, session, options) if read else replies.UNSUPPORTED_PARAMETER
        if refusal is not None:
            return refusal
    return None


def read_rcpt(given: Mapping[str, Value], options: Options, withheld: frozenset[str] = frozenset()) -> Reply | None:
    """Check the parameters of RCPT: NOTIFY and ORCPT (RFC 3461 §4.1, §4.2). ``withheld`` as for MAIL."""
    for keyword, value in given.items():
        if keyword not in ("NOTIFY", "ORCPT") or options.hide_dsn or "DSN" in withheld:
            return replies.UNSUPPORTED_PARAMETER
        if keyword == "NOTIFY":
            if value is True or not _is_notify(str(value)):
                return replies.BAD_NOTIFY
        elif value is True or not _is_orcpt(str(value)):
            return replies.BAD_ORCPT
    return None


def _extension(keyword: str, value: Value) -> str:
    """The EHLO keyword of a MAIL parameter's extension."""
    if keyword == "BODY":
        return "BINARYMIME" if str(value).upper() == "BINARYMIME" else "8BITMIME"
    return "DSN" if keyword in ("RET", "ENVID") else keyword


def _is_notify(value: str) -> bool:
    words = value.upper().split(",")
    return words == ["NEVER"] or (set(words) <= _NOTIFY and len(set(words)) == len(words))


def _is_orcpt(value: str) -> bool:
    """``addr-type ";" xtext`` (RFC 3461 §4.2) or, with ``utf-8`` as the type, RFC 6533 §3."""
    kind, _, address = value.partition(";")
    if len(value) > 500 or not address or not _ADDRESS_TYPE.fullmatch(kind):
        return False
    if kind.lower() != "utf-8":
        return (read_xtext(address) or "\x80").isascii()
    if not _UTF8_ADDRESS.fullmatch(address):
        return False
    numbers = [int(found, 16) for found in _UTF8_HEX.findall(address)]
    if any(number > 0x10FFFF or 0xD800 <= number < 0xE000 for number in numbers):
        return False
    return _decoded(_UTF8_HEX.sub(lambda found: chr(int(found[1], 16)), address)) is not None


def _size(envelope: Envelope, value: Value, session: Session, options: Options) -> Reply | None:
    """RFC 1870 §6."""
    if value is True or not str(value).isascii() or not str(value).isdigit() or len(str(value)) > 20:
        return replies.SYNTAX_SIZE
    if options.size is not None and int(value) > options.size:
        return replies.SIZE_DECLARED
    return None


def _body(envelope: Envelope, value: Value, session: Session, options: Options) -> Reply | None:
    """RFC 6152, and BINARYMIME of RFC 3030 §3."""
    if value is True:
        return replies.BAD_PARAMETER
    body = str(value).upper()
    if body not in ("7BIT", "8BITMIME", *(("BINARYMIME",) if options.chunking else ())):
        return replies.UNSUPPORTED_PARAMETER
    envelope.body = body
    return None


def _smtputf8(envelope: Envelope, value: Value, session: Session, options: Options) -> Reply | None:
    """RFC 6531 §3.4."""
    if options.hide_smtputf8:
        return replies.UNSUPPORTED_PARAMETER
    if value is not True:
        return replies.BAD_PARAMETER
    envelope.smtputf8 = True
    return None


def _requiretls(envelope: Envelope, value: Value, session: Session, options: Options) -> Reply | None:
    """RFC 8689 §4.2.1: it exists only where the session is secure."""
    if options.hide_requiretls or not session.secure:
        return replies.UNSUPPORTED_PARAMETER
    if value is not True:
        return replies.BAD_PARAMETER
    envelope.require_tls = True
    return None


def _ret(envelope: Envelope, value: Value, session: Session, options: Options) -> Reply | None:
    """RFC 3461 §4.3."""
    if options.hide_dsn:
        return replies.UNSUPPORTED_PARAMETER
    if value is True or str(value).upper() not in ("FULL", "HDRS"):
        return replies.BAD_RET
    envelope.dsn = envelope.dsn._replace(ret=str(value).upper())
    return None


def _envid(envelope: Envelope, value: Value, session: Session, options: Options) -> Reply | None:
    """RFC 3461 §4.4."""
    if options.hide_dsn:
        return replies.UNSUPPORTED_PARAMETER
    text = None if value is True or len(str(value)) > 100 else read_xtext(str(value))
    if text is None or not text.isascii():
        return replies.BAD_ENVID
    envelope.dsn = envelope.dsn._replace(envid=text)
    return None


def _auth(envelope: Envelope, value: Value, session: Session, options: Options) -> Reply | None:
    """RFC 4954 §5: the original submitter. It stays in the address's parameters, for apps that trust the client."""
    return replies.BAD_PARAMETER if value is True or read_xtext(str(value)) is None else None


_Reader = Callable[[Envelope, Value, Session, Options], Reply | None]
_MAIL: dict[str, _Reader] = {
    "SIZE": _size,
    "BODY": _body,
    "SMTPUTF8": _smtputf8,
    "REQUIRETLS": _requiretls,
    "RET": _ret,
    "ENVID": _envid,
    "AUTH": _auth,
}
