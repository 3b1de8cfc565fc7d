"""Postfix and Dovecot with configurations of their own, on loopback. Debian's packages are unpacked and never installed.

Their programs expect their files in /usr. So each runs in a mount namespace where /usr has the packages' files, too.
"""

from __future__ import annotations

import contextlib
import grp
import os
import pwd
import re
import shutil
import signal
import smtplib
import socket
import threading
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from tests.bench import environment
from tests.support.ports import free_port
from tests.support.programs import Programs, listening
from tests.support.waiting import until

OVERLAY = 'mount -t overlay overlay -o "lowerdir=$0/usr:/usr" /usr && exec "$@"'
"""Makes the files of the packages at $0 part of /usr, then runs the rest."""


def command(home: Path, *words: str | Path) -> list[str | Path]:
    """The command that runs a program of the packages unpacked at ``home``."""
    return ["unshare", "--mount", "sh", "-c", OVERLAY, home, *words]


DOVECOT = """
protocols = lmtp
base_dir = {directory}/base
state_dir = {directory}/state
log_path = {directory}/log
default_internal_user = nobody
default_internal_group = nogroup
default_login_user = daemon
ssl = no
first_valid_uid = 1
mail_location = maildir:{directory}/mail/%n
mail_plugins = quota
service lmtp {{
  inet_listener lmtp {{
    address = 127.0.0.1
    port = {port}
  }}
}}
passdb {{
  driver = static
}}
userdb {{
  driver = passwd-file
  args = username_format=%n {directory}/users
}}
plugin {{
  quota = maildir:User quota
}}
"""


class Dovecot:
    """An LMTP server with a Maildir for each of its users."""

    def __init__(self, programs: Programs, place: Path, users: Iterable[str], full: Iterable[str] = ()) -> None:
        """``place`` is a directory that all users may enter: these servers run some of their programs as others."""
        environment.install_dovecot()
        self.port: int = free_port()
        self.directory = place / "dovecot"
        self._programs = programs
        (self.directory / "mail").mkdir(parents=True)
        daemon = pwd.getpwnam("daemon")
        os.chown(self.directory / "mail", daemon.pw_uid, daemon.pw_gid)
        owner = f"{daemon.pw_uid}:{daemon.pw_gid}"
        lines = [f"{name}::{owner}::{self.directory}/mail/{name}::" for name in users]
        lines += [f"{name}::{owner}::{self.directory}/mail/{name}::userdb_quota_rule=*:bytes=10" for name in full]
        (self.directory / "users").write_text("\n".join(lines) + "\n")
        (self.directory / "dovecot.conf").write_text(DOVECOT.format(directory=self.directory, port=self.port))
        self.start()

    def start(self) -> None:
        words = command(environment.INSTALLED / "dovecot", "/usr/sbin/dovecot", "-F", "-c", self.directory / "dovecot.conf")
        self.process = self._programs.start(*words, port=self.port, log="dovecot.log")

    def kill(self) -> None:
        """All its processes at once, with SIGKILL."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(60)
        until(lambda: not listening(self.port), "Dovecot gone")
        # A process that is still ending may hold one of these, and the next Dovecot would not start beside it.
        shutil.rmtree(self.directory / "base")

    def copies(self, text: str) -> dict[str, int]:
        """How many messages with this text each user has, where there are any."""
        found: Counter[str] = Counter()
        for path in self.directory.glob("mail/*/new/*"):
            found[path.parts[-3]] += text in path.read_text()
        return dict(+found)


class LMTPProxy:
    """An LMTP proxy in front of Dovecot: each recipient has a transaction of its own there, and is answered at once.

    Dovecot itself sends all answers together, at the end. ``stop_after`` is how many recipients are answered; then it waits for
    ``break_off()``. Those that wait have been delivered nothing.
    """

    def __init__(self, next_hop: int, stop_after: int | None = None) -> None:
        self.stop_after = stop_after
        self.waiting = threading.Event()
        self._broken = threading.Event()
        self._next_hop = next_hop
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def break_off(self) -> None:
        """Close the connection of the client that waits, and answer everybody from now on."""
        self.stop_after = None
        self._broken.set()

    def close(self) -> None:
        self._broken.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        # Whatever fails behind it closes the connection to the client.
        with contextlib.suppress(OSError, smtplib.SMTPException), client, client.makefile("rb") as lines:
            client.sendall(b"220 proxy\r\n")
            sender, recipients = b"", list[bytes]()
            for line in lines:
                verb = line[:4].upper()
                if verb == b"DATA":
                    client.sendall(b"354 go on\r\n")
                    text = b"".join(iter(lines.readline, b".\r\n"))
                    for number, recipient in enumerate(recipients):
                        if number == self.stop_after:
                            self.waiting.set()
                            self._broken.wait(120)
                            return
                        client.sendall(self._say(sender, recipient, text))
                    continue
                if verb == b"MAIL":
                    sender, recipients = line.split()[1][5:], []
                reply = self._say(sender, line.split()[1][3:]) if verb == b"RCPT" else b"250 Ok\r\n"
                if verb == b"RCPT" and reply.startswith(b"250"):
                    recipients.append(line.split()[1][3:])
                client.sendall(reply)

    def _say(self, sender: bytes, recipient: bytes, text: bytes | None = None) -> bytes:
        """Dovecot's reply to a recipient or, with a text, to that message for it."""
        with smtplib.LMTP("127.0.0.1", self._next_hop, timeout=60) as lmtp:
            lmtp.ehlo("proxy")
            lmtp.docmd("MAIL", f"FROM:{sender.decode()}")
            code, words = lmtp.docmd("RCPT", f"TO:{recipient.decode()}")
            if text is not None and code == 250:
                code, words = lmtp.data(text.replace(b"\r\n..", b"\r\n."))
            return b"%d %b\r\n" % (code, words.replace(b"\n", b" "))


