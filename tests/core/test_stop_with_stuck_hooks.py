"""fumi-core ends although a hook does not."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.core.client import Connect
from tests.support.ports import free_port
from tests.support.programs import listening
from tests.support.starter import BIN
from tests.support.waiting import until

# The first MAIL leaves a thread in a call that does not return; "busy@" keeps the event loop itself.
STUCK = """
import asyncio, threading, time
from pathlib import Path
from fumi_core import Fumi

app = Fumi(auth_optional=True, close_timeout=0.1)

@app.on_mail_from
async def stick(ctx, next):
    Path("stuck").touch()
    if ctx.address.address.startswith("busy@"):
        time.sleep(1000)
    await asyncio.to_thread(threading.Event().wait)
"""


Stuck = Callable[..., tuple[subprocess.Popen[bytes], Path]]


@pytest.fixture
def stuck(tmp_path: Path, connect: Connect) -> Iterator[Stuck]:
    """The real program, whose interpreter waits for threads at its end, with one that does not end."""
    (tmp_path / "stuck.py").write_text(STUCK)
    running: list[subprocess.Popen[bytes]] = []

    def run(sender: str, *flags: str) -> tuple[subprocess.Popen[bytes], Path]:
        port, log = free_port(), tmp_path / "stderr"
        command = [str(BIN / "fumi-core"), "--proxy-protocol", "off", "--listen", f"127.0.0.1:{port}", *flags, "stuck:app"]
        with log.open("wb") as stderr:
            running.append(subprocess.Popen(command, cwd=tmp_path, stderr=stderr))
        until(lambda: listening(port))
        client = connect(port)
        client.say("EHLO client.example")
        client.sock.sendall(f"MAIL FROM:<{sender}>\r\n".encode())
        until((tmp_path / "stuck").exists)
        return running[-1], log

    yield run
    for process in running:
        process.kill()
        process.wait()


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_program_ends_although_a_hook_sits_in_a_thread(stuck: Stuck, workers: str) -> None:
    process, log = stuck("a@b.example", "--workers", workers)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    assert "Traceback" not in log.read_text()


@pytest.mark.parametrize("sender", ["a@b.example", "busy@b.example"])
def test_a_second_signal_ends_the_program_whatever_a_hook_does(stuck: Stuck, sender: str) -> None:
    process, log = stuck(sender, "--drain-timeout", "1000")
    process.send_signal(signal.SIGTERM)
    if not sender.startswith("busy@"):
        until(lambda: "stopping" in log.read_text())
    process.send_signal(signal.SIGINT)
    # Where the first has not been handled yet, Python takes them by their numbers.
    assert process.wait(60) in (128 + signal.SIGTERM, 128 + signal.SIGINT)
    assert "Traceback" not in log.read_text()


def test_two_stop_signals_in_one_turn_are_two(stuck: Stuck) -> None:
    process, log = stuck("a@b.example", "--drain-timeout", "1000")
    for number in (signal.SIGSTOP, signal.SIGTERM, signal.SIGINT, signal.SIGCONT):
        process.send_signal(number)
    assert process.wait(60) in (128 + signal.SIGTERM, 128 + signal.SIGINT)
    assert "Traceback" not in log.read_text()
