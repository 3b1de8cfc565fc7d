"""Messages that a handler keeps, parses or replaces, and what the handlers and the delivery after it get."""

from __future__ import annotations

import asyncio
import errno
import os
import tempfile
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from fumi_core import DataContext, Fumi, MessageAborted, Next
from fumi_core.delivery.maildir import Maildir
from fumi_core.handlers.spool import Spool
from fumi_core.handlers.stream import MessageStream
from fumi_core.testing import running
from tests.core.client import Client, Connect
from tests.support.waiting import until

SMALL = b"Subject: hi\r\n\r\nsmall\r\n"
LARGE = b"Subject: hi\r\n\r\n" + b"x" * 70 + b"\r\n" + (b"0123456789" * 7 + b"\r\n") * 12_000
TEXTS = {"in memory": SMALL, "in a file": LARGE}


@pytest.fixture
def app() -> Fumi:
    return Fumi(auth_optional=True, name="mx.example", close_timeout=0.2)


def deliver(client: Client, text: bytes = SMALL) -> bytes:
    client.envelope()
    client.say("DATA")
    return bytes(client.say(text + b"."))


def open_temporary_files() -> int:
    links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    return sum("(deleted)" in os.readlink(link) for link in links if os.path.islink(link))


async def read(ctx: DataContext) -> bytes:
    return b"".join([piece async for piece in ctx.stream])


def test_a_message_that_arrives_in_tiny_pieces_is_not_read_far_ahead_of_a_slow_handler() -> None:
    async def pieces_until_full() -> int:
        resumed = asyncio.Event()
        stream = MessageStream(None, resumed.set)
        pieces = 0
        while not stream.full:
            stream.feed(b"ab")
            pieces += 1
        reader = aiter(stream)
        for _ in range(pieces):
            assert not resumed.is_set()
            assert await anext(reader) == b"ab"
        assert resumed.is_set()
        assert not stream.full
        return pieces

    assert 500 < asyncio.run(pieces_until_full()) < 2000


def test_a_message_that_arrives_in_tiny_pieces_is_not_kept_in_them() -> None:
    async def kept() -> list[bytes]:
        spool = Spool()
        for at in range(0, 60_000, 2):
            await spool.write(LARGE[at : at + 2])
            await spool.write(b"")
        return [piece async for piece in spool.read()]

    pieces = asyncio.run(kept())
    assert b"".join(pieces) == LARGE[:60_000]
    assert len(pieces) < 30


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_a_kept_message_is_read_any_number_of_times(app: Fumi, connect: Connect, text: bytes) -> None:
    found: list[bytes] = []
    before = open_temporary_files()

    @app.on_data
    async def outer(ctx: DataContext, next: Next) -> None:
        await ctx.spool()
        found.append(await ctx.stream.read())
        await next()
        found.extend(await asyncio.gather(ctx.stream.read(), read(ctx)))

    @app.on_data
    async def inner(ctx: DataContext, next: Next) -> None:
        async for _ in ctx.stream:
            break
        await ctx.spool()
        assert open_temporary_files() == before + (len(text) > 256 * 1024)
        found.append(await read(ctx))
        assert ctx.stream.size == len(text)

    with running(app) as server:
        assert deliver(connect(server.port), text).startswith(b"250 ")
        assert found == [text] * 4
        assert server.messages[0].body == text
        until(lambda: open_temporary_files() == before)


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_a_kept_message_is_delivered(app: Fumi, connect: Connect, tmp_path: Path, text: bytes) -> None:
    @app.on_data
    async def scan(ctx: DataContext, next: Next) -> None:
        message = await ctx.message()
        assert message["Subject"] == "hi"
        assert message.get_content().encode() == text.removeprefix(b"Subject: hi\r\n\r\n")
        await next()

    app.use(Maildir(tmp_path / "m"))
    with running(app, record=False) as server:
        assert deliver(connect(server.port), text).startswith(b"250 ")
    (delivered,) = (tmp_path / "m" / "new").iterdir()
    assert delivered.read_bytes().endswith(text.replace(b"\r\n", b"\n"))


