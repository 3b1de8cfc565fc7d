"""The valid values of each option of ``Fumi(…)``: TypeError for a wrong type, ValueError for a wrong value."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Collection, Iterable
from typing import Any

from fumi_core.runtime.addresses import Networks
from fumi_core.smtp.grammar import VERBS
from fumi_core.smtp.sasl import MECHANISMS

Check = Callable[[str, Any], Any]
"""Takes an option's name and the given value; returns the value that the server keeps."""


def check(option: str, given: object) -> Any:
    """Return the value to keep. The error says what to write instead."""
    return _VALUES[option](option, given)


def _flag(option: str, given: object) -> bool:
    if not isinstance(given, bool):
        raise TypeError(f"{option} is True or False, not {given!r}")
    return given


def _whole(least: int, most: float = math.inf) -> Check:
    bounds = f"from {least} up" if most == math.inf else f"from {least} to {most}"

    def check(option: str, given: object) -> int:
        if not isinstance(given, int) or isinstance(given, bool):
            raise TypeError(f"{option} is a whole number, not {given!r}")
        if not least <= given <= most:
            raise ValueError(f"{option} is a whole number {bounds}, not {given!r}")
        return given

    return check


def _or_none(check: Check) -> Check:
    def check_unless_none(option: str, given: object) -> Any:
        try:
            return None if given is None else check(option, given)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{error}; None is no limit") from None

    return check_unless_none


def _seconds(least: str) -> Check:
    def check(option: str, given: object) -> float:
        if not isinstance(given, int | float) or isinstance(given, bool):
            raise TypeError(f"{option} is a number of seconds, not {given!r}")
        if not math.isfinite(given) or given < 0 or (given == 0 and least == "above 0"):
            raise ValueError(f"{option} is a number of seconds {least}, not {given!r}")
        return given

    return check


def _text(pattern: str, form: str) -> Check:
    allowed = re.compile(pattern)

    def check(option: str, given: object) -> str:
        if not isinstance(given, str):
            raise TypeError(f"{option} is a text, not {given!r}")
        if not allowed.fullmatch(given):
            raise ValueError(f"{option} is {form}, not {given!r}")
        return given

    return check


def _texts(example: str) -> Check:
    def check(option: str, given: object) -> tuple[str, ...]:
        # A string is an iterable of strings too, but its letters are never meant.
        if isinstance(given, Iterable) and not isinstance(given, str | bytes):
            found = tuple(given)
            if all(isinstance(each, str) for each in found):
                return found
        raise TypeError(f"{option} is a list of texts, not {given!r}: write [{example!r}]")

    return check


def _names(known: Collection[str], example: str) -> Check:
    texts = _texts(example)

    def check(option: str, given: object) -> tuple[str, ...]:
        names = tuple(name.upper() for name in texts(option, given))
        for name in names:
            if name not in known:
                raise ValueError(f"{option}: {name!r} is none of {', '.join(known)}")
        return tuple(dict.fromkeys(names))

    return check


def _networks(option: str, given: object) -> tuple[str, ...]:
    found: tuple[str, ...] = _texts("192.0.2.0/24")(option, given)
    try:
        Networks(found)
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from None
    return found


def _logger(option: str, given: object) -> bool | logging.Logger:
    if not isinstance(given, bool | logging.Logger):
        raise TypeError(f"{option} is True, False or a logging.Logger, not {given!r}")
    return given


_ABOVE_ZERO, _FROM_ZERO = _seconds("above 0"), _seconds("from 0 up")
_VALUES: dict[str, Check] = {
    "require_tls": _flag,
    "auth_methods": _names(MECHANISMS, "PLAIN"),
    "auth_optional": _flag,
    "allow_insecure_auth": _flag,
    "size": _or_none(_whole(1)),
    "max_clients": _or_none(_whole(1)),
    # It is one word in the banner, the Received headers and CRAM-MD5's challenge.
    "name": _text(r"[!-~]{1,255}", "a host name in ASCII without spaces, as in 'mx.example.org'"),
    "banner": _text(r"[ -~]*", "printable ASCII in one line"),
    "disabled_commands": _names(VERBS, "VRFY"),
    "hide_starttls": _flag,
    "hide_size": _flag,
    "hide_pipelining": _flag,
    "hide_enhancedstatuscodes": _flag,
    "hide_dsn": _flag,
    "hide_requiretls": _flag,
    "hide_8bitmime": _flag,
    "hide_smtputf8": _flag,
    "hide_chunking": _flag,
    "lmtp": _flag,
    "use_xclient": _flag,
    "use_xforward": _flag,
    "proxy_protocol": _text("off|required", "'off' or 'required'"),
    "trusted_proxies": _networks,
    "assume_tls": _flag,
    "bare_newlines": _text("reject|normalize", "'reject' or 'normalize'"),
    "max_recipients": _whole(1, 999_999),  # six digits: RFC 9422 §4.1
    "max_errors": _whole(0),
    "max_unauthenticated_commands": _whole(1),  # with none there would be no EHLO before AUTH
    "socket_timeout": _ABOVE_ZERO,
    "data_timeout": _ABOVE_ZERO,
    "proxy_timeout": _ABOVE_ZERO,
    "close_timeout": _FROM_ZERO,
    "lenient_addresses": _flag,
    "logger": _logger,
}
