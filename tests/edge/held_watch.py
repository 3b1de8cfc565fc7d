"""A read watch that is slow: its thread stops at a call, as on a busy machine, while the read that it ends returns."""

from __future__ import annotations

import os
import socket
import threading
import time

import pytest

from fumi_edge.tls import read_watch
from fumi_edge.tls.read_watch import CURRENT_READ, ReadWatch
from tests.support.waiting import PATIENCE

CALLS = ("getpeername", "dup2", "shutdown")


class HeldWatch:
    """Watches the calling thread. ``call`` is where the watch's thread stops: the descriptor's number is in its hands by then."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
        self._held, self._go_on = threading.Event(), threading.Event()
        duplicate, shutdown, getpeername = os.dup2, socket.socket.shutdown, socket.socket.getpeername

        def slow_getpeername(sock: socket.socket) -> object:
            self._hold(call == "getpeername")
            return getpeername(sock)

        def slow_dup2(fd: int, copy: int, inheritable: bool = True) -> int:
            self._hold(call == "dup2")
            return duplicate(fd, copy, inheritable)

        def slow_shutdown(sock: socket.socket, how: int) -> None:
            fd = sock.fileno()
            self._hold(call == "shutdown")
            numbered = socket.socket(fileno=fd)
            try:
                shutdown(numbered, how)
            finally:
                numbered.detach()

        monkeypatch.setattr(read_watch, "CHECK_SECONDS", 0.01)
        monkeypatch.setattr(read_watch, "MAX_READ_SECONDS", 0.1)
        monkeypatch.setattr(os, "dup2", slow_dup2)
        monkeypatch.setattr(socket.socket, "shutdown", slow_shutdown)
        monkeypatch.setattr(socket.socket, "getpeername", slow_getpeername)
        self._watch = ReadWatch()
        before = set(threading.enumerate())
        self._watch.start()
        (self._thread,) = set(threading.enumerate()) - before

    def _hold(self, here: bool) -> None:
        if here and threading.current_thread() is self._thread:
            self._held.set()
            assert self._go_on.wait(PATIENCE)

    def read(self, sock: socket.socket) -> None:
        """A read of the socket that the watch is about to end when it returns."""
        end = time.monotonic() + PATIENCE
        CURRENT_READ.begins(sock)
        while not self._held.is_set():
            assert time.monotonic() < end, "the watch did not make this call"
        CURRENT_READ.ends()

    def finish(self) -> None:
        """Let the watch's thread go on, and return when it has ended."""
        self._go_on.set()
        self._watch.close()
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()
