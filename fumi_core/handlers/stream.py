"""A message's content on its way from the socket to the handler: the socket is read no faster than the handler reads."""

from __future__ import annotations

import asyncio
import errno
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine
from email.message import EmailMessage
from email.policy import EmailPolicy
from typing import Any

from fumi_core.errors import MessageAborted, SMTPError
from fumi_core.handlers.spool import Spool
from fumi_core.smtp.replies import INSUFFICIENT_STORAGE

READ_ALREADY = "the message was read already: await ctx.spool() before reading it more than once"
DROPPED = "the rest of the message was dropped: a handler skipped it, or the handlers have ended"
HIGH_WATER_BYTES = 112 * 1024
"""When more bytes than this are queued for the handler, the socket is not read; one more read may already be in progress."""
HIGH_WATER_PIECES = 1024
"""The same for pieces: a piece of two bytes takes 56 bytes of memory."""


class MessageStream:
    """An async iterator of ``bytes``: dot-unstuffed, CRLF kept, the terminating dot left out.

    ``size`` counts the bytes received so far; ``size_exceeded`` tells that they are more than the ``size`` option allows: the
    content then ends early, and the server answers 552 whatever the handler decides. ``refusal`` is an error that becomes the
    reply whatever the handlers decide: the argument of ``refuse()``, or an exception from a function given to ``tap()``.
    """

    __slots__ = (
        "_aborted",
        "_buffered",
        "_discarding",
        "_ended",
        "_limit",
        "_listeners",
        "_lost",
        "_pieces",
        "_reader",
        "_resume",
        "_spool",
        "_waiter",
        "refusal",
        "size",
    )

    def __init__(self, limit: int | None, resume: Callable[[], None]) -> None:
        """``resume`` is called when the handler has taken all waiting content."""
        self.size = 0
        self.refusal: Exception | None = None
        self._limit = limit
        self._resume = resume
        self._pieces: deque[bytes] = deque()
        self._buffered = 0
        self._ended = False
        self._aborted: str | None = None
        self._discarding = False
        self._lost = False  # content was dropped that no handler had read
        self._reader: object | None = None  # the first reader; others must not read
        self._spool: Spool | None = None  # the whole message, for any number of readers
        self._waiter: asyncio.Future[None] | None = None
        self._listeners: tuple[Callable[[bytes], object], ...] = ()

    # The handler's side

    @property
    def size_exceeded(self) -> bool:
        """Whether more bytes have arrived, or were declared, than are allowed."""
        return self._limit is not None and self.size > self._limit

    def __aiter__(self) -> AsyncIterator[bytes]:
        """All pieces, from the first on. Raises RuntimeError when the stream was read already, unless the message was kept."""
        if self._spool is not None:
            return self._kept(self._spool)
        if self._reader is not None:
            raise RuntimeError(READ_ALREADY)
        return _Reading(self)

    async def __anext__(self) -> bytes:
        """The next piece, for a handler that reads piece by piece. Raises the same exceptions as reading all pieces."""
        try:
            return await self._next(self)
        except StopAsyncIteration:
            self._reader = READ_ALREADY
            raise

    async def _next(self, reader: object) -> bytes:
        """Raises MessageAborted when the rest will never arrive, and ``refusal`` if it is set.

        Raises RuntimeError when ``reader`` would not get the whole message: another reader has read part of it, or it was dropped
        after ``skip()`` or after the handlers had ended.
        """
        self._claim(reader)
        while not self._pieces:
            over = self._over
            if self._lost and not self.size_exceeded:
                raise RuntimeError(DROPPED)
            if over:
                raise StopAsyncIteration
            await self._more()
        piece = self._pieces.popleft()
        self._buffered -= len(piece)
        if not self._pieces:
            self._resume()
        return piece

    def _claim(self, reader: object) -> None:
        if self._reader is None:
            self._reader = reader
        elif self._reader is not reader:
            raise RuntimeError(READ_ALREADY)

    async def _kept(self, spool: Spool) -> AsyncIterator[bytes]:
        async for piece in spool.read():
            if self.refusal is not None:
                raise self.refusal
            yield piece
        await self._complete()

    async def _complete(self) -> None:
        """Return when the client has sent its whole message. What was kept has arrived; a ``Replacement`` may have to wait."""

    async def spool(self) -> None:
        """Keep the whole message: from now on it can be read any number of times, until the handlers have ended.

        Raises the same exceptions as reading, and SMTPError 452 when the disk is full.
        """
        if self._spool is not None:
            return
        spool = Spool()
        try:
            async for piece in self:
                await spool.write(piece)
            if self._discarding:
                raise RuntimeError(DROPPED)
        except OSError as error:
            spool.close()
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise SMTPError(*INSUFFICIENT_STORAGE) from error
            raise
        except BaseException:
            spool.close()
            raise
        self._spool = spool

    async def message(self, policy: EmailPolicy[EmailMessage]) -> EmailMessage:
        """Return the parsed message. Raises the same exceptions as ``spool()``."""
        await self.spool()
        await self._complete()
        assert self._spool is not None
        return await self._spool.parse(policy)

    async def read(self) -> bytes:
        """Return the whole message. Raises MessageAborted, ``refusal`` if it is set, and RuntimeError if it was read already."""
        return b"".join([piece async for piece in self])

    @property
    def _over(self) -> bool:
        if self.refusal is not None:
            raise self.refusal
        if self.size_exceeded:
            return True
        if self._aborted is not None:
            raise MessageAborted(self._aborted)
        return self._ended

    async def skip(self) -> None:
        """Drop unread content, and return when the message has arrived. Raises MessageAborted and ``refusal``."""
        if self._spool is None:
            self.discard()
            self._resume()  # the socket may be paused because of the content that was just dropped
        while not self._over:
            await self._more()

    async def _more(self) -> None:
        if self._waiter is not None:
            raise RuntimeError("another task is reading this message")
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def tap(self, listener: Callable[[bytes], object]) -> None:
        """Call ``listener`` with each piece as it arrives, waiting pieces first, whether or not the stream is read.

        When it raises, the message is not accepted: an SMTPError becomes the reply, any other exception leads to 451. Raises
        RuntimeError when part of the message was read, or dropped, already.
        """
        if self._reader is not None or self._lost or self._spool is not None:
            raise RuntimeError("tap() must be called before the message is read")
        for piece in self._pieces:
            listener(piece)
        if not self._ended:
            self._listeners += (listener,)

    def restrict(self, limit: int) -> None:
        """Lower the limit to ``limit`` bytes, if it is higher."""
        self._limit = limit if self._limit is None else min(limit, self._limit)

    def refuse(self, error: SMTPError) -> None:
        """Answer the message with this error, whatever the handlers decide; readers get it raised, and the content is dropped."""
        self._refuse(error)

    def _refuse(self, error: Exception) -> None:
        if self.refusal is None:
            self.refusal = error
        self.discard()
        self._wake()

    # The server's side

    @property
    def full(self) -> bool:
        """Whether reading the socket should pause."""
        return self._buffered > HIGH_WATER_BYTES or len(self._pieces) > HIGH_WATER_PIECES

    @property
    def has_text(self) -> bool:
        """Whether content waits to be read."""
        return bool(self._pieces)

    def feed(self, piece: bytes) -> None:
        """The next piece of the content, in the order of arrival."""
        self.size += len(piece)
        if self._listeners:
            self._call_listeners(piece)
        if self._discarding:
            self._lost = True
        elif self._limit is None or self.size <= self._limit:
            self._pieces.append(piece)
            self._buffered += len(piece)
        self._wake()

    def _call_listeners(self, piece: bytes) -> None:
        for listener in self._listeners:
            try:
                listener(piece)
            except KeyboardInterrupt:
                raise
            except BaseException as error:
                self._listeners = ()  # no listener may miss a piece and get a later one
                self._refuse(_exception(error))

    def exceed(self) -> None:
        """The client has declared more bytes than are allowed: treat them as received."""
        self._limit = -1
        self._wake()

    def end(self) -> None:
        """The content is complete."""
        self._ended = True
        self._listeners = ()  # they often refer to this stream: a cycle that only the garbage collector would break
        self._wake()

    def abort(self, reason: str) -> None:
        """The content will never be complete. What is queued for the handler is dropped."""
        if not self._ended:
            self._aborted = reason
            self._drop()
            self._wake()

    def discard(self) -> None:
        """The handler needs no more: drop waiting and future content."""
        self._discarding = True
        if self._pieces:
            self._lost = True
            self._drop()

    def release(self) -> None:
        """The handlers have ended: keep nothing for them any longer."""
        self.discard()
        if self._spool is not None:
            self._spool.close()

    def _drop(self) -> None:
        self._pieces.clear()
        self._buffered = 0

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class _Reading:
    """One reader's position in a stream, so that no other reader continues from there."""

    __slots__ = ("_stream",)

    def __init__(self, stream: MessageStream) -> None:
        self._stream = stream

    def __aiter__(self) -> _Reading:
        return self

    def __anext__(self) -> Coroutine[Any, Any, bytes]:
        return self._stream._next(self)


def _exception(error: BaseException) -> Exception:
    """The error as one that may be raised in any task: SystemExit would end the event loop."""
    if isinstance(error, Exception):
        return error
    failed = RuntimeError(f"a function of tap() raised {type(error).__name__}")
    failed.__cause__ = error
    return failed
