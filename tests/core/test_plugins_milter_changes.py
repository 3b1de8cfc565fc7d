"""The changes that a mail filter makes to messages and their envelopes."""

from __future__ import annotations

import asyncio
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest

from fumi_core.plugins.milter import changes, header
from fumi_core.plugins.milter.changes import Changes
from fumi_core.plugins.milter.header import HeaderReader, changed, new_field
from fumi_core.plugins.milter.wire import AddHeader, AddRecipient, ChangeHeader, DeleteRecipient, InsertHeader
from fumi_core.smtp.session import Address, Session, address_key
from fumi_core.testing import running
from tests.core.client import Connect
from tests.core.scripted_milter import ACCEPT, CONTINUE, PROGRESS, REJECT, StartMilter, negotiated, numbered, packet, strings
from tests.core.test_plugins_milter import REJECTED, UNAVAILABLE, Delivered, build, deliver, message

TEXT = b"A: 1\r\nB: 2\r\nA: 3\r\n\r\nbody\r\n"


def add(name: bytes, value: bytes) -> bytes:
    return packet(b"h", strings(name, value))


def insert(index: int, name: bytes, value: bytes) -> bytes:
    return numbered(b"i", index, name, value)


def change(index: int, name: bytes, value: bytes) -> bytes:
    return numbered(b"m", index, name, value)


@pytest.mark.parametrize(
    ("changes", "header"),
    [
        (add(b"C", b"4"), b"A: 1|B: 2|A: 3|C: 4"),
        (add(b"C", b""), b"A: 1|B: 2|A: 3|C: "),
        (insert(0, b"C", b"4"), b"C: 4|A: 1|B: 2|A: 3"),
        (insert(1, b"C", b"4"), b"C: 4|A: 1|B: 2|A: 3"),
        (insert(2, b"C", b"4"), b"A: 1|C: 4|B: 2|A: 3"),
        (insert(100, b"C", b"4"), b"A: 1|B: 2|A: 3|C: 4"),
        (insert(1, b"C", b"4") + insert(1, b"D", b"5"), b"D: 5|C: 4|A: 1|B: 2|A: 3"),
        (change(1, b"A", b"x"), b"A: x|B: 2|A: 3"),
        (change(0, b"a", b"x"), b"a: x|B: 2|A: 3"),
        (change(2, b"A", b"x"), b"A: 1|B: 2|A: x"),
        (change(3, b"A", b"x"), b"A: 1|B: 2|A: 3|A: x"),
        (change(1, b"C", b"x"), b"A: 1|B: 2|A: 3|C: x"),
        (change(2, b"A", b"") + change(1, b"A", b""), b"B: 2"),
        (change(5, b"A", b""), b"A: 1|B: 2|A: 3"),
        (change(1, b"A", b"") + change(2, b"A", b"") + change(1, b"B", b"") + change(1, b"A", b""), b""),
        (add(b"C", b"folded\n\tonce\n twice"), b"A: 1|B: 2|A: 3|C: folded|\tonce| twice"),
        (add(b"C", b"folded\r\n\tonce\r twice"), b"A: 1|B: 2|A: 3|C: folded|\tonce| twice"),
        (add(b"C", b"not\nfolded: x\n\n\r\n \nend"), b"A: 1|B: 2|A: 3|C: not|\tfolded: x|\tend"),
    ],
)
def test_header_fields_change(changes: bytes, header: bytes, scripted_milter: StartMilter, connect: Connect) -> None:
    milter = scripted_milter(end=changes + CONTINUE)
    delivered = Delivered()
    with running(build(milter, delivered=delivered)) as server:
        assert deliver(server, connect, TEXT).startswith(b"250")
    lines = header.replace(b"|", b"\r\n") + b"\r\n" if header else b""
    assert delivered.texts == [lines + b"\r\nbody\r\n"]


@pytest.mark.parametrize(
    ("text", "changed_text"),
    [
        (b"", b"X: y\r\n"),
        (b"A: b\r\n", b"A: b\r\nX: y\r\n"),
        (b"\r\n", b"X: y\r\n\r\n"),
        (b"\r\nbody\r\n", b"X: y\r\n\r\nbody\r\n"),
        (b"no header\r\n", b"X: y\r\n\r\nno header\r\n"),
        (b"A: b\r\nno header\r\n", b"A: b\r\nX: y\r\n\r\nno header\r\n"),
        (b"A: b\r\n folded\r\n\r\n\r\n", b"A: b\r\n folded\r\nX: y\r\n\r\n\r\n"),
    ],
)
def test_a_new_field_is_never_part_of_the_body(
    text: bytes, changed_text: bytes, scripted_milter: StartMilter, connect: Connect
) -> None:
    milter = scripted_milter(end=add(b"X", b"y") + CONTINUE)
    delivered = Delivered()
    with running(build(milter, delivered=delivered)) as server:
        assert deliver(server, connect, text).startswith(b"250")
    assert delivered.texts == [changed_text]


