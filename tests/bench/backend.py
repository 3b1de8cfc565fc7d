"""The backend of the TLS proxies in the benchmarks: reads the PROXY header, v1 or v2, and has its values in the banner.

`PORT greet`     banner, then close.
`PORT hold`      banner, then silence: an idle connection.
`PORT transfer`  no banner; after `U n` it takes n blocks and answers their SHA-256, after `D n` it sends n blocks; then close.

With CERTIFICATE and KEY behind these words, all of it over TLS.

The banner is `220 VERSION ADDRESS PORT TLS`, where TLS is 1 or 0 as the SSL TLV says, and `-` in v1, which has none: a client
that reads its own port there knows that its connection was delivered. It is not fumi_core that parses the header here, so that no
mistake can hide itself.
"""

import contextlib
import hashlib
import io
import socket
import ssl
import sys
import threading
from collections.abc import Callable
from typing import BinaryIO, NamedTuple

from .blocks import BLOCK, blocks

THREADS = 8
SILENCE = 60.0
SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
PROXY_V2_TCP4 = b"\x21\x11"
TCP4_LENGTH = 12
PP2_TYPE_SSL = 0x20
PP2_CLIENT_SSL = 0x01
TLS_HANDSHAKE = b"\x16"


class BadHeader(Exception):
    """What the terminator sent is not the PROXY header of a TCP4 client."""


class Header(NamedTuple):
    """The client that the terminator speaks for; `tls` is 1, 0 or -."""

    version: str
    address: str
    port: int
    tls: str


def read_header(stream: BinaryIO) -> Header:
    """The PROXY header that a connection begins with."""
    start = stream.read(16)
    if start.startswith(SIGNATURE + PROXY_V2_TCP4):
        return parse_v2(stream.read(int.from_bytes(start[14:16], "big")))
    if start.startswith(b"PROXY TCP4 "):
        address, _, port, _ = (start + stream.readline()).decode().split()[2:]
        return Header("v1", address, int(port), "-")
    raise BadHeader(repr(start))


def parse_v2(payload: bytes) -> Header:
    """What follows the 16 fixed bytes of a v2 header: TCP4 addresses and TLVs."""
    port = int.from_bytes(payload[8:10], "big")
    tls, tlvs = "0", payload[TCP4_LENGTH:]
    while tlvs:
        length = int.from_bytes(tlvs[1:3], "big")
        if tlvs[0] == PP2_TYPE_SSL and tlvs[3] & PP2_CLIENT_SSL:
            tls = "1"
        tlvs = tlvs[3 + length :]
    return Header("v2", socket.inet_ntoa(payload[:4]), port, tls)


def greet(connection: socket.socket, stream: BinaryIO) -> None:
    """The banner, which is all that this connection gets."""
    connection.sendall("220 {} {} {} {}\r\n".format(*read_header(stream)).encode())


held: list[socket.socket] = []


def hold(connection: socket.socket, stream: BinaryIO) -> None:
    """The banner, and a second descriptor that keeps the connection open until this process ends."""
    greet(connection, stream)
    held.append(connection.dup())


def transfer(connection: socket.socket, stream: BinaryIO) -> None:
    """One upload or download, as the client's first line says."""
    read_header(stream)
    direction, count = stream.readline().split()
    if direction == b"D":
        for block in blocks(int(count)):
            connection.sendall(block)
    else:
        connection.sendall(digest_of(stream, int(count) * BLOCK).encode() + b"\r\n")


def digest_of(stream: BinaryIO, size: int) -> str:
    """SHA-256 in hex of the next `size` bytes; of fewer when the stream ends before."""
    total, buffer = hashlib.sha256(), memoryview(bytearray(256 * 1024))
    while size and (count := stream.readinto1(buffer[: min(size, len(buffer))])):  # type: ignore[attr-defined]
        total.update(buffer[:count])
        size -= count
    return total.hexdigest()


TALKS: dict[str, Callable[[socket.socket, BinaryIO], None]] = {"greet": greet, "hold": hold, "transfer": transfer}


def serve(listener: socket.socket, talk: Callable[[socket.socket, BinaryIO], None], tls: ssl.SSLContext | None) -> None:
    """Take one connection after the other, for ever."""
    while True:
        connection, _ = listener.accept()
        connection.settimeout(SILENCE)
        # A probe that only connects sends no header; who is gone or lied finds its banner missing. None of it ends the server.
        with contextlib.suppress(OSError, BadHeader, ValueError), contextlib.ExitStack() as stack:
            stack.enter_context(connection)
            if tls is None:
                talk(connection, stack.enter_context(connection.makefile("rb")))
                continue
            before = header_before_tls(connection)
            encrypted = stack.enter_context(tls.wrap_socket(connection, server_side=True))
            talk(encrypted, io.BufferedReader(Prefixed(before, encrypted)))
            encrypted.unwrap()


class Prefixed(io.RawIOBase):
    """A connection's stream, with bytes in front of it."""

    def __init__(self, before: bytes, connection: socket.socket) -> None:
        self._before = before
        self._connection = connection

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        if self._before:
            count = min(len(buffer), len(self._before))
            buffer[:count], self._before = self._before[:count], self._before[count:]
            return count
        return self._connection.recv_into(buffer)


def header_before_tls(connection: socket.socket) -> bytes:
    """HAProxy sends its PROXY header before TLS; others send it inside, and then this is empty."""
    if connection.recv(1, socket.MSG_PEEK) == TLS_HANDSHAKE:
        return b""
    start = connection.recv(16, socket.MSG_WAITALL)
    return start + connection.recv(int.from_bytes(start[14:16], "big"), socket.MSG_WAITALL)


def main(port: str, name: str, certificate: str = "", key: str = "") -> None:
    """Serve until killed. Several threads, as a terminator may take its time between connecting and sending the header."""
    listener = socket.create_server(("127.0.0.1", int(port)), backlog=1024)
    tls = None
    if certificate:
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(certificate, key)
    for _ in range(THREADS):
        threading.Thread(target=serve, args=(listener, TALKS[name], tls)).start()


if __name__ == "__main__":
    main(*sys.argv[1:])