def test_a_message_that_was_read_cannot_be_kept(app: Fumi, connect: Connect) -> None:
    @app.on_data
    async def data(ctx: DataContext, next: Next) -> None:
        await ctx.stream.read()
        await ctx.spool()

    with running(app, record=False) as server:
        assert deliver(connect(server.port)).startswith(b"451 ")


@pytest.mark.parametrize(
    ("number", "code"), [(errno.ENOSPC, b"452 4.3.1"), (errno.EDQUOT, b"452 4.3.1"), (errno.EIO, b"451 4.3.0")]
)
def test_a_full_disk_is_452(app: Fumi, connect: Connect, monkeypatch: pytest.MonkeyPatch, number: int, code: bytes) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(tempfile, "TemporaryFile", full)

    @app.on_data
    async def data(ctx: DataContext, next: Next) -> None:
        await ctx.spool()

    with running(app, record=False) as server:
        client = connect(server.port)
        assert deliver(client, LARGE).startswith(code)
        assert deliver(client, SMALL).startswith(b"250 ")


def test_a_client_that_disconnects_leaves_no_temporary_file(app: Fumi, connect: Connect) -> None:
    before = open_temporary_files()
    ended: list[str] = []

    @app.on_data
    async def data(ctx: DataContext, next: Next) -> None:
        try:
            await ctx.spool()
        except MessageAborted:
            ended.append("aborted")
            raise

    with running(app, record=False) as server:
        client = connect(server.port)
        client.envelope()
        client.say("DATA")
        client.sock.sendall(LARGE)
        until(lambda: open_temporary_files() == before + 1)
        client.close()
        until(lambda: ended == ["aborted"])
        until(lambda: open_temporary_files() == before)


def test_a_task_that_outlives_the_handlers_cannot_read_what_was_kept(app: Fumi, connect: Connect) -> None:
    errors: list[str] = []
    tasks: list[asyncio.Task[None]] = []
    ended = threading.Event()

    @app.on_data
    async def data(ctx: DataContext, next: Next) -> None:
        await ctx.spool()

        async def late() -> None:
            await asyncio.to_thread(ended.wait, 60)
            try:
                await ctx.stream.read()
            except RuntimeError as error:
                errors.append(str(error))

        tasks.append(asyncio.create_task(late()))

    with running(app, record=False) as server:
        assert deliver(connect(server.port)).startswith(b"250 ")
        ended.set()
        until(lambda: bool(errors))


async def upper(stream: Any) -> AsyncIterator[bytes]:
    async for piece in stream:
        yield piece.upper()


async def torn() -> AsyncIterator[bytes]:
    for piece in (b"a\r", b"\nb\n", b"", b"c\rd\r"):
        yield piece


@pytest.mark.parametrize(
    ("replacement", "expected"),
    [
        (lambda ctx: b"Subject: new\n\nother\n", b"Subject: new\r\n\r\nother\r\n"),
        (lambda ctx: bytearray(b".\r\n"), b".\r\n"),
        (lambda ctx: upper(ctx.stream), SMALL.upper()),
        (lambda ctx: torn(), b"a\r\nb\r\nc\r\nd\r\n"),
        (lambda ctx: b"", b""),
    ],
)
@pytest.mark.parametrize("kept", [False, True])
def test_the_handlers_after_get_the_replacement(
    app: Fumi, connect: Connect, tmp_path: Path, replacement: Any, expected: bytes, kept: bool
) -> None:
    found: list[bytes] = []

    @app.on_data
    async def replaces(ctx: DataContext, next: Next) -> None:
        ctx.replace(replacement(ctx))
        await next()

    @app.on_data
    async def looks(ctx: DataContext, next: Next) -> None:
        if kept:
            await ctx.spool()
            found.append(await ctx.stream.read())
            assert ctx.stream.size == len(expected)
        await next()

    app.use(Maildir(tmp_path / "m"))
    with running(app, record=False) as server:
        client = connect(server.port)
        assert deliver(client).startswith(b"250 ")
        assert client.say("NOOP").startswith(b"250 ")
    assert found == [expected] * kept
    (delivered,) = (tmp_path / "m" / "new").iterdir()
    assert delivered.read_bytes().endswith(expected.replace(b"\r\n", b"\n"))


