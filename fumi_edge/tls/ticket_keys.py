"""Renews the keys of TLS session tickets (RFC 5077, RFC 8446 §4.6.1), with the same keys in all workers.

OpenSSL makes the keys together with an SSL context, and Python can neither read nor set them. New keys therefore need a new
context. PREPARED_CONTEXTS contexts, each for one lifetime, are made before the workers are forked, so that all workers have
them; the number of the one in use is in shared memory. The first worker that finds the keys too old, or made for other client
CA certificates, takes the next number, and the others follow. A context is never used again after its number has passed. When
all contexts are used up, each worker makes its own, and resumes only its own sessions.
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

KEY_LIFETIME_SECONDS = 86400.0
"""Seconds for which ticket keys are used."""
PREPARED_CONTEXTS = 100
"""Number of contexts made in advance for several workers; each takes about 11 KiB and 0.25 ms."""

_NUMBER = 8
_DIGEST = hashlib.sha256().digest_size


class TicketKeys:
    """The contexts in which handshakes begin, each with its own ticket keys."""

    def __init__(self, make: Callable[[], ssl.SSLContext]) -> None:
        """``make`` returns a new context."""
        self._make = make
        self._began = time.time()
        self._prepared: dict[int, ssl.SSLContext] = {}
        self._number = 0
        self._purpose = b""
        self._shared = mmap.mmap(-1, _NUMBER + _DIGEST)
        """The number of the context in use, and the digest of what its keys are for."""
        self._lock = -1
        self._context: ssl.SSLContext | None = None

    def share(self) -> None:
        """Make the contexts that the workers share; to be called before the fork, after the first context. Raises OSError."""
        self._lock = os.memfd_create("fumi-ticket-keys")
        self._prepared = {number: self._make() for number in range(2, 2 + PREPARED_CONTEXTS)}

    def close(self) -> None:
        """Release the contexts made in advance, and the lock. The context in use stays."""
        self._prepared = {}
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def context(self, client_ca: str | None, now: float) -> ssl.SSLContext:
        """The context for handshakes that begin ``now`` (seconds since 1970), with these client CA certificates."""
        purpose = hashlib.sha256(f"{(now - self._began) // KEY_LIFETIME_SECONDS} {client_ca}".encode()).digest()
        number = self._agree(purpose)
        if number != self._number or self._context is None:
            self._number = number
            self._context = self._prepared.get(number) or self._make()
            # Old contexts are dropped, so that this process's memory holds no keys of earlier sessions.
            self._prepared = {other: context for other, context in self._prepared.items() if other > number}
        return self._context

    def _agree(self, purpose: bytes) -> int:
        """The number that the workers use for this purpose; the next one when this worker is the first to need it."""
        with self._locked():
            number, current = int.from_bytes(self._shared[:_NUMBER]), self._shared[_NUMBER:]
            if current != purpose:
                if purpose == self._purpose:
                    # The other workers have moved on to a purpose that this worker does not know yet.
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
