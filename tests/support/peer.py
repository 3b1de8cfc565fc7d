"""One end of a connection, for tests that play a client or a server line by line."""

from __future__ import annotations

import socket
import ssl

from fumi_core.proxy_protocol import ProxyHeader, TLSInfo, parse
from tests.support.waiting import PATIENCE


class Peer:
    """A socket with lines: the backend's side of a connection, or a client."""

    def __init__(self, sock: socket.socket, buffered: bytes = b"") -> None:
        sock.settimeout(PATIENCE)
        self.sock = sock
        self.received: ProxyHeader | None = None
        """The PROXY header, once ``take_header()`` has read it."""
        self.heard: list[bytes] = []
        """What a backend's handler notes of what it received."""
        self._buffered = buffered

    @property
    def header(self) -> ProxyHeader:
        assert self.received is not None
        return self.received

    @property
    def client_tls(self) -> TLSInfo:
        """What the PROXY header says of the client's TLS."""
        assert self.header.tls is not None
        return self.header.tls

    @property
    def unique_id(self) -> str:
        """The PROXY header's UNIQUE_ID."""
        assert self.header.unique_id is not None
        return self.header.unique_id.decode()

    @property
    def tls(self) -> ssl.SSLSocket:
        """The socket of a peer with TLS."""
        assert isinstance(self.sock, ssl.SSLSocket)
        return self.sock

    def more(self) -> bool:
        try:
            data = self.sock.recv(65536)
        except ssl.SSLZeroReturnError:
            return False
        self._buffered += data
        return bool(data)

    def line(self) -> bytes:
        """The next line with its end; what there was before the end of the stream."""
        while b"\n" not in self._buffered and self.more():
            pass
        line, end, self._buffered = self._buffered.partition(b"\n")
        return line + end

    def reply(self) -> list[bytes]:
        """The lines of one SMTP reply."""
        lines = [self.line()]
        while lines[-1][3:4] == b"-":
            lines.append(self.line())
        return lines

    def rest(self) -> bytes:
        """Everything up to the end of the stream."""
        pieces = [self._buffered]
        self._buffered = b""
        while self.more():
            pieces.append(self._buffered)
            self._buffered = b""
        return b"".join(pieces)

    def say(self, data: bytes) -> None:
        self.sock.sendall(data)

    def ask(self, command: bytes) -> list[bytes]:
        self.say(command)
        return self.reply()

    def take_header(self) -> None:
        while (parsed := parse(self._buffered)) is None:
            if not self.more():
                raise EOFError
        self.received, used = parsed
        self._buffered = self._buffered[used:]

    def end(self) -> None:
        """End this side and leave the other open; over TLS, where Python cannot, without a close_notify."""
        socket.socket.shutdown(self.sock, socket.SHUT_WR)

    def reset(self) -> None:
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.close()

    def close(self) -> None:
        self.sock.close()
