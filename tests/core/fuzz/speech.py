"""What clients say: whole sessions by a loose grammar and out of the dialogues, then bent at random."""

from __future__ import annotations

import ast
from base64 import b64encode
from pathlib import Path
from random import Random

DIALOGUES = Path(__file__).parents[1] / "dialogues"
MAX_SEED = 1500

VERBS = (b"HELO", b"EHLO", b"LHLO", b"MAIL", b"RCPT", b"DATA", b"BDAT", b"RSET", b"NOOP", b"VRFY", b"EXPN", b"HELP", b"AUTH")
LOCALS = (b"a", b"joe", b"no", b"later", b"bye", b'"a b"', b"a.b", b"a..b", "grün".encode(), b"\xff", b"x" * 64, b"x" * 65, b"")
DOMAINS = (b"b.example", b"d", b"[192.0.2.1]", b"[IPv6:::1]", b"[300.1]", "bücher.example".encode(), b"-x", b"y" * 250, b"")
PARAMETERS = (
    *(b" SIZE=5", b" SIZE=99999", b" SIZE=x", b" BODY=8BITMIME", b" BODY=BINARYMIME", b" BODY=X", b" SMTPUTF8", b" SMTPUTF8=1"),
    *(b" RET=FULL", b" ENVID=a+2Bb", b" ENVID=+", b" AUTH=<>", b" REQUIRETLS", b" NOTIFY=NEVER", b" NOTIFY=x", b" X=y", b"  "),
    b"=",
)  # fmt: skip
TEXTS = (b"hi", b".", b"..", b".x", b"no", b"bye", b"\0", b"\xff", b"\r\n", b"\r\n", b"\r\n", b"\r\n.", b"\r\n..", b"x" * 70)
BARE = (b"\n", b"\r", b"\n.\n", b"\r.\r", b"\r\n.\n", b"\n.\r\n", b"\r\n.\r", b"\r\n\0.\r\n")
ENDS = (b"\r\n.\r\n",) * 12 + (b"\r\n.\r\n\r\n", b"\r\n.", b"")
ANYWHERE = (
    *(b"\r\n", b"\n", b"\r", b".", b"\r\n.\r\n", b"\0", b"\xff", b" ", b"\t", b"<", b">", b":", b"=", b"*\r\n"),
    *(b"QUIT\r\n", b"RSET\r\n", b"EHLO y\r\n", b"AUTH LOGIN\r\n", b"GET / HTTP/1.1\r\n", b"\x16\x03\x01", "ü".encode()),
    *(b"BDAT 3\r\n", b"BDAT 0 LAST\r\n", b"DATA\r\n"),
)  # fmt: skip
RESPONSES = (
    *(
        b"\0joe\0secret",
        b"\0no\0x",
        b"no\0joe\0secret",
        b"joe\0joe\0secret",
        b"\0jo\re\0x",
        b"\0bye\0x",
        b"joe",
        b"secret",
        b"no",
        b"joe 0123",
        b"\0",
        b"\xff",
        b"",
    ),
    *(b"user=joe\x01auth=Bearer t\x01\x01", b"user=no\x01auth=Bearer t\x01\x01", b"user=joe"),
)
# Around the limits of lines.
LENGTHS = (505, 4080, 4088, 4089, 4090, 4095, 4096, 4097, 8000, 12274, 12275, 12276, 12286, 12287, 12288, 12289, 20000)


def said_in_dialogues() -> list[bytes]:
    """What the client says in each of the dialogues, those left out that are mostly long."""
    found = []
    for path in sorted(DIALOGUES.rglob("*.txt"), key=lambda path: path.name):
        said = b""
        for line in path.read_text("utf-8").splitlines():
            kind, text = line[:2], line[3:]
            if kind == "C:":
                said += text.encode() + b"\r\n"
            elif kind == "C!":
                said += ast.literal_eval('b"' + text.replace('"', r"\"") + '"')
        if 0 < len(said) <= MAX_SEED:
            found.append(said)
    return found


SEEDS = said_in_dialogues()


def session(chance: Random, greeting: bytes) -> bytes:
    """A session, in good order more often than not. ``greeting`` is how one that is begins."""
    roll = chance.random()
    if roll < 0.2:
        said = chance.choice(SEEDS)
    else:
        said = greeting if roll < 0.95 else _greeting(chance) if roll < 0.98 else b""
        for _ in range(chance.randrange(1, 5)):
            said += chance.choices(PARTS, WEIGHTS)[0](chance)
    if chance.random() < 0.4:
        said = bent(chance, said)
    return said + b"QUIT\r\n" if chance.random() < 0.5 else said


def bent(chance: Random, said: bytes) -> bytes:
    """With a few octets or pieces left out, put in, doubled or moved."""
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        at = chance.randrange(len(said) + 1)
        end = at + chance.choice((1, 1, 2, 5, 20))
        how = chance.randrange(6)
        if how == 0:
            said = said[:at] + said[end:]
        elif how == 1:
            said = said[:end] + said[at:]
        elif how == 2:
            said = said[:at] + bytes((chance.randrange(256),)) + said[at + 1 :]
        elif how == 3:
            other = chance.randrange(len(said) + 1)
            said = said[:other] + said[at:end] + said[other:]
        else:
            said = said[:at] + chance.choice(ANYWHERE) + said[at:]
    return said


def _greeting(chance: Random) -> bytes:
    return chance.choice((b"EHLO x\r\n", b"LHLO x\r\n", b"HELO x\r\n", b"EHLO\r\n", "EHLO bücher.example\r\n".encode()))


