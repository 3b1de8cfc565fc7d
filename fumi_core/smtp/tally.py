"""Counts events that are too frequent for one call of the observer each."""

from __future__ import annotations

from fumi_core.smtp import sasl
from fumi_core.smtp.grammar import VERBS
from fumi_core.smtp.results import AuthResult


class Tally:
    """How often each event happened, in all connections of a server. The set of keys is bounded."""

    __slots__ = ("authentications", "commands", "replies")

    def __init__(self) -> None:
        self.commands: dict[bytes, int] = dict.fromkeys([*(verb.encode() for verb in VERBS), b"OTHER"], 0)
        self.replies: dict[int, int] = {}
        self.authentications = dict.fromkeys(((method, result) for method in sasl.MECHANISMS for result in AuthResult), 0)
