"""Whether a server sends its banner: for readiness checks and ``--check``. Blocks, so it is called in a thread."""

from __future__ import annotations

import socket
import time

from fumi_core.client.replies import Malformed, ReceivedReply, ReplyReader
from fumi_core.runtime.addresses import SocketAddress

TIMEOUT = 5.0
"""Seconds for each of the name's addresses to connect; and, from the start, for the banner."""


def dependency_problem(address: SocketAddress) -> str | None:
    """Why the server accepts no mail, in a few words; None when it greets with 220."""
    deadline = time.monotonic() + TIMEOUT
    try:
        with _connect(address) as sock:
            banner = _banner(sock, deadline)
            sock.sendall(b"QUIT\r\n")
    except TimeoutError:
        return "no banner in time"
    except OSError as error:
        return error.strerror or str(error)
    except Malformed as error:
        return str(error)
    return None if banner.code == 220 else f"unexpected banner: {banner}"


def _connect(address: SocketAddress) -> socket.socket:
    if address.kind == "tcp":
        return socket.create_connection((address.host, address.port), timeout=TIMEOUT)
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.settimeout(TIMEOUT)
        sock.connect(address.path)
    except BaseException:
        sock.close()
        raise
    return sock


def _banner(sock: socket.socket, deadline: float) -> ReceivedReply:
    reader = ReplyReader()
    while True:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        sock.settimeout(left)
        data = sock.recv(4096)
        if not data:
            raise ConnectionResetError("connection closed without a banner")
        for reply in reader.feed(data):
            return reply
