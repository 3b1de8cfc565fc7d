"""Whatever an app or a plugin raises: one reply for each command, a log entry with traceback, and a connection that times out."""

from __future__ import annotations

import asyncio
import logging
import traceback
from collections.abc import Callable
from typing import Any

import pytest

from fumi_core import ConnectContext, DataContext, Fumi, MailContext, Next, SMTPError
from fumi_core.server.observer import DeliveryResult, Observer
from fumi_core.testing import running
from tests.core.client import Connect, Send
from tests.support.waiting import until

LAST_REPLY = b"421 4.3.0 Server local error\r\n"
LOCAL_ERROR = b"451 4.3.0 Local error in processing\r\n"


@pytest.fixture
def app() -> Fumi:
    return Fumi(auth_optional=True, name="mx.example", close_timeout=0.2, logger=True)


def raises(error: Callable[[], BaseException], *, late: bool = False) -> Any:
    async def handler(ctx: object, next: Next) -> None:
        if late:
            await asyncio.sleep(0)
        raise error()

    return handler


class Unfinished(SMTPError):
    """An SMTPError without code and message."""

    def __init__(self) -> None:
        pass


class Mute:
    def __str__(self) -> str:
        raise ValueError("no words")


def changed(**attributes: object) -> SMTPError:
    error = SMTPError("no", 550)
    vars(error).update(attributes)
    return error


ERRORS: dict[str, Callable[[], BaseException]] = {
    "exception": lambda: ValueError("oops"),
    "exit": lambda: SystemExit(3),
    "generator exit": lambda: GeneratorExit(),
    "cancelled": lambda: asyncio.CancelledError(),
    "base": lambda: BaseException("oops"),
    "without code": Unfinished,
    "message without text": lambda: SMTPError(Mute(), 550),  # type: ignore[arg-type]
    "message that is a number": lambda: changed(message=Mute()),
    "code that accepts": lambda: changed(code=250),
    "code that is text": lambda: changed(code="550"),
    "code with a fraction": lambda: changed(code=550.5),
}


@pytest.mark.parametrize("late", [False, True], ids=["at once", "after waiting"])
@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
def test_whatever_a_hook_raises_is_451_and_the_server_goes_on(
    app: Fumi, connect: Connect, caplog: pytest.LogCaptureFixture, error: Callable[[], BaseException], late: bool
) -> None:
    app.on_rcpt_to(raises(error, late=late))
    with running(app) as server, caplog.at_level(logging.ERROR):
        other, client = connect(server.port), connect(server.port)
        client.say("EHLO x")
        client.say("MAIL FROM:<a@b.example>")
        assert client.say("RCPT TO:<c@d.example>") == LOCAL_ERROR
        assert client.say("NOOP") == b"250 2.0.0 Ok\r\n"
        assert other.say("NOOP") == b"250 2.0.0 Ok\r\n"
    assert "hook=on_rcpt_to command=RCPT" in caplog.text
    assert "Traceback" in caplog.text


@pytest.mark.parametrize("hook", ["on_auth", "on_mail_from", "on_rcpt_to", "on_data"])
def test_the_log_names_the_hook_and_the_command(connect: Connect, caplog: pytest.LogCaptureFixture, hook: str) -> None:
    app = Fumi(auth_optional=True, allow_insecure_auth=True, close_timeout=0.2)
    getattr(app, hook)(raises(ERRORS["exit"]))
    with running(app, record=False) as server, caplog.at_level(logging.ERROR):
        client = connect(server.port)
        client.sock.sendall(
            b"EHLO x\r\nAUTH PLAIN AGEAYg==\r\nMAIL FROM:<>\r\nRCPT TO:<a@b.example>\r\nBDAT 4 LAST\r\nhi\r\nQUIT\r\n"
        )
        while not (reply := client.reply()).startswith(b"221"):
            assert reply
    command = {"on_auth": "AUTH", "on_mail_from": "MAIL", "on_rcpt_to": "RCPT", "on_data": "BDAT"}[hook]
    assert f"hook={hook} command={command}" in caplog.text
    assert "SystemExit: 3" in caplog.text


