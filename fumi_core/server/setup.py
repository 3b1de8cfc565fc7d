"""What all dialogues of a server share: options, handlers, greetings, and where they count."""

from __future__ import annotations

from dataclasses import dataclass

from fumi_core.handlers.middleware import Chain
from fumi_core.runtime.addresses import Networks
from fumi_core.server.observer import Observer
from fumi_core.smtp.greetings import Greetings
from fumi_core.smtp.options import Options
from fumi_core.smtp.tally import Tally

PHASES = ("connect", "auth", "mail_from", "rcpt_to", "data", "close")
"""The phases of a session that have handlers."""

Chains = dict[str, Chain | None]
"""The composed handlers of each phase; None for a phase without handlers."""


@dataclass(slots=True)
class DialogueSetup:
    """One for all connections that are accepted until the app is configured again."""

    options: Options
    chains: Chains
    greetings: Greetings
    tally: Tally
    observer: Observer
    trusted: Networks
    """The peers that may send PROXY headers, XCLIENT and XFORWARD."""
