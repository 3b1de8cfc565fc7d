"""Rejects a message that has passed too many servers, and so is in a loop (RFC 5321 §6.3): 554 5.4.6, for every target.

It counts the Received fields of the header section, as they arrive.
"""

from __future__ import annotations

from fumi_core.app import Fumi
from fumi_core.errors import SMTPError
from fumi_core.handlers.contexts import DataContext
from fumi_core.handlers.middleware import Next

MAX_HOPS = 50
"""Received fields a message may have; Postfix's hopcount_limit is the same."""

MAX_HEADER_BYTES = 256 * 1024
"""Bytes that are examined. Servers add their Received fields at the beginning, and fifty of them take about 25 KiB."""

_FIELD = b"\nreceived:"


class HopCounter:
    """Counts the Received fields of content that is fed in pieces of any length. Folded lines and the body do not count."""

    __slots__ = ("_ended", "_examined", "_tail", "count")

    def __init__(self) -> None:
        self.count = 0
        self._tail = b"\n"  # shorter than a field, so no field is counted twice
        self._ended = False
        self._examined = 0

    def feed(self, text: bytes) -> None:
        if self._ended:
            return
        self._examined += len(text)
        text = self._tail + text
        end = text.find(b"\n\r\n")
        self._ended = end >= 0 or self._examined > MAX_HEADER_BYTES
        if end >= 0:
            text = text[:end]
        self.count += text.lower().count(_FIELD)
        self._tail = text[1 - len(_FIELD) :]


def loop_limit(app: Fumi) -> None:
    def count(ctx: DataContext, next: Next) -> Next:
        hops = HopCounter()

        def look(piece: bytes) -> None:
            hops.feed(piece)
            if hops.count > MAX_HOPS:
                ctx.stream.refuse(SMTPError("5.4.6 Error: too many hops", 554))

        ctx.stream.tap(look)
        return next()

    app.on_data(count)
