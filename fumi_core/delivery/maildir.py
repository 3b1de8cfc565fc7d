"""``maildir:PATH``: one file a message (https://cr.yp.to/proto/maildir.html), safe before the client gets 250.

Safe means: written into tmp/, fsynced, linked into new/ under an unused name, and new/ fsynced. Before the link no reader sees
the file; after the last fsync it survives a power loss. ``maildir_files`` does all of this, in threads: in one job for a message
that fits into a batch. With variables in the path (``maildir_recipients``) each recipient has a Maildir.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import pwd
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from fumi_core.delivery.maildir_files import MaildirDirectory
from fumi_core.delivery.maildir_recipients import RecipientMaildirs, has_variables
from fumi_core.delivery.maildir_writer import STORE_ERROR, MaildirWriter
from fumi_core.errors import MessageAborted, SMTPError
from fumi_core.handlers.contexts import DataContext, RcptContext
from fumi_core.handlers.middleware import Next
from fumi_core.runtime.logs import event
from fumi_core.server.observer import DeliveryResult
from fumi_core.smtp import replies

if TYPE_CHECKING:
    from fumi_core.app import Fumi

CLEAN_INTERVAL = 3600.0
"""Seconds between two removals of files that killed deliveries have left, while mail is delivered."""
LOOKUP_THREADS = 2
"""Recipients looked up at once; not in the threads that write, which wait for the disk."""
LOOKUP_TIMEOUT = 30.0
"""Seconds until a recipient is deferred because the file system does not answer."""

_log = logging.getLogger("fumi.core")
_NOT_KEPT = frozenset({"BINARYMIME", "DSN"})
"""Extensions that a file with LF line ends cannot keep: binary content would change, and no notifications would be sent."""


def maildir_at(path: str, delimiter: str = "+") -> Maildir | MaildirForEach:
    """The target for this path. Raises ValueError for an unknown variable, or an invalid delimiter."""
    return MaildirForEach(path, delimiter) if has_variables(path) else Maildir(path)


class Maildir:
    """A Maildir at ``path``, created with its tmp, new and cur when it is first used."""

    name = "maildir"

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.directory = MaildirDirectory(Path(path))
        self._writer = MaildirWriter()
        self._clean_at = 0.0

    def __call__(self, app: Fumi) -> None:
        """Raises OSError when the directories cannot be created."""
        self.directory.create()
        observer = app.observer

        async def deliver(ctx: DataContext, next: Next) -> None:
            if time.monotonic() >= self._clean_at:
                self._clean()
            try:
                name = await self._writer.store(ctx, self.directory, ctx.session.envelope.rcpt_to)
            except MessageAborted:
                raise
            except BaseException as error:
                observer.delivery(self.name, DeliveryResult.of(error))
                raise
            ctx.accept(f"Ok: queued as {name}")
            observer.delivery(self.name, DeliveryResult.OK)

        app.on_data(deliver)
        app.withhold(lambda: _NOT_KEPT)
        app.at_start(self._clean)
        app.at_close(self._writer.wait_for_withdrawals)

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

    def _clean(self) -> None:
        """Remove the files that killed deliveries have left, in a thread."""
        self._clean_at = time.monotonic() + CLEAN_INTERVAL
        with contextlib.suppress(RuntimeError):  # no thread is available: try again next time
            self._writer.submit(self.directory.remove_stale)


class MaildirForEach:
    """A Maildir for each recipient, at a path with variables; recipients without a directory there are unknown."""

    name = "maildir"

    def __init__(self, path: str, delimiter: str = "+") -> None:
        """Raises ValueError for an unknown variable, or an invalid delimiter."""
        self._maildirs = RecipientMaildirs(path, delimiter)
        self._lookups = ThreadPoolExecutor(LOOKUP_THREADS, thread_name_prefix="maildir-lookup")
        self._writer = MaildirWriter()

    def __call__(self, app: Fumi) -> None:
        """Handlers of RCPT that are added later run first. Raises OSError when the path before the variables does not exist."""
        self.check()
        observer, apart = app.observer, app.options.lmtp

        async def rcpt(ctx: RcptContext, next: Next) -> None:
            await next()
            await self._look_up(ctx)

        async def deliver(ctx: DataContext, next: Next) -> None:
            try:
                failed = await self._deliver(ctx, apart)
            except MessageAborted:
                raise
            except BaseException as error:
                observer.delivery(self.name, DeliveryResult.of(error))
                raise
            observer.delivery(self.name, DeliveryResult.of(failed))

        app.on_rcpt_to(rcpt)
        app.on_data(deliver)
        app.withhold(lambda: _NOT_KEPT)
        app.at_close(self._writer.wait_for_withdrawals)

    def dependency_problem(self) -> str | None:
        return self._maildirs.problem()

    def check(self) -> str | None:
        """Raises OSError when the path up to the first variable does not exist."""
        if problem := self._maildirs.problem():
            raise OSError(problem)
        return None

    async def _look_up(self, ctx: RcptContext) -> None:
        recipient = ctx.address.address
        try:
            async with asyncio.timeout(LOOKUP_TIMEOUT):
                job = self._lookups.submit(self._maildirs.exists, recipient, ctx.session.name)
                exists = await asyncio.wrap_future(job)
        except (OSError, RuntimeError) as error:
            # RuntimeError: the system has no more threads.
            problem = "no answer in time" if isinstance(error, TimeoutError) else getattr(error, "strerror", None) or error
            event(_log, logging.ERROR, "cannot look up recipient", id=ctx.session.id, to=recipient, error=problem)
            raise SMTPError(*replies.LOOKUP_FAILED) from None
        if not exists:
            ctx.reject(*replies.USER_UNKNOWN)

    async def _deliver(self, ctx: DataContext, apart: bool) -> SMTPError | None:
        """Deliver to all recipients or, in LMTP, to as many as possible. Returns the error if there was no delivery."""
        copies = self._maildirs.of(ctx.session.envelope.rcpt_to, ctx.session.name)
        if not copies:
            raise SMTPError(*STORE_ERROR)  # a handler has changed the recipients after they were looked up
        errors: dict[int, SMTPError] = {}
        if len(copies) == 1:
            name = await self._writer.store(ctx, *copies[0])
        elif apart:
            name, errors = await self._writer.store_apart(ctx, copies)
        else:
            name = await self._writer.store_copies(ctx, copies)
        for number, error in errors.items():
            for each in copies[number][1]:
                try:
                    ctx.reject_recipient(each.address, error.message, error.code)
                except LookupError:
                    # A handler has added it, so no reply reports its failure. A second copy is better than none.
                    raise error from None
        ctx.accept(f"Ok: queued as {name}")
        return errors[0] if len(errors) == len(copies) else None


def _user() -> str:
    """The name of the user that runs the program, or its number where it has no name, as in a container."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())