def test_exits_while_connecting_and_closing_end_one_connection_each(
    app: Fumi, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    connects: list[int] = []

    @app.on_connect
    async def connected(ctx: ConnectContext, next: Next) -> None:
        connects.append(1)
        if len(connects) == 1:
            raise SystemExit

    app.on_close(raises(ERRORS["exit"]))
    with running(app) as server, caplog.at_level(logging.INFO):
        client = connect(server.port)
        assert client.banner == b"421 4.3.0 Server local error\r\n"
        assert client.reply() == b""
        client.close()
        until(lambda: "hook=on_close" in caplog.text and "session ended" in caplog.text)
        assert connect(server.port).say("NOOP") == b"250 2.0.0 Ok\r\n"


def raise_it(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize("how", ["reads", "skips", "leaves", "swallows"])
@pytest.mark.parametrize("error", [ValueError, SystemExit])
def test_a_tap_that_raises_leaves_no_hole_in_an_accepted_message(
    app: Fumi, connect: Connect, caplog: pytest.LogCaptureFixture, error: type[BaseException], how: str
) -> None:
    tapped: list[bytes] = []
    read: list[bytes] = []

    def tap(piece: bytes) -> None:
        if b"two" in piece:
            raise error("broken tap")
        tapped.append(piece)

    @app.on_data
    async def data(ctx: DataContext, next: Next) -> None:
        ctx.stream.tap(tap)
        if how == "skips":
            await ctx.stream.skip()
        elif how == "reads":
            read.append(await ctx.stream.read())
        elif how == "swallows":
            try:
                await ctx.stream.read()
            except Exception:
                ctx.accept("fine")

    with running(app, record=False) as server, caplog.at_level(logging.ERROR):
        client = connect(server.port)
        client.envelope()
        client.sock.sendall(b"BDAT 5\r\none\r\n")
        assert client.reply() == b"250 2.0.0 Ok\r\n"
        client.sock.sendall(b"BDAT 12 LAST\r\ntwo\r\nthree\r\n")
        assert client.reply() == LOCAL_ERROR
        assert client.say("NOOP") == b"250 2.0.0 Ok\r\n"
    assert b"".join(tapped) == b"one\r\n"
    assert read == []
    assert caplog.text.count("handler failed") == 1
    assert "broken tap" in caplog.text


def test_a_tap_may_reject(app: Fumi, connect: Connect) -> None:
    @app.on_data
    async def data(ctx: DataContext, next: Next) -> None:
        ctx.stream.tap(lambda piece: ctx.reject("5.7.1 Virus", 554))

    with running(app, record=False) as server:
        client = connect(server.port)
        client.envelope()
        client.say("DATA")
        assert client.say("hi\r\n.") == b"554 5.7.1 Virus\r\n"


class Noted(Observer):
    def __init__(self) -> None:
        self.results: list[str] = []

    def message(self, result: str, size: int, seconds: float) -> None:
        self.results.append(result)


@pytest.mark.parametrize("error", [ValueError, SystemExit])
@pytest.mark.parametrize("ending", ["message", "RSET", "EHLO x", "HELO x"])
def test_an_at_end_function_that_raises_is_451_and_the_others_are_called(
    app: Fumi, connect: Connect, caplog: pytest.LogCaptureFixture, error: type[BaseException], ending: str
) -> None:
    called: list[int] = []
    app.observer = noted = Noted()

    @app.on_mail_from
    async def mail(ctx: MailContext, next: Next) -> None:
        ctx.session.envelope.at_end += (lambda: raise_it(error("broken end")), lambda: called.append(1))

    with running(app, record=False) as server, caplog.at_level(logging.ERROR):
        client = connect(server.port)
        client.envelope()
        if ending == "message":
            client.say("DATA")
            assert client.say("hi\r\n.") == LOCAL_ERROR
            assert noted.results == ["deferred"]
        else:
            assert client.say(ending) == LOCAL_ERROR
        assert called == [1]
        assert client.say("RCPT TO:<c@d.example>").startswith(b"503 ")
        client.envelope()
    assert f"hook=at_end command={'DATA' if ending == 'message' else ending[:4]}" in caplog.text
    assert "broken end" in caplog.text


def test_lmtp_answers_each_recipient_when_an_at_end_function_raises(connect: Connect) -> None:
    app = Fumi(auth_optional=True, lmtp=True, close_timeout=0.2)

    @app.on_data
    async def data(ctx: DataContext, next: Next) -> None:
        ctx.session.envelope.at_end += (lambda: raise_it(ValueError()),)
        ctx.reject_recipient("b@d.example", "No", 550)

    with running(app, record=False) as server:
        client = connect(server.port)
        client.sock.sendall(
            b"LHLO x\r\nMAIL FROM:<>\r\nRCPT TO:<a@d.example>\r\nRCPT TO:<b@d.example>\r\nDATA\r\nhi\r\n.\r\nNOOP\r\n"
        )
        codes = [client.reply()[:3] for _ in range(8)]
    assert codes[-3:] == [b"451", b"550", b"250"]


@pytest.mark.parametrize("what", ["accepted", "rejected"])
def test_a_reply_to_a_message_that_cannot_be_made_is_451(connect: Connect, caplog: pytest.LogCaptureFixture, what: str) -> None:
    app = Fumi(auth_optional=True, lmtp=what == "rejected")

    @app.on_data
    async def data(ctx: DataContext, next: Next) -> None:
        if what == "accepted":
            ctx.accepted = Mute()  # type: ignore[assignment]
        else:
            ctx.rejected["c@d.example"] = changed(code="550")

    with running(app, record=False) as server, caplog.at_level(logging.ERROR):
        client = connect(server.port)
        hello = b"LHLO x" if what == "rejected" else b"EHLO x"
        client.sock.sendall(hello + b"\r\nMAIL FROM:<>\r\nRCPT TO:<c@d.example>\r\nDATA\r\nhi\r\n.\r\nNOOP\r\n")
        replies = [client.reply() for _ in range(6)]
        client.close()
    assert replies[-2:] == [LOCAL_ERROR, b"250 2.0.0 Ok\r\n"]
    assert "hook=on_data command=DATA" in caplog.text


def test_surrogates_and_line_ends_cannot_break_a_reply(app: Fumi, connect: Connect) -> None:
    app.on_mail_from(raises(lambda: SMTPError("\udcff\r\n\x85\u2028250 forged", 550)))
    with running(app) as server:
        client = connect(server.port)
        client.say("EHLO x")
        reply = client.say("MAIL FROM:<>")
        assert all(line.startswith((b"550-5.7.1", b"550 5.7.1")) for line in reply.splitlines())
        assert client.say("NOOP") == b"250 2.0.0 Ok\r\n"


@pytest.mark.parametrize("pipelined", [False, True])
@pytest.mark.parametrize("phase", ["on_connect", "on_mail_from", "on_data"])
def test_an_app_that_breaks_the_envelope_ends_the_connection_and_no_other(
    app: Fumi, connect: Connect, caplog: pytest.LogCaptureFixture, phase: str, pipelined: bool
) -> None:
    async def breaks(ctx: MailContext | DataContext, next: Next) -> None:
        ctx.session.envelope = None  # type: ignore[assignment]

    getattr(app, phase)(breaks)
    with running(app, record=False) as server, caplog.at_level(logging.ERROR):
        client = connect(server.port)
        commands = [b"EHLO x", b"MAIL FROM:<>", b"RCPT TO:<c@d.example>", b"DATA", b"hi\r\n."]
        replies: list[bytes] = []
        if pipelined:
            client.sock.sendall(b"\r\n".join([*commands, b""]))
        else:
            while commands and replies[-1:] != [LAST_REPLY]:
                replies.append(client.say(commands.pop(0)))
        while reply := client.reply():
            replies.append(reply)
        assert replies[-1] == LAST_REPLY
        connect(server.port).say("NOOP")
    assert "dialogue failed" in caplog.text


@pytest.mark.parametrize("late", [False, True])
def test_an_error_that_an_app_raises_again_and_again_takes_no_more_memory(app: Fumi, connect: Connect, late: bool) -> None:
    refusal = SMTPError("5.1.1 No such user", 550)
    app.on_rcpt_to(raises(lambda: refusal, late=late))
    with running(app) as server:
        client = connect(server.port)
        client.say("EHLO client.example")
        client.say("MAIL FROM:<a@b.example>")
        lengths = []
        for _ in range(3):
            assert client.say("RCPT TO:<c@d.example>") == b"550 5.1.1 No such user\r\n"
            client.say("NOOP")
            lengths.append(len(traceback.extract_tb(refusal.__traceback__)))
        assert lengths[0] == lengths[-1]


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
def test_a_client_that_is_silent_after_an_error_is_timed_out(connect: Connect, error: Callable[[], BaseException]) -> None:
    app = Fumi(auth_optional=True, socket_timeout=0.3, close_timeout=0.2)
    app.on_mail_from(raises(error, late=True))
    with running(app) as server:
        client = connect(server.port)
        client.say("EHLO x")
        assert client.say("MAIL FROM:<>") == LOCAL_ERROR
        assert client.reply() == b"421 4.4.2 Error: timeout exceeded\r\n"
        assert client.reply() == b""


class Failing(Observer):
    """Every method raises."""

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("_") or not hasattr(Observer, name):
            return super().__getattribute__(name)
        return lambda *arguments: raise_it(SystemExit(name) if name == "message" else ValueError(name))


def test_an_observer_that_raises_changes_nothing(
    app: Fumi, send: Send, caplog: pytest.LogCaptureFixture, connect: Connect
) -> None:
    app.observer = Failing()

    @app.on_data
    async def deliver(ctx: DataContext, next: Next) -> None:
        await ctx.stream.skip()
        app.observer.delivery("mine", DeliveryResult.OK)

    with running(app) as server, caplog.at_level(logging.ERROR):
        assert send(server.port, "hi\r\n") == {}
        client = connect(server.port)
        client.say("GET / HTTP/1.1")
        client.close()
        until(lambda: "method=rejected" in caplog.text)
        until(lambda: caplog.text.count("method=connection_closed") == 2)
    for name in ("connection_opened", "session_started", "message", "delivery"):
        assert f"method={name}" in caplog.text


def test_an_observer_keeps_what_else_it_has(app: Fumi) -> None:
    noted = Noted()
    app.observer = noted
    app.observer.message("accepted", 1, 0.1)
    assert noted.results == ["accepted"]


def test_a_logger_that_raises_changes_nothing(connect: Connect, capfd: pytest.CaptureFixture[str]) -> None:
    class Broken(logging.Filter):
        def filter(self, record: logging.LogRecord) -> bool:
            raise ValueError("broken filter")

    logger = logging.getLogger("fumi.core")
    logger.addFilter(broken := Broken())
    app = Fumi(auth_optional=True, logger=True)
    app.on_mail_from(raises(ERRORS["exception"]))
    try:
        with running(app) as server:
            client = connect(server.port)
            client.say("EHLO x")
            assert client.say("MAIL FROM:<>") == LOCAL_ERROR
            assert client.say("QUIT").startswith(b"221")
            assert client.reply() == b""
    finally:
        logger.removeFilter(broken)
    assert "broken filter" in capfd.readouterr().err


def test_functions_of_at_close_are_called_although_another_one_raises(app: Fumi, caplog: pytest.LogCaptureFixture) -> None:
    called: list[int] = []
    app.at_close(lambda: raise_it(ValueError("broken release")))
    app.at_close(lambda: called.append(1))
    with running(app):
        pass
    assert called == [1]
    assert "broken release" in caplog.text
