"""The app of the row `core-hooks`: six hooks that do nothing but be called, one or two in every phase that a message passes."""

from fumi_core import Fumi, Next

app = Fumi(auth_optional=True)


async def noop(ctx: object, next: Next) -> None:
    """Pass on."""
    await next()


app.on_connect(noop)
app.on_mail_from(noop)
app.on_mail_from(noop)
app.on_rcpt_to(noop)
app.on_rcpt_to(noop)
app.on_data(noop)
