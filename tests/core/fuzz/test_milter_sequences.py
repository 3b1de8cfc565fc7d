"""One filter and many messages: what it answers to one question, or too late, never decides about another message.

The filter is slow, dies, answers twice or not at all. Clients come one after the other and several at once, and some disconnect
while it thinks. Each question has a number, which a rejection names.
"""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass
from random import Random
from typing import Any, Literal, cast
from unittest import mock

from fumi_core.client.pool import Pool
from fumi_core.errors import SMTPError
from fumi_core.handlers.contexts import DataContext
from fumi_core.handlers.stream import MessageStream
from fumi_core.plugins.milter import conversation
from fumi_core.plugins.milter.connection import MilterConnection, MilterFailure
from fumi_core.runtime.addresses import SocketAddress
from fumi_core.smtp.session import Address, Envelope, Session

from . import campaign
from .filters import OFFERED, FilterTransport, frames, packet
from .passing import run_passing

DELAYS = (0.0, 0.0, 0.0, 1.0, 25.0, 35.0, 280.0, 400.0)
"""Seconds until an answer; the time limits are 30 for a command and 300 for content."""
PROGRESS, CONTINUE, ACCEPT = packet(b"p"), packet(b"c"), packet(b"a")
LABEL = re.compile(rb"[cm]\d+(?=[@.])")


class Filter:
    """Answers by chance. ``questions`` has the numbers of the questions about each client and message, by its label."""

    def __init__(self, chance: Random) -> None:
        self.chance = chance
        self.asked = 0
        self.questions: dict[str, list[int]] = {}
        self.unanswered: set[int] = set()
        self.rejected: set[int] = set()
        self.passed: set[str] = set()
        """Labels of steps that the filter does not want again."""
        self.transports: list[Transport] = []

    async def connect(self, *given: Any) -> MilterConnection:
        await asyncio.sleep(self.chance.choice((0, 0, 5)))
        if self.chance.random() < 0.1:
            raise MilterFailure("refused")
        connection = MilterConnection()
        self.transports.append(Transport(connection, self))
        connection.connection_made(cast(asyncio.Transport, self.transports[-1]))
        try:
            await connection.negotiate(30)
        except BaseException:
            connection.abort()
            raise
        return connection


class Transport(FilterTransport):
    """One connection to the filter. ``label`` is the client or message that it is about."""

    def __init__(self, connection: MilterConnection, filter: Filter) -> None:
        super().__init__()
        self._connection = connection
        self._filter = filter
        self._sent = b""
        self._label = ""
        self._open: int | None = None

    def write(self, data: bytes) -> None:
        assert not self.closed
        packets, self._sent = frames(self._sent + data)
        for letter, text in packets:
            assert letter == b"D" or self._open is None, "a step before the last one was answered"
            found = LABEL.search(text) if letter != b"D" else None
            if letter in b"CHM":
                assert found is not None
                self._label = found[0].decode()
            elif found is not None:
                assert found[0].decode() == self._label, "a step of another message"
            if letter == b"O":
                self._later(0, packet(b"O", OFFERED))
            elif letter in b"CHMRTLNBE":
                self._ask()

    def _ask(self) -> None:
        """Answer a question, perhaps."""
        self._filter.asked += 1
        self._open = number = self._filter.asked
        self._filter.unanswered.add(number)
        self._filter.questions.setdefault(self._label, []).append(number)
        chance, rejection = self._filter.chance, packet(b"y", b"550 5.7.1 q%d\0" % number)
        delay, kind = chance.choice(DELAYS), chance.random()
        for _ in range(chance.choice((0, 0, 0, 1, 3))):
            self._later(delay, PROGRESS)
            delay += chance.choice(DELAYS) + 0.001  # timers of the same moment have no order
        if kind < 0.75:
            self._later(delay, CONTINUE, number)
        elif kind < 0.8:
            self._later(delay, ACCEPT, number)
        elif kind < 0.9:
            self._later(delay, rejection, number, rejects=True)
        elif kind < 0.94:
            self._later(delay, chance.choice((CONTINUE + rejection, rejection + CONTINUE, CONTINUE + CONTINUE[:3])))
        elif kind < 0.97:
            asyncio.get_running_loop().call_later(delay, self._end)

    def _later(self, delay: float, data: bytes, number: int | None = None, rejects: bool = False) -> None:
        asyncio.get_running_loop().call_later(delay, self._arrive, data, number, rejects)

    def _arrive(self, data: bytes, number: int | None, rejects: bool) -> None:
        if self.closed:
            return
        if number is not None:
            self._filter.unanswered.discard(number)
            self._open = None
            if rejects:
                self._filter.rejected.add(number)
            if data == ACCEPT:
                self._filter.passed.add(self._label)
        at = self._filter.chance.randrange(len(data) + 1)
        for piece in (data[:at], data[at:]):
            if piece and not self.closed:
                self._connection.data_received(piece)

    def _end(self) -> None:
        if not self.closed:
            self.closed = True
            self._connection.connection_lost(None)


