"""Letters, and clients that send them: by DATA or BDAT, to SMTP or LMTP, and to the end or not.

What came of one attempt is, for each recipient, a Verdict. ``UNKNOWN`` is the only one after which a client cannot know whether
the server has the message: its end was sent, and no reply came.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from random import Random
from typing import NamedTuple

TIMEOUT = 20.0
"""Seconds for a reply."""
BANNER = 2.0
"""Seconds for the banner. A connection that is made just when its listener is closed is, once in tens of thousands of times,
neither refused nor reset by Linux; who made it would wait for ever."""
SENDER = "sender@client.example"


class Verdict(Enum):
    TAKEN = "250"
    LATER = "4xx, or no connection"
    REJECTED = "5xx"
    UNKNOWN = "no reply to a whole message"


@dataclass(frozen=True)
class Letter:
    """``text`` begins with a Subject that no other letter has; unless it is binary, each line ends with CRLF."""

    mark: str
    text: bytes
    recipients: tuple[str, ...]


@dataclass(frozen=True)
class Way:
    """How an attempt is made. ``stop`` is what the client does in the middle of it, after ``at`` percent of the message."""

    lmtp: bool = False
    chunks: bool = False
    """By BDAT."""
    binary: bool = False
    """As BINARYMIME, which takes chunks."""
    pipelined: bool = False
    stop: str = ""
    at: int = 0


STOPS = ("reset in the text", "half-close in the text", "reset at the end", "half-close at the end")


def compose(chance: Random, mark: str, recipients: tuple[str, ...], size: int, binary: bool) -> Letter:
    """Lines of what is printable, some of which begin with a dot; or any octets."""
    if binary:
        return Letter(mark, f"Subject: {mark}\r\n\r\n".encode() + chance.randbytes(size), recipients)
    lines = [f"Subject: {mark}".encode(), b""]
    left = size
    while left > 0:
        line = chance.choice((b"", b"", b"", b".", b"..", b".\t")) + chance.randbytes(chance.randrange(1, 36)).hex().encode()
        lines.append(line)
        left -= len(line)
    return Letter(mark, b"\r\n".join(lines) + b"\r\n", recipients)


class Outcome(NamedTuple):
    """What came of an attempt, for each recipient; and whether the server answered EHLO, and so will log a session with it."""

    verdicts: dict[str, Verdict]
    greeted: bool


class Lost(Exception):
    """The connection is gone, or the server closes it."""


def attempt(port: int, letter: Letter, recipients: tuple[str, ...], way: Way, moment: Callable[[], object] = bool) -> Outcome:
    """Send it once, to these. ``moment`` returns when it is time to stop at the end. Never raises for what a server may do."""
    try:
        client = _Client(port)
    except OSError:
        return Outcome(dict.fromkeys(recipients, Verdict.LATER), False)
    with client.sock:
        return _Attempt(client, letter, recipients, way, moment).run()


class _Client:
    def __init__(self, port: int) -> None:
        self.sock = socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._buffer = b""

    def send(self, data: bytes) -> None:
        try:
            self.sock.sendall(data)
        except TimeoutError:
            raise AssertionError("the server does not read") from None
        except OSError:
            raise Lost from None

    def banner(self) -> None:
        """Wait for it. Raises Lost, also when it does not come."""
        self.sock.settimeout(BANNER)
        try:
            self.reply()
        except AssertionError:
            raise Lost from None
        self.sock.settimeout(TIMEOUT)

    def reply(self) -> int:
        """The code of the next reply. Raises Lost, and AssertionError where there is none in time."""
        while True:
            line, found, rest = self._buffer.partition(b"\n")
            if found:
                self._buffer = rest
                if line[3:4] != b"-":
                    return int(line[:3])
                continue
            try:
                data = self.sock.recv(65536)
            except TimeoutError:
                raise AssertionError("the server does not answer") from None
            except OSError:
                data = b""
            if not data:
                raise Lost
            self._buffer += data

    def reset(self) -> None:
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    def half_close(self) -> None:
        try:
            self.sock.shutdown(socket.SHUT_WR)
        except OSError:
            raise Lost from None


class _Attempt:
    def __init__(
        self, client: _Client, letter: Letter, recipients: tuple[str, ...], way: Way, moment: Callable[[], object]
    ) -> None:
        self.client, self.letter, self.way, self.moment = client, letter, way, moment
        self.verdicts = dict.fromkeys(recipients, Verdict.LATER)
        self.unanswered: list[str] = []
        """Recipients whose RCPT was answered 250, and who are owed a reply to the message."""
        self.whole = self.greeted = False

    def run(self) -> Outcome:
        try:
            self._converse()
        except Lost:
            if self.whole:
                self.verdicts |= dict.fromkeys(self.unanswered, Verdict.UNKNOWN)
        return Outcome(self.verdicts, self.greeted)

    def _converse(self) -> None:
        client, way = self.client, self.way
        client.banner()
        client.send(b"LHLO me\r\n" if way.lmtp else b"EHLO me\r\n")
        client.reply()
        self.greeted = True
        if not self._envelope():
            return
        if way.chunks:
            self._chunks()
        else:
            client.send(b"DATA\r\n")
            if client.reply() != 354:
                return
            self._data()
        if way.stop.endswith("at the end"):
            self.moment()
        if way.stop == "reset at the end":
            client.reset()
            raise Lost
        if way.stop == "half-close at the end":
            client.half_close()
        self._replies()
        if not way.stop:
            client.send(b"QUIT\r\n")
            client.reply()

    def _envelope(self) -> bool:
        body = " BODY=BINARYMIME" if self.way.binary else ""
        commands = [f"MAIL FROM:<{SENDER}>{body}", *(f"RCPT TO:<{each}>" for each in self.verdicts)]
        codes = []
        if self.way.pipelined:
            self.client.send("".join(f"{each}\r\n" for each in commands).encode())
            codes = [self.client.reply() for _ in commands]
        else:
            for each in commands:
                self.client.send(f"{each}\r\n".encode())
                codes.append(self.client.reply())
        for recipient, code in zip(self.verdicts, codes[1:], strict=True):
            if code == 250:
                self.unanswered.append(recipient)
            elif codes[0] == 250 and code >= 500:
                self.verdicts[recipient] = Verdict.REJECTED
        return bool(self.unanswered)

    # The message; it is ``whole`` from when its end may have arrived

    def _data(self) -> None:
        lines = self.letter.text.split(b"\r\n")
        text = b"\r\n".join([b"." + line if line.startswith(b".") else line for line in lines])
        cut = len(text) * self.way.at // 100
        self.client.send(text[:cut])
        self._stop_in_the_text()
        self.whole = True
        self.client.send(text[cut:] + b".\r\n")

    def _chunks(self) -> None:
        text = self.letter.text
        cut = len(text) * self.way.at // 100
        if self.way.stop.endswith("in the text"):
            self.client.send(b"BDAT %d LAST\r\n" % len(text) + text[:cut])
            self._stop_in_the_text()
        self.client.send(b"BDAT %d\r\n" % cut + text[:cut])
        if self.client.reply() != 250:
            raise Lost
        self.whole = True
        self.client.send(b"BDAT %d LAST\r\n" % len(text[cut:]) + text[cut:])

    def _stop_in_the_text(self) -> None:
        if self.way.stop == "reset in the text":
            self.client.reset()
            raise Lost
        if self.way.stop == "half-close in the text":
            self.client.half_close()
            while True:
                assert self.client.reply() >= 400, "250 to half a message"

    def _replies(self) -> None:
        code = 0
        while self.unanswered:
            if not code or (self.way.lmtp and code != 421):
                code = self.client.reply()
            verdict = Verdict.TAKEN if code == 250 else Verdict.LATER if code < 500 else Verdict.REJECTED
            self.verdicts[self.unanswered.pop(0)] = verdict
