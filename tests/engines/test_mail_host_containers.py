"""A real Docker follows the containers' part of ops/mail-host/README.md, with Debian's rspamd, Dovecot and Postfix.

The tests share the composition, in this order; each leaves it serving mail.
"""

from __future__ import annotations

import contextlib
import imaplib
import os
import re
import signal
import smtplib
import ssl
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bench import environment
from tests.engines.container_engine import MAIL, NAME, Docker
from tests.engines.name_server import name_server
from tests.support.certificates import CertificateFiles, self_signed, shown_pem
from tests.support.hosts import Host, network
from tests.support.inside import Client, connect
from tests.support.programs import Maildir
from tests.support.readme import ROOT, blocks, sections
from tests.support.starter import BIN
from tests.support.waiting import until

pytestmark = [pytest.mark.long, pytest.mark.skipif(os.getuid() != 0, reason="only root starts engines")]
SENDER, JOE, FRIEND, PASSWORD = "eve@b.example", "joe@example.org", "eve@elsewhere.example", "secret"
GTUBE = "XJS*C4JDBQADN1.NSBN3*2IDNEN*GTUBE-STANDARD-ANTI-UBE-TEST-EMAIL*C.34X"
PUBLIC = {"engine": "203.0.113.1", "client": "203.0.113.9"}
"""rspamd takes addresses of private networks for local ones, whose mail it does not mark."""
OF_RSPAMD = 'dns { nameserver = ["127.0.0.1:53"]; timeout = 0.1s; retransmits = 1; }\n'
"""Not on a real machine: what rspamd asks for is not known here."""
NAME_SERVER = "192.0.2.1"
"""What the engine's host has in its resolv.conf; the client is it, and the host of elsewhere.example."""
PAGE = next(each.text for each in sections((ROOT / "ops/mail-host/README.md").read_text()) if each.title == "In containers")
SETTINGS, START, USERS = (commands for kind, commands in blocks(PAGE) if kind == "sh")
RENEWAL = "".join(SETTINGS.splitlines(keepends=True)[2:4])
RELOAD_DOVECOT, RELOAD = re.findall(r"`(docker compose [^`]*(?:reload|HUP)[^`]*)`", PAGE)
COMPOSE = "docker compose -f ops/docker/mail-host.yml"


class Friend:
    """The mail server of elsewhere.example, on the client's host."""

    def __init__(self, host: Host, directory: Path) -> None:
        self._host = host
        self._directory = directory
        self.start()

    def start(self) -> None:
        words = ("--proxy-protocol", "off", "--listen", f"{PUBLIC['client']}:25", "--deliver", f"maildir:{self._directory}/mail")
        self._process = self._host.start(BIN / "fumi-core", *words, log=self._directory / "log", cwd=ROOT)
        until(lambda: self._host.listens(25), "the friend's server")

    def stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(60)

    def has(self, subject: str) -> bool:
        return any(f"\nSubject: {subject}\n".encode() in each.text for each in Maildir(self._directory / "mail").messages())


class MailHost:
    """The composition, and a client from outside."""

    def __init__(self, engine: Docker, client: Host, certificate: Path, friend: Friend) -> None:
        self.engine = engine
        self.friend = friend
        self._client = client
        self._tls = ssl.create_default_context(cafile=certificate)

    def smtp(self, port: int = 25) -> smtplib.SMTP:
        """A client on port 25 or 587, after STARTTLS, or on 465."""
        client = Client(self._client.pid, (PUBLIC["engine"], port), self._tls, NAME)
        if port != 465:
            client.starttls(context=self._tls)
        return client

    def imap(self) -> imaplib.IMAP4_SSL:
        return Mailbox(self._client, self._tls)

    def received(self, subject: str) -> list[bytes]:
        """The messages of this subject that joe's mail client sees."""
        with self.imap() as imap:
            imap.login(JOE, PASSWORD)
            imap.select()
            numbers = imap.search(None, "SUBJECT", subject)[1][0].split()
            return [part[1] for each in numbers for part in imap.fetch(each, "(BODY.PEEK[])")[1] if isinstance(part, tuple)]

    def shown(self, port: int) -> str:
        """The certificate on a port with TLS, as PEM."""
        any_certificate = ssl.create_default_context()
        any_certificate.check_hostname, any_certificate.verify_mode = False, ssl.CERT_NONE
        with any_certificate.wrap_socket(connect(self._client.pid, (PUBLIC["engine"], port))) as sock:
            return shown_pem(sock)

    def offers_size(self) -> str:
        """The largest message, as EHLO says."""
        with self.smtp() as client:
            client.ehlo()
            return client.esmtp_features["size"]

    def await_friend(self, subject: str) -> None:
        until(lambda: self.friend.has(subject), "delivery to another host")

    def await_mail(self) -> None:
        """Wait until edge and core say that they can accept mail."""
        for port in (9465, 9525):
            words = self.engine.host.command("curl", "--silent", "--fail", f"http://127.0.0.1:{port}/readyz")
            until(lambda words=words: subprocess.run(words, capture_output=True, check=False).returncode == 0, "readiness")  # type: ignore[misc]


