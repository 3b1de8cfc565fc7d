"""A whole server with an app that goes wrong in every way, and clients that do: one reply a command, no short message, an end.

A script has a move a line; what is no move is left out, so that any part of a script is one:

    c NOOP          a command          m word, r word    MAIL and RCPT with this local part
    a user          AUTH PLAIN         d text            DATA and a message, "|" for CRLF
    k text, l text  BDAT, BDAT LAST
"""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

import pytest

from fumi_core import Fumi
from fumi_core.server.connection import LINGER_SECONDS

from . import campaign
from .model import replies_in
from .wild import AT_THE_END, FAULTS, READINGS, RETURNS, SLOW, SLOWLY, Wild
from .world import CLIENT, Client, Loop, World

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "lmtp": {"lmtp": True},
    "small": {"size": 40},
    "small lmtp": {"size": 40, "lmtp": True},
    "strict": {"max_errors": 3, "hide_enhancedstatuscodes": True},
    "asking": {"auth_optional": False, "assume_tls": True},
    "proxied": {"proxy_protocol": "required", "trusted_proxies": (CLIENT[0],)},
}
HEADER = b"PROXY TCP4 203.0.113.9 198.51.100.2 5000 25\r\n"
REFUSED = frozenset((*FAULTS, *(SLOWLY + fault for fault in FAULTS), *RETURNS))
"""Local parts that are never answered 250."""
ENDINGS = ("goes", "falls silent", "half-closes", "half-closes and never reads", "drips", "drips and never reads", "never reads")
DRIP = 60.0
"""Seconds between two octets."""
BOUND = 200.0
"""Seconds that an end may take beyond the timeouts: some drips, and handlers that are slow."""

_worlds: dict[str, tuple[World, Wild]] = {}


@pytest.fixture(autouse=True)
def worlds(loop: Loop) -> Iterator[None]:
    for name, options in SETTINGS.items():
        app = Fumi(**{"auth_optional": True, "name": "mx.example", "max_errors": 50, **options})
        wild = Wild(app, authenticates="auth_optional" in options)
        _worlds[name] = World(loop, app), wild
    yield
    _worlds.clear()


@dataclass(frozen=True)
class Script(campaign.Case):
    """What a client does, and how it ends; ``connecting`` is what goes wrong when it connects, and when it has gone."""

    setting: str
    connecting: str
    ending: str

    def check(self) -> None:
        world, wild = _worlds[self.setting]
        wild.connecting, wild.opened, wild.ended = self.connecting, 0, 0
        world.loop.problems.clear()
        speaker = Speaker(world, wild, self.data)
        speaker.run()
        if not speaker.lost:
            self._all_at_once(world, wild, speaker)
        wild.read.clear()
        self._end(world)
        assert _whole(wild.read, self.data), f"part of a message was read as {wild.read}"
        assert world.connections == 0, "connections that nobody ends"
        assert world.server.connection_count.clients == 0, "clients are counted that are gone"
        assert wild.opened == wild.ended, f"on_connect was called {wild.opened} times, on_close {wild.ended}"
        assert not world.loop.problems, f"nobody caught {world.loop.problems}"

    def _all_at_once(self, world: World, wild: Wild, before: Speaker) -> None:
        """The same, sent as soon as it can be, has as many replies."""
        wild.read.clear()
        client = world.connect()
        client.send(b"".join(before.sent))
        world.loop.run(len(before.sent) * 2 * SLOW)
        output = client.read()
        assert len(replies_in(output)) == before.replies, f"{output!r} in a pipeline"
        assert _whole(wild.read, self.data), f"part of a message was read as {wild.read}"
        client.close()
        world.loop.run(1)

    def _end(self, world: World) -> None:
        """A client that sends a part of it, and then ends in its way; nobody else is there."""
        options = world.server.options
        client = world.connect(little_room="never" in self.ending)
        sent = _opening(world) + b"".join(data for move in self.data.split(b"\n") for data in _said(move))
        if "never" in self.ending:
            sent += b"EHLO x\r\n" * 400
        if self.ending == "goes":
            client.send(sent[: self.cut % (len(sent) + 1)])
            client.close()
            world.loop.run(BOUND)
            return
        client.send(sent[: self.cut % (len(sent) + 1)])
        patience = options.socket_timeout + LINGER_SECONDS + BOUND
        if self.ending.startswith("half"):
            client.half_close()
        if self.ending.startswith("drips"):
            patience += options.data_timeout
            self._drip(world, client, patience)
        else:
            self._wait(world, client, patience)
        assert world.connections == 0, f"who {self.ending} is there after {patience} seconds"
        client.close()

    def _wait(self, world: World, client: Client, patience: float) -> None:
        for _ in range(3):
            world.loop.run(patience / 3)
            if "never" not in self.ending:
                client.read()

    def _drip(self, world: World, client: Client, patience: float) -> None:
        for _ in range(int(patience / DRIP)):
            if not world.connections:
                return
            client.send(b"x")
            world.loop.run(DRIP)
            if "never" not in self.ending:
                client.read()


