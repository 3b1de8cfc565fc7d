"""Received bytes that are not processed yet: read as command lines, or all at once.

The limit of a line is here; the protocol replies to a line that is too long (``Protocol.next_event``).
"""

from __future__ import annotations

MAX_LINE_BYTES = 4096
"""Bytes of a command line, CRLF included; RFC 5321 §4.5.3.1.4 requires 512, and more with extensions."""
MAX_AUTH_LINE_BYTES = 12288
"""Bytes of an AUTH command and of its responses (RFC 4954 §4)."""


BEGINNING_BYTES = 16
"""Bytes at the beginning of a line that are enough to recognize another protocol."""


class LineTooLong(Exception):
    """A line was longer than allowed; only its ``beginning`` was kept."""

    def __init__(self, beginning: bytes) -> None:
        super().__init__(beginning)
        self.beginning = beginning


class Input:
    """Received bytes in order. Of a line that is too long only the beginning is kept, so it takes no memory."""

    __slots__ = ("_at", "_too_long", "data", "responses")

    def __init__(self) -> None:
        self.data = b""
        """Empty when all bytes were processed; else it may begin with some that were, up to ``_at``."""
        self._at = 0
        self._too_long = False  # of the incomplete line in ``data`` only the beginning was kept
        self.responses = False
        """Whether the next line is a response to AUTH's challenge, and may be as long as one."""

    def __len__(self) -> int:
        return len(self.data) - self._at

    def receive(self, data: bytes) -> None:
        self.data = self.data[self._at :] + data if self.data else data
        self._at = 0

    def line(self) -> bytes | None:
        """The next line, with its LF; None while it is incomplete. Raises LineTooLong when a long line has ended."""
        data, at = self.data, self._at
        end = data.find(b"\n", at) + 1
        if end == 0:
            if self._too_long or len(data) - at >= self._limit():
                self._too_long = True
                self.data, self._at = self.beginning(), 0
            return None
        too_long = self._too_long or (end - at > MAX_LINE_BYTES and end - at > self._limit())
        line = data[at:end]
        self.data, self._at = (data, end) if end < len(data) else (b"", 0)
        if too_long:
            self._too_long = False
            raise LineTooLong(line[:BEGINNING_BYTES])
        return line

    def _limit(self) -> int:
        return MAX_AUTH_LINE_BYTES if self.responses or self.beginning()[:5].upper() == b"AUTH " else MAX_LINE_BYTES

    def beginning(self) -> bytes:
        """The first bytes of the incomplete line."""
        return self.data[self._at : self._at + BEGINNING_BYTES]

    def take(self) -> bytes:
        """Return and remove all bytes."""
        data = self.data[self._at :] if self._at else self.data
        self.data, self._at = b"", 0
        return data