class Mailbox(imaplib.IMAP4_SSL):
    def __init__(self, client: Host, tls: ssl.SSLContext) -> None:
        self._client = client
        self._tls = tls
        super().__init__(NAME, 993, timeout=60)

    def _create_socket(self, timeout: float | None) -> ssl.SSLSocket:
        return self._tls.wrap_socket(connect(self._client.pid, (PUBLIC["engine"], 993)), server_hostname=NAME)


def letter(subject: str, body: str = "Today?", sender: str = SENDER) -> str:
    lines = [f"From: {sender}", f"To: {JOE}", "Date: Thu, 1 Jan 2026 00:00:00 +0000", f"Message-ID: <{subject}@b.example>"]
    return "\r\n".join([*lines, f"Subject: {subject}", "", body, ""])


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> CertificateFiles:
    return self_signed(tmp_path_factory.mktemp("certificate"), NAME)


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory, certificate: CertificateFiles) -> Iterator[MailHost]:
    environment.INSTALLED.mkdir(exist_ok=True)
    outside = tmp_path_factory.mktemp("outside")
    with network(engine=1, client=9) as hosts, contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=environment.INSTALLED)))
        for name, address in PUBLIC.items():
            hosts[name].ip(f"address add {address}/24 dev eth0")
        for name, address in (("engine", "192.0.2.2"), ("client", NAME_SERVER)):
            hosts[name].ip(f"address add {address}/24 dev eth0")
        client, known = hosts["client"], {"elsewhere.example": PUBLIC["client"], "example.org": PUBLIC["engine"]}
        stack.enter_context(name_server(client, NAME_SERVER, known, outside / "log"))
        friend = Friend(client, outside)
        stack.callback(friend.stop)
        engine = stack.enter_context(contextlib.closing(Docker(hosts["engine"], directory, certificate, MAIL)))
        engine.path("/root/fumi/ops/mail-host/rspamd/options.inc").write_text(OF_RSPAMD)
        engine.run(SETTINGS)
        engine.run(START)
        engine.run(USERS, f"{PASSWORD}\n" * 2)
        host = MailHost(engine, client, certificate[0], friend)
        host.await_mail()
        yield host


def test_dovecot_starts_without_an_error_before_there_is_a_user(host: MailHost) -> None:
    assert "Error" not in host.engine.log("dovecot")


def test_mail_from_outside_is_filtered_stored_and_read(host: MailHost) -> None:
    with host.smtp() as client:
        client.sendmail(SENDER, [JOE], letter("lunch"))
    (text,) = host.received("lunch")
    assert f"from client.example ([{PUBLIC['client']}])".encode() in text
    assert f"\tby {NAME} with ESMTPS id ".encode() in text
    assert b"\r\nX-Spamd-Result: default: False" in text
    (stored,) = (host.engine.volume("mail") / "example.org/joe/Maildir").glob("*/*:2,*")
    assert b"Subject: lunch\n" in stored.read_bytes()


def test_an_unknown_user_is_550_at_rcpt_and_another_domain_is_no_relay(host: MailHost) -> None:
    with host.smtp() as client:
        client.ehlo()
        client.mail(SENDER)
        for address in ("nobody@example.org", FRIEND):
            assert client.rcpt(address)[0] == 550
        for address in ("joe+news@example.org", "postmaster@example.org", "postmaster"):
            assert client.rcpt(address)[0] == 250


