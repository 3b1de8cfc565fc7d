"""Our own load generator, a program of its own so that its CPU is nobody's figure. Status 0 means that all it asked for came.

`messages`    SMTP in lock-step as Postfix's smtp-source does it, MAIL, RCPT, DATA and body each awaiting a reply; plain or TLS.
`handshakes`  full TLS 1.3 handshakes: a connection counts when it brought a banner with its own port in it, and then EOF.
`transfer`    blocks up or down one TLS connection, compared by SHA-256.
`idle`        TLS connections that are opened, kept, and made to take a message, as standard input says.

Blocking sockets, and a process for each session: none waits for another's interpreter lock, and ten of them saturate a server.
"""

import argparse
import hashlib
import os
import socket
import ssl
import sys
import traceback
from collections.abc import Callable
from typing import BinaryIO, NoReturn

from .blocks import BLOCK, blocks, digest

SILENCE = 60.0
LINE = b"X" * 78 + b"\r\n"
SERVER_NAME = "localhost"


class Refused(Exception):
    """The server said or did something other than what was asked of it."""


def connect(port: int) -> socket.socket:
    """A plain connection to 127.0.0.1; every wait on it ends after SILENCE seconds."""
    return socket.create_connection(("127.0.0.1", port), timeout=SILENCE)


