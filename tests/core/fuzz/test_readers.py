"""DotReader and ChunkReader alone, against the model's words for the same: dense in dots and newlines, cut everywhere."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from fumi_core.smtp.data import BareNewline, ChunkReader, DotReader

from . import campaign, speech
from .model import BARE, END, normalized, unstuffed

ALPHABET = (b"\r\n", b"\r\n", b"\r\n.", b"\r\n.\r\n", b"\r", b"\n", b".", b"..", b"a", b"\0", b"\xff", b"ab" * 20)
PLAIN = tuple(piece for piece in ALPHABET if piece not in (b"\r", b"\n"))
RULES = ("reject", "normalize", "keep")


def dense(chance: Random) -> bytes:
    return b"".join(chance.choices(ALPHABET if chance.random() < 0.5 else PLAIN, k=chance.randrange(16)))


@dataclass(frozen=True)
class Message(campaign.Case):
    """What follows DATA, under one of the two rules for bare newlines."""

    rule: str

    def check(self) -> None:
        for pieces in (speech.cut(Random(self.cut), self.data), speech.octets(self.data)):
            assert self._read(pieces) == self._expected(), f"in {len(pieces)} pieces"

    def _expected(self) -> tuple[bytes, bytes] | str:
        """The text, and what follows it; or that it is refused, or not whole."""
        found = END.search(self.data)
        raw = self.data[: found.start()] if found else self.data
        if self.rule == "reject" and BARE.search(raw):
            return "refused"
        if found is None:
            return "not whole"
        text = unstuffed(raw)
        return normalized(text) if self.rule == "normalize" else text, self.data[found.end() :]

    def _read(self, pieces: list[bytes]) -> tuple[bytes, bytes] | str:
        reader, text = DotReader(self.rule), b""
        for number, piece in enumerate(pieces):
            try:
                text += reader.feed(piece)
            except BareNewline:
                return "refused"
            if reader.rest is not None:
                return text, reader.rest + b"".join(pieces[number + 1 :])
        return "not whole"


@dataclass(frozen=True)
class Chunks(campaign.Case):
    """A message in chunks, every one of them but the last ending anywhere."""

    rule: str

    def check(self) -> None:
        chance = Random(self.cut)
        chunks = speech.cut(chance, self.data)
        expected: bytes | str = self.data
        if self.rule == "reject" and BARE.search(self.data + b"."):
            expected = "refused"
        elif self.rule == "normalize":
            expected = normalized(self.data)
        for split in (speech.cut, lambda chance, chunk: speech.octets(chunk)):
            assert self._read([split(chance, chunk) for chunk in chunks]) == expected

    def _read(self, chunks: list[list[bytes]]) -> bytes | str:
        reader, text = ChunkReader(self.rule), b""
        for number, pieces in enumerate(chunks):
            reader.begin(sum(map(len, pieces)), last=number == len(chunks) - 1)
            try:
                # Behind the last octet comes what is not the chunk's.
                for piece in [*pieces, b"rest"]:
                    text += reader.feed(piece)
            except BareNewline:
                return "refused"
            assert reader.rest == b"rest", "the chunk ends elsewhere"
        return text


def test_a_message_is_read_as_the_model_says_however_it_is_cut() -> None:
    campaign.run("dots", 12, lambda chance: Message(dense(chance), chance.randrange(1 << 30), chance.choice(RULES[:2])))


def test_chunks_are_read_as_the_model_says_however_they_are_cut() -> None:
    campaign.run("chunks", 13, lambda chance: Chunks(dense(chance), chance.randrange(1 << 30), chance.choice(RULES)))
