"""Every connection has a deadline in every state: no client keeps its place by reading nothing, or by a byte now and then."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from fumi_core import Fumi, MailContext, Next
from fumi_core.proxy_protocol import ProxyHeader
from fumi_core.server.observer import Observer
from fumi_core.testing import RunningServer, running
from tests.core.client import Connect
from tests.support.waiting import until

ENVELOPE = b"EHLO x\r\nMAIL FROM:<>\r\nRCPT TO:<c@d.example>\r\n"


class Reasons(Observer):
    def __init__(self) -> None:
        self.reasons: list[str] = []

    def rejected(self, reason: str) -> None:
        self.reasons.append(reason)


@contextlib.contextmanager
def little_room(app: Fumi) -> Iterator[tuple[RunningServer, Callable[[], socket.socket]]]:
    """Serves where the kernel takes few replies for a client that does not read; what makes such a client, too."""
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    listening.bind(("127.0.0.1", 0))
    listening.listen()
    with running(app) as server, contextlib.ExitStack() as clients:
        server.run(lambda: app.listen(sock=listening))

        def client() -> socket.socket:
            sock = clients.enter_context(socket.socket())
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2304)
            sock.settimeout(60)
            sock.connect(listening.getsockname())
            assert sock.recv(200).startswith(b"220")
            return sock

        yield server, client


@contextlib.contextmanager
def dripping(sock: socket.socket, piece: bytes) -> Iterator[None]:
    """The client sends this again and again, until the block ends or the connection does."""
    stop = threading.Event()

    def drip() -> None:
        with contextlib.suppress(OSError):
            while not stop.wait(0.01):
                sock.sendall(piece)

    thread = threading.Thread(target=drip)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def answers_slowly(app: Fumi) -> None:
    @app.on_mail_from
    async def mail(ctx: MailContext, next: Next) -> None:
        await asyncio.sleep(0.05)


def connections(app: Fumi) -> int:
    assert app._server is not None
    return len(app._server.connections)


@pytest.mark.parametrize("half_closes", [True, False])
@pytest.mark.parametrize("first", [b"EHLO x\r\nMAIL FROM:<>\r\n", b""], ids=["behind a handler", "at once"])
def test_a_client_that_never_reads_is_disconnected(first: bytes, half_closes: bool) -> None:
    app = Fumi(auth_optional=True, max_clients=3, socket_timeout=1, close_timeout=0.2)
    app.observer = observer = Reasons()
    answers_slowly(app)
    with little_room(app) as (_, client):
        for _ in range(3):
            sock = client()
            sock.sendall(first + b"EHLO x\r\n" * 6000)
            if half_closes:
                sock.shutdown(socket.SHUT_WR)
        until(lambda: connections(app) == 0)
        assert observer.reasons == ["timeout"] * 3
        client()


def test_a_client_that_never_reads_is_disconnected_although_each_reply_is_late() -> None:
    """What a handler says later is no reason to wait longer for a client that reads none of it."""
    app = Fumi(auth_optional=True, socket_timeout=0.5, close_timeout=0.2)
    answers_slowly(app)
    with little_room(app) as (_, client):
        client().sendall(b"EHLO x\r\n" * 300 + b"MAIL FROM:<>\r\nRSET\r\n" * 3000)
        until(lambda: connections(app) == 0)


@pytest.mark.parametrize(
    ("before", "piece"),
    [
        (b"", b"N"),
        (b"NOOP\r\nNO", b"O"),
        (b"", b"x" * 1000),
        (b"EHLO x\r\nAUTH LOGIN\r\n", b"Y"),
        (b"BDAT 99999999999999999999\r\n", b"x"),
        (ENVELOPE + b"BDAT 99999999999999999999\r\n", b"x"),
        (ENVELOPE + b"BDAT 99999999999\r\n", b"x"),
        (ENVELOPE + b"BDAT 1\r\nx", b"NOOP\r\n"),
        (ENVELOPE + b"BDAT 1\r\nx", b"BDAT 1\r\nx"),
        (ENVELOPE + b"DATA\r\n", b"x\r\n"),
    ],
)
def test_a_few_octets_now_and_then_keep_no_place(connect: Connect, before: bytes, piece: bytes) -> None:
    app = Fumi(auth_optional=True, allow_insecure_auth=True, size=10**11, socket_timeout=0.5, data_timeout=0.5, close_timeout=0.2)
    app.on_auth(lambda ctx, next: None)
    with running(app) as server:
        client = connect(server.port)
        client.sock.sendall(before)
        with dripping(client.sock, piece):
            replies = [client.reply()]
            while not replies[-1].startswith(b"421"):
                replies.append(client.reply())
                assert replies[-1]
        assert replies[-1] == b"421 4.4.2 Error: timeout exceeded\r\n"


def test_a_proxy_header_is_waited_for_no_longer_because_it_has_begun(connect: Connect) -> None:
    app = Fumi(auth_optional=True, proxy_protocol="required", proxy_timeout=0.2, close_timeout=0.2)
    header = ProxyHeader(2, "PROXY", "UNIX", "/a", "/b").to_bytes()
    with running(app) as server:
        client = connect(server.port, header[:16], banner=False)
        with dripping(client.sock, b"\0"):
            assert client.reply() == b""


def test_a_command_that_came_whole_gives_the_next_one_its_whole_time(connect: Connect) -> None:
    app = Fumi(auth_optional=True, socket_timeout=2, close_timeout=0.2)
    with running(app) as server:
        client = connect(server.port)
        client.sock.settimeout(20)
        client.sock.sendall(b"NO")
        for _ in range(6):
            assert not threading.Event().wait(0.5)
            client.sock.sendall(b"OP\r\nNO")
            assert client.reply().startswith(b"250")


def test_lingering_is_short_for_a_client_that_had_replies_to_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fumi_core.server.connection.LINGER_SECONDS", 0.1)
    app = Fumi(auth_optional=True, max_errors=0, close_timeout=0.2)
    with little_room(app) as (_, client):
        sock = client()
        sock.sendall(b"EHLO x\r\n" * 300 + b"BOGUS\r\n")
        while b"421" not in sock.recv(65536):
            pass
        until(lambda: connections(app) == 0)


def test_a_client_that_half_closes_gets_all_replies_however_many_wait(connect: Connect) -> None:
    app = Fumi(auth_optional=True, close_timeout=0.2)
    answers_slowly(app)
    with running(app) as server:
        client = connect(server.port)
        client.sock.sendall(b"EHLO x\r\nMAIL FROM:<>\r\n" + b"NOOP\r\n" * 3000 + b"RCPT TO:<c@d.example>\r\nMAIL FROM:<>\r\n")
        client.sock.shutdown(socket.SHUT_WR)
        replies = [client.reply()[:3] for _ in range(3004)]
        assert client.reply() == b""
    assert replies == [b"250"] * 3003 + [b"503"]


def test_a_client_that_reads_late_gets_all_replies_and_the_end(connect: Connect) -> None:
    app = Fumi(auth_optional=True, close_timeout=0.2)
    answers_slowly(app)
    with little_room(app) as (_, client):
        sock = client()
        sock.sendall(b"EHLO x\r\n" + b"MAIL FROM:<>\r\nRSET\r\nHELP\r\n" * 20 + b"HELP\r\n" * 2000 + b"QUIT\r\n")
        heard = b""
        while data := sock.recv(4096):
            heard += data
    assert heard.count(b"214 ") == 2020
    assert heard.endswith(b"221 2.0.0 Bye\r\n")
