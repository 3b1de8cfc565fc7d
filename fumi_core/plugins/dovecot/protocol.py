"""Dovecot's authentication protocol 1.x, the client's side, sans-IO.

https://doc.dovecot.org/developer_manual/design/auth_protocol/ describes it. A line is a command and its parameters, separated by
tabs. Two kinds of sockets use it: ``auth-client`` checks credentials (AUTH; OK, FAIL or CONT), ``auth-userdb`` looks up users
(USER; USER, NOTFOUND or FAIL). Replies may come in any order; each has the number of its request.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import ClassVar, NamedTuple

MAX_REPLY = 64 * 1024
"""Bytes of a line that the server may send."""
MAX_NUMBER = 2**31 - 1
"""The highest number of a request; the server takes 32 bits."""
_VERSION = ("VERSION", "1", "1")

_ESCAPES = {"\0": "\x010", "\x01": "\x011", "\t": "\x01t", "\r": "\x01r", "\n": "\x01l"}
_ESCAPE = str.maketrans(_ESCAPES)
_ESCAPED = re.compile("\x01(.?)", re.DOTALL)
_UNESCAPED = {escape[1]: character for character, escape in _ESCAPES.items()}


class Malformed(Exception):
    """The server violates the protocol, or has another version of it."""


def line(*fields: str) -> bytes:
    """A command with its parameters. Tabs, line ends and NULs in them are escaped."""
    return ("\t".join(field.translate(_ESCAPE) for field in fields) + "\n").encode("utf-8", "surrogateescape")


def fields(text: bytes) -> list[str]:
    """The fields of a line, given without its LF. Bytes that are not UTF-8 become surrogates, which are not printable."""
    return [_unescape(field) for field in text.decode("utf-8", "surrogateescape").split("\t")]


def _unescape(field: str) -> str:
    return _ESCAPED.sub(lambda match: _UNESCAPED.get(match[1], match[1]), field) if "\x01" in field else field


def _of_valid_length(text: bytes) -> bytes:
    if len(text) > MAX_REPLY:
        raise Malformed(f"a line of more than {MAX_REPLY} bytes")
    return text


class DovecotReply(NamedTuple):
    """One reply: ``number`` is the request's, ``parameters`` are what follows it."""

    verb: str
    number: int
    parameters: tuple[str, ...]

    def value(self, name: str) -> str | None:
        """The value of a parameter ``name=value``; None without one."""
        return next((each.removeprefix(f"{name}=") for each in self.parameters if each.startswith(f"{name}=")), None)

    def has(self, name: str) -> bool:
        """Whether there is a parameter of this name, with a value or without."""
        return name in self.parameters or self.value(name) is not None


class Conversation:
    """What a server sends on one connection. ``ready``: its handshake is complete, and requests may be sent."""

    verbs: ClassVar[frozenset[str]]
    """The replies of this kind of socket."""

    def __init__(self) -> None:
        self.ready = False
        self.mechanisms: frozenset[str] = frozenset()
        """SASL mechanisms, in capitals."""
        self._rest = b""
        self._minor: str | None = None  # of the server's version, once it is known

    @staticmethod
    def greeting() -> bytes:
        """The client's part of the handshake."""
        raise NotImplementedError

    @property
    def max_request(self) -> int:
        """Bytes of a line that the server accepts, its LF included. It disconnects a client that sends a longer one."""
        raise NotImplementedError

    def feed(self, data: bytes) -> Iterator[DovecotReply]:
        """Yield the replies that ``data`` completes, one line at a time. Raises Malformed at the first malformed line."""
        *whole, rest = (self._rest + data).split(b"\n")
        self._rest = rest
        for each in whole:
            verb, *parameters = fields(_of_valid_length(each))
            if self.ready:
                yield self._reply(verb, parameters)
            else:
                self._handshake(verb, parameters)
        _of_valid_length(rest)

    def _reply(self, verb: str, parameters: list[str]) -> DovecotReply:
        if verb not in self.verbs:
            raise Malformed(f"unexpected line {verb[:40]!r}")
        number = parameters[0] if parameters else ""
        if not (number.isascii() and number.isdigit()) or len(number) > 10:
            raise Malformed(f"{verb} without a request's number")
        return DovecotReply(verb, int(number), tuple(parameters[1:]))

    def _handshake(self, verb: str, parameters: list[str]) -> None:
        if verb == "VERSION":
            if not parameters or parameters[0] != "1":
                raise Malformed(f"protocol version {'.'.join(parameters)[:40]!r} instead of 1")
            self._minor = parameters[1] if len(parameters) > 1 else "0"
        elif self._minor is None:
            raise Malformed(f"unexpected line {verb[:40]!r} instead of VERSION")
        else:
            self._handshake_line(verb, parameters)

    def _handshake_line(self, verb: str, parameters: list[str]) -> None:
        """Take a line that follows VERSION. Unknown ones are ignored, as the specification demands for parameters."""
        raise NotImplementedError


class AuthConversation(Conversation):
    """An ``auth-client`` socket: the server sends its mechanisms, and DONE."""

    verbs = frozenset({"OK", "FAIL", "CONT"})

    @staticmethod
    def greeting() -> bytes:
        return line(*_VERSION) + line("CPID", str(os.getpid()))

    @property
    def max_request(self) -> int:
        return 8192 if self._minor in ("0", "1") else 16384

    def _handshake_line(self, verb: str, parameters: list[str]) -> None:
        if verb == "MECH" and parameters:
            self.mechanisms |= {parameters[0].upper()}
        elif verb == "DONE":
            if not self.mechanisms:
                raise Malformed("no mechanisms")
            self.ready = True
        elif verb in self.verbs:
            raise Malformed(f"{verb} before the end of the handshake")


class UserdbConversation(Conversation):
    """An ``auth-userdb`` socket: SPID is the last line of the server's handshake."""

    verbs = frozenset({"USER", "NOTFOUND", "FAIL"})

    @staticmethod
    def greeting() -> bytes:
        return line(*_VERSION)

    @property
    def max_request(self) -> int:
        return 1024

    def _handshake_line(self, verb: str, parameters: list[str]) -> None:
        if verb == "SPID":
            self.ready = True
        elif verb in self.verbs:
            raise Malformed(f"{verb} before the end of the handshake")
