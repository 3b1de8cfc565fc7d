"""Postfix's own test server, smtp-sink, as the next hop: over TCP and a Unix socket, by SMTP and LMTP, sound and at fault."""

from __future__ import annotations

import os
import re
import smtplib
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from fumi_core.program import builtin
from fumi_core.testing import RunningServer, running
from tests.bench import environment
from tests.support.ports import free_port
from tests.support.programs import Programs
from tests.support.waiting import until


@pytest.fixture(scope="session")
def postfix() -> None:
    """Debian's Postfix, unpacked beside the benchmarks' peers and never installed."""
    environment.INSTALLED.mkdir(exist_ok=True)
    environment.install_postfix()


class Sink:
    """A running smtp-sink, which writes each message into a file of its own."""

    def __init__(self, programs: Programs, where: str, *flags: str) -> None:
        """``where`` is ``unix`` or ``tcp``."""
        self.directory: Path = programs.directory
        port = free_port()
        self.address = f"unix:{self.directory / 'sink'}" if where == "unix" else f"127.0.0.1:{port}"
        user = ["-u", "root"] if os.geteuid() == 0 else []
        command = ["env", *(f"{name}={value}" for name, value in environment.postfix_environment().items())]
        command += [*environment.postfix_program("smtp-sink"), *user, "-d", "dump.", *flags, self.address, "100"]
        programs.start(*command, port=port if where == "tcp" else None, log="sink.log")
        if where == "unix":
            until(lambda: can_connect(self.directory / "sink"), "smtp-sink listening")

    def dumps(self, count: int) -> list[str]:
        """The messages, behind lines that say how they came, once there are so many.

        smtp-sink makes a file at MAIL, and removes that of a message that never came when it hears QUIT.
        """
        until(lambda: len(list(self.directory.glob("dump.*"))) == count, f"{count} messages at smtp-sink")
        return [path.read_text() for path in self.directory.glob("dump.*")]


def can_connect(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as sock:
        return sock.connect_ex(str(path)) == 0


@pytest.fixture
def sink(programs: Programs, postfix: None) -> Callable[..., Sink]:
    return lambda where, *flags: Sink(programs, where, *flags)


@pytest.fixture
def front() -> Iterator[Callable[..., RunningServer]]:
    """A server of ours that delivers to the target."""
    with ExitStack() as stack:

        def make(target: str, **options: Any) -> RunningServer:
            return stack.enter_context(running(builtin.build(target, name="front.example", close_timeout=0.2, **options)))

        yield make


@pytest.mark.parametrize("where", ["tcp", "unix"])
@pytest.mark.parametrize("protocol", ["smtp", "lmtp"])
def test_it_accepts_our_mail(sink: Callable[..., Sink], front: Callable[..., RunningServer], where: str, protocol: str) -> None:
    hop = sink(where, *(["-L"] if protocol == "lmtp" else []))
    server = front(f"{protocol}:{hop.address}", lmtp=protocol == "lmtp")
    client = smtplib.LMTP if protocol == "lmtp" else smtplib.SMTP
    with client("127.0.0.1", server.port, timeout=30) as smtp:
        for number in range(5):
            text = f"Subject: {number}\r\n\r\n.dots\r\n.\r\nend of {number}\r\n"
            smtp.ehlo_or_helo_if_needed()
            for line in ("MAIL FROM:<a@b.example>", "RCPT TO:<c@d.example>", "RCPT TO:<e@f.example>"):
                assert smtp.docmd(line)[0] == 250
            replies = [smtp.data(text), *([smtp.getreply()] if protocol == "lmtp" else [])]
            assert [code for code, _ in replies] == [250] * len(replies)
    dumps = hop.dumps(5)
    assert sorted(re.findall(r"^end of (\d)$", "".join(dumps), re.MULTILINE)) == list("01234")
    for dump in dumps:
        assert f"X-Client-Proto: {'LMTP' if protocol == 'lmtp' else 'ESMTP'}\n" in dump
        assert re.findall(r"X-Rcpt-Args: <(.*)>", dump) == ["c@d.example", "e@f.example"]
        assert "by front.example with " in dump
        assert "\n\n.dots\n.\nend of " in dump


@pytest.mark.parametrize("protocol", ["smtp", "lmtp"])
@pytest.mark.parametrize(
    ("fault", "reply"),
    [
        (["-f", "mail"], (500, b"5.3.0 Error: command failed")),
        (["-r", "mail"], (450, b"4.3.0 Error: command failed")),
        (["-f", "rcpt"], (500, b"5.3.0 Error: command failed")),
        (["-r", "rcpt"], (450, b"4.3.0 Error: command failed")),
        (["-f", "data"], (500, b"5.3.0 Error: command failed")),
        (["-f", "."], (500, b"5.3.0 Error: command failed")),
        (["-r", "."], (450, b"4.3.0 Error: command failed")),
        *(([flag, stage], (451, b"")) for flag in ("-q", "-Q") for stage in ("connect", "mail", "rcpt", "data", ".")),
        (["-Q", "lhlo, ehlo"], (451, b"")),
    ],
    ids=str,
)
def test_its_refusals_and_faults_reach_the_client(
    sink: Callable[..., Sink], front: Callable[..., RunningServer], protocol: str, fault: list[str], reply: tuple[int, bytes]
) -> None:
    hop = sink("tcp", *fault, *(["-L"] if protocol == "lmtp" else []))
    with smtplib.SMTP("127.0.0.1", front(f"{protocol}:{hop.address}").port, timeout=30) as smtp:
        code, text = last_reply(smtp)
        assert code == reply[0]
        assert text.startswith(reply[1] or b"4.")
        assert smtp.noop()[0] == 250


def last_reply(smtp: smtplib.SMTP) -> tuple[int, bytes]:
    """The first refusal of a transaction, or the reply to its message."""
    smtp.ehlo()
    for code, text in (smtp.docmd(line) for line in ("MAIL FROM:<a@b.example>", "RCPT TO:<c@d.example>")):
        if code != 250:
            return code, text
    return smtp.data(b"Subject: hi\r\n\r\nhi\r\n")


def test_without_esmtp_and_8bitmime_it_is_spoken_to_as_it_can(
    sink: Callable[..., Sink], front: Callable[..., RunningServer]
) -> None:
    hop = sink("tcp", "-e", "-8")
    with smtplib.SMTP("127.0.0.1", front(f"smtp:{hop.address}").port, timeout=30) as smtp:
        assert last_reply(smtp)[0] == 250
        with pytest.raises(smtplib.SMTPDataError, match=r"5\.6\.3"):
            smtp.sendmail("a@b.example", ["c@d.example"], "Subject: hi\r\n\r\nü\r\n".encode())
    (dump,) = hop.dumps(1)
    assert "X-Client-Proto: SMTP\n" in dump


@pytest.mark.parametrize("protocol", ["smtp", "lmtp"])
def test_many_clients_at_once_lose_and_double_nothing(
    sink: Callable[..., Sink], front: Callable[..., RunningServer], protocol: str
) -> None:
    hop = sink("unix", *(["-L"] if protocol == "lmtp" else []))
    server = front(f"{protocol}:{hop.address}")
    load = ["-s", "20", "-m", "400", "-l", "20000", "-N", f"127.0.0.1:{server.port}"]
    source = [*environment.postfix_program("smtp-source"), *load]
    done = subprocess.run(
        source, env={**os.environ, **environment.postfix_environment()}, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")
    recipients = re.findall(r"X-Rcpt-Args: <(.*)>", "".join(hop.dumps(400)))
    assert len(recipients) == len(set(recipients)) == 400