@pytest.mark.parametrize("name", [b"", b"X Y", b"X:", b"X\r\nY", b"\xc3\xa9"])
def test_a_field_with_an_invalid_name_is_a_failure(name: bytes, scripted_milter: StartMilter, connect: Connect) -> None:
    milter = scripted_milter(end=add(name, b"y") + CONTINUE)
    with running(build(milter)) as server:
        assert deliver(server, connect, TEXT) == UNAVAILABLE


@pytest.mark.parametrize(
    ("pieces", "body"),
    [
        ([b"new\r\n"], b"new\r\n"),
        ([b""], b""),
        ([b"ne", b"w\r", b"\nlines\r\n"], b"new\r\nlines\r\n"),
        ([b"lines\nof\nUnix\n"], b"lines\r\nof\r\nUnix\r\n"),
        ([b"no end"], b"no end"),
        ([b".\r\n..\r\n"], b".\r\n..\r\n"),
        ([b"x" * 998 + b"\r\n"] * 2000, (b"x" * 998 + b"\r\n") * 2000),
    ],
)
def test_a_new_body(pieces: list[bytes], body: bytes, scripted_milter: StartMilter, connect: Connect) -> None:
    milter = scripted_milter(end=b"".join(packet(b"b", each) + PROGRESS for each in pieces) + ACCEPT)
    delivered = Delivered()
    with running(build(milter, delivered=delivered)) as server:
        assert deliver(server, connect, TEXT).startswith(b"250")
    assert delivered.texts == [b"A: 1\r\nB: 2\r\nA: 3\r\n\r\n" + body]


def test_a_new_body_beside_a_new_field_for_a_message_of_a_megabyte(scripted_milter: StartMilter, connect: Connect) -> None:
    milter = scripted_milter(end=add(b"X", b"y") + CONTINUE)
    delivered = Delivered()
    body = b"".join(b"%d line\r\n" % number for number in range(100_000))
    with running(build(milter, milter, delivered=delivered)) as server:
        assert deliver(server, connect, b"A: 1\r\n\r\n" + body).startswith(b"250")
    assert delivered.texts == [b"A: 1\r\nX: y\r\nX: y\r\n\r\n" + body]


@pytest.mark.parametrize("verdict", [REJECT, packet(b"z"), None])
def test_changes_of_a_message_that_is_not_accepted_are_forgotten(
    verdict: bytes | None, scripted_milter: StartMilter, connect: Connect
) -> None:
    """With failure="accept" a filter that fails has changed nothing."""
    milter = scripted_milter()
    changes = add(b"X", b"y") + packet(b"b", b"new\r\n") + packet(b"+", b"<x@y.example>\0")
    milter.answers["end"] = changes + verdict if verdict else changes + packet(b"z")
    delivered = Delivered()
    with running(build(milter, delivered=delivered, failure="accept")) as server:
        reply = deliver(server, connect, TEXT)
    assert reply == (REJECTED if verdict == REJECT else b"250 2.0.0 Ok\r\n")
    assert delivered.texts == ([] if verdict == REJECT else [TEXT])
    assert delivered.recipients == ([] if verdict == REJECT else [["c@d.example"]])


# Sender and recipients


def recipient(letter: bytes, *texts: bytes) -> bytes:
    return packet(letter, strings(*texts))


