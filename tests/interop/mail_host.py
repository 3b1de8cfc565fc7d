"""A machine of its own for the files of ops/mail-host: namespaces with a network, and the /etc, /run and /srv of a new Debian.

Debian's Dovecot, rspamd and Postfix are unpacked, and lie where their packages put them. Files, users and ports are those of a
real machine. What is missing is systemd, in whose place unit_runner.py runs the units, and DNS.
"""

from __future__ import annotations

import contextlib
import ctypes
import imaplib
import os
import re
import smtplib
import socket
import ssl
import sys
import threading
from pathlib import Path

from tests.bench import environment
from tests.support.certificates import self_signed
from tests.support.programs import Maildir, Programs
from tests.support.readme import ROOT, blocks
from tests.support.starter import BIN, Process
from tests.support.waiting import until

SERVER, CLIENT = "203.0.113.1", "198.51.100.7"
"""The machine's address, and that of a client from outside, whom rspamd does not take for a local one."""
NAME, DOMAIN = "mx.example.org", "example.org"
PASSWORD = "secret"
CERTIFICATE = Path("/etc/letsencrypt/live", NAME)
SETUP = r"""
set -eu
base=$1 packages=$2
mount -t tmpfs -o mode=755 tmpfs "$base"
overlay() { # DIRECTORY OTHERS
    mkdir -p "$base/upper$1" "$base/work$1"
    mount -t overlay overlay -o "lowerdir=$2$1,upperdir=$base/upper$1,workdir=$base/work$1" "$1"
}
overlay /usr "$packages/dovecot/usr:$packages/rspamd/usr:$packages/postfix/usr:"
overlay /etc "$packages/dovecot/etc:$packages/rspamd/etc:$packages/postfix/etc:"
for directory in /opt /srv /var; do overlay $directory ""; done
mount -t tmpfs -o mode=755 tmpfs /run
shift 2
# What the services' users may not enter, as somebody's home, and have to: there is the interpreter.
for directory in "$@"; do
    overlay "$directory" ""
    chmod o+x "$directory"
done
ip link set lo up
ip address add SERVER/32 dev lo
ip address add CLIENT/32 dev lo
# What the packages' scripts do.
printf 'u %s -\n' dovecot dovenull _rspamd postfix | systemd-sysusers -
cp -r /usr/share/dovecot/*.conf /usr/share/dovecot/conf.d /etc/dovecot
echo 'protocols = $protocols imap' >/usr/share/dovecot/protocols.d/imapd.protocol
touch /etc/dovecot/private/dovecot.pem /etc/dovecot/private/dovecot.key
cp /usr/share/postfix/main.cf.debian /etc/postfix/main.cf
cp /usr/share/postfix/master.cf.dist /etc/postfix/master.cf
install -d -o _rspamd -g _rspamd /var/lib/rspamd /var/log/rspamd /run/rspamd
# Not on a real machine: no server answers DNS here, and the list of top-level domains takes seconds to compile.
echo example >/etc/rspamd/tld
cat >/etc/rspamd/local.d/options.inc <<END
url_tld = "/etc/rspamd/tld";
dns { nameserver = ["127.0.0.1:53"]; timeout = 0.1s; retransmits = 1; }
END
touch "$base/ready"
exec sleep infinity
"""
STUBS = ("apt-get", "systemctl")


