"""A mail filter that misbehaves: whatever it answers at one step, nothing is accepted that it has not clearly accepted."""

from __future__ import annotations

import asyncio
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any, Literal, cast
from unittest import mock

from fumi_core.client.pool import Pool
from fumi_core.errors import SMTPError
from fumi_core.handlers.contexts import DataContext
from fumi_core.handlers.stream import MessageStream
from fumi_core.plugins.milter import conversation
from fumi_core.plugins.milter.connection import MilterConnection
from fumi_core.plugins.milter.header import HeaderReader
from fumi_core.runtime.addresses import SocketAddress
from fumi_core.smtp.session import Address, Session

from . import campaign, speech
from .filters import OFFERED, FilterTransport, frames, packet
from .passing import PassingLoop

STEPS = {"C": "connect", "H": "helo", "M": "mail", "R": "rcpt", "T": "data", "L": "header", "N": "eoh", "B": "body", "E": "end"}
TEXT = b"Subject: hi\r\nX-Two: lines\r\n of it\r\n\r\nbody\r\n.\r\n"
HEADER, BODY = TEXT.partition(b"\r\n\r\n")[0], b"body\r\n.\r\n"
FAILED = "failed"

# The model: what an answer means, by somebody who knows the protocol's description and nothing of the code.

REPLY_LINE = re.compile(rb"[45]\d\d(?:[ -][^\r\n]*)?")
NAME = re.compile(rb"[!-9;-~]+")
PATH = re.compile(rb"[a-z]+@[a-z]+(\.[a-z]+)*")
DECISIONS = {b"c": "accepted", b"a": "accepted", b"d": "discarded", b"r": "550", b"t": "451", b"4": "421", b"f": "421"}


def is_change(letter: bytes, data: bytes) -> bool:
    """Whether this is a change as the protocol has it; addresses apart."""
    texts = data[4:].split(b"\0") if letter in b"im" else data.split(b"\0")
    if letter == b"b":
        return True
    if texts.pop():
        return False
    if letter in b"him":
        index = struct.unpack("!I", data[:4])[0] if letter in b"im" and len(data) >= 4 else 0
        return len(texts) == 2 and bool(NAME.fullmatch(texts[0])) and index < 1 << 31 and (letter == b"h" or len(data) >= 4)
    if letter in b"+-2e":
        return len(texts) in (1, 2) and texts[0].isascii()
    return letter == b"q" and len(texts) == 1


def recipients_after(changes: list[tuple[bytes, bytes]]) -> set[bytes] | None:
    """The recipients, in lower case; None if there is an address of which the model does not know whether it is one."""
    found = {b"c@d.example"}
    for letter, data in changes:
        name = data.split(b"\0")[0].strip()
        bare = name.removeprefix(b"<").removesuffix(b">").lower()
        if (letter in b"+2-" and not PATH.fullmatch(bare)) or (letter == b"e" and bare and not PATH.fullmatch(bare)):
            return None
        if letter in b"+2":
            found.add(bare)
        elif letter == b"-":
            found.discard(bare)
    return found


def meanings(step: str, data: bytes) -> set[str]:
    """What may become of the message: accepted, discarded, a reply code, failed; several if the model is not sure."""
    packets, rest = frames(data)
    changes: list[tuple[bytes, bytes]] = []
    for number, (letter, text) in enumerate(packets):
        if letter == b"p" and not text.strip(b"\0"):
            continue
        if letter in b"him+-2ebq":
            if step != "end" or not is_change(letter, text):
                return {FAILED}
            changes.append((letter, text))
            continue
        if number < len(packets) - 1 or rest:
            return {FAILED}
        found = decision(step, letter, text)
        if found != "accepted" or not changes:
            return {found}
        if any(letter == b"q" for letter, _ in changes):
            return {"550"}
        left = recipients_after(changes)
        return {"accepted", "discarded", FAILED} if left is None else {"accepted" if left else "discarded"}
    return {FAILED}