class Speaker:
    """A client that waits for the reply to each move, and knows how many there must be."""

    def __init__(self, world: World, wild: Wild, script: bytes) -> None:
        self.world, self.wild = world, wild
        self.lmtp = world.server.options.lmtp
        self.client = world.connect()
        self.script = script
        self.sent: list[bytes] = []
        self.replies = 0
        self.recipients: list[str] = []
        self.chunks: bytes = b""
        self.lost = False
        """The server has closed the connection."""

    def run(self) -> None:
        self.wild.read.clear()
        self.sent.append(_opening(self.world))
        self.client.send(self.sent[0])
        self._hear(1, b"the connection")
        for move in self.script.split(b"\n"):
            if self.lost:
                break
            first, *rest = _said(move) or [b""]
            if first and self._say(move, first)[0] == 354 and rest:
                self._say(move, rest[0], final=True)
        self.client.close()
        self.world.loop.run(1)
        assert not self.wild.read, f"a message that never ended was read as {self.wild.read}"

    def _say(self, move: bytes, data: bytes, final: bool = False) -> list[int]:
        """Send it. Returns the codes of its replies."""
        kind, word = move[:1], move[2:].decode("latin-1")
        self.client.send(data)
        self.sent.append(data)
        if kind in b"kl" and self.recipients:
            self.chunks += _text(move)
        ends = final or kind == b"l"
        codes = self._hear(max(1, len(self.recipients)) if self.lmtp and ends else 1, data)
        if kind in b"mr" and codes[0] == 250:
            assert word not in REFUSED, f"250 to {data!r}"
        if kind == b"r" and codes[0] == 250:
            if not self.lmtp:
                self.recipients = [each for each in self.recipients if each != word]
            self.recipients.append(word)
        if ends and self.recipients:
            self._ended(_text(move) if final else self.chunks, codes)
        elif (codes[0] == 250 and data[:4] == b"MAIL") or (codes[0] < 500 and data[:4] in (b"EHLO", b"LHLO", b"RSET")):
            self.recipients, self.chunks = [], b""
        assert not self.wild.read, f"a message that has not ended was read as {self.wild.read}"
        return codes

    def _ended(self, text: bytes, codes: list[int]) -> None:
        assert 250 not in codes or not _fails(self.recipients, text), f"250 though {self.recipients} fail"
        limit = self.world.server.options.size
        assert 250 not in codes or limit is None or len(text) <= limit, f"250 to {len(text)} octets"
        read, self.recipients, self.chunks = self.wild.read, [], b""
        assert all(each == text for each in read), f"{read} was read instead of {text!r}"
        read.clear()

    def _hear(self, count: int, to: bytes) -> list[int]:
        """As many replies, or fewer where the server closes the connection, but one at least."""
        self.world.loop.run(2 * SLOW)
        replies = replies_in(self.client.read())
        self.lost = self.client.closed
        self.replies += len(replies)
        assert len(replies) == count or (self.lost and 1 <= len(replies) <= count), f"{len(replies)} replies to {to!r}: {replies}"
        return [reply.code for reply in replies]


def _opening(world: World) -> bytes:
    """What comes before the banner."""
    return HEADER if world.server.options.proxy_protocol == "required" else b""


def _fails(words: list[str], text: bytes) -> bool:
    """Whether the handlers raise something for these recipients."""
    for word in words:
        when, _, fault = word.partition("-")
        if word in ("unread", "task"):
            return False
        if word == "two" or (word == "tap" and text) or (when in AT_THE_END and fault in FAULTS):
            return True
    return "twice" in words or "returned" in words


