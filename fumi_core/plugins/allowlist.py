"""``allowlist(cidrs)``: rejects all clients except these."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from fumi_core.app import Fumi
from fumi_core.handlers.contexts import ConnectContext, MailContext
from fumi_core.plugins import arguments
from fumi_core.plugins.by_address import by_address


def allowlist(cidrs: Iterable[str]) -> Callable[[Fumi], None]:
    """Answer clients outside these CIDR blocks and addresses (``unix``: Unix sockets) with ``554 5.7.1`` in place of the banner.

    Raises ValueError for other strings, and for an empty list.
    """
    given = arguments.strings("allowlist", cidrs, "192.0.2.0/24")
    if not given:
        raise ValueError("allowlist([]) would reject every client: write the networks that may connect")
    allowed = arguments.networks("allowlist", given)

    async def judge(ctx: ConnectContext | MailContext) -> None:
        if ctx.session.remote_address not in allowed:
            ctx.reject("5.7.1 Access denied", 554)

    return by_address(judge)
