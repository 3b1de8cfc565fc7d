"""A file of users: ``name:hash`` a line, the hash by scrypt (RFC 7914). ``fumi-core --hash-password`` makes hashes.

A password is checked in a thread, since that is meant to be slow; an unknown name takes as long as a wrong password.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
import secrets
from base64 import b64decode, b64encode
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TYPE_CHECKING

from fumi_core.contexts import AuthContext
from fumi_core.middleware import Next

if TYPE_CHECKING:
    from fumi_core.app import Fumi

THREADS = 2
"""Passwords checked at once. Each takes 16 MiB and tens of milliseconds; the others wait."""
_LOG_N, _R, _P = 14, 8, 1
_HASH = re.compile(r"\$scrypt\$ln=(\d{1,2}),r=(\d{1,2}),p=(\d{1,2})\$([A-Za-z0-9+/]+={0,2})\$([A-Za-z0-9+/]+={0,2})")


def hash_password(password: str) -> str:
    """A line's second half: ``$scrypt$ln=14,r=8,p=1$salt$hash``."""
    salt = secrets.token_bytes(16)
    parts = b64encode(salt).decode(), b64encode(_scrypt(password, salt, _LOG_N, _R, _P)).decode()
    return f"$scrypt$ln={_LOG_N},r={_R},p={_P}${parts[0]}${parts[1]}"


def check_password(password: str, hashed: str) -> bool:
    """Whether the password is the one that was hashed."""
    found = _HASH.fullmatch(hashed)
    if found is None:
        return False
    log_n, r, p = (int(found[number]) for number in (1, 2, 3))
    return hmac.compare_digest(_scrypt(password, b64decode(found[4]), log_n, r, p), b64decode(found[5]))


@cache
def _nobody() -> str:
    """A hash that no password has, so that an unknown name takes as long."""
    return hash_password(secrets.token_hex())


def _scrypt(password: str, salt: bytes, log_n: int, r: int, p: int) -> bytes:
    return hashlib.scrypt(
        password.encode(), salt=salt, n=1 << log_n, r=r, p=p, maxmem=256 * r * (1 << log_n) + (1 << 20), dklen=32
    )


class Users:
    """The users of a file, as a plugin: lets in whoever knows a password."""

    def __init__(self, path: str) -> None:
        """Raises OSError when the file cannot be read, ValueError when it is wrong, with the line's number."""
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="users")
        self._nobody = _nobody()
        self._hashes = read(path)

    def __call__(self, app: Fumi) -> None:
        app.on_auth(self._authenticate)

    async def _authenticate(self, ctx: AuthContext, next: Next) -> None:
        name = ctx.credentials.username
        hashed = self._hashes.get(name, self._nobody)
        loop = asyncio.get_running_loop()
        if await loop.run_in_executor(self._threads, check_password, ctx.credentials.password, hashed):
            ctx.accept(name)


def read(path: str) -> dict[str, str]:
    """Hashes by name. Empty lines and lines that begin with # are passed over."""
    hashes: dict[str, str] = {}
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip() or line.startswith("#"):
                continue
            name, colon, hashed = line.rstrip("\n").rpartition(":")
            if not colon or not name or not _HASH.fullmatch(hashed):
                raise ValueError(f"{path}:{number}: not NAME:HASH; make a hash with fumi-core --hash-password")
            if name in hashes:
                raise ValueError(f"{path}:{number}: {name} is there twice")
            hashes[name] = hashed
    return hashes
