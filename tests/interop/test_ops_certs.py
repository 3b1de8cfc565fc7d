"""ops/certs/dev-ca makes certificates that openssl, the edge and Python's strict clients take."""

from __future__ import annotations

import smtplib
import ssl
from collections.abc import Awaitable
from pathlib import Path

import pytest

from fumi_core import Fumi, MailContext, Next
from fumi_core.testing import running
from tests.support.ports import free_port
from tests.support.programs import Programs
from tests.support.starter import BIN

DEV_CA = Path(__file__).parents[2] / "ops" / "certs" / "dev-ca"


def test_openssl_verifies_what_it_makes_for_the_purpose_and_for_no_other(programs: Programs) -> None:
    programs.run(DEV_CA, "ca", "server", "mx.example.org", "127.0.0.1", "::1", "*.example.net")
    programs.run(DEV_CA, "ca", "client", "joe@example.org")
    verify = ["openssl", "verify", "-x509_strict", "-CAfile", "ca/ca.pem"]
    server, client = "ca/mx.example.org.pem", "ca/joe@example.org-client.pem"
    for name in ("mx.example.org", "a.example.net"):
        programs.run(*verify, "-purpose", "sslserver", "-verify_hostname", name, server)
    for address in ("127.0.0.1", "::1"):
        programs.run(*verify, "-purpose", "sslserver", "-verify_ip", address, server)
    programs.run(*verify, "-purpose", "sslserver", "-verify_hostname", "example.org", server, status=2)
    programs.run(*verify, "-purpose", "sslclient", client)
    programs.run(*verify, "-purpose", "sslserver", client, status=2)
    programs.run(*verify, "-purpose", "sslclient", server, status=2)


def test_the_authority_stays_and_keys_are_the_owners_alone(programs: Programs) -> None:
    assert programs.run(DEV_CA, "ca", "server", "one.example") == "ca/one.example.pem\n"
    authority = (programs.directory / "ca" / "ca.pem").read_bytes()
    first = (programs.directory / "ca" / "one.example.pem").read_bytes()
    programs.run(DEV_CA, "ca", "server", "one.example")
    assert (programs.directory / "ca" / "ca.pem").read_bytes() == authority
    assert (programs.directory / "ca" / "one.example.pem").read_bytes() != first
    modes = {path.name: path.stat().st_mode & 0o777 for path in (programs.directory / "ca").iterdir()}
    assert modes == {"ca.pem": 0o644, "ca.key": 0o600, "one.example.pem": 0o600}


@pytest.mark.parametrize(
    "words", [[], ["ca"], ["ca", "server"], ["ca", "robot", "x"], ["ca", "client", "a", "b"], ["ca", "server", "a;b"],
              ["ca", "server", "../x"], ["ca", "server", "x", "-y"], ["ca", "server", "ca"]]
)  # fmt: skip
def test_invalid_arguments_are_errors(words: list[str], programs: Programs) -> None:
    assert "dev-ca" in programs.run(DEV_CA, *words, status=2)
    assert list(programs.directory.rglob("*.pem")) in ([], [programs.directory / "ca" / "ca.pem"])


def test_the_edge_serves_them_and_a_client_with_one_comes_in(programs: Programs) -> None:
    for words in (["server", "localhost", "127.0.0.1"], ["client", "joe"]):
        programs.run(DEV_CA, "ca", *words)
    app = Fumi(auth_optional=True, proxy_protocol="required", close_timeout=0.2)
    names: list[str | None] = []

    def note(ctx: MailContext, next: Next) -> Awaitable[None]:
        assert ctx.session.tls
        names.append(ctx.session.tls.client_cn)
        return next()

    app.on_mail_from(note)
    with running(app) as server:
        port = free_port()
        flags = ["--cert", "ca/localhost.pem", "--client-ca", "ca/ca.pem", "--client-cert", "required"]
        flags += ["--backend", f"127.0.0.1:{server.port}", "--listen", f"127.0.0.1:{port}"]
        assert "configuration OK" in programs.run(BIN / "fumi-edge", *flags, "--check")
        programs.start(BIN / "fumi-edge", *flags, port=port, log="edge.log")
        context = ssl.create_default_context(cafile=str(programs.directory / "ca" / "ca.pem"))
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        context.load_cert_chain(programs.directory / "ca" / "joe-client.pem")
        with smtplib.SMTP_SSL("127.0.0.1", port, context=context) as smtp:
            smtp.sendmail("a@b.example", ["c@d.example"], "hi")
    assert names == ["joe"]
