"""The SMTP state machine (RFC 5321 §3 and §4), sans-IO: bytes in, events and replies out.

Theory of operation. ``receive()`` takes bytes; ``next_event()`` works through them, one command after the other, appends
replies to the output and stops at what the application has to decide: ``Connect`` (pending from the start), ``Mail``,
``Rcpt``, ``MessageEnd``. Each is pending until ``accept()`` or ``refuse()``; nothing behind it is looked at before, so replies
are in order however the client pipelines. ``MessageStart`` and ``MessageData`` tell, and wait for nothing. Everything else is
answered here. Which command may come when is data: ``ORDER``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from enum import Enum

from fumi_core import grammar, replies
from fumi_core.data import BareNewline, DotReader
from fumi_core.greetings import Greetings
from fumi_core.options import Options
from fumi_core.replies import Reply
from fumi_core.session import Address, Envelope, Session

MAX_LINE = 4096  # octets of a command line, CRLF included; RFC 5321 §4.5.3.1.4 wants 512 and more with extensions


class State(Enum):
    START = "start"  # greeted, not introduced
    READY = "ready"  # introduced, no transaction
    MAIL = "mail"  # a reverse-path
    RCPT = "rcpt"  # and a forward-path
    DATA = "data"  # the message is arriving
    CLOSED = "closed"


# The reply to a verb that comes in the wrong state; in every other state it is allowed.
ORDER: dict[bytes, dict[State, Reply]] = {
    b"MAIL": {State.START: replies.HELO_FIRST, State.MAIL: replies.NESTED_MAIL, State.RCPT: replies.NESTED_MAIL},
    b"RCPT": {State.START: replies.HELO_FIRST, State.READY: replies.NEED_MAIL},
    b"DATA": {State.START: replies.HELO_FIRST, State.READY: replies.NEED_MAIL, State.MAIL: replies.NEED_RCPT},
}


class Connect:
    """A client wants to be greeted."""

    __slots__ = ()


class Mail:
    """MAIL wants to begin a transaction."""

    __slots__ = ("address",)

    def __init__(self, address: Address) -> None:
        self.address = address


class Rcpt:
    """RCPT wants to add a recipient."""

    __slots__ = ("address",)

    def __init__(self, address: Address) -> None:
        self.address = address


class MessageStart:
    """DATA was accepted; the message follows."""

    __slots__ = ()


class MessageData:
    """A piece of the message's text."""

    __slots__ = ("text",)

    def __init__(self, text: bytes) -> None:
        self.text = text


class MessageEnd:
    """The message is whole and wants its reply."""

    __slots__ = ()


class MessageBroken:
    """The message will never be whole: its framing was refused. The connection is closing."""

    __slots__ = ()


Event = Connect | Mail | Rcpt | MessageStart | MessageData | MessageEnd | MessageBroken
_MESSAGE_START, _MESSAGE_END, _MESSAGE_BROKEN = MessageStart(), MessageEnd(), MessageBroken()


class Tally:
    """How many commands and replies there were, shared by all connections of a server. Keys are closed sets."""

    __slots__ = ("commands", "replies")

    def __init__(self) -> None:
        self.commands: dict[bytes, int] = dict.fromkeys([*_COMMANDS, b"OTHER"], 0)
        self.replies: dict[int, int] = {}


