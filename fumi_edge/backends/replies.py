"""Splits the bytes of a backend into replies (RFC 5321 §4.2.1); sans-IO."""

from __future__ import annotations

import re

REPLY_LIMIT = 64 * 1024
"""The maximum size in bytes of a reply that is collected; a longer one is passed on in pieces."""
STARTTLS_OFFER = re.compile(rb"\n250[ -]STARTTLS[ \t]*\r?\n", re.IGNORECASE)
"""The STARTTLS line of a reply to EHLO; never its first line, which holds the server's name."""

_LAST_LINE = re.compile(rb"^(\d{3}(?!-)|(?!\d{3}-)).*\n", re.MULTILINE)


class Replies:
    """Collects whole replies. ``rest`` holds the bytes after the last one."""

    def __init__(self) -> None:
        self.rest = b""

    def feed(self, data: bytes) -> bytes | None:
        """Return the next whole reply, or None until all of it has been received."""
        self.rest += data
        end = _LAST_LINE.search(self.rest)
        if end is None:
            if len(self.rest) <= REPLY_LIMIT:
                return None
            reply, self.rest = self.rest, b""
            return reply
        reply, self.rest = self.rest[: end.end()], self.rest[end.end() :]
        return reply
