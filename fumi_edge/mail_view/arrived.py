"""Lists and reads the messages of a Maildir. Only regular files are read, and nothing is changed."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Entry(NamedTuple):
    """A stored message. ``received`` is in seconds since 1970, ``size`` in bytes."""

    id: str
    """Names the message in a URL. It is a hash: a URL never has a part of a path."""
    path: Path
    received: float
    size: int


def entries(maildir: Path) -> list[Entry]:
    """All messages, the latest first; none while there is no Maildir."""
    return sorted(_entries(maildir), key=lambda each: (-each.received, each.path.name))


def _entries(maildir: Path) -> Iterator[Entry]:
    for directory in (maildir / "new", maildir / "cur"):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(directory) as found:
            for each in found:
                # A mail reader may move or remove a file at any time.
                with contextlib.suppress(FileNotFoundError):
                    about = each.stat(follow_symlinks=False)
                    if stat.S_ISREG(about.st_mode) and not each.name.startswith("."):
                        yield Entry(_id(each.name), Path(each.path), about.st_mtime_ns / 1e9, about.st_size)


def _id(name: str) -> str:
    """The same in new/ and in cur/, where flags follow a colon (https://cr.yp.to/proto/maildir.html)."""
    return hashlib.sha256(os.fsencode(name.partition(":")[0])).hexdigest()[:16]


def find(maildir: Path, id: str) -> Entry | None:
    """The message of this id, or None."""
    return next((each for each in _entries(maildir) if each.id == id), None)


def read(path: Path, most: int | None = None) -> bytes:
    """The message as it is stored, or its first ``most`` bytes. Raises OSError, for example when it was removed."""
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        return file.read() if most is None else file.read(most)
