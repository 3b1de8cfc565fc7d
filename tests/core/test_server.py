"""Sockets: limits, silence, flow control, closing."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import socket
import threading
from pathlib import Path
from typing import Any

import pytest

from fumi_core import DataContext, Fumi, MailContext, Next, plugins
from fumi_core.handlers.stream import HIGH_WATER_BYTES, MessageStream
from fumi_core.server.observer import Observer
from fumi_core.smtp.protocol import Protocol
from fumi_core.testing import running
from tests.core.client import Connect
from tests.support.waiting import until


class Reasons(Observer):
    def __init__(self) -> None:
        self.reasons: list[str] = []

    def rejected(self, reason: str) -> None:
        self.reasons.append(reason)


def send_until_blocked(sock: socket.socket, piece: bytes) -> int:
    """How many octets the other side takes without reading on."""
    sent = 0
    try:
        while sent < 200_000_000:
            sent += sock.send(piece[sent % len(piece) :])
    except TimeoutError:
        return sent
    raise AssertionError("nothing slows the sender down")


def streams_read_after(app: Fumi, go: threading.Event) -> list[MessageStream]:
    """The streams of the app's messages. A handler waits for ``go`` before the next one reads."""
    streams: list[MessageStream] = []

    @app.on_data
    async def wait(ctx: DataContext, next: Next) -> None:
        streams.append(ctx.stream)
        await asyncio.to_thread(go.wait, 20)
        await next()

    return streams


def test_one_client_too_many_is_421(connect: Connect) -> None:
    app = Fumi(auth_optional=True, max_clients=2, close_timeout=0.2)
    with running(app) as server:
        first, _second = connect(server.port), connect(server.port)
        third = connect(server.port)
        assert third.banner == b"421 4.7.0 Too many connections, try again later\r\n"
        assert third.reply() == b""
        first.say("QUIT")
        first.close()
        until(lambda: connect(server.port).banner.startswith(b"220"))


def test_silence_is_421(connect: Connect) -> None:
    app = Fumi(auth_optional=True, socket_timeout=0.05, close_timeout=0.2)
    with running(app) as server:
        client = connect(server.port)
        assert client.reply() == b"421 4.4.2 Error: timeout exceeded\r\n"
        assert client.reply() == b""


def test_silence_in_a_message_is_421_and_raises_in_the_handler(connect: Connect) -> None:
    app = Fumi(auth_optional=True, socket_timeout=1, close_timeout=0.2)
    failures: list[BaseException] = []

    @app.on_data
    async def data(ctx: DataContext, next: Next) -> None:
        try:
            await ctx.stream.read()
        except Exception as error:
            failures.append(error)
            raise

    with running(app) as server:
        client = connect(server.port)
        client.sock.sendall(b"EHLO x\r\nMAIL FROM:<>\r\nRCPT TO:<c@d.example>\r\nDATA\r\nhalf")
        assert [client.reply()[:3] for _ in range(4)] == [b"250", b"250", b"250", b"354"]
        assert client.reply().startswith(b"421 4.4.2")
        assert server.messages == []
    assert [type(failure).__name__ for failure in failures] == ["MessageAborted"]


def test_a_message_that_drips_in_is_cut_by_data_timeout(connect: Connect) -> None:
    app = Fumi(auth_optional=True, data_timeout=0.1, close_timeout=0.2)
    with running(app) as server:
        client = connect(server.port)
        client.envelope()
        client.say("DATA")
        stop = threading.Event()

        def drip() -> None:
            try:
                while not stop.wait(0.01):
                    client.sock.sendall(b"x\r\n")
            except OSError:
                pass  # the server has closed, as it should

        thread = threading.Thread(target=drip)
        thread.start()
        assert client.reply().startswith(b"421 4.4.2")
        stop.set()
        thread.join()


def test_a_slow_handler_is_no_silence_of_the_client(connect: Connect) -> None:
    app = Fumi(auth_optional=True, socket_timeout=1, close_timeout=0.2)

    @app.on_mail_from
    async def mail(ctx: MailContext, next: Next) -> None:
        await asyncio.sleep(1.5)

    with running(app) as server:
        client = connect(server.port)
        client.say("EHLO x")
        assert client.say("MAIL FROM:<>").startswith(b"250")


