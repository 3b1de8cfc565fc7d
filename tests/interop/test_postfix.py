"""Postfix's own clients. Its load generator smtp-source checks every reply and stops at one it did not expect: there is none.

And posttls-finger, which has the TLS of Postfix's SMTP client, insists on the edge's certificate.
"""

from __future__ import annotations

import re
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.bench import environment
from tests.interop.starting import StartEdge
from tests.support.certificates import CertificateFiles
from tests.support.ports import free_port
from tests.support.programs import Maildir, Programs
from tests.support.starter import BIN

# What concerns us is in flags; but Postfix's programs look whether these exist.
CONFIGURATION = """
mail_owner = nobody
setgid_group = mail
default_privs = daemon
compatibility_level = 3.6
"""


@dataclass
class Core:
    """A fumi-core process: where it listens, where it delivers, and what it counts."""

    target: str
    port: int
    maildir: Maildir
    _metrics: int

    def counts(self, name: str) -> dict[str, int]:
        """A metric's values other than 0, by the label."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self._metrics}/metrics", timeout=60) as answer:
            text = answer.read().decode()
        found = re.findall(rf'^{name}\{{\w+="(\w+)"\}} (\S+)$', text, re.MULTILINE)
        return {label: int(float(value)) for label, value in found if float(value)}


@pytest.fixture
def core(programs: Programs, request: pytest.FixtureRequest) -> Callable[..., Core]:
    def start(*flags: str, unix: bool = False) -> Core:
        port, metrics = free_port(), free_port()
        address = f"unix:{programs.directory}/core" if unix else f"127.0.0.1:{port}"
        command: list[str | Path] = [BIN / "fumi-core", "--proxy-protocol", "off", "--listen", address, *flags]
        programs.start(*command, "--metrics", f"127.0.0.1:{metrics}", "--log-level", "warning", port=metrics, log="core.log")
        return Core(address, port, programs.maildir(), metrics)

    return start


@pytest.fixture(scope="session")
def postfix() -> dict[str, str]:
    """What Postfix's programs need in their environment. They are unpacked from Debian's package, not installed."""
    environment.install_postfix()
    return environment.postfix_environment()


@pytest.fixture
def smtp_source(programs: Programs, postfix: dict[str, str]) -> Callable[..., None]:
    """Sends so many messages over so many sessions at once; a reply that it does not expect makes it fail, loudly."""

    def send(core: Core, messages: int, *flags: str, sessions: int = 20) -> None:
        envelope = ["-M", "client.example", "-f", "a@b.example", "-t", "c@d.example"]
        command = [*environment.postfix_program("smtp-source"), "-s", str(sessions), "-m", str(messages), *envelope]
        assert programs.run(*command, *flags, core.target, environment=postfix) == ""
        assert core.counts("fumi_core_messages_total") == {"accepted": messages}
        assert not {code for code in core.counts("fumi_core_replies_total") if code[0] in "45"}

    return send


KEPT = "-d"
LMTP = "-L"
MANY = 20_000
FULL = pytest.param(MANY, marks=pytest.mark.long)


@pytest.mark.parametrize("flags", [[], [KEPT]])
@pytest.mark.parametrize("messages", [2000, FULL])
def test_fifty_sessions_at_once_see_no_error(
    core: Callable[..., Core], smtp_source: Callable[..., None], messages: int, flags: list[str]
) -> None:
    smtp_source(core("--deliver", "discard:"), messages, *flags, sessions=50)


@pytest.mark.parametrize("messages", [500, FULL])
def test_as_many_files_as_messages_are_in_the_maildir(
    core: Callable[..., Core], smtp_source: Callable[..., None], messages: int
) -> None:
    server = core()
    smtp_source(server, messages, KEPT, "-N", sessions=50)
    assert len(server.maildir) == messages
    recipients = {message.headers.partition("Delivered-To: ")[2].partition("\n")[0] for message in server.maildir.messages()}
    assert len(recipients) == messages


@pytest.mark.parametrize("flags", [[], [KEPT]])
@pytest.mark.parametrize("messages", [500, FULL])
def test_in_lmtp_every_recipient_is_answered(
    core: Callable[..., Core], smtp_source: Callable[..., None], messages: int, flags: list[str]
) -> None:
    smtp_source(core("--lmtp", "--deliver", "discard:"), messages, LMTP, "-r", "7", *flags)


def test_a_unix_socket_takes_mail(core: Callable[..., Core], smtp_source: Callable[..., None]) -> None:
    smtp_source(core("--deliver", "discard:", unix=True), 500)


@pytest.mark.parametrize("flags", [[], [KEPT]])
@pytest.mark.parametrize("length", ["1", "65536", "100000", "5000000"])
def test_messages_of_any_length_are_accepted(
    core: Callable[..., Core], smtp_source: Callable[..., None], length: str, flags: list[str]
) -> None:
    smtp_source(core("--deliver", "discard:"), 40, "-l", length, *flags, sessions=4)


def test_a_file_of_dots_is_stored_as_it_is(
    core: Callable[..., Core], smtp_source: Callable[..., None], programs: Programs
) -> None:
    text = b"Subject: dots\n\n.\n..\n...\n.x\n" + b"." * 5000 + b"\n\n.\n"
    (programs.directory / "message").write_bytes(text)
    server = core()
    smtp_source(server, 20, "-F", "message")
    # It ends the last line once more.
    assert {message.text for message in server.maildir.messages()} == {text + b"\n"}


def test_a_hundred_recipients_are_one_file(core: Callable[..., Core], smtp_source: Callable[..., None]) -> None:
    server = core()
    smtp_source(server, 20, "-r", "100")
    (headers,) = {len(message.headers.split("\nDelivered-To: ")) for message in server.maildir.messages()}
    assert headers == 101


@pytest.fixture
def posttls_finger(programs: Programs, postfix: dict[str, str], certificate: CertificateFiles) -> Callable[..., str]:
    """Connects as Postfix's SMTP client would that insists on this certificate; what it says of that."""
    (programs.directory / "main.cf").write_text(CONFIGURATION)

    def connect(port: int, *flags: str) -> str:
        program = environment.postfix_program("posttls-finger")
        command = [*program, "-c", "-l", "verify", "-F", str(certificate[0]), *flags, f"[127.0.0.1]:{port}", "localhost"]
        said: str = programs.run(*command, environment={"MAIL_CONFIG": str(programs.directory), **postfix})
        assert "Verified TLS connection established" in said
        return said

    return connect


def test_postfix_verifies_the_edge_by_implicit_tls(
    edge: StartEdge, core: Callable[..., Core], posttls_finger: Callable[..., str]
) -> None:
    posttls_finger(edge(core("--proxy-protocol", "required").port).tls_port, "-w")


def test_postfix_verifies_the_edge_by_starttls_and_resumes_the_session(
    edge: StartEdge, core: Callable[..., Core], posttls_finger: Callable[..., str]
) -> None:
    said = posttls_finger(edge(core("--proxy-protocol", "required").port).starttls_port, "-r", "1", "-m", "1")
    assert "Reusing old session" in said
