"""SASLprep (RFC 4013): one form for a password or user name that can be typed, and sent, as different characters.

An é may be one character or two, depending on the keyboard. Both are the same password.
"""

from __future__ import annotations

import stringprep
import unicodedata


def prepare(text: str) -> str:
    """Map spaces to the ASCII space and invisible characters to nothing (§2.1), then normalize to NFKC (§2.2).

    Prohibited and unassigned characters are kept: a comparison needs no more.
    """
    if text.isascii():
        return text
    mapped = (" " if stringprep.in_table_c12(each) else each for each in text if not stringprep.in_table_b1(each))
    return unicodedata.normalize("NFKC", "".join(mapped))


def forms(text: str) -> tuple[str, ...]:
    """The prepared form and, where it differs, the text as it is: other programs often hash the unprepared form."""
    prepared = prepare(text)
    return (prepared,) if prepared == text else (prepared, text)
