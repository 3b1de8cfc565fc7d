"""Sends the steps of one client's session to one filter, and applies the filter's answers.

After a failure the filter gets nothing more of the transaction, since it has missed a step of it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any, Literal

from fumi_core.client.pool import Pool
from fumi_core.errors import SMTPError
from fumi_core.handlers.contexts import DataContext
from fumi_core.plugins.milter.agreement import Stage
from fumi_core.plugins.milter.changes import Changes
from fumi_core.plugins.milter.connection import MilterConnection, MilterFailure, connect
from fumi_core.plugins.milter.header import HeaderReader, TooLarge
from fumi_core.plugins.milter.macros import client_name, macros_for
from fumi_core.plugins.milter.wire import MAX_DATA_BYTES, Change, Malformed, ReplyCode, Verdict, strings
from fumi_core.runtime.addresses import SocketAddress
from fumi_core.runtime.logs import event
from fumi_core.smtp.session import Address, Session, log_fields

REJECTED = ("5.7.1 Command rejected", 550)
QUARANTINED = ("5.7.1 Message rejected: quarantined", 550)
UNAVAILABLE = ("4.7.1 Service unavailable - try again later", 451)
CLOSING = ("4.7.0 Service unavailable, closing connection", 421)
HEADER_TOO_LARGE = ("5.3.4 Error: message header too big", 552)

MAX_STEP_SECONDS = 600.0
"""Seconds for one step in all, or for the whole message: clients wait no longer (RFC 5321 §4.5.3.2.6)."""

_log = logging.getLogger("fumi.core")
_CONTENT = (Stage.HEADER, Stage.END_OF_HEADER, Stage.BODY, Stage.END_OF_MESSAGE)
_OF_MESSAGE = (Stage.MAIL, Stage.RCPT, Stage.DATA, *_CONTENT)
_REJECTIONS = {
    Verdict.REJECT: REJECTED,
    Verdict.TEMPFAIL: UNAVAILABLE,
    Verdict.SHUTDOWN: CLOSING,
    Verdict.CONNECTION_FAILURE: CLOSING,
}


@dataclass(frozen=True)
class Filter:
    """One filter's settings, and its idle connections. Timeouts are in seconds."""

    address: SocketAddress
    on_failure: Literal["tempfail", "accept"]
    changes_envelope: bool
    connect_timeout: float
    command_timeout: float
    content_timeout: float
    login: Callable[[Any], str]
    reuse_connections: bool
    pool: Pool[MilterConnection]


