"""A whole message, kept until its end is known: 256 KiB in memory, anything longer in an unlinked temporary file.

The file is read and written in threads, so that a slow disk does not delay other connections. Errors of the disk are raised as
they are: ``MessageStream.spool()`` makes a full one an SMTPError 452.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator, Callable
from email.message import EmailMessage
from email.parser import BytesFeedParser
from email.policy import EmailPolicy
from functools import partial
from pathlib import Path
from typing import IO, TypeVar, cast

from fumi_core.runtime.daemon_thread import run_in_daemon_thread

T = TypeVar("T")
MEMORY_BYTES = 256 * 1024
"""Bytes of a message that are kept in memory, and bytes read from the file at once."""
SMALL_BYTES = 4 * 1024
"""Bytes up to which later data is added to a piece: a client that sends two bytes at a time must not fill memory with objects,
nor give a reader a hundred thousand pieces."""


class Spool:
    """Written once, then read any number of times. ``size`` is in bytes. ``close()`` frees memory and disk."""

    def __init__(self, directory: str | os.PathLike[str] | None = None) -> None:
        """``directory`` is where the temporary file goes; None is the system's default."""
        self.size = 0
        self._directory = None if directory is None else Path(directory)
        self._pieces: list[bytes] = []  # not yet in the file
        self._waiting = 0  # bytes in ``_pieces``
        self._file: IO[bytes] | None = None
        self._jobs = 0  # threads that are using the file
        self._closed = False

    @classmethod
    def of(cls, text: bytes) -> Spool:
        """A spool of content that is in memory already, and stays there."""
        spool = cls()
        spool._pieces, spool._waiting, spool.size = [text], len(text), len(text)
        return spool

    async def write(self, piece: bytes) -> None:
        """Append a piece. Raises OSError when the disk is full."""
        if self._pieces and len(self._pieces[-1]) + len(piece) <= SMALL_BYTES:
            self._pieces[-1] += piece
        else:
            self._pieces.append(piece)
        self._waiting += len(piece)
        self.size += len(piece)
        if self._waiting > MEMORY_BYTES:
            pieces, self._pieces, self._waiting = self._pieces, [], 0
            await self._in_thread(lambda: self._append(b"".join(pieces)))

    def _append(self, data: bytes) -> None:
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self._directory, buffering=0)  # noqa: SIM115 (closed by close())
        view = memoryview(data)
        while view:
            view = view[self._file.write(view) :]

    async def read(self) -> AsyncIterator[bytes]:
        """The pieces, from the beginning. Raises OSError when they cannot be read, RuntimeError after ``close()``."""
        self._check_open()
        pieces, end, at = self._pieces, self.size - self._waiting, 0
        while at < end:
            self._check_open()
            piece = await self._in_thread(partial(self._block, at, end))
            at += len(piece)
            yield piece
        for piece in pieces:
            self._check_open()
            yield piece

    @property
    def in_memory(self) -> bytes:
        """The part that is not in the file."""
        return b"".join(self._pieces)

    async def parse(self, policy: EmailPolicy[EmailMessage]) -> EmailMessage:
        """The message (RFC 5322), parsed in a thread. Raises as ``read()`` does."""
        self._check_open()
        pieces = self._pieces
        return await self._in_thread(lambda: self._parse(policy, pieces))

    def _parse(self, policy: EmailPolicy[EmailMessage], pieces: list[bytes]) -> EmailMessage:
        parser = BytesFeedParser(policy=policy)
        end, at = self.size - self._waiting, 0
        while at < end:
            piece = self._block(at, end)
            parser.feed(piece)
            at += len(piece)
        for piece in pieces:
            parser.feed(piece)
        return cast(EmailMessage, parser.close())

    def _block(self, at: int, end: int) -> bytes:
        assert self._file is not None
        block = os.pread(self._file.fileno(), min(MEMORY_BYTES, end - at), at)
        if not block:
            raise OSError("the temporary file of a message is shorter than the message")
        return block

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("the message is no longer available: its handlers have ended")

    async def _in_thread(self, job: Callable[[], T]) -> T:
        """Run ``job`` in a thread, which uses the file until it returns, even if the caller is cancelled."""
        loop = asyncio.get_running_loop()

        def run() -> T:
            try:
                return job()
            finally:
                loop.call_soon_threadsafe(self._job_done)

        self._jobs += 1
        return await run_in_daemon_thread(run)

    def _job_done(self) -> None:
        self._jobs -= 1
        if self._closed:
            self.close()

    def close(self) -> None:
        """If a thread is using the file, the file is closed when it has finished."""
        self._closed = True
        self._pieces = []
        if self._file is not None and not self._jobs:
            self._file.close()
            self._file = None
