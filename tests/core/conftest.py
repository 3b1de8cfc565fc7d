"""What the tests of the core share."""

from __future__ import annotations

import smtplib
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from fumi_core.proxy_protocol import ProxyHeader


class Client:
    """A raw SMTP client: says lines, hears replies."""

    def __init__(self, port: int, first: bytes = b"", banner: bool = True) -> None:
        self.sock = socket.create_connection(("127.0.0.1", port), timeout=20)
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
        with smtplib.SMTP("127.0.0.1", port, timeout=20) as smtp:
            return smtp.sendmail("a@b.example", recipients or ["c@d.example"], text)

    return function


@pytest.fixture
def eventually() -> Callable[[Callable[[], bool]], None]:
    def wait(condition: Callable[[], bool]) -> None:
        end = time.monotonic() + 20
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
