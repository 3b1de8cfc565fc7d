"""Replies of Dovecot, right and wrong, in pieces: no login succeeds that it did not accept, and none waits for ever.

And what a client may call its recipients: no name becomes a path outside the directory of all users.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, cast

from fumi_core.delivery.maildir_recipients import RecipientMaildirs
from fumi_core.errors import SMTPError
from fumi_core.plugins.dovecot.auth import UnusableReply, user_of
from fumi_core.plugins.dovecot.channel import Link, Request, Unavailable
from fumi_core.plugins.dovecot.protocol import MAX_REPLY, AuthConversation, UserdbConversation, line
from tests.core.dovecot_server import AUTH_HANDSHAKE, USERDB_HANDSHAKE

from . import campaign, speech

LOGINS = 3
"""Logins under way, with the numbers from 1; the last has a response to a challenge."""
VERBS = (
    b"OK",
    b"OK",
    b"OK",
    b"OK",
    b"FAIL",
    b"FAIL",
    b"CONT",
    b"CONT",
    b"ok",
    b"USER",
    b"NOTFOUND",
    b"",
    b"OK ",
    b"\x01OK",
    b"DONE",
)
NUMBERS = (
    b"1",
    b"1",
    b"2",
    b"2",
    b"3",
    b"3",
    b"0",
    b"4",
    b"-1",
    b"01",
    b" 1",
    b"\xd9\xa1",
    b"",
    b"4294967297",
    b"1\x010",
    b"9" * 5000,
)
PARAMETERS = (
    *(b"user=joe", b"user=joe", b"user=ann@d.example", b"user=", b"user", b"user=a\x01tb", b"user=a\x01\x01", b"user=\xff"),
    *(b"nologin", b"nologin=y", b"proxy", b"host=192.0.2.1", b"temp", b"code=temp_fail", b"code=user_disabled", b"reason=no"),
    *(b"reason=a\x01lb", b"xuser=eve", b"\x01user=eve", b"user\x01=eve", b"", b"authz", b"x" * 300, b"nologi\x01n", b"user==x"),
)
HANDSHAKES: tuple[bytes, ...] = (
    b"VERSION\t1\t2\n",
    b"VERSION\t1\n",
    b"VERSION\t2\t0\n",
    b"MECH\tPLAIN\n",
    b"MECH\n",
    b"SPID\t1\n",
    b"CUID\t2\n",
)
HANDSHAKES += (b"COOKIE\t3\n", b"DONE\n", b"DONE\n", b"OK\t1\tuser=joe\n", b"\n", b"X\n", b"\xff\n", b"VERSION\t11\t1\n")


@dataclass(frozen=True)
class Replies(campaign.Case):
    """What follows the handshake while three logins are under way."""

    def check(self) -> None:
        expected = self._expected()
        for pieces in (speech.cut(Random(self.cut), self.data), [self.data], speech.octets(self.data[:2000])):
            if b"".join(pieces) == self.data:
                assert asyncio.run(_answers(pieces)) == expected

    def _expected(self) -> list[str]:
        """For each login: the user that it becomes, the code of its refusal, or that the connection was lost."""
        found: dict[int, str] = {}
        challenged = False
        *lines, _ = self.data.split(b"\n")
        for each in lines:
            verb, *fields = (_plain(field) for field in each.split(b"\t"))
            number = fields[0] if fields else ""
            if len(each) > MAX_REPLY or verb not in ("OK", "FAIL", "CONT") or number not in ("1", "2", "3", "01"):
                break
            if int(number) in found:
                continue
            if verb == "CONT":
                if number != "3" or challenged:
                    break
                challenged = True
                continue
            found[int(number)] = _decision(verb, fields[1:])
        return [found.get(number, "lost") for number in range(1, LOGINS + 1)]


def _plain(field: bytes) -> str:
    """The field without its escapes, character by character."""
    text, plain = iter(field.decode("utf-8", "surrogateescape")), ""
    for character in text:
        if character == "\x01":
            character = next(text, "")
            character = {"0": "\0", "1": "\x01", "t": "\t", "r": "\r", "l": "\n"}.get(character, character)
        plain += character
    return plain


def _decision(verb: str, parameters: list[str]) -> str:
    given = dict(reversed([each.partition("=")[::2] for each in parameters]))
    if verb == "FAIL":
        codes = [each.removeprefix("code=") for each in parameters if each.startswith("code=")]
        return "454" if "temp" in given or codes[:1] == ["temp_fail"] else "535"
    if "nologin" in given:
        return "535"
    users = [each.removeprefix("user=") for each in parameters if each.startswith("user=")]
    good = bool(users) and bool(users[0]) and users[0].isprintable()
    return users[0] if good and "proxy" not in given else "454"


class Transport:
    """Takes what a connection writes, and that it is closed."""

    def __init__(self) -> None:
        self.written = b""
        self.closed = False

    def write(self, data: bytes) -> None:
        assert not self.closed
        self.written += data

    def abort(self) -> None:
        self.closed = True


async def _answers(pieces: list[bytes]) -> list[str]:
    link, transport = Link(AuthConversation()), Transport()
    link.connection_made(cast(Any, transport))
    link.data_received(AUTH_HANDSHAKE.encode())
    await link.ready
    deadline = asyncio.get_running_loop().time() + 3600
    asked = [Request("AUTH", ("PLAIN", "service=smtp", "resp=")) for _ in range(LOGINS - 1)]
    asked.append(Request("AUTH", ("XOAUTH2", "service=smtp", "resp="), ("",)))
    logins = [asyncio.create_task(_answer(link, request, deadline)) for request in asked]
    await asyncio.sleep(0)
    for piece in pieces:
        link.data_received(piece)
    link.connection_lost(None)
    answers = await asyncio.gather(*logins)
    assert transport.closed
    assert transport.written.count(line("CONT", "3", "")) <= 1
    return answers


async def _answer(link: Link, request: Request, deadline: float) -> str:
    try:
        return user_of(await link.request(request, deadline))
    except SMTPError as error:
        return str(error.code) if "\n" not in error.message else "two lines"
    except UnusableReply:
        return "454"
    except Unavailable:
        return "lost"


@dataclass(frozen=True)
class Lookups(campaign.Case):
    """What a userdb sends after its handshake while two users are looked up."""

    def check(self) -> None:
        for pieces in (speech.cut(Random(self.cut), self.data), [self.data]):
            assert asyncio.run(_lookups(pieces)) == self._expected()

    def _expected(self) -> list[str]:
        found: dict[int, str] = {}
        *lines, _ = self.data.split(b"\n")
        for each in lines:
            verb, *fields = (_plain(field) for field in each.split(b"\t"))
            number = fields[0] if fields else ""
            if verb not in ("USER", "NOTFOUND", "FAIL") or number not in ("1", "2", "01"):
                break
            found.setdefault(int(number), verb)
        return [found.get(number, "lost") for number in (1, 2)]


async def _lookups(pieces: list[bytes]) -> list[str]:
    link, transport = Link(UserdbConversation()), Transport()
    link.connection_made(cast(Any, transport))
    link.data_received(USERDB_HANDSHAKE.encode())
    deadline = asyncio.get_running_loop().time() + 3600

    async def verb() -> str:
        try:
            return (await link.request(Request("USER", ("joe", "service=smtp")), deadline)).verb
        except Unavailable:
            return "lost"

    lookups = [asyncio.create_task(verb()) for _ in range(2)]
    await asyncio.sleep(0)
    for piece in pieces:
        link.data_received(piece)
    link.connection_lost(None)
    assert b"CANCEL" not in transport.written
    return await asyncio.gather(*lookups)


@dataclass(frozen=True)
class Handshake(campaign.Case):
    """What a server sends before the first request."""

    def check(self) -> None:
        for pieces in (speech.cut(Random(self.cut), self.data), [self.data]):
            assert asyncio.run(_ready(pieces)) == self._expected()

    def _expected(self) -> bool:
        mechanisms = done = False
        *lines, _ = self.data.split(b"\n")
        for number, each in enumerate(lines):
            verb, *parameters = (_plain(field) for field in each.split(b"\t"))
            if done or verb in ("OK", "FAIL", "CONT") or (verb != "VERSION" and not number):
                return False
            if (verb == "VERSION" and parameters[:1] != ["1"]) or (verb == "DONE" and not mechanisms):
                return False
            mechanisms = mechanisms or (verb == "MECH" and bool(parameters))
            done = verb == "DONE"
        return done


async def _ready(pieces: list[bytes]) -> bool:
    """Whether the server may get requests; after a violation of the protocol it is disconnected."""
    link, transport = Link(AuthConversation()), Transport()
    link.connection_made(cast(Any, transport))
    for piece in pieces:
        link.data_received(piece)
    assert (link.lost is not None) == transport.closed
    return link.lost is None and link.conversation.ready


@dataclass(frozen=True)
class Recipient(campaign.Case):
    """An address of a recipient, as a client or a handler may give it."""

    def check(self) -> None:
        try:
            recipient = self.data.decode()
        except UnicodeDecodeError:
            return
        for template in ("/srv/mail/%d/%n/Maildir", "/srv/mail/%u", "/srv/mail/x-%n/%d-%u", "/srv/mail/%d"):
            paths = RecipientMaildirs(template, "+")._paths(recipient, "host.example")
            for path in paths or ():
                assert path.parts[:3] == ("/", "srv", "mail")
                assert path == Path(str(path))
                assert not {"..", ".", ""} & set(str(path)[1:].split("/"))
                assert str(path).isprintable() or not str(path).isascii()
            if paths is not None:
                assert len(paths[1].parts) == len(Path(template).parts)
                assert paths[1].is_relative_to(paths[0])


WORDS: tuple[bytes, ...] = (
    b"joe",
    b"JOE",
    b"+",
    b"+x",
    b"@",
    b"d.example",
    b"..",
    b".",
    b"/",
    b"../",
    b"\\",
    b'"',
    b"%n",
    b"%",
    b"\0",
    b"\n",
    b" ",
)
WORDS += ("\u00e4".encode(), "\u0130".encode(), "a\u0308".encode(), "\uff0e".encode(), "\u2024".encode(), "\u2215".encode())
WORDS += ("\u3002".encode(), b"xn--", b"\xff", b"~", b"[192.0.2.1]", b"x" * 300, "\uff0f".encode(), "\u202e".encode())


def replies(chance: Random) -> Replies:
    lines = [
        b"\t".join([chance.choice(VERBS), chance.choice(NUMBERS), *chance.choices(PARAMETERS, k=chance.randrange(4))])
        for _ in range(chance.randrange(6))
    ]
    return Replies(_bent(chance, b"".join(each + b"\n" for each in lines)), chance.randrange(1 << 30))


def lookups(chance: Random) -> Lookups:
    verbs = (b"USER", b"USER", b"NOTFOUND", b"FAIL", b"OK", b"CONT", b"SPID", b"")
    lines = [
        b"\t".join([chance.choice(verbs), chance.choice(NUMBERS), *chance.choices(PARAMETERS, k=chance.randrange(3))])
        for _ in range(chance.randrange(5))
    ]
    return Lookups(_bent(chance, b"".join(each + b"\n" for each in lines)), chance.randrange(1 << 30))


def handshake(chance: Random) -> Handshake:
    if chance.random() < 0.4:
        data = AUTH_HANDSHAKE.encode()
    else:
        data = b"".join([HANDSHAKES[0], *chance.choices(HANDSHAKES, k=chance.randrange(6))])
    return Handshake(_bent(chance, data), chance.randrange(1 << 30))


def recipient(chance: Random) -> Recipient:
    return Recipient(b"".join(chance.choices(WORDS, k=chance.randrange(8))), chance.randrange(1 << 30))


def _bent(chance: Random, data: bytes) -> bytes:
    """The same, mostly; sometimes with bytes that are lost, doubled or others."""
    for _ in range(chance.choice((0, 0, 0, 1, 2))):
        at = chance.randrange(len(data) + 1)
        data = chance.choice(
            (
                data[:at] + data[at + 1 :],
                data[:at],
                data[:at] + bytes([chance.randrange(256)]) + data[at:],
                data[:at] + data[max(at - 9, 0) : at] + data[at:],
                data[:at] + b"\n" + data[at:],
            )
        )
    return data


def test_no_login_succeeds_that_dovecot_did_not_accept() -> None:
    campaign.run("dovecot", 3, replies)


def test_a_user_exists_only_when_the_userdb_says_so() -> None:
    campaign.run("dovecot-users", 2, lookups)


def test_a_malformed_handshake_makes_no_connection() -> None:
    campaign.run("dovecot-handshake", 3, handshake)


def test_no_recipient_becomes_another_path() -> None:
    campaign.run("maildir-recipient", 10, recipient)
