"""fumi-core as a program: running it to its end, and asking a running one."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import urllib.error
import urllib.request
from pathlib import Path
from typing import Protocol

from tests.support import starter
from tests.support.starter import BIN, finished

PROGRAM = str(BIN / "fumi-core")


def get(url: str) -> tuple[int, str]:
    with contextlib.closing(urllib.request.urlopen(url, timeout=60)) as answer:
        return answer.status, answer.read().decode()


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return finished("fumi-core", *arguments, cwd=cwd)


class Program:
    """A running fumi-core; ``log`` is what it says."""

    def __init__(self, directory: Path, *flags: str, environment: dict[str, str] | None = None) -> None:
        self.log = directory / "log"
        with self.log.open("w") as log:
            environment = {**os.environ, **(environment or {})}
            self.process = starter.start("fumi-core", *flags, stdout=log, stderr=log, cwd=directory, env=environment)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)

    def close(self) -> None:
        """End whatever is left of it, workers too."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Start(Protocol):
    """Starts fumi-core in the test's directory and returns when ``wait`` is in its log; it ends with the test."""

    def __call__(self, *flags: str, environment: dict[str, str] | None = None, wait: str = "listening") -> Program: ...
