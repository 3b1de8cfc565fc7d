"""Backends that do more than answer, and what tests ask about several of them."""

from __future__ import annotations

import contextlib
import socket
import threading

from tests.ports import kept_port


def opening(peer, tls):
    """What a backend does to get a plaintext client out of the preamble."""
    if not tls:
        peer.say(b"220 ready\r\n")
        assert peer.line() == b"BDAT\r\n"


def backend_flags(*backends):
    return [word for each in backends for word in ("--backend", each.address)]


def counts(*servers):
    return [len(each.peers) for each in servers]


class Flapping:
    """Stands before a backend, there one moment and gone the next."""

    def __init__(self, kit):
        self._kept = kept_port()
        self.port = self._kept.getsockname()[1]
        self.address = f"127.0.0.1:{self.port}"
        self._kit = kit
        self._listening = None

    def appear(self):
        self._listening = socket.create_server(("127.0.0.1", self.port), backlog=64)
        threading.Thread(target=self._accept, args=(self._listening,), daemon=True).start()

    def vanish(self):
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()

    def _accept(self, listening):
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self._serve, args=(self._kit.Peer(listening.accept()[0]),), daemon=True).start()

    def _serve(self, peer):
        peer.heard = []
        with contextlib.suppress(OSError, EOFError):
            peer.take_header()
            self._kit.smtp(peer)
        peer.close()
