"""Servers of others behind the edge, which know no PROXY protocol: Postfix's smtp-sink and PyPI's aiosmtpd."""

from __future__ import annotations

import os
import smtplib
import socket
import ssl
from collections.abc import Callable

import pytest

from tests.bench import environment
from tests.support.certificates import CertificateFiles
from tests.support.ports import free_port
from tests.support.programs import Programs
from tests.support.starter import BIN
from tests.support.waiting import until

TEXT = "Subject: test\r\n\r\nhello\r\n.dot\r\n" + "x" * 998 + "\r\nbye\r\n"
AIOSMTPD = """
import sys, threading
from aiosmtpd.controller import Controller
from aiosmtpd.handlers import Mailbox
Controller(Mailbox(sys.argv[2]), hostname="127.0.0.1", port=int(sys.argv[1]), ready_timeout=60).start()
threading.Event().wait()
"""


def smtp_sink(programs: Programs, *flags: str) -> int:
    """Postfix's sink, which keeps each message in a file of mails/; root has to say that it wants to stay root."""
    environment.INSTALLED.mkdir(exist_ok=True)
    environment.install_postfix()
    (programs.directory / "mails").mkdir()
    user = ["-u", "root"] if os.geteuid() == 0 else []
    libraries = [f"{name}={value}" for name, value in environment.postfix_environment().items()]
    port: int = free_port()
    command = ["env", *libraries, *environment.postfix_program("smtp-sink"), *user, "-d", "mails/%H.", *flags]
    programs.start(*command, f"127.0.0.1:{port}", "64", port=port, log="sink.log")
    return port


def aiosmtpd(programs: Programs, *flags: str) -> int:
    environment.INSTALLED.mkdir(exist_ok=True)
    environment.install_aiosmtpd()
    port: int = free_port()
    programs.start(environment.aiosmtpd_python(), "-c", AIOSMTPD, str(port), "mails", port=port, log="aiosmtpd.log")
    return port


def delivered(programs: Programs) -> list[bytes]:
    return [path.read_bytes() for path in (programs.directory / "mails").rglob("*") if path.is_file()]


@pytest.fixture
def edge(programs: Programs, certificate: CertificateFiles) -> Callable[..., tuple[int, int]]:
    """fumi-edge in front of a port; the ports of TLS and STARTTLS."""

    def start(behind: int, *flags: str) -> tuple[int, int]:
        tls, starttls = free_port(), free_port()
        pair = ["--cert", str(certificate[0]), "--key", str(certificate[1])]
        files = [*pair, "--backend", f"127.0.0.1:{behind}", "--proxy-protocol", "off"]
        ports = ["--listen", f"127.0.0.1:{tls}", "--starttls-listen", f"127.0.0.1:{starttls}", "--health-interval", "0.2"]
        programs.start(BIN / "fumi-edge", *files, *ports, *flags, port=starttls, log="edge.log")
        return tls, starttls

    return start


@pytest.mark.parametrize("server", [smtp_sink, aiosmtpd], ids=["smtp-sink", "aiosmtpd"])
def test_mail_comes_through_by_tls_and_by_starttls(
    server: Callable[..., int], edge: Callable[..., tuple[int, int]], programs: Programs, certificate: CertificateFiles
) -> None:
    tls, starttls = edge(server(programs))
    context = ssl.create_default_context(cafile=str(certificate[0]))
    with smtplib.SMTP_SSL("127.0.0.1", tls, context=context) as smtp:
        smtp.sendmail("a@b.example", ["c@d.example"], TEXT)
    with smtplib.SMTP("127.0.0.1", starttls) as smtp:
        smtp.ehlo()
        smtp.ehlo()
        assert smtp.has_extn("starttls")
        smtp.starttls(context=context)
        smtp.ehlo()
        assert not smtp.has_extn("starttls")
        smtp.sendmail("a@b.example", ["c@d.example"], TEXT)
    with smtplib.SMTP("127.0.0.1", starttls) as smtp:
        smtp.sendmail("a@b.example", ["c@d.example"], TEXT)
    until(lambda: len(delivered(programs)) == 3, "the third message")
    for message in delivered(programs):
        assert message.replace(b"\r\n", b"\n").rstrip(b"\n").endswith(b"\nhello\n.dot\n" + b"x" * 998 + b"\nbye")
    # The checks, five a second by now, found nothing wrong.
    assert "backend down" not in (programs.directory / "edge.log").read_text()


def test_the_rejection_of_a_sink_is_relayed(edge: Callable[..., tuple[int, int]], programs: Programs) -> None:
    """Its banner is a hard error; the checks call it down, and the client still hears it in its own words."""
    _, starttls = edge(smtp_sink(programs, "-f", "connect"))
    until(lambda: "backend down" in (programs.directory / "edge.log").read_text(), "the verdict")
    with socket.create_connection(("127.0.0.1", starttls), 60) as client, client.makefile("rb") as replies:
        assert replies.readline().startswith(b"5")
        client.sendall(b"QUIT\r\n")
        assert replies.readline()
