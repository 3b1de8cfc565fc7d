"""swaks, the Swiss army knife of SMTP: what it can say besides TLS (test_clients.py), to the core itself."""

from __future__ import annotations

import email
import logging
import random
import re
from collections.abc import Callable
from typing import Any

import pytest

from fumi_core import Session
from tests.interop.starting import StartCore
from tests.support.programs import Programs
from tests.support.waiting import until

Swaks = Callable[..., str]


@pytest.fixture
def swaks(programs: Programs) -> Swaks:
    """Sends a message; what was said. The server's lines begin with <-, its refusals with <**."""

    def send(target: int | str, *flags: str, status: int = 0) -> str:
        where = ["--server", "127.0.0.1", "--port", str(target)] if isinstance(target, int) else ["--socket", target]
        said: str = programs.run("swaks", *where, "--from", "a@b.example", "--to", "c@d.example", *flags, status=status)
        return said

    return send


def offered(said: str) -> list[str]:
    """The extensions in the answer to the first EHLO."""
    name, *extensions = re.findall(r"^<-  250[- ](.*)$", said, re.MULTILINE)
    assert name == "mx.example"
    return extensions


SMTP = ["PIPELINING", "SIZE", "8BITMIME", "ENHANCEDSTATUSCODES", "DSN", "SMTPUTF8", "CHUNKING", "BINARYMIME"]
LIMITS, AUTH = "LIMITS RCPTMAX=100", "AUTH PLAIN LOGIN CRAM-MD5 XOAUTH2"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [*SMTP, LIMITS, AUTH]),
        ({"allow_insecure_auth": False}, [*SMTP, LIMITS]),
        ({"allow_insecure_auth": False, "assume_tls": True}, [*SMTP, "REQUIRETLS", LIMITS, AUTH]),
        ({"size": 1000, "max_recipients": 7}, ["PIPELINING", "SIZE 1000", *SMTP[2:], "LIMITS RCPTMAX=7", AUTH]),
        ({"hide_chunking": True, "hide_smtputf8": True, "auth_methods": ["PLAIN"]}, [*SMTP[:5], LIMITS, "AUTH PLAIN"]),
    ],
)
def test_what_it_is_offered_is_what_was_configured(
    core: StartCore, swaks: Swaks, options: dict[str, Any], expected: list[str]
) -> None:
    assert offered(swaks(core(**options).port, "--quit-after", "EHLO")) == expected


@pytest.mark.parametrize("method", ["PLAIN", "LOGIN", "CRAM-MD5"])
def test_it_authenticates(core: StartCore, swaks: Swaks, method: str) -> None:
    server = core(auth_optional=False)
    said = swaks(server.port, "--auth", method, "--auth-user", "joe", "--auth-password", "secret")
    assert f" -> AUTH {method}" in said
    assert server.messages[0].session.user == "joe"


def test_with_a_wrong_password_it_tries_every_method_it_knows(core: StartCore, swaks: Swaks) -> None:
    server = core(auth_optional=False)
    said = swaks(server.port, "--auth", "--auth-user", "joe", "--auth-password", "wrong", status=28)
    assert said.count("<** 535 5.7.8 Error: authentication failed") == 3
    assert "<-  221 2.0.0 Bye" in said


def test_without_auth_where_it_is_required_it_is_530(core: StartCore, swaks: Swaks) -> None:
    assert "<** 530 5.7.0 Authentication required" in swaks(core(auth_optional=False).port, status=23)


def test_a_pipelined_transaction_with_a_refused_recipient(core: StartCore, swaks: Swaks) -> None:
    server = core()
    said = swaks(server.port, "--pipeline", "--to", "nobody@d.example,c@d.example,e@f.example")
    assert re.findall(r"^<(?:-|\*\*) +(\d{3} .*)$", said[said.index(" -> MAIL") :], re.MULTILINE) == [
        "250 2.1.0 Ok",
        "550 5.1.1 No such user",
        "250 2.1.5 Ok",
        "250 2.1.5 Ok",
        "354 End data with <CR><LF>.<CR><LF>",
        "250 2.0.0 Ok",
        "221 2.0.0 Bye",
    ]
    assert len(server.messages[0].envelope.rcpt_to) == 2


