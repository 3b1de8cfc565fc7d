"""The STARTTLS preamble between random clients and a backend of few words, against a model that is told everything at once."""

from __future__ import annotations

import re
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

from fumi_edge.connection import starttls
from fumi_edge.connection.starttls import LINE_LIMIT, Preamble, Step, Verdict

from . import campaign, speech

OCTETWISE = 1000
"""Octets up to which an input is also fed octet by octet."""

BEFORE_TLS = (b"EHLO", b"HELO", b"NOOP", b"RSET", b"HELP", b"QUIT")
BINARY = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\xff]")
HTTP = re.compile(rb"(?:GET|POST|PUT|HEAD|DELETE|OPTIONS|PATCH|CONNECT|TRACE|PRI) ", re.IGNORECASE)
CHUNK = re.compile(rb"BDAT (\d{1,18})( LAST)?\r\n", re.IGNORECASE)
BANNER = b"220-mx\r\n220 mx\r\n"
LISTS = (
    b"250 mx\r\n",
    b"250 STARTTLS\r\n",
    b"250-mx\r\n250-AUTH PLAIN LOGIN\r\n250-AUTH=LOGIN\r\n250 SIZE\r\n",
    b"250-mx\r\n250-STARTTLS\r\n250 SIZE\r\n",
    b"501 no\r\n",
)


def verb_of(line: bytes) -> bytes:
    return re.split(rb"[ \t\r\n]", line)[0].upper()


def backend(line: bytes) -> bytes:
    """What the backend answers to a line: always the same to the same."""
    verb = verb_of(line)
    if verb in (b"EHLO", b"LHLO"):
        return LISTS[len(line) % len(LISTS)]
    if verb in (b"DATA", b"AUTH"):
        return (b"354 go on\r\n", b"503-not\r\n503 now\r\n")[len(line) % 2]
    return after(line)


def after(content: bytes) -> bytes:
    """What the backend answers to what is whole, a line or a message."""
    return (b"250 ok\r\n", b"250-it is\r\n250 ok\r\n", b"500 what\r\n")[len(content) % 3]


def content_of(line: bytes, reply: bytes, rest: bytes) -> tuple[bytes, bool] | None:
    """What of ``rest`` belongs to a command and is none itself, and whether that is all of it; None where there is none."""
    verb = verb_of(line)
    if chunk := CHUNK.fullmatch(line):
        return rest[: int(chunk[1])], len(rest) >= int(chunk[1])
    if reply[:1] != b"3":
        return None
    if verb == b"DATA":
        end = (b"\r\n" + rest).find(b"\r\n.\r\n")
        return (rest, False) if end < 0 else (rest[: end + 3], True)
    end = rest.find(b"\n") + 1
    return rest[:end] if end else rest, bool(end)


class Server:
    """The backend, fed piece by piece."""

    def __init__(self) -> None:
        self._heard = b""
        self._line = b""

    def hear(self, said: bytes) -> bytes:
        """The answers to what was said."""
        self._heard += said
        answers = b""
        while True:
            if not self._line:
                end = self._heard.find(b"\n") + 1
                if not end:
                    return answers
                self._line, self._heard = self._heard[:end], self._heard[end:]
                if not CHUNK.fullmatch(self._line):
                    answers += backend(self._line)
            content = content_of(self._line, b"" if CHUNK.fullmatch(self._line) else backend(self._line), self._heard)
            if content is not None:
                if not content[1]:
                    return answers
                answers += after(content[0])
                self._heard = self._heard[len(content[0]) :]
            self._line = b""


def offered(reply: bytes, hide: bool, require_tls: bool) -> bytes:
    """EHLO's reply as the client gets it."""
    name, *words = [line[4:] for line in reply.splitlines()]
    words = [word for word in words if not (hide and word == b"STARTTLS") and not (require_tls and word[:4] == b"AUTH")]
    if not hide and b"STARTTLS" not in words:
        words.append(b"STARTTLS")
    words.insert(0, name)
    return b"".join(b"250%b%b\r\n" % (b" " if at == len(words) - 1 else b"-", word) for at, word in enumerate(words))


class Outcome(NamedTuple):
    """What the client and the backend got, the verdict, and how much of what the client said was looked at by then."""

    client: bytes
    forwarded: bytes
    verdict: Verdict | None = None
    taken: int = 0


