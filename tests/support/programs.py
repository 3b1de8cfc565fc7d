"""Programs under test, ours and others', in one directory of a test: started, stopped, and the mail that they delivered."""

from __future__ import annotations

import contextlib
import os
import re
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.support import starter
from tests.support.starter import Process
from tests.support.waiting import until


def listening(port: int) -> bool:
    """Whether a process listens, on IPv4 or IPv6, found without connecting."""
    tables = [path.read_text() for path in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")) if path.exists()]
    return any(re.search(f":{port:04X} 0+:0000 0A", table) for table in tables)


@dataclass
class Stored:
    """One file of new/: its trace headers, unfolded, and its text."""

    headers: str
    text: bytes


class Maildir:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __len__(self) -> int:
        return len(os.listdir(self.path / "new"))

    def messages(self) -> list[Stored]:
        return [self._read(path) for path in sorted((self.path / "new").iterdir())]

    @staticmethod
    def _read(path: Path) -> Stored:
        data = path.read_bytes()
        found = re.match(rb"Return-Path: .*\n(?:Delivered-To: .*\n)+Received: .*\n(?:\t.*\n)*", data)
        assert found, data[:500]
        return Stored(found[0].decode().replace("\n\t", " "), data[found.end() :])


class Programs:
    """Starts programs, and ends those that it started."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._running: list[Process] = []

    def start(self, *command: str | Path, port: int | None = None, log: str = "log") -> Process:
        with (self.directory / log).open("ab") as output:
            process = starter.start(*command, cwd=self.directory, stdout=output, stderr=output)
        self._running.append(process)
        if port is not None:
            self.await_port(port, process)
            assert process.poll() is None, (self.directory / log).read_text()
        return process

    @staticmethod
    def await_port(port: int, process: Process) -> None:
        """Wait until somebody listens on the port, or the process has ended."""
        until(lambda: listening(port) or process.poll() is not None, f"{process.args[0]} listening")

    def maildir(self) -> Maildir:
        """The Maildir that fumi-core delivers into by default."""
        return Maildir(self.directory / "maildir")

    def run(self, *command: str | Path, given: bytes = b"", status: int = 0, environment: Mapping[str, str] | None = None) -> str:
        """What a program says that ends by itself, and is to end with this status."""
        done = starter.finished(*command, cwd=self.directory, env={**os.environ, **(environment or {})}, given=given, timeout=600)
        said = done.stdout + done.stderr
        assert done.returncode == status, said
        return said

    def stop(self, process: Process, number: int = signal.SIGTERM) -> int:
        process.send_signal(number)
        return process.wait(60)

    def close(self) -> None:
        for process in self._running:
            if process.poll() is None:
                # With its children: each program has a session of its own.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@dataclass
class Setup:
    """Where mail goes in, encrypted at once or by STARTTLS, and where it comes out."""

    tls_port: int
    starttls_port: int
    maildir: Maildir
    processes: dict[str, Process]