@pytest.mark.parametrize("protocol", ["SMTP", "ESMTP", "ESMTPA", "LMTP"])
def test_the_protocol_is_named_in_the_trace_line(core: StartCore, swaks: Swaks, protocol: str) -> None:
    server = core(lmtp=protocol == "LMTP")
    known = ["--auth-user", "joe", "--auth-password", "secret"] if protocol == "ESMTPA" else []
    swaks(server.port, "--protocol", protocol, "--ehlo", "client.example", *known)
    (message,) = server.messages
    assert f"from client.example ([127.0.0.1])\r\n\tby mx.example with {protocol} id " in message.session.received_header()


def test_an_lmtp_server_requires_lhlo(core: StartCore, swaks: Swaks) -> None:
    said = swaks(core(lmtp=True).port, status=22)
    assert "<** 500 5.5.1 Error: this is an LMTP server, use LHLO" in said


def test_lmtp_answers_each_recipient(core: StartCore, swaks: Swaks) -> None:
    server = core(lmtp=True)
    said = swaks(server.port, "--protocol", "LMTP", "--to", "c@d.example,full@d.example,e@f.example")
    after = said[said.index("\n -> .\n") :]
    assert re.findall(r"^<.. +(\d{3}) ", after, re.MULTILINE) == ["250", "452", "250", "221"]


@pytest.mark.parametrize("protocol", ["ESMTP", "LMTP"])
def test_a_unix_socket_takes_mail_in_smtp_and_lmtp(core: StartCore, swaks: Swaks, programs: Programs, protocol: str) -> None:
    server = core(lmtp=protocol == "LMTP")
    path = str(programs.directory / "core.sock")
    server.run(lambda: server.app.listen(path=path))
    swaks(path, "--protocol", protocol, "--ehlo", "client.example")
    session = server.messages[0].session
    assert session.remote_address.startswith("unix")
    assert session.transmission_type == protocol


@pytest.mark.parametrize(
    "name", ["localhost", "[127.0.0.1]", "[IPv6:::1]", "under_score.example", "bücher.example", "two words", "x" * 255]
)
@pytest.mark.parametrize("protocol", ["SMTP", "ESMTP"])
def test_it_may_call_itself(core: StartCore, swaks: Swaks, protocol: str, name: str) -> None:
    server = core()
    swaks(server.port, "--protocol", protocol, "--ehlo", name)
    assert server.messages[0].session.client_hostname == name


@pytest.mark.parametrize("name", ["x" * 256, " "])
def test_it_may_not_call_itself(core: StartCore, swaks: Swaks, name: str) -> None:
    # It tries HELO then.
    said = swaks(core().port, "--ehlo", name, status=22)
    assert "<** 501 5.5.4 Syntax: EHLO hostname" in said
    assert "<** 501 5.5.4 Syntax: HELO hostname" in said


def test_attachments_arrive_byte_for_byte(core: StartCore, swaks: Swaks, programs: Programs) -> None:
    server = core()
    data = random.Random(2).randbytes(300_001)
    (programs.directory / "random.bin").write_bytes(data)
    name = ["--attach-type", "application/x-test", "--attach-name", "random.bin"]
    swaks(server.port, *name, "--attach", "@random.bin", "--body", ".\n..\nbye")
    text, attached = list(email.message_from_bytes(server.messages[0].body).walk())[1:]
    assert (attached.get_filename(), attached.get_payload(decode=True)) == ("random.bin", data)
    assert text.get_payload(decode=True) == b".\r\n..\r\nbye"


def proxy(version: int, family: str, source: str, destination: str, *flags: str) -> list[str]:
    places = ["--proxy-source", source, "--proxy-source-port", "56324", "--proxy-dest", destination, "--proxy-dest-port", "25"]
    return ["--proxy-version", str(version), "--proxy-family", family, *places, *flags]


