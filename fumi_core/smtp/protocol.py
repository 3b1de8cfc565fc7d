"""The SMTP state machine (RFC 5321 §3 and §4; RFC 2033 for LMTP), sans-IO: bytes in, events and replies out.

Theory of operation. ``receive()`` takes bytes; ``next_event()`` processes them, one command after the other, appends replies to
the output and stops at whatever the application has to decide: the events marked "Decision" in events.py, ``Connect`` being
pending from the start. Such an event is pending until it is answered, and no later byte is processed before, so replies are in
order however the client pipelines. The other events only inform. All other commands are answered here. The table in states.py
says which command may come when.

The bytes after a command may be something else: a message after DATA, a chunk after BDAT, a response to AUTH's challenge. At most
one of these is expected at a time, and ``next_event`` handles it first.

``answer()`` is a short way for a command that arrives alone: bytes in, the reply out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fumi_core.smtp import authentication, grammar, message_reader, parameters, replies, sasl, states, xclient
from fumi_core.smtp.authentication import AuthExchange
from fumi_core.smtp.data import BareNewline
from fumi_core.smtp.events import (
    Auth,
    AuthEnded,
    ChunkDropped,
    ChunkEnd,
    Connect,
    Event,
    Mail,
    MessageBroken,
    MessageData,
    MessageEnd,
    MessageExcess,
    MessageStart,
    Rcpt,
)
from fumi_core.smtp.greetings import Greetings
from fumi_core.smtp.lines import MAX_LINE_BYTES, Input, LineTooLong
from fumi_core.smtp.message_reader import MessageReader
from fumi_core.smtp.options import Options
from fumi_core.smtp.replies import Reply, verdict
from fumi_core.smtp.results import AuthResult, MessageResult
from fumi_core.smtp.sasl import Credentials
from fumi_core.smtp.session import Address, Envelope, Session
from fumi_core.smtp.states import ALWAYS, BEFORE_MAIL, ORDER, State
from fumi_core.smtp.tally import Tally

MAX_REPLIES = 32
"""Replies that may wait to be sent before the next command is read, so that a client that pipelines thousands has to wait.

