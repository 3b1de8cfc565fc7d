"""Decodes a message for reading: its header fields, the text of its parts, its attachments (RFC 2045 to 2047).

Anyone may send a message, so it may be malformed: what cannot be decoded is shown as it is. Python's email takes time that grows
with the square of a field's length, and with the product of lines and boundaries; hence the limits.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from email import message_from_bytes
from email.errors import MessageError
from email.header import decode_header
from email.message import Message
from email.policy import Compat32
from itertools import islice
from typing import NamedTuple

MAX_PARTS = 100
"""Parts and attachments that are shown."""
MAX_FIELDS = 1000
"""Header fields of a message, or of a part, that are read."""
MAX_FIELD = 10_000
"""Characters of a field's value that are read."""
MAX_WORK = 10_000_000
"""Lines times boundaries of a message that is parsed, which is half a second: each line may be compared with each boundary."""
_NO_CHARSETS = frozenset({"punycode", "idna"})
"""Python's encodings of domain names (RFC 3492, RFC 3490), which take time that grows with the square of a text's length."""
_CONTROL_PICTURES = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\t\n"} | {0x7F: 0x2421}


class _Shortening(Compat32):
    """Leaves out the end of long fields when a message is parsed."""

    def header_source_parse(self, sourcelines: list[str]) -> tuple[str, str]:
        name, value = super().header_source_parse(sourcelines)
        return name, value if len(value) <= MAX_FIELD else value[:MAX_FIELD] + "\N{HORIZONTAL ELLIPSIS}"


_POLICY = _Shortening()


class Text(NamedTuple):
    """A part that is shown: its media type, such as ``text/plain``, and its text. HTML is its source."""

    kind: str
    text: str


class Attachment(NamedTuple):
    """A part that is only named; ``size`` is in bytes, decoded."""

    name: str
    kind: str
    size: int


class Headers(NamedTuple):
    """The header fields, decoded, in the order of the message."""

    fields: tuple[tuple[str, str], ...]

    def first(self, name: str) -> str:
        """The first field of this name, or an empty string."""
        return next(iter(self.every(name)), "")

    def every(self, name: str) -> list[str]:
        return [value for each, value in self.fields if each.lower() == name.lower()]

    @property
    def sender(self) -> str:
        """From, or the envelope's sender where there is none."""
        return self.first("From") or self.first("Return-Path")

    @property
    def recipients(self) -> list[str]:
        """The envelope's recipients."""
        return self.every("Delivered-To")


class Content(NamedTuple):
    """``more`` is the number of parts that are not shown."""

    headers: Headers
    texts: tuple[Text, ...]
    attachments: tuple[Attachment, ...]
    more: int


def headers(data: bytes) -> Headers:
    """The headers of a message, of which ``data`` is the beginning."""
    head = data.replace(b"\r\n", b"\n").partition(b"\n\n")[0]
    return _headers(message_from_bytes(head + b"\n\n", policy=_POLICY))


def content(data: bytes) -> Content:
    """Everything that is shown of a message."""
    try:
        message = _parsed(data)
        parts = [part for part in message.walk() if not part.is_multipart()]
    except (RecursionError, ValueError, LookupError, MessageError):
        # Parts inside parts, deeper than Python can go, and boundaries that the parser does not expect.
        return Content(headers(data), (Text("source, which cannot be parsed", visible(_decoded(data, "utf-8"))),), (), 0)
    shown = [_part(part) for part in parts[:MAX_PARTS]]
    return Content(
        _headers(message),
        tuple(each for each in shown if isinstance(each, Text)),
        tuple(each for each in shown if isinstance(each, Attachment)),
        len(parts) - len(shown),
    )


def _parsed(data: bytes) -> Message:
    """Raises MessageError for a message that would take long."""
    if data.lower().count(b"boundary") * (data.count(b"\n") + data.count(b"\r")) > MAX_WORK:
        raise MessageError("too many boundaries and lines")
    return message_from_bytes(data, policy=_POLICY)


def _part(part: Message) -> Text | Attachment:
    payload = part.get_payload(decode=True)
    data = payload if isinstance(payload, bytes) else b""
    name = _file_name(part)
    if part.get_content_maintype() == "text" and name is None and part.get_content_disposition() != "attachment":
        return Text(visible(part.get_content_type()), visible(_decoded(data, _charset(part))))
    return Attachment(visible(name or "without a name"), visible(part.get_content_type()), len(data))


def _file_name(part: Message) -> str | None:
    try:
        name = part.get_filename()
        return None if name is None else _words(str(name))
    except (ValueError, LookupError, TypeError):
        return "a name that cannot be decoded"  # RFC 2231 with a charset or sections that do not exist


def _charset(part: Message) -> str:
    try:
        return part.get_content_charset("utf-8")
    except (ValueError, LookupError, TypeError):
        return "utf-8"


def _decoded(data: bytes, charset: str) -> str:
    try:
        if codecs.lookup(charset).name in _NO_CHARSETS:
            charset = "utf-8"
        return data.decode(charset, "replace")
    except (LookupError, ValueError):
        return data.decode("utf-8", "replace")


def _headers(message: Message) -> Headers:
    return Headers(tuple((visible(name), visible(_words(value))) for name, value in islice(_raw(message), MAX_FIELDS)))


def _raw(message: Message) -> Iterator[tuple[str, str]]:
    for name, value in message.raw_items():
        unfolded = "".join(str(value).splitlines())
        yield str(name), unfolded.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _words(value: str) -> str:
    """Decode encoded words (RFC 2047)."""
    if "=?" not in value:
        return value
    try:
        return "".join(_word(text, charset) for text, charset in decode_header(value))
    except (ValueError, LookupError, MessageError):
        return value


def _word(text: bytes | str, charset: str | None) -> str:
    """A part of what decode_header() returns; text beside encoded words is bytes in the encoding raw-unicode-escape."""
    return text if isinstance(text, str) else text.decode(charset or "raw-unicode-escape", "replace")


def visible(text: str) -> str:
    """The text with pictures for control characters (U+2400), and without CR at the ends of lines."""
    return text.replace("\r\n", "\n").encode("utf-8", "replace").decode().translate(_CONTROL_PICTURES)