class Client:
    """Sends two messages. ``number`` is in the labels of the client and its messages."""

    def __init__(self, settings: conversation.Filter, filter: Filter, number: int) -> None:
        self._session = Session(str(number), "mx.example")
        self._session.xclient["NAME"] = f"c{number}.example"
        self._session.remote_address, self._session.remote_port = "192.0.2.1", 1234
        self._talk = conversation.Conversation(settings, self._session)
        self._filter = filter
        self._must_answer = settings.on_failure == "tempfail"
        self._number = number

    async def run(self) -> None:
        try:
            try:
                await self._talk.connected()
            except SMTPError as error:
                self._check(error)
                return
            self._session.client_hostname = f"c{self._number}.example"
            for number in range(2):
                await self._send(f"m{self._number * 10 + number}")
        finally:
            self._talk.close()

    async def _send(self, label: str) -> None:
        envelope = self._session.envelope = Envelope()
        try:
            await self._talk.mail(sender := Address(f"{label}@b.example", {}))
            envelope.mail_from = sender
            await self._talk.recipient(recipient := Address(f"{label}@d.example", {}))
            envelope.rcpt_to = [recipient]
            await self._message(f"X: {label}@\r\n\r\n{label}@\r\n".encode())
        except SMTPError as error:
            self._check(error, label)
        else:
            asked = set(self._filter.questions.get(label, ()))
            assert not asked & self._filter.rejected, "accepted although the filter rejected it"
            if self._must_answer:
                assert asked or f"c{self._number}" in self._filter.passed, "accepted without a question"
                assert not asked & self._filter.unanswered, "accepted without an answer"
        finally:
            self._talk.release()
            for ended in envelope.at_end:
                ended()

    async def _message(self, text: bytes) -> None:
        stream = MessageStream(None, lambda: None)
        stream.feed(text)
        stream.end()
        ctx = DataContext(self._session, stream)
        await ctx.spool()
        await self._talk.message(ctx)

    def _check(self, error: SMTPError, label: str = "") -> None:
        """A rejection in the filter's words is one that it gave to a question about this client or this message."""
        found = re.search(r"q(\d+)", error.message)
        assert found is not None or error.code == 451, error.message
        if found is not None:
            own = [*self._filter.questions.get(f"c{self._number}", ()), *self._filter.questions.get(label, ())]
            assert int(found[1]) in own, "a rejection of something else"
            assert int(found[1]) in self._filter.rejected, "a rejection that was not clear"


@dataclass(frozen=True)
class Clients(campaign.Case):
    """``data`` and ``cut`` are seeds, of the filter and of the clients."""

    on_failure: Literal["tempfail", "accept"]
    reuse: bool

    def check(self) -> None:
        run_passing(self._run())

    async def _run(self) -> None:
        filter, pool = Filter(Random(self.data)), cast("Pool[MilterConnection]", Pool())
        address = SocketAddress("tcp", host="127.0.0.1", port=1)
        settings = conversation.Filter(address, self.on_failure, True, 30, 30, 300, str, self.reuse, pool)
        with mock.patch.object(conversation, "connect", filter.connect), mock.patch.object(conversation, "event"):
            await asyncio.gather(*(self._one_after_the_other(settings, filter, lane) for lane in range(2)))
        pool.close()
        await asyncio.sleep(1000)
        assert all(each.closed for each in filter.transports), "a connection that nobody closed"

    async def _one_after_the_other(self, settings: conversation.Filter, filter: Filter, lane: int) -> None:
        chance = Random(f"{self.cut}:{lane}")
        for number in range(3):
            client = asyncio.create_task(Client(settings, filter, lane * 10 + number).run())
            if chance.random() < 0.3:
                await asyncio.wait([client], timeout=chance.choice((0, 0.5, 30, 100)))
                client.cancel()
            await asyncio.wait([client])
            if not client.cancelled():
                client.result()


def clients(chance: Random) -> Clients:
    return Clients(chance.randbytes(8), chance.randrange(1 << 30), chance.choice(("tempfail", "accept")), chance.random() < 0.7)


def test_no_answer_decides_about_another_message() -> None:
    campaign.run("milter-sequences", 1, clients)
