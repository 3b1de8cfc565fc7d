"""A mail filter that answers as a test says."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Iterable
from typing import BinaryIO, Protocol

Part = bytes | None
Answer = Part | Callable[[bytes], Part]

STAGES = {
    b"O": "negotiate", b"D": "macros", b"C": "connect", b"H": "helo", b"M": "mail", b"R": "rcpt", b"T": "data",
    b"L": "header", b"N": "eoh", b"B": "body", b"E": "end", b"A": "abort", b"Q": "quit", b"K": "quit_nc",
}  # fmt: skip
SILENT = ("abort", "quit", "quit_nc", "macros")


def packet(letter: bytes, data: bytes = b"") -> bytes:
    return struct.pack("!I", 1 + len(data)) + letter + data


def numbered(letter: bytes, number: int, *texts: bytes) -> bytes:
    return packet(letter, struct.pack("!I", number) + strings(*texts))


def strings(*texts: bytes) -> bytes:
    return b"".join(text + b"\0" for text in texts)


CONTINUE, ACCEPT, DISCARD, REJECT, TEMPFAIL, SKIP = (packet(letter) for letter in (b"c", b"a", b"d", b"r", b"t", b"s"))
PROGRESS, SHUTDOWN, CONNECTION_FAILURE = (packet(letter) for letter in (b"p", b"4", b"f"))


def negotiated(version: int = 6, actions: int = 0x1FF, steps: int = 0, lists: bytes = b"") -> bytes:
    return packet(b"O", struct.pack("!III", version, actions, steps) + lists)


class ScriptedMilter:
    """A filter, one thread a connection. Each step is answered as ``answers`` says, by its name in ``STAGES``, else by continue.

    An answer is bytes to send, b"" to say nothing, None to close the connection, or a function of the step's data that returns
    one of these.
    """

    def __init__(self, path: str | None = None, /, **answers: Answer) -> None:
        self.answers: dict[str, Answer] = {"negotiate": negotiated(), **answers}
        self.steps: list[tuple[str, bytes]] = []
        """What was reported, over all connections, without macros."""
        self.macros: dict[str, dict[bytes, bytes]] = {}
        """The last macros of each stage."""
        self.connections = 0
        self.closed = 0
        """Connections that have ended."""
        self.sock = socket.socket(socket.AF_UNIX if path else socket.AF_INET)
        self.sock.bind(path or ("127.0.0.1", 0))
        self.sock.listen(128)
        self.address = f"unix:{path}" if path else f"127.0.0.1:{self.sock.getsockname()[1]}"
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def names(self) -> list[str]:
        return [name for name, _ in self.steps]

    def data(self, name: str) -> list[bytes]:
        return [data for each, data in self.steps if each == name]

    def drop(self) -> None:
        """Close all connections, and go on listening."""
        for sock in self._open:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)
        self.sock.close()
        self.drop()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.sock.accept()
                self.connections += 1
                self._open.append(client)
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError, ValueError), client, client.makefile("rb") as packets:
            while self._step(client, packets):
                pass
        self.closed += 1

    def _step(self, client: socket.socket, packets: BinaryIO) -> bool:
        head = packets.read(5)
        if len(head) < 5:
            return False
        data = packets.read(struct.unpack("!I", head[:4])[0] - 1)
        name = STAGES[head[4:]]
        if name == "macros":
            texts = data[1:].split(b"\0")[:-1]
            self.macros[STAGES[data[:1]]] = dict(zip(texts[::2], texts[1::2], strict=True))
            return True
        self.steps.append((name, data))
        answer = self.answers.get(name, b"" if name in SILENT else CONTINUE)
        if callable(answer):
            answer = answer(data)
        if answer is None or name == "quit":
            client.shutdown(socket.SHUT_RDWR)
            return False
        client.sendall(answer)
        return True


class StartMilter(Protocol):
    """Starts a filter on a free port of this host, or on a Unix socket; it ends with the test."""

    def __call__(self, path: str | None = None, /, **answers: Answer) -> ScriptedMilter: ...


def one_by_one(answers: Iterable[Part]) -> Callable[[bytes], Part]:
    """The next of these answers each time."""
    rest = iter(answers)
    return lambda data: next(rest)
