"""``maildir:PATH``: one file a message (https://cr.yp.to/proto/maildir.html), safe before the client gets 250.

Safe means: written into tmp/, fsynced, linked into new/ under an unused name, and new/ fsynced. Before the link no reader sees
the file; after the last fsync it survives a power loss. All of this happens in threads, in one job for a message that fits into a
batch. A delivery that fails or is cancelled leaves nothing in new/, however late it fails.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import logging
import os
import pwd
import socket
import stat
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
"""Octets gathered before a thread writes them."""
THREADS = 16
"""Messages written at once; each thread mostly waits for fsync."""
NAME_ATTEMPTS = 10
"""Names that are tried for a message when they are taken already."""
STALE_SECONDS = 36 * 3600.0
"""Seconds after which a file in tmp/ is the remains of a delivery that was killed, as the specification says."""
WITHDRAW_TIMEOUT = 4.0
"""Seconds that a stop waits for deliveries that are being withdrawn; a master kills its workers after five."""
CLEAN_INTERVAL = 3600.0
"""Seconds between two searches for such files, while mail is delivered."""

_log = logging.getLogger("fumi.core")
_FULL = (errno.ENOSPC, errno.EDQUOT)
# Errors that CIFS, FUSE and the like return for calls they do not support; a failing disk gives EIO.
_CANNOT_SYNC = (errno.EINVAL, errno.EACCES, errno.EPERM, errno.EBADF, errno.ENOSYS, errno.ENOTSUP)
_NO_HARD_LINKS = (errno.EPERM, errno.ENOSYS, errno.ENOTSUP)
_STORE_ERROR = ("4.3.0 Mail store error", 451)
_NOT_KEPT = frozenset({"BINARYMIME", "DSN"})
"""Extensions that a file with LF line ends cannot keep: binary content would change, and no notifications would be sent."""


class Maildir:
    """A Maildir at ``path``, created with its tmp, new and cur when it is first used."""

    name = "maildir"

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="maildir")
        self._count = itertools.count(1)
        self._host = socket.gethostname().replace("/", "\\057").replace(":", "\\072")
        self._clean_at = 0.0
        self._warned = False
        self.withdrawals: set[Future[None]] = set()
        """Deliveries whose client was not sent 250, and which a thread still has to withdraw."""

    def __call__(self, app: Fumi) -> None:
        """Raises OSError when the directories cannot be created."""
        self.create()
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

    def create(self) -> None:
        # If a power loss removes a directory, it also removes the safely stored messages in it.
        made_in = {each.parent for each in (self.path, *self.path.parents) if not each.exists()}
        for name in ("tmp", "new", "cur"):
            (self.path / name).mkdir(mode=0o700, parents=True, exist_ok=True)
        for directory in {self.path, self.path.parent} | made_in:
            if os.access(directory, os.W_OK):  # otherwise we created nothing in it
                self._sync(directory)

    def dependency_problem(self) -> str | None:
        for name in ("tmp", "new"):
            if not os.access(self.path / name, os.W_OK | os.X_OK):
                return f"cannot write to {self.path / name}"
        return None

    def check(self) -> str | None:
        """Raises OSError when this user cannot write to the directory, or cannot create it if it does not exist."""
        user = f"user {_user()}"
        missing = [each for name in ("tmp", "new", "cur") if not (each := self.path / name).exists()]
        if missing:
            above = next(each for each in missing[0].absolute().parents if each.exists())
            if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
                raise OSError(f"does not exist, and {user} cannot create it in {above}")
            return f"maildir:{self.path} does not exist yet: {user} will create it"
        if problem := self.dependency_problem():
            raise OSError(f"{user}: {problem}")
        return None

    async def _deliver(self, ctx: DataContext) -> None:
        file = _File(self, ctx.session.id)
        try:
            await self._store(ctx, file)
        except (asyncio.CancelledError, GeneratorExit):
            file.withdraw()
            raise
        except BaseException:
            file.withdrawn = True
            if file.begun:
                with contextlib.suppress(RuntimeError):  # no new thread could be started: the job waits for an existing one
                    await asyncio.wrap_future(self._threads.submit(file.discard))
            raise
        ctx.accept(f"Ok: queued as {file.name}")

    async def _store(self, ctx: DataContext, file: _File) -> None:
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

    async def _in_thread(self, file: _File, work: Callable[..., None], *arguments: Any) -> None:
        """Raises SMTPError, after a line in the log, when the disk or the system fails."""
        file.begun = True
        try:
            file.job = self._threads.submit(work, *arguments)
            await asyncio.wrap_future(file.job)
        except (OSError, RuntimeError) as error:
            # RuntimeError: the system has no more threads.
            problem = getattr(error, "strerror", None) or error
            event(_log, logging.ERROR, "cannot deliver", id=file.id, path=self.path, error=problem)
            full = isinstance(error, OSError) and error.errno in _FULL
            raise SMTPError(*(replies.INSUFFICIENT_STORAGE if full else _STORE_ERROR)) from None

    def _wait_for_withdrawals(self) -> None:
        # If the message stayed in new/ it would be there twice, since its client sends it again.
        wait(self.withdrawals, WITHDRAW_TIMEOUT)

    def _unique_name(self) -> str:
        now = time.time_ns()
        return f"{now // 10**9}.M{now // 1000 % 10**6}P{os.getpid()}Q{next(self._count)}.{self._host}"

    def sync_new(self) -> None:
        """fsync new/, so that its names survive a power loss. Raises OSError when the disk fails."""
        self._sync(self.path / "new")

    def _sync(self, directory: Path) -> None:
        try:
            _sync_directory(directory)
        except OSError as error:
            if error.errno not in _CANNOT_SYNC:
                raise
            if not self._warned:
                self._warned = True
                words = "cannot fsync directory: accepted mail may be lost in a power failure"
                event(_log, logging.WARNING, words, path=directory, error=error.strerror)

    def _clean(self) -> None:
        """Remove the remains of deliveries that were killed, in a thread."""
        self._clean_at = time.monotonic() + CLEAN_INTERVAL
        with contextlib.suppress(RuntimeError):  # no thread is available: try again next time
            self._threads.submit(_remove_stale, self.path / "tmp")


def _user() -> str:
    """The name of the user that runs the program, or its number where it has no name, as in a container."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


