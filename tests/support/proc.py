"""What /proc says of a process."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def memory(pid: int) -> int:
    """Resident bytes."""
    found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    assert found
    return int(found[1]) * 1024


def open_files(pid: int) -> list[str]:
    """What each descriptor of a process is, as /proc calls it; nothing of a process that has ended."""
    files: list[str] = []
    with contextlib.suppress(FileNotFoundError):
        files.extend(os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir())
    return files
