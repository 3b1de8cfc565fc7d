"""The options of ``Fumi(…)``. Each is declared once, as a field of ``Options``: name, type, default, check, meaning, flag.

The flags of fumi-core and their help follow from the declarations, and tests compare the table in fumi_core/README.md with them.
``OptionArguments`` repeats names and types, because type checkers read nothing from metadata; a test compares the two.
"""

from __future__ import annotations

import difflib
import logging
import socket
from collections.abc import Mapping, Set
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from functools import cache
from typing import Any, Literal, NamedTuple, TypedDict, TypeVar

from fumi_core.runtime.addresses import THIS_HOST
from fumi_core.smtp.grammar import VERBS, Paths, paths
from fumi_core.smtp.option_values import (
    Check,
    Choice,
    boolean,
    boolean_or_logger,
    names_of,
    networks,
    or_none,
    seconds,
    string,
    whole_number,
)
from fumi_core.smtp.sasl import MECHANISMS

T = TypeVar("T")
_TLS_OPTIONS = {"secure", "key", "cert", "ca"}


def _declared(check: Check[T], meaning: str, flag: str | None = None) -> dict[str, Any]:
    """The metadata of an option's field."""
    return {"check": check, "meaning": meaning, "flag": flag}


def _option(default: T, check: Check[T], meaning: str, *, flag: str | None = None) -> T:
    """Declare an option. This is the field, although type checkers see its default."""
    return field(default=default, metadata=_declared(check, meaning, flag))


def _switch(meaning: str, *, flag: str | None = None) -> bool:
    """Declare an option that is False by default."""
    return _option(False, boolean, meaning, flag=flag)


@dataclass(slots=True, kw_only=True, frozen=True)
class Options:
    """The options with their values checked. Times are in seconds, sizes in bytes; None means no limit."""

    require_tls: bool = _switch("Answers MAIL and AUTH with 530 on connections without TLS.", flag="--require-tls")
    auth_methods: tuple[str, ...] = _option(
        ("PLAIN", "LOGIN"),
        names_of(MECHANISMS, "PLAIN"),
        "Mechanisms that AUTH offers. CRAM-MD5 and XOAUTH2 are available too.",
    )
    auth_optional: bool = _switch("Accepts mail from clients that have not authenticated.")
    allow_insecure_auth: bool = _switch("Offers AUTH on connections without TLS, too.", flag="--allow-insecure-auth")
    size: int | None = _option(
        None,
        or_none(whole_number(1)),
        "Largest message, declared or received, in bytes; larger ones are answered 552.",
        flag="--size",
    )
    max_clients: int | None = _option(
        None,
        or_none(whole_number(1)),
        "Maximum number of concurrent connections, in all workers together; one more is answered 421.",
        flag="--max-clients",
    )
    name: str = field(
        default_factory=cache(socket.getfqdn),
        metadata=_declared(
            # It is one word in the banner, the Received headers and CRAM-MD5's challenge.
            string(r"[!-~]{1,255}", "a host name in ASCII without spaces, as in 'mx.example.org'"),
            "The server's name in banner, EHLO reply and Received header.",
            flag="--name",
        ),
    )
    banner: str = _option(
        "", string(r"[ -~]*", "printable ASCII in one line"), "Text after the name in the banner.", flag="--banner"
    )
    disabled_commands: tuple[str, ...] = _option(
        (),
        names_of(VERBS, "VRFY"),
        "Commands that are answered 502. If AUTH is one of them, authentication is not required.",
    )
    hide_starttls: bool = _switch(
        "Answers STARTTLS with 500, as an unknown command (otherwise 502, or 503 inside TLS). The TLS proxy handles it."
    )
    hide_size: bool = _switch("Does not offer SIZE.")
    hide_pipelining: bool = _switch("Does not offer PIPELINING.")
    hide_enhancedstatuscodes: bool = _switch("Neither offers nor sends enhanced status codes.")
    hide_dsn: bool = _switch("Neither offers DSN nor accepts its parameters RET, ENVID, NOTIFY and ORCPT.")
    hide_requiretls: bool = _switch("Neither offers nor accepts REQUIRETLS, which clients with TLS may use otherwise.")
    hide_8bitmime: bool = _switch("Does not offer 8BITMIME.")
    hide_smtputf8: bool = _switch("Neither offers nor accepts SMTPUTF8.")
    hide_chunking: bool = _switch("Neither offers nor accepts BDAT and BINARYMIME.")
    lmtp: bool = _switch("Speaks LMTP (RFC 2033) instead of SMTP.", flag="--lmtp")
    use_xclient: bool = _switch("Accepts XCLIENT from trusted_proxies.")
    use_xforward: bool = _switch("Accepts XFORWARD from trusted_proxies.")
    proxy_protocol: str = _option(
        "off",
        Choice("off", "required"),
        "Whether every connection must begin with a PROXY header, version 1 or 2. With required, a connection without"
        " one is closed.",
        flag="--proxy-protocol",
    )
    trusted_proxies: tuple[str, ...] = _option(
        THIS_HOST,
        networks,
        "Networks and addresses that may send PROXY headers, XCLIENT and XFORWARD; unix for Unix sockets.",
        flag="--trusted-proxy",
    )
    assume_tls: bool = _switch(
        "Treats every connection as TLS-protected, for a TLS proxy that cannot report it.", flag="--assume-tls"
    )
    bare_newlines: str = _option(
        "reject",
        Choice("reject", "normalize"),
        "A CR or LF alone in a message: reject answers 550 and closes, normalize converts it to CRLF."
        " Neither ever ends a message.",
        flag="--bare-newlines",
    )
    max_recipients: int = _option(
        100,
        whole_number(1, 999_999),  # six digits: RFC 9422 §4.1
        "Maximum number of recipients of a transaction; one more is answered 452.",
    )
    max_errors: int = _option(
        10,
        whole_number(0),
        "Protocol errors (5xx replies) tolerated in a session; one more is answered 421. Commands pipelined after a rejected"
        " sender or recipient do not count.",
    )
    max_unauthenticated_commands: int = _option(
        10,
        whole_number(1),  # with 0 there could be no EHLO before AUTH
        "Commands tolerated before AUTH, if it is required; one more is answered 421.",
    )
    socket_timeout: float = _option(
        300.0,
        seconds(),
        "Time limit for silence between two bytes, for a command from its first byte to its end, and for reading replies;"
        " then 421, or the connection is closed.",
    )
    data_timeout: float = _option(600.0, seconds(), "Time limit for receiving one message.")
    proxy_timeout: float = _option(5.0, seconds(), "Time limit for the PROXY header.")
    close_timeout: float = _option(
        30.0, seconds(zero=True), "Time limit for transactions when the server stops.", flag="--drain-timeout"
    )
    lenient_addresses: bool = _switch(
        "Accepts addresses that devices and carriers send: without <> or a domain, with dots anywhere, with a final dot.",
        flag="--lenient-addresses",
    )
    logger: bool | logging.Logger = field(
        default=False,
        metadata=_declared(boolean_or_logger, "Logs each session when it ends: True to the logger fumi.core, or to this logger."),
    )

    disabled_verbs: frozenset[bytes] = field(init=False, default=frozenset())
    auth_required: bool = field(init=False, default=True)
    paths: Paths = field(init=False, default=paths(False))

    def __post_init__(self) -> None:
        for option in DECLARATIONS.values():
            object.__setattr__(self, option.name, option.check(option.name, getattr(self, option.name)))
        # The protocol compares verbs as they arrive: bytes.
        object.__setattr__(self, "disabled_verbs", frozenset(verb.encode() for verb in self.disabled_commands))
        object.__setattr__(self, "paths", paths(self.lenient_addresses))
        # Without AUTH no client has to authenticate: as in smtp-server, whose users disable AUTH to accept mail from anyone.
        object.__setattr__(self, "auth_required", not self.auth_optional and "AUTH" not in self.disabled_commands)

    @property
    def chunking(self) -> bool:
        """Whether BDAT is offered (RFC 3030). If it is refused it must not be offered: clients send chunks without waiting."""
        return not self.hide_chunking and b"BDAT" not in self.disabled_verbs


