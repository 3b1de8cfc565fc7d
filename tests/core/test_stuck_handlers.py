"""A handler that does not end is cancelled when no client waits any longer: nobody keeps a place for ever."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import threading
import time
from typing import Any

import pytest

from fumi_core import Fumi, Next
from fumi_core.server.dialogue import Dialogue
from fumi_core.testing import running
from tests.core.client import Connect
from tests.support.waiting import until

COMMANDS = {
    "connect": b"",
    "auth": b"EHLO x\r\nAUTH PLAIN AGEAYg==\r\n",
    "mail_from": b"EHLO x\r\nMAIL FROM:<>\r\n",
    "rcpt_to": b"EHLO x\r\nMAIL FROM:<>\r\nRCPT TO:<c@d.example>\r\n",
    "data": b"EHLO x\r\nMAIL FROM:<>\r\nRCPT TO:<c@d.example>\r\nDATA\r\nhi\r\n.\r\n",
}


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fumi_core.server.connection.HANDLER_SECONDS", 0.0)


def app_with(phase: str, ignored: int = 0) -> Fumi:
    """An app whose handler for this phase waits for ever, and ignores so many cancellations."""
    app = Fumi(
        auth_optional=True, allow_insecure_auth=True, max_clients=1, data_timeout=0.1, socket_timeout=0.1, close_timeout=0.2
    )

    async def wait(ctx: Any, next: Next) -> None:
        for _ in range(ignored):
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.Event().wait()
        await asyncio.Event().wait()

    getattr(app, "on_connect" if phase == "connect" else f"on_{phase}")(wait)
    return app


@pytest.mark.parametrize("phase", COMMANDS)
def test_a_handler_that_does_not_end_is_cancelled_and_answered(
    connect: Connect, caplog: pytest.LogCaptureFixture, phase: str
) -> None:
    with running(app_with(phase), record=False) as server:
        client = connect(server.port, banner=False)
        client.sock.sendall(COMMANDS[phase])
        while (reply := client.reply())[:3] not in (b"451", b"421"):
            assert reply
        expected = b"421 4.3.0 Server local error\r\n" if phase == "connect" else b"451 4.3.0 Local error in processing\r\n"
        assert reply == expected
        if phase != "connect":
            assert client.say("NOOP").startswith(b"250")  # the session goes on
        client.close()
    (line,) = [each for each in caplog.messages if each.startswith("handler does not end, cancelled")]
    assert f"hook=on_{phase}" in line


def test_a_handler_that_ignores_its_cancellation_does_not_keep_its_client(
    connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    with running(app_with("mail_from", ignored=1), record=False) as server:
        client = connect(server.port)
        client.sock.sendall(COMMANDS["mail_from"])
        assert client.reply().startswith(b"250")
        assert client.reply() == b"421 4.3.0 Server local error\r\n"
        assert client.reply() == b""
        client.close()
        until(lambda: connect(server.port).banner.startswith(b"220"), "the place of the client")
    assert "handler does not end, although it was cancelled" in caplog.text


def test_a_client_that_has_gone_leaves_its_place_although_the_handler_does_not_end(connect: Connect) -> None:
    with running(app_with("data"), record=False) as server:
        client = connect(server.port)
        client.sock.sendall(COMMANDS["data"])
        client.close()
        until(lambda: connect(server.port).banner.startswith(b"220"), "the place of the client")


@pytest.mark.parametrize("phase", ["data", "close"])
@pytest.mark.parametrize("ignored", [0, 1])
def test_a_handler_is_cancelled_although_its_client_has_gone(
    connect: Connect, caplog: pytest.LogCaptureFixture, phase: str, ignored: int
) -> None:
    caplog.set_level(logging.INFO, "fumi.core")
    app = app_with(phase, ignored)
    app.configure(logger=True)
    started = threading.Event()

    def starts(ctx: Any, next: Next) -> Any:
        started.set()
        return next()

    app.on_data(starts, first=True)
    with running(app, record=False) as server:
        client = connect(server.port)
        client.sock.sendall(COMMANDS["data"].removesuffix(b".\r\n"))
        assert started.wait(10)
        client.reset()
        until(lambda: "handler does not end, cancelled" in caplog.text, "the cancellation")
        outcome = "handler does not end, although it was cancelled" if ignored else "session ended"
        until(lambda: outcome in caplog.text, outcome)


def test_a_handler_has_its_whole_time_from_the_end_of_the_message(connect: Connect) -> None:
    app = Fumi(auth_optional=True, close_timeout=0.2)
    started, go_on = threading.Event(), threading.Event()

    @app.on_data
    async def slow(ctx: Any, next: Next) -> None:
        started.set()
        await asyncio.to_thread(go_on.wait)

    with running(app, record=False) as server:
        client = connect(server.port)
        client.envelope()
        assert client.say("DATA").startswith(b"354")
        client.sock.sendall(b"a line\r\n")
        started.wait()
        (dialogue,) = (each for each in gc.get_objects() if isinstance(each, Dialogue) and each.message_started)
        arriving, before = dialogue.awaited, time.monotonic()
        client.sock.sendall(b".\r\n")
        until(lambda: dialogue.awaited)
        ended = dialogue.awaited
        go_on.set()
        assert client.reply().startswith(b"250")
        client.close()
    assert arriving is None
    assert ended is not None
    assert ended >= before
