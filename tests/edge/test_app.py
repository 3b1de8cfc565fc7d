"""``fumi_edge.Fumi``: the app with TLS in the same process."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import runpy
import smtplib
import socket
import ssl
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fumi_core import AuthContext, Next, plugins
from fumi_core.proxy_protocol import ProxyHeader
from fumi_core.testing import RunningServer, running
from fumi_edge import Fumi
from fumi_edge.tls.pem import CertificateError
from tests.edge.clients import Clients
from tests.support.certificates import Authority, CertificateFiles, MakeCertificate, shown_pem
from tests.support.waiting import until

TEXT = "Subject: hello\r\n\r\nhello\r\n"


@pytest.fixture
def pem(certificate: tuple[Path, Path]) -> dict[str, str]:
    return {"cert": certificate[0].read_text(), "key": certificate[1].read_text()}


MakeApp = Callable[..., Fumi]


@pytest.fixture
def make(pem: dict[str, str]) -> MakeApp:
    def app(**options: Any) -> Fumi:
        return Fumi(**{"auth_optional": True, "name": "mx.example", "close_timeout": 0.2, **pem, **options})

    return app


@pytest.fixture
def context(clients: Clients) -> ssl.SSLContext:
    return clients.context()


def upgraded(server: RunningServer, context: ssl.SSLContext, **options: Any) -> smtplib.SMTP:
    smtp = smtplib.SMTP("127.0.0.1", server.port, timeout=30, **options)
    smtp.starttls(context=context)
    return smtp


def tls_of(smtp: smtplib.SMTP_SSL) -> ssl.SSLSocket:
    assert isinstance(smtp.sock, ssl.SSLSocket)
    return smtp.sock


def test_a_server_name_that_is_not_ascii_is_one_log_line(
    make: MakeApp, context: ssl.SSLContext, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = context.wrap_bio(incoming, outgoing, server_hostname="aaaaaaaa.example")
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    hello = outgoing.read().replace(b"aaaaaaaa.example", b"\xff\xfe\xfd\xfc\xfb\xfa\xf9\xf8.example")
    caplog.set_level("INFO")
    with running(make(secure=True)) as server, socket.create_connection(("127.0.0.1", server.port), 30) as sock:
        sock.sendall(hello)
        while sock.recv(4096):
            pass
    assert [record.getMessage() for record in caplog.records].count("server name is not ASCII") == 1
    assert "Traceback" not in capsys.readouterr().err


def test_an_app_that_a_type_checker_accepts_takes_mail_over_tls(certificate: CertificateFiles, context: ssl.SSLContext) -> None:
    app_file = Path(__file__).parents[1] / "typing" / "edge_app.py"
    app = runpy.run_path(str(app_file))["make"](certificate[0], certificate[1].read_bytes())
    with running(app) as server, smtplib.SMTP_SSL("127.0.0.1", server.port, context=context, timeout=30) as smtp:
        smtp.sendmail("a@b.example", ["c@d.example"], TEXT)
        assert len(server.messages) == 1


def test_implicit_tls_tells_handlers_all_that_the_program_tells_them(make: MakeApp, context: ssl.SSLContext) -> None:
    with running(make(secure=True)) as server:
        with smtplib.SMTP_SSL("127.0.0.1", server.port, context=context, timeout=30) as smtp:
            smtp.sendmail("a@b.example", ["c@d.example"], TEXT)
            sock = tls_of(smtp)
            agreed, local = sock.cipher(), sock.getsockname()
        session = server.messages[0].session
    assert session.secure
    assert session.tls
    assert agreed
    assert (session.tls.version, session.tls.cipher, session.tls.sni) == ("TLSv1.3", agreed[0], None)
    assert (session.remote_address, session.remote_port) == local
    assert (session.local_address, session.local_port) == ("127.0.0.1", server.port)
    assert session.transmission_type == "ESMTPS"
    assert server.messages[0].body == TEXT.encode()


def test_without_secure_there_is_starttls_and_plaintext(make: MakeApp, context: ssl.SSLContext) -> None:
    with running(make()) as server:
        with smtplib.SMTP("127.0.0.1", server.port, timeout=30) as smtp:
            smtp.ehlo()
            assert smtp.has_extn("starttls")
            smtp.sendmail("a@b.example", ["c@d.example"], TEXT)
        with upgraded(server, context) as smtp:
            smtp.ehlo()
            assert not smtp.has_extn("starttls")
            smtp.sendmail("a@b.example", ["c@d.example"], TEXT)
        assert [each.session.secure for each in server.messages] == [False, True]


def test_key_and_cert_are_text_bytes_or_paths(
    make: MakeApp, pem: dict[str, str], certificate: CertificateFiles, context: ssl.SSLContext
) -> None:
    whole = pem["cert"] + pem["key"]
    for given in (
        {name: text.encode() for name, text in pem.items()},
        {"cert": str(certificate[0]), "key": str(certificate[1])},
        {"cert": certificate[0], "key": certificate[1]},
        {"cert": whole, "key": None},
    ):
        with (
            running(make(secure=True, **given)) as server,
            smtplib.SMTP_SSL("127.0.0.1", server.port, context=context, timeout=30) as smtp,
        ):
            assert smtp.noop()[0] == 250


def test_ca_requests_a_certificate_from_clients(make: MakeApp, clients: Clients, authority: Authority) -> None:
    names = []
    app = make(secure=True, ca=Path(authority.path).read_bytes())
    app.on_mail_from(lambda ctx, next: names.append((ctx.session.tls.client_cert_verified, ctx.session.tls.client_cn)))
    with running(app) as server:
        for pair in (None, authority.issue("the client")):
            context = clients.context()
            if pair:
                context.load_cert_chain(*pair)
            with smtplib.SMTP_SSL("127.0.0.1", server.port, context=context, timeout=30) as smtp:
                smtp.sendmail("a@b.example", ["c@d.example"], TEXT)
    assert names == [(False, None), (True, "the client")]


def test_require_tls_answers_530_until_there_is_tls(make: MakeApp, context: ssl.SSLContext) -> None:
    for app in (make(require_tls=True), make().use(plugins.require_tls())):
        with running(app) as server:
            with smtplib.SMTP("127.0.0.1", server.port, timeout=30) as smtp:
                smtp.ehlo()
                assert smtp.mail("a@b.example") == (530, b"5.7.0 Must issue a STARTTLS command first")
            with upgraded(server, context) as smtp:
                smtp.sendmail("a@b.example", ["c@d.example"], TEXT)
            assert len(server.messages) == 1


def test_auth_is_there_only_inside_tls(make: MakeApp, context: ssl.SSLContext) -> None:
    app = make(auth_optional=False)

    @app.on_auth
    async def authenticate(ctx: AuthContext, next: Next) -> None:
        if ctx.credentials.validate_password("secret"):
            ctx.accept(ctx.credentials.username)

    with running(app) as server:
        with smtplib.SMTP("127.0.0.1", server.port, timeout=30) as smtp:
            smtp.ehlo()
            assert not smtp.has_extn("auth")
            assert smtp.docmd("AUTH", "PLAIN AGpvZQBzZWNyZXQ=")[0] == 538
        with upgraded(server, context) as smtp:
            smtp.ehlo()
            smtp.login("joe", "secret")
            smtp.sendmail("a@b.example", ["c@d.example"], TEXT)
        assert server.messages[0].session.user == "joe"
        assert server.messages[0].session.transmission_type == "ESMTPSA"


def test_hide_starttls_hides_it_and_still_accepts_it(make: MakeApp, context: ssl.SSLContext) -> None:
    with running(make(hide_starttls=True)) as server, smtplib.SMTP("127.0.0.1", server.port, timeout=30) as smtp:
        smtp.ehlo()
        assert not smtp.has_extn("starttls")
        assert smtp.docmd("STARTTLS")[0] == 220
        assert smtp.sock
        with context.wrap_socket(smtp.sock, server_hostname="localhost") as tls:
            assert tls.version() == "TLSv1.3"


def test_hide_requiretls_takes_it_out_of_what_tls_clients_are_offered(make: MakeApp, context: ssl.SSLContext) -> None:
    for hidden in (False, True):
        with (
            running(make(secure=True, hide_requiretls=hidden)) as server,
            smtplib.SMTP_SSL("127.0.0.1", server.port, context=context, timeout=30) as smtp,
        ):
            smtp.ehlo()
            assert smtp.has_extn("requiretls") is not hidden


def test_one_client_too_many_is_421(make: MakeApp) -> None:
    with running(make(max_clients=1)) as server, smtplib.SMTP("127.0.0.1", server.port, timeout=30) as first:
        assert first.noop()[0] == 250
        with pytest.raises(smtplib.SMTPConnectError, match="421"):
            smtplib.SMTP("127.0.0.1", server.port, timeout=30)


def test_update_secure_context_is_for_new_connections(
    make: MakeApp, certificate: CertificateFiles, make_certificate: MakeCertificate, clients: Clients
) -> None:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    other = make_certificate("other.example")
    app = make(secure=True)
    with running(app) as server:
        with smtplib.SMTP_SSL("127.0.0.1", server.port, context=context, timeout=30) as old:
            app.update_secure_context(key=other[1], cert=other[0])
            with smtplib.SMTP_SSL("127.0.0.1", server.port, context=context, timeout=30) as new:
                assert shown_pem(tls_of(new)).strip() == other[0].read_text().strip()
            assert old.noop()[0] == 250
        with pytest.raises(CertificateError):
            app.update_secure_context(key=certificate[1], cert=other[0])
        with smtplib.SMTP_SSL("127.0.0.1", server.port, context=context, timeout=30) as kept:
            assert shown_pem(tls_of(kept)).strip() == other[0].read_text().strip()


def test_a_balancers_header_comes_before_tls(make: MakeApp, context: ssl.SSLContext) -> None:
    header = ProxyHeader(2, "PROXY", "TCP4", ("192.0.2.7", 4711), ("198.51.100.1", 465)).to_bytes()
    with running(make(secure=True, proxy_protocol="required")) as server:
        sock = socket.create_connection(("127.0.0.1", server.port), timeout=30)
        sock.sendall(header)
        with context.wrap_socket(sock, server_hostname="localhost") as tls, tls.makefile("rb") as replies:
            tls.sendall(b"EHLO x\r\nMAIL FROM:<>\r\nRCPT TO:<a@b.example>\r\nDATA\r\n.\r\nQUIT\r\n")
            assert b"221" in replies.read()
        session = server.messages[0].session
    assert (session.remote_address, session.remote_port, session.local_port) == ("192.0.2.7", 4711, 465)
    assert session.secure


def test_close_waits_for_the_end_of_a_message(make: MakeApp, context: ssl.SSLContext) -> None:
    app = make(secure=True, close_timeout=30)
    with running(app) as server, smtplib.SMTP_SSL("127.0.0.1", server.port, context=context, timeout=30) as smtp:
        smtp.ehlo()
        smtp.mail("a@b.example")
        smtp.rcpt("c@d.example")
        assert smtp.docmd("DATA")[0] == 354
        closing = threading.Thread(target=server.run, args=(app.close,))
        closing.start()
        smtp.send(b"x\r\n.\r\n")
        assert smtp.getreply()[0] == 250
        assert smtp.getreply()[0] == 421
        smtp.close()
        closing.join()
        assert len(server.messages) == 1


def test_without_a_certificate_it_is_the_core(context: ssl.SSLContext) -> None:
    with running(Fumi(auth_optional=True, close_timeout=0.2)) as server:
        with smtplib.SMTP("127.0.0.1", server.port, timeout=30) as smtp:
            smtp.ehlo()
            assert not smtp.has_extn("starttls")
            smtp.sendmail("a@b.example", ["c@d.example"], TEXT)
        assert not server.messages[0].session.secure


def test_arguments_that_cannot_work_raise_an_error(pem: dict[str, str], make_certificate: MakeCertificate) -> None:
    for wrong in ({"secure": True}, {"key": pem["key"]}, {"ca": pem["cert"]}):
        with pytest.raises(TypeError, match="needs a certificate"):
            Fumi(**wrong)
    misspelt: dict[str, Any] = {"auth_optinal": True, **pem}
    with pytest.raises(TypeError, match="did you mean 'auth_optional'"):
        Fumi(**misspelt)
    with pytest.raises(CertificateError, match="does not belong"):
        Fumi(cert=pem["cert"], key=make_certificate("other.example")[1])
    with pytest.raises(CertificateError, match="holds no private key"):
        Fumi(cert=pem["cert"])
    with pytest.raises(TypeError, match="no certificate to update"):
        Fumi().update_secure_context(**pem)


def test_a_cancelled_close_closes_the_remaining_connections(make: MakeApp) -> None:
    async def main() -> None:
        app = make(close_timeout=1000)
        await app.listen(0)
        reader, writer = await asyncio.open_connection("127.0.0.1", app.port)
        writer.write(b"EHLO x\r\nMAIL FROM:<>\r\n")
        while b"250 2.1.0" not in await reader.readline():
            pass
        # It waits for the transaction to end, and is cancelled meanwhile.
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await app.close()
        with contextlib.suppress(ConnectionError):
            await reader.read()
        writer.close()
        while len(asyncio.all_tasks()) > 1:
            await asyncio.sleep(0)

    asyncio.run(main())


def test_a_loop_that_ends_without_a_close_ends_the_threads(make: MakeApp) -> None:
    before = set(threading.enumerate())

    async def main() -> None:
        await make().listen(0, "127.0.0.1")
        assert set(threading.enumerate()) - before

    asyncio.run(main())
    until(lambda: not set(threading.enumerate()) - before, "the end of all threads")


@pytest.mark.parametrize("secure", [True, False])
def test_a_loop_that_ends_without_a_close_ends_the_connections(make: MakeApp, context: ssl.SSLContext, secure: bool) -> None:
    app = make(secure=secure)
    noises: list[object] = []

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: noises.append(context))
        await app.listen(0, "127.0.0.1")
        client = await asyncio.to_thread(socket.create_connection, ("127.0.0.1", app.port), 30)
        if secure:
            client = await asyncio.to_thread(context.wrap_socket, client, server_hostname="localhost")
        assert (await asyncio.to_thread(client.recv, 100)).startswith(b"220 ")
        clients.append(client)

    clients: list[socket.socket] = []
    asyncio.run(main())
    gc.collect()
    with clients[0]:
        while clients[0].recv(100):
            pass
    assert noises == []
