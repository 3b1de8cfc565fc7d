"""The packets of the milter protocol, sans-IO: what the server sends, and what a filter answers (Sendmail's libmilter, mfdef.h).

A packet is a length of four bytes, a letter, and data of that length less one. Strings end with NUL, numbers are big-endian.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum

MAX_PACKET_BYTES = 1024 * 1024
"""Bytes of a filter's packet. libmilter's have at most 64 KiB; other libraries send a whole replaced body in one packet."""
MAX_DATA_BYTES = 65_535
"""Bytes of data in a packet for the filter (MILTER_MAX_DATA_SIZE)."""

ABORT = b"\0\0\0\1A"
QUIT = b"\0\0\0\1Q"
QUIT_NEW_CONNECTION = b"\0\0\0\1K"

_LENGTH = struct.Struct("!I")
_NUMBERS = struct.Struct("!III")
_FIELD_NAME = re.compile(rb"[!-9;-~]+")
_REPLY_LINE = re.compile(r"([45][0-9]{2})(?:[ -](.*))?", re.DOTALL)
_LINE_END = re.compile(r"\r\n|\r|\n")
_STATUS = re.compile(r"[45]\.[0-9]{1,3}\.[0-9]{1,3}(?: |$)")


class Malformed(Exception):
    """What the filter sent is not the milter protocol; the message says why."""


def packet(letter: bytes, data: bytes = b"") -> bytes:
    return _LENGTH.pack(1 + len(data)) + letter + data


def strings(*texts: bytes) -> bytes:
    """Strings as they are sent. NUL bytes, which would end them early, become spaces."""
    return b"".join(text.replace(b"\0", b" ") + b"\0" for text in texts)


def macros(letter: bytes, values: Mapping[str, str]) -> bytes:
    """The packet that goes before the command ``letter``, with the values of macros for it."""
    return packet(b"D", letter + strings(*(text.encode(errors="replace") for pair in values.items() for text in pair)))


def negotiation(version: int, actions: int, steps: int) -> bytes:
    return packet(b"O", _NUMBERS.pack(version, actions, steps))


class PacketReader:
    """Splits what arrives, in pieces of any length, into packets: the letter, and the data."""

    def __init__(self) -> None:
        self._text = bytearray()

    def feed(self, piece: bytes) -> Iterator[tuple[bytes, bytes]]:
        """Raises Malformed when it reaches a length that cannot be right."""
        self._text += piece
        while len(self._text) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._text)
            if not 0 < length <= MAX_PACKET_BYTES:
                raise Malformed(f"a packet of {length} bytes")
            end = _LENGTH.size + length
            if len(self._text) < end:
                return
            letter, data = bytes(self._text[4:5]), bytes(self._text[5:end])
            del self._text[:end]
            yield letter, data

    @property
    def partial(self) -> bool:
        """Whether a part of a packet has arrived."""
        return bool(self._text)


# What filters answer


class Verdict(Enum):
    """An answer that is a letter alone. All but PROGRESS end the filter's turn."""

    ACCEPT = b"a"
    CONTINUE = b"c"
    DISCARD = b"d"
    CONNECTION_FAILURE = b"f"
    PROGRESS = b"p"
    REJECT = b"r"
    SKIP = b"s"
    TEMPFAIL = b"t"
    SHUTDOWN = b"4"


@dataclass(frozen=True, slots=True)
class ReplyCode:
    """The reply for the client: the text has one line for each of the reply, the first with the enhanced status code if any."""

    code: int
    text: str


@dataclass(frozen=True, slots=True)
class AddHeader:
    name: bytes
    value: bytes


@dataclass(frozen=True, slots=True)
class InsertHeader:
    """At ``index``, where 0 is above the Received field that this server adds."""

    index: int
    name: bytes
    value: bytes


@dataclass(frozen=True, slots=True)
class ChangeHeader:
    """The field of this name that is number ``index``, from 1. An empty value deletes it."""

    index: int
    name: bytes
    value: bytes


@dataclass(frozen=True, slots=True)
class ReplaceBody:
    """The next piece of the new body."""

    text: bytes


@dataclass(frozen=True, slots=True)
class AddRecipient:
    address: str


@dataclass(frozen=True, slots=True)
class DeleteRecipient:
    address: str


@dataclass(frozen=True, slots=True)
class ChangeSender:
    address: str


@dataclass(frozen=True, slots=True)
class Quarantine:
    reason: str


