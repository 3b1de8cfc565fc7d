"""What a client does once, for metrics: whole dialogues with a core or an edge, good and bad ones."""

from __future__ import annotations

import base64
import contextlib
import socket
import ssl
import struct
from collections.abc import Iterator

PROXY = b"PROXY TCP4 192.0.2.7 192.0.2.1 40000 25\r\n"
TIMEOUT = 60.0
TRUSTING = ssl.create_default_context()
TRUSTING.check_hostname = False
TRUSTING.verify_mode = ssl.CERT_NONE
DISTRUSTING = ssl.create_default_context()
DISTRUSTING.check_hostname = False


@contextlib.contextmanager
def connected(port: int) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", port), TIMEOUT) as sock:
        yield sock


def replies(sock: socket.socket, *commands: str, banner: bool = True) -> list[int]:
    """Send each command when the one before is answered, and QUIT after an error: the codes, the banner's first.

    They are fewer if the server closes.
    """
    codes, left = [], [*commands]
    with sock.makefile("rb") as file:
        if not banner:
            sock.sendall(left.pop(0).encode() + b"\r\n")
        while line := file.readline():
            if line[3:4] == b"-":
                continue
            codes.append(int(line[:3]))
            if codes[-1] >= 400:
                left = left[-1:] if left[-1:] == ["QUIT"] else []
            if not left:
                break
            sock.sendall(left.pop(0).encode() + b"\r\n")
    return codes


def mail(*recipients: str) -> tuple[str, ...]:
    """The commands of a session with one message for these recipients, of whom each is accepted."""
    to = (f"RCPT TO:<{each}>" for each in recipients)
    return ("EHLO client.example", "MAIL FROM:<a@example.com>", *to, "DATA", "Subject: x\r\n\r\nx\r\n.", "QUIT")


def to_core(port: int, *commands: str, header: bytes = PROXY) -> list[int]:
    """A session with a core, for an edge's client unless there is no PROXY header."""
    with connected(port) as sock:
        sock.sendall(header)
        return replies(sock, *commands)


def over_tls(port: int, *commands: str, context: ssl.SSLContext = TRUSTING) -> list[int]:
    with connected(port) as plain, context.wrap_socket(plain) as sock:
        return replies(sock, *commands)


def over_starttls(port: int, *commands: str, context: ssl.SSLContext = TRUSTING) -> list[int]:
    with connected(port) as plain:
        codes = replies(plain, "EHLO client.example", "STARTTLS")
        with context.wrap_socket(plain) as sock:
            return codes + replies(sock, *commands, banner=False)


def login(password: str, method: str = "PLAIN") -> tuple[str, ...]:
    """The commands of a session in which joe logs in."""
    if method == "LOGIN":
        return ("EHLO client.example", "AUTH LOGIN", _encoded("joe"), _encoded(password), "QUIT")
    return ("EHLO client.example", f"AUTH PLAIN {_encoded(f'{chr(0)}joe{chr(0)}{password}')}", "QUIT")


def _encoded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def distrust(port: int) -> None:
    """A handshake that the client ends because it does not trust the certificate."""
    with contextlib.suppress(ssl.SSLCertVerificationError):
        over_tls(port, context=DISTRUSTING)


def scan(port: int) -> None:
    """What is not TLS, at a port for TLS."""
    with connected(port) as sock, contextlib.suppress(ConnectionError):
        sock.sendall(b"GET / HTTP/1.1\r\n\r\n")
        while sock.recv(4096):
            pass


def reset(port: int) -> None:
    """Half a ClientHello, and a reset."""
    with connected(port) as sock:
        sock.sendall(b"\x16\x03\x01")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def stall(port: int) -> None:
    """Half a ClientHello, and nothing until the server closes."""
    with connected(port) as sock, contextlib.suppress(ConnectionError):
        sock.sendall(b"\x16\x03\x01")
        while sock.recv(4096):
            pass


def inject(port: int) -> list[int]:
    """A command after STARTTLS, in plaintext."""
    with connected(port) as sock:
        return replies(sock, "EHLO client.example", "STARTTLS\r\nMAIL FROM:<evil@example.com>")


def vanish(port: int) -> None:
    """Connect and close."""
    with connected(port):
        pass
