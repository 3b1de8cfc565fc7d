"""The message with which a handler replaces the client's: bytes, or the pieces that an async iterator yields."""

from __future__ import annotations

from collections.abc import AsyncIterable, Callable

from fumi_core.handlers.spool import Spool
from fumi_core.handlers.stream import DROPPED, MessageStream
from fumi_core.smtp.data import ChunkReader


class Replacement(MessageStream):
    """Read like the client's message. Its line ends become CRLF, unless it is ``binary``.

    It ends only when the client has sent all of its own message, so that no message is delivered that the client aborts. The
    ``size`` option limits what clients send; ``restrict()`` also limits this content.
    """

    __slots__ = ("_finished", "_original", "_reader_of_lines", "_released", "_source")

    def __init__(self, original: MessageStream, text: bytes | AsyncIterable[bytes], binary: bool) -> None:
        """Raises TypeError if ``text`` is neither bytes nor asynchronously iterable."""
        super().__init__(None, _nothing)
        self._original = original
        self._finished = False
        self._released = False
        self._reader_of_lines = ChunkReader("keep" if binary else "normalize")
        if isinstance(text, bytes | bytearray | memoryview):
            whole = self._lines(bytes(text)) + self._last_lines()
            self._spool = Spool.of(whole)
            self.size = len(whole)
        elif isinstance(text, AsyncIterable):
            self._source = aiter(text)
        else:
            raise TypeError(f"ctx.replace() takes bytes or an async iterator of bytes, not {type(text).__name__}")

    @property
    def size_exceeded(self) -> bool:
        return super().size_exceeded or self._original.size_exceeded

    async def _next(self, reader: object) -> bytes:
        self._claim(reader)
        while not self._finished:
            if self.refusal is not None:
                raise self.refusal
            if self._released or self._discarding:
                raise RuntimeError(DROPPED)
            if self.size_exceeded:
                break
            text = await self._more_text()
            if text:
                self.size += len(text)
                self._call_listeners(text)
                return text
        raise StopAsyncIteration

    async def _more_text(self) -> bytes:
        try:
            piece = await anext(self._source)
        except StopAsyncIteration:
            await self._complete()
            self._finished = True
            return self._last_lines()
        if not isinstance(piece, bytes):
            raise TypeError(f"the iterator given to ctx.replace() yields bytes, not {type(piece).__name__}")
        return self._lines(piece)

    def _lines(self, text: bytes) -> bytes:
        self._reader_of_lines.begin(len(text), False)
        return self._reader_of_lines.feed(text)

    def _last_lines(self) -> bytes:
        self._reader_of_lines.begin(0, True)
        return self._reader_of_lines.feed(b"")

    async def _complete(self) -> None:
        await self._original.skip()

    async def skip(self) -> None:
        """The same as for the client's message; returns when that has arrived."""
        if self._spool is None:
            self.discard()
        await self._original.skip()

    def tap(self, listener: Callable[[bytes], object]) -> None:
        """Call ``listener`` with each piece that is read. Raises the same exceptions as for the client's message."""
        if self._spool is not None and self._reader is None:
            listener(self._spool.in_memory)
        else:
            super().tap(listener)

    def _refuse(self, error: Exception) -> None:
        super()._refuse(error)
        self._original._refuse(error)

    def release(self) -> None:
        self._released = True
        super().release()
        self._original.release()


def _nothing() -> None:
    """No socket is read for content that a handler supplies."""
