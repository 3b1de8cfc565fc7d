"""An app of fumi_core with a handler of each hook, which mypy --strict must accept. A test runs it."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Unpack, assert_type

from fumi_core import (
    Address,
    AuthContext,
    CloseContext,
    ConnectContext,
    Credentials,
    DataContext,
    Envelope,
    Fumi,
    MailContext,
    MailHandler,
    Next,
    OptionArguments,
    RcptContext,
    Session,
    TLSInfo,
    plugins,
)

app = Fumi(
    auth_methods=["PLAIN"],
    disabled_commands=("VRFY", "EXPN"),
    trusted_proxies={"192.0.2.0/24", "unix"},
    size=25_000_000,
    max_clients=None,
    socket_timeout=60,
    proxy_protocol="required",
    bare_newlines="normalize",
    logger=logging.getLogger("app"),
)


@app.on_connect
async def connect(ctx: ConnectContext, next: Next) -> None:
    session: Session = ctx.session
    tls: TLSInfo | None = session.tls
    if tls is not None and tls.version == "TLSv1":
        ctx.reject("Use a newer TLS", 554)
    await next()


@app.on_auth
async def auth(ctx: AuthContext, next: Next) -> None:
    credentials: Credentials = ctx.credentials
    if credentials.username == "joe" and credentials.validate_password("secret"):
        ctx.accept(credentials.username)
    await next()


@app.on_mail_from
def mail_from(ctx: MailContext, next: Next) -> Next:
    address: Address = ctx.address
    ctx.address = address._replace(address=address.address.lower())
    return next()


@app.on_rcpt_to
async def rcpt_to(ctx: RcptContext, next: Next) -> Next:
    assert_type(ctx.address.address, str)
    return next()


@app.on_data
async def data(ctx: DataContext, next: Next) -> None:
    envelope: Envelope = ctx.session.envelope
    size = 0
    async for piece in ctx.stream:
        size += len(assert_type(piece, bytes))
    ctx.accept(f"{size} octets for {len(envelope.rcpt_to)}")
    await next()


@app.on_close
def close(ctx: CloseContext, next: Next) -> None:
    logging.info("closed %s", ctx.session.id)


async def call_them(mail: MailContext, rcpt: RcptContext, next: Next) -> None:
    """A decorated handler keeps its type."""
    assert_type(mail_from(mail, next), Next)
    assert_type(await rcpt_to(rcpt, next), Next)


async def both(ctx: MailContext | RcptContext, rest: Callable[[], Awaitable[object]]) -> None:
    """A handler of two hooks, whose parameters have names of its own."""
    if ctx.address.address.endswith(".invalid"):
        ctx.reject("No such domain")
    await rest()


class Limit:
    """A handler that is an object with a method, and one that is an object itself."""

    async def check(self, ctx: DataContext, next: Next) -> None:
        await next()

    def __call__(self, ctx: DataContext, next: Next) -> Awaitable[None]:
        return next()


def bounces(text: str) -> Callable[[Fumi], None]:
    def refuse(ctx: MailContext, next: Next) -> Next:
        return next() if ctx.address.address else ctx.reject(text)

    def plugin(app: Fumi) -> None:
        handler: MailHandler = refuse
        app.on_mail_from(handler)

    return plugin


def make(**options: Unpack[OptionArguments]) -> Fumi:
    return Fumi(**options)


app.on_mail_from(both)
app.on_rcpt_to(both)
app.on_data(Limit().check)
app.on_data(Limit(), first=True)
app.on_data(lambda ctx, next: next())
assert_type(app.use(plugins.max_size(10_000_000)).use(bounces("No bounces")), Fumi)
app.configure(auth_optional=True)
made = make(lmtp=True)
