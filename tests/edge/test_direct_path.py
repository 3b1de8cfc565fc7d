"""An app in one process serves a client over TLS on the client's own socket."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fumi_core import ConnectContext, Next
from fumi_core.proxy_protocol import ProxyHeader
from fumi_core.testing import RunningServer, running
from fumi_edge import Fumi
from tests.support.peer import Peer
from tests.support.waiting import until


@pytest.fixture
def make(certificate: tuple[Path, Path]) -> Callable[..., Fumi]:
    def app(**options: object) -> Fumi:
        given = {"auth_optional": True, "name": "mx.example", "close_timeout": 0.2, **options}
        return Fumi(cert=certificate[0], key=certificate[1], **given)  # type: ignore[arg-type]

    return app


@pytest.fixture
def context(certificate: tuple[Path, Path]) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(certificate[0]))


@contextmanager
def over_tls(server: RunningServer, context: ssl.SSLContext) -> Iterator[Peer]:
    """A client over implicit TLS. The end without close_notify is an error."""
    plain = socket.create_connection(("127.0.0.1", server.port), 30)
    with context.wrap_socket(plain, server_hostname="localhost", suppress_ragged_eofs=False) as sock:
        yield Peer(sock)


@contextmanager
def upgraded(server: RunningServer, context: ssl.SSLContext) -> Iterator[Peer]:
    """A client that has just upgraded with STARTTLS."""
    plain = Peer(socket.create_connection(("127.0.0.1", server.port), 30))
    assert plain.line().startswith(b"220 mx.example")
    assert b"250 STARTTLS\r\n" in plain.ask(b"EHLO client.example\r\n")
    assert plain.ask(b"STARTTLS\r\n")[0].startswith(b"220")
    with context.wrap_socket(plain.sock, server_hostname="localhost", suppress_ragged_eofs=False) as sock:
        yield Peer(sock)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


MESSAGE = b"EHLO client.example\r\nMAIL FROM:<a@b.example>\r\nRCPT TO:<c@d.example>\r\nDATA\r\n"


@pytest.mark.parametrize("secure", [True, False])
def test_a_client_over_tls_takes_one_descriptor(make: Callable[..., Fumi], context: ssl.SSLContext, secure: bool) -> None:
    connect = over_tls if secure else upgraded
    command = b"" if secure else b"NOOP\r\n"
    with running(make(secure=secure)) as server:
        before = descriptors()
        with connect(server, context) as first, connect(server, context) as second:
            assert [client.ask(command)[0][:1] for client in (first, second)] == [b"2", b"2"]
            # The connections that carried the plaintext of STARTTLS clients end by themselves.
            until(lambda: descriptors() == before + 4, "one descriptor for each client and one each for the server")


def test_a_client_that_upgraded_gets_no_second_banner_and_is_secure(make: Callable[..., Fumi], context: ssl.SSLContext) -> None:
    with running(make()) as server, upgraded(server, context) as client:
        client.say(MESSAGE)
        greeting = client.reply()
        assert greeting[0] == b"250-mx.example\r\n"
        assert not [line for line in greeting if b"STARTTLS" in line]
        assert [client.reply()[-1][:3] for _ in range(2)] == [b"250", b"250"]
        assert client.line().startswith(b"354")
        assert client.ask(b"text\r\n.\r\n")[0].startswith(b"250")
        session = server.messages[0].session
    assert (session.secure, session.transmission_type, session.proxy_address) == (True, "ESMTPS", None)
    assert session.tls is not None
    assert session.tls.version == "TLSv1.3"


def test_a_client_that_is_rejected_after_its_upgrade_gets_the_reply_to_its_first_command(
    make: Callable[..., Fumi], context: ssl.SSLContext
) -> None:
    app = make()

    @app.on_connect
    async def look(ctx: ConnectContext, next: Next) -> None:
        if ctx.session.secure:
            ctx.reject("5.7.1 No TLS on Saturdays", 554)
        await next()

    with running(app) as server, upgraded(server, context) as client:
        assert client.ask(b"EHLO client.example\r\n") == [b"554 5.7.1 No TLS on Saturdays\r\n"]
        assert client.line() == b""


def test_a_silent_client_gets_421_and_close_notify(make: Callable[..., Fumi], context: ssl.SSLContext) -> None:
    with running(make(secure=True, socket_timeout=0.3)) as server, over_tls(server, context) as client:
        assert client.line().startswith(b"220")
        assert client.line() == b"421 4.4.2 Error: timeout exceeded\r\n"
        assert client.line() == b""


def test_a_client_that_half_closes_gets_all_its_replies(make: Callable[..., Fumi], context: ssl.SSLContext) -> None:
    with running(make(secure=True)) as server, over_tls(server, context) as client:
        client.say(MESSAGE + b"Subject: last\r\n\r\ntext\r\n.\r\n")
        client.end()
        assert client.rest().splitlines()[-1].startswith(b"250 2.0.0")
        assert len(server.messages) == 1


def test_a_client_whose_time_is_over_at_a_stop_gets_421_and_close_notify(
    make: Callable[..., Fumi], context: ssl.SSLContext
) -> None:
    with contextlib.ExitStack() as stack:
        with running(make(secure=True)) as server:
            client = stack.enter_context(over_tls(server, context))
            client.say(MESSAGE)
            until(lambda: client.line().startswith(b"354"))
        assert client.rest() == b"421 4.3.2 Service shutting down, closing connection\r\n"


def test_pipelined_quit_ends_with_close_notify(make: Callable[..., Fumi], context: ssl.SSLContext) -> None:
    with running(make(secure=True)) as server, over_tls(server, context) as client:
        client.say(b"EHLO client.example\r\nQUIT\r\nNOOP\r\n")
        assert client.rest().splitlines()[-1] == b"221 2.0.0 Bye"


def test_a_client_through_a_load_balancer_has_its_own_address_and_the_balancers_beside_it(
    make: Callable[..., Fumi], context: ssl.SSLContext
) -> None:
    header = ProxyHeader(2, "PROXY", "TCP4", ("192.0.2.7", 4711), ("198.51.100.1", 25)).to_bytes()
    with running(make(secure=True, proxy_protocol="required")) as server:
        plain = socket.create_connection(("127.0.0.1", server.port), 30)
        plain.sendall(header)
        with context.wrap_socket(plain, server_hostname="localhost") as sock:
            client = Peer(sock)
            client.say(MESSAGE + b"text\r\n.\r\nQUIT\r\n")
            assert client.rest().splitlines()[-1] == b"221 2.0.0 Bye"
        session = server.messages[0].session
    assert (session.remote_address, session.remote_port, session.proxy_address) == ("192.0.2.7", 4711, "127.0.0.1")
    assert (session.local_address, session.local_port) == ("198.51.100.1", 25)


@pytest.mark.parametrize("secure", [True, False])
def test_a_client_that_the_load_balancer_does_not_name_may_not_use_xclient(
    make: Callable[..., Fumi], context: ssl.SSLContext, secure: bool
) -> None:
    with running(make(secure=secure, proxy_protocol="required", use_xclient=True)) as server:
        plain = socket.create_connection(("127.0.0.1", server.port), 30)
        plain.sendall(b"PROXY UNKNOWN\r\n")
        with contextlib.closing(context.wrap_socket(plain, server_hostname="localhost") if secure else plain) as sock:
            client = Peer(sock)
            assert client.line().startswith(b"220")
            assert not [line for line in client.ask(b"EHLO client.example\r\n") if b"XCLIENT" in line]
            assert client.ask(b"XCLIENT ADDR=192.0.2.1\r\n") == [b"550 5.7.0 Error: insufficient authorization\r\n"]


def test_both_log_lines_have_the_same_id_and_the_core_is_the_backend(
    make: Callable[..., Fumi], context: ssl.SSLContext, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    with running(make(secure=True, logger=True)) as server, over_tls(server, context) as client:
        client.say(MESSAGE + b"text\r\n.\r\nQUIT\r\n")
        client.rest()
        client.close()
        lines = until(lambda: [text for text in caplog.messages if " ended" in text][1:] and caplog.messages)
    fields = [dict(word.split("=", 1) for word in text.split() if "=" in word) for text in lines if " ended" in text]
    core, edge = sorted(fields, key=lambda each: "backend" in each)
    assert core["id"] == edge["id"]
    assert (edge["backend"], edge["reason"]) == ("core", "backend_closed")
    assert int(edge["bytes_in"]) == len(MESSAGE + b"text\r\n.\r\nQUIT\r\n")
    assert core["tls"] == edge["tls"] == "TLSv1.3"