class Protocol:
    """One connection's dialogue. ``session`` is kept up to date with what the client says."""

    def __init__(self, session: Session, options: Options, greetings: Greetings, tally: Tally) -> None:
        self.session = session
        self.state = State.START
        self.pending: Event | None = Connect()
        """The event that waits for ``accept()`` or ``refuse()``."""
        self.quit = False
        """The client said goodbye."""
        self._options = options
        self._greetings = greetings
        self._tally = tally
        self._enhanced = not options.hide_enhancedstatuscodes
        self._input = b""
        self._at = 0
        self._too_long = False
        self._reader: DotReader | None = None
        self._output: list[bytes] = []
        self._recognized = False
        self._errors = 0
        self._unauthenticated = 0

    # What comes in and goes out

    def receive(self, data: bytes) -> None:
        """Take bytes from the client; ``next_event()`` looks at them."""
        if self.state is State.CLOSED:
            return
        self._input = self._input[self._at :] + data if self._at < len(self._input) else data
        self._at = 0

    @property
    def buffered(self) -> int:
        """Bytes received and not yet looked at."""
        return len(self._input) - self._at

    def take_output(self) -> bytes:
        """The replies since the last call, to be sent in this order."""
        output, self._output = self._output, []
        return output[0] if len(output) == 1 else b"".join(output)

    def next_event(self) -> Event | None:
        """Go on until the application is concerned; None when more bytes, or an answer, are needed first."""
        while self.pending is None and self.state is not State.CLOSED:
            if self._reader is not None:
                return self._read_message(self._reader)
            line = self._read_line()
            if line is None:
                return None
            event = self._command(line)
            if event is not None:
                return event
        return None

    # The application's answers

    def accept(self, reply: Reply | None = None) -> None:
        """Say yes to the pending event."""
        event, self.pending = self.pending, None
        envelope = self.session.envelope
        if type(event) is Rcpt:
            envelope.rcpt_to = [each for each in envelope.rcpt_to if each.address != event.address.address]
            envelope.rcpt_to.append(event.address)
            self.state = State.RCPT
            self._reply(reply or replies.RECIPIENT_OK)
        elif type(event) is Mail:
            envelope.mail_from = event.address
            self.state = State.MAIL
            self._reply(reply or replies.SENDER_OK)
        elif type(event) is MessageEnd:
            self._reset()
            self._reply(reply or replies.OK)
        elif type(event) is Connect:
            self._reply(reply or self._greetings.banner)

    def refuse(self, reply: Reply) -> None:
        """Say no to the pending event. A 421 closes the connection (RFC 5321 §3.8), and so does a refused banner."""
        event, self.pending = self.pending, None
        if type(event) is Mail or type(event) is MessageEnd:
            self._reset()
        self._reply(reply)
        if reply.code == 421 or type(event) is Connect:
            self.state = State.CLOSED

    def close(self, reply: Reply) -> None:
        """End the dialogue with this reply; what the client still sends is not looked at."""
        if self.state is not State.CLOSED:
            self._reply(reply)
            self.abandon()

    def abandon(self) -> None:
        """End the dialogue without a word: there is nobody to hear it."""
        self.pending = None
        self.state = State.CLOSED

    @property
    def in_transaction(self) -> bool:
        return self.pending is not None or self.state in (State.MAIL, State.RCPT, State.DATA)

    # Lines

    def _read_line(self) -> bytes | None:
        end = self._input.find(b"\n", self._at)
        if end < 0:
            self._wait_for_line()
            return None
        line = self._input[self._at : end + 1]
        self._at = end + 1
        return line

    def _wait_for_line(self) -> None:
        waiting = len(self._input) - self._at
        if waiting > MAX_LINE or self._too_long:
            self._too_long = True
            self._input = b""
            self._at = 0
        elif waiting and not self._recognized and grammar.NOT_TEXT.match(self._input, self._at):
            # A TLS ClientHello has no line end: waiting for one would be waiting for the timeout.
            self.close(replies.NOT_SMTP)

    def _command(self, line: bytes) -> Event | None:
        answer = self._answer(line)
        if answer is None or not isinstance(answer, Reply):
            return answer
        if answer in _FINAL:
            self.close(answer)
        elif answer.code < 500:
            self._reply(answer)
        else:
            self._mistake(answer)
        return None

    def _answer(self, line: bytes) -> Event | Reply | None:
        if self._too_long or len(line) > MAX_LINE:
            self._too_long = False
            return replies.LINE_TOO_LONG
        if line[-2:] != b"\r\n":
            return replies.BARE_NEWLINE_IN_COMMAND
        word, _, argument = line[:-2].partition(b" ")
        verb = word.upper()
        handler = _COMMANDS.get(verb)
        if handler is None:
            self._tally.commands[b"OTHER"] += 1
            return self._not_recognized(line)
        self._tally.commands[verb] += 1
        self._recognized = True
        if verb in self._options.disabled_verbs:
            return replies.NOT_IMPLEMENTED
        if self._authentication_overdue(verb):
            return replies.TOO_MANY_ERRORS
        refusal = ORDER.get(verb, _ALWAYS).get(self.state)
        return refusal or handler(self, argument)

    def _not_recognized(self, line: bytes) -> Reply | None:
        """Not a command. Another protocol altogether ends the dialogue, so that nobody can be made to speak SMTP by it."""
        if grammar.HTTP_REQUEST.match(line) or (not self._recognized and grammar.NOT_TEXT.search(line[:-2])):
            return replies.NOT_SMTP
        return replies.NOT_RECOGNIZED

    def _mistake(self, reply: Reply) -> None:
        """Answer a client's mistake, or close at one too many."""
        self._errors += 1
        if self._errors > self._options.max_errors:
            self.close(replies.TOO_MANY_ERRORS)
        else:
            self._reply(reply)

    def _authentication_overdue(self, verb: bytes) -> bool:
        if self._options.auth_optional or self.session.user is not None or verb in (b"AUTH", b"QUIT"):
            return False
        self._unauthenticated += 1
        return self._unauthenticated > self._options.max_unauthenticated_commands

    # Commands: each answers with a reply, or with the event that asks for one

    def _helo(self, argument: bytes) -> Reply:
        if not self._introduce("HELO", argument):
            return replies.SYNTAX_HELO
        return self._greetings.helo

    def _ehlo(self, argument: bytes) -> Reply:
        if not self._introduce("EHLO", argument):
            return replies.SYNTAX_EHLO
        return self._greetings.ehlo(self.session.secure)

    def _introduce(self, verb: str, argument: bytes) -> bool:
        hostname = (_text(argument) or "").strip()
        if not grammar.CLIENT_HOSTNAME.fullmatch(hostname):
            return False
        self.session.client_hostname = hostname
        self.session.opening_command = verb
        self._reset()
        return True

    def _mail(self, argument: bytes) -> Event | Reply:
        if self._options.require_tls and not self.session.secure:
            return replies.MUST_STARTTLS
        if not self._options.auth_optional and self.session.user is None:
            return replies.AUTHENTICATION_REQUIRED
        path = _path(grammar.MAIL_ARGUMENT, argument)
        if path is None:
            return replies.BAD_SENDER if _has_path(argument) else replies.SYNTAX_MAIL
        envelope = Envelope()
        refusal = self._read_mail_parameters(envelope, path.parameters) if path.parameters else None
        if refusal is not None:
            return refusal
        self.session.envelope = envelope
        self.session.transaction += 1
        self.pending = event = Mail(Address(path.address, path.parameters))
        return event

    def _read_mail_parameters(self, envelope: Envelope, parameters: dict[str, str | bool]) -> Reply | None:
        for keyword, value in parameters.items():
            read = _MAIL_PARAMETERS.get(keyword)
            refusal = read(self, envelope, value) if read else replies.UNSUPPORTED_PARAMETER
            if refusal is not None:
                return refusal
        return None

    def _size_parameter(self, envelope: Envelope, value: str | bool) -> Reply | None:
        """SIZE (RFC 1870 §6)."""
        if value is True or not str(value).isascii() or not str(value).isdigit() or len(str(value)) > 20:
            return replies.SYNTAX_SIZE
        if self._options.size is not None and int(value) > self._options.size:
            return replies.SIZE_DECLARED
        return None

    def _body_parameter(self, envelope: Envelope, value: str | bool) -> Reply | None:
        """BODY (RFC 6152)."""
        body = str(value).upper()
        if body not in ("7BIT", "8BITMIME"):
            return replies.SYNTAX_MAIL if value is True else replies.UNSUPPORTED_PARAMETER
        envelope.body = body
        return None

    def _rcpt(self, argument: bytes) -> Event | Reply:
        path = _path(grammar.RCPT_ARGUMENT, argument)
        if path is None:
            return replies.BAD_RECIPIENT if _has_path(argument) else replies.SYNTAX_RCPT
        if path.parameters:
            return replies.UNSUPPORTED_PARAMETER
        if len(self.session.envelope.rcpt_to) >= self._options.max_recipients:
            return replies.TOO_MANY_RECIPIENTS
        self.pending = event = Rcpt(Address(path.address, path.parameters))
        return event

    def _data(self, argument: bytes) -> Event | Reply:
        if argument:
            return replies.SYNTAX_NO_ARGUMENT
        self.state = State.DATA
        self._reader = DotReader(self._options.bare_newlines)
        self._reply(replies.START_DATA)
        return _MESSAGE_START

    def _rset(self, argument: bytes) -> Reply:
        if argument:
            return replies.SYNTAX_NO_ARGUMENT
        if self.state is not State.START:
            self._reset()
        return replies.OK

    def _noop(self, argument: bytes) -> Reply:
        return replies.OK

    def _vrfy(self, argument: bytes) -> Reply:
        return replies.CANNOT_VERIFY if argument else replies.SYNTAX_VRFY

    def _help(self, argument: bytes) -> Reply:
        return replies.HELP

    def _starttls(self, argument: bytes) -> Reply:
        return replies.ALREADY_TLS if self.session.secure else replies.NOT_IMPLEMENTED

    def _quit(self, argument: bytes) -> Reply | None:
        if argument:
            return replies.SYNTAX_NO_ARGUMENT
        self.quit = True
        return replies.BYE

    # The message

    def _read_message(self, reader: DotReader) -> Event | None:
        if reader.rest is not None:
            self._reader = None
            self._input, self._at = reader.rest, 0
            self.pending = _MESSAGE_END
            return _MESSAGE_END
        data = self._input[self._at :] if self._at else self._input
        self._input, self._at = b"", 0
        if not data:
            return None
        try:
            text = reader.feed(data)
        except BareNewline:
            self._reader = None
            self.close(replies.BARE_NEWLINE)
            return _MESSAGE_BROKEN
        return MessageData(text) if text else self.next_event()

    # State

    def _reset(self) -> None:
        """No transaction: RSET, EHLO, the end of a message, a refused MAIL (RFC 5321 §4.1.1.5)."""
        self.session.envelope = Envelope()
        self.state = State.READY

    def _reply(self, reply: Reply) -> None:
        self._output.append(reply.data if self._enhanced else reply.plain)
        counts = self._tally.replies
        counts[reply.code] = counts.get(reply.code, 0) + 1


# The answers that end the dialogue.
_FINAL = frozenset({replies.BYE, replies.NOT_SMTP, replies.TOO_MANY_ERRORS})


def _text(argument: bytes) -> str | None:
    try:
        return argument.decode()
    except UnicodeDecodeError:
        return None


def _path(pattern: re.Pattern[str], argument: bytes) -> grammar.Path | None:
    text = _text(argument)
    return None if text is None else grammar.parse_path(pattern, text)


def _has_path(argument: bytes) -> bool:
    """Whether there is something in angle brackets, so that it is the address that is wrong."""
    text = _text(argument)
    return text is not None and grammar.PATH_SHAPE.fullmatch(text) is not None


_ALWAYS: dict[State, Reply] = {}
_Handler = Callable[[Protocol, bytes], Event | Reply | None]
_COMMANDS: dict[bytes, _Handler] = {
    b"HELO": Protocol._helo,
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
}
_Parameter = Callable[[Protocol, Envelope, str | bool], Reply | None]
_MAIL_PARAMETERS: dict[str, _Parameter] = {"SIZE": Protocol._size_parameter, "BODY": Protocol._body_parameter}
