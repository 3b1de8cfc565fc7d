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
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fumi_core.client.commands import rcpt_command
from fumi_core.client.connection import RCPT_TIMEOUT, Dialect, Failure, NextHopConnection
from fumi_core.client.dependency import dependency_problem
from fumi_core.client.hop import Hop
from fumi_core.client.replies import ReceivedReply
from fumi_core.delivery.next_hop.one_reply import agree, joint_error, mixed_error
from fumi_core.delivery.next_hop.relay import Relay, Verdict, reject_oversize
from fumi_core.delivery.next_hop.reply_memory import MessageReplies, ReplyMemory
from fumi_core.errors import SMTPError
from fumi_core.handlers.contexts import CloseContext, DataContext, MailContext, RcptContext
from fumi_core.handlers.middleware import Next
from fumi_core.handlers.spool import Spool
from fumi_core.runtime.addresses import SocketAddress
from fumi_core.runtime.logs import event
from fumi_core.server.observer import DeliveryResult, Observer
from fumi_core.smtp.session import Address, Session

if TYPE_CHECKING:
    from fumi_core.app import Fumi

_log = logging.getLogger("fumi.core")

_MISCONFIGURED = (530, 534, 535, 538)
"""Replies of a server that requires STARTTLS or AUTH (RFC 3207 §4, RFC 4954 §6): the client cannot correct that."""


class _Transaction:
    """The next hop's side of a transaction: its connection, the recipients it accepted, in order, and what ended it early.

    ``replies`` is set if the replies have to be remembered; ``rejected`` are recipients with a remembered rejection.
    """

    __slots__ = ("connection", "ended", "recipients", "rejected", "replies", "sender")

    def __init__(self, connection: NextHopConnection, sender: Address, replies: MessageReplies | None) -> None:
        self.connection: NextHopConnection | None = connection
        self.sender = sender
        self.replies = replies
        self.recipients: dict[str, Address] = {}
        self.rejected: dict[str, SMTPError] = {}
        self.ended: SMTPError | None = None