def test_a_changed_message_replaces_the_clients(app: Fumi, connect: Connect) -> None:
    found: list[bytes] = []

    @app.on_data
    async def marks(ctx: DataContext, next: Next) -> None:
        message = await ctx.message()
        message["X-Marked"] = "yes"
        ctx.replace(message.as_bytes())
        await next()

    @app.on_data
    async def looks(ctx: DataContext, next: Next) -> None:
        found.append(await ctx.stream.read())

    with running(app, record=False) as server:
        assert deliver(connect(server.port)).startswith(b"250 ")
    assert found == [b"Subject: hi\r\nX-Marked: yes\r\n\r\nsmall\r\n"]


@pytest.mark.parametrize("replacement", [lambda: b"other\r\n", torn])
def test_a_replacement_of_a_message_that_breaks_off_is_not_delivered(
    app: Fumi, connect: Connect, tmp_path: Path, replacement: Any
) -> None:
    closed: list[int] = []

    @app.on_data
    async def replaces(ctx: DataContext, next: Next) -> None:
        ctx.replace(replacement())
        await next()

    app.use(Maildir(tmp_path / "m"))
    app.on_close(lambda ctx, next: closed.append(1))
    with running(app, record=False) as server:
        client = connect(server.port)
        client.envelope()
        client.say("DATA")
        client.sock.sendall(b"half\r\n")
        client.close()
        until(lambda: closed == [1])
    assert list((tmp_path / "m" / "new").iterdir()) == []


async def fails() -> AsyncIterator[bytes]:
    yield b"a"
    raise ValueError("broken iterator")


async def text() -> AsyncIterator[Any]:
    yield "text"


@pytest.mark.parametrize("replacement", [fails, text, lambda: "text", lambda: [b"a"]])
def test_a_replacement_that_fails_is_451(
    app: Fumi, connect: Connect, caplog: pytest.LogCaptureFixture, tmp_path: Path, replacement: Any
) -> None:
    @app.on_data
    async def replaces(ctx: DataContext, next: Next) -> None:
        ctx.replace(replacement())
        await next()

    app.use(Maildir(tmp_path / "m"))
    with running(app, record=False) as server:
        assert deliver(connect(server.port)).startswith(b"451 4.3.0")
    assert list((tmp_path / "m" / "new").iterdir()) == []
    assert "Traceback" in caplog.text


def test_a_replacement_that_is_too_large_for_a_plugin_is_552(app: Fumi, connect: Connect) -> None:
    @app.on_data
    async def replaces(ctx: DataContext, next: Next) -> None:
        ctx.replace(b"x" * 100)
        ctx.stream.restrict(50)
        await next()

    with running(app, record=False) as server:
        assert deliver(connect(server.port)).startswith(b"552 5.3.4")


def test_refusing_and_tapping_work_for_a_replacement(app: Fumi, connect: Connect) -> None:
    tapped: list[bytes] = []

    @app.on_data
    async def replaces(ctx: DataContext, next: Next) -> None:
        ctx.replace(upper(ctx.stream))

        def look(piece: bytes) -> None:
            tapped.append(piece)
            ctx.reject("No capitals", 554)

        ctx.stream.tap(look)
        await ctx.stream.read()

    with running(app, record=False) as server:
        assert deliver(connect(server.port)) == b"554 5.7.1 No capitals\r\n"
    assert b"".join(tapped) == SMALL.upper()
