"""The flags of fumi-core for mail filters."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.core.client import Connect
from tests.core.programs import Start
from tests.core.scripted_hop import StartHop
from tests.core.scripted_milter import CONTINUE, REJECT, StartMilter, packet, strings
from tests.support.ports import free_port, kept_port
from tests.support.starter import finished
from tests.support.waiting import until

PLAIN = ("--proxy-protocol", "off", "--domain", "d.example", "--deliver", "maildir:box")
TEXT = b"Subject: hi\r\n\r\nhi\r\n."


def test_a_filter_checks_mail_before_it_is_delivered(
    scripted_milter: StartMilter, start: Start, connect: Connect, tmp_path: Path
) -> None:
    milter = scripted_milter(end=packet(b"h", strings(b"X-Checked", b"yes")) + CONTINUE)
    port = free_port()
    start("--listen", f"127.0.0.1:{port}", *PLAIN, "--milter", milter.address)
    client = connect(port)
    client.say("EHLO client.example")
    client.say("MAIL FROM:<a@b.example>")
    assert client.say("RCPT TO:<c@other.example>").startswith(b"550")
    client.say("RCPT TO:<c@d.example>")
    client.say("DATA")
    assert client.say(TEXT).startswith(b"250")
    assert milter.data("rcpt") == [b"<c@d.example>\0"]
    (path,) = (tmp_path / "box/new").iterdir()
    assert path.read_bytes().endswith(b"Subject: hi\nX-Checked: yes\n\nhi\n")


def test_several_filters_by_repeating_the_flag(scripted_milter: StartMilter, start: Start, connect: Connect) -> None:
    first, second = scripted_milter(), scripted_milter(mail=REJECT)
    port = free_port()
    start("--listen", f"127.0.0.1:{port}", *PLAIN, "--milter", first.address, "--milter", second.address)
    client = connect(port)
    client.say("EHLO client.example")
    assert client.say("MAIL FROM:<a@b.example>") == b"550 5.7.1 Command rejected\r\n"
    assert "mail" in first.names()


@pytest.mark.parametrize("failure", ["tempfail", "accept"])
def test_mail_without_its_filter(failure: str, start: Start, connect: Connect) -> None:
    port = free_port()
    with kept_port() as sock:
        address = f"127.0.0.1:{sock.getsockname()[1]}"
        program = start("--listen", f"127.0.0.1:{port}", *PLAIN, "--milter", address, "--milter-failure", failure)
        client = connect(port)
        client.say("EHLO client.example")
        reply = client.say("MAIL FROM:<a@b.example>")
    assert reply.startswith(b"451 4.7.1" if failure == "tempfail" else b"250")
    lines = [line for line in program.log.read_text().splitlines() if "milter failed" in line]
    assert len(lines) == 1
    assert f'milter={address} error="Connection refused"' in lines[0]


def test_a_next_hop_takes_changed_messages_but_no_changed_envelope(
    scripted_milter: StartMilter, start: Start, connect: Connect, scripted_hop: StartHop
) -> None:
    changes = {b"<c@d.example>\0": packet(b"+", b"<x@y.example>\0"), b"<e@d.example>\0": packet(b"b", b"new\r\n")}
    hop, milter = scripted_hop(), scripted_milter()
    milter.answers["end"] = lambda data: changes[milter.data("rcpt")[-1]] + CONTINUE
    port = free_port()
    flags = ("--proxy-protocol", "off", "--domain", "d.example", "--deliver", f"smtp:{hop.address}")
    program = start("--listen", f"127.0.0.1:{port}", *flags, "--milter", milter.address)
    for recipient, code in (("c@d.example", b"451 4.7.1"), ("e@d.example", b"250")):
        client = connect(port)
        client.envelope("a@b.example", recipient)
        client.say("DATA")
        assert client.say(TEXT).startswith(code)
    assert [text.split(b"\r\n\r\n", 1)[1] for text in hop.messages] == [b"new\r\n"]
    assert "which this delivery target cannot take" in program.log.read_text()


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (["--milter", "fd:3"], "--milter: fd:3 is not a milter: write HOST:PORT"),
        (["--milter", ":11332"], "--milter: :11332 is not a milter: write HOST:PORT"),
        (["--milter", "11332"], "'11332' is not an address"),
        (["--milter", "127.0.0.1:11332", "app:app"], "--milter belongs to the built-in app"),
    ],
)
def test_flags_that_cannot_work(flags: list[str], error: str, tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text("from fumi_core import Fumi\napp = Fumi(auth_optional=True)\n")
    done = finished("fumi-core", "--check", *flags, cwd=tmp_path)
    assert done.returncode == 2 if "is not an address" in error else done.returncode != 0
    assert error in done.stderr.replace("\n", " ")


def test_check_connects_to_each_filter(scripted_milter: StartMilter, tmp_path: Path) -> None:
    good, bad = scripted_milter(), scripted_milter(negotiate=CONTINUE)
    assert finished("fumi-core", "--check", *PLAIN, "--milter", good.address, cwd=tmp_path).returncode == 0
    until(lambda: good.names() == ["negotiate", "quit"])
    done = finished("fumi-core", "--check", *PLAIN, "--milter", good.address, "--milter", bad.address, cwd=tmp_path)
    assert done.returncode == 2
    assert f"--milter {bad.address}: an answer b'c' to the negotiation" in done.stderr
    with kept_port() as sock:
        address = f"127.0.0.1:{sock.getsockname()[1]}"
        done = finished("fumi-core", "--check", *PLAIN, "--milter", address, cwd=tmp_path)
    assert f"--milter {address}: Connection refused" in done.stderr