class MailHost:
    """A machine on which the commands of the page were run, with users joe and ann. Its programs run until ``close()``."""

    def __init__(self, programs: Programs) -> None:
        environment.install_dovecot()
        environment.install_filter("rspamd")
        environment.install_postfix()
        self.directory = programs.directory
        self._programs = programs
        self._base = self.directory / "machine"
        self._base.mkdir()
        setup = SETUP.replace("SERVER", SERVER).replace("CLIENT", CLIENT)
        words: list[str | Path] = ["unshare", "--mount", "--net", "sh", "-c", setup, "sh", self._base, environment.INSTALLED]
        self._machine = programs.start(*words, *_closed(), log="machine.log")
        until(lambda: self._ready() or self._machine.poll() is not None, "the machine")
        assert self._machine.poll() is None, self.log("machine")
        self.certificate = self_signed(self.directory, NAME)
        self._install()

    def _ready(self) -> bool:
        return Path(f"/proc/{self._machine.pid}/root{self._base}/ready").exists()

    def _install(self) -> None:
        """Run the commands of the pages, in their order."""
        tools = self.path("/opt/tools")
        tools.mkdir()
        for name in STUBS:
            (tools / name).write_text('#!/bin/sh\necho "${0##*/}" "$@"\n')
            (tools / name).chmod(0o755)
        self.path("/opt/fumi").symlink_to(BIN.parent)
        self.path(CERTIFICATE).mkdir(parents=True)
        for source, name in zip(self.certificate, ("fullchain.pem", "privkey.pem"), strict=True):
            (self.path(CERTIFICATE) / name).write_bytes(source.read_bytes())
        one_host = [text for kind, text in blocks((ROOT / "ops/README.md").read_text()) if kind == "sh"]
        packages, settings, postfix, joe, start, renewal = (
            text for kind, text in blocks((ROOT / "ops/mail-host/README.md").read_text()) if kind == "sh"
        )
        self.run(one_host[1])
        self.run(one_host[2].partition("systemctl")[0])
        self.run(packages + settings)
        self.run(postfix)
        answers = f"{PASSWORD}\n" * 2
        self.run(joe, answers)
        self.run("\n".join(joe.replace("joe", "ann").splitlines()[2:]), answers)
        self.started = self.run(start)
        self.run(renewal)

    def path(self, inside: str | Path) -> Path:
        """Where a file of the machine is."""
        return Path(f"/proc/{self._machine.pid}/root{inside}")

    def run(self, text: str, given: str = "") -> str:
        """What the commands print that root runs there, in the checkout; they are to succeed."""
        return self._programs.run(*self._inside("env", f"--chdir={ROOT}", "sh", "-euc", text), given=given.encode())

    def start(self, *words: str | Path, log: str) -> Process:
        """Start a program there, as root."""
        return self._programs.start(*self._inside(*words), log=f"{log}.log")

    def _inside(self, *words: str | Path) -> list[str | Path]:
        tools = f"PATH=/opt/tools:{os.environ['PATH']}"
        return ["nsenter", f"--target={self._machine.pid}", "--mount", "--net", "env", tools, *words]

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

    def await_port(self, port: int) -> None:
        tables = [Path(f"/proc/{self._machine.pid}/net/{name}") for name in ("tcp", "tcp6")]
        listens = re.compile(rf":{port:04X} 0+:0000 0A")
        until(lambda: any(listens.search(table.read_text()) for table in tables), f"port {port}")

    def processes(self) -> list[Path]:
        """The command lines of its processes, in /proc."""
        network = os.readlink(f"/proc/{self._machine.pid}/ns/net")
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if os.readlink(path / "ns/net") == network:
                    found.append(path / "cmdline")
        return found

    def log(self, name: str) -> str:
        return (self.directory / f"{name}.log").read_text()

    def connect(self, port: int, timeout: float = 60) -> socket.socket:
        """Connect to the machine as a client from outside."""
        made: list[socket.socket | OSError] = []

        def inside() -> None:
            try:
                with open(f"/proc/{self._machine.pid}/ns/net") as namespace:
                    assert ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), 0) == 0, os.strerror(ctypes.get_errno())
                made.append(socket.create_connection((SERVER, port), timeout, (CLIENT, 0)))
            except OSError as error:
                made.append(error)

        # A thread of its own, which alone changes to the machine's network.
        thread = threading.Thread(target=inside)
        thread.start()
        thread.join()
        (connected,) = made
        if isinstance(connected, OSError):
            raise connected
        return connected

    @property
    def tls(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=str(self.certificate[0]))

    def smtp(self, port: int = 25) -> smtplib.SMTP:
        """A client on port 25 or 587, after STARTTLS, or on 465."""
        client = Client(self, port)
        if port != 465:
            client.starttls(context=self.tls)
        return client

    def submission(self, user: str, port: int = 465) -> smtplib.SMTP:
        """A client that has logged in."""
        client = self.smtp(port)
        client.login(user, PASSWORD)
        return client

    def read(self, user: str) -> list[bytes]:
        """The messages that this user's mail client sees."""
        imap = Mailbox(self)
        imap.login(user, PASSWORD)
        imap.select()
        numbers = imap.search(None, "ALL")[1][0].split()
        messages = [part[1] for number in numbers for part in imap.fetch(number, "(BODY.PEEK[])")[1] if isinstance(part, tuple)]
        imap.logout()
        return messages

    def maildir(self, path: str) -> Maildir:
        return Maildir(self.path(path))


class Client(smtplib.SMTP):
    def __init__(self, host: MailHost, port: int) -> None:
        self._mail_host = host
        super().__init__(NAME, port, "client.example", timeout=60)

    def _get_socket(self, host: str, port: int, timeout: float) -> socket.socket:
        connected = self._mail_host.connect(port, timeout)
        return self._mail_host.tls.wrap_socket(connected, server_hostname=NAME) if port == 465 else connected


class Mailbox(imaplib.IMAP4_SSL):
    def __init__(self, host: MailHost) -> None:
        self._mail_host = host
        super().__init__(NAME, 993, timeout=60)

    def _create_socket(self, timeout: float | None) -> ssl.SSLSocket:
        return self._mail_host.tls.wrap_socket(self._mail_host.connect(993), server_hostname=NAME)


def _closed() -> list[Path]:
    """The directories above the interpreter and this checkout that only their owner may enter."""
    paths = {parent for path in (Path(sys.base_prefix), ROOT) for parent in (path, *path.parents)}
    return sorted(path for path in paths if not path.stat().st_mode & 0o001)
