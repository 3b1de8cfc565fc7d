"""Between the protocol and the handlers: takes the protocol's events, runs the handlers of that phase, returns their decision.

It has no sockets. Its connection gives bytes to the protocol and calls ``proceed()``. ``changed`` is called when there may be
output, or the dialogue has ended.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable
from functools import partial
from operator import attrgetter
from typing import Any

from fumi_core.errors import MessageAborted, SMTPError
from fumi_core.handlers.contexts import (
    AddressContext,
    AuthContext,
    CloseContext,
    ConnectContext,
    Context,
    DataContext,
    MailContext,
    RcptContext,
)
from fumi_core.handlers.runner import HandlerRunner
from fumi_core.handlers.stream import MessageStream
from fumi_core.runtime.logs import event as log_event
from fumi_core.server import dialogue_log
from fumi_core.server.handler_replies import log_failure, log_handler_failure, rejection
from fumi_core.server.message import ABORTED, ARRIVING, COMPLETE, DONE, RUNNING, WAITING, ArrivingMessage
from fumi_core.server.observer import Observer, RejectReason
from fumi_core.server.setup import DialogueSetup
from fumi_core.smtp import replies
from fumi_core.smtp.events import (
    Auth,
    AuthEnded,
    ChunkDropped,
    ChunkEnd,
    Connect,
    Mail,
    MessageBroken,
    MessageData,
    MessageEnd,
    MessageExcess,
    MessageStart,
    Rcpt,
)
from fumi_core.smtp.protocol import Protocol
from fumi_core.smtp.replies import Reply, verdict
from fumi_core.smtp.results import MessageResult
from fumi_core.smtp.session import Session, log_fields
from fumi_core.smtp.states import State

_log = logging.getLogger("fumi.core")

PIPELINED_BYTES = 32 * 1024
"""When more bytes than this wait behind a command whose handlers run, the socket is not read.

