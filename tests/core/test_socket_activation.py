"""fumi-core with sockets that systemd passes."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.core.client import Connect
from tests.core.programs import PROGRAM

Activate = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0), backlog=128) as sock:
        yield sock


@pytest.fixture
def activate(tmp_path: Path) -> Iterator[Activate]:
    """Start a program as systemd does: with sockets from descriptor 3 on, and their names."""
    running = []

    def start(sockets: dict[str, socket.socket], *flags: str) -> subprocess.Popen[bytes]:
        numbers = [sock.fileno() for sock in sockets.values()]
        # Out of the way first: one of them may be 3 itself.
        moves = "".join(f"exec {number + 200}<&{number}\n" for number in numbers)
        moves += "".join(f"exec {3 + at}<&{number + 200} {number + 200}<&-\n" for at, number in enumerate(numbers))
        names = ":".join(sockets)
        script = f'{moves}LISTEN_PID=$$ LISTEN_FDS={len(numbers)} LISTEN_FDNAMES={names} exec "$@"'
        with (tmp_path / "log").open("ab") as log:
            command = ["bash", "-c", script, "bash", PROGRAM, "--proxy-protocol", "off", "--deliver", "discard:", *flags]
            process = subprocess.Popen(command, stderr=log, cwd=tmp_path, pass_fds=numbers)
        running.append(process)
        return process

    yield start
    for process in running:
        if process.poll() is None:
            process.kill()
        process.wait()


def stop(process: subprocess.Popen[bytes]) -> int:
    process.terminate()
    return process.wait(60)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_passed_sockets_are_the_default_listeners(
    activate: Activate, listener: socket.socket, connect: Connect, workers: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as second:
        process = activate({"a": listener, "b": second}, "--workers", workers)
        for sock in (listener, second):
            client = connect(sock.getsockname()[1])
            assert client.banner.startswith(b"220")
            client.close()
        assert stop(process) == 0


def test_sockets_are_chosen_by_their_names(activate: Activate, listener: socket.socket, connect: Connect) -> None:
    with socket.create_server(("127.0.0.1", 0)) as second, socket.create_server(("127.0.0.1", 0)) as third:
        process = activate({"smtp": listener, "other": second}, "--listen", "fd:other", "--banner", "chosen")
        client = connect(second.getsockname()[1])
        assert b"chosen" in client.banner
        client.close()
        assert stop(process) == 0
        process = activate({"smtp": third}, "--listen", "fd:smtps")
        assert process.wait(60) == 2


class Sender:
    """Sends one message after the other, each by a connection of its own, until ``close()``; 421 means to come again."""

    def __init__(self, address: tuple[str, int]) -> None:
        self.sent = 0
        self.problems: list[str] = []
        self._address = address
        self._done = False
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def close(self) -> None:
        self._done = True
        self._thread.join()

    def send_some(self) -> None:
        enough = self.sent + 20
        while self.sent < enough:
            assert self._thread.is_alive()
            time.sleep(0.01)

    def _run(self) -> None:
        while not self._done:
            try:
                self.sent += self._send()
            except OSError as error:
                self.problems.append(repr(error))

    def _send(self) -> bool:
        with socket.create_connection(self._address, timeout=60) as sock, sock.makefile("rb") as replies:
            for line in (b"", b"HELO x\r\n", b"MAIL FROM:<a@b.example>\r\n", b"RCPT TO:<c@d.example>\r\n", b"DATA\r\n", b".\r\n"):
                sock.sendall(line)
                reply = replies.readline()
                if reply.startswith(b"421"):
                    return False
                if reply[:1] not in (b"2", b"3"):
                    self.problems.append(f"{reply!r} for {line!r}")
                    return False
        return True


@pytest.mark.parametrize("workers", ["1", "2"])
def test_no_connection_is_refused_or_reset_across_a_restart(activate: Activate, listener: socket.socket, workers: str) -> None:
    with contextlib.closing(Sender(listener.getsockname())) as sender:
        for _ in range(3):
            process = activate({"smtp": listener}, "--workers", workers)
            sender.send_some()
            assert stop(process) == 0
        process = activate({"smtp": listener}, "--workers", workers)
        sender.send_some()
    assert stop(process) == 0
    assert sender.problems == []
