"""Whole setups for tests with programs of others: terminators, cores, Maildirs, and what became of the mail."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests import starter
from tests.limits import pytest_runtest_protocol as pytest_runtest_protocol
from tests.ports import free_port
from tests.starter import BIN, Process

PATIENCE = 60.0


def until(condition: Callable[[], Any], what: str, patience: float = PATIENCE) -> Any:
    deadline = time.monotonic() + patience
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what} did not happen"
        time.sleep(0.01)
    return value


def listening(port: int) -> bool:
    """Whether somebody listens, on IPv4 or IPv6, asked without connecting."""
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

    bin = BIN
    free_port = staticmethod(free_port)
    listening = staticmethod(listening)
    until = staticmethod(until)

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._running: list[Process] = []

    def start(self, *command: str | Path, port: int | None = None, log: str = "log") -> Process:
        with (self.directory / log).open("ab") as output:
            process = starter.start(*command, cwd=self.directory, stdout=output, stderr=output)
        self._running.append(process)
        if port is not None:
            until(lambda: listening(port) or process.poll() is not None, f"{command[0]} listening")
            assert process.poll() is None, (self.directory / log).read_text()
        return process

    def maildir(self) -> Maildir:
        """The Maildir that fumi-core delivers into unless told otherwise."""
        return Maildir(self.directory / "maildir")

    def run(self, *command: str | Path, given: bytes = b"", status: int = 0, **environment: str) -> str:
        """What a program says that ends by itself, and is to end with this status."""
        done = starter.finished(*command, cwd=self.directory, env={**os.environ, **environment}, given=given, timeout=600)
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


@pytest.fixture
def programs(tmp_path: Path) -> Iterator[Programs]:
    with contextlib.closing(Programs(tmp_path)) as programs:
        yield programs


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A self-signed certificate for localhost and 127.0.0.1, and its key."""
    directory = tmp_path_factory.mktemp("certificate")
    cert, key = directory / "cert.pem", directory / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-nodes", "-days", "2", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout", key, "-out", cert],
        check=True,
        capture_output=True,
    )  # fmt: skip
    (directory / "both.pem").write_bytes(cert.read_bytes() + key.read_bytes())
    return cert, key


@dataclass
class Setup:
    """Where mail goes in, encrypted at once or by STARTTLS, and where it comes out."""

    tls_port: int
    starttls_port: int
    maildir: Maildir
    processes: dict[str, Process]


@pytest.fixture
def two_processes(programs: Programs, certificate: tuple[Path, Path]) -> Callable[..., Setup]:
    """fumi-edge in front of fumi-core, with defaults wherever there are any."""

    def start(*edge_flags: str) -> Setup:
        core_port, tls_port, starttls_port = free_port(), free_port(), free_port()
        core = programs.start(BIN / "fumi-core", "--listen", f"127.0.0.1:{core_port}", port=core_port, log="core.log")
        flags = ["--cert", certificate[0], "--key", certificate[1], "--backend", f"127.0.0.1:{core_port}"]
        flags += ["--listen", f"127.0.0.1:{tls_port}", "--starttls-listen", f"127.0.0.1:{starttls_port}", *edge_flags]
        edge = programs.start(BIN / "fumi-edge", *flags, port=starttls_port, log="edge.log")
        maildir = Maildir(programs.directory / "maildir")
        return Setup(tls_port, starttls_port, maildir, {"core": core, "edge": edge})

    return start


@pytest.fixture
def dev(programs: Programs) -> Callable[[], Setup]:
    """fumi-edge --dev, on free ports."""

    def start() -> Setup:
        tls_port, starttls_port = free_port(), free_port()
        flags = [
            "--listen",
            f"127.0.0.1:{tls_port}",
            "--starttls-listen",
            f"127.0.0.1:{starttls_port}",
            "--metrics",
            "127.0.0.1:0",
        ]
        edge = programs.start(BIN / "fumi-edge", "--dev", *flags, port=starttls_port, log="edge.log")
        return Setup(tls_port, starttls_port, Maildir(programs.directory / "maildir"), {"edge": edge})

    return start