def _address(chance: Random) -> bytes:
    if chance.random() < 0.75:
        return b"<%b@b.example>" % chance.choices(LOCALS[:5], (40, 5, 2, 2, 1))[0]
    return b"<%b@%b>" % (chance.choice(LOCALS), chance.choice(DOMAINS)) if chance.random() < 0.8 else b"<>"


def _parameters(chance: Random) -> bytes:
    return b"" if chance.random() < 0.7 else b"".join(chance.choices(PARAMETERS, k=chance.randrange(1, 4)))


def _envelope(chance: Random) -> bytes:
    said = b"MAIL FROM:%b%b\r\n" % (_address(chance), _parameters(chance))
    for _ in range(chance.choice((1, 1, 1, 2, 3, 0))):
        said += b"RCPT TO:%b%b\r\n" % (_address(chance), _parameters(chance) if chance.random() < 0.2 else b"")
    return said


def _text(chance: Random) -> bytes:
    text = b"".join(chance.choices(TEXTS, k=chance.randrange(8)))
    if chance.random() < 0.15:
        at = chance.randrange(len(text) + 1)
        text = text[:at] + chance.choice(BARE) + text[at:]
    return text


def _message(chance: Random) -> bytes:
    return _envelope(chance) + b"DATA\r\n" + _text(chance) + chance.choice(ENDS)


def _chunks(chance: Random) -> bytes:
    said, text = _envelope(chance), _text(chance) + b"\r\n"
    if chance.random() < 0.3:
        said = said.replace(b"\r\n", b" BODY=BINARYMIME\r\n", 1)
    while text:
        size = chance.randrange(len(text) + 1)
        chunk, text = text[:size], text[size:]
        said += _chunk(chance, chunk, not text and chance.random() < 0.8)
        if chance.random() < 0.05:
            said += chance.choice((b"RSET\r\n", b"NOOP\r\n", b"EHLO x\r\n", b"DATA\r\n", b"BDAT\r\n", b"MAIL FROM:<>\r\n"))
    return said if chance.random() < 0.3 else said + b"BDAT 0 LAST\r\n"


def _chunk(chance: Random, chunk: bytes, last: bool) -> bytes:
    size = len(chunk) if chance.random() < 0.97 else max(0, len(chunk) + chance.choice((-1, 1, 2, 30)))
    return chance.choice((b"BDAT %d%b\r\n", b"bdat  %d %b\r\n")) % (size, b" LAST" if last else b"") + chunk


def _auth(chance: Random) -> bytes:
    said = b"AUTH " + chance.choice((b"PLAIN", b"plain", b"LOGIN", b"CRAM-MD5", b"XOAUTH2", b"X", b""))
    if chance.random() < 0.6:
        said += b" " + _response(chance)
    said += b"\r\n"
    for _ in range(chance.randrange(4)):
        said += _response(chance) + b"\r\n"
    return said


def _response(chance: Random) -> bytes:
    if chance.random() < 0.85:
        return b64encode(chance.choice(RESPONSES))
    if chance.random() < 0.2:
        return b"A" * chance.choice(LENGTHS)
    return chance.choice((b"*", b"=", b"", b"!!!", b"A", b"\xff", b"QUIT"))


def _command(chance: Random) -> bytes:
    argument = chance.choice((b"", b"", b"", b" x", b" ", b"  ", b" \0", b" \xc3\xbc", b" <a@b.example>", b"\t"))
    return chance.choice(VERBS) + argument + chance.choice((b"\r\n",) * 9 + (b"\n", b"\r\r\n", b"\r"))


def _nonsense(chance: Random) -> bytes:
    return chance.randbytes(chance.randrange(20)) + chance.choice((b"\r\n", b"\n", b""))


def _starttls(chance: Random) -> bytes:
    return chance.choice((b"STARTTLS\r\n", b"STARTTLS x\r\n", b"starttls \r\n"))


def _long(chance: Random) -> bytes:
    """A line around one of the limits, of whatever."""
    before = chance.choice((b"NOOP ", b"AUTH PLAIN ", b"AUTH LOGIN\r\n", b"", b"MAIL FROM:<", b"\0"))
    return before + b"A" * (chance.choice(LENGTHS) - len(before.rpartition(b"\n")[2])) + b"\r\n"


def _many(chance: Random) -> bytes:
    """So many at once that the replies wait for their turn."""
    units = (b"NOOP\r\n", b"BDAT 0\r\n", b"BDAT 1\r\nx", b"RSET\r\n", b"MAIL FROM:<>\r\n", b"RCPT TO:<a@b.example>\r\n", b"X\r\n")
    return _envelope(chance) + chance.choice(units) * chance.choice((100, 499, 600, 1200))


PARTS = (_message, _chunks, _auth, _command, _envelope, _nonsense, _greeting, _starttls, _long, _many)
WEIGHTS = (300, 240, 120, 220, 40, 30, 40, 20, 4, 1)


def cut(chance: Random, data: bytes) -> list[bytes]:
    """The same in pieces."""
    if chance.random() < 0.3:
        return data.splitlines(keepends=True)
    marks = sorted(chance.randrange(len(data) + 1) for _ in range(chance.choice((1, 2, 3, 6))))
    return [data[a:b] for a, b in zip((0, *marks), (*marks, len(data)), strict=True)]


def octets(data: bytes) -> list[bytes]:
    """The same octet by octet."""
    return [data[at : at + 1] for at in range(len(data))]
