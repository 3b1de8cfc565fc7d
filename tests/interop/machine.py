"""A machine in namespaces of its own, with a network and with the /etc, /run, /srv and /var of a new Debian.

Debian's Dovecot, rspamd and Postfix are unpacked, and lie where their packages put them. Files, users and ports are those of a
real machine. What is missing is systemd and DNS.
"""

from __future__ import annotations

import contextlib
import imaplib
import os
import re
import smtplib
import socket
import ssl
import sys
from pathlib import Path

from tests.bench import environment
from tests.support import inside
from tests.support.certificates import self_signed
from tests.support.programs import Maildir, Programs
from tests.support.readme import ROOT
from tests.support.starter import BIN, Process
from tests.support.waiting import until

SERVER, CLIENT = "203.0.113.1", "198.51.100.7"
"""The machine's address, and that of a client from outside, which rspamd does not treat as local."""
NAME, DOMAIN = "mx.example.org", "example.org"
PASSWORD = "secret"
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


class Machine:
    """A machine with these packages, and with what systemctl and apt-get print instead of what they do."""

    def __init__(self, programs: Programs) -> None:
        environment.install_dovecot()
        environment.install_filter("rspamd")
        environment.install_postfix()
        self.directory = programs.directory
        self.ports: dict[int, int] = {}
        """Where something listens that clients find at another port."""
        self._programs = programs
        self._base = self.directory / "machine"
        self._base.mkdir()
        setup = SETUP.replace("SERVER", SERVER).replace("CLIENT", CLIENT)
        words: list[str | Path] = ["unshare", "--mount", "--net", "sh", "-c", setup, "sh", self._base, environment.INSTALLED]
        self._machine = programs.start(*words, *_closed(), log="machine.log")
        until(lambda: self._ready() or self._machine.poll() is not None, "the machine")
        assert self._machine.poll() is None, self.log("machine")
        self.certificate = self_signed(self.directory, NAME)
        self.path("/opt/fumi").symlink_to(BIN.parent)
        self.stub("apt-get", "systemctl")

    def _ready(self) -> bool:
        return Path(f"/proc/{self._machine.pid}/root{self._base}/ready").exists()

    def stub(self, *names: str, text: str = 'echo "${0##*/}" "$@"\n') -> None:
        """Have these programs do something else there."""
        tools = self.path("/opt/tools")
        tools.mkdir(exist_ok=True)
        for name in names:
            (tools / name).write_text(f"#!/bin/sh\n{text}")
            (tools / name).chmod(0o755)

    def lineage(self) -> None:
        """Put the certificate where certbot does."""
        directory = self.path(f"/etc/letsencrypt/live/{NAME}")
        directory.mkdir(parents=True)
        for source, name in zip(self.certificate, ("fullchain.pem", "privkey.pem"), strict=True):
            (directory / name).write_bytes(source.read_bytes())

    def path(self, within: str | Path) -> Path:
        """Where a file of the machine is."""
        return Path(f"/proc/{self._machine.pid}/root{within}")

    def run(self, text: str, given: str = "", directory: str | Path = ROOT) -> str:
        """What the commands print that root runs there, in this directory; they are to succeed."""
        return self._programs.run(*self._inside("env", f"--chdir={directory}", "sh", "-euc", text), given=given.encode())

    def start(self, *words: str | Path, log: str) -> Process:
        """Start a program there, as root."""
        return self._programs.start(*self._inside(*words), log=f"{log}.log")

    def _inside(self, *words: str | Path) -> list[str | Path]:
        tools = f"PATH=/opt/tools:{os.environ['PATH']}"
        return ["nsenter", f"--target={self._machine.pid}", "--mount", "--net", "env", tools, *words]

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
        return inside.connect(self._machine.pid, (SERVER, self.ports.get(port, port)), timeout, (CLIENT, 0))

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
    def __init__(self, host: Machine, port: int) -> None:
        self._mail_host = host
        super().__init__(NAME, port, "client.example", timeout=60)

    def _get_socket(self, host: str, port: int, timeout: float) -> socket.socket:
        connected = self._mail_host.connect(port, timeout)
        return self._mail_host.tls.wrap_socket(connected, server_hostname=NAME) if port == 465 else connected


class Mailbox(imaplib.IMAP4_SSL):
    def __init__(self, host: Machine) -> None:
        self._mail_host = host
        super().__init__(NAME, 993, timeout=60)

    def _create_socket(self, timeout: float | None) -> ssl.SSLSocket:
        return self._mail_host.tls.wrap_socket(self._mail_host.connect(993), server_hostname=NAME)


def _closed() -> list[Path]:
    """The directories above the interpreter and this checkout that only their owner may enter."""
    paths = {parent for path in (Path(sys.base_prefix), ROOT) for parent in (path, *path.parents)}
    return sorted(path for path in paths if not path.stat().st_mode & 0o001)
