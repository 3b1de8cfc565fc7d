"""Writes messages into Maildirs, in threads: one as it arrives, or the same to several recipients.

A delivery that fails or is cancelled, at whatever time, leaves nothing in new/.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

from fumi_core.delivery.maildir_files import MaildirDirectory, MessageFile
from fumi_core.delivery.trace import Traced, trace_headers
from fumi_core.errors import SMTPError
from fumi_core.handlers.contexts import DataContext
from fumi_core.runtime.logs import event
from fumi_core.smtp import replies
from fumi_core.smtp.grammar import Address

T = TypeVar("T")
BATCH_BYTES = 64 * 1024
"""Bytes gathered before a thread writes them."""
THREADS = 16
"""Messages written at once; each thread mostly waits for fsync."""
COPIES_AT_ONCE = 4
"""Copies of one message written at once, each with an open file."""
WITHDRAW_TIMEOUT = 4.0
"""Seconds that a stop waits for deliveries that are being withdrawn. A master kills its workers after five seconds."""

_log = logging.getLogger("fumi.core")
_FULL = (errno.ENOSPC, errno.EDQUOT)
STORE_ERROR = ("4.3.0 Mail store error", 451)

Recipients = Sequence[Address]


class MaildirWriter:
    """Threads that write, and the deliveries that they still have to withdraw because the client was not sent 250."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="maildir")
        self._withdrawals: set[Future[None]] = set()

    def submit(self, work: Callable[..., T], *arguments: Any) -> Future[T]:
        """Raises RuntimeError when the system has no more threads; the job then waits for an existing one."""
        return self._threads.submit(work, *arguments)

    def wait_for_withdrawals(self) -> None:
        """Wait until withdrawn files are removed: the client sends the message again, and a file left in new/ would be a copy."""
        wait(self._withdrawals, WITHDRAW_TIMEOUT)

    async def store(self, ctx: DataContext, directory: MaildirDirectory, recipients: Recipients) -> str:
        """Store a message as it arrives; return its name. Raises SMTPError and what reading raises."""
        file = MessageFile(directory, ctx.session.id)

        async def write() -> None:
            rest = await self._write(ctx, file, recipients)
            await self._in_thread(file, file.commit, rest)

        await self._withdraw_if_it_fails([file], write())
        return file.name

    async def store_copies(self, ctx: DataContext, copies: Sequence[tuple[MaildirDirectory, Recipients]]) -> str:
        """Store the same message in several Maildirs, in all of them or in none; return the name of the first file.

        All copies are complete and on disk before the first one is visible. Raises SMTPError and what reading raises.
        """
        files, errors = await self._stored(ctx, copies, apart=False)
        assert not errors
        return files[0].name

    async def store_apart(
        self, ctx: DataContext, copies: Sequence[tuple[MaildirDirectory, Recipients]]
    ) -> tuple[str, dict[int, SMTPError]]:
        """The same, for LMTP: a Maildir that fails does not affect the others. Also returns the errors, by the copy's number."""
        files, errors = await self._stored(ctx, copies, apart=True)
        return next((file.name for number, file in enumerate(files) if number not in errors), ""), errors

    async def _stored(
        self, ctx: DataContext, copies: Sequence[tuple[MaildirDirectory, Recipients]], *, apart: bool
    ) -> tuple[list[MessageFile], dict[int, SMTPError]]:
        await ctx.spool()
        if ctx.size_exceeded:
            ctx.reject(*replies.TOO_LARGE)
        files = [MessageFile(directory, ctx.session.id) for directory, _ in copies]
        errors: dict[int, SMTPError] = {}
        turn = asyncio.Semaphore(COPIES_AT_ONCE)

        async def prepare(number: int) -> None:
            async with turn:
                rest = await self._write(ctx, files[number], copies[number][1])
                await self._in_thread(files[number], files[number].prepare, rest)

        async def publish(number: int) -> None:
            async with turn:
                await self._in_thread(files[number], files[number].publish)

        async def write() -> None:
            for step in (prepare, publish):
                left = [number for number in range(len(files)) if number not in errors]
                results = await asyncio.gather(*map(step, left), return_exceptions=True)
                for number, error in zip(left, results, strict=True):
                    if apart and isinstance(error, SMTPError):
                        errors[number] = error
                        await self._discard(files[number])
                    elif error is not None:
                        raise error

        await self._withdraw_if_it_fails(files, write())
        return files, errors

    async def _write(self, ctx: DataContext, file: MessageFile, recipients: Recipients) -> list[bytes]:
        """Write all of the message except its last part, which is returned."""
        traced = Traced(trace_headers(ctx.session, recipients))
        batch: list[bytes] = []
        size = 0
        async for piece in ctx.stream:
            batch.append(traced.feed(piece))
            size += len(piece)
            if size >= BATCH_BYTES:
                await self._in_thread(file, file.write, batch)
                batch, size = [], 0
        if ctx.size_exceeded:
            ctx.reject(*replies.TOO_LARGE)
        batch.append(traced.end())
        return batch

    async def _withdraw_if_it_fails(self, files: Sequence[MessageFile], work: Awaitable[None]) -> None:
        try:
            await work
        except (asyncio.CancelledError, GeneratorExit):
            for file in files:
                self._withdraw(file)
            raise
        except BaseException:
            for file in files:
                await self._discard(file)
            raise

    async def _discard(self, file: MessageFile) -> None:
        file.withdrawn = True
        if file.begun:
            with contextlib.suppress(RuntimeError):  # no new thread could be started: the job waits for an existing one
                await asyncio.wrap_future(self.submit(file.discard))

    def _withdraw(self, file: MessageFile) -> None:
        withdrawal = file.withdraw()
        if withdrawal is not None:
            self._withdrawals.add(withdrawal)
            withdrawal.add_done_callback(self._withdrawals.discard)

    async def _in_thread(self, file: MessageFile, work: Callable[..., None], *arguments: Any) -> None:
        """Raises SMTPError, after a line in the log, when the disk or the system fails."""
        file.begun = True
        try:
            file.job = self.submit(work, *arguments)
            await asyncio.wrap_future(file.job)
        except (OSError, RuntimeError) as error:
            # RuntimeError: the system has no more threads.
            problem = getattr(error, "strerror", None) or error
            event(_log, logging.ERROR, "cannot deliver", id=file.id, path=file.directory.path, error=problem)
            full = isinstance(error, OSError) and error.errno in _FULL
            raise SMTPError(*(replies.INSUFFICIENT_STORAGE if full else STORE_ERROR)) from None
