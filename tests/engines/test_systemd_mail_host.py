"""A real systemd follows ops/mail-host/README.md, with Debian's Dovecot, rspamd and Postfix, and then upgrades."""

from __future__ import annotations

import contextlib
import os
import smtplib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engines.name_server import name_server
from tests.engines.systemd_machine import NAME, SystemdMachine, debian
from tests.support.certificates import self_signed
from tests.support.hosts import Host, network
from tests.support.readme import ROOT, blocks, sections
from tests.support.waiting import until

pytestmark = [pytest.mark.long, pytest.mark.skipif(os.getuid() != 0, reason="only root boots containers")]
SENDER, JOE, PASSWORD = "eve@b.example", "joe@example.org", "secret"
SERVICES = ("fumi-core", "fumi-edge", "rspamd", "dovecot", "postfix")
OF_RSPAMD = """url_tld = "/etc/rspamd/tld";
dns { nameserver = ["127.0.0.1:53"]; timeout = 0.1s; retransmits = 1; }
"""
"""Not on a real machine: no server answers DNS here, and the list of top-level domains takes a minute to compile."""


def shell(page: str, *titles: str) -> list[str]:
    """The commands of these sections of a page, a block each."""
    found = [section.text for section in sections((ROOT / page).read_text()) if section.title in titles]
    return [commands for text in found for kind, commands in blocks(text) if kind == "sh"]


PROGRAMS, UNITS, START_ONE_HOST, *_ = shell("ops/README.md", "One host, with systemd")
UPGRADE, *_ = shell("ops/README.md", "Upgrade")
PACKAGES, SETTINGS, POSTFIX, USERS, LINKS, START, RENEWAL = shell("ops/mail-host/README.md", "Install", "Users", "Start")


class MailHost:
    """A machine set up by the pages, and a client from outside."""

    def __init__(self, machine: SystemdMachine, client: Host, certificate: Path) -> None:
        self.machine = machine
        self._client = client
        self._certificate = certificate

    def smtp(self, port: int = 25) -> smtplib.SMTP:
        return self.machine.smtp(self._client, self._certificate, port)

    def send(self, subject: str) -> None:
        with self.smtp() as smtp:
            smtp.sendmail(SENDER, [JOE], letter(subject))

    def received(self, subject: str) -> list[str]:
        """The messages of this subject in joe's mailbox."""
        files = self.machine.path("/srv/mail/example.org/joe/Maildir").glob("*/*")
        texts = [path.read_text() for path in files if path.parent.name in ("new", "cur")]
        return [text for text in texts if f"\nSubject: {subject}\n" in text]


def letter(subject: str, sender: str = SENDER) -> str:
    lines = [f"From: {sender}", f"To: {JOE}", "Date: Thu, 1 Jan 2026 00:00:00 +0000", f"Message-ID: <{subject}@b.example>"]
    return "\r\n".join([*lines, f"Subject: {subject}", "", "Today?", ""])


@pytest.fixture(scope="module", params=["12", "13"])
def host(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MailHost]:
    directory = tmp_path_factory.mktemp(f"mail-host-{request.param}")
    certificate = self_signed(directory, NAME)
    with contextlib.ExitStack() as stack:
        hosts = stack.enter_context(network(host=1, client=9))
        for each, address in ((hosts["host"], "203.0.113.1"), (hosts["client"], "203.0.113.9")):
            each.ip(f"addr add {address}/24 dev eth0")
            each.address = address  # rspamd takes those of the switch for local ones, whose mail it does not mark
        root = debian(request.param, *PACKAGES.split()[3:])
        machine = SystemdMachine(hosts["host"], root, directory)
        stack.callback(machine.close)
        machine.run(PROGRAMS + UNITS)
        machine.put_certificate(certificate)
        # What is run of the one host's start: the hook.
        machine.run(START_ONE_HOST.splitlines()[0])
        machine.run(PACKAGES)
        machine.path("/etc/rspamd/tld").write_text("example\n")
        machine.path("/etc/resolv.conf").write_text(f"nameserver {hosts['client'].address}\n")
        known = {"example.org": hosts["host"].address}
        stack.enter_context(name_server(hosts["client"], hosts["client"].address, known, directory / "names.log"))
        machine.path("/etc/rspamd/local.d/options.inc").write_text(OF_RSPAMD)
        machine.run(SETTINGS)
        machine.run(POSTFIX)
        machine.run(USERS, given=f"{PASSWORD}\n" * 2)
        machine.run(LINKS)
        machine.run(START)
        machine.run(RENEWAL)
        yield MailHost(machine, hosts["client"], certificate[0])


def test_mail_from_outside_is_filtered_and_stored(host: MailHost) -> None:
    until(lambda: host.machine.host.listens(11332), "rspamd's first start", 300)
    host.send("first")
    (text,) = host.received("first")
    assert "\nX-Spamd-Result: default: False" in text
    for name in SERVICES:
        assert host.machine.show(name, "ActiveState") == "active", name
    assert host.machine.run("systemctl is-system-running") == "running\n"


def test_a_user_logs_in_and_postfix_takes_the_mail_to_another_user(host: MailHost) -> None:
    for port in (587, 465):
        with host.smtp(port) as smtp:
            smtp.login(JOE, PASSWORD)
            smtp.sendmail(JOE, [JOE], letter(f"colleague-{port}", JOE))
        until(lambda port=port: host.received(f"colleague-{port}"), "delivery to a user")  # type: ignore[misc]


def test_a_reload_succeeds_and_that_of_wrong_settings_fails(host: MailHost) -> None:
    host.machine.run("systemctl reload fumi-core fumi-edge")
    for section in ("core", "edge"):
        with host.machine.setting(section, 'max-clients = "many"'):
            assert host.machine.outcome(f"systemctl reload fumi-{section}").returncode != 0
    host.send("reloaded")
    assert len(host.received("reloaded")) == 1


def test_it_is_upgraded_as_one_host_is(host: MailHost) -> None:
    old = host.machine.run("readlink /opt/fumi")
    host.machine.run(UPGRADE)
    assert host.machine.run("readlink /opt/fumi") != old
    host.send("upgraded")
    assert len(host.received("upgraded")) == 1


def test_what_serves_is_enabled_for_the_next_boot(host: MailHost) -> None:
    names = " ".join([*SERVICES, "fumi-core.socket", "fumi-core-submission.socket", "fumi-edge-smtp.socket"])
    assert set(host.machine.run(f"systemctl is-enabled {names}").split()) == {"enabled"}