@pytest.mark.parametrize(
    ("changes", "sender", "recipients"),
    [
        (recipient(b"+", b"<x@y.example>"), "a@b.example", ["c@d.example", "e@f.example", "x@y.example"]),
        (recipient(b"+", b"x@y.example"), "a@b.example", ["c@d.example", "e@f.example", "x@y.example"]),
        (recipient(b"2", b"<x@y.example>", b"NOTIFY=NEVER"), "a@b.example", ["c@d.example", "e@f.example", "x@y.example"]),
        (recipient(b"+", b"<C@D.example>"), "a@b.example", ["c@d.example", "e@f.example"]),
        (recipient(b"-", b"<C@D.EXAMPLE>"), "a@b.example", ["e@f.example"]),
        (recipient(b"-", b"<nobody@d.example>"), "a@b.example", ["c@d.example", "e@f.example"]),
        (recipient(b"e", b"<x@y.example>"), "x@y.example", ["c@d.example", "e@f.example"]),
        (recipient(b"e", b"<>", b"SIZE=1"), "", ["c@d.example", "e@f.example"]),
    ],
)
def test_the_envelope_changes(
    changes: bytes, sender: str, recipients: list[str], scripted_milter: StartMilter, connect: Connect
) -> None:
    milter = scripted_milter(end=changes + CONTINUE)
    delivered = Delivered()
    with running(build(milter, delivered=delivered)) as server:
        assert deliver(server, connect, TEXT, "c@d.example", "e@f.example").startswith(b"250")
    assert (delivered.senders, delivered.recipients) == ([sender], [recipients])


def test_a_message_without_recipients_left_is_discarded(scripted_milter: StartMilter, connect: Connect) -> None:
    milter = scripted_milter(end=recipient(b"-", b"<c@d.example>") + CONTINUE)
    delivered = Delivered()
    with running(build(milter, delivered=delivered)) as server:
        assert deliver(server, connect, TEXT) == b"250 2.0.0 Ok\r\n"
    assert not delivered.texts


@pytest.mark.parametrize("address", [b"", b"<>", b"no domain", b"<a@b.example> <c@d.example>", b"<a@b\r\n>", b"\xff@b.example"])
def test_an_address_that_no_client_could_send_is_a_failure(
    address: bytes, scripted_milter: StartMilter, connect: Connect
) -> None:
    milter = scripted_milter(end=recipient(b"+", address) + CONTINUE)
    with running(build(milter)) as server:
        assert deliver(server, connect, TEXT) == UNAVAILABLE


def test_a_target_that_has_the_envelope_already_gets_no_other(scripted_milter: StartMilter, connect: Connect) -> None:
    milter = scripted_milter(end=recipient(b"+", b"<x@y.example>") + CONTINUE)
    delivered = Delivered()
    with running(build(milter, delivered=delivered, changes_envelope=False)) as server:
        assert deliver(server, connect, TEXT) == UNAVAILABLE
    assert not delivered.texts


@pytest.mark.parametrize("options", [{}, {"lmtp": True}])
def test_lmtp_answers_each_recipient_that_the_client_named(
    options: dict[str, Any], scripted_milter: StartMilter, connect: Connect
) -> None:
    milter = scripted_milter(end=recipient(b"-", b"<c@d.example>") + CONTINUE)
    delivered = Delivered()
    with running(build(milter, delivered=delivered, options=options)) as server:
        client = connect(server.port)
        client.say(("LHLO" if options else "EHLO") + " client.example")
        client.say("MAIL FROM:<a@b.example>")
        client.say("RCPT TO:<c@d.example>")
        client.say("RCPT TO:<e@f.example>")
        assert message(client, TEXT).startswith(b"250")
        if options:
            assert client.reply().startswith(b"250")
        assert client.say("NOOP").startswith(b"250")
    assert delivered.recipients == [["e@f.example"]]


def test_a_quarantined_message_is_rejected(
    scripted_milter: StartMilter, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "fumi.core")
    milter = scripted_milter(end=packet(b"q", b"a virus\0") + CONTINUE)
    delivered = Delivered()
    with running(build(milter, delivered=delivered)) as server:
        assert deliver(server, connect, TEXT) == b"550 5.7.1 Message rejected: quarantined\r\n"
    assert not delivered.texts
    assert 'reason="a virus"' in caplog.text


# Limits


@pytest.mark.parametrize(
    "changes",
    [
        [add(b"X", b"y")] * 2_001,
        [add(b"X", b"y" * 60_000)] * 20,
        [recipient(b"-", b"<x@y.example>")] * 5_000,
        [packet(b"b", b"x" * 60_000)] * 300,
    ],
)
def test_too_many_changes_are_a_failure(changes: list[bytes], scripted_milter: StartMilter, connect: Connect) -> None:
    milter = scripted_milter(end=b"".join(changes) + CONTINUE)
    with running(build(milter)) as server:
        assert deliver(server, connect, TEXT) == UNAVAILABLE