With a message's bytes that wait for its handler (HIGH_WATER_BYTES) and one more read (READ_BYTES), at most 256 KiB are buffered.
"""


class Dialogue:
    """One connection's conversation. ``messages`` counts the accepted ones."""

    def __init__(
        self,
        session: Session,
        setup: DialogueSetup,
        changed: Callable[[], None],
        *,
        anonymous: bool = False,
        greeted: bool = False,
    ) -> None:
        """``anonymous``: the session's address is the proxy's own, and the client's is unknown. ``greeted``: see Protocol."""
        self.session = session
        options = setup.options
        speaks_for_others = (options.use_xclient or options.use_xforward) and not anonymous
        logged = dialogue_log.log.isEnabledFor(logging.DEBUG)
        self.protocol = (dialogue_log.LoggedProtocol if logged else Protocol)(
            session,
            options,
            setup.greetings,
            setup.tally,
            authenticates=setup.chains["auth"] is not None,
            decides_mail=setup.chains["mail_from"] is not None,
            decides_rcpt=setup.chains["rcpt_to"] is not None,
            trusted=speaks_for_others and session.remote_address in setup.trusted,
            greeted=greeted,
            # A method would be a cycle that only the garbage collector would break.
            at_end_failed=partial(_log_at_end_failure, session),
        )
        self.messages = 0
        self._setup = setup
        self._observer = setup.observer
        # The default observer does nothing.
        self._timed = type(setup.observer) is not Observer
        self._began = 0.0
        """When the handlers that run, or ran last, were called, by the monotonic clock."""
        self._awaited = 0.0
        """Since when the client waits for them: since then or, with a message, its end."""
        self._cancelled: Context | None = None
        """The context of the handlers that were cancelled, since they did not end."""
        self._changed = changed
        self._runner = HandlerRunner(asyncio.get_running_loop())
        self._running: Context | None = None
        self._phase = ""
        """The phase whose handlers run, or ran last."""
        self._proceeding = False
        self._message: ArrivingMessage | None = None
        self._dropping_since = 0.0
        self.draining = False
        """Whether the dialogue ends as soon as no transaction is in progress."""
        self._reported = False
        self._on_closed: Callable[[], None] | None = None

    # Calls by the connection

    def start(self) -> None:
        """The client's identity is known: run the connect handlers, and send the banner."""
        self._observer.session_started(self.session)
        self._proceeding = True
        self._connect()
        self.proceed()

    def proceed(self) -> None:
        """Process the bytes that the protocol has received."""
        protocol = self.protocol
        self._proceeding = True
        try:
            while (event := protocol.next_event()) is not None:
                _HANDLERS[type(event)](self, event)
            message = self._message
            if message is not None and message.stage is WAITING and message.stream.has_text:
                self._run_message(message)
        except Exception as error:
            self.fail(error)
        finally:
            self._proceeding = False
        if self.draining and not protocol.in_transaction and not self.closed:
            protocol.close(replies.SHUTTING_DOWN)
        if protocol.last is not None:
            self._report_end()
        self._changed()

    @property
    def closed(self) -> bool:
        """Whether the dialogue has ended; output may still wait to be sent."""
        return self.protocol.state is State.CLOSED

    @property
    def busy(self) -> bool:
        """Whether the client waits for the server, and not the other way round."""
        return self.protocol.pending is not None

    @property
    def full(self) -> bool:
        """Whether enough bytes are buffered here for now."""
        message, protocol = self._message, self.protocol
        if message is not None and message.stream.full:
            return True
        # Reading goes on while a handler runs, so that a disconnect is noticed, even after further bytes.
        return (protocol.pending is not None and protocol.buffered > PIPELINED_BYTES) or protocol.throttled

    @property
    def message_started(self) -> float | None:
        """When the arriving message, or chunk without a transaction, began, by the monotonic clock; None if none arrives."""
        if self.closed:
            return None
        if self._message is not None and self._message.reception is ARRIVING:
            return self._message.started
        return self._dropping_since if self.protocol.dropping else None

    @property
    def awaited(self) -> float | None:
        """Since when the client waits for handlers, or would if it had not gone, by the monotonic clock; None if it does not."""
        return self._awaited if self._running is not None and (self.busy or self._on_closed is not None) else None

    def fail(self, error: Exception) -> None:
        """The last resort, for a bug here or an app that changed Fumi's internals: every client gets a reply."""
        log_failure(self.session, "dialogue failed", error)
        self._end(replies.CONNECT_FAILED, "local error")

    def time_out(self) -> None:
        self._end(replies.TIMED_OUT, "timed out")

    def stop_handlers(self) -> None:
        """The client has waited too long: cancel the handlers, which is answered 451. If they do not end, end the dialogue."""
        context = self._running
        assert context is not None
        fields = {**log_fields(self.session), "hook": context.hook, "command": context.command}
        if self._cancelled is context:
            log_event(_log, logging.ERROR, "handler does not end, although it was cancelled", **fields)
            self._awaited = math.inf
            self._end(replies.CONNECT_FAILED, "the handlers do not end")
            return
        log_event(_log, logging.ERROR, "handler does not end, cancelled", **fields)
        self._cancelled, self._awaited = context, time.monotonic()
        self._runner.cancel()

    def drain(self) -> None:
        """Send 421 as soon as no transaction is in progress."""
        self.draining = True
        self.proceed()

    def disconnected(self, closed: Callable[[], None]) -> None:
        """The client has disconnected: end the handler that runs, run those of the close phase, then call ``closed``.

        A handler of a message is not cancelled: reading raises MessageAborted, and a whole message may have been stored already.
        """
        self.protocol.abandon()
        self._auth_ended(self.protocol.break_off_exchange())
        self._abort_message("client disconnected")
        self._on_closed = closed  # from now on, the end of a running handler leads to the close phase
        if self._running is None:
            self._after_disconnect()
        elif not isinstance(self._running, DataContext):
            self._runner.cancel()

    # Events

    def _report_end(self) -> None:
        """Count, once, a dialogue that the server ended for one of ``_REASONS``."""
        reason = _REASONS.get(self.protocol.last)
        if reason is not None and not self._reported:
            self._reported = True
            self._observer.rejected(reason)

    def _connect(self, event: Connect | None = None) -> None:
        self._run("connect", ConnectContext(self.session))

    def _auth(self, event: Auth) -> None:
        self._run("auth", AuthContext(self.session, event.credentials))

    def _auth_ended(self, event: AuthEnded | None) -> None:
        if event is not None:
            log_event(_log, logging.INFO, f"authentication {event.result}", **log_fields(self.session), method=event.method)

    def _mail(self, event: Mail) -> None:
        self._run("mail_from", MailContext(self.session, event.address))

    def _rcpt(self, event: Rcpt) -> None:
        self._run("rcpt_to", RcptContext(self.session, event.address))

    def _message_start(self, event: MessageStart) -> None:
        options = self._setup.options
        recipients = self.protocol.recipients if options.lmtp else None
        self._message = ArrivingMessage(self.session, MessageStream(options.size, self._content_taken), event.command, recipients)

    def _content_taken(self) -> None:
        if not self._proceeding:  # proceed() ends with the same call
            self._changed()

    def _message_data(self, event: MessageData) -> None:
        assert self._message is not None
        self._message.stream.feed(event.text)

    def _message_excess(self, event: MessageExcess) -> None:
        assert self._message is not None
        self._message.stream.exceed()

    def _chunk_end(self, event: ChunkEnd) -> None:
        """Send a known rejection at once, not after the last chunk."""
        message = self._message
        assert message is not None
        if message.stream.has_text or message.stream.size_exceeded:
            self._run_message(message)  # while its envelope still exists
        refusal = message.rejection_so_far()
        if refusal is None:
            self.protocol.accept()
        else:
            self.protocol.refuse(refusal)

    def _chunk_dropped(self, event: ChunkDropped) -> None:
        self._dropping_since = time.monotonic()

    def _message_end(self, event: MessageEnd) -> None:
        message = self._message
        assert message is not None
        message.reception = COMPLETE
        self._awaited = time.monotonic()
        message.stream.end()
        self._run_message(message)
        if message.stage is DONE and self._message is message:
            self._settle_message(message)

    def _message_broken(self, event: MessageBroken) -> None:
        self._abort_message(event.reason, event.result)

    # Handlers

    def _run(self, phase: str, context: Context) -> None:
        chain = self._setup.chains[phase]
        if chain is None:
            _DONE[phase](self, context, None)
            return
        self._running, self._phase = context, phase
        self._began = self._awaited = time.monotonic()
        self._runner.run(chain(context), self._handlers_ended)

    def _handlers_ended(self, error: BaseException | None) -> None:
        context, self._running = self._running, None
        assert context is not None
        if self._timed:
            self._observer.handlers_ended(self._phase, time.monotonic() - self._began)
        try:
            _DONE[self._phase](self, context, error)
        except Exception as failed:
            self.fail(failed)
        if error is not None:
            # An app may raise one exception again and again, and each time Python makes its traceback longer.
            BaseException.with_traceback(error, None)
        if self._on_closed is not None:
            if not isinstance(context, CloseContext):
                self._after_disconnect()
        elif not self._proceeding:
            self.proceed()

    def _connect_done(self, context: Context, error: BaseException | None) -> None:
        if self.protocol.pending is None or error is None or isinstance(error, SMTPError):
            self._decide(context, error)
        else:
            log_handler_failure(context, error)
            self.protocol.refuse(replies.CONNECT_FAILED)

    def _auth_done(self, context: Context, error: BaseException | None) -> None:
        assert isinstance(context, AuthContext)
        if error is not None or context.accepted:
            self.session.user = context.user if error is None else None
            self.session.auth_method = context.credentials.method if error is None else None
            self._decide(context, error)
        elif self.protocol.pending is not None:
            self.protocol.refuse(replies.AUTH_FAILED)

    def _address_done(self, context: Context, error: BaseException | None) -> None:
        assert isinstance(context, AddressContext)
        event = self.protocol.pending
        if type(event) is Mail or type(event) is Rcpt:
            event.address = context.address
        self._decide(context, error)

    def _decide(self, context: Context, error: BaseException | None) -> None:
        if self.protocol.pending is None:
            # Abandoned: no reply can be sent. If it was cancelled, we cancelled it.
            if error is not None and not isinstance(error, SMTPError | asyncio.CancelledError):
                log_handler_failure(context, error)
        elif error is None:
            self.protocol.accept()
        else:
            self.protocol.refuse(rejection(context, error))

    # The message

    def _run_message(self, message: ArrivingMessage) -> None:
        if message.stage is WAITING:
            message.stage = RUNNING
            self._run("data", message.context)

    def _message_done(self, context: Context, error: BaseException | None) -> None:
        message = self._message
        assert message is not None
        message.stage = DONE
        message.context.stream.release()
        if error is not None:
            self._message_failed(message, error)
        if message.reception is ABORTED:
            self._forget_broken_message()
        elif message.reception is COMPLETE and not self._proceeding:
            self._settle_message(message)

    def _message_failed(self, message: ArrivingMessage, error: BaseException) -> None:
        cut_off = isinstance(error, asyncio.CancelledError) and self.closed
        if cut_off or isinstance(error, MessageAborted):
            reason = str(error) or "connection closed"
            log_event(_log, logging.INFO, "message aborted", **log_fields(self.session), error=reason)
            message.cut_off()
        else:
            message.fail(error)

    def _settle_message(self, message: ArrivingMessage) -> None:
        self._message = None
        sent = self.protocol.settle(message.replies())
        best = min(map(_code, sent))
        result = verdict(best)
        self._observer.message(result, message.stream.size, time.monotonic() - message.started)
        self.messages += best == 250

    def _abort_message(self, reason: str, result: MessageResult = MessageResult.ABORTED) -> None:
        message = self._message
        if message is None or message.reception is not ARRIVING:
            return  # a whole message belongs to its handler, which may have stored it already
        message.reception = ABORTED
        self._awaited = time.monotonic()
        self._observer.message(result, message.stream.size, time.monotonic() - message.started)
        message.stream.abort(reason)
        if message.stage is DONE:
            self._forget_broken_message()
        else:
            self._run_message(message)

    def _forget_broken_message(self) -> None:
        self._message = None
        if type(self.protocol.pending) is MessageBroken:
            self.protocol.accept()

    # The end

    def kill(self) -> None:
        """The server is closing, and the drain timeout has passed: stop the handlers, whatever they are doing."""
        self._end(replies.SHUTTING_DOWN, "the server is closing")
        self._runner.cancel()

    def _end(self, reply: Reply, reason: str) -> None:
        self.protocol.close(reply)
        self._report_end()
        self._abort_message(reason)
        if self._running is not None and not isinstance(self._running, DataContext):
            self._runner.cancel()
        self._changed()

    def _after_disconnect(self) -> None:
        self._run("close", CloseContext(self.session))

    def _close_done(self, context: Context, error: BaseException | None) -> None:
        closed = self._on_closed
        assert closed is not None
        if error is not None:
            log_handler_failure(context, error)
        self._runner.close()
        closed()


