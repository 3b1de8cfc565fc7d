"""``smtp:ADDR`` and ``lmtp:ADDR``: passes each transaction through to another server, and its replies back.

MAIL and RCPT are said to the next hop when the client says them, so that each refusal is given where it belongs, in the next
hop's words; the message is passed on as it arrives and kept nowhere, so the 250 that the client hears is the next hop's own. A
next hop that fails is 451: the client keeps the mail. Nothing is said again once the message is under way, for nobody could tell
whether that would be twice.

LMTP answers for each recipient. A client that speaks LMTP too hears these answers one by one; one that speaks SMTP would hear a
single one for all, so it gets one recipient a transaction (452 4.5.3 for the next, as for too many).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING

from fumi_core.client.answers import Answer
from fumi_core.client.commands import mail_command, rcpt_command
from fumi_core.client.connection import MAIL, RCPT, RSET, Connection, Failure, Protocol, connect, late
from fumi_core.client.pool import Pool
from fumi_core.client.probe import probe
from fumi_core.contexts import CloseContext, DataContext, MailContext, RcptContext
from fumi_core.delivery.transfer import Verdict, transfer
from fumi_core.errors import SMTPError
from fumi_core.middleware import Next
from fumi_core.observer import Observer
from fumi_core.runtime.addresses import SocketAddress
from fumi_core.runtime.logs import event
from fumi_core.session import Address, Session

if TYPE_CHECKING:
    from fumi_core.app import Fumi

_log = logging.getLogger("fumi.core")


class _Transaction:
    """The next hop's side of a transaction: its connection, the recipients it took, in that order, and what ended it early."""

    __slots__ = ("connection", "ended", "recipients")

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.recipients: list[str] = []
        self.ended: SMTPError | None = None


