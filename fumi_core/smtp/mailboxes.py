"""What an address names: the user of a mailbox, apart from quotes and the detail after a delimiter."""

from __future__ import annotations

import re
from typing import NamedTuple

_QUOTED_PAIR = re.compile(r"\\(.)")


class Mailbox(NamedTuple):
    """``user`` is the local part without quotes and detail, ``domain`` what follows the @, "" without one."""

    user: str
    domain: str

    def __str__(self) -> str:
        return f"{self.user}@{self.domain}" if self.domain else self.user


def mailbox_of(address: str, delimiter: str = "") -> Mailbox:
    """The mailbox of an address: ``joe+news@example.org`` is ``joe`` at ``example.org`` if ``+`` is in ``delimiter``.

    ``delimiter`` contains the characters that may begin a detail, none by default. As in Postfix, a local part that begins with
    one of them has no detail.
    """
    local, at, domain = address.rpartition("@")
    if not at:
        local, domain = address, ""
    if len(local) > 1 and local[0] == local[-1] == '"':
        local = _QUOTED_PAIR.sub(r"\1", local[1:-1])
    detail = next((at for at, character in enumerate(local) if character in delimiter), 0)
    return Mailbox(local[:detail] if detail else local, domain)


def check_delimiter(given: object) -> str:
    """Return characters that may begin a detail. Raises ValueError for characters at which no local part could be split."""
    if not isinstance(given, str) or not all(each.isascii() and each.isprintable() and not each.isalnum() for each in given):
        raise ValueError(f"a recipient delimiter consists of ASCII punctuation, such as '+', not {given!r}")
    if set(given) & set('@/." \\'):
        raise ValueError(f"{given!r} cannot delimit a recipient's detail: write '+' or '-', or '' for none")
    return given
