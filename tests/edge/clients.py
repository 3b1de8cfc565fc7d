"""Clients of the edge: plaintext, TLS, and openssl's own."""

from __future__ import annotations

import os
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from tests.edge.program import Program
from tests.edge.replies import READY
from tests.support.peer import Peer
from tests.support.waiting import PATIENCE

Greet = Callable[[Program], Peer]
"""The fixture ``greeted``."""


class Dial(Protocol):
    """The fixture ``dial``."""

    def __call__(self, path: Path, context: ssl.SSLContext | None = None) -> Peer: ...


class Clients:
    """Makes clients of 127.0.0.1 and closes them in the end."""

    def __init__(self, authority: Path) -> None:
        self.authority = authority
        self._peers: list[Peer] = []

    def context(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=str(self.authority))

    def plain(self, port: int, buffer: int | None = None) -> Peer:
        sock = socket.socket()
        if buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
        sock.settimeout(PATIENCE)
        sock.connect(("127.0.0.1", port))
        return self._keep(Peer(sock))

    def tls(self, port: int, name: str = "localhost", context: ssl.SSLContext | None = None, buffer: int | None = None) -> Peer:
        return self.upgrade(self.plain(port, buffer), name, context)

    def upgrade(self, peer: Peer, name: str = "localhost", context: ssl.SSLContext | None = None) -> Peer:
        # With ragged ends not suppressed, a stream that ends without close_notify is an error.
        sock = (context or self.context()).wrap_socket(peer.sock, server_hostname=name, suppress_ragged_eofs=False)
        return self._keep(Peer(sock))

    def starttls(self, peer: Peer) -> Peer:
        """Upgrade a client in plaintext by STARTTLS."""
        assert peer.ask(b"STARTTLS\r\n") == READY
        return self.upgrade(peer)

    def _keep(self, peer: Peer) -> Peer:
        self._peers.append(peer)
        return peer

    def close(self) -> None:
        for peer in self._peers:
            peer.close()


class Connect:
    """Connects through the tunnel, over TLS or on the STARTTLS port without upgrading."""

    def __init__(self, clients: Clients, tls: bool) -> None:
        self.tls = tls
        self._clients = clients

    def __call__(self, program: Program, buffer: int | None = None) -> Peer:
        if self.tls:
            return self._clients.tls(program.tls_port, buffer=buffer)
        client = self._clients.plain(program.starttls_port, buffer=buffer)
        assert client.line() == b"220 ready\r\n"
        client.say(b"BDAT\r\n")
        return client


def s_client(port: int, *flags: str | Path, starttls: bool = False, say: str = "QUIT\r\n", letters: bool = False) -> str:
    """What openssl s_client prints until the connection ends. With ``letters`` what it is to say are commands to itself."""
    command = ["openssl", "s_client", "-connect", f"127.0.0.1:{port}", *map(str, flags)]
    command += ["-starttls", "smtp"] if starttls else []
    command += [] if letters else ["-ign_eof"]
    # Said before it starts, since it may end before it listens; and its input stays open, since its end would end it.
    listening, saying = os.pipe()
    os.write(saying, say.encode())
    with subprocess.Popen(command, stdin=listening, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        os.close(listening)
        watchdog = threading.Timer(PATIENCE, process.kill)
        watchdog.start()
        assert process.stdout is not None
        printed = process.stdout.read()
        watchdog.cancel()
    os.close(saying)
    assert process.returncode >= 0, printed
    return printed
