"""The machine of ops/mail-host, set up by the commands of its page; unit_runner.py runs the units in systemd's place."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.interop.machine import PASSWORD, Machine
from tests.support.programs import Programs
from tests.support.readme import ROOT, blocks
from tests.support.starter import BIN, Process
from tests.support.waiting import until

PAGE = (ROOT / "ops/mail-host/README.md").read_text()
SHELL = [text for kind, text in blocks(PAGE) if kind == "sh"]
PACKAGES, SETTINGS, POSTFIX, JOE, LINKS, START, RENEWAL, CONTAINERS, CONTAINERS_START, CONTAINER_USER = SHELL


class MailHost(Machine):
    """With users joe and ann. What is to run is started by its methods."""

    def __init__(self, programs: Programs) -> None:
        super().__init__(programs)
        self.lineage()
        _, of_fumi, certificate, *_ = (text for kind, text in blocks((ROOT / "ops/README.md").read_text()) if kind == "sh")
        self.run(of_fumi)
        self.run(certificate.partition("systemctl")[0])
        self.run(PACKAGES + SETTINGS)
        self.run(POSTFIX)
        self.run(JOE, f"{PASSWORD}\n" * 2)
        self.run("\n".join(JOE.replace("joe", "ann").splitlines()[2:]), f"{PASSWORD}\n" * 2)
        self.run(LINKS)
        self.started = self.run(START)
        self.run(RENEWAL)

    def start_service(self, name: str) -> Process:
        """Start a unit of Fumi, on the sockets that systemd would hold."""
        runner = Path(__file__).with_name("unit_runner.py")
        return self.start(sys.executable, runner, f"{name}.service", log=name)

    def start_dovecot(self) -> Process:
        process = self.start("/usr/sbin/dovecot", "-F", log="dovecot")
        self.await_port(993)
        until(lambda: self.path("/run/dovecot/auth-fumi").exists(), "Dovecot's socket")
        return process

    def start_rspamd(self) -> Process:
        words = ("/usr/bin/rspamd", "-c", "/etc/rspamd/rspamd.conf", "-f", "-u", "_rspamd", "-g", "_rspamd")
        process = self.start(*words, log="rspamd")
        self.await_port(11332)
        return process

    def start_relay(self) -> Process:
        """What listens in Postfix's place, and keeps the mail that users send: ``/srv/relayed``."""
        words = ["--proxy-protocol", "off", "--listen", "127.0.0.1:10025", "--deliver", "maildir:/srv/relayed"]
        process = self.start(BIN / "fumi-core", *words, log="relay")
        self.await_port(10025)
        return process
