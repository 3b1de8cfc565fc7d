"""A mail host whose Dovecot, rspamd, core or workers are killed while clients send: what was answered 250 is stored.

Clients from outside send by port 25 to a user's Maildir, and users by port 465 to a relay. `ops/test --long` kills each 20 times.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import signal
import smtplib
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.interop.machine import DOMAIN
from tests.interop.mail_host import MailHost
from tests.support.programs import Programs, Stored
from tests.support.starter import Process
from tests.support.waiting import until

JOE = f"joe@{DOMAIN}"
CLOSED = (smtplib.SMTPServerDisconnected, ConnectionResetError, BrokenPipeError, ssl.SSLEOFError, ssl.SSLZeroReturnError)


class Sender(threading.Thread):
    """Sends one message after the other until it is stopped, and notes what became of each."""

    def __init__(self, name: str, send: Callable[[str], None]) -> None:
        super().__init__(daemon=True)
        self.accepted: list[str] = []
        self.codes: list[int] = []
        self.closed = 0
        self.error: Exception | None = None
        self._name_, self._send = name, send
        self._stop_ = threading.Event()
        self.start()

    def stop(self) -> None:
        self._stop_.set()
        self.join(120)

    def run(self) -> None:
        for number in itertools.count():
            if self._stop_.is_set():
                return
            subject = f"{self._name_}-{number}"
            try:
                self._send(subject)
            except smtplib.SMTPResponseException as error:
                self.codes.append(error.smtp_code)
            except smtplib.SMTPRecipientsRefused as error:
                self.codes += [code for code, _ in error.recipients.values()]
            except CLOSED:
                self.closed += 1
            except Exception as error:
                self.error = error
                return
            else:
                self.accepted.append(subject)
                continue
            time.sleep(0.02)  # a client that tries again too soon would only load the machine

    @property
    def failed(self) -> int:
        """How many messages were not accepted."""
        return len(self.codes) + self.closed


class Load:
    """Three clients from outside and two users who send to others."""

    def __init__(self, host: MailHost) -> None:
        self._host = host
        self.outside = [Sender(f"outside{number}", self._from_outside) for number in range(3)]
        self.users = [Sender(f"user{number}", self._from_a_user) for number in range(2)]
        self.all = [*self.outside, *self.users]

    def _from_outside(self, subject: str) -> None:
        client = self._host.smtp()
        with contextlib.closing(client):
            client.sendmail("eve@b.example", [JOE], text(subject))

    def _from_a_user(self, subject: str) -> None:
        client = self._host.submission(JOE)
        with contextlib.closing(client):
            client.sendmail(JOE, ["eve@elsewhere.example"], text(subject))

    def accepted_again(self, senders: Sequence[Sender]) -> None:
        """Wait until each has two more messages accepted, the second of which was begun after now."""
        more(senders, lambda sender: len(sender.accepted), 2)

    def stop(self) -> None:
        for sender in self.all:
            sender.stop()


def more(senders: Sequence[Sender], count: Callable[[Sender], int], number: int = 1) -> None:
    """Wait until each has so many more of what ``count`` counts, or has had an error."""
    enough = [count(sender) + number for sender in senders]
    pairs = list(zip(senders, enough, strict=True))
    until(lambda: all(count(sender) >= least or sender.error for sender, least in pairs), "the load", 120)


def text(subject: str) -> str:
    return f"From: eve@b.example\r\nMessage-ID: <{subject}@b.example>\r\nSubject: {subject}\r\n\r\n" + ("x" * 70 + "\r\n") * 200


class Running:
    """The processes of a mail host with two workers each, and how each is killed."""

    def __init__(self, programs: Programs) -> None:
        self.host = MailHost(programs)
        self.host.run(r"sed -i 's/^\[\(core\|edge\)\]$/&\nworkers = 2/' /etc/fumi/fumi.toml")
        self.rspamd, self.dovecot = self.host.start_rspamd(), self.host.start_dovecot()
        self.host.start_relay()
        self.core, self.edge = (self.host.start_service(name) for name in ("fumi-core", "fumi-edge"))
        for program in (self.core, self.edge):
            until(lambda program=program: len(workers(program)) == 2, "two workers")  # type: ignore[misc]
        self.load = Load(self.host)

    def kill_dovecot(self) -> None:
        """Only users notice."""
        kill_group(self.dovecot)
        more(self.load.users, lambda sender: sender.failed)
        self.load.accepted_again(self.load.outside)
        self.dovecot = self.host.start_dovecot()

    def kill_rspamd(self) -> None:
        kill_group(self.rspamd)
        more(self.load.all, lambda sender: sender.failed)
        self.rspamd = self.host.start_rspamd()

    def kill_core(self) -> None:
        os.kill(main_process(self.core), signal.SIGKILL)

    def kill_core_worker(self) -> None:
        kill_worker(self.core)

    def kill_edge_worker(self) -> None:
        kill_worker(self.edge)

    def check(self) -> None:
        """What must hold, whatever was killed."""
        for sender in self.load.all:
            assert sender.error is None, sender.error
        codes = Counter(code for sender in self.load.all for code in sender.codes)
        assert all(400 <= code < 500 for code in codes), codes
        stored = self.host.maildir(f"/srv/mail/{DOMAIN}/joe/Maildir").messages()
        assert all(b"\nX-Spamd-Result: " in each.text for each in stored)
        self._complete(self.load.outside, stored)
        self._complete(self.load.users, self.host.maildir("/srv/relayed").messages())

    @staticmethod
    def _complete(senders: Sequence[Sender], stored: Sequence[Stored]) -> None:
        """Each accepted message is stored once and whole; others only where the connection ended before the reply."""
        found = Counter(re.findall(rb"\nSubject: (\S+)\n", b"\n" + each.text)[0].decode() for each in stored)
        accepted = {subject for sender in senders for subject in sender.accepted}
        assert accepted - set(found) == set()
        assert set(found.values()) <= {1}
        assert len(found) - len(accepted) <= sum(sender.closed for sender in senders)
        assert all(each.text.count(b"x" * 70) == 200 for each in stored)


def children(pid: int) -> list[int]:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError), open(f"/proc/{pid}/task/{pid}/children") as listed:
        return [int(each) for each in listed.read().split()]
    return []


def main_process(service: Process) -> int:
    """The process that the runner of a unit has started."""
    return until(lambda: children(service.pid), "the program")[0]


def sockets(pid: int) -> set[str]:
    found = set()
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.add(os.readlink(path))
    return {each for each in found if each.startswith("socket:")}


def workers(service: Process) -> list[int]:
    """The processes that have the sockets of the runner: not the one that serves the metrics."""
    with contextlib.suppress(FileNotFoundError):
        return [child for child in children(main_process(service)) if sockets(child) & sockets(service.pid)]
    return []


def kill_worker(service: Process) -> None:
    """Kill the older of two, so that each has its turn."""
    os.kill(min(until(lambda: workers(service), "a worker")), signal.SIGKILL)


def alive(group: int) -> bool:
    """Whether a process of this group lives; a zombie does not."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            state, _, its_group, *_ = path.read_text().rpartition(")")[2].split()
            if int(its_group) == group and state != "Z":
                return True
    return False


