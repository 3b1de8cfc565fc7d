"""What follows DATA and BDAT (RFC 5321 §4.1.1.4, RFC 3030 §2): a message in one piece or in chunks, sans-IO.

data.py decides where a message ends; this module chooses the reader, and returns the bytes after the end to the input.
"""

from __future__ import annotations

from enum import Enum

from fumi_core.smtp.data import ChunkReader, DotReader, SkippedChunk
from fumi_core.smtp.lines import Input
from fumi_core.smtp.options import Options
from fumi_core.smtp.replies import Reply


class Arrival(Enum):
    """What the next bytes are when they are not a command."""

    DATA = "data"
    """A whole message, up to the terminating dot."""
    CHUNK = "chunk"
    """A chunk of a message."""
    EXCESS_CHUNK = "excess chunk"
    """A chunk that makes the message too large, which is not reported yet. It is dropped."""
    STRAY_CHUNK = "stray chunk"
    """A chunk without a transaction. It is dropped, and then answered with ``refusals``."""
    COMPLETE = "complete"
    """Nothing: all of the message or chunk was read. Its end is not reported yet; then ``arrival`` becomes None."""


# Names of their own: Python takes five times as long to look up an enum's member.
DATA, CHUNK, EXCESS_CHUNK, STRAY_CHUNK, COMPLETE = Arrival


class MessageReader:
    """The message that is arriving from ``input``; reused for the next one after ``reset()``."""

    __slots__ = ("_chunks", "_input", "_options", "_reader", "_size", "arrival", "refusals")

    def __init__(self, input: Input, options: Options) -> None:
        self.arrival: Arrival | None = None
        """What is arriving; None when the next bytes are a command."""
        self.refusals: tuple[Reply, ...] = ()
        """The replies to a chunk without a transaction, sent after it."""
        self._input = input
        self._options = options
        self._reader: DotReader | ChunkReader | SkippedChunk
        self._chunks: ChunkReader | None = None
        self._size = 0

    def begin(self) -> None:
        """A whole message follows."""
        self._reader = DotReader(self._options.bare_newlines)
        self.arrival = DATA

    def begin_chunk(self, size: int, last: bool, binary: bool) -> bool:
        """A chunk of ``size`` bytes follows; it is dropped if it makes the message too large.

        Returns whether it is the message's first.
        """
        first = self._chunks is None
        if self._chunks is None:
            self._chunks = ChunkReader("keep" if binary else self._options.bare_newlines)
        self._size += size
        if self._options.size is not None and self._size > self._options.size:
            self._reader = SkippedChunk(size)
            self.arrival = EXCESS_CHUNK
        else:
            self._chunks.begin(size, last)
            self._reader = self._chunks
            self.arrival = CHUNK
        return first

    @property
    def chunked(self) -> bool:
        """Whether the message arrives by BDAT."""
        return self._chunks is not None

    def drop_chunk(self, size: int, refusals: tuple[Reply, ...]) -> None:
        """A chunk follows without a transaction: a client may send it before it reads the reply (RFC 3030 §2)."""
        self._reader = SkippedChunk(size)
        self.refusals = refusals
        self.arrival = STRAY_CHUNK

    def read(self) -> bytes:
        """Return the content that has arrived. At the end of the message or chunk ``arrival`` becomes COMPLETE.

        Raises BareNewline where bare newlines are rejected.
        """
        reader = self._reader
        text = reader.feed(self._input.take())
        if reader.rest is not None:
            self._input.receive(reader.rest)
            self.arrival = COMPLETE
        return text

    def reset(self) -> None:
        """The message has ended, or was aborted. A chunk that is being dropped is still read to its end."""
        self._chunks = None
        self._size = 0
