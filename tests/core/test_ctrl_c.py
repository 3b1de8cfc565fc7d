"""Ctrl-C in a terminal: the program drains, says what it waits for, and ends at once at the second one."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.core.client import Connect
from tests.core.programs import Start
from tests.support import starter
from tests.support.ports import free_port
from tests.support.programs import listening
from tests.support.waiting import PATIENCE, until

FLAGS = ("--proxy-protocol", "off", "--deliver", "discard:", "--drain-timeout", "600")


class Terminal:
    """A terminal with fumi-core in it; ``text`` is what it shows."""

    def __init__(self, directory: Path, *flags: str) -> None:
        ours, theirs = os.openpty()
        self.process = starter.start("fumi-core", *FLAGS, *flags, stdout=theirs, stderr=theirs, cwd=directory)
        os.close(theirs)
        self.text = ""
        self._reader = threading.Thread(target=self._read, args=[ours], daemon=True)
        self._reader.start()

    def _read(self, fd: int) -> None:
        # Reading fails when no process has the other side open.
        try:
            while shown := os.read(fd, 4096):
                self.text += shown.decode()
        except OSError:
            os.close(fd)

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)

    def end(self) -> int:
        status = self.process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        return status


@pytest.fixture(params=["1", "2"])
def terminal(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Terminal, int]]:
    port = free_port()
    terminal = Terminal(tmp_path, "--listen", f"127.0.0.1:{port}", "--workers", request.param)
    until(lambda: listening(port), "the start")
    yield terminal, port
    terminal.process.kill()
    terminal.process.wait()


def test_ctrl_c_prints_what_it_waits_for_and_the_second_one_ends_at_once(
    terminal: tuple[Terminal, int], connect: Connect
) -> None:
    program, port = terminal
    client = connect(port)
    client.say("EHLO client.example")
    client.say("MAIL FROM:<a@b.example>")
    program.interrupt()
    until(lambda: "draining connections=1" in program.text, "the drain")
    until(lambda: "\ndraining 1 connection (Ctrl-C again to quit)\r\n" in program.text, "the hint")
    assert client.say("RCPT TO:<c@d.example>") == b"250 2.1.5 Ok\r\n"
    program.interrupt()
    assert program.end() == 128 + signal.SIGINT


def test_ctrl_c_ends_a_program_without_connections_in_silence(terminal: tuple[Terminal, int]) -> None:
    program, _ = terminal
    program.interrupt()
    assert program.end() == 0
    assert "draining" not in program.text


def test_a_program_without_a_terminal_does_not_mention_ctrl_c(start: Start, connect: Connect) -> None:
    port = free_port()
    core = start(*FLAGS, "--listen", f"127.0.0.1:{port}")
    client = connect(port)
    client.say("EHLO client.example")
    client.say("MAIL FROM:<a@b.example>")
    core.process.send_signal(signal.SIGINT)
    until(lambda: "draining connections=1" in core.log.read_text(), "the drain")
    assert "Ctrl-C" not in core.log.read_text()
