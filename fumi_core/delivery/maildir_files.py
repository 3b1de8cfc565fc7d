"""The files of a Maildir (https://cr.yp.to/proto/maildir.html), and how a message gets into one. Everything here may block."""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import os
import socket
import stat
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

from fumi_core.runtime.logs import event

NAME_ATTEMPTS = 10
"""Names that are tried for a message, if each is in use already."""
STALE_SECONDS = 36 * 3600.0
"""Age in seconds from which a file in tmp/ was left by a killed delivery, by the specification."""

_log = logging.getLogger("fumi.core")
# Errors that CIFS, FUSE and the like return for calls they do not support; a failing disk gives EIO.
_CANNOT_SYNC = (errno.EINVAL, errno.EACCES, errno.EPERM, errno.EBADF, errno.ENOSYS, errno.ENOTSUP)
_NO_HARD_LINKS = (errno.EPERM, errno.ENOSYS, errno.ENOTSUP)


_NOTHING = contextlib.nullcontext()
_numbers = itertools.count(1)  # of the files of this process


class DirectorySync:
    """Fsyncs directories. If a file system does not support that, one warning is logged."""

    def __init__(self) -> None:
        self._warned = False

    def __call__(self, directory: Path) -> None:
        """Raises OSError when the disk fails."""
        try:
            _sync_directory(directory)
        except OSError as error:
            if error.errno not in _CANNOT_SYNC:
                raise
            if not self._warned:
                self._warned = True
                words = "cannot fsync directory: accepted mail may be lost in a power failure"
                event(_log, logging.WARNING, words, path=directory, error=error.strerror)


class MaildirDirectory:
    """The directory ``path`` with its tmp, new and cur."""

    def __init__(self, path: Path, sync: DirectorySync | None = None) -> None:
        self.path = path
        self.sync = sync or DirectorySync()
        self._host = socket.gethostname().replace("/", "\\057").replace(":", "\\072")

    def create(self) -> None:
        """Create what does not exist. Raises OSError."""
        # If a power loss removes a directory, it also removes the safely stored messages in it.
        made_in = {each.parent for each in (self.path, *self.path.parents) if not each.exists()}
        for name in ("tmp", "new", "cur"):
            (self.path / name).mkdir(mode=0o700, parents=True, exist_ok=True)
        for directory in {self.path, self.path.parent} | made_in:
            if os.access(directory, os.W_OK):  # otherwise we created nothing in it
                self.sync(directory)

    def acting(self) -> contextlib.AbstractContextManager[object]:
        """In this context the thread may work on the files of this Maildir."""
        return _NOTHING

    def open_temporary(self, path: Path) -> int:
        """Create this file, in tmp/, and return its descriptor. Raises FileExistsError, OSError."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)

    def unique_name(self) -> str:
        now = time.time_ns()
        return f"{now // 10**9}.M{now // 1000 % 10**6}P{os.getpid()}Q{next(_numbers)}.{self._host}"

    def sync_new(self) -> None:
        """fsync new/, so that its names survive a power loss. Raises OSError when the disk fails."""
        self.sync(self.path / "new")

    def remove_stale(self) -> None:
        """Remove files that were written last more than STALE_SECONDS seconds ago."""
        tmp = self.path / "tmp"
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


class MessageFile:
    """One message on its way from tmp/ to new/. All methods but ``withdraw`` run in threads."""

    def __init__(self, directory: MaildirDirectory, id: str) -> None:
        """``id`` is the connection's, for the log."""
        self.id = id
        self.name = directory.unique_name()
        self.job: Future[None] | None = None
        """The last job that was given to a thread."""
        self.begun = False
        """Whether there may be something to discard."""
        self.withdrawn = False
        """The client did not get 250, and will send the message again: nothing more is written or linked."""
        self.directory = directory
        self._temporary: Path | None = None
        self._final: Path | None = None
        self._fd = -1
        self._carriage_return = b""
        # If no thread could be started for a job, it stays queued and runs when another thread is free.
        self._lock = threading.Lock()

    def write(self, pieces: list[bytes]) -> None:
        with self._lock, self.directory.acting():
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
            path = self.directory.path / "tmp" / name
            self._fd = self.directory.open_temporary(path)
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
                self.name = self.directory.unique_name()

    def _local_lines(self, text: bytes) -> bytes:
        """CRLF to LF. A piece may end between the two; the CR then waits for the next."""
        text = self._carriage_return + text
        self._carriage_return = b"\r" if text.endswith(b"\r") else b""
        return text[: len(text) - len(self._carriage_return)].replace(b"\r\n", b"\n")

    def commit(self, pieces: list[bytes]) -> None:
        """Write the rest and show the message to readers: safe when it returns. Raises OSError."""
        with self._lock, self.directory.acting():
            if not self.withdrawn:
                self._complete(pieces)
            if not self.withdrawn:
                self._show()

    def prepare(self, pieces: list[bytes]) -> None:
        """Write the rest, and sync the file, which no reader sees yet. Raises OSError."""
        with self._lock, self.directory.acting():
            if not self.withdrawn:
                self._complete(pieces)

    def publish(self) -> None:
        """Show a prepared message to readers: safe when it returns. Raises OSError."""
        with self._lock, self.directory.acting():
            if not self.withdrawn:
                self._show()

    def _complete(self, pieces: list[bytes]) -> None:
        self._write(b"".join(pieces))
        if self._carriage_return:
            os.write(self._fd, self._carriage_return)
        os.fsync(self._fd)
        self._close()

    def _show(self) -> None:
        self._with_new_name(self._link)
        self.directory.sync_new()
        with contextlib.suppress(OSError):  # the message is safe, and tmp/ is cleaned later
            self._remove_temporary()

    def _link(self, name: str) -> None:
        assert self._temporary is not None
        final = self.directory.path / "new" / name
        try:
            _link(self._temporary, final)
        except FileExistsError:
            # NFS also returns this for a link that it has just made if the confirmation was lost.
            if not os.path.samefile(self._temporary, final):
                raise
        self._final = final

    def withdraw(self) -> Future[None] | None:
        """Discard the message as soon as no thread is working on it. Returns at once: a future that is then done, if any."""
        self.withdrawn = True
        if self.job is None:
            return None
        withdrawal: Future[None] = Future()

        def take_back(job: Future[None]) -> None:
            self.discard()
            withdrawal.set_result(None)

        self.job.add_done_callback(take_back)
        return withdrawal

    def discard(self) -> None:
        """Remove every file of the message; a file that cannot be removed is logged."""
        with self._lock:
            for remove in (self._close, self._remove_final, self._remove_temporary):
                try:
                    with self.directory.acting():
                        remove()
                except OSError as error:
                    event(
                        _log,
                        logging.ERROR,
                        "cannot remove message file",
                        id=self.id,
                        path=self.directory.path,
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
