"""250 means that the message is in new/, whole; anything else means that it is not."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from fumi_core import CloseContext, Fumi
from fumi_core.delivery import maildir_files, maildir_writer
from fumi_core.program import builtin
from fumi_core.testing import running
from tests.core.client import Connect
from tests.core.programs import PROGRAM
from tests.support.waiting import until


@pytest.fixture
def box(tmp_path: Path) -> Path:
    return tmp_path / "box"


def build(box: Path, **options: Any) -> Fumi:
    return builtin.build(f"maildir:{box}", name="mx.example", close_timeout=0.2, **options)


def stored(box: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted((box / "new").iterdir())]


def body_of(message: bytes) -> bytes:
    """What comes after our trace header fields, the last of which is Received; first an empty line if it has no header."""
    lines = message.split(b"\n")
    at = next(number for number, line in enumerate(lines) if line.startswith(b"Received:")) + 1
    while lines[at].startswith(b"\t"):
        at += 1
    return b"\n".join(lines[at:])


def test_a_message_is_one_file_with_trace_headers_and_lf(box: Path, connect: Connect) -> None:
    with running(build(box)) as server:
        client = connect(server.port)
        client.envelope("a@b.example", "c@d.example", "e@f.example")
        client.say("DATA")
        reply = client.say("Subject: hi\r\n\r\n..stuffed\r\nbye\r\n.")
    (message,) = stored(box)
    (path,) = (box / "new").iterdir()
    assert reply == f"250 2.0.0 Ok: queued as {path.name}\r\n".encode()
    head = b"Return-Path: <a@b.example>\nDelivered-To: c@d.example\nDelivered-To: e@f.example\nReceived: from client.example "
    assert message.startswith(head)
    assert body_of(message) == b"Subject: hi\n\n.stuffed\nbye\n"
    assert b"\r" not in message
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "size", [0, 1, maildir_writer.BATCH_BYTES - 1, maildir_writer.BATCH_BYTES, 3 * maildir_writer.BATCH_BYTES + 7, 2_000_000]
)
def test_messages_of_any_size_arrive_byte_for_byte(box: Path, connect: Connect, size: int) -> None:
    lines = (b"%06d " % (size % 7) + b"x" * 60 + b"\r\n") * (size // 69)
    with running(build(box)) as server:
        client = connect(server.port)
        client.envelope()
        client.say("DATA")
        assert client.say(lines + b".").startswith(b"250")
    assert body_of(stored(box)[0]) == b"\n" * bool(lines) + lines.replace(b"\r\n", b"\n")


def test_extensions_that_a_maildir_cannot_support_are_neither_offered_nor_accepted(box: Path, connect: Connect) -> None:
    with running(build(box)) as server:
        client = connect(server.port)
        offered = client.say("EHLO client.example").replace(b"250 ", b"250-").split(b"\r\n")
        assert {b"250-CHUNKING", b"250-8BITMIME", b"250-SMTPUTF8"} < set(offered)
        assert not {b"250-BINARYMIME", b"250-DSN"} & set(offered)
        for parameter in ("BODY=BINARYMIME", "body=binarymime", "RET=HDRS", "ENVID=x"):
            assert client.say(f"MAIL FROM:<a@b.example> {parameter}").startswith(b"555 5.5.4"), parameter
        assert client.say("MAIL FROM:<a@b.example> BODY=8BITMIME SIZE=10").startswith(b"250")
        for parameter in ("NOTIFY=NEVER", "ORCPT=rfc822;c@d.example"):
            assert client.say(f"RCPT TO:<c@d.example> {parameter}").startswith(b"555 5.5.4"), parameter
        assert client.say("RCPT TO:<c@d.example>").startswith(b"250")
        assert client.say("BDAT 8 LAST\r\nA: b\r\n").startswith(b"250")
    assert [body_of(message) for message in stored(box)] == [b"A: b\n\n"]


def test_a_message_that_breaks_off_leaves_nothing(box: Path, connect: Connect) -> None:
    app = build(box)
    closed: list[CloseContext] = []
    app.on_close(lambda ctx, next: closed.append(ctx))
    with running(app) as server:
        client = connect(server.port)
        client.envelope()
        client.say("DATA")
        client.sock.sendall((b"x" * 70 + b"\r\n") * 5000)
        until(lambda: bool(list((box / "tmp").iterdir())))
        client.close()
        until(lambda: len(closed) == 1)
    assert list((box / "tmp").iterdir()) == []
    assert stored(box) == []


def test_a_message_over_the_size_leaves_nothing(box: Path, connect: Connect) -> None:
    with running(build(box, size=200_000)) as server:
        client = connect(server.port)
        client.envelope()
        client.say("DATA")
        assert client.say((b"x" * 70 + b"\r\n") * 5000 + b".") == b"552 5.3.4 Error: message file too big\r\n"
        assert list((box / "tmp").iterdir()) == []
    assert stored(box) == []


@pytest.mark.parametrize(
    ("number", "reply"),
    [(28, b"452 4.3.1 Insufficient system storage\r\n"), (5, b"451 4.3.0 Mail store error\r\n")],
)
@pytest.mark.parametrize("call", ["open", "write", "fsync", "link"])
def test_a_failing_disk_is_a_4yz_and_leaves_nothing(
    box: Path, connect: Connect, monkeypatch: pytest.MonkeyPatch, number: int, reply: bytes, call: str
) -> None:
    with running(build(box)) as server:
        client = connect(server.port)
        client.envelope()
        client.say("DATA")

        def fail(*arguments: object) -> None:
            raise OSError(number, os.strerror(number))

        with monkeypatch.context() as patch:
            patch.setattr(f"fumi_core.delivery.maildir.os.{call}", fail)
            assert client.say("hi\r\n.") == reply
        assert list((box / "tmp").iterdir()) == []
        assert stored(box) == []
        client.envelope()
        client.say("DATA")
        assert client.say("hi\r\n.").startswith(b"250")


def test_the_directories_that_had_to_be_made_are_safe_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lost directory is lost mail: each is synced in the one above it."""
    synced: list[Path] = []
    monkeypatch.setattr(maildir_files, "_sync_directory", synced.append)
    box = tmp_path / "not" / "there" / "box"
    maildir_files.MaildirDirectory(box).create()
    assert set(synced) == {box, *list(box.parents)[:3]}
    synced.clear()
    maildir_files.MaildirDirectory(box).create()
    assert set(synced) == {box, box.parent}


