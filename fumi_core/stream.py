"""A message's text on its way from the socket to the handler, with back-pressure both ways of looking at it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from fumi_core.errors import MessageAborted, SMTPError

HIGH_WATER = 64 * 1024
"""Octets waiting for the handler beyond which the socket is not read; one read more may already be on its way."""


class MessageStream:
    """An async iterator of ``bytes``: dot-unstuffed, CRLF kept, the terminating dot left out.

    ``size`` counts the octets received so far; ``size_exceeded`` tells that they are more than the ``size`` option allows:
    the text then ends early, and the server answers 552 whatever the handler says. ``refusal`` is what the message is answered
    with, whatever the handlers say: what ``refuse()`` was given, or what a function of ``tap()`` raised.
    """

    __slots__ = (
        "_aborted",
        "_buffered",
        "_discarding",
        "_ended",
        "_limit",
        "_listeners",
        "_pieces",
        "_resume",
        "_waiter",
        "refusal",
        "size",
    )

    def __init__(self, limit: int | None, resume: Callable[[], None]) -> None:
        """``resume`` is called when the handler has taken all there was."""
        self.size = 0
        self.refusal: Exception | None = None
        self._limit = limit
        self._resume = resume
        self._pieces: deque[bytes] = deque()
        self._buffered = 0
        self._ended = False
        self._aborted: str | None = None
        self._discarding = False
        self._waiter: asyncio.Future[None] | None = None
        self._listeners: tuple[Callable[[bytes], object], ...] = ()

    # The handler's side

    @property
    def size_exceeded(self) -> bool:
        return self._limit is not None and self.size > self._limit

    def __aiter__(self) -> MessageStream:
        return self

    async def __anext__(self) -> bytes:
        """Raises MessageAborted when the rest will never come, and ``refusal`` when there is one."""
        while not self._pieces:
            if self._over:
                raise StopAsyncIteration
            await self._more()
        piece = self._pieces.popleft()
        self._buffered -= len(piece)
        if not self._pieces:
            self._resume()
        return piece

    async def read(self) -> bytes:
        """The whole rest of the message. Raises as ``__anext__`` does."""
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
        """Let the whole rest go by, and return when the message is whole. Raises as reading does."""
        self.discard()
        while not self._over:
            await self._more()

    async def _more(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def tap(self, listener: Callable[[bytes], object]) -> None:
        """Call ``listener`` with each piece as it arrives, those that wait here first, whoever reads the stream.

        When it raises, the message is not accepted: an SMTPError is its reply, any other exception leads to 451.
        """
        for piece in self._pieces:
            listener(piece)
        self._listeners += (listener,)

    def restrict(self, limit: int) -> None:
        """Allow at most ``limit`` octets from here on, if that is less than is allowed already."""
        self._limit = limit if self._limit is None else min(limit, self._limit)

    def refuse(self, error: SMTPError) -> None:
        """Answer the message with this, whatever else the handlers say; who reads it gets it raised, and the text is dropped."""
        self._refuse(error)

    def _refuse(self, error: Exception) -> None:
        if self.refusal is None:
            self.refusal = error
        self.discard()
        self._wake()

    # The server's side

    @property
    def full(self) -> bool:
        """Whether the socket should rest."""
        return self._buffered > HIGH_WATER

    @property
    def has_text(self) -> bool:
        return bool(self._pieces)

    def feed(self, piece: bytes) -> None:
        self.size += len(piece)
        for listener in self._listeners:
            try:
                listener(piece)
            except KeyboardInterrupt:
                raise
            except BaseException as error:
                self._listeners = ()  # no function gets a message with a hole in it
                self._refuse(_exception(error))
        if not self._discarding and not self.size_exceeded:
            self._pieces.append(piece)
            self._buffered += len(piece)
        self._wake()

    def exceed(self) -> None:
        """The client has declared more octets than are allowed: as if they had arrived."""
        self._limit = -1
        self._wake()

    def end(self) -> None:
        self._ended = True
        self._wake()

    def abort(self, reason: str) -> None:
        """The text will never be whole. What arrived so far is dropped too."""
        if not self._ended:
            self._aborted = reason
            self._drop()
            self._wake()

    def discard(self) -> None:
        """The handler is done with it: drop what there is and what comes."""
        self._discarding = True
        self._drop()

    def _drop(self) -> None:
        self._pieces.clear()
        self._buffered = 0

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def _exception(error: BaseException) -> Exception:
    """The error as one that may be raised in any task: SystemExit would end the event loop there."""
    if isinstance(error, Exception):
        return error
    failed = RuntimeError(f"a function of tap() raised {type(error).__name__}")
    failed.__cause__ = error
    return failed
