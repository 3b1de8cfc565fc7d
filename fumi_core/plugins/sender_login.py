"""``sender_login(domains)``: a logged-in user may send only from its own address."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable
from typing import Any

from fumi_core.app import Fumi
from fumi_core.handlers.contexts import MailContext
from fumi_core.handlers.middleware import Next
from fumi_core.plugins import arguments
from fumi_core.smtp.domains import canonical


def name_of(user: Any) -> str:
    """The user name given to ``ctx.accept()``. Raises TypeError for any other object, which defers the message."""
    if not isinstance(user, str):
        raise TypeError(
            f"sender_login: session.user is a {type(user).__name__}; give sender_login() a login= that returns its name"
        )
    return user


def sender_login(domains: Iterable[str] = (), *, login: Callable[[Any], str] = name_of) -> Callable[[Fumi], None]:
    """Answer MAIL of a logged-in user with ``553 5.7.1`` unless the sender is the login, or the login @ one of ``domains``.

    Case is ignored, as in most mail systems, and so is the spelling of an internationalized domain: users whose logins differ
    only in these can send as each other. The null sender is allowed, since return receipts have it (RFC 8098 §3). Clients that
    have not logged in are not checked, and neither is the From field. ``login`` returns the login for the object given to
    ``ctx.accept()``. Raises ValueError for a string that is not a domain.
    """
    own = arguments.domains("sender_login", domains)

    async def check(ctx: MailContext, next: Next) -> None:
        user, sender = ctx.session.user, ctx.address.address
        if user is not None and sender and not _owns(login(user), sender, own):
            ctx.reject("5.7.1 Sender address rejected: not owned by your login", 553)
        await next()

    def plugin(app: Fumi) -> None:
        app.on_mail_from(check)

    return plugin


def _owns(name: str, sender: str, domains: frozenset[str]) -> bool:
    if _folded(name) == _folded(sender):
        return True
    local, _, domain = sender.rpartition("@")
    return "@" not in name and _folded(name) == _folded(local) and canonical(domain) in domains


def _folded(address: str) -> str:
    local, at, domain = address.rpartition("@")
    if not at:
        local, domain = domain, ""
    return f"{unicodedata.normalize('NFC', local).lower()}{at}{canonical(domain)}"