class Declaration(NamedTuple):
    """What ``Options`` declares about one option."""

    name: str
    type: str
    """The annotation, as source text."""
    default: Any
    """None, too, for ``name``, whose default is the name of this host."""
    check: Check[Any]
    meaning: str
    """A sentence for ``--help`` and the README."""
    flag: str | None
    """The flag of fumi-core that sets the option."""


def _declaration(each: Field[Any]) -> Declaration:
    default = None if each.default is MISSING else each.default
    return Declaration(each.name, str(each.type), default, **each.metadata)


DECLARATIONS = {each.name: _declaration(each) for each in fields(Options) if each.init}
"""All options by name, in the order of the README's table."""

Strings = list[str] | tuple[str, ...] | Set[str]
"""Several strings. ``Iterable[str]`` would accept a single string, which is a mistake."""


class OptionArguments(TypedDict, total=False):
    """The keyword arguments of ``Fumi(…)``, for type checkers: the options, with the types that a program may give."""

    require_tls: bool
    auth_methods: Strings
    auth_optional: bool
    allow_insecure_auth: bool
    size: int | None
    max_clients: int | None
    name: str
    banner: str
    disabled_commands: Strings
    hide_starttls: bool
    hide_size: bool
    hide_pipelining: bool
    hide_enhancedstatuscodes: bool
    hide_dsn: bool
    hide_requiretls: bool
    hide_8bitmime: bool
    hide_smtputf8: bool
    hide_chunking: bool
    lmtp: bool
    use_xclient: bool
    use_xforward: bool
    proxy_protocol: Literal["off", "required"]
    trusted_proxies: Strings
    assume_tls: bool
    bare_newlines: Literal["reject", "normalize"]
    max_recipients: int
    max_errors: int
    max_unauthenticated_commands: int
    socket_timeout: float
    data_timeout: float
    proxy_timeout: float
    close_timeout: float
    lenient_addresses: bool
    logger: bool | logging.Logger


def read(given: Mapping[str, Any]) -> Options:
    """Raises TypeError for an unknown option, naming the nearest, or a wrong type; ValueError for an invalid value."""
    _refuse_unknown(given)
    return Options(**given)


def override(options: Options, given: Mapping[str, Any]) -> Options:
    """Return the options with these changed. Raises as ``read`` does."""
    _refuse_unknown(given)
    return replace(options, **given)


def _refuse_unknown(given: Mapping[str, Any]) -> None:
    for option in given:
        if option in _TLS_OPTIONS:
            raise TypeError(f"fumi_core.Fumi has no TLS: {option!r} is an option of fumi_edge.Fumi")
        if option not in DECLARATIONS:
            nearest = difflib.get_close_matches(option, DECLARATIONS, 1, 0)
            raise TypeError(f"Fumi has no option {option!r}; did you mean {nearest[0]!r}?")
