"""``denylist(ips)``: rejects clients by their address."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from fumi_core.app import Fumi
from fumi_core.handlers.contexts import ConnectContext, MailContext
from fumi_core.plugins import arguments
from fumi_core.plugins.by_address import by_address


def denylist(ips: Iterable[str]) -> Callable[[Fumi], None]:
    """Answer these addresses and CIDR blocks with ``554 5.7.1`` in place of the banner. Raises ValueError for other strings."""
    denied = arguments.networks("denylist", ips)

    async def judge(ctx: ConnectContext | MailContext) -> None:
        if ctx.session.remote_address in denied:
            ctx.reject("5.7.1 Access denied", 554)

    return by_address(judge)
