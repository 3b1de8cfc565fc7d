"""The options of ``Fumi(…)``: their names and defaults. What their values may be: ``option_values``."""

from __future__ import annotations

import difflib
import logging
import socket
from collections.abc import Mapping, Set
from dataclasses import dataclass, field, fields, replace
from functools import cache
from typing import Any, Literal, TypedDict

from fumi_core.runtime.addresses import THIS_HOST
from fumi_core.smtp.grammar import Paths, paths
from fumi_core.smtp.option_values import check

_TLS_OPTIONS = {"secure", "key", "cert", "ca"}


@dataclass(slots=True, kw_only=True, frozen=True)
class Options:
    """Times are in seconds, ``size`` in octets; None is no limit."""

    require_tls: bool = False
    auth_methods: tuple[str, ...] = ("PLAIN", "LOGIN")
    auth_optional: bool = False
    allow_insecure_auth: bool = False
    size: int | None = None
    max_clients: int | None = None
    name: str = field(default_factory=cache(socket.getfqdn))
    banner: str = ""
    disabled_commands: tuple[str, ...] = ()
    hide_starttls: bool = False
    hide_size: bool = False
    hide_pipelining: bool = False
    hide_enhancedstatuscodes: bool = False
    hide_dsn: bool = False
    hide_requiretls: bool = False
    hide_8bitmime: bool = False
    hide_smtputf8: bool = False
    hide_chunking: bool = False
    lmtp: bool = False
    use_xclient: bool = False
    use_xforward: bool = False
    proxy_protocol: str = "off"
    trusted_proxies: tuple[str, ...] = THIS_HOST
    assume_tls: bool = False
    bare_newlines: str = "reject"
    max_recipients: int = 100
    max_errors: int = 10
    max_unauthenticated_commands: int = 10
    socket_timeout: float = 300.0
    data_timeout: float = 600.0
    proxy_timeout: float = 5.0
    close_timeout: float = 30.0
    lenient_addresses: bool = False
    logger: bool | logging.Logger = False

    disabled_verbs: frozenset[bytes] = field(init=False, default=frozenset())
    auth_required: bool = field(init=False, default=True)
    paths: Paths = field(init=False, default=paths(False))

    def __post_init__(self) -> None:
        for option in NAMES:
            object.__setattr__(self, option, check(option, getattr(self, option)))
        # The protocol compares verbs as they arrive: bytes.
        object.__setattr__(self, "disabled_verbs", frozenset(verb.encode() for verb in self.disabled_commands))
        object.__setattr__(self, "paths", paths(self.lenient_addresses))
        # Where nobody can authenticate nobody has to: as in smtp-server, whose users disable AUTH to take mail from anyone.
        object.__setattr__(self, "auth_required", not self.auth_optional and "AUTH" not in self.disabled_commands)

    @property
    def chunking(self) -> bool:
        """Whether there is BDAT (RFC 3030). Where it is refused it is not offered: a client sends its chunk without waiting."""
        return not self.hide_chunking and b"BDAT" not in self.disabled_verbs


Texts = list[str] | tuple[str, ...] | Set[str]
"""Several texts. One text is not meant, so this is no ``Iterable[str]``."""


class OptionArguments(TypedDict, total=False):
    """The options as a program gives them, for type checkers: the names and order of ``Options``, and the types it reads."""

    require_tls: bool
    auth_methods: Texts
    auth_optional: bool
    allow_insecure_auth: bool
    size: int | None
    max_clients: int | None
    name: str
    banner: str
    disabled_commands: Texts
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
    trusted_proxies: Texts
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


NAMES = tuple(each.name for each in fields(Options) if each.init)


def read(given: Mapping[str, Any]) -> Options:
    """Raises TypeError for an unknown option, naming the nearest, or a wrong type; ValueError for a value that cannot be."""
    _refuse_unknown(given)
    return Options(**given)


def override(options: Options, given: Mapping[str, Any]) -> Options:
    """The options with these changed. Raises as ``read`` does."""
    _refuse_unknown(given)
    return replace(options, **given)


def _refuse_unknown(given: Mapping[str, Any]) -> None:
    for option in given:
        if option in _TLS_OPTIONS:
            raise TypeError(f"fumi_core.Fumi speaks no TLS: {option!r} is an option of fumi_edge.Fumi")
        if option not in NAMES:
            nearest = difflib.get_close_matches(option, NAMES, 1, 0)
            raise TypeError(f"Fumi has no option {option!r}; did you mean {nearest[0]!r}?")
