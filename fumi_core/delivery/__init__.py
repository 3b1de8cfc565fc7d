"""Where accepted mail goes. A target is a plugin: its handlers deliver the message before the client gets 250.

It has ``name``, the label of its metrics; ``dependency_problem()``, which returns why it cannot deliver now, or None, and
may take seconds; and ``check()`` for ``--check``, which creates nothing, raises OSError if the target could not deliver, and
returns a remark for the operator, or None.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Protocol, cast

from fumi_core.app import Fumi
from fumi_core.delivery.discard import Discard
from fumi_core.delivery.maildir import maildir_at
from fumi_core.delivery.next_hop.target import NextHop
from fumi_core.runtime.addresses import parse_address

TARGETS = ("maildir", "lmtp", "smtp", "discard")


class DeliveryTarget(Protocol):
    """A place for mail; see above."""

    name: str

    def __call__(self, app: Fumi) -> None: ...

    def dependency_problem(self) -> str | None: ...

    def check(self) -> str | None: ...


def parse_target(text: str, state: Path | None = None, recipient_delimiter: str = "+") -> DeliveryTarget:
    """``maildir:PATH``, ``lmtp:ADDR``, ``smtp:ADDR`` or ``discard:``. Raises ValueError for anything else.

    ``state`` is a directory where a target may store replies; None disables that. It is created when it is needed.
    ``recipient_delimiter`` separates a detail in a local part, which the variables of ``maildir:`` leave out.
    """
    kind, colon, rest = text.partition(":")
    if kind == "maildir" and rest:
        return maildir_at(rest, recipient_delimiter)
    if kind in ("lmtp", "smtp") and rest:
        return NextHop(cast(Literal["lmtp", "smtp"], kind), parse_address(rest), state)
    if kind == "discard" and colon and not rest:
        return Discard()
    raise ValueError(f"{text!r} is not a target: write maildir:PATH, lmtp:ADDR, smtp:ADDR or discard:")
