"""``maildir:PATH``: one file a message (https://cr.yp.to/proto/maildir.html), safe before the client hears 250.

Safe means: written into tmp/, fsynced, renamed into new/, and new/ fsynced. Before the rename nobody sees the file; after the
last fsync no power loss takes it. All of it happens in threads, in one job for a message that fits into a batch.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import logging
import os
import pwd
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fumi_core.contexts import DataContext
from fumi_core.delivery.trace import Traced, trace_headers
from fumi_core.errors import SMTPError
from fumi_core.middleware import Next
from fumi_core.runtime.logs import event

if TYPE_CHECKING:
    from fumi_core.app import Fumi

BATCH = 64 * 1024
"""Octets gathered before a thread is asked to write them."""
THREADS = 16
"""Messages on their way to the disk at once; each mostly waits for fsync."""

_log = logging.getLogger("fumi.core")
_FULL = (errno.ENOSPC, errno.EDQUOT)
_NOT_KEPT = frozenset({"BINARYMIME", "DSN"})
"""Extensions that a file with LF line ends cannot keep: binary content would change, and nobody would send the notifications."""


class Maildir:
    """A Maildir at ``path``, made with its tmp, new and cur when it is first used."""

    name = "maildir"

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="maildir")
        self._count = itertools.count(1)
        self._host = socket.gethostname().replace("/", "\\057").replace(":", "\\072")

    def __call__(self, app: Fumi) -> None:
        """Raises OSError when the directories cannot be made."""
        self.create()
        observer = app.observer

        async def deliver(ctx: DataContext, next: Next) -> None:
            try:
                await self._deliver(ctx)
            except SMTPError as error:
                observer.delivery(self.name, "failed" if error.code >= 500 else "deferred")
                raise
            observer.delivery(self.name, "ok")

        app.on_data(deliver)
        app.withhold(lambda: _NOT_KEPT)

    def create(self) -> None:
        # A directory that the power took takes with it what is in it, however safe that was.
        made_in = {each.parent for each in (self.path, *self.path.parents) if not each.exists()}
        for name in ("tmp", "new", "cur"):
            (self.path / name).mkdir(mode=0o700, parents=True, exist_ok=True)
        for directory in {self.path, self.path.parent} | made_in:
            _sync_directory(directory)

    def problem(self) -> str | None:
        for name in ("tmp", "new"):
            if not os.access(self.path / name, os.W_OK | os.X_OK):
                return f"cannot write to {self.path / name}"
        return None

    def check(self) -> str | None:
        """Raises OSError when this user cannot write to it, or make it where it is not there."""
        user = f"user {_user()}"
        missing = [each for name in ("tmp", "new", "cur") if not (each := self.path / name).exists()]
        if missing:
            above = next(each for each in missing[0].absolute().parents if each.exists())
            if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
                raise OSError(f"is not there, and {user} cannot make it in {above}")
            return f"maildir:{self.path} is not there yet: {user} will make it"
        if problem := self.problem():
            raise OSError(f"{user}: {problem}")
        return None

    async def _deliver(self, ctx: DataContext) -> None:
        loop = asyncio.get_running_loop()

        async def in_thread(job: Callable[..., Any], *arguments: Any) -> None:
            future = loop.run_in_executor(self._threads, job, *arguments)
            try:
                await asyncio.shield(future)
            except asyncio.CancelledError:
                await asyncio.wait([future])  # nothing is taken from under a thread that is at work
                raise
            except OSError as error:
                event(_log, logging.ERROR, "cannot deliver", id=ctx.session.id, path=self.path, problem=error.strerror)
                full = error.errno in _FULL
                raise SMTPError(
                    *(("4.3.1 Insufficient system storage", 452) if full else ("4.3.0 Mail store error", 451))
                ) from None

        message = _Message(self.path, self._unique_name())
        traced = Traced(trace_headers(ctx.session))
        batch: list[bytes] = []
        size = 0
        try:
            async for piece in ctx.stream:
                batch.append(traced.feed(piece))
                size += len(piece)
                if size >= BATCH:
                    await in_thread(message.write, batch)
                    batch, size = [], 0
            if ctx.size_exceeded:
                ctx.reject("5.3.4 Message too large", 552)
            batch.append(traced.end())
            await in_thread(message.commit, batch)
            ctx.accept(f"Ok: queued as {message.name}")
        except BaseException:
            message.discard()
            raise

    def _unique_name(self) -> str:
        now = time.time_ns()
        return f"{now // 10**9}.M{now // 1000 % 10**6}P{os.getpid()}Q{next(self._count)}.{self._host}"


def _user() -> str:
    """The name of who the program runs as; the number of one who has none, as in a container."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


class _Message:
    """One file on its way from tmp/ to new/. Its methods run in a thread, one after the other."""

    def __init__(self, maildir: Path, name: str) -> None:
        self.name = name
        self._temporary = maildir / "tmp" / name
        self._final = maildir / "new" / name
        self._path: Path | None = None  # where the file is now
        self._fd = -1
        self._carriage_return = b""

    def write(self, pieces: list[bytes]) -> None:
        if self._fd < 0:
            self._fd = os.open(self._temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            self._path = self._temporary
        data = memoryview(self._local_lines(b"".join(pieces)))
        while data:
            data = data[os.write(self._fd, data) :]

    def _local_lines(self, text: bytes) -> bytes:
        """CRLF to LF. A piece may end between the two; the CR then waits for the next."""
        text = self._carriage_return + text
        self._carriage_return = b"\r" if text.endswith(b"\r") else b""
        return text[: len(text) - len(self._carriage_return)].replace(b"\r\n", b"\n")

    def commit(self, pieces: list[bytes]) -> None:
        self.write(pieces)
        if self._carriage_return:
            os.write(self._fd, self._carriage_return)
        os.fsync(self._fd)
        self._close()
        os.rename(self._temporary, self._final)
        self._path = self._final
        _sync_directory(self._final.parent)

    def discard(self) -> None:
        """Leave nothing: the client has not heard 250, and comes again."""
        self._close()
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def _close(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