def kill_group(process: Process) -> None:
    """Kill a program with its processes, and wait until they have ended."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(60)
    until(lambda: not alive(process.pid), "the end of its processes")


@pytest.fixture
def running(programs: Programs) -> Iterator[Running]:
    started = Running(programs)
    try:
        yield started
    finally:
        started.load.stop()


KILLED = ("dovecot", "rspamd", "core", "core_worker", "edge_worker")


def kill_all(running: Running, times: int) -> None:
    """Kill each so many times, by turns, while all clients get through; then look at what was stored."""
    for _ in range(times):
        for name in KILLED:
            running.load.accepted_again(running.load.all)
            getattr(running, f"kill_{name}")()
    running.load.accepted_again(running.load.all)
    running.load.stop()
    running.check()


def test_what_is_accepted_while_parts_of_a_mail_host_are_killed_is_stored(running: Running) -> None:
    kill_all(running, 1)


@pytest.mark.long
def test_what_is_accepted_while_each_part_is_killed_twenty_times_is_stored(running: Running) -> None:
    kill_all(running, 20)
    senders = running.load.all
    accepted, closed = sum(len(sender.accepted) for sender in senders), sum(sender.closed for sender in senders)
    codes = dict(Counter(code for sender in senders for code in sender.codes))
    print(f"{20 * len(KILLED)} kills: {accepted} messages accepted, none lost; replies {codes}, {closed} connections closed")
