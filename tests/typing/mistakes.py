"""Mistakes in apps that a type checker must find.

Each ``type: ignore`` names the error that mypy must report for its line: with warn_unused_ignores, mypy fails where it does not.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import fumi_edge
from fumi_core import AuthContext, CloseContext, ConnectContext, DataContext, Fumi, MailContext, Next, RcptContext, plugins


def options() -> None:
    Fumi(auth_optionl=True)  # type: ignore[call-arg]
    Fumi(size="25 MB")  # type: ignore[arg-type]
    Fumi(auth_methods="PLAIN")  # type: ignore[arg-type]
    Fumi(disabled_commands=[1])  # type: ignore[list-item]
    Fumi(proxy_protocol="on")  # type: ignore[arg-type]
    Fumi(bare_newlines="accept")  # type: ignore[arg-type]
    Fumi(secure=True)  # type: ignore[call-arg]
    Fumi(True)  # type: ignore[call-arg]
    Fumi().configure(auth_optionl=True)  # type: ignore[call-arg]
    fumi_edge.Fumi(secur=True)  # type: ignore[call-arg]
    fumi_edge.Fumi(auth_optionl=True)  # type: ignore[call-arg]
    fumi_edge.Fumi(secure="yes")  # type: ignore[arg-type]
    fumi_edge.Fumi(cert=1)  # type: ignore[arg-type]


def attributes() -> None:
    app = Fumi()

    @app.on_mail_from
    async def mail_from(ctx: MailContext, next: Next) -> None:
        print(ctx.adress)  # type: ignore[attr-defined]
        print(ctx.session.remote_adress)  # type: ignore[attr-defined]
        print(ctx.session.envelope.rcpts)  # type: ignore[attr-defined]
        ctx.address = "joe@example.org"  # type: ignore[assignment]
        ctx.reject(550, "No")  # type: ignore[arg-type]
        await next()

    @app.on_auth
    async def auth(ctx: AuthContext, next: Next) -> None:
        print(ctx.credentials.user)  # type: ignore[attr-defined]
        await next()

    print(app.on_mail_form)  # type: ignore[attr-defined]
    print(plugins.max_sise)  # type: ignore[attr-defined]


def handlers(app: Fumi, edge: fumi_edge.Fumi) -> None:
    @app.on_connect  # type: ignore[type-var]
    async def alone(ctx: ConnectContext) -> None: ...

    @app.on_auth  # type: ignore[type-var]
    async def three(ctx: AuthContext, next: Next, more: str) -> None: ...

    @app.on_mail_from  # type: ignore[type-var]
    async def reply(ctx: MailContext, next: Next) -> str:
        return "550 No"

    @app.on_rcpt_to  # type: ignore[type-var]
    def verdict(ctx: RcptContext, next: Next) -> bool:
        return False

    @app.on_data  # type: ignore[type-var]
    async def other_phase(ctx: RcptContext, next: Next) -> None:
        await next()

    @edge.on_close  # type: ignore[type-var]
    async def other_phase_too(ctx: DataContext, next: Next) -> None:
        await next()

    @app.on_data
    async def not_called(ctx: DataContext, next: Next) -> None:
        await next.run()  # type: ignore[attr-defined]

    @app.on_close  # type: ignore[type-var]
    async def generator(ctx: CloseContext, next: Next) -> AsyncIterator[None]:
        yield

    app.on_data("data")  # type: ignore[type-var]


def used(app: Fumi) -> None:
    async def plugin(app: Fumi) -> None: ...

    def of_the_edge(app: fumi_edge.Fumi) -> None: ...

    app.use(plugin)  # type: ignore[arg-type]
    app.use(of_the_edge)  # type: ignore[arg-type]
    app.use(plugins.max_size)  # type: ignore[arg-type]