The longest reply, EHLO's, has under 1 KiB.
"""

_DATA_START, _BDAT_START, _MESSAGE_END = MessageStart("DATA"), MessageStart("BDAT"), MessageEnd()
_MESSAGE_EXCESS, _CHUNK_END, _CHUNK_DROPPED = MessageExcess(), ChunkEnd(), ChunkDropped()

AtEndFailed = Callable[[str, BaseException], None]
"""Called with the command and the error when a function of ``envelope.at_end`` raises."""


class Protocol:
    """One connection's dialogue. ``session`` is updated with what the client sends."""

    def __init__(
        self,
        session: Session,
        options: Options,
        greetings: Greetings,
        tally: Tally,
        *,
        authenticates: bool = False,
        decides_mail: bool = True,
        decides_rcpt: bool = True,
        trusted: bool = False,
        greeted: bool = False,
        at_end_failed: AtEndFailed | None = None,
    ) -> None:
        """``authenticates``: AUTH has a handler. ``trusted``: the client may use XCLIENT and XFORWARD.

        ``decides_mail``, ``decides_rcpt``: the application decides about MAIL, about RCPT. Otherwise a valid one is accepted
        without an event.

        ``greeted``: the client had its banner before it upgraded with STARTTLS, and gets no second one (RFC 3207 §4.2). If it is
        rejected now, the reply is that to its first command.
        """
        self.session = session
        self.state: State = states.START
        self.pending: Event | None = Connect()
        """The event that waits for the application's decision."""
        self.throttled = False
        """Too many replies wait to be sent, so no command is processed until they are."""
        self.line_begun = False
        """Whether the last bytes received were an incomplete command."""
        self.output: list[bytes] = []
        """The replies that wait to be sent, in this order."""
        self.last: Reply | None = None
        """The reply with which ``close()`` ended the dialogue; None when a handler or the client ended it."""
        self.recipients: tuple[Address, ...] = ()
        """In LMTP, the recipients of the message that is arriving: each is owed a reply, whatever an app does to the envelope."""
        self._options = options
        self._greetings = greetings
        self._tally = tally
        self._authenticates = authenticates
        self._decides_mail = decides_mail
        self._decides_rcpt = decides_rcpt
        self._trusted = trusted
        self._greeted = greeted
        self._rejection: Reply | None = None
        """The reply to the first command of a greeted client that was rejected."""
        self._at_end_failed = at_end_failed
        self._enhanced = not options.hide_enhancedstatuscodes
        self._input = Input()
        self._message_reader = MessageReader(self._input, options)
        self._exchange: AuthExchange | None = None
        self._outcome: Event | Reply | None = None
        """What a command led to that ``answer()`` has processed."""
        self._broken: MessageBroken | None = None
        self._failed: tuple[Reply, ...] = ()
        """In LMTP, the rejections, one for each recipient, of a message with a rejected chunk: sent after its last chunk."""
        self._tolerated = 0
        """How many commands that depend on the rejected sender, recipient or chunk do not count as protocol errors."""
        self._recognized = False
        self._errors = 0
        self._unauthenticated = 0

    # Bytes in, replies out

    def receive(self, data: bytes) -> None:
        """Take bytes from the client; ``next_event()`` processes them."""
        if self.state is not states.CLOSED:
            self._input.receive(data)

    def answer(self, data: bytes) -> bytes | None:
        """Take bytes as ``receive()`` does, and return the reply if they are one command that leads to nothing but its reply.

        After None, call ``next_event()``. Clients that do not pipeline send each command alone.

        In place of ``receive()``, ``next_event()`` and ``take_output()`` for these commands too, with which the message of the
        bench row core-kept costs 54.4 µs (54.0 … 62.4) instead of 51.7 µs (49.2 … 58.7): Python 3.11.7, 5 rounds by turns, and
        on a quiet machine 8 %. Delete it when that is under 3 %.
        """
        if (
            self.state not in _BETWEEN_COMMANDS
            or self.pending is not None
            or self._input.data
            or self.output
            or self._message_reader.arrival is not None
            or self._exchange is not None
            or not 0 < data.find(b"\n") + 1 == len(data) <= MAX_LINE_BYTES
        ):
            self.receive(data)
            return None
        outcome = self._command(data)
        if isinstance(outcome, Reply) and outcome.code < 500 and outcome not in _FINAL:
            return self._encoded(outcome)
        self._outcome = outcome
        return None

    @property
    def buffered(self) -> int:
        """Number of bytes received and not yet processed."""
        return len(self._input)

    def take_output(self) -> bytes:
        """The replies since the last call, to be sent in this order."""
        output, self.output = self.output, []
        return output[0] if len(output) == 1 else b"".join(output)

    def next_event(self) -> Event | None:
        """Process input until the application has to act; None when more bytes, or a decision, are needed first."""
        self.throttled = self.line_begun = False
        if self._outcome is not None:
            answered, self._outcome = self._outcome, None
            if not isinstance(answered, Reply):
                return answered
            self._conclude(answered)
        input = self._input
        while self.pending is None and self.state is not states.CLOSED:
            if len(self.output) > MAX_REPLIES:
                self.throttled = True
                return None
            if self._broken is not None:
                self.pending, self._broken = self._broken, None
                return self.pending
            if (arrival := self._message_reader.arrival) is not None:
                if arrival is message_reader.DATA and not input.data:
                    return None
                event = self._read_message()
                if event is not None or self._message_reader.arrival is not None:
                    return event
                continue
            if not input.data:
                return None
            try:
                line = input.line()
            except LineTooLong as error:
                ended = self.break_off_exchange()
                self._conclude(replies.NOT_SMTP if self._is_foreign(error.beginning) else replies.LINE_TOO_LONG)
                if ended is not None:
                    return ended
                continue
            if line is None:
                self.line_begun = True
                if self._exchange is None and self._is_foreign(input.beginning()):
                    # A TLS ClientHello has no line end: waiting for one would end in the timeout.
                    self.close(replies.NOT_SMTP)
                return None
            if self._rejection is not None:
                self.close(self._rejection)
                return None
            outcome = self._command(line) if self._exchange is None else self._respond(line)
            if isinstance(outcome, Reply):
                self._conclude(outcome)
            elif outcome is not None:
                return outcome
        return None

    # Calls by the application

    def accept(self) -> None:
        """Accept the pending event; for the end of a message call ``settle()``."""
        event, self.pending = self.pending, None
        if type(event) is Rcpt:
            self._reply(self._add_recipient(event.address))
        elif type(event) is Mail:
            self._reply(self._set_sender(event.address))
        elif type(event) is Auth:
            self._tally.authentications[event.credentials.method, AuthResult.OK] += 1
            self._reply(replies.AUTHENTICATED)
        elif type(event) is ChunkEnd:
            self._reply(replies.CHUNK_OK)
        elif type(event) is Connect:
            if not self._greeted:
                self._reply(self._greetings.banner)
            self._greeted = False
        elif type(event) is MessageBroken:
            self._end_broken(event)

    def refuse(self, reply: Reply) -> None:
        """Refuse the pending event. A 421 closes the connection (RFC 5321 §3.8), and so does a refused banner."""
        event, self.pending = self.pending, None
        if type(event) is Auth:
            self._refuse_authentication(event, reply)
            return
        if type(event) is Connect and self._greeted:
            self._rejection = reply
            return
        if type(event) is Mail:
            self._reset("MAIL")
        elif type(event) is ChunkEnd:
            self._broken = MessageBroken("a chunk was rejected", verdict(reply.code), "BDAT", reply)
        self._reply(self._tolerate_after(reply))
        if reply.code == 421 or type(event) is Connect:
            self.state = states.CLOSED

    def settle(self, verdicts: Sequence[Reply]) -> Sequence[Reply]:
        """Answer the end of a message: with one reply or, in LMTP, one for each recipient in order (RFC 2033 §4.2).

        Returns the replies that were sent; when the client has disconnected, those that would have been. A message is not
        accepted if ending its transaction failed (``envelope.at_end``).
        """
        if self.pending is None:
            return verdicts
        self.pending = None
        error = self._reset("BDAT" if self._message_reader.chunked else "DATA")
        if error is not None:
            verdicts = [error if reply.code < 400 else reply for reply in verdicts]
        for reply in verdicts:
            self._reply(reply)
            if reply.code == 421:
                self.state = states.CLOSED
        return verdicts

    def close(self, reply: Reply) -> None:
        """End the dialogue with this reply; anything that the client sends afterwards is ignored."""
        if self.state is not states.CLOSED:
            self.last = reply
            self._reply(reply)
            self.abandon()

    def abandon(self) -> None:
        """End the dialogue without a reply: the client has disconnected."""
        if type(self.pending) is Auth:
            self._tally.authentications[self.pending.credentials.method, AuthResult.ABORTED] += 1
        self.pending = None
        self.state = states.CLOSED

    @property
    def unused(self) -> bool:
        """Whether the client has sent nothing, and was refused nothing."""
        return self.state is states.START and not (self._recognized or self._errors or self._input.data)

    @property
    def dropping(self) -> bool:
        """Whether a chunk without a transaction is arriving."""
        return self._message_reader.arrival is message_reader.STRAY_CHUNK

    @property
    def in_transaction(self) -> bool:
        return self.pending is not None or self.state not in (states.START, states.READY, states.CLOSED)

    # Commands

    def _conclude(self, reply: Reply) -> None:
        """Send the reply to a command. It may end the dialogue, or count as a protocol error."""
        if reply in _FINAL:
            self.close(reply)
        elif reply.code < 500:
            self._reply(reply)
        elif reply in _CONSEQUENCES:
            self._reply_to_consequence(reply)
        else:
            self._mistake(reply)

    def _command(self, line: bytes) -> Event | Reply | None:
        if line[-2:] != b"\r\n":
            return replies.NOT_SMTP if self._is_foreign(line) else replies.BARE_NEWLINE_IN_COMMAND
        # Trailing spaces are tolerated, as RFC 5321 §4.1.1 recommends.
        word, _, argument = line[:-2].rstrip(b" ").partition(b" ")
        verb = word.upper()
        handler = _COMMANDS.get(verb)
        if handler is None:
            self._tally.commands[b"OTHER"] += 1
            return replies.NOT_SMTP if self._is_foreign(line) else replies.NOT_RECOGNIZED
        self._tally.commands[verb] += 1
        self._recognized = True
        options = self._options
        if verb in options.disabled_verbs:
            return replies.NOT_IMPLEMENTED
        if options.auth_required and self._authentication_overdue(verb):
            return replies.TOO_MANY_ERRORS
        return ORDER.get(verb, ALWAYS).get(self.state) or handler(self, argument)

    def _is_foreign(self, line: bytes) -> bool:
        """Whether this is HTTP, TLS or binary data. The dialogue then ends, so that no browser can be made to send mail."""
        if grammar.HTTP_REQUEST.match(line) is not None:
            return True
        if self._recognized or line.partition(b" ")[0].upper() in _COMMANDS:
            return False
        return grammar.NOT_TEXT.search(line.rstrip(b"\r\n")) is not None

    def _tolerate_after(self, refusal: Reply) -> Reply:
        """Commands that the client pipelined before it could know of this rejection do not count as protocol errors."""
        self._tolerated = self._options.max_recipients + 1
        return refusal

    def _reply_to_consequence(self, reply: Reply) -> None:
        if self._tolerated:
            self._tolerated -= 1
            self._reply(reply)
        else:
            self._mistake(reply)

    def _mistake(self, reply: Reply) -> None:
        """Answer a protocol error, or close the connection after too many."""
        self._errors += 1
        if self._errors > self._options.max_errors:
            self.close(replies.TOO_MANY_ERRORS)
        else:
            self._reply(reply)

    def _authentication_overdue(self, verb: bytes) -> bool:
        if self.session.user is not None or verb in (b"AUTH", b"QUIT"):
            return False
        self._unauthenticated += 1
        return self._unauthenticated > self._options.max_unauthenticated_commands

    def _helo(self, argument: bytes) -> Event | Reply:
        if self._options.lmtp:
            return replies.USE_LHLO
        if not self._introduce("HELO", argument):
            return replies.SYNTAX_HELO
        return self._end_transaction("HELO", self._greetings.helo)

    def _ehlo(self, argument: bytes) -> Event | Reply:
        if self._options.lmtp:
            return replies.USE_LHLO
        if not self._introduce("EHLO", argument):
            return replies.SYNTAX_EHLO
        return self._end_transaction("EHLO", self._extensions())

    def _lhlo(self, argument: bytes) -> Event | Reply:
        if not self._options.lmtp:
            return replies.NOT_RECOGNIZED
        if not self._introduce("LHLO", argument):
            return replies.SYNTAX_LHLO
        return self._end_transaction("LHLO", self._extensions())

    def _extensions(self) -> Reply:
        options, secure = self._options, self.session.secure
        # AUTH is never offered where the reply would be 530: clients send the password with the command.
        auth = self._authenticates and (secure or (options.allow_insecure_auth and not options.require_tls))
        return self._greetings.ehlo(secure, auth, self._trusted)

    def _introduce(self, verb: str, argument: bytes) -> bool:
        hostname = grammar.read_text(argument)
        if hostname is None or not grammar.is_client_hostname(hostname := hostname.strip()):
            return False
        self.session.client_hostname = hostname
        self.session.opening_command = verb
        return True

    def _mail(self, argument: bytes) -> Event | Reply:
        if self._options.require_tls and not self.session.secure:
            return self._tolerate_after(replies.MUST_STARTTLS)
        if self._options.auth_required and self.session.user is None:
            return self._tolerate_after(replies.AUTHENTICATION_REQUIRED)
        sender = grammar.read_path(self._options.paths.mail, argument)
        if sender is None:
            return self._tolerate_after(replies.BAD_SENDER if grammar.has_path(argument) else replies.SYNTAX_MAIL)
        envelope = self.session.envelope
        refusal = None
        if sender.args:
            refusal = parameters.read_mail(envelope, sender.args, self.session, self._options, self._greetings.withheld())
        if refusal is None and not envelope.smtputf8 and not sender.address.isascii():
            refusal = replies.NEED_SMTPUTF8
        if refusal is not None:
            self._reset("MAIL")
            return self._tolerate_after(refusal)
        self.session.transaction += 1
        if not self._decides_mail:
            return self._set_sender(sender)
        self.pending = event = Mail(sender)
        return event

    def _set_sender(self, sender: Address) -> Reply:
        self.session.envelope.mail_from = sender
        self._tolerated = 0
        self.state = states.MAIL
        return replies.SENDER_OK

    def _rcpt(self, argument: bytes) -> Event | Reply:
        recipient = grammar.read_path(self._options.paths.rcpt, argument)
        if recipient is None:
            return self._tolerate_after(replies.BAD_RECIPIENT if grammar.has_path(argument) else replies.SYNTAX_RCPT)
        if recipient.args:
            refusal = parameters.read_rcpt(recipient.args, self._options, self._greetings.withheld())
            if refusal is not None:
                return self._tolerate_after(refusal)
        envelope = self.session.envelope
        if not envelope.smtputf8 and not recipient.address.isascii():
            return self._tolerate_after(replies.NEED_SMTPUTF8)
        # In SMTP a repeated recipient takes no place of its own.
        if len(envelope.rcpt_to) >= self._options.max_recipients and (
            self._options.lmtp or recipient.address not in (each.address for each in envelope.rcpt_to)
        ):
            return replies.TOO_MANY_RECIPIENTS
        if not self._decides_rcpt:
            return self._add_recipient(recipient)
        self.pending = event = Rcpt(recipient)
        return event

    def _add_recipient(self, recipient: Address) -> Reply:
        envelope = self.session.envelope
        if envelope.rcpt_to and not self._options.lmtp:
            # A repeated recipient is stored once. LMTP owes a reply for each RCPT it accepted, repeated or not (RFC 2033 §4.2).
            envelope.rcpt_to = [each for each in envelope.rcpt_to if each.address != recipient.address]
        envelope.rcpt_to.append(recipient)
        self.state = states.RCPT
        return replies.RECIPIENT_OK

    def _rset(self, argument: bytes) -> Event | Reply:
        if argument:
            return replies.SYNTAX_RSET
        return self._end_transaction("RSET", replies.OK) if self.state is not states.START else replies.OK

    def _noop(self, argument: bytes) -> Reply:
        return replies.NOT_ASCII if grammar.NOT_TEXT.search(argument) else replies.OK

    def _vrfy(self, argument: bytes) -> Reply:
        return replies.CANNOT_VERIFY if grammar.is_words(argument) else replies.SYNTAX_VRFY

    def _expn(self, argument: bytes) -> Reply:
        return replies.CANNOT_EXPAND if grammar.is_words(argument) else replies.SYNTAX_EXPN

    def _help(self, argument: bytes) -> Reply:
        return replies.NOT_ASCII if grammar.NOT_TEXT.search(argument) else self._greetings.help

    def _starttls(self, argument: bytes) -> Reply:
        if self.session.secure:
            return replies.ALREADY_TLS
        return replies.NOT_RECOGNIZED if self._options.hide_starttls else replies.NOT_IMPLEMENTED

    def _quit(self, argument: bytes) -> Reply:
        if argument:
            return replies.SYNTAX_QUIT
        return replies.BYE

    # AUTH (RFC 4954)

    def _auth(self, argument: bytes) -> Event | Reply | None:
        refusal = authentication.refusal(self.session, self._options, self._authenticates)
        if refusal is not None:
            return refusal
        word, space, initial = argument.partition(b" ")
        method = word.decode("latin-1").upper()
        if not method:
            return replies.SYNTAX_AUTH
        if method not in self._options.auth_methods or method not in sasl.MECHANISMS:
            return replies.UNKNOWN_MECHANISM
        self._begin_exchange(exchange := AuthExchange(method, self.session.name))
        return self._proceed(exchange.begin(initial if space else None))

    def _respond(self, line: bytes) -> Event | Reply:
        """Process the response to a challenge."""
        assert self._exchange is not None
        whole = line[-2:] == b"\r\n"
        return self._proceed(self._exchange.respond(line[:-2]) if whole else replies.AUTH_MALFORMED)

    def _proceed(self, outcome: Reply | Credentials) -> Event | Reply:
        if isinstance(outcome, Credentials):
            self._end_exchange()
            self.pending = event = Auth(outcome)
            return event
        if outcome.code == 334:
            return outcome
        ended = self.break_off_exchange(AuthResult.FAILED if outcome is replies.AUTH_FAILED else AuthResult.ABORTED)
        if ended is None:
            return outcome
        self._conclude(outcome)
        return ended

    def _begin_exchange(self, exchange: AuthExchange) -> None:
        self._exchange = exchange
        self._input.responses = True

    def break_off_exchange(self, result: AuthResult = AuthResult.ABORTED) -> AuthEnded | None:
        """End AUTH. Returns the event to log, unless a result was logged already."""
        exchange = self._exchange
        self._end_exchange()
        if exchange is None or exchange.verdict is not None:
            return None
        self._tally.authentications[exchange.method, result] += 1
        return AuthEnded(exchange.method, result)

    def _end_exchange(self) -> None:
        self._exchange = None
        self._input.responses = False

    def _refuse_authentication(self, event: Auth, reply: Reply) -> None:
        self._tally.authentications[event.credentials.method, AuthResult.FAILED] += 1
        exchange = AuthExchange(event.credentials.method, self.session.name)
        challenge = exchange.explain(reply)
        if challenge is not None:
            self._begin_exchange(exchange)
            self._reply(challenge)
        elif reply.code == 421:
            self.close(reply)
        else:
            self._mistake(reply)

    # XCLIENT and XFORWARD

    def _attributes(self, enabled: bool, command: str, argument: bytes) -> xclient.Attributes | Reply:
        if not enabled:
            return replies.NOT_IMPLEMENTED
        return xclient.read(command, argument) if self._trusted else replies.NOT_AUTHORIZED

    def _xclient(self, argument: bytes) -> Event | Reply:
        attributes = self._attributes(self._options.use_xclient, "XCLIENT", argument)
        if isinstance(attributes, Reply):
            return attributes
        introduced = xclient.impersonate(self.session, attributes)
        self._reset("XCLIENT")
        self.state = states.READY if introduced else states.START
        # As if that client had connected: the application decides, and the reply is a banner.
        self.pending = event = Connect()
        return event

    def _xforward(self, argument: bytes) -> Reply:
        attributes = self._attributes(self._options.use_xforward, "XFORWARD", argument)
        if isinstance(attributes, Reply):
            return attributes
        self.session.xforward = {**self.session.xforward, **attributes}
        return replies.OK

    # The message: after DATA, or in the chunks of BDAT (RFC 3030)

    def _data(self, argument: bytes) -> Event | Reply:
        if argument:
            return replies.SYNTAX_DATA
        if self.session.envelope.body == "BINARYMIME":
            return replies.NEED_BDAT
        self.state = states.DATA
        self._message_reader.begin()
        if self._options.lmtp:
            self._note_recipients()
        self._reply(replies.START_DATA)
        return _DATA_START

    def _bdat(self, argument: bytes) -> Event | Reply | None:
        if self._options.hide_chunking:
            return replies.NOT_IMPLEMENTED
        words = argument.split()
        last = len(words) == 2 and words[1].upper() == b"LAST"
        if not words or len(words) > 1 + last or not words[0].isdigit() or len(words[0]) > 20:
            return replies.SYNTAX_BDAT
        size = int(words[0])
        refusal = BEFORE_MAIL.get(self.state)
        if refusal is not None:
            self._message_reader.drop_chunk(size, self._refusals_of_chunk(refusal, last))
            return _CHUNK_DROPPED
        first = self._message_reader.begin_chunk(size, last, binary=self.session.envelope.body == "BINARYMIME")
        self.state = states.DATA if last else states.CHUNKS
        if not first:
            return None
        if self._options.lmtp:
            self._note_recipients()
        return _BDAT_START

    def _note_recipients(self) -> None:
        self.recipients = tuple(self.session.envelope.rcpt_to)

    def _refusals_of_chunk(self, refusal: Reply, last: bool) -> tuple[Reply, ...]:
        """The replies to a chunk without a transaction: one or, for a failed LMTP message's last chunk, one per recipient."""
        if not self._failed or self.state is not states.READY:
            return (refusal,)
        failed = self._failed
        if last:
            self._failed = ()
        return failed if last else failed[:1]

    def _end_transaction(self, command: str, reply: Reply) -> Event | Reply:
        """Reset, then reply. A message that is arriving in chunks is aborted first, and its handlers end."""
        if self.state is states.CHUNKS:
            self.pending = event = MessageBroken("client aborted the transaction", MessageResult.ABORTED, command, reply)
            return event
        return self._reset(command) or reply

    def _end_broken(self, event: MessageBroken) -> None:
        """The handlers of an aborted message have ended."""
        if event.command is None or event.reply is None:
            return
        error = self._reset(event.command)
        if event.command != "BDAT":
            self._conclude(error or event.reply)
            return
        # A chunk was rejected and has its reply. The rest of the message in the pipeline gets replies all the same.
        self._tolerate_after(event.reply)
        if self._options.lmtp:
            self._failed = (event.reply,) * len(self.recipients)

    def _read_message(self) -> Event | None:
        reader = self._message_reader
        if reader.arrival is message_reader.EXCESS_CHUNK:
            reader.arrival = message_reader.CHUNK
            return _MESSAGE_EXCESS
        if reader.arrival is not message_reader.COMPLETE:
            try:
                text = reader.read()
            except BareNewline:
                for _ in self.recipients[1:]:
                    self._reply(replies.BARE_NEWLINE)
                self.close(replies.BARE_NEWLINE)
                return MessageBroken("bare newline in the message", MessageResult.REJECTED)
            if text:
                return MessageData(text)
        if reader.arrival is not message_reader.COMPLETE:
            return None
        reader.arrival = None
        if reader.refusals:
            refusals, reader.refusals = reader.refusals, ()
            for each in refusals[1:]:
                self._reply(each)
            self._reply_to_consequence(refusals[0])
        elif self.state is states.CHUNKS:
            self.pending = _CHUNK_END
        else:
            self.pending = _MESSAGE_END
        return self.pending

    # State

    def _reset(self, command: str) -> Reply | None:
        """Clear the transaction: RSET, EHLO, the end of a message, a rejected MAIL (RFC 5321 §4.1.1.5).

        Returns the reply to send in place of a success when a function of ``envelope.at_end`` raises; the other functions are
        called.
        """
        self._message_reader.reset()
        self._failed = ()
        self._tolerated = 0
        ended, self.session.envelope = self.session.envelope, Envelope()
        if self.session.xforward:
            self.session.xforward = {}
        self.state = states.READY
        return self._call_at_end(ended, command) if ended.at_end else None

    def _call_at_end(self, ended: Envelope, command: str) -> Reply | None:
        outcome = None
        for end in ended.at_end:
            try:
                end()
            except KeyboardInterrupt:
                raise
            except BaseException as error:
                outcome = replies.LOCAL_ERROR
                if self._at_end_failed is not None:
                    self._at_end_failed(command, error)
        return outcome

    def _reply(self, reply: Reply) -> None:
        self.output.append(self._encoded(reply))

    def _encoded(self, reply: Reply) -> bytes:
        """The bytes of a reply that is sent now."""
        self._tally.replies[reply.code] += 1
        return reply.data if self._enhanced else reply.plain