def _whole(texts: list[bytes], script: bytes) -> bool:
    """Whether each is the text of a message of the script, which drips may have completed with "x"."""
    messages, chunks = [], b""
    for move in script.split(b"\n"):
        text = _text(move)
        if move[:1] == b"l":
            messages += [(chunks + text)[at:] for at in range(len(chunks) + 1)]
        elif move[:1] == b"d":
            messages.append(text)
        chunks = chunks + text if move[:1] == b"k" else chunks if move[:1] == b"c" else b""
    return all(any(len(each) == len(message) and message.startswith(each.rstrip(b"x")) for message in messages) for each in texts)


def _said(move: bytes) -> list[bytes]:
    """What the client sends, each part after the reply to the one before."""
    kind, word = move[:1], move[2:]
    if kind == b"c":
        return [word + b"\r\n"]
    if kind == b"m":
        return [b"MAIL FROM:<%b@b.example>\r\n" % word]
    if kind == b"r":
        return [b"RCPT TO:<%b@b.example>\r\n" % word]
    if kind == b"a":
        return [b"AUTH PLAIN %b\r\n" % b64encode(b"\0%b\0x" % word)]
    text = _text(move)
    if kind == b"d":
        return [b"DATA\r\n", re.sub(rb"(?m)^\.", b"..", text) + b".\r\n"]
    if kind in (b"k", b"l"):
        return [b"BDAT %d%b\r\n" % (len(text), b" LAST" if kind == b"l" else b"") + text]
    return []


def _text(move: bytes) -> bytes:
    return move[2:].replace(b"|", b"\r\n") + (b"\r\n" if move[:1] == b"d" else b"")


def script(chance: Random) -> Script:
    setting = chance.choice(list(SETTINGS))
    moves = [b"c LHLO x" if "lmtp" in setting else b"c EHLO x"] * (chance.random() < 0.97)
    if setting == "asking":
        moves.append(b"a " + _word(chance, 0.7, b"joe"))
    for _ in range(chance.choice((1, 1, 2, 3))):
        moves += _transaction(chance)
    connecting = chance.choice(list(FAULTS)) if chance.random() < 0.1 else ""
    return Script(b"\n".join(moves), chance.randrange(1 << 30), setting, connecting, chance.choice(ENDINGS))


def _word(chance: Random, good: float, usual: bytes) -> bytes:
    if chance.random() < good:
        return usual
    return (SLOWLY * (chance.random() < 0.3) + chance.choice(list(FAULTS))).encode()


def _transaction(chance: Random) -> list[bytes]:
    moves = [b"m " + (chance.choice((*RETURNS, "end")).encode() if chance.random() < 0.1 else _word(chance, 0.85, b"a"))]
    for _ in range(chance.choice((1, 1, 2, 3))):
        roll = chance.random()
        if roll < 0.4:
            moves.append(b"r " + _word(chance, 0.7, b"joe"))
        elif roll < 0.7:
            moves.append(b"r " + f"{chance.choice(AT_THE_END)}-{chance.choice(list(FAULTS))}".encode())
        else:
            moves.append(b"r " + chance.choice(READINGS).encode())
    if chance.random() < 0.15:
        moves.append(chance.choice((b"c RSET", b"c NOOP", b"c EHLO y", b"c VRFY a", b"c DATA x", b"c X", b"c MAIL")))
    if chance.random() < 0.5:
        return [*moves, b"d " + _some_text(chance)]
    moves += [b"k " + _some_text(chance) for _ in range(chance.randrange(3))]
    if chance.random() < 0.2:
        moves.append(chance.choice((b"c RSET", b"c NOOP", b"c EHLO y", b"c DATA x", b"c QUIT")))
    return [*moves, b"l " + _some_text(chance)]


def _some_text(chance: Random) -> bytes:
    return b"".join(chance.choices((b"hi", b"|", b".", b"|.", b"|..", b"x" * 30, b"\xff"), k=chance.randrange(6)))


def test_whatever_an_app_does_each_command_has_one_reply_and_each_client_an_end() -> None:
    campaign.run("apps", 4, script)
