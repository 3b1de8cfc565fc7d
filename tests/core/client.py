"""A raw SMTP client, and the types of the fixtures that make clients."""

from __future__ import annotations

import socket
from typing import Protocol


class Client:
    """A raw SMTP client: sends lines, reads replies."""

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

    def reset(self) -> None:
        """Close with a reset instead of an orderly end."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        self.close()

    def close(self) -> None:
        self.file.close()
        self.sock.close()


class Connect(Protocol):
    """Connects to a port of this host, sends ``first``, and reads the banner by default."""

    def __call__(self, port: int, first: bytes = b"", banner: bool = True) -> Client: ...


class ConnectFrom(Protocol):
    """Connects to an app with ``proxy_protocol="required"``, with a PROXY header that names this address as the client's."""

    def __call__(self, port: int, address: str) -> Client: ...


class Send(Protocol):
    """Sends a message by smtplib; returns the recipients that were rejected, with code and text."""

    def __call__(self, port: int, text: str, *recipients: str) -> dict[str, tuple[int, bytes]]: ...
