"""A server with Dovecot's authentication protocol that sends what a test prescribes, right or wrong."""

from __future__ import annotations

import base64
import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Protocol

AUTH_HANDSHAKE = "VERSION\t1\t2\nMECH\tPLAIN\tplaintext\nMECH\tLOGIN\nMECH\tXOAUTH2\nSPID\t7\nCUID\t8\nCOOKIE\t90\nDONE\n"
USERDB_HANDSHAKE = "VERSION\t1\t1\nSPID\t7\n"


class Peer:
    """One connection of a client: its lines as fields, and what the test sends."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._file = sock.makefile("rb")

    def lines(self) -> Iterator[list[str]]:
        for line in self._file:
            yield line.decode().removesuffix("\n").split("\t")

    def requests(self) -> Iterator[list[str]]:
        """The client's lines after its handshake."""
        return (fields for fields in self.lines() if fields[0] not in ("VERSION", "CPID"))

    def send(self, *fields: str) -> None:
        self.raw("\t".join(fields) + "\n")

    def raw(self, text: str | bytes) -> None:
        self.sock.sendall(text if isinstance(text, bytes) else text.encode())


def response(fields: list[str]) -> bytes:
    """The decoded ``resp=`` of AUTH, or the response of CONT."""
    assert fields[0] in ("AUTH", "CONT")
    return base64.b64decode(fields[-1].removeprefix("resp="))


class DovecotServer:
    """Runs ``serve`` with each connection, in a thread; an exception there is kept in ``errors``."""

    def __init__(self, serve: Callable[[Peer], object], port: int = 0) -> None:
        self.connections = 0
        self.errors: list[BaseException] = []
        self._serve = serve
        self._socks: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", port))
        self.port: int = self._listener.getsockname()[1]
        self.address = f"127.0.0.1:{self.port}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                self.connections += 1
                self._socks.append(sock)
                threading.Thread(target=self._run, args=(sock,), daemon=True).start()

    def _run(self, sock: socket.socket) -> None:
        try:
            self._serve(Peer(sock))
        except OSError:
            pass  # the client has disconnected
        except BaseException as error:
            self.errors.append(error)
        finally:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    def drop(self) -> None:
        """Disconnect all clients."""
        for sock in self._socks:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.drop()


class StartDovecot(Protocol):
    """Starts a server; it ends with the test, which fails if ``serve`` did."""

    def __call__(self, serve: Callable[[Peer], object], port: int = 0) -> DovecotServer: ...
