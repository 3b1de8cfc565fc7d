"""XCLIENT and XFORWARD, as Postfix documents them (XCLIENT_README, XFORWARD_README): a trusted proxy names its client.

XCLIENT replaces the session's client by the one it names and restarts the dialogue at the banner. XFORWARD only records a client
for the logs.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from fumi_core.runtime.addresses import unmapped
from fumi_core.smtp import grammar
from fumi_core.smtp.parameters import read_xtext
from fumi_core.smtp.replies import Reply
from fumi_core.smtp.session import Session

Attributes = dict[str, str | None]
"""By name, in capitals; None for what the proxy does not know (``[UNAVAILABLE]``, ``[TEMPUNAVAIL]``)."""

UNKNOWN = "unknown"
"""The address of a client whose address is not known; Postfix uses the same word."""

_UNAVAILABLE = ("[UNAVAILABLE]", "[TEMPUNAVAIL]")
_LABEL = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_HOSTNAME = re.compile(rf"(?=.{{1,255}}\Z){_LABEL}(?:\.{_LABEL})*\.?")
_TEXT = re.compile(r"[^\x00- \x7f](?:[^\x00-\x1f\x7f]{0,254})")
_PORT = re.compile(r"\d{1,5}", re.ASCII)


def _is_address(value: str) -> bool:
    return grammar.is_address_literal(value)


def _is_port(value: str) -> bool:
    return _PORT.fullmatch(value) is not None and int(value) < 65536


def _is_protocol(value: str) -> bool:
    return value.upper() in ("SMTP", "ESMTP", "LMTP")


def _is_source(value: str) -> bool:
    return value.upper() in ("LOCAL", "REMOTE")


def _is_name(value: str) -> bool:
    return _HOSTNAME.fullmatch(value) is not None


def _is_text(value: str) -> bool:
    return _TEXT.fullmatch(value) is not None


_Check = Callable[[str], bool]
_COMMON: dict[str, _Check] = {"NAME": _is_name, "ADDR": _is_address, "PORT": _is_port, "PROTO": _is_protocol, "HELO": _is_text}
XCLIENT: dict[str, _Check] = {**_COMMON, "LOGIN": _is_text, "DESTADDR": _is_address, "DESTPORT": _is_port}
XFORWARD: dict[str, _Check] = {**_COMMON, "IDENT": _is_text, "SOURCE": _is_source}


_KNOWN = {"XCLIENT": XCLIENT, "XFORWARD": XFORWARD}


def read(command: str, argument: bytes) -> Attributes | Reply:
    """Parse the arguments of the command; returns the attributes or the rejection."""
    words, known = argument.split(), _KNOWN[command]
    if not words:
        return Reply(501, f"Syntax: {command} attribute=value...", "5.5.4")
    attributes: Attributes = {}
    for word in words:
        name, equals, coded = word.decode("utf-8", "replace").partition("=")
        name = name.upper()
        if not equals:
            return Reply(501, "Error: attribute=value expected", "5.5.4")
        if name not in known:
            return Reply(501, f"Bad {command} attribute name", "5.5.4")
        if coded.upper() in _UNAVAILABLE:
            attributes[name] = None
            continue
        value = read_xtext(coded)
        if value is None or not known[name](value):
            return Reply(501, f"Bad {name} syntax", "5.5.4")
        attributes[name] = _without_tag(value) if known[name] is _is_address else value
    return attributes


def _without_tag(address: str) -> str:
    return unmapped(address[5:]) if address[:5].lower() == "ipv6:" else address


def impersonate(session: Session, attributes: Attributes) -> bool:
    """Make the session that client's. Returns whether HELO was among the attributes, so that no greeting is needed.

    Everything the connection had sent about itself is discarded, except TLS, which belongs to the connection.
    """
    session.xclient = {**session.xclient, **attributes}
    session.health_check = False
    if "ADDR" in attributes:
        session.remote_address = attributes["ADDR"] or UNKNOWN
    if "PORT" in attributes:
        session.remote_port = int(attributes["PORT"] or 0)
    if "DESTADDR" in attributes:
        session.local_address = attributes["DESTADDR"] or UNKNOWN
    if "DESTPORT" in attributes:
        session.local_port = int(attributes["DESTPORT"] or 0)
    session.user = attributes.get("LOGIN")
    session.auth_method = None
    session.client_hostname = attributes.get("HELO")
    opening = {"ESMTP": "EHLO", "LMTP": "LHLO"}.get((attributes.get("PROTO") or "").upper(), "HELO")
    session.opening_command = opening if session.client_hostname else None
    return session.client_hostname is not None
