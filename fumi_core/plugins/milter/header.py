"""The header section of a message, as a filter sees it and changes it (RFC 5322 §2.2): sans-IO."""

from __future__ import annotations

import re
from collections.abc import Iterable

from fumi_core.plugins.milter.wire import AddHeader, ChangeHeader, InsertHeader

MAX_BYTES = 256 * 1024
"""Bytes of a header section. It is kept in memory while filters change it."""
MAX_FIELD_BYTES = 64_000
"""Bytes of one field, which must fit into a packet."""
MAX_FIELDS = 10_000
"""Fields of a header section. Each is a step of its own for the filter."""

# field-name, and the space that RFC 5322 §4.5 (obs-optional) still allows before the colon
_FIELD = re.compile(rb"([!-9;-~]+)[ \t]*:")
_LINE_END = re.compile(rb"\r\n|\r|\n")


class TooLarge(Exception):
    """The header section, or a field of it, is too large for a filter, or has too many fields."""


class Field:
    """``text`` is the whole field, folded by CRLF, without its last CRLF; ``key`` is the name in lower case."""

    __slots__ = ("_colon", "key", "name", "text")

    def __init__(self, text: bytes) -> None:
        match = _FIELD.match(text)
        assert match is not None
        self.name = match[1]
        self.key = self.name.lower()
        self.text = text
        self._colon = match.end()

    def value(self, leading_space: bool) -> bytes:
        """The value as filters get it: folded by LF, and without one space after the colon unless they want that."""
        value = self.text[self._colon :].replace(b"\r\n", b"\n")
        return value if leading_space else value.removeprefix(b" ")


def new_field(name: bytes, value: bytes, leading_space: bool) -> Field:
    """A filter's field. Each line but the first gets a tab if it begins without space: it must not become a field of its own."""
    first, *others = _LINE_END.split(value)
    lines = [first, *(line if line[:1] in (b" ", b"\t") else b"\t" + line for line in others if line.strip())]
    return Field(name + (b":" if leading_space else b": ") + b"\r\n".join(lines))


class HeaderReader:
    """Reads ``fields`` from the beginning of a message that arrives in pieces of any length. What follows is the body.

    The section ends at an empty line, the ``separator``, or before a line that belongs to no field.
    """

    def __init__(self) -> None:
        self.fields: list[Field] = []
        self.separator = False
        self.ended = False
        self.size = 0
        """Bytes of the message before the body."""
        self._text = bytearray()  # the last line, which may be incomplete
        self._field: list[bytes] = []  # the lines of a field that may go on

    def feed(self, piece: bytes) -> bytes:
        """Take the next piece of the message, and return what belongs to the body. Raises TooLarge."""
        if self.ended:
            return piece
        begin = max(len(self._text) - 1, 0)
        self._text += piece
        # From ``begin`` on: a long line in small pieces must not be searched, or copied, once more for each piece.
        if self._text.find(b"\r\n", begin) >= 0:
            *lines, rest = bytes(self._text).split(b"\r\n")
            self._text = bytearray(rest)
            for number, line in enumerate(lines):
                if not self._take(line):
                    return b"\r\n".join([*lines[number + (not line) :], rest])
        if self.size + len(self._text) > MAX_BYTES:
            raise TooLarge
        return b""

    def end(self) -> bytes:
        """The message has ended. Returns what belongs to the body."""
        if self.ended:
            return b""
        text = bytes(self._text)
        if not text or not self._take(text):
            self._finish()
            return text
        self.size -= 2  # the last line has no CRLF
        self._finish()
        return b""

    def _take(self, line: bytes) -> bool:
        """Take a line of the header section. Returns False for one that ends it. Raises TooLarge."""
        if line[:1] in (b" ", b"\t") and self._field:
            self._field.append(line)
        elif _FIELD.match(line):
            self._finish_field()
            self._field.append(line)
        else:
            self.separator = not line
            self.size += 2 * self.separator
            self._finish()
            return False
        self.size += len(line) + 2
        if self.size > MAX_BYTES:
            raise TooLarge
        return True

    def _finish_field(self) -> None:
        if not self._field:
            return
        text, self._field = b"\r\n".join(self._field), []
        if len(text) > MAX_FIELD_BYTES or len(self.fields) == MAX_FIELDS:
            raise TooLarge
        self.fields.append(Field(text))

    def _finish(self) -> None:
        self._finish_field()
        self.ended = True


def changed(
    fields: Iterable[Field], changes: Iterable[AddHeader | InsertHeader | ChangeHeader], leading_space: bool
) -> list[Field]:
    """The fields after these changes, one after the other."""
    result = list(fields)
    for change in changes:
        if isinstance(change, ChangeHeader):
            _change(result, change, leading_space)
            continue
        field = new_field(change.name, change.value, leading_space)
        # Index 0 is above the Received field of this server, which is not among these, and index 1 is below it.
        at = len(result) if isinstance(change, AddHeader) else max(change.index - 1, 0)
        result.insert(at, field)
    return result


def _change(fields: list[Field], change: ChangeHeader, leading_space: bool) -> None:
    """A field that is not there is added, as in Sendmail and Postfix."""
    key = change.name.lower()
    found = [at for at, field in enumerate(fields) if field.key == key]
    at = found[max(change.index, 1) - 1] if max(change.index, 1) <= len(found) else None
    if not change.value:
        if at is not None:
            del fields[at]
        return
    field = new_field(change.name, change.value, leading_space)
    if at is None:
        fields.append(field)
    else:
        fields[at] = field
