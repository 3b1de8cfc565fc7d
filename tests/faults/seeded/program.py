"""The program under test: started again after each death, and asked by /proc what it holds open."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Sequence
from pathlib import Path

from tests.support import starter
from tests.support.ports import free_port
from tests.support.proc import children
from tests.support.waiting import PATIENCE, until

from .plan import Plan


class Core:
    """fumi-core in ``directory``, with these flags."""

    def __init__(self, directory: Path, flags: Sequence[str]) -> None:
        self.port = free_port()
        self.plan = Plan(directory / "plan")
        self._directory = directory
        self._workers = int(flags[flags.index("--workers") + 1]) if "--workers" in flags else 1
        self._flags = ["--listen", f"127.0.0.1:{self.port}", "--proxy-protocol", "off", *flags]
        self._lock = threading.Lock()
        self._process: starter.Process | None = None
        self._read = 0

    def ensure(self) -> None:
        """Start it, unless it runs; returns when it accepts connections."""
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._start()
                until(self._listens, "fumi-core listening")

    def _start(self) -> None:
        with (self._directory / "log").open("ab") as log:
            self._process = starter.start("failing-core", *self._flags, cwd=self._directory, stdout=log, stderr=log)

    def _listens(self) -> bool:
        assert self._process is not None
        if (status := self._process.poll()) is not None:
            assert status == -signal.SIGKILL, f"fumi-core ended by itself, with {status}: {self.new_log()}"
            self._start()
        with socket.socket() as sock:
            return sock.connect_ex(("127.0.0.1", self.port)) == 0

    def kill(self) -> None:
        """kill -9 of the process that is alone, or of the first worker."""
        assert self._process is not None
        with contextlib.suppress(IndexError, ProcessLookupError):
            pid = children(self._process.pid)[0] if self._workers > 1 else self._process.pid
            os.kill(pid, signal.SIGKILL)

    def terminate(self) -> None:
        """SIGTERM, to the master where there is one."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)

    def stop(self) -> int:
        """SIGTERM, and its exit status."""
        assert self._process is not None
        self.terminate()
        return self._process.wait(PATIENCE)

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait(PATIENCE)
        self.plan.close()

    def descriptors(self) -> list[int]:
        """How many each process that accepts connections has open."""
        assert self._process is not None
        pids = children(self._process.pid) if self._workers > 1 else [self._process.pid]
        with contextlib.suppress(FileNotFoundError):  # a worker that has just been killed
            # One that has ended and was not waited for has none.
            return [count for pid in pids if (count := len(list(Path(f"/proc/{pid}/fd").iterdir())))]
        return []

    def new_log(self) -> str:
        """What it has logged since the last call."""
        with (self._directory / "log").open("rb") as log:
            log.seek(self._read)
            text = log.read()
        self._read += len(text)
        return text.decode()
