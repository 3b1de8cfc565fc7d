"""``fumi-edge --cert … MODULE:APP``: the app runs in the edge's processes, without a backend."""

from __future__ import annotations

import signal
import smtplib
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.edge.program import Program
from tests.support import starter
from tests.support.status_page import read_page
from tests.support.waiting import until

APP = """
from fumi_core import Fumi
app = Fumi(auth_optional=True, name="mx.example", max_clients=3, socket_timeout=30)

@app.on_data
async def keep(ctx, next):
    text = await ctx.stream.read()
    ctx.accept(f"{len(text)} bytes {'over ' + ctx.session.tls.version if ctx.session.secure else 'in plaintext'}")

needs_login = Fumi(name="mx.example")

def make():
    return app
"""


@pytest.fixture
def directory(tmp_path: Path, certificate: tuple[Path, Path]) -> Path:
    (tmp_path / "myapp.py").write_text(APP)
    (tmp_path / "both.pem").write_text("".join(path.read_text() for path in certificate))
    return tmp_path


@pytest.fixture
def context(certificate: tuple[Path, Path]) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(certificate[0]))


ADDRESSES = ("--listen", "127.0.0.1:0", "--starttls-listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0")


@contextmanager
def program(directory: Path, *flags: str, app: str = "myapp:app") -> Iterator[Program]:
    started = Program("--cert", "both.pem", *ADDRESSES, *flags, app, cwd=directory)
    try:
        yield started
    finally:
        started.stop()


def send(smtp: smtplib.SMTP) -> str:
    smtp.ehlo()
    smtp.mail("a@b.example")
    smtp.rcpt("c@d.example")
    return smtp.data("Subject: hello\r\n\r\nhello\r\n")[1].decode()


def test_the_status_page_has_no_backends(directory: Path) -> None:
    with program(directory) as edge:
        page, _ = read_page(edge.metrics_port)
        assert "Backends" not in page.tables
        assert page.row("Listeners", f"127.0.0.1:{edge.tls_port}")[:2] == ["TLS", "core"]


@pytest.mark.parametrize("workers", ["1", "2"])
def test_the_app_takes_mail_over_tls_by_starttls_and_in_plaintext(directory: Path, context: ssl.SSLContext, workers: str) -> None:
    with program(directory, "--workers", workers, app="myapp:make()") as edge:
        with smtplib.SMTP_SSL("localhost", edge.tls_port, context=context) as smtp:
            assert send(smtp) == "2.0.0 25 bytes over TLSv1.3"
        with smtplib.SMTP("localhost", edge.starttls_port) as smtp:
            smtp.starttls(context=context)
            assert send(smtp) == "2.0.0 25 bytes over TLSv1.3"
        with smtplib.SMTP("localhost", edge.starttls_port) as smtp:
            assert send(smtp) == "2.0.0 25 bytes in plaintext"
        until(lambda: edge.metric("fumi_core_messages_total", result="accepted") == 3)
        until(lambda: edge.metric("fumi_edge_starttls_total", result="upgraded") == 1)
        assert edge.fetch("/readyz") == (200, "ready\n")
        assert {entry["backend"] for entry in edge.ended(3)} == {"core"}


def test_the_apps_own_limit_of_clients_counts(directory: Path, context: ssl.SSLContext) -> None:
    with program(directory) as edge:
        held = [smtplib.SMTP("localhost", edge.starttls_port) for _ in range(3)]
        with pytest.raises(smtplib.SMTPConnectError) as refused:
            smtplib.SMTP("localhost", edge.starttls_port)
        assert refused.value.smtp_code == 421
        for each in held:
            each.close()


def test_a_reload_refuses_settings_of_backends_as_the_start_does(directory: Path) -> None:
    (directory / "edge.toml").write_text("")
    with program(directory, "--config", "edge.toml") as edge:
        (directory / "edge.toml").write_text("[edge]\nbackend = '127.0.0.1:2525'\n")
        edge.process.send_signal(signal.SIGHUP)
        until(lambda: edge.events("reload failed: the old settings stay in use"))
        (failed,) = edge.events("reload failed: the old settings stay in use")
        assert failed["error"] == "--backend is for backends, which myapp:app replaces: remove it"


def test_sigterm_waits_for_the_end_of_a_message(directory: Path, context: ssl.SSLContext) -> None:
    with program(directory) as edge:
        smtp = smtplib.SMTP_SSL("localhost", edge.tls_port, context=context)
        smtp.ehlo()
        smtp.mail("a@b.example")
        smtp.rcpt("c@d.example")
        assert smtp.docmd("DATA")[0] == 354
        edge.process.send_signal(signal.SIGTERM)
        until(lambda: edge.events("draining"))
        smtp.send(b"hello\r\n.\r\n")
        assert smtp.getreply() == (250, b"2.0.0 7 bytes over TLSv1.3")
        assert smtp.getreply()[0] == 421
        smtp.close()
        assert edge.process.wait(30) == 0


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--backend", "127.0.0.1:2525", "myapp:app"), "--backend is for backends, which myapp:app replaces: remove it"),
        (("--balance", "first", "myapp:app"), "--balance is for backends, which myapp:app replaces: remove it"),
        (("myapp:nothing",), "myapp:nothing: myapp has no nothing"),
        (("myapp:make",), "myapp:make is a function, not a Fumi; if it returns one, write myapp:make()"),
        (("--check", "myapp:needs_login"), "myapp:needs_login: no client can send mail"),
        (("--emit", "haproxy", "myapp:app"), "--emit: myapp:app runs in fumi-edge alone; name a --backend instead"),
    ],
)
def test_what_cannot_work_is_one_line(directory: Path, flags: tuple[str, ...], said: str) -> None:
    done = starter.finished("fumi-edge", "--cert", "both.pem", *flags, cwd=directory, timeout=60)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("app", ["myapp:app", "myapp:make()"])
def test_check_finds_nothing_wrong(directory: Path, app: str) -> None:
    done = starter.finished("fumi-edge", "--cert", "both.pem", "--check", *ADDRESSES, app, cwd=directory, timeout=60)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "configuration OK")
