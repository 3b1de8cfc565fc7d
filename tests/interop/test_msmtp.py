"""msmtp, the sendmail of many a small machine: SMTP and LMTP to the core, and TLS, by GnuTLS, through the edge."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.interop.starting import StartCore, StartEdge
from tests.support.certificates import CertificateFiles
from tests.support.programs import Programs

Msmtp = Callable[..., str]
MAIL = b"From: a@b.example\nDate: Thu, 1 Jan 2026 00:00:00 +0000\nMessage-ID: <1@b.example>\n\nhi\n.\n..\nbye\n"
LOGIN_REFUSED, RECIPIENT_REFUSED, MESSAGE_REFUSED = 77, 65, 69


@pytest.fixture
def msmtp(programs: Programs) -> Msmtp:
    """Sends a message with these flags and to these recipients; what was said of it."""

    def run(port: int, *words: str | Path, status: int = 0) -> str:
        common = ["--host=127.0.0.1", f"--port={port}", "--from=a@b.example", "--domain=client.example"]
        said: str = programs.run("msmtp", *common, *words, given=MAIL, status=status)
        return said

    return run


def auth(method: str, secret: str = "secret") -> list[str]:
    return [f"--auth={method}", "--user=joe", f"--passwordeval=echo {secret}"]


def test_it_pipelines_an_envelope_and_the_message_arrives_as_it_is(core: StartCore, msmtp: Msmtp) -> None:
    server = core()
    msmtp(server.port, "c@d.example", "e@f.example")
    (message,) = server.messages
    assert message.body == MAIL.replace(b"\n", b"\r\n")
    assert message.session.client_hostname == "client.example"
    assert [each.address for each in message.envelope.rcpt_to] == ["c@d.example", "e@f.example"]


def test_it_understands_what_the_server_offers(core: StartCore, msmtp: Msmtp) -> None:
    said = msmtp(core(size=1_000_000).port, "--serverinfo")
    assert "PIPELINING:" in said
    assert "SIZE 1000000:" in said
    assert "DSN:" in said
    assert "PLAIN CRAM-MD5 LOGIN XOAUTH2" in said


@pytest.mark.parametrize("method", ["plain", "login", "cram-md5"])
def test_it_authenticates(core: StartCore, msmtp: Msmtp, method: str) -> None:
    server = core(auth_optional=False)
    msmtp(server.port, *auth(method), "c@d.example")
    assert server.messages[0].session.user == "joe"


@pytest.mark.parametrize("method", ["plain", "login", "cram-md5"])
def test_a_wrong_password_is_refused(core: StartCore, msmtp: Msmtp, method: str) -> None:
    server = core(auth_optional=False)
    said = msmtp(server.port, *auth(method, "wrong"), "c@d.example", status=LOGIN_REFUSED)
    assert "server message: 535 5.7.8 Error: authentication failed" in said
    assert server.messages == []


def test_dsn_parameters_arrive(core: StartCore, msmtp: Msmtp) -> None:
    server = core()
    msmtp(server.port, "--dsn-notify=failure,delay", "--dsn-return=full", "c@d.example")
    envelope = server.messages[0].envelope
    assert envelope.dsn.ret == "FULL"
    assert envelope.rcpt_to[0].args == {"NOTIFY": "FAILURE,DELAY"}


def test_one_refused_recipient_and_it_sends_nothing(core: StartCore, msmtp: Msmtp) -> None:
    server = core()
    said = msmtp(server.port, "c@d.example", "nobody@d.example", status=RECIPIENT_REFUSED)
    assert "server message: 550 5.1.1 No such user" in said
    assert server.messages == []


def test_lmtp_answers_each_recipient(core: StartCore, msmtp: Msmtp) -> None:
    server = core(lmtp=True)
    msmtp(server.port, "--protocol=lmtp", "c@d.example", "e@f.example")
    assert server.messages[0].session.transmission_type == "LMTP"
    said = msmtp(server.port, "--protocol=lmtp", "c@d.example", "full@d.example", status=MESSAGE_REFUSED)
    assert "452 4.2.2 Mailbox full" in said


@pytest.mark.parametrize("lmtp", [False, True])
def test_a_unix_socket_takes_mail(core: StartCore, msmtp: Msmtp, programs: Programs, lmtp: bool) -> None:
    server = core(lmtp=lmtp)
    path = programs.directory / "core.sock"
    server.run(lambda: server.app.listen(path=str(path)))
    msmtp(server.port, f"--socket={path}", f"--protocol={'lmtp' if lmtp else 'smtp'}", "c@d.example")
    assert server.messages[0].session.remote_address.startswith("unix")


@pytest.mark.parametrize("implicit", [True, False])
@pytest.mark.parametrize("method", ["plain", "xoauth2"])
def test_through_the_edge_it_may_authenticate(
    core: StartCore, edge: StartEdge, msmtp: Msmtp, certificate: CertificateFiles, method: str, implicit: bool
) -> None:
    server = core(proxy_protocol="required", allow_insecure_auth=False, auth_optional=False)
    front = edge(server.port)
    tls = ["--tls", f"--tls-trust-file={certificate[0]}", f"--tls-starttls={'off' if implicit else 'on'}"]
    port = front.tls_port if implicit else front.starttls_port
    secret = "token" if method == "xoauth2" else "secret"
    msmtp(port, *tls, "--source-ip=127.0.0.9", *auth(method, secret), "c@d.example")
    session = server.messages[0].session
    assert (session.remote_address, session.user, session.transmission_type) == ("127.0.0.9", "joe", "ESMTPSA")
    assert session.tls
    assert session.tls.version == "TLSv1.3"
