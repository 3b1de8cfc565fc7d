"""The app that ``fumi-core`` runs without MODULE:APP: accepts mail for the configured domains, and delivers it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fumi_core.app import Fumi
from fumi_core.delivery import DeliveryTarget, parse_target
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
    """Return the built-in app, with the target that ``deliver`` names and with these options of ``Fumi``.

    ``state`` is a directory where the target may store replies; it is created when it is needed. Raises ValueError for an unknown
    target or an invalid option, TypeError for an unknown option, OSError if a directory cannot be created.
    """
    app = Fumi(**{"auth_optional": True, **options})
    if observer is not None:
        app.observer = observer
    return equip(app, parse_target(deliver, state), domains)


def equip(
    app: Fumi,
    target: DeliveryTarget,
    domains: Sequence[str],
    *,
    own_senders: bool = False,
    milters: Sequence[Callable[[Fumi], None]] = (),
) -> Fumi:
    """Add the built-in handlers to an app that has none. With ``own_senders``, users may send only from their own addresses."""
    if target.name != "discard":
        # Discarded messages are not logged: this target is for benchmarks.
        app.use(mail_log.transactions)
    if own_senders:
        app.use(sender_login(domains))
    if domains:
        app.use(rcpt_filter(domains))
    app.use(loop_limit)
    for each in milters:
        app.use(each)
    return app.use(target)
