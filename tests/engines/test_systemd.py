"""A real systemd follows ops/README.md: one host installed, reloaded, hung, upgraded and rolled back under load, and then two.

The tests of a Debian share its machine, in this order; each leaves it serving mail.
"""

from __future__ import annotations

import contextlib
import os
import re
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engines.systemd_machine import DEBIANS, NAME, SystemdMachine, debian
from tests.support.certificates import CertificateFiles, self_signed, shown_pem
from tests.support.hosts import network
from tests.support.load import Load
from tests.support.readme import ROOT, blocks, sections
from tests.support.verdict import Verdict
from tests.support.waiting import until

pytestmark = [pytest.mark.long, pytest.mark.skipif(os.getuid() != 0, reason="only root boots containers")]
RATE = 20.0
"""Messages a second."""
FEW = 60
"""Messages that are accepted before and after an upgrade."""
RELOADED = " reloaded\n"
"""The end of a line of the log."""
SHUTDOWN = "421 4.3.2 "
"""How the reply begins that a session between two messages gets."""
SERVICES = ("fumi-core", "fumi-edge")
README = (ROOT / "ops" / "README.md").read_text()


def shell(title: str) -> list[str]:
    """The commands of a section of ops/README.md, a block each."""
    (text,) = (section.text for section in sections(README) if section.title == title)
    return [commands for kind, commands in blocks(text) if kind == "sh"]


PROGRAMS, UNITS, START, USERS, _ = shell("One host, with systemd")
OTHER_CORE, OTHER_BACKEND = shell("Two hosts")
UPGRADE, SECOND_EDGE, ROLL_BACK = shell("Upgrade")
(USERS_SETTING,) = re.findall(r"`(users = .*?)`", README)


class Site:
    """A machine set up by the page, with room for another, and a client."""

    def __init__(self, version: str, directory: Path, stack: contextlib.ExitStack) -> None:
        self.directory = directory
        self._root = debian(version)
        self._stack = stack
        hosts = stack.enter_context(network(first=1, second=2, client=9))
        for name, address in (("first", "10.0.0.1"), ("second", "10.0.0.2"), ("client", "10.0.0.9")):
            hosts[name].ip(f"addr add {address}/24 dev eth0")
            hosts[name].address = address
        self._hosts = hosts
        self.client = hosts["client"]
        self.certificate = self_signed(directory, NAME)
        self._machines: list[SystemdMachine] = []
        self.loads = 0
        self.first = self.boot("first")

    def boot(self, name: str) -> SystemdMachine:
        machine = SystemdMachine(self._hosts[name], self._root, self.directory)
        self._stack.callback(machine.close)
        self._machines.append(machine)
        return machine

    def send(self, subject: str, port: int = 25, login: str | None = None) -> None:
        """Send joe a message, from the client's host to the first."""
        with self.first.smtp(self.client, self.certificate[0], port) as smtp:
            if login:
                smtp.login("joe", login)
            smtp.sendmail("a@example.net", ["joe@example.org"], f"Subject: {subject}\r\n\r\nhi\r\n")

    def texts(self) -> Iterator[str]:
        """All messages that are stored."""
        for machine in self._machines:
            with contextlib.suppress(FileNotFoundError):
                for path in (machine.inbox.path / "new").iterdir():
                    yield path.read_text()

    def stored(self, subject: str) -> int:
        return sum(f"\nSubject: {subject}\n" in text for text in self.texts())

    @contextlib.contextmanager
    def load(self, what: str) -> Iterator[Load]:
        """A load, of which no message may be lost, and no connection refused or broken. Prints what became of it."""
        self.loads += 1
        load = Load(self.client, self.first.host.address, RATE, self.certificate[0], self.directory, f"load{self.loads}")
        load.await_accepted(FEW)
        yield load
        load.await_accepted(FEW)
        verdict = load.finish(self.texts)
        print("", Verdict.HEAD, verdict.row(what), sep="\n")
        assert verdict.problems() == []
        assert verdict.broken == 0
        assert [each.reply for each in load.attempts() if each.reply and not each.reply.startswith(SHUTDOWN)] == []

    def shown(self) -> str:
        """The certificate that the edge shows a client."""
        with self.first.smtp(self.client, self.certificate[0]) as smtp:
            assert isinstance(smtp.sock, ssl.SSLSocket)
            return shown_pem(smtp.sock)


