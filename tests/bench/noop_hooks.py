"""The app of the row `core-hooks`: six hooks that do nothing but be called, one or two in every phase that a message passes."""

from collections.abc import Awaitable, Callable
from typing import Any

from fumi_core import Fumi

app = Fumi(auth_optional=True)


async def noop(ctx: Any, next: Callable[[], Awaitable[None]]) -> None:
    """Pass on."""
    await next()


app.on_connect(noop)
app.on_mail_from(noop)
app.on_mail_from(noop)
app.on_rcpt_to(noop)
app.on_rcpt_to(noop)
app.on_data(noop)
