"""HAProxy in front of the core: what its header says arrives in the session."""

from __future__ import annotations

import smtplib
import ssl
import subprocess
from pathlib import Path
from typing import Any

import pytest

from fumi_core import Fumi
from fumi_core.testing import running

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
def test_the_session_is_as_haproxy_says(flags: str, programs: Any, certificate: tuple[Path, Path]) -> None:
    app = Fumi(auth_optional=True, proxy_protocol="required", close_timeout=1)
    sessions: list[Any] = []
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
        assert session.tls.version == "TLSv1.3"
        assert session.tls.client_cert is False
    if flags == FULL:
        assert session.tls.cipher.startswith("TLS_")
        assert session.tls.sni == "localhost"


def test_its_health_checks_are_answered_and_leave_no_trace(programs: Any, certificate: tuple[Path, Path], caplog: Any) -> None:
    app = Fumi(auth_optional=True, proxy_protocol="required", close_timeout=1)
    sessions: list[Any] = []
    app.on_connect(lambda ctx, next: sessions.append(ctx.session))
    with running(app) as server:
        _start(programs, certificate, server.port, "send-proxy-v2 check inter 50ms")
        until = programs.until
        until(lambda: len(sessions) >= 3, "three health checks")
    assert not any(session.secure for session in sessions)
    assert caplog.text == ""


def _start(programs: Any, certificate: tuple[Path, Path], core: int, flags: str) -> int:
    port: int = programs.free_port()
    path = programs.directory / "haproxy.cfg"
    pem = certificate[0].with_name("both.pem")
    path.write_text(CONFIGURATION.format(port=port, pem=pem, core=core, flags=flags))
    subprocess.run(["haproxy", "-c", "-f", path], check=True, capture_output=True)
    programs.start("haproxy", "-f", path, port=port)
    return port
