"""A next hop that answers as a test says."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterable
from typing import BinaryIO, Protocol

Part = bytes | None
Answer = Part | Iterable[Part] | Callable[[bytes], Part | Iterable[Part]]

_ANSWERS: dict[str, Answer] = {
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

    def __init__(self, path: str | None = None, /, **answers: Answer) -> None:
        self.answers: dict[str, Answer] = {**_ANSWERS, **{verb.replace("dot", "."): answer for verb, answer in answers.items()}}
        self.lines: list[bytes] = []
        """The lines it received, over all connections, without messages."""
        self.messages: list[bytes] = []
        """The whole ones."""
        self.broken: list[bytes] = []
        """Those that broke off."""
        self.begun = 0
        """Messages of which the first line has arrived: the client has the reply to DATA."""
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

    def _converse(self, client: socket.socket, lines: BinaryIO) -> None:
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


class StartHop(Protocol):
    """Starts a hop on a free port of this host, or on a Unix socket; it ends with the test."""

    def __call__(self, path: str | None = None, /, **answers: Answer) -> ScriptedHop: ...
