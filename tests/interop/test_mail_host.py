"""ops/mail-host: a machine set up by its page receives, filters, stores and sends mail, with Debian's Dovecot and rspamd."""

from __future__ import annotations

import base64
import contextlib
import smtplib
from collections.abc import Iterator

import pytest

from tests.interop.machine import DOMAIN, Client
from tests.interop.mail_host import MailHost
from tests.support.programs import Programs

GTUBE = "XJS*C4JDBQADN1.NSBN3*2IDNEN*GTUBE-STANDARD-ANTI-UBE-TEST-EMAIL*C.34X"
SENDER, JOE, ANN = "eve@b.example", f"joe@{DOMAIN}", f"ann@{DOMAIN}"


def letter(subject: str, body: str = "Today?", sender: str = SENDER) -> str:
    lines = [f"From: {sender}", f"To: {JOE}", "Date: Thu, 1 Jan 2026 00:00:00 +0000", f"Message-ID: <{subject}@b.example>"]
    return "\r\n".join([*lines, f"Subject: {subject}", "", body, ""])


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MailHost]:
    with contextlib.closing(Programs(tmp_path_factory.mktemp("mail-host"))) as programs:
        host = MailHost(programs)
        host.start_rspamd()
        host.start_dovecot()
        host.start_relay()
        for name in ("fumi-core", "fumi-edge"):
            host.start_service(name)
        for port in (25, 465, 587):
            host.await_port(port)
        yield host


def test_mail_from_outside_is_filtered_and_read_by_imap(host: MailHost) -> None:
    with host.smtp() as client:
        client.sendmail(SENDER, [JOE], letter("lunch"))
    found = [text for text in host.read(JOE) if b"Subject: lunch\r\n" in text]
    assert len(found) == 1
    assert b"\r\nX-Spamd-Result: default: False" in found[0]
    assert b"with ESMTPS " in found[0]
    (path,) = host.path(f"/srv/mail/{DOMAIN}/joe/Maildir").glob("*/*:2,*")
    assert b"Subject: lunch\n" in path.read_bytes()


def test_an_unknown_user_is_550_at_rcpt_and_another_domain_is_no_relay(host: MailHost) -> None:
    with host.smtp() as client:
        client.ehlo()
        client.mail(SENDER)
        assert client.rcpt(f"nobody@{DOMAIN}")[0] == 550
        assert client.rcpt("joe@elsewhere.example")[0] == 550
        assert client.rcpt(f"Joe+news@{DOMAIN}")[0] == 250


def test_spam_is_554(host: MailHost) -> None:
    with host.smtp() as client, pytest.raises(smtplib.SMTPDataError, match="Gtube") as refused:
        client.sendmail(SENDER, [JOE], letter("spam", GTUBE))
    assert refused.value.smtp_code == 554
    assert not [text for text in host.read(JOE) if b"Subject: spam\r\n" in text]


@pytest.mark.parametrize("port", [465, 587])
def test_a_user_of_dovecot_sends_to_anyone(host: MailHost, port: int) -> None:
    subject = f"from-{port}"
    with host.submission(JOE, port) as client:
        client.sendmail(JOE, ["eve@elsewhere.example"], letter(subject, sender=JOE))
    (sent,) = (each for each in host.maildir("/srv/relayed").messages() if f"\nSubject: {subject}\n".encode() in each.text)
    assert sent.headers.startswith(f"Return-Path: <{JOE}>\nDelivered-To: eve@elsewhere.example\n")
    assert b"with ESMTPSA " in sent.text


def test_postmaster_is_a_user(host: MailHost) -> None:
    with host.smtp() as client:
        for address in (f"postmaster@{DOMAIN}", "postmaster"):
            client.sendmail(SENDER, [address], letter("help"))
    assert len([text for text in host.read(JOE) if b"Subject: help\r\n" in text]) == 2


def test_another_sender_than_the_login_is_553(host: MailHost) -> None:
    with host.submission(JOE) as client, pytest.raises(smtplib.SMTPSenderRefused) as refused:
        client.sendmail(ANN, [JOE], letter("forged", sender=ANN))
    assert refused.value.smtp_code == 553


def test_port_25_offers_no_login_and_587_nothing_before_starttls(host: MailHost) -> None:
    with host.smtp() as client:
        client.ehlo()
        assert not client.has_extn("auth")
    with Client(host, 587) as client:
        client.ehlo()
        assert not client.has_extn("auth")
        assert client.mail(JOE)[0] == 530


def test_it_is_one_core_and_one_edge(host: MailHost) -> None:
    commands = [path.read_bytes().split(b"\0") for path in host.processes()]
    for name in ("core", "edge"):
        program = f"/opt/fumi/bin/fumi-{name}".encode()
        assert sum(program in words and b"/etc/fumi/fumi.toml" in words for words in commands) == 1


def test_systemd_finds_nothing_wrong_with_the_units(host: MailHost) -> None:
    said = host.run("systemd-analyze verify --man=no /etc/systemd/system/fumi-*.service /etc/systemd/system/fumi-*.socket 2>&1")
    assert [line for line in said.splitlines() if "fumi" in line] == []


def test_postfix_takes_mail_on_loopback_alone(host: MailHost) -> None:
    services = [" ".join(line.split()) for line in host.run("postconf -M").splitlines()]
    assert [service for service in services if service.endswith(" smtpd")] == ["127.0.0.1:10025 inet n - y - - smtpd"]
    assert host.run("postconf -h inet_interfaces mydestination") == "loopback-only\n\n"


def test_the_page_starts_what_it_has_installed(host: MailHost) -> None:
    assert host.started.splitlines() == [
        "systemctl daemon-reload",
        "systemctl stop fumi-edge fumi-core",
        "systemctl restart rspamd dovecot postfix",
        "systemctl enable --now fumi-core-submission.socket fumi-core fumi-edge",
    ]
    assert host.run("/etc/letsencrypt/renewal-hooks/deploy/dovecot") == "systemctl reload dovecot\n"


def test_a_wrong_password_is_535_and_no_login_is_530(host: MailHost) -> None:
    with host.smtp(465) as client:
        client.ehlo()
        assert client.mail(JOE)[0] == 530
        # The last one here: Dovecot lets this address wait at its next login.
        assert client.docmd("AUTH PLAIN", base64.b64encode(f"\0{JOE}\0wrong".encode()).decode())[0] == 535
