"""HAProxy in front of the core: what its header says arrives in the session."""

from __future__ import annotations

import smtplib
import ssl
import subprocess
from collections.abc import Awaitable

import pytest

from fumi_core import Fumi, MailContext, Next, Session
from fumi_core.testing import running
from tests.support.certificates import CertificateFiles
from tests.support.ports import free_port
from tests.support.programs import Programs
from tests.support.starter import BIN
from tests.support.waiting import until

CONFIGURATION = """
global
    maxconn 100
defaults
    mode tcp
    timeout connect 5s
    timeout client 60s
    timeout server 60s
listen smtps
    bind 127.0.0.1:{port} ssl crt {pem} alpn smtp
    server core 127.0.0.1:{core} {flags}
"""
FULL = "send-proxy-v2-ssl-cn proxy-v2-options ssl,cert-cn,ssl-cipher,authority,crc32c,unique-id"


@pytest.mark.parametrize("flags", ["send-proxy-v2-ssl-cn", FULL, "send-proxy"])
def test_the_session_is_as_haproxy_says(flags: str, programs: Programs, certificate: CertificateFiles) -> None:
    app = Fumi(auth_optional=True, proxy_protocol="required", close_timeout=1)
    sessions: list[Session] = []
    app.on_connect(lambda ctx, next: sessions.append(ctx.session))
    with running(app) as server:
        port = _start(programs, certificate, server.port, flags)
        context = ssl.create_default_context(cafile=str(certificate[0]))
        with smtplib.SMTP_SSL("localhost", port, context=context, source_address=("127.0.0.9", 0)) as smtp:
            smtp.sendmail("a@b.example", ["c@d.example"], "Subject: hi\r\n\r\nhi\r\n")
        assert server.messages[0].body == b"Subject: hi\r\n\r\nhi\r\n"
    (session,) = sessions
    assert session.remote_address == "127.0.0.9"
    assert session.proxy_address == "127.0.0.1"
    assert session.local_port == port
    if flags == "send-proxy":
        assert (session.secure, session.tls) == (False, None)
    else:
        assert session.secure
        assert session.tls
        assert session.tls.version == "TLSv1.3"
        assert session.tls.client_cert is False
    if flags == FULL:
        assert session.tls
        assert (session.tls.cipher or "").startswith("TLS_")
        assert session.tls.sni == "localhost"


def test_its_health_checks_are_answered_and_leave_no_trace(
    programs: Programs, certificate: CertificateFiles, caplog: pytest.LogCaptureFixture
) -> None:
    app = Fumi(auth_optional=True, proxy_protocol="required", close_timeout=1)
    sessions: list[Session] = []
    app.on_connect(lambda ctx, next: sessions.append(ctx.session))
    with running(app) as server:
        _start(programs, certificate, server.port, "send-proxy-v2 check inter 50ms")

        until(lambda: len(sessions) >= 3, "three health checks")
    assert not any(session.secure for session in sessions)
    assert caplog.text == ""


def _start(programs: Programs, certificate: CertificateFiles, core: int, flags: str) -> int:
    port: int = free_port()
    path = programs.directory / "haproxy.cfg"
    pem = certificate[0].with_name("both.pem")
    path.write_text(CONFIGURATION.format(port=port, pem=pem, core=core, flags=flags))
    subprocess.run(["haproxy", "-c", "-f", path], check=True, capture_output=True)
    programs.start("haproxy", "-f", path, port=port)
    return port


LAYER_4 = """
global
    maxconn 100
defaults
    mode tcp
    timeout connect 5s
    timeout client 60s
    timeout server 60s
listen {name}
    bind 127.0.0.1:{port}
    server edge 127.0.0.1:{edge} {flags}
"""


@pytest.mark.parametrize(
    "flags", ["send-proxy", "send-proxy-v2", "send-proxy-v2 check inter 50ms", "send-proxy check inter 50ms"]
)
def test_as_a_layer_4_balancer_it_leaves_tls_and_starttls_to_the_edge(
    flags: str, programs: Programs, certificate: CertificateFiles
) -> None:
    app = Fumi(auth_optional=True, proxy_protocol="required", close_timeout=1)
    sessions: list[Session] = []

    def keep(ctx: MailContext, next: Next) -> Awaitable[None]:
        sessions.append(ctx.session)
        return next()

    app.on_mail_from(keep)
    with running(app) as server:
        edge, front = ([free_port() for _ in range(2)] for _ in range(2))
        files = [
            "--cert",
            str(certificate[0]),
            "--key",
            str(certificate[1]),
            "--backend",
            f"127.0.0.1:{server.port}",
            "--accept-proxy",
        ]
        ports = ["--listen", f"127.0.0.1:{edge[0]}", "--starttls-listen", f"127.0.0.1:{edge[1]}"]
        programs.start(BIN / "fumi-edge", *files, *ports, port=edge[1], log="edge.log")
        for name, port, behind in zip(("smtps", "smtp"), front, edge, strict=True):
            path = programs.directory / f"{name}.cfg"
            path.write_text(LAYER_4.format(name=name, port=port, edge=behind, flags=flags))
            programs.start("haproxy", "-f", path, port=port, log="haproxy.log")
        context = ssl.create_default_context(cafile=str(certificate[0]))
        with smtplib.SMTP_SSL("localhost", front[0], context=context, source_address=("127.0.0.9", 0)) as smtp:
            smtp.sendmail("a@b.example", ["c@d.example"], "Subject: hi\r\n\r\nhi\r\n")
        with smtplib.SMTP("localhost", front[1], source_address=("127.0.0.9", 0)) as plain:
            plain.starttls(context=context)
            plain.sendmail("a@b.example", ["c@d.example"], "Subject: hi\r\n\r\nhi\r\n")
        assert len(server.messages) == 2
        path = programs.directory / "edge.log"
        until(lambda: path.read_text().count("connection ended") >= 2, "the end")
        log = path.read_text()
    for session, port in zip(sessions, front, strict=True):
        assert (session.remote_address, session.local_port) == ("127.0.0.9", port)
        assert session.tls
        assert session.tls.version == "TLSv1.3"
    # Its checks are no clients, whether they send a header or not.
    assert log.count("connection ended") == 2, log
    assert "WARN" not in log
