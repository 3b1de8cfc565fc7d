"""A TLS client that decides itself when its bytes go to the socket."""

from __future__ import annotations

import ctypes
import socket
import ssl


class Engine:
    """A client's TLS apart from its socket: after the handshake, what it has to send stays in it until ``flush()``."""

    def __init__(self, sock: socket.socket, context: ssl.SSLContext) -> None:
        self.sock = sock
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._in, self._out, server_hostname="localhost")
        while True:
            try:
                self._tls.do_handshake()
                return
            except ssl.SSLWantReadError:
                self.flush()
                self._in.write(sock.recv(65536))

    def flush(self) -> None:
        self.sock.sendall(self._out.read())

    def write(self, data: bytes) -> None:
        for start in range(0, len(data), 16384):
            self._tls.write(data[start : start + 16384])

    def read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            try:
                data += self._tls.read(65536)
            except ssl.SSLWantReadError:
                received = self.sock.recv(65536)
                assert received, f"the end after {len(data)} bytes"
                self._in.write(received)
        return data

    def update_key(self) -> None:
        update_key(self._tls)


def update_key(tls: ssl.SSLObject | ssl.SSLSocket) -> None:
    """Change our key, and request the other side to change its own (RFC 8446 §4.6.3): ssl has no such call, OpenSSL has."""
    import _ssl

    openssl = ctypes.CDLL(getattr(_ssl, "__file__", None))
    # PyObject_HEAD, the socket, and then the SSL that Python wraps.
    inner: object = tls._sslobj  # type: ignore[union-attr]
    pointer = ctypes.c_void_p.from_address(id(inner) + object.__basicsize__ + ctypes.sizeof(ctypes.c_void_p))
    assert openssl.SSL_key_update(pointer, 1) == 1
