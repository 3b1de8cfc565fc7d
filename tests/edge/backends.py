"""Backends for the edge, in threads: the small SMTP server, one that goes down and up, and functions over several."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Callable
from typing import Protocol

from fumi_edge.backends.choice import Backends
from tests.support.peer import Peer
from tests.support.ports import kept_port
from tests.support.waiting import until

Handler = Callable[[Peer], object]
"""What a backend does with one connection."""


class StartBackend(Protocol):
    """The fixture ``backend``."""

    def __call__(
        self, handler: Handler = ..., *, proxy: bool = True, path: str | None = None, tls: ssl.SSLContext | None = None
    ) -> Backend: ...


class MakePool(Protocol):
    """The fixture ``pool``."""

    def __call__(self, *addresses: str, timeout: float = 20.0, balance: str = "leastconn") -> Backends: ...


def smtp(peer: Peer) -> None:
    """A small SMTP server: answers 250 to everything, takes DATA, and keeps what it received in ``peer.heard``."""
    peer.say(b"220 backend.test ESMTP\r\n")
    while line := peer.line():
        peer.heard.append(line)
        verb = line.split()[0].upper() if line.split() else b""
        if verb in (b"EHLO", b"LHLO"):
            peer.say(b"250-backend.test\r\n250-PIPELINING\r\n250 SIZE 1000\r\n")
        elif verb == b"DATA":
            peer.say(b"354 go ahead\r\n")
            while (content := peer.line()) not in (b".\r\n", b""):
                peer.heard.append(content)
            peer.say(b"250 2.0.0 queued\r\n")
        elif verb == b"QUIT":
            peer.say(b"221 2.0.0 bye\r\n")
            return
        else:
            peer.say(b"250 2.0.0 ok\r\n")


class Backend:
    """A backend in threads: ``handler`` is run with a Peer for every connection; ``peers`` are those that came, probes apart.

    With ``tls`` it is one over TLS. ``failures`` are the handshakes that failed, ``resumed`` counts the sessions that were,
    and ``shown`` has what the clients' certificates say.
    """

    def __init__(self, handler: Handler, proxy: bool = True, path: str | None = None, tls: ssl.SSLContext | None = None) -> None:
        self._handler = handler
        self._proxy = proxy
        self._tls = tls
        self.failures: list[OSError] = []
        self.resumed = 0
        self.shown: list[str] = []
        self._port = kept_port()
        if path:
            self._listening = socket.socket(socket.AF_UNIX)
            self._listening.bind(path)
            self._listening.listen(64)
            self.address = f"unix:{path}"
        else:
            self._listening = socket.create_server(self._port.getsockname(), backlog=64)
            self.address = f"127.0.0.1:{self._listening.getsockname()[1]}"
        if tls:
            self.address = f"tls:{self.address}"
        self.peers: list[Peer] = []
        self.errors: list[Exception] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._listening.accept()
                threading.Thread(target=self._serve, args=(Peer(sock),), daemon=True).start()

    def _upgraded(self, peer: Peer) -> Peer:
        if self._tls is None:
            return peer
        try:
            sock = self._tls.wrap_socket(peer.sock, server_side=True, suppress_ragged_eofs=False)
        except OSError as error:
            self.failures.append(error)
            raise
        self.resumed += bool(sock.session_reused)
        self.shown.append(repr(sock.getpeercert()))
        return Peer(sock)

    def _serve(self, peer: Peer) -> None:
        try:
            peer = self._upgraded(peer)
            if self._proxy:
                peer.take_header()
            if peer.received is None or peer.received.command == "PROXY":
                self.peers.append(peer)
            self._handler(peer)
        except (OSError, EOFError):
            pass
        except Exception as error:
            self.errors.append(error)
        finally:
            if isinstance(peer.sock, ssl.SSLSocket) and peer.sock.fileno() >= 0:
                peer.sock.setblocking(False)
                with contextlib.suppress(OSError, ValueError):
                    peer.sock.unwrap()  # sends close_notify
            peer.close()

    def peer(self, number: int = 0) -> Peer:
        until(lambda: len(self.peers) > number, "a connection to the backend")
        return self.peers[number]

    def close(self) -> None:
        """Go down: connections are refused."""
        # close() alone leaves the thread in accept() to take one more.
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()

    def give_up(self) -> None:
        """The port too."""
        self.close()
        self._port.close()


def opening(peer: Peer, tls: bool) -> None:
    """What a backend does to get a plaintext client out of the preamble."""
    if not tls:
        peer.say(b"220 ready\r\n")
        assert peer.line() == b"BDAT\r\n"


def backend_flags(*backends: Backend | Flapping) -> list[str]:
    return [word for each in backends for word in ("--backend", each.address)]


def counts(*servers: Backend) -> list[int]:
    return [len(each.peers) for each in servers]


class Flapping:
    """A relay in front of a backend that goes down and up."""

    def __init__(self) -> None:
        self._kept = kept_port()
        self.port = self._kept.getsockname()[1]
        self.address = f"127.0.0.1:{self.port}"
        self._listening: socket.socket | None = None

    def appear(self) -> None:
        self._listening = socket.create_server(("127.0.0.1", self.port), backlog=64)
        threading.Thread(target=self._accept, args=(self._listening,), daemon=True).start()

    def vanish(self) -> None:
        assert self._listening is not None
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()

    def _accept(self, listening: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self._serve, args=(Peer(listening.accept()[0]),), daemon=True).start()

    def _serve(self, peer: Peer) -> None:
        with contextlib.suppress(OSError, EOFError):
            peer.take_header()
            smtp(peer)
        peer.close()