def decision(step: str, letter: bytes, text: bytes) -> str:
    if letter == b"y":
        lines = re.split(rb"\r\n|\r|\n", text[:-1].rstrip(b"\r\n"))
        codes = {line[:3] for line in lines}
        good = text.endswith(b"\0") and len(codes) == 1 and all(REPLY_LINE.fullmatch(line) for line in lines)
        return lines[0][:3].decode() if good else FAILED
    if text.strip(b"\0"):
        return FAILED
    if letter == b"s":
        return "accepted" if step in ("rcpt", "header", "body") else FAILED
    found = DECISIONS.get(letter, FAILED)
    if found == "discarded" and step in ("connect", "helo"):
        return FAILED
    return found


class Transport(FilterTransport):
    """The connection to a filter that answers each step with continue, and one step with the bytes of the case."""

    def __init__(self, connection: MilterConnection, case: Misbehaviour) -> None:
        super().__init__()
        self._connection = connection
        self._case = case
        self._said = b""

    def write(self, data: bytes) -> None:
        packets, self._said = frames(self._said + data)
        for letter, _ in packets:
            if letter == b"O":
                self._answer([packet(b"O", OFFERED)])
            elif letter.decode() in STEPS and STEPS[letter.decode()] == self._case.step:
                self._answer(speech.cut(Random(self._case.cut), self._case.data))
            elif letter not in b"DAQK":
                self._answer([packet(b"c")])

    def _answer(self, pieces: list[bytes]) -> None:
        for piece in filter(None, pieces):
            asyncio.get_running_loop().call_soon(self._arrive, piece)

    def _arrive(self, piece: bytes) -> None:
        if not self.closed:
            self._connection.data_received(piece)


@dataclass(frozen=True)
class Misbehaviour(campaign.Case):
    """``data`` is what the filter answers at ``step``."""

    step: str
    on_failure: Literal["tempfail", "accept"]

    def check(self) -> None:
        loop = PassingLoop()
        try:
            outcome, text = loop.run_until_complete(self._deliver())
            loop.run_until_complete(asyncio.sleep(1))  # iterators that were left are closed by tasks
        finally:
            loop.close()
        expected = meanings(self.step, self.data)
        if expected == {FAILED} and self.on_failure == "accept":
            assert text == TEXT, "a filter that has failed has changed the message"
        if FAILED in expected:
            expected = (expected - {FAILED}) | {"accepted" if self.on_failure == "accept" else "451"}
        assert outcome in expected, f"{outcome} instead of {expected}"
        if outcome == "accepted":
            self._check_text(text)

    def _check_text(self, text: bytes) -> None:
        reader = HeaderReader()
        body = reader.feed(text) + reader.end()
        for field in reader.fields:
            assert re.fullmatch(rb"[^\r\n]*(?:\r\n[ \t][^\r\n]*)*", field.text), f"a field with a line of its own: {field.text!r}"
        assert reader.separator or not body, "the body begins in the header"
        made = [letter for letter, _ in frames(self.data)[0]] if self.step == "end" else []
        if b"b" not in made:
            assert body == BODY
        changes = sum(letter in b"him" for letter in made)
        assert abs(len(reader.fields) - 2) <= changes

    async def _deliver(self) -> tuple[str, bytes]:
        async def connect(*given: Any) -> MilterConnection:
            made = MilterConnection()
            made.connection_made(cast(asyncio.Transport, Transport(made, self)))
            await made.negotiate(30)
            return made

        pool: Pool[MilterConnection] = Pool()
        address = SocketAddress("tcp", host="127.0.0.1", port=1)
        settings = conversation.Filter(address, self.on_failure, True, 30, 30, 300, str, False, pool)
        with mock.patch.object(conversation, "connect", connect), mock.patch.object(conversation, "event"):
            return await self._converse(conversation.Conversation(settings, _session()))

    async def _converse(self, talk: conversation.Conversation) -> tuple[str, bytes]:
        session = talk._session
        try:
            await talk.connected()
            session.client_hostname = "client.example"
            await talk.mail(Address("a@b.example", {}))
            session.envelope.mail_from = Address("a@b.example", {})
            await talk.recipient(Address("c@d.example", {}))
            session.envelope.rcpt_to = [Address("c@d.example", {})]
            stream = MessageStream(None, lambda: None)
            stream.feed(TEXT)
            stream.end()
            ctx = DataContext(session, stream)
            await ctx.spool()
            await talk.message(ctx)
            return ("discarded", b"") if talk.discards else ("accepted", await ctx.stream.read())
        except SMTPError as error:
            return str(error.code), b""
        finally:
            talk.release()
            talk.close()


