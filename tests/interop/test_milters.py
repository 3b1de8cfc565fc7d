"""Real mail filters check the mail that fumi-core takes."""

from __future__ import annotations

import itertools
import os
import re
import smtplib
import threading
from collections.abc import Callable

import pytest

from fumi_core import Fumi, plugins
from fumi_core.testing import running
from tests.interop.mail_filters import DKIM, Rspamd
from tests.interop.starting import StartFumiCore
from tests.support.programs import Maildir, Programs
from tests.support.waiting import until

GTUBE = "XJS*C4JDBQADN1.NSBN3*2IDNEN*GTUBE-STANDARD-ANTI-UBE-TEST-EMAIL*C.34X"
HEADER = "From: Ann <ann@b.example>\r\nTo: joe@d.example\r\nDate: Thu, 1 Jan 2026 00:00:00 +0000\r\nMessage-ID: <1@b.example>\r\n"


def deliver(port: int, text: bytes, times: int = 1) -> None:
    with smtplib.SMTP("127.0.0.1", port, "client.example", timeout=60) as smtp:
        for _ in range(times):
            smtp.sendmail("ann@b.example", ["joe@d.example"], text)


def test_rspamd_rejects_gtube_and_adds_its_result_to_other_mail(programs: Programs, fumi_core: StartFumiCore) -> None:
    rspamd = Rspamd(programs)
    port, _ = fumi_core("--proxy-protocol", "off", "--deliver", "maildir:box", "--milter", f"127.0.0.1:{rspamd.port}")
    with pytest.raises(smtplib.SMTPDataError) as refused:
        deliver(port, f"{HEADER}Subject: spam\r\n\r\n{GTUBE}\r\n".encode())
    assert refused.value.smtp_code == 554
    assert b"Gtube pattern" in refused.value.smtp_error
    deliver(port, f"{HEADER}Subject: lunch\r\n\r\nToday?\r\n".encode(), times=3)
    texts = [message.text for message in Maildir(programs.directory / "box").messages()]
    assert len(texts) == 3
    for text in texts:
        assert text.startswith(HEADER.replace("\r\n", "\n").encode() + b"Subject: lunch\n")
        assert b"\nX-Spamd-Result: default: False" in text
        assert b"\nX-Rspamd-Queue-Id: " in text
        assert text.endswith(b"\n\nToday?\n")
    log = (programs.directory / "rspamd.log").read_text()
    assert "from: <ann@b.example>" in log
    assert "ip: 127.0.0.1" in log


def test_one_connection_to_rspamd_serves_several_clients(programs: Programs) -> None:
    rspamd = Rspamd(programs)
    app = Fumi(auth_optional=True, close_timeout=0.2)
    app.use(plugins.milter(f"127.0.0.1:{rspamd.port}", reuse_connections=True))
    with running(app) as server:
        for subject in ("one", "two", "three"):
            deliver(server.port, f"{HEADER}Subject: {subject}\r\n\r\nToday?\r\n".encode(), times=2)
        with pytest.raises(smtplib.SMTPDataError):
            deliver(server.port, f"{HEADER}Subject: spam\r\n\r\n{GTUBE}\r\n".encode())
        assert len(server.messages) == 6
    log = (programs.directory / "rspamd.log").read_text()
    assert log.count("accepted milter connection") == 1


KILLS = int(os.environ.get("KILLS", "3"))


class Sender:
    """Sends one message after the other, each with its own number, until it is stopped."""

    def __init__(self, port: int, name: str) -> None:
        self.accepted: list[str] = []
        self.codes: list[int] = []
        self._port, self._name = port, name
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(60)

    def _run(self) -> None:
        for number in itertools.count():
            if self._stop.is_set():
                return
            subject = f"{self._name}-{number}"
            try:
                deliver(self._port, f"{HEADER}Subject: {subject}\r\n\r\nToday?\r\n".encode())
            except smtplib.SMTPResponseException as error:
                self.codes.append(error.smtp_code)
            except smtplib.SMTPRecipientsRefused as error:
                self.codes += [code for code, _ in error.recipients.values()]
            else:
                self.accepted.append(subject)


