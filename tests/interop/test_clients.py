"""Programs that nobody here wrote send mail over TLS and STARTTLS; it arrives byte for byte, with how and whence it came.

They come from 127.0.0.9, so that a trace line that names the terminator instead of the client would show.
"""

from __future__ import annotations

import smtplib
import ssl
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.certificates import CertificateFiles
from tests.support.programs import Setup

CLIENT = "127.0.0.9"
TEXT = "From: a@b.example\r\nTo: c@d.example\r\nSubject: test\r\n\r\nhello\r\n.dot\r\n..dots\r\n\r\n" + "x" * 998 + "\r\nbye\r\n"


def run(command: list[str | Path], given: str = "") -> str:
    done = subprocess.run(command, input=given.encode(), capture_output=True, timeout=60)
    assert done.returncode == 0, (done.stdout, done.stderr)
    return (done.stdout + done.stderr).decode()


def swaks(port: int, cert: Path, *flags: str) -> None:
    # It ends the text with a line end of its own.
    common = ["--from", "a@b.example", "--to", "c@d.example", "--local-interface", CLIENT, "--data", "-"]
    said = run(["swaks", "--server", f"127.0.0.1:{port}", *common, *flags], TEXT.replace("\r\n", "\n")[:-1])
    assert "250 2.0.0 Ok: queued as " in said


def swaks_tls_on_connect(setup: Setup, cert: Path) -> None:
    swaks(setup.tls_port, cert, "--tls-on-connect")


def swaks_starttls(setup: Setup, cert: Path) -> None:
    swaks(setup.starttls_port, cert, "--tls")


def swaks_pipelining(setup: Setup, cert: Path) -> None:
    swaks(setup.starttls_port, cert, "--tls", "--pipeline")


def smtplib_ssl(setup: Setup, cert: Path) -> None:
    context = ssl.create_default_context(cafile=str(cert))
    with smtplib.SMTP_SSL("127.0.0.1", setup.tls_port, context=context, source_address=(CLIENT, 0)) as smtp:
        assert smtp.sendmail("a@b.example", ["c@d.example"], TEXT) == {}


def smtplib_starttls(setup: Setup, cert: Path) -> None:
    context = ssl.create_default_context(cafile=str(cert))
    with smtplib.SMTP("127.0.0.1", setup.starttls_port, source_address=(CLIENT, 0)) as smtp:
        assert smtp.starttls(context=context)[0] == 220
        assert smtp.sendmail("a@b.example", ["c@d.example"], TEXT) == {}


def curl(setup: Setup, cert: Path, tmp: Path, url: str, *flags: str) -> None:
    (tmp / "mail").write_bytes(TEXT.encode())
    envelope = ["--mail-from", "a@b.example", "--mail-rcpt", "c@d.example", "--upload-file", str(tmp / "mail")]
    said = run(["curl", "-sv", "--cacert", str(cert), "--interface", CLIENT, *flags, url, *envelope])
    assert "250 2.0.0 Ok: queued as " in said


def curl_smtps(setup: Setup, cert: Path) -> None:
    curl(setup, cert, cert.parent, f"smtps://127.0.0.1:{setup.tls_port}")


def curl_starttls(setup: Setup, cert: Path) -> None:
    curl(setup, cert, cert.parent, f"smtp://127.0.0.1:{setup.starttls_port}", "--ssl-reqd")


def openssl(setup: Setup, cert: Path, port: int, *flags: str) -> None:
    stuffed = TEXT.replace("\r\n.", "\r\n..").replace("\r\n", "\n")
    lines = ["EHLO me", "MAIL FROM:<a@b.example>", "RCPT TO:<c@d.example>", "DATA", stuffed + ".", "QUIT"]
    command = ["openssl", "s_client", "-quiet", "-crlf", "-bind", CLIENT, "-CAfile", str(cert), "-verify_return_error"]
    said = run([*command, *flags, "-connect", f"127.0.0.1:{port}"], "\n".join(lines) + "\n")
    assert "250 2.0.0 Ok: queued as " in said
    assert "221 2.0.0 Bye" in said


def openssl_starttls(setup: Setup, cert: Path) -> None:
    openssl(setup, cert, setup.starttls_port, "-starttls", "smtp")


def openssl_tls(setup: Setup, cert: Path) -> None:
    openssl(setup, cert, setup.tls_port)


SENDERS = [
    swaks_tls_on_connect,
    swaks_starttls,
    swaks_pipelining,
    smtplib_ssl,
    smtplib_starttls,
    curl_smtps,
    curl_starttls,
    openssl_tls,
    openssl_starttls,
]


def check(setup: Setup, count: int) -> None:
    messages = setup.maildir.messages()
    assert len(messages) == count
    for message in messages:
        assert message.text == TEXT.replace("\r\n", "\n").encode()
        assert "Return-Path: <a@b.example>\nDelivered-To: c@d.example\nReceived: from " in message.headers
        assert f" ([{CLIENT}]) (using TLSv1.3 with cipher TLS_" in message.headers
        assert " with ESMTPS id " in message.headers


@pytest.mark.parametrize("sender", SENDERS)
def test_a_client_sends_through_edge_and_core(
    sender: Callable[..., None], two_processes: Callable[..., Setup], certificate: CertificateFiles
) -> None:
    setup = two_processes()
    sender(setup, certificate[0])
    check(setup, 1)


def test_all_clients_send_through_edge_dev(dev: Callable[[], Setup]) -> None:
    setup = dev()
    swaks(setup.tls_port, Path(), "--tls-on-connect")
    swaks(setup.starttls_port, Path(), "--tls")
    check(setup, 2)


def test_a_client_that_never_upgrades_is_not_secure(two_processes: Callable[..., Setup]) -> None:
    setup = two_processes()
    with smtplib.SMTP("127.0.0.1", setup.starttls_port, source_address=(CLIENT, 0)) as smtp:
        smtp.ehlo()
        assert smtp.has_extn("starttls")
        smtp.sendmail("a@b.example", ["c@d.example"], TEXT)
    (message,) = setup.maildir.messages()
    assert " with ESMTP id " in message.headers
    assert "TLS" not in message.headers
    assert message.text == TEXT.replace("\r\n", "\n").encode()


def test_require_tls_rejects_mail_in_plaintext(two_processes: Callable[..., Setup], certificate: CertificateFiles) -> None:
    setup = two_processes("--require-tls")
    with smtplib.SMTP("127.0.0.1", setup.starttls_port) as smtp:
        smtp.ehlo()
        assert smtp.mail("a@b.example") == (530, b"5.7.0 Must issue a STARTTLS command first")
    smtplib_starttls(setup, certificate[0])
    check(setup, 1)


def test_tls_1_2_and_its_cipher_are_named_too(two_processes: Callable[..., Setup], certificate: CertificateFiles) -> None:
    setup = two_processes()
    context = ssl.create_default_context(cafile=str(certificate[0]))
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with smtplib.SMTP_SSL("127.0.0.1", setup.tls_port, context=context) as smtp:
        smtp.sendmail("a@b.example", ["c@d.example"], TEXT)
    (message,) = setup.maildir.messages()
    assert " (using TLSv1.2 with cipher ECDHE-ECDSA-" in message.headers