class _File:
    """One message on its way from tmp/ to new/. ``write``, ``commit`` and ``discard`` run in threads."""

    def __init__(self, maildir: Maildir, id: str) -> None:
        """``id`` is the connection's, for the log."""
        self.id = id
        self.name = maildir._unique_name()
        self.job: Future[None] | None = None
        """The last job that was given to a thread."""
        self.begun = False
        """Whether there may be something to discard."""
        self.withdrawn = False
        """The client was not sent 250, and will send the message again: nothing more is written or linked."""
        self._maildir = maildir
        self._temporary: Path | None = None
        self._final: Path | None = None
        self._fd = -1
        self._carriage_return = b""
        # If no thread could be started for a job, it stays queued and runs when another thread is free.
        self._lock = threading.Lock()

    def write(self, pieces: list[bytes]) -> None:
        with self._lock:
            if not self.withdrawn:
                self._write(b"".join(pieces))

    def _write(self, text: bytes) -> None:
        if self._fd < 0:
            self._open()
        data = memoryview(self._local_lines(text))
        while data:
            data = data[os.write(self._fd, data) :]

    def _open(self) -> None:
        def create(name: str) -> None:
            path = self._maildir.path / "tmp" / name
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            self._temporary = path

        self._with_new_name(create)

    def _with_new_name(self, make: Callable[[str], None]) -> None:
        """Create a file under the message's name, or under another name if that is taken. Raises OSError."""
        for left in range(NAME_ATTEMPTS - 1, -1, -1):
            try:
                make(self.name)
                break
            except FileExistsError:
                if not left:
                    raise
                self.name = self._maildir._unique_name()

    def _local_lines(self, text: bytes) -> bytes:
        """CRLF to LF. A piece may end between the two; the CR then waits for the next."""
        text = self._carriage_return + text
        self._carriage_return = b"\r" if text.endswith(b"\r") else b""
        return text[: len(text) - len(self._carriage_return)].replace(b"\r\n", b"\n")

    def commit(self, pieces: list[bytes]) -> None:
        with self._lock:
            if self.withdrawn:
                return
            self._write(b"".join(pieces))
            if self._carriage_return:
                os.write(self._fd, self._carriage_return)
            os.fsync(self._fd)
            self._close()
            if not self.withdrawn:
                self._with_new_name(self._publish)
                self._maildir.sync_new()
            with contextlib.suppress(OSError):  # the message is safe, and tmp/ is cleaned later
                self._remove_temporary()

    def _publish(self, name: str) -> None:
        assert self._temporary is not None
        final = self._maildir.path / "new" / name
        try:
            _link(self._temporary, final)
        except FileExistsError:
            # NFS also returns this for a link that it has just made if the confirmation was lost.
            if not os.path.samefile(self._temporary, final):
                raise
        self._final = final

    def withdraw(self) -> None:
        """Discard the message as soon as no thread is working on it. Returns at once."""
        self.withdrawn = True
        if self.job is None:
            return
        withdrawal: Future[None] = Future()
        withdrawals = self._maildir.withdrawals
        withdrawals.add(withdrawal)

        def take_back(job: Future[None]) -> None:
            self.discard()
            withdrawal.set_result(None)
            withdrawals.discard(withdrawal)

        self.job.add_done_callback(take_back)

    def discard(self) -> None:
        """Remove every file of the message; a file that cannot be removed is logged."""
        with self._lock:
            for remove in (self._close, self._remove_final, self._remove_temporary):
                try:
                    remove()
                except OSError as error:
                    event(
                        _log,
                        logging.ERROR,
                        "cannot remove message file",
                        id=self.id,
                        path=self._maildir.path,
                        file=self.name,
                        error=error.strerror,
                    )

    def _close(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)

    def _remove_final(self) -> None:
        if self._final is not None:
            self._final.unlink(missing_ok=True)

    def _remove_temporary(self) -> None:
        if self._temporary is not None:
            self._temporary.unlink(missing_ok=True)


def _link(source: Path, target: Path) -> None:
    """Link a file under another name, or rename it on a file system without hard links. Raises FileExistsError, OSError."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from None
        os.rename(source, target)


def _remove_stale(tmp: Path) -> None:
    """Remove files that were written last more than STALE_SECONDS seconds ago."""
    oldest, removed = time.time() - STALE_SECONDS, 0
    try:
        with os.scandir(tmp) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):  # another worker cleans too
                    removed += _remove_if_older(entry, oldest)
    except OSError as error:
        event(_log, logging.WARNING, "cannot remove unfinished deliveries", path=tmp, error=error.strerror)
    if removed:
        event(_log, logging.INFO, "unfinished deliveries removed", path=tmp, files=removed)


def _remove_if_older(entry: os.DirEntry[str], oldest: float) -> bool:
    if entry.name.startswith("."):
        return False  # a file of the file system itself, such as .nfs0001
    found = entry.stat(follow_symlinks=False)
    if not stat.S_ISREG(found.st_mode) or found.st_mtime >= oldest:
        return False
    os.unlink(entry.path)
    return True


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
