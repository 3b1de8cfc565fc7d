"""A file of users: ``name:hash`` per line, hashed by scrypt (RFC 7914). ``fumi-core --hash-password`` makes hashes.

Hashing is slow by design, so a password is checked in a thread. Every check takes equally long, whether the user exists or not:
it computes one hash for each cost that occurs in the file.
"""

from __future__ import annotations

import asyncio
import binascii
import hashlib
import hmac
import re
import secrets
from base64 import b64decode, b64encode
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from fumi_core.handlers.contexts import AuthContext
from fumi_core.handlers.middleware import Next
from fumi_core.runtime.files import read_file
from fumi_core.smtp.saslprep import forms, prepare

if TYPE_CHECKING:
    from fumi_core.app import Fumi

THREADS = 2
"""Password checks that run at once; others wait."""
MAX_MEMORY = 256 << 20
"""Bytes of memory that a password check may use. Hashes made by --hash-password use 16 MiB."""
MAX_WORK = 1 << 22
"""Blocks that a check may compute (N·r·p), which takes one or two seconds. Hashes made by --hash-password have 1 << 17."""

_HASH = re.compile(r"\$scrypt\$ln=([0-9]{1,2}),r=([0-9]{1,2}),p=([0-9]{1,2})\$([A-Za-z0-9+/]+)={0,2}\$([A-Za-z0-9+/]+)={0,2}")
_LENGTH = 32  # bytes of a hash


class Cost(NamedTuple):
    """scrypt's parameters (RFC 7914 §2): N is 2 to the power of ``log_n``."""

    log_n: int
    r: int
    p: int


_NEW_COST = Cost(14, 8, 1)


@dataclass(frozen=True, slots=True)
class Hash:
    """A password's hash, decoded."""

    cost: Cost
    salt: bytes
    digest: bytes

    def matches(self, password: str) -> bool:
        """Whether this is the password. Other Unicode forms of it match, too."""
        found = False
        for form in forms(password):
            found |= hmac.compare_digest(_scrypt(form, self.salt, *self.cost), self.digest)
        return found


def hash_password(password: str) -> str:
    """Return the password's hash for a line: ``$scrypt$ln=14,r=8,p=1$salt$hash``. Raises ValueError if no client can send it."""
    if "\0" in password:
        raise ValueError("a password cannot contain a NUL character")
    salt = secrets.token_bytes(16)
    digest = _scrypt(prepare(password), salt, *_NEW_COST)
    return f"$scrypt$ln={_NEW_COST.log_n},r={_NEW_COST.r},p={_NEW_COST.p}${b64encode(salt).decode()}${b64encode(digest).decode()}"


def check_password(password: str, hashed: str) -> bool:
    """Whether ``hashed`` is a hash of this password; False, too, for an invalid hash."""
    try:
        return parse(hashed).matches(password)
    except ValueError:
        return False


def parse(hashed: str) -> Hash:
    """Decode a hash, with or without base64 padding, which passlib leaves out.

    Raises ValueError for another kind of hash, for invalid costs, and for costs above MAX_MEMORY or MAX_WORK.
    """
    found = _HASH.fullmatch(hashed)
    if found is None:
        raise ValueError("not a scrypt hash")
    cost = Cost(*(int(found[number]) for number in (1, 2, 3)))
    # RFC 7914 §6: N is more than 1 and less than 2 to the power of 128·r/8.
    if not (0 < cost.log_n < 16 * cost.r and cost.p):
        raise ValueError("its cost is not valid for scrypt")
    if 128 * cost.r << cost.log_n > MAX_MEMORY or cost.r * cost.p << cost.log_n > MAX_WORK:
        raise ValueError(f"its cost is too high: at most {MAX_MEMORY >> 20} MiB, and N*r*p at most {MAX_WORK}")
    try:
        salt, digest = (b64decode(text + "=" * (-len(text) % 4)) for text in (found[4], found[5]))
    except binascii.Error:
        raise ValueError("its salt or hash is not base64") from None
    if len(digest) != _LENGTH:
        raise ValueError(f"the hash has {len(digest)} bytes instead of {_LENGTH}: is the line complete?")
    return Hash(cost, salt, digest)


def _scrypt(password: str, salt: bytes, log_n: int, r: int, p: int) -> bytes:
    memory = 128 * r * ((1 << log_n) + p) + (1 << 20)
    return hashlib.scrypt(password.encode(), salt=salt, n=1 << log_n, r=r, p=p, maxmem=memory, dklen=_LENGTH)


class Users:
    """The users of a file, as a plugin that authenticates clients by user name and password."""

    def __init__(self, path: str) -> None:
        """Raises OSError if the file cannot be read, ValueError with the line's number if a line is invalid."""
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="users")
        self._hashes = read(path)
        self._dummies = _dummies(self._hashes.values())

    def __len__(self) -> int:
        return len(self._hashes)

    @property
    def names(self) -> Collection[str]:
        """The users' names, prepared by SASLprep (RFC 4013)."""
        return self._hashes.keys()

    def __call__(self, app: Fumi) -> None:
        app.on_auth(self._authenticate)

    async def _authenticate(self, ctx: AuthContext, next: Next) -> None:
        if ctx.credentials.method not in ("PLAIN", "LOGIN"):
            return  # the mechanism has no password to check
        name = prepare(ctx.credentials.username)
        loop = asyncio.get_running_loop()
        if await loop.run_in_executor(self._threads, self._has, name, ctx.credentials.password):
            ctx.accept(name)

    def _has(self, name: str, password: str) -> bool:
        """Whether there is a user with this password. Computes one hash for each cost in the file: the user's, or a dummy."""
        user = self._hashes.get(name)
        found = False
        for dummy in self._dummies:
            found |= (user if user is not None and user.cost == dummy.cost else dummy).matches(password)
        return found


def _dummies(hashes: Iterable[Hash]) -> list[Hash]:
    """For each of the costs, a dummy hash that no password has."""
    costs = sorted({each.cost for each in hashes} or {_NEW_COST})
    return [Hash(cost, secrets.token_bytes(16), secrets.token_bytes(_LENGTH)) for cost in costs]


def read(path: str) -> dict[str, Hash]:
    """Return the hashes by name. Empty lines, lines that begin with # and a byte order mark are ignored.

    Raises OSError, and ValueError for an invalid line.
    """
    hashes: dict[str, Hash] = {}
    for number, line in enumerate(re.split(r"\r\n|\r|\n", read_file(path).decode("utf-8-sig")), 1):
        if not line.strip() or line.startswith("#"):
            continue
        try:
            name, found = _read_line(line)
            if name in hashes:
                raise ValueError(f"{name} is given twice")
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from None
        hashes[name] = found
    return hashes


def _read_line(line: str) -> tuple[str, Hash]:
    name, colon, hashed = line.rpartition(":")
    if not colon or not name:
        raise ValueError("not NAME:HASH; make a hash with fumi-core --hash-password")
    if name != name.strip() or hashed != hashed.strip():
        raise ValueError("there is a space at the beginning, at the end or beside the colon")
    if not name.isprintable():
        raise ValueError(f"{name!r} contains an invisible character")
    try:
        return prepare(name), parse(hashed)
    except ValueError as error:
        raise ValueError(f"{error}; make a hash with fumi-core --hash-password") from None
