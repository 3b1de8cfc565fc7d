"""A Protocol, and an application behind it that decides by the words it is given: ``no``, ``later``, ``bye``, else yes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from fumi_core.smtp import options as _options
from fumi_core.smtp import replies
from fumi_core.smtp.events import (
    Auth,
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
from fumi_core.smtp.lines import MAX_AUTH_LINE_BYTES
from fumi_core.smtp.options import Options
from fumi_core.smtp.protocol import Protocol
from fumi_core.smtp.replies import Reply
from fumi_core.smtp.session import Session
from fumi_core.smtp.states import State
from fumi_core.smtp.tally import Tally

HANDLER = b"handler:"
NO, LATER, BYE = Reply(550, "handler: no", "5.7.1"), Reply(450, "handler: later", "4.7.1"), Reply(421, "handler: bye", "4.7.0")
_DECISIONS = {"no": NO, "later": LATER, "bye": BYE}


class Setting:
    """Options, and what else a server is to a client."""

    def __init__(self, name: str, secure: bool = False, auth: bool = False, decides: bool = True, **options: Any) -> None:
        self.name = name
        self.decides = decides
        """Whether the application decides about MAIL and RCPT."""
        self.secure = secure
        self.auth = auth
        self.options: Options = _options.read({"auth_optional": True, "name": "mx.example", "max_errors": 50, **options})
        self.greetings = Greetings(self.options)
        self.tally = Tally()
        self.greeting = b"LHLO x\r\n" if self.options.lmtp else b"EHLO x\r\n"
        """How a client begins that means it."""
        if not self.options.auth_optional:
            self.greeting += b"AUTH PLAIN AGpvZQBzZWNyZXQ=\r\n"

    def __repr__(self) -> str:
        return self.name


METHODS = ("PLAIN", "LOGIN", "CRAM-MD5", "XOAUTH2")
SETTINGS = (
    Setting("plain"),
    Setting("normalizing", bare_newlines="normalize"),
    Setting("lmtp", lmtp=True),
    Setting("accepting", decides=False),
    Setting("lmtp accepting", decides=False, lmtp=True, max_recipients=2),
    Setting("small", size=20, max_recipients=2),
    Setting("strict", max_errors=2, hide_enhancedstatuscodes=True),
    Setting("bare", hide_chunking=True, hide_dsn=True, hide_smtputf8=True, disabled_commands=("VRFY", "HELP")),
    Setting("knowing", auth=True, auth_methods=METHODS, allow_insecure_auth=True),
    Setting("asking", auth=True, auth_methods=METHODS, auth_optional=False, secure=True, max_unauthenticated_commands=5),
    Setting("requiring", auth=True, require_tls=True),
    Setting("secure", secure=True, bare_newlines="normalize", lmtp=True, size=40),
)


@dataclass(slots=True)
class Heard:
    """What came of it: the ``output``; the ``events``, each with its kind, the octets of output before it and a text; the end."""

    output: bytes
    events: list[tuple[str, int, object]]
    closed: bool

    def is_like(self, other: Heard) -> bool:
        """Whether both are the same; but how much of a broken message came through before it broke depends on the packets."""
        return self == other or self._without_broken_texts() == other._without_broken_texts()

    def _without_broken_texts(self) -> Heard:
        return replace(self, events=[(kind, at, None if kind == "broken" else text) for kind, at, text in self.events])


class Conversation:
    """One connection, fed piece by piece."""

    def __init__(self, setting: Setting) -> None:
        self.session = session = Session("1", "mx.example")
        session.secure = setting.secure
        self.protocol = Protocol(
            session,
            setting.options,
            setting.greetings,
            setting.tally,
            authenticates=setting.auth,
            decides_mail=setting.decides,
            decides_rcpt=setting.decides,
        )
        self.lmtp = setting.options.lmtp
        self.output: list[bytes] = []
        self.length = 0
        self.events: list[tuple[str, int, object]] = []
        self.text: list[bytes] | None = None
        self.exceeded = False
        assert type(self.protocol.pending) is Connect
        self.protocol.accept()
        self._pump(0)

    def hear(self, piece: bytes) -> None:
        """Feed a piece, and answer all that comes of it."""
        reply = self.protocol.answer(piece)
        if reply is None:
            self._pump(len(piece))
        else:
            self._hear_reply(reply)
        assert self.protocol.buffered <= MAX_AUTH_LINE_BYTES or self.protocol.state is State.CLOSED, (
            f"{self.protocol.buffered} octets wait"
        )

    def end(self) -> Heard:
        """Nothing more comes."""
        if self.text is not None:
            self._note("unfinished", b"".join(self.text))
        closed = self.protocol.state is State.CLOSED
        if closed:
            waiting = self.protocol.buffered
            self.protocol.receive(b"RSET\r\nNOOP\r\n")
            assert self.protocol.next_event() is None, "a closed protocol has an event"
            assert self.protocol.take_output() == b"", "a closed protocol speaks"
            assert self.protocol.buffered == waiting, "a closed protocol collects"
        return Heard(b"".join(self.output), self.events, closed)

    def _pump(self, octets: int) -> None:
        protocol = self.protocol
        for _ in range(4 * (octets + self.length) + 50):
            event = protocol.next_event()
            self._hear_reply(protocol.take_output())
            if event is not None:
                self._decide(event)
            elif not protocol.throttled:
                assert protocol.pending is None, "an event waits that nobody was told of"
                return
        raise AssertionError("it goes on and on")

    def _hear_reply(self, output: bytes) -> None:
        self.output.append(output)
        self.length += len(output)

    def _note(self, kind: str, text: object = None) -> None:
        self.events.append((kind, self.length, text))

    def _decide(self, event: Event) -> None:
        kind = type(event)
        if kind is MessageData:
            assert self.text is not None, "text of no message"
            self.text.append(event.text)  # type: ignore[union-attr]
        elif kind is MessageStart:
            assert self.text is None, "a message inside a message"
            self.text, self.exceeded = [], False
            self._note("start")
        elif kind is MessageExcess:
            self.exceeded = True
        elif kind is ChunkEnd:
            self._answer(replies.SIZE_EXCEEDED if self.exceeded else None)
        elif isinstance(event, Mail | Rcpt):
            self._note("mail" if kind is Mail else "rcpt", event.address)
            self._answer(_DECISIONS.get(event.address.address.partition("@")[0]))
        elif isinstance(event, MessageEnd | MessageBroken):
            assert self.text is not None, "the end of no message"
            text, self.text = b"".join(self.text), None
            self._note("end" if kind is MessageEnd else "broken", text)
            self._end_message(event, text)
        elif isinstance(event, Auth):
            self._authenticate(event.credentials.username)

    def _answer(self, refusal: Reply | None) -> None:
        if refusal is None:
            self.protocol.accept()
        else:
            self.protocol.refuse(refusal)

    def _authenticate(self, user: str) -> None:
        self._note("auth", user)
        if user == "joe":
            self.session.user = user
            self.protocol.accept()
        else:
            self.protocol.refuse(BYE if user == "bye" else replies.AUTH_FAILED)

    def _end_message(self, event: Event, text: bytes) -> None:
        if type(event) is MessageEnd:
            answer = replies.SIZE_EXCEEDED if self.exceeded else NO if b"no" in text else BYE if b"bye" in text else replies.OK
            self.protocol.settle([answer] * (len(self.session.envelope.rcpt_to) if self.lmtp else 1))
        elif self.protocol.pending is event:
            self.protocol.accept()


def converse(setting: Setting, pieces: list[bytes]) -> Heard:
    """All that comes of these pieces."""
    conversation = Conversation(setting)
    for piece in pieces:
        conversation.hear(piece)
    return conversation.end()