@pytest.mark.parametrize(
    ("flags", "remote", "local", "literal"),
    [
        (proxy(1, "TCP4", "192.0.2.1", "192.0.2.2"), "192.0.2.1", "192.0.2.2", "[192.0.2.1]"),
        (proxy(1, "TCP6", "2001:db8::1", "2001:db8::2"), "2001:db8::1", "2001:db8::2", "[IPv6:2001:db8::1]"),
        (proxy(2, "AF_INET", "192.0.2.1", "192.0.2.2"), "192.0.2.1", "192.0.2.2", "[192.0.2.1]"),
        (proxy(2, "AF_INET6", "2001:db8::1", "2001:db8::2"), "2001:db8::1", "2001:db8::2", "[IPv6:2001:db8::1]"),
    ],
)
def test_its_proxy_header_is_believed(
    core: StartCore, swaks: Swaks, flags: list[str], remote: str, local: str, literal: str
) -> None:
    server = core(proxy_protocol="required")
    swaks(server.port, "--ehlo", "client.example", *flags)
    session = server.messages[0].session
    assert (session.remote_address, session.remote_port) == (remote, 56324)
    assert (session.local_address, session.local_port) == (local, 25)
    assert (session.proxy_address, session.secure) == ("127.0.0.1", False)
    assert session.received_header().startswith(f"Received: from client.example ({literal})\r\n")


def test_a_local_header_leaves_the_connection_its_own_addresses(core: StartCore, swaks: Swaks) -> None:
    server = core(proxy_protocol="required")
    # An argument holds no NUL, and what swaks makes of --proxy-command LOCAL is no header: so its length is 0x0101.
    swaks(server.port, "--proxy-version", "2", "--proxy", "\x20\x11\x01\x01" + "x" * 0x101)
    assert server.messages[0].session.remote_address == "127.0.0.1"


def test_an_unknown_family_leaves_the_connection_its_own_addresses(core: StartCore, swaks: Swaks) -> None:
    server = core(proxy_protocol="required")
    swaks(server.port, "--proxy", "UNKNOWN")
    assert server.messages[0].session.remote_address == "127.0.0.1"


@pytest.mark.parametrize(
    "flags",
    [
        ["--proxy", "TCP4 192.0.2.1 192.0.2.2 1"],
        ["--proxy", "TCP4 192.0.2.1 2001:db8::1 1 2"],
        ["--proxy", "TCP9 192.0.2.1 192.0.2.2 1 2"],
        ["--proxy", "TCP4 192.0.2.1 192.0.2.2 1 65536"],
        ["--proxy-version", "2", "--proxy", "\x31\x11 not a header"],
        [],
    ],
)
def test_data_that_is_no_header_gets_no_banner(core: StartCore, swaks: Swaks, flags: list[str]) -> None:
    said = swaks(core(proxy_protocol="required", proxy_timeout=0.2).port, *flags, status=6)
    assert "Remote host closed connection unexpectedly" in said
    assert "<-" not in said


STAGES = ["CONNECT", "HELO", "AUTH", "MAIL", "RCPT"]


@pytest.mark.parametrize(
    ("way", "stage"),
    [
        *(("--quit-after", stage) for stage in STAGES),
        *(("--drop-after", stage) for stage in [*STAGES, "DATA"]),
        *(("--drop-after-send", stage) for stage in ["HELO", "MAIL", "RCPT", "DATA"]),
    ],
)
def test_it_may_leave_at_any_time(
    core: StartCore, swaks: Swaks, programs: Programs, caplog: pytest.LogCaptureFixture, way: str, stage: str
) -> None:
    server = core()
    closed: list[Session] = []
    server.app.on_close(lambda ctx, next: closed.append(ctx.session))
    swaks(server.port, way, stage)
    swaks(server.port)
    until(lambda: len(closed) == 2, "both sessions ending")
    assert len(server.messages) == 1
    assert not [each for each in caplog.records if each.levelno >= logging.WARNING]
