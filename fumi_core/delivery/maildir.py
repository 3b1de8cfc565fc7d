"""``maildir:PATH``: one file a message (https://cr.yp.to/proto/maildir.html), safe before the client gets 250.

Safe means: written into tmp/, fsynced, linked into new/ under an unused name, and new/ fsynced. Before the link no reader sees
the file; after the last fsync it survives a power loss. ``maildir_files`` does all of this, in threads: in one job for a message
that fits into a batch. A delivery that fails or is cancelled leaves nothing in new/, however late it fails.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import pwd
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fumi_core.delivery.maildir_files import MaildirDirectory, MessageFile
from fumi_core.delivery.trace import Traced, trace_headers
from fumi_core.errors import MessageAborted, SMTPError
from fumi_core.handlers.contexts import DataContext
from fumi_core.handlers.middleware import Next
from fumi_core.runtime.logs import event
from fumi_core.server.observer import DeliveryResult
from fumi_core.smtp import replies

if TYPE_CHECKING:
    from fumi_core.app import Fumi

BATCH_BYTES = 64 * 1024
"""Bytes gathered before a thread writes them."""
THREADS = 16
"""Messages written at once; each thread mostly waits for fsync."""
WITHDRAW_TIMEOUT = 4.0
"""Seconds that a stop waits for deliveries that are being withdrawn; a master kills its workers after five."""
CLEAN_INTERVAL = 3600.0
"""Seconds between two searches for the remains of deliveries that were killed, while mail is delivered."""

_log = logging.getLogger("fumi.core")
_FULL = (errno.ENOSPC, errno.EDQUOT)
_STORE_ERROR = ("4.3.0 Mail store error", 451)
_NOT_KEPT = frozenset({"BINARYMIME", "DSN"})
"""Extensions that a file with LF line ends cannot keep: binary content would change, and no notifications would be sent."""


class Maildir:
    """A Maildir at ``path``, created with its tmp, new and cur when it is first used."""

    name = "maildir"

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.directory = MaildirDirectory(Path(path))
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="maildir")
        self._clean_at = 0.0
        self._withdrawals: set[Future[None]] = set()
        """Deliveries whose client was not sent 250, and which a thread still has to withdraw."""

    def __call__(self, app: Fumi) -> None:
        """Raises OSError when the directories cannot be created."""
        self.directory.create()
        observer = app.observer

        async def deliver(ctx: DataContext, next: Next) -> None:
            if time.monotonic() >= self._clean_at:
                self._clean()
            try:
                await self._deliver(ctx)
            except MessageAborted:
                raise
            except BaseException as error:
                observer.delivery(self.name, DeliveryResult.of(error))
                raise
            observer.delivery(self.name, DeliveryResult.OK)

        app.on_data(deliver)
        app.withhold(lambda: _NOT_KEPT)
        app.at_start(self._clean)
        app.at_close(self._wait_for_withdrawals)

    def dependency_problem(self) -> str | None:
        for name in ("tmp", "new"):
            if not os.access(self.directory.path / name, os.W_OK | os.X_OK):
                return f"cannot write to {self.directory.path / name}"
        return None

    def check(self) -> str | None:
        """Raises OSError when this user cannot write to the directory, or cannot create it if it does not exist."""
        user = f"user {_user()}"
        missing = [each for name in ("tmp", "new", "cur") if not (each := self.directory.path / name).exists()]
        if missing:
            above = next(each for each in missing[0].absolute().parents if each.exists())
            if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
                raise OSError(f"does not exist, and {user} cannot create it in {above}")
            return f"maildir:{self.directory.path} does not exist yet: {user} will create it"
        if problem := self.dependency_problem():
            raise OSError(f"{user}: {problem}")
        return None

    async def _deliver(self, ctx: DataContext) -> None:
        file = MessageFile(self.directory, ctx.session.id)
        try:
            await self._store(ctx, file)
        except (asyncio.CancelledError, GeneratorExit):
            self._withdraw(file)
            raise
        except BaseException:
            file.withdrawn = True
            if file.begun:
                with contextlib.suppress(RuntimeError):  # no new thread could be started: the job waits for an existing one
                    await asyncio.wrap_future(self._threads.submit(file.discard))
            raise
        ctx.accept(f"Ok: queued as {file.name}")

    async def _store(self, ctx: DataContext, file: MessageFile) -> None:
        traced = Traced(trace_headers(ctx.session))
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
        await self._in_thread(file, file.commit, batch)

    async def _in_thread(self, file: MessageFile, work: Callable[..., None], *arguments: Any) -> None:
        """Raises SMTPError, after a line in the log, when the disk or the system fails."""
        file.begun = True
        try:
            file.job = self._threads.submit(work, *arguments)
            await asyncio.wrap_future(file.job)
        except (OSError, RuntimeError) as error:
            # RuntimeError: the system has no more threads.
            problem = getattr(error, "strerror", None) or error
            event(_log, logging.ERROR, "cannot deliver", id=file.id, path=self.directory.path, error=problem)
            full = isinstance(error, OSError) and error.errno in _FULL
            raise SMTPError(*(replies.INSUFFICIENT_STORAGE if full else _STORE_ERROR)) from None

    def _withdraw(self, file: MessageFile) -> None:
        withdrawal = file.withdraw()
        if withdrawal is not None:
            self._withdrawals.add(withdrawal)
            withdrawal.add_done_callback(self._withdrawals.discard)

    def _wait_for_withdrawals(self) -> None:
        # If the message stayed in new/ it would be there twice, since its client sends it again.
        wait(self._withdrawals, WITHDRAW_TIMEOUT)

    def _clean(self) -> None:
        """Remove the remains of deliveries that were killed, in a thread."""
        self._clean_at = time.monotonic() + CLEAN_INTERVAL
        with contextlib.suppress(RuntimeError):  # no thread is available: try again next time
            self._threads.submit(self.directory.remove_stale)


def _user() -> str:
    """The name of the user that runs the program, or its number where it has no name, as in a container."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())