class NextHop:
    """The server at ``address``, which speaks ``protocol``."""

    def __init__(self, protocol: Dialect, address: SocketAddress, state: Path | None = None) -> None:
        """``state`` is the directory where differing replies are remembered; None disables that.

        Raises ValueError for an address that cannot be connected to.
        """
        if address.kind == "fd" or (address.kind == "tcp" and not (address.host and address.port)):
            raise ValueError(f"{address} is no next hop: write HOST:PORT, [V6]:PORT or unix:/path")
        self.name: str = protocol
        self.protocol = protocol
        self.address = address
        self.state = state
        self._hop = Hop(protocol, address)
        self._transactions: dict[Session, _Transaction] = {}
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

        def hash_text(ctx: DataContext, next: Next) -> Next:
            """Hash the client's own content: the output of other handlers may differ each time."""
            transaction = self._transactions.get(ctx.session)
            if transaction is not None and transaction.replies is not None:
                ctx.stream.tap(transaction.replies.hash.update)
            return next()

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
            app.on_data(hash_text, first=True)
            app.at_close(memory.close)
        app.at_close(self._hop.close)
        app.at_listen(lambda: self._hop.learn_extensions(app.options.name))
        app.withhold(lambda: self._hop.not_offered, take=True)

    def dependency_problem(self) -> str | None:
        problem = dependency_problem(self.address)
        return problem and f"{self.name}:{self.address}: {problem}"

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
        self._memory = self._memory or ReplyMemory(self.state)
        try:
            self._memory.prepare()
        except OSError as error:
            words = "cannot store replies that differ: all recipients get 451, and some may get a message twice"
            event(_log, logging.WARNING, words, state=self.state, error=error.strerror or error)
            return None
        return self._memory

    # MAIL

    async def _begin(self, session: Session, sender: Address, memory: ReplyMemory | None) -> _Transaction:
        replies = await memory.replies(session, sender) if memory is not None else None
        try:
            connection, reply = await self._hop.mail(session, sender)
        except Failure as failure:
            raise self._failed(session, failure) from None
        error = self._judge(session, reply)
        if error is None:
            return _Transaction(connection, sender, replies)
        self._hop.give_back(connection, clean=True)
        raise error

    # RCPT

    async def _recipient(self, session: Session, recipient: Address) -> None:
        transaction = self._transactions.get(session)
        if transaction is None or transaction.connection is None:
            raise self._bypassed(session)
        if transaction.ended is not None:
            raise transaction.ended
        if recipient.address in transaction.recipients:
            return  # a repeated recipient is sent once: in LMTP the next hop would reply twice
        if not self._recall(session, transaction, recipient.address):
            await self._send_recipient(session, transaction, transaction.connection, recipient)
        transaction.recipients[recipient.address] = recipient

    def _recall(self, session: Session, transaction: _Transaction, recipient: str) -> bool:
        """Whether the recipient probably has the message. Raises SMTPError when it was probably rejected."""
        if recipient in transaction.rejected:
            raise transaction.rejected[recipient]
        reply = transaction.replies.recall(recipient) if transaction.replies is not None else None
        error = None if reply is None else self._judge(session, reply)
        if error is not None:
            transaction.rejected[recipient] = error
            raise error
        return reply is not None

    async def _send_recipient(
        self, session: Session, transaction: _Transaction, to: NextHopConnection, recipient: Address
    ) -> None:
        """Raises SMTPError for a rejection. A 421 from the next hop, or its failure, ends the transaction."""
        try:
            reply = await to.send_command(rcpt_command(recipient, to), RCPT_TIMEOUT)
        except Failure as failure:
            transaction.ended = self._failed(session, failure)
            raise transaction.ended from None
        error = self._judge(session, reply)
        if error is not None and reply.code == 421:
            transaction.ended = error
        if error is not None:
            raise error

    # The message

    async def _pass_on(self, ctx: DataContext) -> dict[str, Verdict]:
        """The next hop's verdict for each recipient; in SMTP the same for all."""
        transaction = self._transactions.get(ctx.session)
        if transaction is None or transaction.connection is None:
            raise self._bypassed(ctx.session)
        connection, transaction.connection = transaction.connection, None
        replies, recipients = transaction.replies, transaction.recipients
        try:
            self._check(ctx.session, transaction)
        except SMTPError:
            connection.abort()
            raise
        if replies is not None and replies.may_know(recipients):
            self._hop.give_back(connection, clean=False)
            return await self._pass_on_kept(ctx, transaction, replies)
        relay = Relay(ctx, ctx.stream, len(recipients) if self.protocol == "lmtp" else 1)
        if replies is not None:
            relay.before_end = lambda: _begin_new(replies, recipients)
            relay.on_wait = _recorder(replies, recipients)
        verdicts = await self._send(relay, connection)
        if self.protocol == "smtp":
            return dict.fromkeys(recipients, verdicts[0])
        return dict(zip(recipients, verdicts, strict=True))

    def _check(self, session: Session, transaction: _Transaction) -> None:
        if transaction.ended is not None:
            raise transaction.ended
        if {each.address for each in session.envelope.rcpt_to} != transaction.recipients.keys():
            raise self._bypassed(session)

    async def _send(self, relay: Relay, connection: NextHopConnection) -> list[Verdict]:
        try:
            verdicts = await relay.run(connection)
        except Failure as failure:
            verdicts = [failure.reply or failure] * relay.count
        except BaseException:
            connection.abort()
            raise
        self._hop.give_back(connection, clean=all(isinstance(each, ReceivedReply) and each.positive for each in verdicts))
        return verdicts

    # A message that may have been received before

    async def _pass_on_kept(self, ctx: DataContext, transaction: _Transaction, replies: MessageReplies) -> dict[str, Verdict]:
        spool = Spool(self.state)
        try:
            await self._keep(ctx, spool)
            known = await replies.begin(transaction.recipients, alone=True)
            if known is None:
                raise SMTPError("4.2.0 This message is being delivered, try again later", 451)
            left = {name: address for name, address in transaction.recipients.items() if name not in known}
            sent = await self._send_kept(ctx, spool, transaction.sender, left, replies) if left else {}
            return {name: known.get(name) or sent[name] for name in transaction.recipients}
        finally:
            spool.close()

    async def _keep(self, ctx: DataContext, spool: Spool) -> None:
        try:
            async for piece in ctx.stream:
                await spool.write(piece)
        except OSError as error:
            event(_log, logging.ERROR, "cannot spool message", id=ctx.session.id, error=error.strerror or error)
            raise SMTPError("4.3.1 Insufficient system storage", 452) from None
        reject_oversize(ctx)

    async def _send_kept(
        self, ctx: DataContext, spool: Spool, sender: Address, recipients: Mapping[str, Address], replies: MessageReplies
    ) -> dict[str, Verdict]:
        """Send a whole transaction for these recipients. A rejection of MAIL or RCPT is a verdict like any other."""
        verdicts: dict[str, Verdict] = {}
        try:
            connection, reply = await self._hop.mail(ctx.session, sender)
            if not reply.positive:
                self._hop.give_back(connection, clean=True)
                return dict.fromkeys(recipients, reply)
            for name, address in recipients.items():
                reply = await connection.send_command(rcpt_command(address, connection), RCPT_TIMEOUT)
                if not reply.positive:
                    verdicts[name] = reply
            accepted = [name for name in recipients if name not in verdicts]
            if not accepted:
                self._hop.give_back(connection, clean=False)
                return verdicts
            relay = Relay(ctx, spool.read(), len(accepted))
            relay.on_wait = _recorder(replies, accepted)
            verdicts.update(zip(accepted, await self._send(relay, connection), strict=True))
        except Failure as failure:
            return {**dict.fromkeys(recipients, failure), **verdicts}
        except SMTPError as error:
            return {**dict.fromkeys(recipients, ReceivedReply(error.code, tuple(error.message.split("\n")))), **verdicts}
        return verdicts

    # The reply

    async def _reply(self, ctx: DataContext, verdicts: Mapping[str, Verdict], joint: bool) -> None:
        """``joint`` tells that the client gets one reply for verdicts that may differ."""
        self._log_verdicts(ctx.session, verdicts.values())
        errors = {name: _error(verdict) for name, verdict in verdicts.items()}
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
        final = _final(verdicts)
        if agree(errors.values()):
            if replies is not None:
                replies.agree({name: reply for name, reply in final.items() if name not in failed})
            if failed:
                raise joint_error(failed)
            return
        if replies is not None:
            await replies.keep(final)
        rejected = sum(error.code >= 500 for error in failed.values())
        counts = {"delivered": len(errors) - len(failed), "rejected": rejected, "deferred": len(failed) - rejected}
        event(_log, logging.INFO, "replies to recipients differ", id=ctx.session.id, **counts)
        raise mixed_error(errors)

    # Errors

    def _judge(self, session: Session, reply: ReceivedReply) -> SMTPError | None:
        """The error to reply with; None for a positive reply."""
        self._log_verdicts(session, [reply])
        return _error(reply)

    def _failed(self, session: Session, failure: Failure) -> SMTPError:
        """Count and log a failed delivery, even if no message has begun."""
        self._log_verdicts(session, [failure])
        error = SMTPError(failure.text, 451)
        self._count(error)
        return error

    def _log_verdicts(self, session: Session, verdicts: Iterable[Verdict]) -> None:
        next_hop = f"{self.name}:{self.address}"
        for verdict in dict.fromkeys(verdicts):
            if isinstance(verdict, Failure):
                event(_log, logging.WARNING, "next hop failed", id=session.id, next_hop=next_hop, error=verdict)
                return
            if verdict.code in _MISCONFIGURED:
                words = "next hop requires STARTTLS or AUTH: mail is deferred until it accepts this server without them"
                event(_log, logging.ERROR, words, id=session.id, next_hop=next_hop, reply=verdict)
                return

    def _bypassed(self, session: Session) -> SMTPError:
        """A handler accepted, or rejected, something that the next hop was not asked about, or has accepted."""
        event(_log, logging.ERROR, "next hop bypassed: handlers must call next(), and reject before that", id=session.id)
        return SMTPError("4.3.5 Error: recipients and next hop do not agree", 451)

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


