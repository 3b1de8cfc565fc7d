"""Reading a message: whole, or an error; never less of it without one."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest

from fumi_core import Address, DataContext, Fumi, MailContext, Next, RcptContext
from fumi_core.testing import running
from tests.core.client import Client, Connect
from tests.support.waiting import until

TEXT = b"first\r\nsecond\r\n"


@pytest.fixture
def app() -> Fumi:
    return Fumi(auth_optional=True, name="mx.example", close_timeout=0.2)


def deliver(client: Client) -> bytes:
    client.envelope()
    client.say("DATA")
    return bytes(client.say(TEXT + b"."))


async def reads(ctx: DataContext) -> None:
    assert await ctx.stream.read() == TEXT


async def iterates(ctx: DataContext) -> None:
    async for _ in ctx.stream:
        pass


async def peeks(ctx: DataContext) -> None:
    async for _ in ctx.stream:
        break


async def takes_one(ctx: DataContext) -> None:
    await anext(ctx.stream)


async def skips(ctx: DataContext) -> None:
    await ctx.stream.skip()


async def taps(ctx: DataContext) -> None:
    ctx.stream.tap(len)


@pytest.mark.parametrize("second", [reads, iterates, taps])
@pytest.mark.parametrize("first", [reads, iterates, peeks, takes_one, skips])
def test_a_handler_after_one_that_read_fails_with_451(
    app: Fumi, connect: Connect, caplog: pytest.LogCaptureFixture, first: Any, second: Any
) -> None:
    delivered: list[int] = []

    @app.on_data
    async def outer(ctx: DataContext, next: Next) -> None:
        await first(ctx)
        await next()

    @app.on_data
    async def inner(ctx: DataContext, next: Next) -> None:
        await second(ctx)
        delivered.append(1)

    with running(app, record=False) as server:
        assert deliver(connect(server.port)).startswith(b"451 ")
    assert delivered == []
    assert "RuntimeError" in caplog.text


def test_one_reader_may_stop_and_go_on(app: Fumi, connect: Connect) -> None:
    got: list[bytes] = []

    @app.on_data
    async def data(ctx: DataContext, next: Next) -> None:
        pieces = aiter(ctx.stream)
        got.append(await anext(pieces))
        got.extend([piece async for piece in pieces])

    with running(app, record=False) as server:
        assert deliver(connect(server.port)).startswith(b"250 ")
    assert b"".join(got) == TEXT


def test_a_task_that_outlives_the_handlers_gets_an_error_and_not_a_short_message(app: Fumi, connect: Connect) -> None:
    outcomes: list[bytes | str] = []
    tasks: list[asyncio.Task[None]] = []
    reading = threading.Event()

    @app.on_data
    async def data(ctx: DataContext, next: Next) -> None:
        async def read() -> None:
            try:
                outcomes.append(await ctx.stream.read())
            except RuntimeError as error:
                outcomes.append(str(error))

        tasks.append(asyncio.create_task(read()))
        await asyncio.sleep(0)
        reading.set()

    with running(app, record=False) as server:
        client = connect(server.port)
        client.envelope()
        client.say("DATA")
        client.sock.sendall(b"first\r\n")
        assert reading.wait(60)
        assert client.say(b"second\r\n.").startswith(b"250 ")
        until(lambda: bool(outcomes))
    assert "dropped" in str(outcomes[0])


def test_of_two_readers_at_once_the_second_gets_an_error(app: Fumi, connect: Connect) -> None:
    @app.on_data
    async def data(ctx: DataContext, next: Next) -> None:
        found = await asyncio.gather(ctx.stream.read(), ctx.stream.read(), return_exceptions=True)
        assert [type(each) for each in found] == [bytes, RuntimeError]

    with running(app, record=False) as server:
        client = connect(server.port)
        client.envelope()
        client.say("DATA")
        client.sock.sendall(b"first\r\n")
        assert client.say(b"second\r\n.").startswith(b"250 ")


@pytest.mark.parametrize("hook", ["on_connect", "on_auth", "on_mail_from", "on_rcpt_to", "on_data", "on_close"])
@pytest.mark.parametrize("handler", [lambda ctx: None, lambda ctx, next, more: None, [].append, "text", None])
def test_a_handler_that_cannot_be_called_is_refused_when_registered(app: Fumi, hook: str, handler: Any) -> None:
    with pytest.raises(TypeError, match=hook):
        getattr(app, hook)(handler)


def test_generators_and_coroutine_plugins_are_refused_when_registered(app: Fumi) -> None:
    async def yields(ctx: object, next: Next) -> AsyncIterator[None]:
        yield

    async def plugin(app: Fumi) -> None:
        pass

    with pytest.raises(TypeError, match="must not yield"):
        app.on_data(yields)  # type: ignore[type-var]
    with pytest.raises(TypeError, match="plain function"):
        app.use(plugin)  # type: ignore[arg-type]


class Callable_:
    async def __call__(self, ctx: object, next: Next) -> None:
        await next()


@pytest.mark.parametrize("handler", [Callable_(), lambda *all: all[1](), lambda ctx, next, more=1: next(), lambda a, b, /: None])
def test_whatever_takes_a_context_and_next_is_a_handler(app: Fumi, handler: Any) -> None:
    assert app.on_data(handler) is handler


async def returns_text(ctx: object, next: Next) -> object:
    return "550 5.7.1 no"


async def returns_false(ctx: object, next: Next) -> object:
    return False


def plainly_returns_text(ctx: object, next: Next) -> object:
    return "550 no"


@pytest.mark.parametrize("handler", [returns_text, returns_false, plainly_returns_text])
@pytest.mark.parametrize("hook", ["on_mail_from", "on_rcpt_to", "on_data"])
def test_a_handler_that_returns_a_reply_accepts_nothing(
    app: Fumi, connect: Connect, caplog: pytest.LogCaptureFixture, hook: str, handler: Any
) -> None:
    getattr(app, hook)(handler)
    with running(app) as server:
        client = connect(server.port)
        client.sock.sendall(b"EHLO x\r\nMAIL FROM:<>\r\nRCPT TO:<a@b.example>\r\nBDAT 4 LAST\r\nhi\r\nQUIT\r\n")
        codes = []
        while reply := client.reply():
            codes.append(reply[:3])
        assert codes.count(b"451") == 1
        assert server.messages == []
    assert "ctx.reject" in caplog.text
    assert handler.__name__ in caplog.text


def returns_next(ctx: object, next: Next) -> object:
    return next()


async def returns_next_later(ctx: object, next: Next) -> object:
    return next()


async def returns_what_next_gave(ctx: object, next: Next) -> object:
    return await next()  # type: ignore[func-returns-value]


@pytest.mark.parametrize("handler", [returns_next, returns_next_later, returns_what_next_gave])
def test_a_handler_may_return_what_next_gave(app: Fumi, connect: Connect, handler: Any) -> None:
    app.on_data(handler)
    app.on_data(handler)
    with running(app) as server:
        assert deliver(connect(server.port)).startswith(b"250 ")
        assert len(server.messages) == 1


@pytest.mark.parametrize(
    ("options", "warned"),
    [
        ({}, "no on_auth handler"),
        ({"auth_optional": True}, ""),
        ({"disabled_commands": ["AUTH"]}, ""),
        ({"authenticates": True}, "needs TLS"),
        ({"authenticates": True, "allow_insecure_auth": True}, ""),
        ({"authenticates": True, "proxy_protocol": "required"}, ""),
        ({"authenticates": True, "assume_tls": True}, ""),
    ],
)
def test_an_app_that_no_client_can_send_mail_to_says_so(
    caplog: pytest.LogCaptureFixture, options: dict[str, Any], warned: str
) -> None:
    options = dict(options)
    authenticates = options.pop("authenticates", False)
    app = Fumi(**options)
    if authenticates:
        app.on_auth(lambda ctx, next: ctx.accept("joe"))
    with running(app):
        pass
    assert ("no client can send mail" in caplog.text) is bool(warned)
    assert warned in caplog.text


def test_the_error_for_swapped_code_and_message_names_the_order(
    app: Fumi, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    app.on_mail_from(lambda ctx, next: ctx.reject(550, "no"))
    with running(app) as server:
        client = connect(server.port)
        client.say("EHLO x")
        assert client.say("MAIL FROM:<>").startswith(b"451")
    assert "the message comes first, then the code: write ('no', 550)" in caplog.text


def test_an_assigned_address_is_what_later_handlers_and_the_envelope_get(app: Fumi, connect: Connect) -> None:
    seen: list[str] = []

    @app.on_mail_from
    async def sender(ctx: MailContext, next: Next) -> None:
        ctx.address = Address("list@b.example", ctx.address.args)
        await next()

    @app.on_rcpt_to
    async def alias(ctx: RcptContext, next: Next) -> None:
        ctx.address = ctx.address._replace(address="joe@d.example")
        await next()

    app.on_mail_from(lambda ctx, next: seen.append(ctx.address.address))
    app.on_rcpt_to(lambda ctx, next: seen.append(ctx.address.address))
    with running(app) as server:
        assert deliver(connect(server.port)).startswith(b"250 ")
        envelope = server.messages[0].envelope
        assert envelope.mail_from == Address("list@b.example", {})
        assert [each.address for each in envelope.rcpt_to] == ["joe@d.example"]
    assert seen == ["list@b.example", "joe@d.example"]


@pytest.mark.parametrize(
    "address", ["", "joe@d.example> NOTIFY=NEVER", "joe@d.example>\r\nRSET", "a b@c.example", "@x.example:j@y"]
)
def test_text_that_is_no_address_cannot_be_assigned(
    app: Fumi, connect: Connect, caplog: pytest.LogCaptureFixture, address: str
) -> None:
    @app.on_rcpt_to
    async def alias(ctx: RcptContext, next: Next) -> None:
        ctx.address = Address(address, {})

    with running(app) as server:
        client = connect(server.port)
        client.say("EHLO x")
        client.say("MAIL FROM:<>")
        assert client.say("RCPT TO:<c@d.example>").startswith(b"451 ")
    assert "ValueError" in caplog.text


def test_the_state_of_a_session_is_the_apps(app: Fumi, connect: Connect) -> None:
    app.on_mail_from(lambda ctx, next: ctx.session.state.setdefault("sender", ctx.address) and None)
    with running(app) as server:
        deliver(connect(server.port))
        assert server.messages[0].session.state == {"sender": Address("a@b.example", {})}
        deliver(connect(server.port))
        assert server.messages[1].session.state is not server.messages[0].session.state


def test_only_accepted_messages_are_recorded(connect: Connect) -> None:
    app = Fumi(auth_optional=True, lmtp=True, close_timeout=0.2)

    @app.on_data
    async def data(ctx: DataContext, next: Next) -> None:
        ctx.reject_recipient("b@d.example", "No", 550)

    with running(app) as server:
        client = connect(server.port)
        for recipients in (b"RCPT TO:<b@d.example>\r\n" * 2, b"RCPT TO:<b@d.example>\r\nRCPT TO:<c@d.example>\r\n"):
            client.sock.sendall(b"LHLO x\r\nMAIL FROM:<>\r\n" + recipients + b"DATA\r\nhi\r\n.\r\n")
            assert [client.reply()[:3] for _ in range(6)] == [b"250"] * 4 + [b"354", b"550"]
            client.reply()
        assert len(server.messages) == 1


def test_a_test_server_that_cannot_listen_leaves_no_thread(app: Fumi, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fails(*arguments: object) -> None:
        raise OSError("no such port")

    monkeypatch.setattr(app, "listen", fails)
    threads = threading.active_count()
    with pytest.raises(OSError, match="no such port"), running(app):
        pass
    assert threading.active_count() == threads
    monkeypatch.undo()
    with running(app) as server:
        assert server.port
