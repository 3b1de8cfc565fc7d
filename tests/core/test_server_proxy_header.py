"""What the PROXY header does to a session, and what a connection without a good one gets."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

import pytest

from fumi_core import Fumi, Session
from fumi_core.proxy_protocol import PP2_TYPE_UNIQUE_ID, ProxyHeader, TLSInfo, tls_tlvs
from fumi_core.testing import running
from tests.core.client import Connect
from tests.support.waiting import until

TLS = TLSInfo(version="TLSv1.3", cipher="TLS_AES_256_GCM_SHA384", sni="mx.example")

CLIENT, SERVER = ("192.0.2.7", 4711), ("198.51.100.1", 25)


def header(tls: TLSInfo | None = TLS, unique_id: bytes = b"conn-1", **changes: Any) -> bytes:
    tlvs = (*(tls_tlvs(tls) if tls else ()), (PP2_TYPE_UNIQUE_ID, unique_id))
    fields = {"version": 2, "command": "PROXY", "transport": "TCP4", "source": CLIENT, "destination": SERVER, "tlvs": tlvs}
    return ProxyHeader(**{**fields, **changes}).to_bytes()


Behind = Callable[..., tuple[Fumi, list[Session]]]


@pytest.fixture
def behind() -> Behind:
    """An app behind a TLS proxy, and the sessions its handlers saw."""

    def make(**options: Any) -> tuple[Fumi, list[Session]]:
        app = Fumi(**{"auth_optional": True, "proxy_protocol": "required", "close_timeout": 0.2, **options})
        sessions: list[Session] = []
        app.on_connect(lambda ctx, next: sessions.append(ctx.session))
        return app, sessions

    return make


def test_the_header_gives_the_session_its_client_and_its_tls_facts(behind: Behind, connect: Connect) -> None:
    app, sessions = behind()
    with running(app) as server:
        client = connect(server.port, header())
        client.envelope()
        client.say("DATA")
        assert client.say("hi\r\n.").startswith(b"250")
        session = sessions[0]
        trace = server.messages[0].session.received_header()
    assert (session.id, session.secure, session.tls) == ("conn-1", True, TLS)
    assert (session.remote_address, session.remote_port) == CLIENT
    assert (session.local_address, session.local_port) == SERVER
    assert session.proxy_address == "127.0.0.1"
    assert session.transmission_type == "ESMTPS"
    assert "from client.example ([192.0.2.7])" in trace
    assert "(using TLSv1.3 with cipher TLS_AES_256_GCM_SHA384)" in trace
    assert " with ESMTPS id conn-1" in trace


def test_the_header_may_arrive_byte_by_byte_with_commands_after_it(behind: Behind, connect: Connect) -> None:
    app, sessions = behind()
    with running(app) as server:
        client = connect(server.port, banner=False)
        client.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in header() + b"NOOP\r\n":
            client.sock.sendall(bytes([byte]))
        assert client.reply().startswith(b"220")
        assert client.reply().startswith(b"250")
    assert sessions[0].remote_address == "192.0.2.7"


def test_without_the_ssl_tlv_a_session_is_not_secure(behind: Behind, connect: Connect) -> None:
    app, sessions = behind()
    with running(app) as server:
        connect(server.port, header(tls=None))
        connect(server.port, b"PROXY TCP6 2001:db8::1 2001:db8::2 1 2\r\n")
    assert [(session.secure, session.tls) for session in sessions] == [(False, None)] * 2
    assert sessions[1].remote_address == "2001:db8::1"


def test_assume_tls_makes_every_session_secure(behind: Behind, connect: Connect) -> None:
    app, sessions = behind(assume_tls=True)
    with running(app) as server:
        connect(server.port, b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n")
    assert (sessions[0].secure, sessions[0].tls) == (True, None)


def test_a_unique_id_that_cannot_be_printed_comes_as_hex(behind: Behind, connect: Connect) -> None:
    app, sessions = behind()
    with running(app) as server:
        for unique_id in (b"a b", b"\x00\xff", b"ok"):
            connect(server.port, header(unique_id=unique_id))
    assert [session.id for session in sessions] == ["612062", "00ff", "ok"]


def test_a_local_header_is_greeted_by_the_connections_own_addresses(behind: Behind, connect: Connect) -> None:
    app, sessions = behind()
    with running(app) as server:
        assert connect(server.port, ProxyHeader(2, "LOCAL").to_bytes()).banner.startswith(b"220")
        assert connect(server.port, header()).banner.startswith(b"220")
    assert (sessions[0].remote_address, sessions[0].secure) == ("127.0.0.1", False)
    assert [each.health_check for each in sessions] == [True, False]


def test_a_local_session_is_logged_at_level_debug(behind: Behind, connect: Connect, caplog: pytest.LogCaptureFixture) -> None:
    """A health check comes every few seconds."""
    app, _ = behind(logger=True)
    with caplog.at_level("DEBUG"), running(app) as server:
        for opening in (ProxyHeader(2, "LOCAL").to_bytes(), header()):
            client = connect(server.port, opening)
            assert client.say("QUIT").startswith(b"221")
            assert client.reply() == b""
    assert sorted(record.levelname for record in caplog.records if "session ended" in record.message) == ["DEBUG", "INFO"]


@pytest.mark.parametrize(
    "sent", [b"EHLO x\r\n", b"PROXY TCP4 1 2 3 4\r\n", header()[:-1] + b"\x00", b"\r\n\r\n\x00\r\nQUIT\n\x31"]
)
def test_a_bad_header_ends_the_connection_without_a_reply(behind: Behind, connect: Connect, sent: bytes) -> None:
    app, sessions = behind()
    with running(app) as server:
        client = connect(server.port, sent, banner=False)
        assert client.reply() == b""
    assert sessions == []


def test_a_peer_that_is_not_trusted_is_closed_at_once(behind: Behind, connect: Connect) -> None:
    app, sessions = behind(trusted_proxies=["192.0.2.0/24"])
    with running(app) as server:
        client = connect(server.port, banner=False)
        try:
            client.sock.sendall(header())
            said = client.reply()
        except ConnectionError:
            said = b""
    assert said == b""
    assert sessions == []


def test_a_header_that_does_not_come_is_not_waited_for(behind: Behind, connect: Connect) -> None:
    app, sessions = behind(proxy_timeout=0.05)
    with running(app) as server:
        client = connect(server.port, header()[:20], banner=False)
        assert client.reply() == b""
    assert sessions == []


@pytest.mark.parametrize("said", [b"", b"EHLO x\r\n"])
def test_the_log_names_the_flag_for_clients_without_a_proxy(
    behind: Behind, connect: Connect, caplog: pytest.LogCaptureFixture, said: bytes
) -> None:
    app, _ = behind(proxy_timeout=0.1)
    with running(app) as server:
        assert connect(server.port, said, banner=False).reply() == b""
    (line,) = [record.message for record in caplog.records if "no valid PROXY header" in record.message]
    assert "clients that connect without a proxy need --proxy-protocol off" in line


def test_a_port_that_is_only_looked_at_is_no_missing_header(
    behind: Behind, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    app, _ = behind()
    with caplog.at_level("DEBUG"), running(app) as server:
        connect(server.port, banner=False).close()
        until(lambda: "no valid PROXY header" in caplog.text)
    (record,) = [record for record in caplog.records if "no valid PROXY header" in record.message]
    assert record.levelname == "DEBUG"
    assert "--proxy-protocol" not in record.message