@pytest.fixture(scope="module", params=DEBIANS)
def site(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with contextlib.ExitStack() as stack:
        site = Site(request.param, tmp_path_factory.mktemp(f"debian-{request.param}"), stack)
        site.first.run(PROGRAMS)
        site.first.run(UNITS)
        site.first.put_certificate(site.certificate)
        site.first.run(START)
        yield site


def test_what_the_page_installs_serves_mail_as_users_of_its_own(site: Site) -> None:
    for port in (25, 587, 465):
        site.send(f"port-{port}", port)
        assert site.stored(f"port-{port}") == 1
    for name in SERVICES:
        assert site.first.show(name, "ActiveState") == "active"
        pid = site.first.show(name, "MainPID")
        assert site.first.run(f"stat -c %U /proc/{pid}") == f"{name}\n"
    assert site.first.run("systemctl is-system-running") == "running\n"
    assert site.first.journal("--boot", "--priority=warning", *(f"--unit={name}" for name in SERVICES)) == ""


def test_the_units_are_documented_by_pages_that_are_there(site: Site) -> None:
    units = site.first.run("cd /etc/systemd/system && ls fumi-*.service fumi-*.socket").split()
    assert len(units) == 6
    for unit in units:
        pages = site.first.show(unit, "Documentation").split()
        assert pages
        for page in pages:
            site.first.run(f"test -s {page.removeprefix('file:')}")


def test_a_user_who_was_added_logs_in_after_a_reload(site: Site) -> None:
    site.first.run(f"sed -i '/^\\[core\\]/a {USERS_SETTING}' /etc/fumi/fumi.toml")
    site.first.run(USERS, given="secret\n")
    until(lambda: RELOADED in site.first.journal("--unit=fumi-core"), "a reload")
    site.send("login", 587, login="secret")
    assert site.stored("login") == 1


def test_the_hook_puts_a_renewed_certificate_into_service(site: Site) -> None:
    site.certificate = renewed(site.directory)
    site.first.put_certificate(site.certificate)
    site.first.run(START.splitlines()[0])
    until(lambda: site.shown() == site.certificate[0].read_text(), "the new certificate")


def renewed(directory: Path) -> CertificateFiles:
    new = directory / "renewed"
    new.mkdir()
    return self_signed(new, NAME)


@pytest.mark.parametrize("section", ["core", "edge"])
def test_a_reload_of_wrong_settings_fails_and_the_old_ones_stay(site: Site, section: str) -> None:
    machine, name = site.first, f"fumi-{section}"
    pid = machine.show(name, "MainPID")
    with machine.setting(section, 'max-clients = "many"'):
        assert machine.outcome(f"systemctl reload {name}").returncode != 0
        assert "max-clients" in machine.journal(f"--unit={name}", "--lines=10")
        assert machine.show(name, "ActiveState") == "active"
        site.send(f"after-wrong-settings-of-{section}")
    assert machine.show(name, "MainPID") == pid


def test_a_reload_reaches_the_edge_while_the_core_is_down(site: Site) -> None:
    """Its check fails for want of a backend; the settings are read all the same."""
    machine = site.first
    reloads = machine.journal("--unit=fumi-edge").count(RELOADED)
    machine.run("systemctl stop fumi-core fumi-core.socket")
    with machine.setting("edge", "max-clients = 999"):
        assert machine.outcome("systemctl reload fumi-edge").returncode != 0
        until(lambda: machine.journal("--unit=fumi-edge").count(RELOADED) > reloads, "a reload")
        machine.run("systemctl start fumi-core")
        until(lambda: "backend up" in machine.journal("--unit=fumi-edge", "--lines=30"), "the backend")
    site.send("after-an-outage")


@pytest.mark.parametrize("name", SERVICES)
def test_a_program_that_hangs_is_started_again_by_the_watchdog(site: Site, name: str) -> None:
    machine = site.first
    pid = machine.show(name, "MainPID")
    machine.run(f"kill -STOP {pid}")
    until(lambda: machine.show(name, "NRestarts") == "1" and machine.show(name, "ActiveState") == "active", "a restart", 180)
    assert machine.show(name, "MainPID") != pid
    assert "Watchdog timeout" in machine.journal("--boot", f"--unit={name}")
    site.send(f"after-{name}-hung")


def test_an_upgrade_and_a_rollback_lose_no_mail_and_refuse_no_connection(site: Site) -> None:
    machine = site.first
    old = machine.run("readlink /opt/fumi")
    machine.run("sed -i 's/^VERSION = .*/VERSION = \"99.0\"/' fumi_core/version.py")
    machine.run("sed -i 's/^Description=.*/Description=Newer/' ops/systemd/*.service ops/systemd/*.socket")
    with site.load("upgrade"):
        machine.run(UPGRADE)
        assert running_version(machine) == "99.0"
        assert machine.show("fumi-edge", "Description") == "Newer"
    with site.load("roll-back"):
        machine.run(ROLL_BACK)
        assert machine.run("readlink /opt/fumi") == old
        assert running_version(machine) != "99.0"
        assert machine.show("fumi-edge", "Description") != "Newer"


def running_version(machine: SystemdMachine) -> str:
    for name in SERVICES:
        assert machine.show(name, "ActiveState") == "active"
    return machine.run("/opt/fumi/bin/fumi-edge --version").split()[-1]


def test_a_second_edge_serves_while_the_first_is_restarted(site: Site) -> None:
    pid = site.first.show("fumi-edge", "MainPID")
    with site.load("second edge"):
        site.first.run(SECOND_EDGE)
    assert site.first.show("fumi-edge", "MainPID") != pid
    assert site.first.outcome("systemctl cat fumi-edge-next").returncode != 0


def test_one_host_becomes_two(site: Site) -> None:
    second = site.boot("second")
    second.run(PROGRAMS)
    second.run(UNITS)
    second.run(OTHER_CORE)
    with site.load("the core moves"):
        site.first.run(OTHER_BACKEND)
    site.send("moved")
    assert "\nSubject: moved\n" in "".join(path.read_text() for path in (second.inbox.path / "new").iterdir())
    assert site.first.outcome("systemctl is-active fumi-core fumi-core.socket").stdout == "inactive\ninactive\n"
    assert second.run("systemctl is-system-running") == "running\n"