def tls_context() -> ssl.SSLContext:
    """TLS 1.3 only; no session is kept, so all handshakes are full. The certificate is not checked: it is not what is tested."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def connect_tls(port: int, context: ssl.SSLContext) -> ssl.SSLSocket:
    """A TLS connection whose end must be announced: EOF without close_notify is an ssl.SSLEOFError."""
    return context.wrap_socket(connect(port), server_hostname=SERVER_NAME, suppress_ragged_eofs=False)


def expect(stream: BinaryIO, code: bytes) -> None:
    """Read one reply, of several lines maybe; Refused unless it has this code."""
    line = stream.readline()
    while line[3:4] == b"-":
        line = stream.readline()
    if not line.startswith(code) or not line.endswith(b"\n"):
        raise Refused(f"{line!r} instead of {code.decode()}")


def body(size: int) -> bytes:
    """A header and lines of 80 bytes, `size` bytes to within one line, and the dot that ends them."""
    header = b"From: <a@example.com>\r\nTo: <b@example.net>\r\nSubject: bench\r\n\r\n"
    return header + LINE * ((size - len(header)) // len(LINE)) + b".\r\n"


def dialogue(message: bytes, count: int = 1) -> list[tuple[bytes, bytes]]:
    """What a client says to send a message so many times, and the code that it is to hear."""
    transaction = [(b"MAIL FROM:<a@example.com>\r\n", b"250"), (b"RCPT TO:<b@example.net>\r\n", b"250")]
    transaction += [(b"DATA\r\n", b"354"), (message, b"250")]
    return [(b"EHLO localhost\r\n", b"250"), *transaction * count]


def send_messages(connection: socket.socket, count: int, message: bytes) -> None:
    """One SMTP session of `count` messages, every reply checked."""
    with connection, connection.makefile("rb") as replies:
        expect(replies, b"220")
        for said, code in [*dialogue(message, count), (b"QUIT\r\n", b"221")]:
            connection.sendall(said)
            expect(replies, code)


def send_over(port: int, tls: bool, connections: int, count: int, message: bytes) -> None:
    """So many connections, one after the other, `count` messages on each."""
    for _ in range(connections):
        send_messages(connect_tls(port, tls_context()) if tls else connect(port), count, message)


def shake_hands(port: int, count: int) -> None:
    """`count` connections, one after the other, each from handshake to banner and EOF."""
    context = tls_context()
    for _ in range(count):
        with connect_tls(port, context) as connection:
            said = b"".join(iter(lambda: connection.recv(4096), b""))
            expect_delivered(said.decode(), connection.getsockname()[1])


def expect_delivered(banner: str, own_port: int) -> None:
    """Refused unless the backend was told this very connection: `220 VERSION ADDRESS PORT TLS` with our port, and TLS not 0."""
    if banner.split()[2:4] != ["127.0.0.1", str(own_port)] or banner.split()[4] == "0":
        raise Refused(f"banner {banner!r} for port {own_port}")


def transfer(port: int, direction: str, count: int) -> None:
    """Send (`up`) or fetch (`down`) `count` blocks over one connection."""
    expected = digest(count)
    with connect_tls(port, tls_context()) as connection:
        connection.sendall(f"{direction[0].upper()} {count}\n".encode())
        if direction == "up":
            for block in blocks(count):
                connection.sendall(block)
            arrived = b"".join(iter(lambda: connection.recv(4096), b"")).decode().strip()
        else:
            arrived = digest_until_eof(connection)
    if arrived != expected:
        raise Refused(f"digest {arrived!r} of {count * BLOCK} bytes {direction} instead of {expected!r}")


def digest_until_eof(connection: socket.socket) -> str:
    """SHA-256 in hex of all that a connection still brings."""
    total, buffer = hashlib.sha256(), memoryview(bytearray(64 * 1024))
    while received := connection.recv_into(buffer):
        total.update(buffer[:received])
    return total.hexdigest()


def idle(port: int) -> None:
    """Obey standard input, saying `done` to each line: `open n` opens n more connections, `ask` sends a message on every one."""
    context, transaction = tls_context(), dialogue(body(1024))
    connections: list[ssl.SSLSocket] = []
    for command, *count in map(str.split, sys.stdin):
        if command == "open":
            connections += open_idle(port, context, int(count[0]))
        else:
            for connection in connections:
                for said, code in transaction:
                    connection.sendall(said)
                    expect_at_once(connection, code)
        print("done", flush=True)


def open_idle(port: int, context: ssl.SSLContext, count: int) -> list[ssl.SSLSocket]:
    """TLS connections whose banners have been read: after all are open, for smtp-server takes 100 ms for a banner."""
    opened = [connect_tls(port, context) for _ in range(count)]
    for connection in opened:
        expect_at_once(connection, b"220")
    return opened


def expect_at_once(connection: ssl.SSLSocket, code: bytes) -> None:
    """Read a reply that comes in one record, without the buffer that a file on each of thousands of sockets would take."""
    reply = connection.recv(1024)
    if not reply.startswith(code) or not reply.endswith(b"\n"):
        raise Refused(f"{reply!r} instead of {code.decode()}")


def in_processes(sessions: int, work: Callable[[], None]) -> None:
    """Do the same in `sessions` processes at a time; SystemExit when it failed in one."""
    children = [fork(work) for _ in range(sessions)]
    statuses = [os.waitpid(child, 0)[1] for child in children]
    if any(statuses):
        raise SystemExit(1)


def fork(work: Callable[[], None]) -> int:
    """Start a process that does this and ends; its pid."""
    pid = os.fork()
    if pid == 0:
        end_after(work)
    return pid


def end_after(work: Callable[[], None]) -> NoReturn:
    """Do this, and leave a forked process by the exit that runs nothing of the parent's."""
    status = 1
    try:
        work()
        status = 0
    except Exception:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def parsed_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("load", choices=["messages", "handshakes", "transfer", "idle"])
    parser.add_argument("port", type=int)
    parser.add_argument("--sessions", type=int, default=1, help="connections at a time")
    parser.add_argument("--connections", type=int, help="connections in all, for messages (default: one a session)")
    parser.add_argument("--count", type=int, default=1, help="messages, handshakes or blocks, in all")
    parser.add_argument("--size", type=int, default=1024, help="bytes of a message")
    parser.add_argument("--tls", action="store_true")
    parser.add_argument("--direction", choices=["up", "down"], default="up")
    asked = parser.parse_args()
    asked.connections = asked.connections or asked.sessions
    if asked.count % asked.connections or asked.connections % asked.sessions:
        parser.error("--count must be a multiple of --connections, and that of --sessions, so that no unit is lost")
    return asked


def main() -> None:
    """Do what the command line says."""
    asked = parsed_arguments()
    share = asked.count // asked.sessions
    if asked.load == "messages":
        message, connections = body(asked.size), asked.connections // asked.sessions
        in_processes(
            asked.sessions, lambda: send_over(asked.port, asked.tls, connections, asked.count // asked.connections, message)
        )
    elif asked.load == "handshakes":
        in_processes(asked.sessions, lambda: shake_hands(asked.port, share))
    elif asked.load == "transfer":
        transfer(asked.port, asked.direction, asked.count)
    else:
        idle(asked.port)


if __name__ == "__main__":
    main()