def _session() -> Session:
    session = Session("1234", "mx.example")
    session.remote_address, session.remote_port = "192.0.2.1", 1234
    return session


# What filters answer, more or less


WORDS = (
    *(b"", b"X", b"Subject", b"x-two", b"a b", b"X:", b"a\nb", b"a\r\n b", b"a\r\nX: y", b"\r\n\r\nz", b"\xff"),
    *(b" ", b"\n", b"y" * 300),
)  # fmt: skip
ADDRESSES = (
    *(b"<x@y.example>", b"c@d.example", b"<c@d.example>", b"<>", b"", b"x", b"<x@y.example", b"x@y@z", b"<a b@c.d>"),
    b"x@y\r\n",
)  # fmt: skip
REPLIES = (
    *(b"550 5.7.1 no", b"451 4.7.1 later", b"554 no", b"550-5.7.1 a\r\n550 5.7.1 b", b"550-a\r\n451 b", b"250 ok", b"550"),
    *(b"5500 x", b"", b"421 4.7.0 bye", b"550 %%", b"354 go on", b"550 \xff", b"599 x", b"400 x"),
)  # fmt: skip


def change(chance: Random) -> bytes:
    letter = chance.choice((b"h", b"i", b"m", b"b", b"+", b"-", b"2", b"e", b"q"))
    number = struct.pack("!I", chance.choice((0, 1, 1, 2, 3, 100, 1 << 31, (1 << 32) - 1)))
    if letter in b"him":
        fields = chance.choice((b"X", b"Subject", b"x-two", *WORDS)) + b"\0" + chance.choice(WORDS) + b"\0"
        return packet(letter, fields if letter == b"h" else number + fields)
    if letter == b"b":
        return packet(letter, chance.choice(WORDS) + b"\r\n")
    return packet(letter, chance.choice(ADDRESSES) + b"\0")


def answer(chance: Random) -> bytes:
    kind = chance.random()
    if kind < 0.5:
        return packet(chance.choice((b"c", b"a", b"d", b"r", b"t", b"s", b"4", b"f", b"p", b"c", b"a")))
    if kind < 0.65:
        return packet(b"y", chance.choice(REPLIES) + b"\0")
    if kind < 0.9:
        return change(chance)
    return packet(bytes([chance.randrange(256)]), chance.randbytes(chance.randrange(8)))


def bent(chance: Random, data: bytes) -> bytes:
    at = chance.randrange(len(data) + 1)
    kinds: tuple[Callable[[], bytes], ...] = (
        lambda: data[:at],
        lambda: data[:at] + chance.randbytes(1) + data[at + 1 :],
        lambda: data[:at] + chance.randbytes(1) + data[at:],
        lambda: data + data,
        lambda: data + chance.randbytes(chance.randrange(1, 6)),
    )
    return chance.choice(kinds)()


def misbehaviour(chance: Random) -> Misbehaviour:
    step = chance.choice(("end", "end", *STEPS.values()))
    data = b"".join(change(chance) if step == "end" else b"" for _ in range(chance.randrange(4)))
    data += b"".join(answer(chance) for _ in range(chance.choice((0, 1, 1, 1, 1, 2))))
    if chance.random() < 0.3:
        data = bent(chance, data)
    return Misbehaviour(data, chance.randrange(1 << 30), step, chance.choice(("tempfail", "tempfail", "accept")))


def test_nothing_is_accepted_by_mistake() -> None:
    campaign.run("milters", 4, misbehaviour)
