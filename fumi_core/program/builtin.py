"""The app that ``fumi-core`` runs when it is given none: takes mail for the domains it is told, and delivers it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fumi_core.app import Fumi
from fumi_core.delivery import Target, parse_target
from fumi_core.delivery.loop_limit import loop_limit
from fumi_core.plugins import rcpt_filter, sender_login
from fumi_core.program import mail_log
from fumi_core.server.observer import Observer


def build(
    deliver: str,
    *,
    domains: Sequence[str] = (),
    state: Path | None = None,
    observer: Observer | None = None,
    **options: Any,
) -> Fumi:
    """``state`` is a directory where the target may remember things. It is made when it is needed.

    Raises ValueError for an unknown target, OSError when its place cannot be made ready, TypeError for a bad option."""
    app = Fumi(**{"auth_optional": True, **options})
    if observer is not None:
        app.observer = observer
    return equip(app, parse_target(deliver, state), domains)


def equip(app: Fumi, target: Target, domains: Sequence[str], *, own_senders: bool = False) -> Fumi:
    """Make an app without handlers the built-in one. ``own_senders``: users may send under addresses of their own only."""
    if target.name != "discard":
        # What is thrown away needs no trace, and is what benchmarks measure with.
        app.use(mail_log.transactions)
    if own_senders:
        app.use(sender_login(domains))
    if domains:
        app.use(rcpt_filter(domains))
    return app.use(loop_limit).use(target)