MAIN = """
compatibility_level = 3.6
mail_owner = nobody
setgid_group = mail
default_privs = daemon
queue_directory = {directory}/queue
data_directory = {directory}/data
meta_directory = {home}/etc/postfix
daemon_directory = /usr/lib/postfix/sbin
shlib_directory = /usr/lib/postfix
maillog_file = {directory}/log
maillog_file_prefixes = {directory}
myhostname = postfix.example
inet_interfaces = 127.0.0.1
inet_protocols = ipv4
mydestination =
local_transport = error:no local mail
alias_maps =
relayhost = [127.0.0.1]:{next_hop}
smtp_host_lookup = native
# With one second qmgr tries again while the delivery agent still holds the file, and then never more.
minimal_backoff_time = 3s
maximal_backoff_time = 4s
queue_run_delay = 1s
transport_retry_time = 1s
"""
SERVICES = """
127.0.0.1:{port} inet n - n - - smtpd
cleanup unix n - n - 0 cleanup
qmgr unix n - n 300 1 qmgr
rewrite unix - - n - - trivial-rewrite
bounce unix - - n - 0 bounce
defer unix - - n - 0 bounce
trace unix - - n - 0 bounce
smtp unix - - n - - smtp
relay unix - - n - - smtp
error unix - - n - - error
retry unix - - n - - error
proxymap unix - - n - - proxymap
anvil unix - - n - 1 anvil
scache unix - - n - 1 scache
flush unix n - n 1000? 0 flush
tlsmgr unix - - n 1000? 1 tlsmgr
postlog unix-dgram n - n - 1 postlogd
"""
QUEUES: tuple[str, ...] = ("active", "bounce", "corrupt", "defer", "deferred", "flush", "hold", "incoming")
QUEUES += ("maildrop", "pid", "private", "public", "saved", "trace")


class Postfix:
    """A mail server that takes mail for anyone and relays it to ``next_hop``, a port; it tries again after a second or two."""

    def __init__(self, programs: Programs, place: Path, next_hop: int) -> None:
        environment.install_postfix()
        home = environment.INSTALLED / "postfix"
        self.port: int = free_port()
        self.directory = place / "postfix"
        (self.directory / "data").mkdir(parents=True)
        owner, group = pwd.getpwnam("nobody").pw_uid, grp.getgrnam("mail").gr_gid
        for name in QUEUES:
            (self.directory / "queue" / name).mkdir(parents=True)
            os.chown(self.directory / "queue" / name, 0 if name == "pid" else owner, -1)
        for name, mode in (("maildrop", 0o730), ("public", 0o710), ("private", 0o700)):
            os.chown(self.directory / "queue" / name, -1, group if name != "private" else -1)
            (self.directory / "queue" / name).chmod(mode)
        os.chown(self.directory / "data", owner, -1)
        main = MAIN.format(directory=self.directory, home=home, next_hop=next_hop)
        (self.directory / "main.cf").write_text(main)
        (self.directory / "master.cf").write_text(SERVICES.format(port=self.port))
        words = command(home, "/usr/lib/postfix/sbin/master", "-c", self.directory, "-d")
        programs.start(*words, port=self.port, log="postfix.log")

    def outcomes(self, domain: str) -> dict[str, Counter[str]]:
        """What became of each recipient of this domain, by local part: sent, bounced, and deferred as often as it was."""
        found: dict[str, Counter[str]] = {}
        log = (self.directory / "log").read_text()
        for name, outcome in re.findall(rf"to=<(\w+)@{re.escape(domain)}>.* status=(\w+)", log):
            found.setdefault(name, Counter())[outcome] += 1
        return found