def test_spam_is_554(host: MailHost) -> None:
    with host.smtp() as client, pytest.raises(smtplib.SMTPDataError, match="Gtube") as refused:
        client.sendmail(SENDER, [JOE], letter("spam", GTUBE))
    assert refused.value.smtp_code == 554
    assert host.received("spam") == []


@pytest.mark.parametrize("port", [587, 465])
def test_a_user_with_dovecots_password_sends_to_another_host_which_postfix_finds(host: MailHost, port: int) -> None:
    with host.smtp(port) as client:
        client.login(JOE, PASSWORD)
        client.sendmail(JOE, [FRIEND], letter(f"out-{port}", sender=JOE))
    host.await_friend(f"out-{port}")


def test_postfix_takes_mail_to_another_user_and_returns_what_it_cannot_deliver(host: MailHost) -> None:
    with host.smtp(587) as client:
        client.login(JOE, PASSWORD)
        client.sendmail(JOE, [JOE], letter("colleague", sender=JOE))
        client.sendmail(JOE, ["eve@nowhere.example"], letter("astray", sender=JOE))
    until(lambda: host.received("colleague"), "delivery to a user")
    until(lambda: host.received("Undelivered"), "Postfix's notice")


def test_a_wrong_password_is_535_and_another_sender_553(host: MailHost) -> None:
    with host.smtp(465) as client:
        client.ehlo()
        assert client.mail(JOE)[0] == 530
        client.login(JOE, PASSWORD)
        assert client.mail("ann@example.org")[0] == 553
    with host.smtp(587) as client, pytest.raises(smtplib.SMTPAuthenticationError) as refused:
        client.login(JOE, "wrong")
    assert refused.value.smtp_code == 535


def test_settings_are_reloaded_and_a_renewal_is_served_by_edge_and_dovecot(
    host: MailHost, certificate: CertificateFiles, tmp_path: Path
) -> None:
    shown = [host.shown(port) for port in (465, 993)]
    assert shown == [certificate[0].read_text()] * 2
    renewed = self_signed(tmp_path, NAME)
    for files in (renewed, certificate):
        for source, name in zip(files, ("fullchain.pem", "privkey.pem"), strict=True):
            host.engine.path(f"/etc/letsencrypt/live/{NAME}/{name}").write_bytes(source.read_bytes())
        host.engine.run(RENEWAL + RELOAD_DOVECOT)
        for port in (465, 993):
            until(lambda files=files, port=port: host.shown(port) == files[0].read_text(), f"the new certificate on {port}")  # type: ignore[misc]
    file = host.engine.path("/root/fumi/ops/docker/mail-host/etc/fumi.toml")
    settings = file.read_text()
    for text in (settings.replace("[core]\n", "[core]\nsize = 1234567\n"), settings):
        file.write_text(text)
        host.engine.run(RELOAD)
        until(lambda text=text: (host.offers_size() == "1234567") == ("1234567" in text), "the other size")  # type: ignore[misc]


def test_down_finishes_what_a_client_sends_and_up_has_mail_users_and_queue(host: MailHost) -> None:
    host.friend.stop()
    with host.smtp(465) as client:
        client.login(JOE, PASSWORD)
        client.sendmail(JOE, [FRIEND], letter("queued", sender=JOE))
    session = host.smtp()
    session.ehlo()
    session.mail(SENDER)
    session.rcpt(JOE)
    assert session.docmd("DATA")[0] == 354
    session.send(letter("late").encode())
    with subprocess.Popen(host.engine.command(f"{COMPOSE} down"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as down:
        until(lambda: all("draining" in host.engine.log(service) for service in ("edge", "core")), "the drain")
        assert session.docmd(".")[0] == 250
        session.close()
        assert down.wait(120) == 0
    host.engine.run(START.splitlines()[-1])
    host.friend.start()
    host.await_mail()
    assert len(host.received("late")) == len(host.received("lunch")) == 1
    host.engine.run(f"{COMPOSE} exec postfix postqueue -f")
    host.await_friend("queued")
