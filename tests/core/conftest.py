"""What the tests of the core share."""

from __future__ import annotations

import contextlib
import os
import signal
import smtplib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fumi_core.proxy_protocol import ProxyHeader
from tests.support import ports, starter


class Client:
    """A raw SMTP client: says lines, hears replies."""

    def __init__(self, port: int, first: bytes = b"", banner: bool = True) -> None:
        self.sock = socket.create_connection(("127.0.0.1", port), timeout=60)
        self.file = self.sock.makefile("rb")
        self.sock.sendall(first)
        self.banner = self.reply() if banner else b""

    def reply(self) -> bytes:
        """One reply, all its lines; b"" at the end of the connection."""
        lines = [self.file.readline()]
        while lines[-1][3:4] == b"-":
            lines.append(self.file.readline())
        return b"".join(lines)

    def say(self, line: bytes | str) -> bytes:
        self.sock.sendall((line.encode() if isinstance(line, str) else line) + b"\r\n")
        return self.reply()

    def envelope(self, sender: str = "a@b.example", *recipients: str) -> None:
        assert self.say("EHLO client.example").startswith(b"250")
        assert self.say(f"MAIL FROM:<{sender}>").startswith(b"250")
        for each in recipients or ("c@d.example",):
            assert self.say(f"RCPT TO:<{each}>").startswith(b"250")

    def close(self) -> None:
        self.file.close()
        self.sock.close()


@pytest.fixture
def connect() -> Iterator[Callable[..., Client]]:
    clients: list[Client] = []

    def make(port: int, first: bytes = b"", banner: bool = True) -> Client:
        clients.append(Client(port, first, banner))
        return clients[-1]

    yield make
    for client in clients:
        client.close()


@pytest.fixture
def connect_from(connect: Callable[..., Client]) -> Callable[..., Client]:
    """A client with an address of one's choice, for an app with ``proxy_protocol="required"``."""

    def make(port: int, address: str) -> Client:
        kind = "TCP6" if ":" in address else "TCP4"
        return connect(port, ProxyHeader(2, "PROXY", kind, (address, 1234), (address, 25)).to_bytes())

    return make


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def send() -> Callable[..., dict[str, Any]]:
    def function(port: int, text: str, *recipients: str) -> dict[str, Any]:
        with smtplib.SMTP("127.0.0.1", port, timeout=60) as smtp:
            return smtp.sendmail("a@b.example", recipients or ["c@d.example"], text)

    return function


@pytest.fixture
def eventually() -> Callable[[Callable[[], bool]], None]:
    def wait(condition: Callable[[], bool]) -> None:
        end = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < end, "it did not come about"
            time.sleep(0.005)

    return wait


@pytest.fixture
def reset() -> Callable[[Client], None]:
    """Close with a reset instead of an orderly end."""

    def abort(client: Client) -> None:
        client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        client.close()

    return abort


_ANSWERS: dict[str, Any] = {
    "BANNER": b"220 hop\r\n",
    "EHLO": b"250-hop\r\n250-8BITMIME\r\n250 SIZE\r\n",
    "LHLO": b"250-hop\r\n250-8BITMIME\r\n250 SIZE\r\n",
    "DATA": b"354 go on\r\n",
    ".": b"250 2.0.0 Ok: queued as HOP1\r\n",
    "QUIT": b"221 bye\r\n",
}


class ScriptedHop:
    """An SMTP server of few words, one thread a connection: each command is answered as ``answers`` says, by its verb.

    ``BANNER`` and ``.`` (the end of a message; ``dot`` as an argument) are there too. An answer is bytes to send, b"" to say
    nothing, None to close, an iterable of these one by one, or a function of the line that returns one of these.
    """

    def __init__(self, path: str | None = None, **answers: Any) -> None:
        self.answers = {**_ANSWERS, **{verb.replace("dot", "."): answer for verb, answer in answers.items()}}
        self.lines: list[bytes] = []
        """What was said to it, over all connections, without messages."""
        self.messages: list[bytes] = []
        """The whole ones."""
        self.broken: list[bytes] = []
        """Those that broke off."""
        self.begun = 0
        """Messages of which the first line is here: whoever sends it has heard the answer to DATA."""
        self.connections = 0
        self._open: set[socket.socket] = set()
        self.sock = socket.socket(socket.AF_UNIX if path else socket.AF_INET)
        self.sock.bind(path or ("127.0.0.1", 0))
        self.sock.listen()
        self.address = f"unix:{path}" if path else f"127.0.0.1:{self.sock.getsockname()[1]}"
        self._clients: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def open(self) -> int:
        return len(self._open)

    def close(self) -> None:
        for sock in (self.sock, *self._clients):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.sock.accept()
                self.connections += 1
                self._open.add(client)
                self._clients.append(client)
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError, ValueError), client, client.makefile("rb") as lines:
            self._converse(client, lines)
        self._open.discard(client)

    def _converse(self, client: socket.socket, lines: Any) -> None:
        if not self._answer(client, "BANNER", b""):
            return
        while line := lines.readline():
            self.lines.append(line.rstrip(b"\r\n"))
            verb = line.split()[0].decode().upper()
            if not self._answer(client, verb, line) or verb == "QUIT":
                return
            if verb == "DATA" and self.answers["DATA"] == _ANSWERS["DATA"]:
                text = b""
                while (line := lines.readline()) not in (b".\r\n", b""):
                    self.begun += not text
                    text += line
                (self.messages if line else self.broken).append(text)
                if not line or not self._answer(client, ".", text):
                    return

    def _answer(self, client: socket.socket, verb: str, line: bytes) -> bool:
        answer = self.answers.get(verb, b"250 2.0.0 Ok\r\n")
        if callable(answer):
            answer = answer(line)
        for part in [answer] if answer is None or isinstance(answer, bytes) else answer:
            if part is None:
                client.shutdown(socket.SHUT_RDWR)
                return False
            client.sendall(part)
        return True


@pytest.fixture
def scripted_hop() -> Iterator[Callable[..., ScriptedHop]]:
    hops: list[ScriptedHop] = []

    def make(path: str | None = None, **answers: Any) -> ScriptedHop:
        hops.append(ScriptedHop(path, **answers))
        return hops[-1]

    yield make
    for hop in hops:
        hop.close()


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


@pytest.fixture
def free_port() -> Callable[[], int]:
    return ports.free_port


@pytest.fixture
def start(tmp_path: Path, eventually: Any) -> Iterator[Callable[..., Program]]:
    programs: list[Program] = []

    def run(*flags: str, environment: dict[str, str] | None = None, wait: str = "listening") -> Program:
        programs.append(program := Program(tmp_path, *flags, environment=environment))
        eventually(lambda: wait in program.log.read_text() or program.process.poll() is not None)
        # One that was told to stop may have ended by now, but not in any other way.
        assert program.process.poll() in ((None, 0) if wait == "stopping" else (None,)), program.log.read_text()
        return program

    yield run
    for program in programs:
        program.close()