def test_a_message_and_what_follows_it_take_at_most_256_kib(connect: Connect) -> None:
    app = Fumi(auth_optional=True, close_timeout=0.2)
    go = threading.Event()
    streams = streams_read_after(app, go)

    with running(app) as server:
        client = connect(server.port)
        client.envelope()
        client.say("DATA")
        client.sock.sendall((b"x" * 998 + b"\r\n") * (HIGH_WATER_BYTES // 1000) + b".\r\n")
        client.sock.settimeout(0.3)
        send_until_blocked(client.sock, b"NOOP\r\n" * 1000)
        (protocol,) = (each for each in gc.get_objects() if isinstance(each, Protocol) and each.pending is not None)
        assert 0 < protocol.buffered <= 256 * 1024 - streams[0]._buffered < 256 * 1024
        go.set()


def test_a_slow_reader_of_a_message_slows_the_client_down(connect: Connect) -> None:
    app = Fumi(auth_optional=True, close_timeout=0.2)
    go = threading.Event()
    streams = streams_read_after(app, go)

    with running(app) as server:
        client = connect(server.port)
        client.envelope()
        client.say("DATA")
        client.sock.settimeout(0.3)
        sent = send_until_blocked(client.sock, b"x" * 998 + b"\r\n")
        assert streams[0]._buffered <= 256 * 1024
        client.sock.settimeout(20)
        go.set()
        client.sock.sendall((b"x" * 998 + b"\r\n")[sent % 1000 :] + b".\r\n")
        assert client.reply().startswith(b"250")
        assert len(server.messages[0].body) == sent - sent % 1000 + 1000


def test_a_client_that_does_not_read_its_replies_is_not_read_either(connect: Connect) -> None:
    app = Fumi(auth_optional=True, max_errors=10**9, close_timeout=0.2)
    with running(app) as server:
        client = connect(server.port)
        client.sock.settimeout(0.5)
        sent = send_until_blocked(client.sock, b"NOOP\r\n" * 10000)
        replies = 0
        client.sock.settimeout(20)
        client.sock.shutdown(socket.SHUT_WR)
        while data := client.file.read1(1 << 20):
            replies += data.count(b"\n")
        assert replies == sent // 6


def test_an_endless_line_is_discarded_and_answered_once(connect: Connect) -> None:
    app = Fumi(auth_optional=True, close_timeout=0.2)
    with running(app) as server:
        client = connect(server.port)
        for _ in range(100):
            client.sock.sendall(b"x" * 100_000)
        assert client.say("") == b"500 5.5.2 Error: line too long\r\n"
        assert client.say("NOOP " + "x" * 4089).startswith(b"250")
        assert client.say("NOOP " + "x" * 4090).startswith(b"500")


def test_close_waits_for_the_end_of_a_transaction_and_sends_421_to_idle_clients(connect: Connect) -> None:
    app = Fumi(auth_optional=True, close_timeout=20)
    with running(app) as server:
        idle, busy = connect(server.port), connect(server.port)
        busy.envelope()
        busy.say("DATA")
        closing = threading.Thread(target=lambda: server.run(app.close))
        closing.start()
        assert idle.reply() == b"421 4.3.2 Service shutting down, closing connection\r\n"
        assert idle.reply() == b""
        assert busy.say("hi\r\n.").startswith(b"250")
        assert busy.reply().startswith(b"421 4.3.2")
        idle.close()
        busy.close()
        closing.join(20)
        assert len(server.messages) == 1


def test_close_ends_transactions_after_its_time_limit(connect: Connect) -> None:
    app = Fumi(auth_optional=True, close_timeout=0.05)
    closed: list[str] = []
    app.on_close(lambda ctx, next: closed.append(ctx.session.id))
    with running(app) as server:
        client = connect(server.port)
        client.envelope()
        server.run(app.close)
        assert len(closed) == 1


async def in_a_transaction(app: Fumi) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A client that has begun one, so that ``close()`` waits for it."""
    reader, writer = await asyncio.open_connection("127.0.0.1", app.port)
    writer.write(b"EHLO x\r\nMAIL FROM:<>\r\n")
    while b"250 2.1.0" not in await reader.readline():
        pass
    return reader, writer


def test_a_second_close_returns_when_the_first_has_ended() -> None:
    async def main() -> None:
        app = Fumi(auth_optional=True, close_timeout=20)
        released: list[str] = []
        app.at_close(lambda: released.append("released"))
        await app.listen(0)
        _, writer = await in_a_transaction(app)
        first, second = asyncio.create_task(app.close()), asyncio.create_task(app.close())
        done, _ = await asyncio.wait([first, second], timeout=0.2)
        assert not done
        writer.close()
        await second
        assert released == ["released"]
        await first
        await app.close()
        assert released == ["released"]

    asyncio.run(main())


def test_a_cancelled_close_closes_the_remaining_connections() -> None:
    async def main() -> None:
        app = Fumi(auth_optional=True, close_timeout=1000)
        ended: list[str] = []
        app.on_close(lambda ctx, next: ended.append("closed"))
        app.at_close(lambda: ended.append("released"))
        await app.listen(0)
        reader, writer = await in_a_transaction(app)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.1):
                await app.close()
        assert (await reader.read()).startswith(b"421 4.3.2")
        while len(ended) < 2:
            await asyncio.sleep(0)
        writer.close()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("said", "level"), [(b"", "DEBUG"), (b"QUIT\r\n", "INFO"), (b"EHLO x\r\n", "INFO"), (b"BOGUS\r\n", "INFO"), (b"NO", "INFO")]
)
def test_a_client_that_closes_without_a_command_is_logged_at_level_debug(
    connect: Connect, caplog: pytest.LogCaptureFixture, said: bytes, level: str
) -> None:
    """Load balancers look in this way whether a port is open."""
    app = Fumi(auth_optional=True, logger=True, close_timeout=0.2)
    app.observer = observer = Reasons()
    with caplog.at_level("DEBUG"), running(app) as server:
        client = connect(server.port)
        client.sock.sendall(said)
        client.close()
        until(lambda: "session ended" in caplog.text)
    assert [record.levelname for record in caplog.records if "session ended" in record.message] == [level]
    assert observer.reasons == []


def test_a_rejected_client_is_logged_although_it_sends_nothing(connect: Connect, caplog: pytest.LogCaptureFixture) -> None:
    app = Fumi(auth_optional=True, logger=True, close_timeout=0.2).use(plugins.denylist(["127.0.0.1"]))
    with caplog.at_level("DEBUG"), running(app) as server:
        assert connect(server.port).banner.startswith(b"554")
        connect(server.port).close()
        until(lambda: "session ended" in caplog.text)
    assert {record.levelname for record in caplog.records if "session ended" in record.message} == {"INFO"}


def test_it_listens_on_a_unix_socket_too(tmp_path: Path) -> None:
    app = Fumi(auth_optional=True, close_timeout=0.2)
    path = str(tmp_path / "smtp.sock")
    with running(app) as server:
        server.run(lambda: app.listen(path=path))
        assert path in app.addresses
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path)
            assert client.recv(100).startswith(b"220")


def test_a_session_is_logged_once_when_a_logger_is_wanted(connect: Connect, caplog: pytest.LogCaptureFixture) -> None:
    app = Fumi(auth_optional=True, logger=True, close_timeout=0.2)
    with running(app) as server, caplog.at_level(logging.INFO):
        connect(server.port).say("QUIT")
        until(lambda: caplog.text.count("session ended") == 1)


@pytest.mark.parametrize(
    ("options", "problem"), [({"szie": 1}, "'size'"), ({"key": "x"}, "fumi_edge.Fumi"), ({"secure": True}, "fumi_edge")]
)
def test_an_unknown_option_is_a_type_error_with_advice(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(TypeError, match=problem):
        Fumi(**options)


@pytest.mark.parametrize("options", [{"proxy_protocol": "auto"}, {"bare_newlines": "accept"}, {"trusted_proxies": ["nonsense"]}])
def test_an_impossible_value_is_a_value_error(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"."):
        Fumi(**options)
