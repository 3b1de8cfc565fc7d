"""SMTP smuggling: what some server somewhere takes for the end of a message, over a real socket, in every packaging.

The sequences are those of SEC Consult's advisory and its scanner, of aiosmtpd's (CVE-2024-27305) and of Postfix's
(CVE-2023-51764, smtpd_forbid_bare_newline), and every other pair of line ends around a dot. Behind each stands a whole second
transaction; that one must never be begun.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from itertools import product

import pytest

from fumi_core import Fumi
from fumi_core.testing import RunningServer, running

NEWLINES = (
    b"\r\n",
    b"\n",
    b"\r",
    b"\n\r",
    b"\r\r\n",
    b"\n\n",
    b"\r\r",
    b"\r\n\n",
    b"\r\n\r",
    b"\r\n\x00",
    b"\x00\r\n",
    b"\n\x00",
    b"\r\x00\n",
)
DOTS = (b".", b".\x00", b"\x00.", b". ", b"..")
END = b"\r\n.\r\n"
SEQUENCES = {
    before: [before + dot + after for dot, after in product(DOTS, NEWLINES) if END not in before + dot + after]
    for before in NEWLINES
}
SECOND = b"MAIL FROM:<evil@b.example>\r\nRCPT TO:<c@d.example>\r\nDATA\r\nSubject: smuggled\r\n\r\nevil"
BARE = re.compile(rb"(?<!\r)\n|\r(?!\n)")
REFUSED = b"550 5.6.11 Error: bare <LF> or <CR> received\r\n"


@pytest.fixture(scope="module", params=["reject", "normalize"])
def server(request: pytest.FixtureRequest) -> Iterator[RunningServer]:
    app = Fumi(auth_optional=True, name="mx.example", bare_newlines=request.param, close_timeout=0.2)
    with running(app) as server:
        yield server


def packets(data: bytes, cut: str, at: int) -> list[bytes]:
    """``data`` in one piece, split in two at every place around ``at``, or byte by byte."""
    if cut == "whole":
        return [data]
    if cut == "bytes":
        return [data[i : i + 1] for i in range(len(data))]
    return [data[:at], data[at : at + 1], data[at + 1 : at + 2], data[at + 2 :]]


def talk(server: RunningServer, *packets: bytes) -> tuple[list[bytes], list[bytes]]:
    """Send each in a packet of its own; the replies until the server closes, and the messages that it took meanwhile."""
    before = len(server.messages)
    with socket.create_connection((server.host, server.port), timeout=30) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for packet in packets:
            sock.sendall(packet)
        sock.shutdown(socket.SHUT_WR)
        replies = b"".join(iter(lambda: sock.recv(65536), b"")).splitlines(keepends=True)
    return [reply for reply in replies if reply[3:4] == b" "], [message.body for message in server.messages[before:]]


def expected(text: bytes, normalizes: bool) -> list[bytes]:
    """The texts that may come out of one message of this text."""
    if BARE.search(text) is None:
        return [text]
    return [re.sub(rb"\r\n|\r|\n", b"\r\n", text)] if normalizes else []


def unstuffed(text: bytes) -> bytes:
    return b"\r\n".join(line.removeprefix(b".") for line in text.split(b"\r\n"))


ENVELOPE = b"EHLO x\r\nMAIL FROM:<a@b.example>\r\nRCPT TO:<c@d.example>\r\n"
SENT_OK = [b"220", b"250", b"250", b"250"]


@pytest.mark.parametrize("cut", ["whole", "around the dot", "bytes"])
@pytest.mark.parametrize("before", NEWLINES, ids=repr)
def test_no_sequence_but_one_ends_a_message_after_data(server: RunningServer, before: bytes, cut: str) -> None:
    normalizes = server.app.options.bare_newlines == "normalize"
    for sequence in SEQUENCES[before]:
        text = b"Subject: one\r\n\r\none" + sequence + SECOND + b"\r\n"
        at = text.index(sequence)
        replies, bodies = talk(server, ENVELOPE + b"DATA\r\n", *packets(text + b".\r\nNOOP\r\n", cut, at))
        assert bodies == expected(unstuffed(text), normalizes), sequence
        assert [reply[:3] for reply in replies[:5]] == [*SENT_OK, b"354"]
        assert replies[5:] == ([b"250 2.0.0 Ok\r\n"] * 2 if bodies else [REFUSED]), sequence


@pytest.mark.parametrize("cut", ["whole", "around the dot", "bytes"])
@pytest.mark.parametrize("before", NEWLINES, ids=repr)
def test_nothing_splits_a_message_in_a_chunk(server: RunningServer, before: bytes, cut: str) -> None:
    normalizes = server.app.options.bare_newlines == "normalize"
    for sequence in [*SEQUENCES[before], END]:
        text = b"Subject: one\r\n\r\none" + sequence + SECOND + b"\r\n"
        command = b"BDAT %d LAST\r\n" % len(text)
        sent = packets(command + text + b"NOOP\r\n", cut, len(command) + text.index(sequence))
        replies, bodies = talk(server, ENVELOPE, *sent)
        assert bodies == expected(text, normalizes), sequence
        assert [reply[:3] for reply in replies[:4]] == SENT_OK
        assert replies[4:] == ([b"250 2.0.0 Ok\r\n"] * 2 if bodies else [REFUSED]), sequence


@pytest.mark.parametrize("before", NEWLINES, ids=repr)
def test_nothing_splits_a_message_in_chunks_of_an_octet(server: RunningServer, before: bytes) -> None:
    normalizes = server.app.options.bare_newlines == "normalize"
    for sequence in [*SEQUENCES[before], END]:
        text = b"Subject: one\r\n\r\none" + sequence + SECOND + b"\r\n"
        chunks = b"".join(b"BDAT 1\r\n%b" % text[i : i + 1] for i in range(len(text))) + b"BDAT 0 LAST\r\n"
        replies, bodies = talk(server, ENVELOPE, chunks + b"NOOP\r\n")
        assert bodies == expected(text, normalizes), sequence
        assert replies[-1] == (b"250 2.0.0 Ok\r\n" if bodies else REFUSED), sequence
        assert not bodies or len(replies) == 4 + len(text) + 2, sequence


def test_the_one_sequence_that_ends_a_message_does(server: RunningServer) -> None:
    _, bodies = talk(server, ENVELOPE + b"DATA\r\none" + END + SECOND + END)
    assert bodies == [b"one\r\n", b"Subject: smuggled\r\n\r\nevil\r\n"]


@pytest.mark.parametrize(
    "sequence",
    [
        *(b"\n.\n", b"\n.\r\n", b"\r\n.\n"),  # Postfix, aiosmtpd
        *(b"\r.\r", b"\n.\r", b"\r.\n", b"\r.\r\n", b"\r\n.\r", b"\r\n\x00.\r\n", b"\r\n.\r\r\n"),  # SEC Consult's scanner
    ],
    ids=repr,
)
def test_the_sequences_that_made_the_news_are_among_them(sequence: bytes) -> None:
    assert any(sequence in sequences for sequences in SEQUENCES.values())