class Conversation:
    """One filter's part of one session. ``discards``: the message is to be accepted, and not delivered."""

    def __init__(self, filter: Filter, session: Session) -> None:
        self.discards = False
        self._filter = filter
        self._session = session
        self._connection: MilterConnection | None = None
        self._failure: MilterFailure | None = None  # to connect; the next MAIL is answered by it
        self._helo: str | None = None  # the name that was sent to the filter
        self._refusal: SMTPError | None = None  # the rejection of the client, and so of all its mail
        self._client_accepted = False  # the filter accepts all mail of this client
        self._in_transaction = False  # MAIL was sent to the filter, which has not decided on the message yet
        self._message_accepted = False  # the filter has accepted the message early
        self._failed = False  # in this transaction
        self._skipped: set[Stage] = set()  # steps that the filter does not want again in this transaction
        self._changes: Changes | None = None

    # The steps of a session

    async def connected(self) -> None:
        """The client has connected. Raises SMTPError if the filter rejects it. A failure answers the next MAIL."""
        try:
            await _in_time(self._open())
        except MilterFailure as failure:
            self._failure = failure
            self._log_failure(failure)
        if self._refusal is not None:
            raise self._refusal

    async def mail(self, sender: Address) -> None:
        """A transaction begins. Raises SMTPError."""
        self._session.envelope.at_end += (self._end_of_transaction,)
        await self._guarded(self._mail(sender))

    async def recipient(self, recipient: Address) -> None:
        """Raises SMTPError."""
        if self._failed:
            self._answer_failure()
        elif self.undecided:
            await self._guarded(self._report(Stage.RCPT, _path(recipient), recipient))

    async def message(self, ctx: DataContext) -> None:
        """The message has arrived, and is spooled. Raises SMTPError; otherwise the filter's changes have been made."""
        if self._failed:
            self._answer_failure()
        elif self.undecided:
            await self._guarded(self._message(ctx))

    @property
    def undecided(self) -> bool:
        """Whether the filter still has to decide on the message."""
        return self._in_transaction and not self._message_accepted and not self.discards and not self._failed

    def release(self) -> None:
        """The message has been delivered, or not."""
        if self._changes is not None:
            self._changes.close()
            self._changes = None

    def close(self) -> None:
        """The client has disconnected."""
        self._end_of_transaction()
        connection, self._connection = self._connection, None
        if connection is None:
            return
        if self._filter.reuse_connections and connection.agreement.reusable:
            connection.end_session()
            self._filter.pool.put(connection)
        else:
            connection.quit()

    def _end_of_transaction(self) -> None:
        if self._in_transaction and self._connection is not None:
            self._connection.abort_message()
        self._in_transaction = self._message_accepted = self._failed = self.discards = False
        self._skipped.clear()

    # Connection, HELO, MAIL

    async def _open(self) -> None:
        """Take a connection that has served another client, or make one. Raises MilterFailure."""
        while (connection := self._filter.pool.take()) is not None:
            try:
                await self._greet(connection)
                return
            except MilterFailure:
                continue  # the filter has just closed it
        filter = self._filter
        await self._greet(await connect(filter.address, filter.connect_timeout, filter.command_timeout))

    async def _greet(self, connection: MilterConnection) -> None:
        self._connection = connection
        self._helo = None
        await self._report(Stage.CONNECT, _client(self._session))
        await self._hello()

    async def _hello(self) -> None:
        """Send the client's name if it is new. There is none before the first EHLO."""
        name = self._session.client_hostname
        if name is not None and name != self._helo and not self._client_accepted and self._refusal is None:
            self._helo = name
            await self._report(Stage.HELO, strings(name.encode(errors="replace")))

    async def _mail(self, sender: Address) -> None:
        failure, self._failure = self._failure, None
        if failure is not None:
            self._failed = True
            self._answer_failure()
            return
        if self._refusal is None and not self._client_accepted:
            if self._connection is None or not self._connection.usable:
                await self._open()
            else:
                await self._hello()
        if self._refusal is not None:
            raise self._refusal
        if not self._client_accepted:
            self._in_transaction = True
            await self._report(Stage.MAIL, _path(sender), sender)

    # The message

    async def _message(self, ctx: DataContext) -> None:
        header = HeaderReader()
        self._changes = changes = Changes(ctx.stream.size)
        try:
            await self._report(Stage.DATA)
            await self._send(ctx, header)
            if self.undecided:
                await self._report(Stage.END_OF_MESSAGE, change=changes.add)
                if not self.discards:
                    self._apply(ctx, header, changes)
        except TooLarge:
            raise SMTPError(*HEADER_TOO_LARGE) from None
        except Malformed as error:
            raise MilterFailure(str(error)) from None

    async def _send(self, ctx: DataContext, header: HeaderReader) -> None:
        """Send the message until the filter has decided."""
        body = bytearray()
        async for piece in ctx.stream:
            ended = header.ended
            body += header.feed(piece)
            if header.ended and not ended:
                await self._send_header(header)
            while len(body) >= MAX_DATA_BYTES:
                await self._report(Stage.BODY, bytes(body[:MAX_DATA_BYTES]))
                del body[:MAX_DATA_BYTES]
            if header.ended and not self.undecided:
                return
        if not header.ended:
            body += header.end()
            await self._send_header(header)
        if body:
            await self._report(Stage.BODY, bytes(body))

    async def _send_header(self, header: HeaderReader) -> None:
        assert self._connection is not None
        leading_space = self._connection.agreement.leading_space
        for field in header.fields:
            await self._report(Stage.HEADER, strings(field.name, field.value(leading_space)))
        await self._report(Stage.END_OF_HEADER)

    def _apply(self, ctx: DataContext, header: HeaderReader, changes: Changes) -> None:
        """Raises Malformed, before anything was changed, and SMTPError for a message that must not be delivered."""
        assert self._connection is not None
        if changes.quarantine is not None:
            self._log(logging.INFO, "message quarantined", reason=changes.quarantine)
            raise SMTPError(*QUARANTINED)
        if changes.of_envelope and not self._filter.changes_envelope:
            raise Malformed("a change of sender or recipients, which this delivery target cannot take")
        envelope = self._session.envelope
        sender, recipients = changes.envelope(self._session)
        pieces = changes.message(ctx, header, self._connection.agreement.leading_space)
        envelope.mail_from, envelope.rcpt_to = sender, recipients
        if pieces is not None:
            ctx.replace(pieces)
        self.discards = not recipients

    # Answers

    async def _report(
        self,
        stage: Stage,
        data: bytes = b"",
        address: Address | None = None,
        change: Callable[[Change], Awaitable[None]] | None = None,
    ) -> None:
        """Send a step to the filter, and apply its answer. Raises SMTPError, and MilterFailure."""
        if stage in _OF_MESSAGE and (not self.undecided or stage in self._skipped):
            return
        connection = self._connection
        assert connection is not None
        macros = macros_for(stage, connection.agreement, self._session, self._filter.login, address)
        seconds = self._filter.content_timeout if stage in _CONTENT else self._filter.command_timeout
        answer = await connection.send(stage, data, macros, seconds, change)
        if stage is Stage.END_OF_MESSAGE:
            self._in_transaction = False
        if answer is Verdict.ACCEPT and stage in _OF_MESSAGE:
            self._message_accepted = True
        elif answer is Verdict.ACCEPT:
            self._client_accepted = True
        elif answer is Verdict.DISCARD:
            self.discards = True
        elif answer is Verdict.SKIP:
            self._skipped.add(stage)
        elif answer is not Verdict.CONTINUE and stage in _OF_MESSAGE:
            raise _rejection(answer)
        elif answer is not Verdict.CONTINUE:
            self._refusal = _rejection(answer)

    async def _guarded(self, step: Awaitable[None]) -> None:
        try:
            await _in_time(step)
        except MilterFailure as failure:
            self._log_failure(failure)
            self._failed = True
            self._answer_failure()

    def _answer_failure(self) -> None:
        """Answer a transaction whose filter has failed. Raises SMTPError unless such mail is accepted."""
        if self._filter.on_failure == "tempfail":
            raise SMTPError(*UNAVAILABLE)

    def _log_failure(self, failure: MilterFailure) -> None:
        self._log(logging.WARNING, "milter failed", error=str(failure))

    def _log(self, level: int, message: str, **fields: object) -> None:
        event(_log, level, message, **log_fields(self._session), milter=self._filter.address, **fields)

    def log_discard(self) -> None:
        self._log(logging.INFO, "message discarded")


async def _in_time(step: Awaitable[None]) -> None:
    try:
        async with asyncio.timeout(MAX_STEP_SECONDS):
            await step
    except TimeoutError:
        raise MilterFailure("too slow: no decision in time") from None


def _rejection(answer: Verdict | ReplyCode) -> SMTPError:
    if isinstance(answer, ReplyCode):
        return SMTPError(answer.text, answer.code)
    return SMTPError(*_REJECTIONS[answer])


def _client(session: Session) -> bytes:
    """The data of CONNECT: the client's name, and its address with its family."""
    name, address = strings(client_name(session).encode(errors="replace")), session.remote_address
    try:
        family = b"6" if ip_address(address).version == 6 else b"4"
    except ValueError:
        if not address.startswith("unix"):
            return name + b"U"  # the proxy does not know it
        family = b"L"
    return name + family + session.remote_port.to_bytes(2, "big") + strings(address.encode())


def _path(address: Address) -> bytes:
    """The data of MAIL and RCPT: the path, and the ESMTP parameters."""
    parameters = [key if value is True else f"{key}={value}" for key, value in address.args.items()]
    return strings(f"<{address.address}>".encode(), *(each.encode() for each in parameters))
