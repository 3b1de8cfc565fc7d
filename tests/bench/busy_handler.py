"""The app of the row `core-workers`: a handler that computes for half a millisecond or so, as a filter of mail would."""

from fumi_core import DataContext, Fumi, Next

app = Fumi(auth_optional=True)


@app.on_data
async def compute(ctx: DataContext, next: Next) -> None:
    """Take the message, and think."""
    await ctx.stream.read()
    sum(range(25_000))
