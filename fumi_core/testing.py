"""For tests of apps: ``with running(app) as server:`` serves an app in a thread and records the messages that it accepted.

with running(Fumi(auth_optional=True)) as server:
    smtplib.SMTP("127.0.0.1", server.port).sendmail("a@example.com", ["b@example.com"], "Subject: hi\\r\\n\\r\\nhi\\r\\n")
    assert server.messages[0].body.endswith(b"hi\\r\\n")
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from fumi_core.app import Fumi
from fumi_core.handlers.contexts import DataContext
from fumi_core.handlers.middleware import Next
from fumi_core.smtp.session import Envelope, Session

T = TypeVar("T")


@dataclass(slots=True)
class RecordedMessage:
    """A message that was answered 250: its session, its envelope, and its content with CRLF line ends."""

    session: Session
    envelope: Envelope
    body: bytes


class RunningServer:
    """A running server: its ``host``, its ``port``, and its ``messages``, a list of those that it has accepted so far."""

    def __init__(self, app: Fumi, loop: asyncio.AbstractEventLoop, messages: list[RecordedMessage]) -> None:
        self.app = app
        self.host = "127.0.0.1"
        self.port = app.port
        self.messages = messages
        self._loop = loop

    def run(self, function: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Call a coroutine function in the server's event loop. Returns its result; raises TimeoutError after 30 seconds."""
        return asyncio.run_coroutine_threadsafe(function(), self._loop).result(30)


@contextmanager
def running(app: Fumi, *, record: bool = True) -> Iterator[RunningServer]:
    """Serve ``app`` on a free port of 127.0.0.1 until the ``with`` block ends.

    Accepted messages are recorded by a handler that is added before those of the app; ``record=False`` adds none. Raises
    OSError if it cannot listen.
    """
    messages: list[RecordedMessage] = []
    recorder = _record(app, messages) if record else None
    try:
        with _loop_in_thread() as loop:
            try:
                asyncio.run_coroutine_threadsafe(app.listen(0, "127.0.0.1"), loop).result(30)
                yield RunningServer(app, loop, messages)
            finally:
                asyncio.run_coroutine_threadsafe(app.close(), loop).result(60)
    finally:
        if recorder is not None:
            app.forget("data", recorder)


@contextmanager
def _loop_in_thread() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="fumi", daemon=True)
    thread.start()
    try:
        yield loop
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


def _record(app: Fumi, messages: list[RecordedMessage]) -> Callable[..., Any]:
    """Add a handler before those of the app, so that it gets the content even if they replace it or do not read it."""

    async def recorder(ctx: DataContext, next: Next) -> None:
        envelope, pieces = ctx.session.envelope, list[bytes]()
        ctx.stream.tap(pieces.append)
        await next()
        await ctx.stream.skip()
        if not ctx.size_exceeded and not all(each.address in ctx.rejected for each in envelope.rcpt_to):
            messages.append(RecordedMessage(ctx.session, envelope, b"".join(pieces)))

    return app.on_data(recorder, first=True)