def test_a_large_new_body_waits_on_disk_and_leaves_nothing_there(
    scripted_milter: StartMilter, connect: Connect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    milter = scripted_milter(end=packet(b"b", b"x" * 998 + b"\r\n") * 10_000 + CONTINUE)
    delivered = Delivered()
    descriptors = len(os.listdir("/proc/self/fd"))
    with running(build(milter, delivered=delivered)) as server:
        for _ in range(3):
            assert deliver(server, connect, TEXT).startswith(b"250")
    assert {len(text) for text in delivered.texts} == {10_000_020}
    assert not list(tmp_path.iterdir())
    assert len(os.listdir("/proc/self/fd")) < descriptors + 20


# The header section, without a connection


def test_a_header_is_read_alike_however_it_arrives() -> None:
    text = b"A: 1\r\n folded\r\nB:\r\n\r\nbody\r\n\r\nmore"
    for size in range(1, len(text) + 1):
        reader, body = HeaderReader(), b""
        for at in range(0, len(text), size):
            body += reader.feed(text[at : at + size])
        body += reader.end()
        assert [(field.name, field.text) for field in reader.fields] == [(b"A", b"A: 1\r\n folded"), (b"B", b"B:")]
        assert (reader.size, body) == (21, b"body\r\n\r\nmore")


def test_the_fields_of_a_header_that_ends_without_a_line_end() -> None:
    reader = HeaderReader()
    assert reader.feed(b"A: 1\r\nB: 2") + reader.end() == b""
    assert ([field.text for field in reader.fields], reader.size) == ([b"A: 1", b"B: 2"], 10)


def test_a_line_that_arrives_in_small_pieces_is_searched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    searched = 0

    class Line(bytearray):
        def find(self, what: Any, start: Any = 0, end: Any = None) -> int:
            nonlocal searched
            searched += len(self) - start
            return super().find(what, start)

    monkeypatch.setattr(header, "bytearray", Line, raising=False)
    reader = HeaderReader()
    for _ in range(1000):
        assert reader.feed(b"a:") == b""
    assert 2000 <= searched <= 4000
    assert reader.feed(b"\r") + reader.feed(b"\nB: 2\r\n\r\nbody") == b"body"
    assert [len(field.text) for field in reader.fields] == [2000, 4]


def test_many_changes_of_the_envelope_look_at_each_recipient_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = 0

    def key(address: str) -> str:
        nonlocal asked
        asked += 1
        return address_key(address)

    monkeypatch.setattr(changes, "address_key", key)
    session = Session("1", "mx.example")
    session.envelope.rcpt_to = [Address("C@d.example", {}), Address("c@D.example", {}), Address("e@f.example", {})]
    collected = Changes(10)

    async def collect() -> None:
        for number in range(1000):
            await collected.add(AddRecipient(f"{number // 2}@d.example"))
        await collected.add(DeleteRecipient("c@d.example"))
        await collected.add(DeleteRecipient("7@D.example"))
        await collected.add(AddRecipient("c@d.example"))

    asyncio.run(collect())
    _, recipients = collected.envelope(session)
    left = [f"{number}@d.example" for number in range(500) if number != 7]
    assert [each.address for each in recipients] == ["e@f.example", *left, "c@d.example"]
    assert asked == 1006


def test_changes_are_made_one_after_the_other() -> None:
    inserted: list[AddHeader | InsertHeader | ChangeHeader] = [AddHeader(b"A", b"1"), InsertHeader(0, b"A", b"2")]
    changes = [*inserted, ChangeHeader(1, b"A", b"3"), ChangeHeader(2, b"A", b"")]
    assert [field.text for field in changed([new_field(b"B", b"0", False)], changes, False)] == [b"A: 3", b"B: 0"]


def test_a_change_that_was_not_negotiated_is_a_failure(scripted_milter: StartMilter, connect: Connect) -> None:
    for actions, made in [
        (0x1FE, add(b"X", b"y")),
        (0x1FE, insert(0, b"X", b"y")),
        (0x1EF, change(1, b"A", b"y")),
        (0x1FD, packet(b"b", b"x")),
        (0x17B, recipient(b"+", b"<x@y.example>")),
        (0x1F7, recipient(b"-", b"<c@d.example>")),
        (0x1BF, recipient(b"e", b"<>")),
        (0x1DF, recipient(b"q", b"x")),
    ]:
        milter = scripted_milter(negotiate=negotiated(actions=actions), end=made + CONTINUE)
        with running(build(milter)) as server:
            assert deliver(server, connect, TEXT) == UNAVAILABLE
