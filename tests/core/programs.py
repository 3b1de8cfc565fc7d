"""fumi-core as a program: running it to its end, and asking a running one."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

from tests.support.starter import finished

PROGRAM = str(Path(sys.executable).with_name("fumi-core"))


def get(url: str) -> tuple[int, str]:
    with contextlib.closing(urllib.request.urlopen(url, timeout=60)) as answer:
        return answer.status, answer.read().decode()


def reachable(port: int) -> bool:
    with contextlib.suppress(OSError):
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
        return True
    return False


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return finished("fumi-core", *arguments, cwd=cwd)
