"""Where a message ends: the one place that decides it (RFC 5321 §4.1.1.4 and §4.5.2).

Only <CRLF>.<CRLF> ends a message. A line feed without its carriage return, or the other way round, never does: if one server
takes it for the end and the next does not, a second message can be smuggled inside the first. Such a byte is either rejected
(``reject``) or made a line end of the message (``normalize``).

The work is done by searches and replacements over whole reads, in place of a loop over the lines: ``DotReader`` alone takes
1.7 ms of CPU for 5 MB, and the loop 16.7 ms (Python 3.11.2; bench row core-large, where the whole costs 5.3 ms). Go back to
lines if they ever cost about the same: they are easier to read.
"""

from __future__ import annotations

import re
from io import IncrementalNewlineDecoder

END = b"\r\n.\r\n"
_BARE = re.compile(rb"\r\n|\r|\n")


class BareNewline(Exception):
    """A CR or LF that is not part of a CRLF, where these are rejected."""


class DotReader:
    """Takes the bytes after DATA as they arrive, returns the message content: dot-unstuffed, with CRLF, without the final dot.

    A piece never ends between a CR and its LF, so each can be judged by itself.
    """

    __slots__ = ("_held", "_normalize", "_virtual", "rest")

    def __init__(self, bare_newlines: str) -> None:
        """``bare_newlines`` is ``reject`` or ``normalize``."""
        self._normalize = bare_newlines == "normalize"
        # Bytes kept because the next ones decide what they are. The first line of a message begins as if after a CRLF: that CRLF
        # is virtual, and dropped from the first piece.
        self._held = b"\r\n"
        self._virtual = 2
        self.rest: bytes | None = None
        """What followed the end of the message; None until the end was seen."""

    def feed(self, data: bytes) -> bytes:
        """Return the content in ``data``. Raises BareNewline where bare newlines are rejected. Do not call it after the end."""
        buffer = self._held + data if self._held else data
        # A large attachment in base64 has no dots, and searching for one byte costs a twentieth of searching for three.
        first = buffer.find(b".")
        dot = buffer.find(b"\r\n.", max(first - 2, 0)) if first >= 0 else -1
        end = buffer.find(END, dot) if dot >= 0 else -1
        if end < 0:
            stop = len(buffer) - _undecided(buffer)
            self._held = buffer[stop:]
        else:
            stop = end + 2
            self.rest = buffer[end + 5 :]
        if stop == 0:
            return b""
        text = self._text(buffer[:stop], stuffed=dot not in (-1, end))
        if self._virtual:
            text = text[self._virtual :]
            self._virtual = 0
        return text

    def _text(self, text: bytes, stuffed: bool) -> bytes:
        bare = _has_bare_newlines(text)
        if bare and not self._normalize:
            raise BareNewline
        if stuffed:
            text = text.replace(b"\r\n.", b"\r\n")
        return _BARE.sub(b"\r\n", text) if bare else text


class ChunkReader:
    """Counts out the chunks of BDAT (RFC 3030 §2); their content follows the same rules, unless it is declared binary.

    A chunk may end between a CR and its LF; the CR then waits for the next chunk.
    """

    __slots__ = ("_bare_newlines", "_held", "_last", "_left", "rest")

    def __init__(self, bare_newlines: str) -> None:
        """``bare_newlines`` is ``reject``, ``normalize``, or ``keep`` for BODY=BINARYMIME."""
        self._bare_newlines = bare_newlines
        self._held = b""
        self._left = 0
        self._last = False
        self.rest: bytes | None = None
        """What followed the end of the chunk; None until the end was seen."""

    def begin(self, size: int, last: bool) -> None:
        """A chunk of ``size`` bytes follows; ``last`` tells that it is the message's last."""
        self._left, self._last, self.rest = size, last, None

    def feed(self, data: bytes) -> bytes:
        """Return the content in ``data``. Raises BareNewline where bare newlines are rejected."""
        chunk = data[: self._left]
        self._left -= len(chunk)
        if self._left == 0:
            self.rest = data[len(chunk) :]
        if self._bare_newlines == "keep":
            return chunk
        text, self._held = self._held + chunk, b""
        if text.endswith(b"\r") and not (self._last and self._left == 0):
            text, self._held = text[:-1], b"\r"
        if not _has_bare_newlines(text):
            return text
        if self._bare_newlines == "reject":
            raise BareNewline
        return _BARE.sub(b"\r\n", text)


class SkippedChunk:
    """Counts out a chunk that is dropped, and keeps nothing of it."""

    __slots__ = ("_left", "rest")

    def __init__(self, size: int) -> None:
        self._left = size
        self.rest: bytes | None = None
        """What followed the end of the chunk; None until the end was seen."""

    def feed(self, data: bytes) -> bytes:
        """Return no content."""
        if len(data) >= self._left:
            self.rest = data[self._left :]
        self._left -= min(self._left, len(data))
        return b""


class DotWriter:
    """The reverse: stuffs the dots of content that is sent to a server, and adds the end (RFC 5321 §4.5.2)."""

    __slots__ = ("_last",)

    def __init__(self) -> None:
        self._last = b"\r\n"  # the last two bytes sent

    def feed(self, text: bytes) -> bytes:
        """Return what to send for ``text``, which may be any part of the content. Its line ends are CRLF."""
        known = self._last + text
        self._last = known[-2:]
        return known.replace(b"\r\n.", b"\r\n..")[2:]

    def end(self) -> bytes:
        """Return the terminating dot, after a CRLF if the content does not end with one."""
        return END[2:] if self._last == b"\r\n" else END


def _has_bare_newlines(text: bytes) -> bool:
    """Whether the text holds a CR or LF outside a CRLF.

    The universal newlines of ``io`` take 37 µs for 128 KiB. Removing all CRLF and searching for what is left takes 53 to 195 µs,
    depending on how Python was built, and counting takes 160 to 225 (bench row core-large).
    """
    kinds = IncrementalNewlineDecoder(None, translate=False)
    kinds.decode(str(text, "latin-1"), final=True)  # without a decoder it takes text
    return kinds.newlines not in (None, "\r\n")


def _undecided(buffer: bytes) -> int:
    """How many of the last bytes may begin the end (or a CRLF), and have to wait for the next bytes."""
    for length in (4, 3, 2, 1):
        if buffer.endswith(END[:length]):
            return length
    return 0
