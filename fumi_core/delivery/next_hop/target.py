"""``smtp:ADDR`` and ``lmtp:ADDR``: passes each transaction through to another server, and its replies back.

MAIL and RCPT are sent to the next hop when the client sends them, so that each rejection is the reply to the command that caused
it, with the next hop's text; the message is passed on as it arrives and is not stored, so the client's 250 is the next hop's own.
When the next hop fails, the reply is 451: the client keeps the mail. After the message is under way nothing is sent again, since
that could deliver it twice.

In LMTP the next hop replies for each recipient. A client that also speaks LMTP gets these replies one by one. A client that
speaks SMTP gets a single reply: the common one when they agree (``one_reply``), else a 451, after which it sends everything
again. So the replies are remembered (``reply_memory``), and a message that may have some already is kept (``spool``) until its
content is known. Then it is passed on to the recipients that still need it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from fumi_core.client.commands import rcpt_command
from fumi_core.client.connection import RCPT_TIMEOUT, Dialect, Failure, NextHopConnection
from fumi_core.client.dependency import dependency_problem
from fumi_core.client.hop import Hop
from fumi_core.client.replies import ReceivedReply
from fumi_core.delivery.next_hop.one_reply import agree, joint_error, mixed_error
from fumi_core.delivery.next_hop.relay import Relay, send
from fumi_core.delivery.next_hop.repeated import pass_on_again
from fumi_core.delivery.next_hop.reply_memory import ReplyMemory
from fumi_core.delivery.next_hop.transaction import Transaction, begin_new, recorder
from fumi_core.delivery.next_hop.verdicts import Verdict, error_for, final, log_verdicts
from fumi_core.errors import SMTPError
from fumi_core.handlers.contexts import CloseContext, DataContext, MailContext, RcptContext
from fumi_core.handlers.middleware import Next
from fumi_core.runtime.addresses import SocketAddress
from fumi_core.runtime.logs import event
from fumi_core.server.observer import DeliveryResult, Observer
from fumi_core.smtp.session import Address, Session

if TYPE_CHECKING:
    from fumi_core.app import Fumi

_log = logging.getLogger("fumi.core")


class NextHop:
    """The server at ``address``, which speaks ``protocol``."""

    def __init__(self, protocol: Dialect, address: SocketAddress, state: Path | None = None) -> None:
        """``state`` is the directory where differing replies are remembered; None disables that.

        Raises ValueError for an address that cannot be connected to.
        """
        if address.kind == "fd" or (address.kind == "tcp" and not (address.host and address.port)):
            raise ValueError(f"{address} is not a next hop: write HOST:PORT, [V6]:PORT or unix:/path")
        self.name: str = protocol
        self.protocol = protocol
        self.address = address
        self.state = state
        self._label = f"{protocol}:{address}"
        self._hop = Hop(protocol, address)
        self._transactions: dict[Session, Transaction] = {}
        self._observer = Observer()
        self._memory: ReplyMemory | None = None

    def __call__(self, app: Fumi) -> None:
        """Handlers added later run first: commands that they reject are never sent to the next hop."""
        self._observer = app.observer
        joint = self.protocol == "lmtp" and not app.options.lmtp
        memory = self._make_memory() if joint else None

        async def mail(ctx: MailContext, next: Next) -> None:
            await next()
            self._transactions[ctx.session] = await self._begin(ctx.session, ctx.address, memory)
            ctx.session.envelope.at_end += (lambda: self._end(ctx.session, answered=True),)

        async def rcpt(ctx: RcptContext, next: Next) -> None:
            await next()
            await self._recipient(ctx.session, ctx.address)

        async def data(ctx: DataContext, next: Next) -> None:
            try:
                verdicts = await self._pass_on(ctx)
            except SMTPError as error:
                self._count(error)
                raise
            await self._reply(ctx, verdicts, joint)

        def close(ctx: CloseContext, next: Next) -> Next:
            self._end(ctx.session, answered=False)
            return next()

        app.on_mail_from(mail)
        app.on_rcpt_to(rcpt)
        app.on_data(data)
        app.on_close(close)
        if memory is not None:
            app.on_data(self._hash_text, first=True)
            app.at_close(memory.close)
        app.at_close(self._hop.close)
        app.at_listen(lambda: self._hop.learn_extensions(app.options.name))
        app.withhold(lambda: self._hop.not_offered, take=True)

    def _hash_text(self, ctx: DataContext, next: Next) -> Next:
        """Hash the client's own content: the output of other handlers may differ each time."""
        transaction = self._transactions.get(ctx.session)
        if transaction is not None and transaction.replies is not None:
            ctx.stream.tap(transaction.replies.hash.update)
        return next()

    def dependency_problem(self) -> str | None:
        problem = dependency_problem(self.address)
        return problem and f"{self._label}: {problem}"

    def check(self) -> str | None:
        """Raises OSError when the next hop does not greet. Returns a remark when replies cannot be remembered."""
        problem = dependency_problem(self.address)
        if problem is not None:
            raise OSError(problem)
        problem = ReplyMemory(self.state).startup_problem() if self.protocol == "lmtp" and self.state is not None else None
        return problem and f"--state {self.state}: {problem}: replies that differ will not be remembered"

    def _make_memory(self) -> ReplyMemory | None:
        if self.state is None:
            return None
        if self._memory is not None:
            # Prepared before this reload: to prepare it again would drop the locks of the messages that are being delivered.
            return self._memory
        memory = ReplyMemory(self.state)
        try:
            memory.prepare()
        except OSError as error:
            words = "cannot store replies that differ: all recipients get 451, and some may get a message twice"
            event(_log, logging.WARNING, words, state=self.state, error=error.strerror or error)
            return None
        self._memory = memory
        return memory

    # MAIL

    async def _begin(self, session: Session, sender: Address, memory: ReplyMemory | None) -> Transaction:
        replies = memory.replies(session, sender) if memory is not None else None
        try:
            connection, reply = await self._hop.mail(session, sender)
        except Failure as failure:
            raise self._failed(session, failure) from None
        error = self._error_of(session, reply)
        if error is None:
            return Transaction(connection, sender, replies)
        self._hop.give_back(connection, clean=True)
        raise error

    def _under_way(self, session: Session) -> tuple[Transaction, NextHopConnection]:
        """The transaction, and its connection. Raises SMTPError when there is none: a handler did not call ``next()`` at MAIL."""
        transaction = self._transactions.get(session)
        if transaction is None or transaction.connection is None:
            raise self._bypassed(session)
        return transaction, transaction.connection

    # RCPT

    async def _recipient(self, session: Session, recipient: Address) -> None:
        transaction, connection = self._under_way(session)
        if transaction.ended is not None:
            raise transaction.ended
        if recipient.address in transaction.recipients:
            return  # a repeated recipient is sent once: in LMTP the next hop would reply twice
        if not await self._recall(session, transaction, recipient.address):
            await self._send_recipient(session, transaction, connection, recipient)
        transaction.recipients[recipient.address] = recipient

    async def _recall(self, session: Session, transaction: Transaction, recipient: str) -> bool:
        """Whether the recipient probably has the message. Raises SMTPError when it was probably rejected."""
        if recipient in transaction.rejected:
            raise transaction.rejected[recipient]
        reply = await transaction.replies.recall(recipient) if transaction.replies is not None else None
        error = None if reply is None else self._error_of(session, reply)
        if error is not None:
            transaction.rejected[recipient] = error
            raise error
        return reply is not None

    async def _send_recipient(
        self, session: Session, transaction: Transaction, to: NextHopConnection, recipient: Address
    ) -> None:
        """Raises SMTPError for a rejection. A 421 from the next hop, or its failure, ends the transaction."""
        try:
            reply = await to.send_command(rcpt_command(recipient, to), RCPT_TIMEOUT)
        except Failure as failure:
            transaction.ended = self._failed(session, failure)
            raise transaction.ended from None
        error = self._error_of(session, reply)
        if error is not None and reply.code == 421:
            transaction.ended = error
        if error is not None:
            raise error

    # The message

    async def _pass_on(self, ctx: DataContext) -> dict[str, Verdict]:
        """The next hop's verdict for each recipient; in SMTP the same for all."""
        transaction, connection = self._under_way(ctx.session)
        transaction.connection = None
        replies, recipients = transaction.replies, transaction.recipients
        try:
            self._check(ctx.session, transaction)
        except SMTPError:
            connection.abort()
            raise
        if replies is not None and replies.may_know(recipients):
            self._hop.give_back(connection, clean=False)
            return await pass_on_again(self._hop, ctx, transaction, replies, self.state)
        relay = Relay(ctx, ctx.stream, len(recipients) if self.protocol == "lmtp" else 1)
        if replies is not None:
            relay.before_end = lambda: begin_new(replies, list(recipients))
            relay.on_wait = recorder(replies, recipients)
        verdicts = await send(self._hop, relay, connection)
        if self.protocol == "smtp":
            return dict.fromkeys(recipients, verdicts[0])
        return dict(zip(recipients, verdicts, strict=True))

    def _check(self, session: Session, transaction: Transaction) -> None:
        if transaction.ended is not None:
            raise transaction.ended
        if {each.address for each in session.envelope.rcpt_to} != transaction.recipients.keys():
            raise self._bypassed(session)

    # The reply

    async def _reply(self, ctx: DataContext, verdicts: Mapping[str, Verdict], joint: bool) -> None:
        """``joint`` tells that the client gets one reply for verdicts that may differ."""
        log_verdicts(ctx.session, self._label, verdicts.values())
        errors = {name: error_for(verdict) for name, verdict in verdicts.items()}
        first = next(iter(errors.values()))
        for error in errors.values() if self.protocol == "lmtp" else [first]:
            self._count(error)
        if joint:
            await self._reply_jointly(ctx, verdicts, errors)
        elif self.protocol == "smtp" and first is not None:
            raise first
        for name, error in errors.items():
            if error is not None:
                ctx.reject_recipient(name, error.message, error.code)
        # All recipients get the same 250, so the next hop's text for one of them is left out.
        words = {each.text for each in verdicts.values() if isinstance(each, ReceivedReply) and each.positive}
        if len(words) == 1:
            ctx.accept(words.pop())

    async def _reply_jointly(
        self, ctx: DataContext, verdicts: Mapping[str, Verdict], errors: Mapping[str, SMTPError | None]
    ) -> None:
        """Raises the SMTPError to reply with, unless the message was accepted for all."""
        transaction = self._transactions.get(ctx.session)
        replies = transaction.replies if transaction is not None else None
        failed = {name: error for name, error in errors.items() if error is not None}
        decided = final(verdicts)
        if agree(errors.values()):
            if replies is not None:
                replies.agree({name: reply for name, reply in decided.items() if name not in failed})
            if failed:
                raise joint_error(failed)
            return
        if replies is not None:
            await replies.keep(decided)
        rejected = sum(error.code >= 500 for error in failed.values())
        counts = {"delivered": len(errors) - len(failed), "rejected": rejected, "deferred": len(failed) - rejected}
        event(_log, logging.INFO, "replies to recipients differ", id=ctx.session.id, **counts)
        raise mixed_error(errors)

    # Errors

    def _error_of(self, session: Session, reply: ReceivedReply) -> SMTPError | None:
        """The error to reply with; None for a positive reply."""
        log_verdicts(session, self._label, [reply])
        return error_for(reply)

    def _failed(self, session: Session, failure: Failure) -> SMTPError:
        """Count and log a failed delivery, even if no message has begun."""
        log_verdicts(session, self._label, [failure])
        error = SMTPError(failure.text, 451)
        self._count(error)
        return error

    def _bypassed(self, session: Session) -> SMTPError:
        """A handler accepted what was never sent to the next hop, or rejected what the next hop has accepted."""
        event(_log, logging.ERROR, "next hop bypassed: handlers must call next(), and reject before that", id=session.id)
        return SMTPError("4.3.5 Error: recipients differ from those that the next hop accepted", 451)

    def _count(self, error: SMTPError | None) -> None:
        self._observer.delivery(self.name, DeliveryResult.of(error))

    # The end of a transaction

    def _end(self, session: Session, answered: bool) -> None:
        """The client gets its reply, or ends the transaction; or it has disconnected (``answered`` is False)."""
        transaction = self._transactions.pop(session, None)
        if transaction is None:
            return
        if transaction.connection is not None:
            self._hop.give_back(transaction.connection, clean=False)
        if transaction.replies is not None and answered:
            # Send the reply before anything is deleted.
            asyncio.get_running_loop().call_soon(transaction.replies.end, True)
        elif transaction.replies is not None:
            transaction.replies.end(False)