# The reply to a command that depends on a rejected sender or recipient.
_CONSEQUENCES = frozenset({replies.NEED_MAIL, replies.NEED_RCPT})
_BETWEEN_COMMANDS = (states.READY, states.MAIL, states.RCPT)
# Replies that end the dialogue.
_FINAL = frozenset({replies.BYE, replies.NOT_SMTP, replies.TOO_MANY_ERRORS})


_Handler = Callable[[Protocol, bytes], Event | Reply | None]
_COMMANDS: dict[bytes, _Handler] = {
    b"HELO": Protocol._helo,
    b"LHLO": Protocol._lhlo,
    b"AUTH": Protocol._auth,
    b"BDAT": Protocol._bdat,
    b"EXPN": Protocol._expn,
    b"EHLO": Protocol._ehlo,
    b"MAIL": Protocol._mail,
    b"RCPT": Protocol._rcpt,
    b"DATA": Protocol._data,
    b"RSET": Protocol._rset,
    b"NOOP": Protocol._noop,
    b"VRFY": Protocol._vrfy,
    b"HELP": Protocol._help,
    b"QUIT": Protocol._quit,
    b"STARTTLS": Protocol._starttls,
    b"XCLIENT": Protocol._xclient,
    b"XFORWARD": Protocol._xforward,
}
