"""A connection and the message that it is sending: plain data that handlers read."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from email.utils import formatdate
from typing import Any, NamedTuple

from fumi_core.proxy_protocol import TLSInfo
from fumi_core.smtp.domains import canonical
from fumi_core.smtp.grammar import Address as Address

_UNSAFE_IN_TRACE = re.compile(r"[^A-Za-z0-9.:_\-\[\]]")


def domain_of(address: str) -> str:
    """The domain after the last @, in the form for comparison (``domains.canonical``); "" without an @."""
    return canonical(address.rpartition("@")[2]) if "@" in address else ""


def address_key(address: str) -> str:
    """An address in the form for comparison: in lower case, with its domain as ``domain_of()`` returns it."""
    local, at, _ = address.rpartition("@")
    return f"{local.lower()}@{domain_of(address)}" if at else address.lower()


class DSN(NamedTuple):
    """MAIL's parameters for delivery status notifications (RFC 3461 §4.3, §4.4); None where one was not given."""

    ret: str | None = None
    envid: str | None = None


_NO_DSN = DSN()


@dataclass(slots=True)
class Envelope:
    """The transaction so far: from MAIL to the end of the message.

    ``mail_from`` is the reverse-path, None before MAIL; ``rcpt_to`` are the accepted forward-paths. ``body`` is ``7BIT``,
    ``8BITMIME`` (RFC 6152) or ``BINARYMIME`` (RFC 3030); ``smtputf8`` (RFC 6531) and ``require_tls`` (RFC 8689) tell whether MAIL
    had these parameters; ``dsn`` has RET and ENVID (RFC 3461). ``at_end`` are functions to call at the end: add one with ``+=``.
    """

    mail_from: Address | None = None
    rcpt_to: list[Address] = field(default_factory=list)
    body: str = "7BIT"
    smtputf8: bool = False
    require_tls: bool = False
    dsn: DSN = _NO_DSN
    at_end: tuple[Callable[[], None], ...] = field(default=(), repr=False, compare=False)
    """Called when the transaction ends while the connection is open: by a reply to the message, RSET, EHLO or a rejected MAIL."""


class Session:
    """One client connection, as the PROXY header and the client describe it: the same object in every hook.

    An app's own values go into ``state``: other attributes cannot be added.
    """

    __slots__ = {  # noqa: RUF023  # in the order of the README, with what help() shows
        "id": "The connection's ID, as in the log: from the PROXY header if that has one.",
        "name": "This server's host name, from the option ``name``.",
        "remote_address": "The client's IP address, from the PROXY header if there is one; ``unix`` on a Unix socket.",
        "remote_port": "The client's port; 0 on a Unix socket.",
        "local_address": "The address that the client connected to.",
        "local_port": "The port that the client connected to.",
        "proxy_address": "The TLS proxy's address; None without a PROXY header.",
        "health_check": "Whether the connection is the proxy's own, for no client: a PROXY header with LOCAL.",
        "secure": "Whether the client's connection is encrypted with TLS.",
        "tls": "A TLSInfo; None without TLS, or if its parameters are unknown.",
        "client_hostname": "The argument of EHLO, HELO or LHLO; None before.",
        "opening_command": "``EHLO``, ``HELO`` or ``LHLO``; None before.",
        "user": "The argument of ``ctx.accept(user)``; None before.",
        "auth_method": "The SASL mechanism (RFC 4954), such as ``PLAIN``; None before, and for a user that XCLIENT names.",
        "_state": "``state``, once it is used.",
        "envelope": "The Envelope of the present transaction.",
        "transaction": "Number of transactions begun, including those whose MAIL was rejected.",
        "xclient": "The attributes that a trusted proxy sent with XCLIENT: upper-case names to values, None if unavailable.",
        "xforward": "The same for XFORWARD; for one transaction.",
    }

    def __init__(self, id: str, name: str) -> None:
        """``name`` is the server's own host name, for the Received header."""
        self.id = id
        self.name = name
        self.secure = False
        self.tls: TLSInfo | None = None
        self.remote_address = ""
        self.remote_port = 0
        self.local_address = ""
        self.local_port = 0
        self.proxy_address: str | None = None
        self.health_check = False
        self.client_hostname: str | None = None
        self.opening_command: str | None = None
        self.user: Any = None
        self.auth_method: str | None = None
        self.envelope = Envelope()
        self.transaction = 0
        self.xclient: dict[str, str | None] = {}
        self.xforward: dict[str, str | None] = {}
        self._state: dict[Any, Any] | None = None

    @property
    def state(self) -> dict[Any, Any]:
        """A dict for the app's own values, empty when the client connects."""
        if self._state is None:
            self._state = {}
        return self._state

    @property
    def transmission_type(self) -> str:
        """The "with" keyword: RFC 3848, and RFC 6531 §4.3 for internationalized mail."""
        if self.opening_command == "HELO":
            return "SMTP"
        base = "LMTP" if self.opening_command == "LHLO" else "ESMTP"
        if self.envelope.smtputf8:
            base = "UTF8LMTP" if base == "LMTP" else "UTF8SMTP"
        return base + "S" * self.secure + "A" * (self.user is not None)

    def received_header(self) -> str:
        """The Received header (RFC 5321 §4.4), folded and ended with CRLF: client, protocol, TLS version and cipher, time.

        ``for`` is included only for a single recipient, so that recipients do not learn of each other.
        """
        lines = [f"from {_safe(self.client_hostname or 'unknown')} ([{_tagged(self.remote_address)}])"]
        if self.tls is not None and self.tls.version:
            cipher = f" with cipher {_safe(self.tls.cipher)}" if self.tls.cipher else ""
            lines.append(f"(using {_safe(self.tls.version)}{cipher})")
        lines.append(f"by {self.name} with {self.transmission_type} id {self.id}")
        if len(self.envelope.rcpt_to) == 1 and self.envelope.rcpt_to[0].address.isascii():
            lines.append(f"for <{self.envelope.rcpt_to[0].address}>")
        return "Received: " + "\r\n\t".join(lines) + f";\r\n\t{formatdate(localtime=True)}\r\n"


def _safe(word: str) -> str:
    """Text from a client or a PROXY header, made safe for a Received header."""
    return _UNSAFE_IN_TRACE.sub("?", word)


def _tagged(address: str) -> str:
    """An address as it is written in an address-literal (RFC 5321 §4.1.3)."""
    if address.startswith("unix"):
        return _safe(address)
    return f"IPv6:{address}" if ":" in address else address


def log_fields(session: Session) -> dict[str, object]:
    """The fields by which a log line names a client. A client on a Unix socket has no port."""
    return {"id": session.id, "client_ip": session.remote_address, "client_port": session.remote_port or None}
