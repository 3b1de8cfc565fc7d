"""When TLS session tickets (RFC 5077, RFC 8446 §4.6.1) get new keys, and how all workers get the same ones.

OpenSSL makes the keys with an SSL context, and Python can neither read nor set them. So new keys are another context. The
contexts for LIFETIMES lifetimes are made before the workers are forked, who thereby all have them; which one is in use is a
number in memory that they share. Whoever first finds that keys have become too old, or that the client CA certificates are
others than those the keys were for, takes the next number, and the others follow. A context that was given up is never used
again. When all of them are used up, each worker makes its own, and resumes only the sessions that began with itself.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import mmap
import os
import ssl
import time
from collections.abc import Callable, Iterator

LIFETIME = 86400.0
"""Seconds for which ticket keys are used."""
LIFETIMES = 100
"""Contexts made in advance for several workers: about 11 KiB each, and 0.25 ms."""

_NUMBER = 8
_DIGEST = hashlib.sha256().digest_size


class TicketKeys:
    """The contexts in which connections begin, each with ticket keys of its own."""

    def __init__(self, make: Callable[[], ssl.SSLContext]) -> None:
        """``make`` returns a new context."""
        self._make = make
        self._began = time.time()
        self._prepared: dict[int, ssl.SSLContext] = {}
        self._number = 0
        self._purpose = b""
        self._shared = mmap.mmap(-1, _NUMBER + _DIGEST)
        """The number in use, and what for."""
        self._lock = -1
        self._context: ssl.SSLContext | None = None

    def share(self) -> None:
        """Prepare for being forked, after the first context is made. Raises OSError."""
        self._lock = os.memfd_create("fumi-ticket-keys")
        self._prepared = {number: self._make() for number in range(2, 2 + LIFETIMES)}

    def context(self, client_ca: str | None, now: float) -> ssl.SSLContext:
        """The context for connections that begin ``now``, in seconds since 1970, where these authorities vouch for clients."""
        purpose = hashlib.sha256(f"{(now - self._began) // LIFETIME} {client_ca}".encode()).digest()
        number = self._agree(purpose)
        if number != self._number or self._context is None:
            self._number = number
            self._context = self._prepared.get(number) or self._make()
            # What is over is not kept: who reads this process's memory later finds no keys of earlier sessions.
            self._prepared = {other: context for other, context in self._prepared.items() if other > number}
        return self._context

    def _agree(self, purpose: bytes) -> int:
        """The number that the workers use for this purpose: theirs, or the next one when this worker is the first to need it."""
        with self._locked():
            number, current = int.from_bytes(self._shared[:_NUMBER]), self._shared[_NUMBER:]
            if current != purpose:
                if purpose == self._purpose:
                    # The others have gone on to something that this worker has yet to learn of.
                    return self._number
                number += 1
                self._shared[:] = number.to_bytes(_NUMBER) + purpose
        self._purpose = purpose
        return number

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        if self._lock < 0:
            yield
            return
        fcntl.lockf(self._lock, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.lockf(self._lock, fcntl.LOCK_UN)
