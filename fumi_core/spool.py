"""A whole message, kept until its end is known: 256 KiB in memory, anything longer in an unlinked temporary file.

The file is read and written in threads, so that a slow disk holds up no other connection.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import IO

from fumi_core.runtime.aside import aside

MEMORY = 256 * 1024
"""Octets of a message that are kept in memory; also how many are read from the file at once."""


class Spool:
    """Written once, then read any number of times. ``size`` is in octets. ``close()`` frees memory and disk."""

    def __init__(self, directory: str | os.PathLike[str] | None = None) -> None:
        """``directory`` is where the temporary file goes; None is the system's place for such files."""
        self.size = 0
        self._directory = None if directory is None else Path(directory)
        self._pieces: list[bytes] = []  # not yet in the file
        self._waiting = 0  # octets of these
        self._file: IO[bytes] | None = None

    async def write(self, piece: bytes) -> None:
        """Append a piece. Raises OSError when there is no room."""
        self._pieces.append(piece)
        self._waiting += len(piece)
        self.size += len(piece)
        if self._waiting > MEMORY:
            pieces, self._pieces, self._waiting = self._pieces, [], 0
            await aside(lambda: self._append(b"".join(pieces)))

    def _append(self, data: bytes) -> None:
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self._directory, buffering=0)  # noqa: SIM115 (closed by close())
        view = memoryview(data)
        while view:
            view = view[self._file.write(view) :]

    async def read(self) -> AsyncIterator[bytes]:
        """The pieces, from the beginning. Raises OSError when they cannot be read."""
        file = self._file
        if file is not None:
            end, at = self.size - self._waiting, 0
            while at < end:
                piece = await aside(lambda at=at: os.pread(file.fileno(), min(MEMORY, end - at), at))  # type: ignore[misc]
                if not piece:
                    raise OSError("the temporary file of a message is shorter than the message")
                at += len(piece)
                yield piece
        for piece in self._pieces:
            yield piece

    def close(self) -> None:
        self._pieces = []
        if self._file is not None:
            self._file.close()
            self._file = None
