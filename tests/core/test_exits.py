"""An app calls sys.exit() where no handler waits for it: in a task or a callback of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.core.client import Connect
from tests.core.programs import Start
from tests.support.ports import free_port
from tests.support.waiting import until

# The message is accepted after the exit.
APP = """
import asyncio, sys
from fumi_core import Fumi

app = Fumi(auth_optional=True, name="mx.example")

async def leave():
    {leave}

@app.on_data
async def deliver(ctx, next):
    await ctx.stream.read()
    if ctx.session.client_hostname == "last.example":
        await asyncio.wait([asyncio.create_task(leave())])
"""
CALLBACK = "loop = asyncio.get_running_loop(); loop.call_soon(sys.exit, 3); await asyncio.sleep(0)"
LOGGED = "ERROR fumi.core the app ended the program outside a hook, stopping"


def flags(directory: Path, leave: str, port: int) -> list[str]:
    (directory / "leaving.py").write_text(APP.format(leave=leave))
    return ["--proxy-protocol", "off", "--listen", f"127.0.0.1:{port}", "--workers", "1", "leaving:app"]


def deliver(connect: Connect, port: int, name: str) -> bytes:
    client = connect(port)
    client.say(f"EHLO {name}")
    client.say("MAIL FROM:<a@b.example>")
    client.say("RCPT TO:<c@d.example>")
    client.say("DATA")
    reply = client.say("hi\r\n.")
    client.close()
    return reply


@pytest.mark.parametrize(
    ("leave", "status", "shown"),
    [
        ("sys.exit(3)", 3, "SystemExit: 3"),
        ("sys.exit()", 0, "SystemExit"),
        ("sys.exit('enough')", 1, "SystemExit: enough"),
        ("raise KeyboardInterrupt", 130, "KeyboardInterrupt"),
        (CALLBACK, 3, "SystemExit: 3"),
    ],
    ids=["with a status", "without", "with a text", "interrupt", "in a callback"],
)
def test_the_message_that_arrives_is_answered_and_the_log_says_why_it_stops(
    start: Start, connect: Connect, tmp_path: Path, leave: str, status: int, shown: str
) -> None:
    program = start(*flags(tmp_path, leave, port := free_port()))
    idle = connect(port)
    assert deliver(connect, port, "last.example").startswith(b"250")
    assert idle.reply().startswith(b"421")
    idle.close()
    assert program.process.wait(60) == status
    log = program.log.read_text()
    assert log.count(LOGGED) == 1
    reason = log.partition(LOGGED)[2].partition("INFO fumi.core stopping signal=SIGTERM")[0]
    assert shown in map(str.strip, reason.splitlines())


def test_a_second_exit_does_not_cut_off_what_the_first_lets_end(start: Start, connect: Connect, tmp_path: Path) -> None:
    twice = "asyncio.get_running_loop().call_soon(sys.exit, 4); sys.exit(3)"
    program = start(*flags(tmp_path, twice, port := free_port()))
    assert deliver(connect, port, "last.example").startswith(b"250")
    assert program.process.wait(60) == 3
    assert program.log.read_text().count(LOGGED) == 2


def test_another_worker_takes_the_place_of_one_that_exits(start: Start, connect: Connect, tmp_path: Path) -> None:
    port = free_port()
    program = start(*flags(tmp_path, "sys.exit(3)", port), "--workers", "2")
    assert deliver(connect, port, "last.example").startswith(b"250")
    until(lambda: 'reason="exit status 3"' in program.log.read_text(), "the end of the worker")
    assert LOGGED in program.log.read_text()
    assert deliver(connect, port, "next.example").startswith(b"250")
    assert program.stop() == 0
