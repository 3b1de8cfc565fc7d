"""SASL mechanisms (RFC 4422), sans-IO: each is a generator that yields challenges, is sent responses, returns Credentials.

PLAIN is RFC 4616, CRAM-MD5 RFC 2195; LOGIN (draft-murchison-sasl-login) and XOAUTH2 (Google's, a bearer token) never became
standards and are widely used. A client may answer an empty challenge (b"") in advance, with an initial response.
"""

from __future__ import annotations

import hmac
import secrets
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field

from fumi_core.smtp import saslprep
from fumi_core.smtp.grammar import CONTROL_CHARACTER

Challenges = Generator[bytes, bytes, "Credentials"]
Mechanism = Callable[[str], Challenges]
"""Called with the server's name."""


class Malformed(Exception):
    """A response that does not have the mechanism's format."""


class BadName(Exception):
    """A user name with control characters, which could forge log lines."""


class NotAuthorized(Exception):
    """A request to act for another user, which is never allowed."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """What a client authenticates with (RFC 4954). ``method`` is the mechanism; fields that it does not use are "".

    All mechanisms have ``username``. PLAIN (RFC 4616) and LOGIN have ``password``, XOAUTH2 has ``access_token``, and CRAM-MD5
    (RFC 2195) has the server's ``challenge`` and the client's ``challenge_response``, in hex.

    Secrets are not in the representation, so that they are never logged.
    """

    method: str
    username: str
    password: str = field(default="", repr=False)
    access_token: str = field(default="", repr=False)
    challenge: str = field(default="", repr=False)
    challenge_response: str = field(default="", repr=False)

    def validate_password(self, password: str) -> bool:
        """Whether the client has sent this password, compared in constant time; with CRAM-MD5, a response computed from it.

        Always False with XOAUTH2. Other Unicode forms of a password are the same password (RFC 4013).
        """
        if self.method == "CRAM-MD5":
            found = False
            for form in saslprep.forms(password):
                digest = hmac.new(form.encode(), self.challenge.encode(), "md5").hexdigest()
                found |= hmac.compare_digest(digest.encode(), self.challenge_response.encode())
            return found
        if self.method == "XOAUTH2":
            return False
        return hmac.compare_digest(saslprep.prepare(password).encode(), saslprep.prepare(self.password).encode())


def _plain(name: str) -> Challenges:
    parts = (yield b"").split(b"\x00")
    if len(parts) != 3 or not parts[1]:
        raise Malformed
    if parts[0] and parts[0] != parts[1]:
        raise NotAuthorized
    return Credentials("PLAIN", _name(parts[1]), password=_text(parts[2]))


def _login(name: str) -> Challenges:
    # The first challenge is not b"", yet the user's name may come as an initial response.
    username = yield b"Username:"
    password = yield b"Password:"
    if not username:
        raise Malformed
    return Credentials("LOGIN", _name(username), password=_text(password))


def _cram_md5(name: str) -> Challenges:
    challenge = f"<{secrets.randbits(64)}.{time.time_ns()}@{name}>"
    username, _, digest = (yield challenge.encode()).rpartition(b" ")
    if not username:
        raise Malformed
    return Credentials("CRAM-MD5", _name(username), challenge=challenge, challenge_response=_text(digest).lower())


def _xoauth2(name: str) -> Challenges:
    fields = dict(part.partition("=")[::2] for part in _text((yield b"")).split("\x01") if part)
    scheme, _, token = fields.get("auth", "").partition(" ")
    if scheme.lower() != "bearer" or not token or not fields.get("user"):
        raise Malformed
    return Credentials("XOAUTH2", _name(fields["user"].encode()), access_token=token)


def _name(response: bytes) -> str:
    name = _text(response)
    if CONTROL_CHARACTER.search(name):
        raise BadName
    return name


def _text(response: bytes) -> str:
    try:
        return response.decode()
    except UnicodeDecodeError:
        raise Malformed from None


MECHANISMS: dict[str, Mechanism] = {"PLAIN": _plain, "LOGIN": _login, "CRAM-MD5": _cram_md5, "XOAUTH2": _xoauth2}
TAKES_INITIAL_RESPONSE = frozenset({"PLAIN", "LOGIN", "XOAUTH2"})