@dataclass(frozen=True)
class Dialogue(campaign.Case):
    """What a client says before TLS, to an edge that insists on it or does not."""

    require_tls: bool
    hide: bool

    def check(self) -> None:
        if any(len(line) >= LINE_LIMIT and verb_of(line) in (b"AUTH", b"BDAT") for line in self.data.split(b"\n")):
            return  # the backend judges it, before or after it is whole
        chance = Random(self.cut)
        expected = self._expected()
        octets = [speech.octets(self.data)] if self.cut % 4 == 0 and len(self.data) < OCTETWISE else []
        for pieces in ([self.data], speech.cut(chance, self.data), *octets):
            got = self._relay(pieces, chance)
            if got.verdict is Verdict.INJECTION and got.taken > expected.taken:
                # What comes together with STARTTLS is found out, and nobody looks at what comes later.
                got = Outcome(got.client.removesuffix(starttls.INJECTED), got.forwarded, Verdict.UPGRADE, expected.taken)
            assert got == expected, f"in {len(pieces)} pieces: {got} instead of {expected}"

    def _relay(self, pieces: list[bytes], chance: Random) -> Outcome:
        preamble = Preamble(self.require_tls, self.hide)
        client = forwarded = b""
        waiting = [b"", *pieces]
        answer = BANNER
        server = Server()
        while waiting:
            if preamble.wants_client:
                step = preamble.receive_from_client(waiting.pop(0))
            else:
                said, answer = _some(chance, answer)
                step = preamble.receive_from_backend(said)
            client, forwarded = client + step.client, forwarded + step.backend
            if step.verdict is not None:
                return self._end(step, client, forwarded, waiting)
            answer += server.hear(step.backend)
            waiting = waiting if waiting or preamble.wants_client else [b""]
        return Outcome(client, forwarded)

    def _end(self, step: Step, client: bytes, forwarded: bytes, waiting: list[bytes]) -> Outcome:
        if step.verdict is Verdict.PLAINTEXT:
            forwarded += b"".join(waiting)
        taken = len(self.data) - len(b"".join(waiting)) if step.verdict in (Verdict.UPGRADE, Verdict.INJECTION) else 0
        return Outcome(client, forwarded, step.verdict, taken)

    def _expected(self) -> Outcome:
        client, forwarded, errors, listed = BANNER, b"", 0, False
        rest = self.data
        while line := rest[: rest.find(b"\n") + 1]:
            rest = rest[len(line) :]
            local = self._local(line)
            if isinstance(local, Verdict):
                said = starttls.NOT_SMTP if local is Verdict.NOT_SMTP else b""
                taken = len(self.data) - len(rest) if local is Verdict.UPGRADE else 0
                return Outcome(client + said, forwarded + (line + rest if local is Verdict.PLAINTEXT else b""), local, taken)
            if local:
                errors += 1
                if errors > starttls.MAX_ERRORS:
                    return Outcome(client + starttls.TOO_MANY_ERRORS, forwarded, Verdict.ERRORS)
                client += local
                continue
            chunk = CHUNK.fullmatch(line)
            if verb_of(line) == b"BDAT" and not (chunk and listed):
                return Outcome(client, forwarded + line + rest, Verdict.PLAINTEXT)
            reply = b"" if chunk else backend(line)
            forwarded += line
            lists = verb_of(line) in (b"EHLO", b"LHLO") and reply[:1] == b"2"
            client += offered(reply, self.hide, self.require_tls) if lists else reply
            listed = listed or (lists and not self.hide)
            content = content_of(line, reply, rest)
            if content is not None and not listed:
                return Outcome(client, forwarded + rest, Verdict.PLAINTEXT)
            if content is not None:
                forwarded += content[0]
                if not content[1]:
                    return Outcome(client, forwarded)
                client += after(content[0])
                rest = rest[len(content[0]) :]
        if BINARY.match(rest):
            return Outcome(client + starttls.NOT_SMTP, forwarded, Verdict.NOT_SMTP)
        return Outcome(client, forwarded)

    def _local(self, line: bytes) -> bytes | Verdict:
        """The edge's own answer to a line, b"" where it is the backend's."""
        verb = verb_of(line)
        if BINARY.match(line):
            return Verdict.NOT_SMTP
        if len(line) > LINE_LIMIT:
            return starttls.LINE_TOO_LONG
        if self.require_tls and HTTP.match(line):
            return Verdict.NOT_SMTP
        if verb == b"STARTTLS" and line.endswith(b"\r\n"):
            return Verdict.UPGRADE if not line[8:-2].strip(b" \t") else starttls.NO_ARGUMENT
        if self.require_tls and (verb not in BEFORE_TLS or b"\r" in line.rstrip(b"\r\n")):
            return starttls.MUST_STARTTLS
        return b""


def _some(chance: Random, answer: bytes) -> tuple[bytes, bytes]:
    """The first octets of what the backend says, one at least, and the rest."""
    size = chance.randrange(1, len(answer) + 1)
    return answer[:size], answer[size:]


def dialogue(chance: Random) -> Dialogue:
    said = speech.session(chance, b"EHLO x\r\n")
    if chance.random() < 0.5:
        said = speech.bent(
            chance, said.replace(b"MAIL FROM", chance.choice((b"STARTTLS\r\nMAIL FROM", b"STARTTLS", b"MAIL FROM")), 1)
        )
    return Dialogue(said, chance.randrange(1 << 30), chance.random() < 0.3, chance.random() < 0.3)


def test_the_preamble_relays_as_the_model_says_however_it_is_cut() -> None:
    campaign.run("preamble", 10, dialogue)
