"""A message that has been through more than 50 servers is refused, whatever would become of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fumi_core.delivery.loop_limit import MAX_HEADER_BYTES, HopCounter
from fumi_core.program import builtin
from fumi_core.testing import running
from tests.core.client import Connect
from tests.core.scripted_hop import StartHop

FIELD = b"Received: from a.example\r\n\tby b.example; now\r\n"
TOO_MANY = b"554 5.4.6 Error: too many hops\r\n"


def deliver(target: str, text: bytes, connect: Connect, **options: Any) -> bytes:
    with running(builtin.build(target, close_timeout=0.2, **options)) as server:
        client = connect(server.port)
        hello = "LHLO" if options.get("lmtp") else "EHLO"
        for line in (f"{hello} x", "MAIL FROM:<>", "RCPT TO:<c@d.example>", "DATA"):
            client.say(line)
        reply: bytes = client.say(text + b".")
        if reply == TOO_MANY:
            assert server.messages == []
        assert client.say("NOOP").startswith(b"250")
        return reply


@pytest.mark.parametrize("target", ["maildir", "discard", "smtp", "lmtp"])
@pytest.mark.parametrize("lmtp", [False, True])
def test_fifty_hops_pass_and_one_more_does_not(
    target: str, lmtp: bool, connect: Connect, scripted_hop: StartHop, tmp_path: Path
) -> None:
    hop = scripted_hop()
    address = {"maildir": str(tmp_path / "box"), "discard": ""}.get(target, hop.address)
    text = b"Subject: hi\r\n\r\nbody\r\n"
    assert deliver(f"{target}:{address}", FIELD * 50 + text, connect, lmtp=lmtp).startswith(b"250 ")
    assert deliver(f"{target}:{address}", FIELD * 51 + text, connect, lmtp=lmtp) == TOO_MANY
    if target == "maildir":
        assert len(list((tmp_path / "box/new").iterdir())) == 1
    elif target != "discard":
        assert len(hop.messages) == 1


def test_a_loop_in_a_large_message_is_noticed_before_its_end(connect: Connect, tmp_path: Path) -> None:
    text = (
        FIELD.upper() * 30
        + b"X-Filler: "
        + b"x" * 200_000
        + b"\r\n"
        + FIELD.lower() * 30
        + b"\r\n"
        + b"y" * 70 * 10_000
        + b"\r\n"
    )
    assert deliver(f"maildir:{tmp_path / 'box'}", text, connect) == TOO_MANY
    assert [path for name in ("new", "tmp") for path in (tmp_path / "box" / name).iterdir()] == []


@pytest.mark.parametrize("step", [1, 2, 3, 7, 11, 1000])
@pytest.mark.parametrize(
    ("text", "count"),
    [
        (b"", 0),
        (b"\r\nReceived: in the body\r\n", 0),
        (b"Received: a\r\nRECEIVED: b\r\nreceived:c\r\n\r\nReceived: in the body\r\n", 3),
        (b"Subject: a\r\n Received: folded\r\n\tReceived: folded\r\nX-Received: x\r\nReceived-SPF: pass\r\n\r\n", 0),
        (b"Received: a", 1),
    ],
)
def test_only_fields_of_the_header_section_count_however_they_are_cut(text: bytes, count: int, step: int) -> None:
    hops = HopCounter()
    for at in range(0, len(text), step):
        hops.feed(text[at : at + step])
    assert hops.count == count


def test_a_message_without_a_body_is_examined_no_further_than_the_limit() -> None:
    hops = HopCounter()
    for _ in range(MAX_HEADER_BYTES // 1000 + 1):
        hops.feed(b"x" * 998 + b"\r\n")
    hops.feed(b"Received: a\r\n")
    assert hops.count == 0