def test_nothing_is_promised_before_file_and_directory_are_synced(
    box: Path, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    for call in ("write", "fsync", "link"):
        real = getattr(os, call)

        def watched(*arguments: Any, call: str = call, real: Any = real) -> Any:
            steps.append(call)
            return real(*arguments)

        monkeypatch.setattr(f"fumi_core.delivery.maildir.os.{call}", watched)
    with running(build(box)) as server:
        client = connect(server.port)
        steps.clear()
        client.envelope()
        client.say("DATA")
        assert client.say("hi\r\n.").startswith(b"250")
        assert steps == ["write", "fsync", "link", "fsync"]


def test_a_killed_core_has_stored_what_it_accepted_and_no_partial_message(tmp_path: Path, connect: Connect) -> None:
    box = tmp_path / "box"
    command = [PROGRAM, "--proxy-protocol", "off", "--listen"]
    path = tmp_path / "s"
    process = subprocess.Popen([*command, f"unix:{path}", "--deliver", f"maildir:{box}"], stderr=subprocess.PIPE)
    try:
        assert process.stderr is not None
        while b"listening" not in process.stderr.readline():
            pass
        promised = _load_until_killed(path, process)
    finally:
        process.kill()
        process.wait()
    messages = stored(box)
    assert promised > 5
    # One more may be safe already without its 250 having got out.
    assert promised <= len(messages) <= promised + 1
    assert all(message.endswith(b"x" * 70 + b"\n") for message in messages)


def _load_until_killed(path: Path, process: subprocess.Popen[bytes]) -> int:
    import socket

    promised = 0
    with socket.socket(socket.AF_UNIX) as sock, sock.makefile("rb") as replies:
        sock.connect(str(path))
        replies.readline()
        try:
            for number in range(10_000):
                for line in ("RSET" if number else "HELO x", "MAIL FROM:<>", "RCPT TO:<c@d.example>", "DATA"):
                    sock.sendall(line.encode() + b"\r\n")
                    replies.readline()
                sock.sendall((b"x" * 70 + b"\r\n") * 3000 + b".\r\n")
                if number == 10:
                    process.send_signal(signal.SIGKILL)
                if replies.readline().startswith(b"250"):
                    promised += 1
        except ConnectionError:
            pass
    return promised