def more(senders: list[Sender], count: Callable[[Sender], int]) -> None:
    """Wait until each has one more of what ``count`` counts."""
    before = [count(sender) for sender in senders]
    until(lambda: all(count(sender) > number for sender, number in zip(senders, before, strict=True)))


def test_what_is_accepted_while_rspamd_is_killed_is_stored_with_its_header(programs: Programs, fumi_core: StartFumiCore) -> None:
    rspamd = Rspamd(programs)
    port, _ = fumi_core("--proxy-protocol", "off", "--deliver", "maildir:box", "--milter", f"127.0.0.1:{rspamd.port}")
    senders = [Sender(port, f"sender{number}") for number in range(4)]
    for _ in range(KILLS):
        more(senders, lambda sender: len(sender.accepted))
        rspamd.kill()
        more(senders, lambda sender: len(sender.codes))
        rspamd.start()
    more(senders, lambda sender: len(sender.accepted))
    for sender in senders:
        sender.stop()
    assert {code for sender in senders for code in sender.codes} == {451}
    texts = [message.text for message in Maildir(programs.directory / "box").messages()]
    assert all(b"\nX-Rspamd-Queue-Id: " in text for text in texts)
    stored = [re.findall(rb"\nSubject: (\S+)\n", text)[0].decode() for text in texts]
    assert sorted(stored) == sorted(subject for sender in senders for subject in sender.accepted)


BODIES = [
    b"One line.\r\n",
    b"",
    b"..two dots\r\n.\tand  spaces \t \r\n\r\n\r\n",
    b"".join(b"%06d \xe2\x82\xac text that goes on\r\n" % number for number in range(20_000)),
]


@pytest.mark.parametrize("canonicalization", ["simple/simple", "relaxed/relaxed"])
def test_opendkim_signs_and_another_verifies_after_the_next_hop(
    canonicalization: str, programs: Programs, fumi_core: StartFumiCore
) -> None:
    dkim = DKIM(programs, canonicalization)
    inner, _ = fumi_core(
        "--proxy-protocol", "off", "--deliver", "maildir:box", "--milter", f"127.0.0.1:{dkim.verifier.port}", name="inner"
    )
    outer, _ = fumi_core(
        "--proxy-protocol",
        "off",
        "--deliver",
        f"smtp:127.0.0.1:{inner}",
        "--milter",
        f"127.0.0.1:{dkim.signer.port}",
        name="outer",
    )
    folded = "Subject: folded\r\n\tand  folded\r\n \t again\r\nSubject:\tx\r\n"
    for body in BODIES:
        deliver(outer, f"{HEADER}{folded}\r\n".encode() + body)
    texts = [message.text for message in Maildir(programs.directory / "box").messages()]
    assert len(texts) == len(BODIES)
    for text in texts:
        header = text.partition(b"\n\n")[0].replace(b"\n\t", b" ")
        assert b"\nDKIM-Signature: v=1; a=rsa-sha256; c=" + canonicalization.encode() in b"\n" + header
        assert b"dkim=pass" in header


def test_a_signature_over_another_text_does_not_verify(programs: Programs, fumi_core: StartFumiCore) -> None:
    dkim = DKIM(programs, "simple/simple")
    signed, _ = fumi_core(
        "--proxy-protocol", "off", "--deliver", "maildir:signed", "--milter", f"127.0.0.1:{dkim.signer.port}", name="signing"
    )
    checked, _ = fumi_core(
        "--proxy-protocol", "off", "--deliver", "maildir:box", "--milter", f"127.0.0.1:{dkim.verifier.port}", name="checking"
    )
    deliver(signed, f"{HEADER}\r\nOne line.\r\n".encode())
    (message,) = Maildir(programs.directory / "signed").messages()
    deliver(checked, message.text.replace(b"One", b"Two").replace(b"\n", b"\r\n"))
    (forged,) = Maildir(programs.directory / "box").messages()
    assert b"dkim=fail" in forged.text
    assert b"dkim=pass" not in forged.text
