"""Where a message ends, however its bytes are cut."""

from __future__ import annotations

import random
import re

import pytest

from fumi_core.smtp.data import BareNewline, DotReader

END = b"\r\n.\r\n"


def read(pieces: list[bytes], bare_newlines: str = "reject") -> tuple[bytes, bytes | None]:
    reader = DotReader(bare_newlines)
    text = b""
    for number, piece in enumerate(pieces):
        text += reader.feed(piece)
        if reader.rest is not None:
            return text, reader.rest + b"".join(pieces[number + 1 :])
    return text, None


def cuts(data: bytes) -> list[list[bytes]]:
    whole, single = [data], [data[i : i + 1] for i in range(len(data))]
    return [whole, single, *([data[:i], data[i:]] for i in range(1, len(data)))]


@pytest.mark.parametrize(
    ("sent", "text"),
    [
        (b".\r\n", b""),
        (b"\r\n.\r\n", b"\r\n"),
        (b"a\r\n.\r\n", b"a\r\n"),
        (b"..\r\n.\r\n", b".\r\n"),
        (b"a\r\n..b\r\n.c\r\n...\r\n.\r\n", b"a\r\n.b\r\nc\r\n..\r\n"),
        (b"a.b\r\n. \r\n.\r\n", b"a.b\r\n \r\n"),
    ],
)
def test_the_text_is_the_same_however_it_is_cut(sent: bytes, text: bytes) -> None:
    for pieces in cuts(sent + b"NOOP\r\n"):
        assert read(pieces) == (text, b"NOOP\r\n")


@pytest.mark.parametrize(
    "ending",
    [
        b"\n.\n",
        b"\r.\r",
        b"\n.\r\n",
        b"\r\n.\n",
        b"\r\n.\r",
        b"\r\n\x00.\r\n",
        b"\r\n.\x00\r\n",
        b"\r.\r\n",
        b"\n\n.\r\n",
        b"\r\r\n.\r\r\n",
    ],
)
def test_no_other_ending_ends_a_message(ending: bytes) -> None:
    for pieces in cuts(b"a" + ending + b"b"):
        for bare_newlines in ("reject", "normalize"):
            reader = DotReader(bare_newlines)
            try:
                for piece in pieces:
                    reader.feed(piece)
            except BareNewline:
                assert bare_newlines == "reject"
            assert reader.rest is None


def test_normalized_newlines_become_crlf_wherever_they_are_cut() -> None:
    for pieces in cuts(b"a\nb\rc\r\n\rd\n\n.\ne\r\n.\r\n"):
        assert read(pieces, "normalize") == (b"a\r\nb\r\nc\r\n\r\nd\r\n\r\n.\r\ne\r\n", b"")


def model(data: bytes) -> tuple[bytes, bytes] | None:
    """RFC 5321 §4.5.2, said another way: split into lines, stop at the lone dot, take one dot from what begins with one."""
    found = re.search(rb"(?:^|\r\n)\.\r\n", data)
    if not found:
        return None
    head = data[: found.end() - 3]
    lines = head.split(b"\r\n")
    return b"\r\n".join(line[1:] if line.startswith(b".") else line for line in lines), data[found.end() :]


def test_random_texts_read_as_the_model_says() -> None:
    chance = random.Random(5321)
    for _ in range(4000):
        data = b"".join(chance.choice([b"\r\n", b".", b"a", b"\r\n.", b"..", b"\x00"]) for _ in range(chance.randrange(14)))
        marks = sorted(chance.randrange(len(data) + 1) for _ in range(3)) if data else []
        pieces = [data[a:b] for a, b in zip([0, *marks], [*marks, len(data)], strict=True)]
        expected = model(data)
        got = read([piece for piece in pieces if piece])
        if expected is None:
            assert got[1] is None
        else:
            assert got == expected


def test_random_texts_have_bare_newlines_exactly_when_a_cr_or_lf_is_left_without_its_other_half() -> None:
    chance = random.Random(56)
    for _ in range(4000):
        data = b"".join(
            chance.choice([b"\r\n", b"\r\n", b"\r", b"\n", b"a", b"\x85", b"\xe2\x80\xa8"]) for _ in range(chance.randrange(9))
        )
        bare = re.search(rb"(?<!\r)\n|\r(?!\n)", data) is not None
        try:
            read([data, END])
        except BareNewline:
            assert bare
        else:
            assert not bare


def test_what_is_held_back_never_exceeds_the_end_of_a_message() -> None:
    reader = DotReader("reject")
    fed = given = 0
    for _ in range(1000):
        fed += 7
        given += len(reader.feed(b"abc\r\n.x"))
        assert fed - given <= 1000 + 4 + fed  # every stuffed dot is dropped
        assert len(reader._held) <= 4
