"""An SMTP server's replies: parses lines into replies (RFC 5321 §4.2), sans-IO, and the extensions in EHLO's (§4.1.1.1).

A server is trusted no more than a client: lines and replies have a maximum length, and input that is not a reply is an error at
once, whether or not its line ever ends.
"""

from __future__ import annotations

import re
from typing import NamedTuple

MAX_LINE_BYTES = 2048
"""Bytes of a line, its end included. RFC 5321 §4.5.3.1.5 requires 512; some servers put a whole policy into one line."""
MAX_REPLY_BYTES = 16 * 1024
"""Bytes of all the lines of one reply."""

# Reply-line = Reply-code [ SP / "-" textstring ]; a code's first digit is 2 to 5 (§4.2.1).
_LINE = re.compile(rb"([2-5][0-9]{2})(?:([ -])(.*))?", re.DOTALL)
STATUS = re.compile(r"([245]\.\d{1,3}\.\d{1,3}) ")
"""An enhanced status code and the space after it, at the beginning of a text (RFC 2034 §4)."""


class Malformed(Exception):
    """The input is not a reply, or is too long."""


class ReceivedReply(NamedTuple):
    """One reply: its code, and the text of its lines without code and line end. Bytes beyond ASCII became U+FFFD."""

    code: int
    lines: tuple[str, ...]

    @property
    def positive(self) -> bool:
        """Whether the code is 2yz or 3yz."""
        return self.code < 400

    @property
    def text(self) -> str:
        """The lines; an enhanced status code that is repeated in each (RFC 2034 §4) appears once, at the beginning."""
        status = STATUS.match(self.lines[0])
        rest = [line.removeprefix(status[0]) for line in self.lines[1:]] if status else self.lines[1:]
        return "\n".join([self.lines[0], *rest])

    @property
    def extensions(self) -> dict[str, str]:
        """The extensions in this reply to EHLO: keywords, in capitals, and their parameters."""
        words = [line.partition(" ") for line in self.lines[1:]]
        return {keyword.upper(): parameters for keyword, _, parameters in words}

    def __str__(self) -> str:
        return f"{self.code} {' / '.join(self.lines)}"


class ReplyReader:
    """Parses replies from bytes, in pieces of any length."""

    def __init__(self) -> None:
        self._rest = b""
        self._code: bytes | None = None  # of the reply whose last line has not arrived
        self._lines: list[str] = []
        self._size = 0

    def feed(self, data: bytes) -> list[ReceivedReply]:
        """Return the replies that ``data`` completes. Raises Malformed; do not call it after that."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > MAX_LINE_BYTES:
            raise Malformed(f"a line of more than {MAX_LINE_BYTES} bytes")
        return [reply for line in lines if (reply := self._line(line)) is not None]

    def _line(self, line: bytes) -> ReceivedReply | None:
        match = _LINE.fullmatch(line.removesuffix(b"\r"))
        if match is None or self._code not in (None, match[1]):
            raise Malformed(f"malformed reply line {line[:80]!r}")
        self._size += len(line) + 1
        if len(line) >= MAX_LINE_BYTES:
            raise Malformed(f"a line of more than {MAX_LINE_BYTES} bytes")
        if self._size > MAX_REPLY_BYTES:
            raise Malformed(f"a reply of more than {MAX_REPLY_BYTES} bytes")
        self._lines.append((match[3] or b"").decode("ascii", "replace"))
        if match[2] == b"-":
            self._code = match[1]
            return None
        reply = ReceivedReply(int(match[1]), tuple(self._lines))
        self._code, self._lines, self._size = None, [], 0
        return reply