def _log_at_end_failure(session: Session, command: str, error: BaseException) -> None:
    log_failure(session, "handler failed", error, "at_end", command)


_code = attrgetter("code")
_REASONS: dict[Reply | None, RejectReason] = {
    replies.NOT_SMTP: RejectReason.NOT_SMTP,
    replies.TOO_MANY_ERRORS: RejectReason.ERRORS,
    replies.TIMED_OUT: RejectReason.TIMEOUT,
    replies.SHUTTING_DOWN: RejectReason.DRAINING,
}
# What follows when the handlers of a phase have ended, or it has none.
_DONE: dict[str, Callable[[Dialogue, Any, BaseException | None], None]] = {
    "connect": Dialogue._connect_done,
    "auth": Dialogue._auth_done,
    "mail_from": Dialogue._address_done,
    "rcpt_to": Dialogue._address_done,
    "data": Dialogue._message_done,
    "close": Dialogue._close_done,
}
_HANDLERS: dict[type, Callable[[Dialogue, Any], None]] = {
    Connect: Dialogue._connect,
    Auth: Dialogue._auth,
    AuthEnded: Dialogue._auth_ended,
    Mail: Dialogue._mail,
    Rcpt: Dialogue._rcpt,
    MessageStart: Dialogue._message_start,
    MessageData: Dialogue._message_data,
    MessageExcess: Dialogue._message_excess,
    ChunkEnd: Dialogue._chunk_end,
    ChunkDropped: Dialogue._chunk_dropped,
    MessageEnd: Dialogue._message_end,
    MessageBroken: Dialogue._message_broken,
}