class NextHop:
    """The server at ``address``, spoken to by ``protocol``."""

    def __init__(self, protocol: Protocol, address: SocketAddress) -> None:
        """Raises ValueError for an address that nobody can connect to."""
        if address.kind == "fd" or (address.kind == "tcp" and not (address.host and address.port)):
            raise ValueError(f"{address} is no next hop: write HOST:PORT, [V6]:PORT or unix:/path")
        self.name: str = protocol
        self.protocol = protocol
        self.address = address
        self._pool = Pool()
        self._transactions: dict[Session, _Transaction] = {}
        self._observer = Observer()

    def __call__(self, app: Fumi) -> None:
        """The handlers behind are asked first: of what they refuse, the next hop never hears."""
        self._observer = app.observer
        if self.protocol == "lmtp" and not app.options.lmtp:
            app.configure(max_recipients=1)  # so that EHLO says so (RFC 9422); ``_recipient`` sees to it in any case

        async def mail(ctx: MailContext, next: Next) -> None:
            await next()
            self._transactions[ctx.session] = await self._begin(ctx.session, ctx.address)
            ctx.session.envelope.at_end += (lambda: self._release(ctx.session),)

        async def rcpt(ctx: RcptContext, next: Next) -> None:
            await next()
            await self._recipient(ctx.session, ctx.address, single=not app.options.lmtp)

        async def data(ctx: DataContext, next: Next) -> None:
            self._answer(ctx, *await self._pass_on(ctx))

        def close(ctx: CloseContext, next: Next) -> Next:
            self._release(ctx.session)
            return next()

        app.on_mail_from(mail)
        app.on_rcpt_to(rcpt)
        app.on_data(data)
        app.on_close(close)
        app.at_close(self._pool.close)

    def problem(self) -> str | None:
        trouble = probe(self.address)
        return trouble and f"{self.name}:{self.address}: {trouble}"

    def check(self) -> str | None:
        """Raises OSError when the next hop does not greet."""
        trouble = probe(self.address)
        if trouble is not None:
            raise OSError(trouble)
        return None

    # MAIL

    async def _begin(self, session: Session, sender: Address) -> _Transaction:
        try:
            async with asyncio.timeout(MAIL):
                connection, answer = await self._mail(session, sender)
        except TimeoutError:
            raise self._failed(session, late("no answer to MAIL in time")) from None
        except Failure as failure:
            raise self._failed(session, failure) from None
        error = _error(answer)
        if error is None:
            return _Transaction(connection)
        self._pool.put(connection)
        raise error

    async def _mail(self, session: Session, sender: Address) -> tuple[Connection, Answer]:
        """Say MAIL on a connection that waits, as long as there is one and it is still good for it, else on a new one."""
        while (connection := self._pool.take()) is not None:
            with contextlib.suppress(Failure):
                if not connection.resetting or (await connection.hear(RSET)).positive:
                    answer = await self._say_mail(connection, session, sender)
                    if answer.code != 421:
                        return connection, answer
            connection.cut()
        connection = await connect(self.address, self.protocol, session.name)
        return connection, await self._say_mail(connection, session, sender)

    async def _say_mail(self, connection: Connection, session: Session, sender: Address) -> Answer:
        try:
            line = mail_command(sender, session.envelope, connection, self.protocol)
        except SMTPError:
            self._pool.put(connection)
            raise
        return await connection.say(line, MAIL)

    # RCPT

    async def _recipient(self, session: Session, recipient: Address, single: bool) -> None:
        """``single`` tells that the client speaks SMTP."""
        transaction = self._transactions.get(session)
        if transaction is None:
            raise self._bypassed(session)
        if transaction.ended is not None:
            raise transaction.ended
        if recipient.address in transaction.recipients:
            return  # a client that says it twice wants it once, and LMTP would answer twice
        if transaction.recipients and single and self.protocol == "lmtp":
            raise SMTPError("4.5.3 Error: too many recipients", 452)
        try:
            answer = await transaction.connection.say(rcpt_command(recipient, transaction.connection), RCPT)
        except Failure as failure:
            transaction.ended = self._failed(session, failure)
            raise transaction.ended from None
        error = _error(answer)
        if error is None:
            transaction.recipients.append(recipient.address)
            return
        if answer.code == 421:
            transaction.ended = error
        raise error

    # The message

    async def _pass_on(self, ctx: DataContext) -> tuple[list[str], list[Verdict]]:
        """The recipients, and the next hop's verdicts: in LMTP one for each of them."""
        session = ctx.session
        transaction = self._transactions.pop(session, None)
        if transaction is None:
            raise self._bypassed(session)
        connection, recipients = transaction.connection, transaction.recipients
        count = len(recipients) if self.protocol == "lmtp" else 1
        try:
            if transaction.ended is not None:
                raise transaction.ended
            if {each.address for each in session.envelope.rcpt_to} != set(recipients):
                raise self._bypassed(session)
            verdicts = await transfer(connection, ctx, count)
        except Failure as failure:
            verdicts = [failure.answer or failure] * count
        except BaseException as error:
            connection.cut()
            if isinstance(error, SMTPError):
                self._count(error)
            raise
        self._give_back(connection, clean=all(isinstance(each, Answer) and each.positive for each in verdicts))
        return recipients, verdicts

    def _answer(self, ctx: DataContext, recipients: list[str], verdicts: list[Verdict]) -> None:
        if failure := next((each for each in verdicts if isinstance(each, Failure)), None):
            self._log(ctx.session, failure)
        errors = [_error(each) for each in verdicts]
        for error in errors:
            self._count(error)
        if len(errors) == 1 and errors[0] is not None:
            raise errors[0]
        for recipient, error in zip(recipients, errors, strict=False):
            if error is not None:
                ctx.reject_recipient(recipient, error.message, error.code)
        # All recipients hear the same 250, so words that the next hop had for one of them are not for the others.
        words = {each.text for each in verdicts if isinstance(each, Answer) and each.positive}
        if len(words) == 1:
            ctx.accept(words.pop())

    # What goes wrong

    def _failed(self, session: Session, failure: Failure) -> SMTPError:
        """A delivery ends by it, though no message has begun."""
        self._log(session, failure)
        error = SMTPError(failure.text, 451)
        self._count(error)
        return error

    def _log(self, session: Session, failure: Failure) -> None:
        next_hop = f"{self.name}:{self.address}"
        event(_log, logging.WARNING, "next hop failed", id=session.id, next_hop=next_hop, error=failure)

    def _bypassed(self, session: Session) -> SMTPError:
        """Some handler accepted, or refused, what the next hop was not asked about, or has accepted."""
        event(_log, logging.ERROR, "the next hop was left out: handlers must call next(), and refuse before it", id=session.id)
        return SMTPError("4.3.5 Error: recipients and next hop do not agree", 451)

    def _count(self, error: SMTPError | None) -> None:
        self._observer.delivery(self.name, "ok" if error is None else "failed" if error.code >= 500 else "deferred")

    # The end of a transaction

    def _release(self, session: Session) -> None:
        """The client has given it up, or is gone."""
        transaction = self._transactions.pop(session, None)
        if transaction is not None:
            self._give_back(transaction.connection, clean=False)

    def _give_back(self, connection: Connection, clean: bool) -> None:
        if not clean:
            connection.reset()
        self._pool.put(connection)


def _error(verdict: Verdict) -> SMTPError | None:
    """What the client is to hear: the next hop's own code and words. Its 421 ends its connection, not the client's."""
    if isinstance(verdict, Failure):
        return SMTPError(verdict.text, 451)
    if verdict.positive:
        return None
    return SMTPError(verdict.text, 451 if verdict.code == 421 else verdict.code)