Change = AddHeader | InsertHeader | ChangeHeader | ReplaceBody | AddRecipient | DeleteRecipient | ChangeSender | Quarantine
Answer = Verdict | ReplyCode | Change


def parse_answer(letter: bytes, data: bytes) -> Answer:
    """Raises Malformed."""
    if letter in _CHANGES:
        return _CHANGES[letter](data)
    try:
        verdict = Verdict(letter)
    except ValueError:
        raise Malformed(f"an answer {letter!r}") from None
    if data.strip(b"\0"):
        raise Malformed(f"{len(data)} bytes after {letter!r}")
    return verdict


def _texts(data: bytes, least: int, most: int) -> list[bytes]:
    *texts, rest = data.split(b"\0")
    if rest or not least <= len(texts) <= most:
        raise Malformed(f"{len(texts)} strings, not ended by NUL" if rest else f"{len(texts)} strings instead of {least}")
    return texts


def _field(data: bytes) -> tuple[bytes, bytes]:
    name, value = _texts(data, 2, 2)
    if not _FIELD_NAME.fullmatch(name):
        raise Malformed(f"{name[:100]!r} is not the name of a header field")
    return name, value


def _numbered_field(data: bytes) -> tuple[int, bytes, bytes]:
    if len(data) < _LENGTH.size:
        raise Malformed("a header field without its index")
    (index,) = _LENGTH.unpack_from(data)
    if index >= 2**31:
        raise Malformed(f"header index {index}")
    return index, *_field(data[_LENGTH.size :])


def _address(data: bytes) -> str:
    """The address without ``<>``. Its ESMTP parameters are not kept."""
    text = _texts(data, 1, 2)[0]
    try:
        return text.strip().removeprefix(b"<").removesuffix(b">").decode()
    except UnicodeDecodeError:
        raise Malformed(f"{text[:100]!r} is not an address") from None


def _reply_code(data: bytes) -> ReplyCode:
    """``550 5.7.1 Text``, or several such lines. libmilter doubles each %, as Sendmail takes the text for a format."""
    text = _texts(data, 1, 1)[0].decode("utf-8", "replace").replace("%%", "%")
    found = [_REPLY_LINE.fullmatch(line) for line in _LINE_END.split(text.rstrip("\r\n"))]
    matches = [match for match in found if match is not None]
    if not matches or len(matches) < len(found) or len({match[1] for match in matches}) > 1:
        raise Malformed(f"{text[:100]!r} is not a reply")
    lines = [match[2] or "" for match in matches]
    status = _STATUS.match(lines[0])
    if status is not None and status[0][0] != matches[0][1][0]:
        raise Malformed(f"{text[:100]!r} is not a reply: its codes differ")
    lines[1:] = [_STATUS.sub("", line, count=1) if _STATUS.match(line) else line for line in lines[1:]]
    return ReplyCode(int(matches[0][1]), "\n".join(lines))


_CHANGES: dict[bytes, Callable[[bytes], Answer]] = {
    b"h": lambda data: AddHeader(*_field(data)),
    b"i": lambda data: InsertHeader(*_numbered_field(data)),
    b"m": lambda data: ChangeHeader(*_numbered_field(data)),
    b"b": ReplaceBody,
    b"+": lambda data: AddRecipient(_address(data)),
    b"2": lambda data: AddRecipient(_address(data)),
    b"-": lambda data: DeleteRecipient(_address(data)),
    b"e": lambda data: ChangeSender(_address(data)),
    b"q": lambda data: Quarantine(_texts(data, 1, 1)[0].decode("utf-8", "replace")),
    b"y": _reply_code,
}


def parse_numbers(data: bytes) -> tuple[int, int, int, bytes]:
    """A filter's answer to ``negotiation()``: version, actions, steps, and what follows them. Raises Malformed."""
    if len(data) < _NUMBERS.size:
        raise Malformed("a negotiation that is too short")
    return *_NUMBERS.unpack_from(data), data[_NUMBERS.size :]


def parse_macro_lists(data: bytes) -> Iterable[tuple[int, list[str]]]:
    """The number of a stage, and the names of the macros that the filter wants there. Raises Malformed."""
    while data:
        if len(data) < _LENGTH.size:
            raise Malformed("a list of macros without its stage")
        (stage,) = _LENGTH.unpack_from(data)
        names, end, data = data[_LENGTH.size :].partition(b"\0")
        if not end:
            raise Malformed("a list of macros without its end")
        yield stage, names.decode("ascii", "replace").split()
