"""The app of the rows `all-in-one-…`, which `fumi-edge` runs in its own process. It discards."""

from __future__ import annotations

from fumi_core import DataContext, Fumi, Next

app = Fumi(auth_optional=True)


@app.on_data
async def discard(ctx: DataContext, next: Next) -> None:
    """Accept the message, and keep nothing of it."""
    async for _ in ctx.stream:
        pass