def _error(verdict: Verdict) -> SMTPError | None:
    """The error to reply with: the next hop's own code and text. A 421 ends the next hop's connection, not the client's."""
    if isinstance(verdict, Failure):
        return SMTPError(verdict.text, 451)
    if verdict.positive:
        return None
    if verdict.code in _MISCONFIGURED:
        return SMTPError("4.3.5 Next hop does not accept mail from this server, try again later", 451)
    return SMTPError(verdict.text, 451 if verdict.code == 421 else verdict.code)


def _final(verdicts: Mapping[str, Verdict]) -> dict[str, ReceivedReply]:
    """The final verdicts: accepted, or rejected permanently."""
    final = {}
    for name, verdict in verdicts.items():
        error = _error(verdict)
        if isinstance(verdict, ReceivedReply) and (error is None or error.code >= 500):
            final[name] = verdict
    return final


def _recorder(replies: MessageReplies, recipients: Iterable[str]) -> Callable[[Sequence[Verdict]], None]:
    """Return a function that records the verdicts received so far, for these recipients in this order."""
    names = list(recipients)
    return lambda verdicts: replies.record(_final(dict(zip(names, verdicts, strict=False))))


async def _begin_new(replies: MessageReplies, recipients: Collection[str]) -> None:
    """Raises SMTPError if the message turns out to be a repeated one: nothing was delivered yet."""
    known = await replies.begin(recipients, alone=len(recipients) > 1)
    if known is None:
        raise SMTPError("4.2.0 This message is being delivered, try again later", 451)
    if known:
        raise SMTPError("4.2.0 This message was delivered to some recipients meanwhile, try again later", 451)
