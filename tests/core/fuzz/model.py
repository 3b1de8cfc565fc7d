"""What a server must have said and done: the dialogue read again, from what the client said and what it heard.

The model knows framing (a line, a message, a chunk, a response to AUTH, each with its reply) and the order of commands. What an
address or a parameter looks like it does not know: there it believes the reply's code, and goes on from what that code means.
It shares no code with the server: where a message ends is said in other words here.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple

from .conversing import HANDLER, Heard, Setting

LINE, AUTH_LINE, REPLY_LINE = 4096, 12288, 512
VERBS = frozenset(b"HELO EHLO LHLO MAIL RCPT DATA BDAT RSET NOOP VRFY EXPN HELP QUIT AUTH STARTTLS XCLIENT XFORWARD".split())
REPLY = re.compile(rb"([2345][0-5]\d)([ -])((?:([245])\.\d{1,3}\.\d{1,3} )?[ -~]*)\r\n")
BARE = re.compile(rb"(?<!\r)\n|\r(?=[^\n])")
END = re.compile(rb"(?:\A|(?<=\r\n))\.\r\n")
BDAT = re.compile(rb"\s*(\d{1,20})(?:\s+LAST)?\s*", re.IGNORECASE)
FOREIGN = re.compile(rb"(?:GET|POST|PUT|HEAD|DELETE|OPTIONS|PATCH|CONNECT|TRACE|PRI) ", re.IGNORECASE)
BINARY = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f-\xff]")
BEGINNING = 16
TOO_MANY = b"too many errors"
TOO_LARGE = b"message file too big"
# What follows from an earlier refusal in a pipeline.
NEED = (b"need MAIL command", b"need RCPT command")

ACCEPTED = frozenset({250})
HANDLERS = frozenset({421, 450, 550})
ANSWERS: dict[bytes, frozenset[int]] = {
    b"HELO": frozenset({250, 500, 501}),
    b"EHLO": frozenset({250, 500, 501}),
    b"LHLO": frozenset({250, 500, 501}),
    b"MAIL": frozenset({250, 501, 530, 552, 553, 555}) | HANDLERS,
    b"RCPT": frozenset({250, 452, 501, 553, 555}) | HANDLERS,
    b"DATA": frozenset({354, 501, 503}),
    b"RSET": frozenset({250, 501}),
    b"NOOP": frozenset({250, 500}),
    b"VRFY": frozenset({252, 501}),
    b"EXPN": frozenset({252, 501}),
    b"HELP": frozenset({214, 500}),
    b"QUIT": frozenset({221, 501}),
    b"AUTH": frozenset({235, 334, 501, 503, 504, 530, 535, 538, 421}),
    b"STARTTLS": frozenset({500, 502, 503}),
    b"XCLIENT": frozenset({220, 501, 502, 550, 421}),
    b"XFORWARD": frozenset({250, 501, 502, 550}),
}


class Said(NamedTuple):
    """One reply: its code, whether every line says an enhanced status code, and the words of its last line."""

    code: int
    enhanced: bool
    text: bytes


@lru_cache(1024)
def _reply_line(line: bytes) -> tuple[int, bool, bytes | None, bytes]:
    found = REPLY.fullmatch(line)
    assert found, f"{line!r} is no line of a reply"
    assert len(line) <= REPLY_LINE, f"a reply's line has {len(line)} octets"
    return int(found[1]), found[2] == b"-", found[4], found[3]


def replies_in(output: bytes) -> list[Said]:
    """The replies that make up the output, each well-formed (RFC 5321 §4.2, RFC 2034 §4)."""
    replies, code_of_open = [], 0
    for line in output.splitlines(keepends=True):
        code, more, status, text = _reply_line(line)
        assert code_of_open in (0, code), f"{line!r} goes on with a reply that began with {code_of_open}"
        assert status is None or status == b"%d" % (code // 100), f"{line!r}: the enhanced code is of another class"
        code_of_open = code if more else 0
        if not more:
            replies.append(Said(code, status is not None, text))
    assert code_of_open == 0, "the last reply has no last line"
    return replies


def unstuffed(raw: bytes) -> bytes:
    """The text of what came behind DATA, its end left out."""
    return b"\r\n".join([line[1:] if line[:1] == b"." else line for line in raw.split(b"\r\n")])


def normalized(text: bytes) -> bytes:
    """With CRLF for each CR and each LF that stands alone."""
    return re.sub(rb"\r\n|\r|\n", b"\r\n", text)


class Walk:
    """The way through a dialogue. ``at`` is how far in what the client said."""

    def __init__(self, setting: Setting, said: bytes, heard: Heard) -> None:
        self.setting, self.options = setting, setting.options
        self.said, self.at = said, 0
        self.heard = heard
        self.replies = replies_in(heard.output)
        self.next = 0
        self.events = [event for event in heard.events if event[0] != "auth"]
        self.next_event = 0
        self.greeted = self.sender = self.exchange = self.recognized = self.user = self.closed = False
        self.binary = False
        self.recipients = 0
        self.chunks: bytes | None = None
        self.declared = 0
        self.errors = self.unauthenticated = 0
        self.failed = self.excused = 0

    # What was heard

    def reply(self, among: frozenset[int] | set[int], to: bytes) -> Said:
        """The next reply. It must have one of these codes, or be the 421 that one mistake too many has earned."""
        assert self.next < len(self.replies), f"no reply to {to[:80]!r}"
        said = self.replies[self.next]
        self.next += 1
        handlers = HANDLER in said.text
        if said.code == 421 and TOO_MANY in said.text:
            assert self.errors == self.options.max_errors, f"421 to {to[:80]!r} after {self.errors} errors"
            assert any(code >= 500 for code in among), f"421 to {to[:80]!r}, which was no mistake"
            self.closed = True
            return said
        assert said.code in among, f"{said} to {to[:80]!r}, not one of {sorted(among)}"
        if said.code >= 500 and not handlers and TOO_LARGE not in said.text and not self._excuses(said):
            self.errors += 1
            # 554 and 550 end it whatever the count.
            assert self.errors <= self.options.max_errors or said.code in (554, 550), f"{self.errors} errors and no 421"
        self.closed = said.code in (221, 421, 554)
        if handlers:
            self.closed = said.code == 421
        self._look_at_status(said, to)
        return said

    def _excuses(self, said: Said) -> bool:
        """Whether this is no mistake of the client: it could not know yet of a refusal."""
        excused = self.excused > 0 and said.text.endswith(NEED)
        self.excused -= excused
        return excused

    def _look_at_status(self, said: Said, to: bytes) -> None:
        without = said.code in (220, 334, 354) or (said.code == 250 and to[1:4].upper() in (b"HLO", b"ELO"))
        wanted = not without and not self.options.hide_enhancedstatuscodes
        assert said.enhanced is wanted, f"{said} to {to[:80]!r}: an enhanced status code, or none, where the other was due"

    def event(self, *kinds: str) -> tuple[str, int, object]:
        """The next event, of one of these kinds."""
        assert self.next_event < len(self.events), f"no event {kinds}"
        event = self.events[self.next_event]
        self.next_event += 1
        assert event[0] in kinds, f"{event} instead of {kinds}"
        return event

    # What was said

    def run(self) -> None:
        """Walk to the end. AssertionError where the server went another way."""
        self.reply({220}, b"the connection")
        while not self.closed and self._step():
            pass
        if not self.closed and self.next < len(self.replies):
            self._unfinished()
        if self.chunks is not None:
            unfinished = self.event("unfinished")
            assert self._text(self.chunks).startswith(unfinished[2])  # type: ignore[arg-type]
        assert self.next == len(self.replies), f"replies that nothing asked for: {self.replies[self.next :]}"
        assert self.next_event == len(self.events), f"events that nothing led to: {self.events[self.next_event :]}"
        assert self.heard.closed is self.closed, f"closed: {self.heard.closed} instead of {self.closed}"
        authenticated = sum(event[0] == "auth" and event[2] == "joe" for event in self.heard.events)
        assert authenticated == sum(reply.code == 235 for reply in self.replies), (
            "somebody was let in, and not told, or not let in"
        )

    def _step(self) -> bool:
        """One line and what belongs to it; False when it is not whole."""
        end = self.said.find(b"\n", self.at) + 1
        if end == 0:
            return False
        line, self.at = self.said[self.at : end], end
        if len(line) > (AUTH_LINE if self.exchange or line[:5].upper() == b"AUTH " else LINE):
            self.exchange = False
            self._refused(line[:BEGINNING], 500)
            return True
        if self.exchange:
            self._respond(line)
            return True
        return self._command(line)

    def _unfinished(self) -> None:
        """Something that is not SMTP need not be a whole line to be told so."""
        rest = self.said[self.at :]
        assert rest, "a reply to nothing"
        assert self._foreign(rest[:BEGINNING]), f"a reply to the beginning of {rest[:80]!r}"
        self.reply({554}, rest)

    def _foreign(self, line: bytes) -> bool:
        return FOREIGN.match(line) is not None or (
            not self.recognized and line.split(b" ")[0].upper() not in VERBS and BINARY.search(line.rstrip(b"\r\n")) is not None
        )

    def _refused(self, line: bytes, code: int) -> None:
        """No command at all: this code, or 554 and the end."""
        if not self.exchange and self._foreign(line):
            assert self.reply({554}, line).code == 554 or self.closed
        else:
            self.reply({code}, line)

    def _command(self, line: bytes) -> bool:
        verb, _, argument = line.removesuffix(b"\r\n").rstrip(b" ").partition(b" ")
        verb = verb.upper()
        if not line.endswith(b"\r\n") or verb not in VERBS:
            self._refused(line, 500)
            return True
        self.recognized = True
        if verb.decode() in self.options.disabled_commands:
            self.reply({502}, line)
        elif self._overdue(verb):
            self.errors = self.options.max_errors
            self.reply({500}, line)
            assert self.closed, "no 421 to one command too many"
        elif verb == b"BDAT":
            return self._bdat(line, argument)
        elif self._out_of_order(verb):
            self.reply({503}, line)
        elif verb == b"DATA":
            return self._data(line)
        else:
            self._apply(verb, self.reply(ANSWERS[verb], line), line)
        return True

    def _overdue(self, verb: bytes) -> bool:
        if self.options.auth_optional or self.user or verb in (b"AUTH", b"QUIT"):
            return False
        self.unauthenticated += 1
        return self.unauthenticated > self.options.max_unauthenticated_commands

    def _out_of_order(self, verb: bytes) -> bool:
        chunks = self.chunks is not None
        if verb == b"MAIL":
            return not self.greeted or self.sender
        if verb == b"RCPT":
            return not self.sender or chunks
        if verb == b"DATA":
            return not self.recipients or chunks
        if verb in (b"XCLIENT", b"XFORWARD"):
            return bool(self.sender)
        return verb == b"AUTH" and (not self.greeted or self.sender)

    def _apply(self, verb: bytes, said: Said, line: bytes) -> None:
        """What this reply to this command means for what may follow."""
        handlers = HANDLER in said.text
        if self.setting.decides and verb in (b"MAIL", b"RCPT") and (handlers or said.code == 250):
            self.event(verb.decode().lower())
        if verb in (b"MAIL", b"RCPT") and said.code >= 400 and said.code != 452:
            self.excused = self.options.max_recipients + 1
        if verb == b"MAIL" and said.code == 250:
            self.sender = True
            self.excused = 0
            self.binary = b"BODY=BINARYMIME" in line.upper()
        elif verb == b"RCPT" and said.code == 250:
            self.recipients += 1
        elif verb in (b"HELO", b"EHLO", b"LHLO", b"RSET") and said.code == 250:
            self.greeted = self.greeted or verb != b"RSET"
            self._forget()
        elif verb == b"AUTH":
            self._authenticated(said)

    def _forget(self) -> None:
        """The transaction is over."""
        if self.chunks is not None:
            broken = self.event("broken")
            assert self._text(self.chunks).startswith(broken[2])  # type: ignore[arg-type]
        self._over()

    def _over(self) -> None:
        self.sender, self.recipients, self.chunks = False, 0, None
        self.failed = self.excused = 0

    def _respond(self, line: bytes) -> None:
        self.exchange = False
        said = self.reply({235, 334, 501, 535, 421}, line)
        assert line != b"*\r\n" or said.code in (501, 535, 421), f"{said} to giving up"
        self._authenticated(said)

    def _authenticated(self, said: Said) -> None:
        self.exchange = said.code == 334
        self.user = self.user or said.code == 235

    # Messages

    def _data(self, line: bytes) -> bool:
        said = self.reply(ANSWERS[b"DATA"], line)
        if said.code != 354:
            assert said.code != 503 or self.binary, "503 to DATA in its place"
            return True
        assert not self.binary, "354 to DATA for BINARYMIME"
        self.event("start")
        raw = self.said[self.at :]
        found = END.search(raw)
        text = raw[: found.start()] if found else raw
        if self._bare(text):
            return True
        if not found:
            unfinished = self.event("unfinished")
            assert self._text(unstuffed(text)).startswith(unfinished[2])  # type: ignore[arg-type]
            self.at = len(self.said)
            return False
        self.at += found.end()
        self._delivered(unstuffed(text), line)
        return True

    def _bare(self, raw: bytes) -> bool:
        """Whether a bare newline ends it all."""
        bare = BARE.search(raw) if self.options.bare_newlines == "reject" and not self.binary else None
        if bare is None:
            return False
        broken = self.event("broken")
        text = raw[: bare.start()]
        assert text.startswith(broken[2]) or unstuffed(text).startswith(broken[2])  # type: ignore[arg-type]
        for _ in range(self.recipients if self.options.lmtp else 1):
            assert self.reply({550}, raw).code == 550
        self.closed, self.chunks = True, None
        return True

    def _text(self, raw: bytes) -> bytes:
        return raw if self.binary or self.options.bare_newlines == "reject" else normalized(raw)

    def _delivered(self, text: bytes, line: bytes) -> None:
        """The message is whole: the application has it, as it is, and says its word; in LMTP to each recipient."""
        end = self.event("end")
        assert end[2] == self._text(text), f"the text is {end[2]!r} and not {self._text(text)!r}"
        for _ in range(self.recipients if self.options.lmtp else 1):
            closed = self.closed
            self.reply({250, 550, 421}, b"the end of a message")
            self.closed = self.closed or closed
        self._over()

    def _bdat(self, line: bytes, argument: bytes) -> bool:
        found = BDAT.fullmatch(argument)
        if self.options.hide_chunking or not found:
            self.reply({502 if self.options.hide_chunking else 501}, line)
            return True
        size, last = int(found[1]), b"L" in argument.upper()
        chunk = self.said[self.at : self.at + size]
        self.at += len(chunk)
        if not self.recipients:
            return self._unwanted(chunk, size, last, line)
        if self.chunks is None:
            self.declared = 0
        if self.options.size is not None and self.declared + size > self.options.size:
            return self._excessive(chunk, size, last, line)
        return self._chunk(chunk, size, last, line)

    def _unwanted(self, chunk: bytes, size: int, last: bool, line: bytes) -> bool:
        """No transaction; in LMTP the last chunk of a message that failed is answered for each recipient all the same."""
        failed = self.failed if not self.sender else 0
        if len(chunk) == size:
            for _ in range(failed if failed and last else 1):
                self.reply({552} if failed else {503}, line)
            if failed:
                self.excused -= self.excused > 0
                self.failed = 0 if last else failed
        return len(chunk) == size

    def _excessive(self, chunk: bytes, size: int, last: bool, line: bytes) -> bool:
        """A chunk with which the message is too large is taken, dropped and refused."""
        if self.chunks is None:
            self.event("start")
            self.chunks = b""
        self.declared += size
        if len(chunk) < size:
            return False
        if last:
            end = self.event("end")
            assert self._text(self.chunks).startswith(end[2])  # type: ignore[arg-type]
            for _ in range(self.recipients if self.options.lmtp else 1):
                self.reply({552}, line)
            self._over()
        else:
            self.reply({552}, line)
            recipients = self.recipients
            self._forget()
            self.failed, self.excused = recipients if self.options.lmtp else 0, self.options.max_recipients + 1
        return True

    def _chunk(self, chunk: bytes, size: int, last: bool, line: bytes) -> bool:
        if self.chunks is None:
            self.event("start")
        self.declared += size
        whole = len(chunk) == size
        self.chunks = (self.chunks or b"") + chunk
        # A CR that ends the message is bare; one that ends a chunk waits for the next.
        if self._bare(self.chunks + (b"." if whole and last and self.chunks.endswith(b"\r") else b"")):
            return True
        if whole and last:
            self._delivered(self.chunks, line)
        elif whole:
            self.reply(ACCEPTED, line)
        return whole
