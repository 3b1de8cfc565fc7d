"""A message stays what it was behind the trace header fields that a server puts in front of it."""

from __future__ import annotations

import email
import email.policy
import re
from pathlib import Path

import pytest

from fumi_core.delivery.trace import MAX_LINE_BYTES, Traced
from fumi_core.program import builtin
from fumi_core.testing import running
from tests.core.client import Connect
from tests.core.scripted_hop import StartHop

FIELDS = b"Received: from a\r\n\tby b\r\n"
APART = [
    b" text",
    b"\ttext: x",
    b"text",
    b"text without a colon",
    b"no field: x",
    b"::x",
    b"x" * MAX_LINE_BYTES + b": y",
    b"\xc3\xa9: x",
]
JOINED = [b"Subject: x", b"x:", b"x \t: y", b"", b"\r\ntext", b"\r\n\r\n text", b"X" * 990 + b": y"]


@pytest.mark.parametrize("octets", [1, 2, 3, 7, 5000])
@pytest.mark.parametrize(
    ("text", "between"), [(text, b"\r\n") for text in APART] + [(text, b"") for text in JOINED], ids=lambda value: value[:20]
)
def test_an_empty_line_keeps_text_that_is_no_header_apart(text: bytes, between: bytes, octets: int) -> None:
    traced = Traced(FIELDS)
    whole = text + b"\r\n" * bool(text) + b"more\r\n" * 3
    if not text:
        whole = b""
    pieces = [traced.feed(whole[at : at + octets]) for at in range(0, len(whole), octets)]
    assert b"".join(pieces) + traced.end() == FIELDS + between + whole


def test_no_more_is_held_back_than_a_line_can_have() -> None:
    traced = Traced(FIELDS)
    fed = [traced.feed(b"x") for _ in range(2000)]
    assert len(b"".join(fed)) == len(FIELDS) + 2 + 2000


@pytest.mark.parametrize("target", ["maildir", "smtp", "lmtp"])
@pytest.mark.parametrize("by", ["DATA", "BDAT"])
@pytest.mark.parametrize(
    ("text", "subject", "body"),
    [
        (b" leading\r\ntext\r\n", None, " leading\r\ntext\r\n"),
        (b"no header\r\n", None, "no header\r\n"),
        (b"Subject: s\r\n\r\nbody\r\n", "s", "body\r\n"),
        (b"\r\n Subject: s\r\n", None, " Subject: s\r\n"),
    ],
)
def test_every_target_keeps_header_and_body_apart(
    tmp_path: Path, connect: Connect, scripted_hop: StartHop, target: str, by: str, text: bytes, subject: str | None, body: str
) -> None:
    hop = scripted_hop() if target != "maildir" else None
    deliver = f"{target}:{hop.address}" if hop else f"maildir:{tmp_path}/box"
    with running(builtin.build(deliver, name="mx.example", close_timeout=0.2)) as server:
        client = connect(server.port)
        client.envelope()
        if by == "BDAT":
            assert client.say(b"BDAT %d LAST\r\n%b" % (len(text), text[:-2])).startswith(b"250")
        else:
            assert client.say("DATA").startswith(b"354")
            assert client.say(text + b".").startswith(b"250")
    if hop:
        (raw,) = hop.messages
    else:
        (path,) = (tmp_path / "box" / "new").iterdir()
        raw = path.read_bytes().replace(b"\n", b"\r\n")
    message = email.message_from_bytes(raw, policy=email.policy.SMTP)
    assert re.search(r";\s\S+, .* [+-]\d{4}\Z", message["Received"])  # the date ends it
    assert (message["Subject"], message.get_payload()) == (subject, body)
